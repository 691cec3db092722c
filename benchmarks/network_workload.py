"""A teacher's whole forward, a student's forward and backward: ResNet-50 whose every norm is one of several."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import momentum_bn

from . import names
from .layer_workloads import TOTAL_ITERS
from .peers import PublishedBatchNorm
from .resnet import NormFactory, ResNet, share_weights
from .workload import Workload


class SeparatePasses(nn.Module):
    """A normalisation, an addition and a ReLU, each a pass of its own over memory; the last two in place."""

    def __init__(self, norm: nn.Module, relu: bool) -> None:
        super().__init__()
        self.norm = norm
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(x)
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if self.relu else y


def _ours(channels: int, relu: bool) -> nn.Module:
    return momentum_bn.MomentumBatchNorm2d(
        channels, total_iters=TOTAL_ITERS, inplace=True, activation="relu" if relu else None
    )


NORMS: dict[str, NormFactory] = {
    names.IDENTITY: lambda _, relu: SeparatePasses(nn.Identity(), relu),
    names.OURS: _ours,
    names.TORCH: lambda channels, relu: SeparatePasses(nn.BatchNorm2d(channels), relu),
    names.PUBLISHED: lambda channels, relu: SeparatePasses(PublishedBatchNorm(channels, TOTAL_ITERS), relu),
}


# Of a student.
BATCH_NORMS: dict[str, NormFactory] = {
    names.TORCH: NORMS[names.TORCH],
    names.BATCH_NORM_CONVERTED: lambda channels, relu: SeparatePasses(momentum_bn.BatchNorm2d(channels), relu),
    names.BATCH_NORM_RESIDUAL_RELU: lambda channels, relu: momentum_bn.BatchNorm2d(
        channels, activation="relu" if relu else None
    ),
}


def networks(
    channels_last: bool, blocks: Sequence[int], width: int, norms: Mapping[str, NormFactory] = NORMS
) -> dict[str, ResNet]:
    """One network per normalisation, in training mode, all with the same convolutions."""
    models = {name: ResNet(norm, blocks, width) for name, norm in norms.items()}
    share_weights(models.values())
    if channels_last:
        models = {name: model.to(memory_format=torch.channels_last) for name, model in models.items()}  # type: ignore[call-overload]
    return models


def network_name(channels_last: bool) -> str:
    return f"ResNet-50 {'NHWC' if channels_last else 'NCHW'}"


def network_workload(
    channels_last: bool, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, batch: int = 16, side: int = 128
) -> Workload:
    """Forward passes of ResNet-50 in training mode without gradients, in multiples of one without normalisation."""
    models: dict[str, nn.Module] = dict(networks(channels_last, blocks, width))
    models[names.AS_MADE] = momentum_bn.MomentumTeacher(models[names.TORCH], TOTAL_ITERS)
    x = _images(batch, side, channels_last)
    return Workload(
        network_name(channels_last),
        names.FORWARD,
        names.IDENTITY,
        with_grad=False,
        calls={name: partial(model, x) for name, model in models.items()},
        written=lambda: [model(x) for model in models.values()],
    )


def student_network_workload(
    channels_last: bool, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, batch: int = 16, side: int = 128
) -> Workload:
    """Forward and backward of ResNet-50 as a student's, in multiples of one with torch's BatchNorm."""
    models = networks(channels_last, blocks, width, BATCH_NORMS)
    x = _images(batch, side, channels_last)

    def step(model: ResNet) -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return Workload(
        network_name(channels_last),
        names.STUDENT,
        names.TORCH,
        with_grad=True,
        calls={name: partial(step, model) for name, model in models.items()},
        written=lambda: [model(x) for model in models.values()],
        forwards={name: partial(model, x) for name, model in models.items()},
    )


def step_workload(
    channels_last: bool, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, batch: int = 16, side: int = 128
) -> Workload:
    """A student's forward and backward and its teacher's forward, without gradients: what a training step consists of.

    Ours is what one call for each network makes of torch's: ``fuse(convert_batchnorm(...))`` and ``MomentumTeacher``.
    """
    students = networks(channels_last, blocks, width)
    teachers = networks(channels_last, blocks, width)
    ours = momentum_bn.fuse(momentum_bn.convert_batchnorm(copy.deepcopy(students[names.TORCH])))
    pairs: dict[str, tuple[nn.Module, nn.Module]] = {
        names.IDENTITY: (students[names.IDENTITY], teachers[names.IDENTITY]),
        names.TORCH: (students[names.TORCH], teachers[names.TORCH]),
        names.PUBLISHED: (students[names.TORCH], teachers[names.PUBLISHED]),
        names.AS_MADE: (ours, momentum_bn.MomentumTeacher(ours, TOTAL_ITERS)),
    }
    x = _images(batch, side, channels_last)

    def step(student: nn.Module, teacher: nn.Module) -> None:
        with torch.no_grad():
            target = teacher(x)
        student.zero_grad()
        (student(x) - target).square().mean().backward()

    return Workload(
        network_name(channels_last),
        names.STEP,
        names.IDENTITY,
        with_grad=True,
        calls={name: partial(step, *pair) for name, pair in pairs.items()},
        written=lambda: [network(x) for pair in pairs.values() for network in pair],
    )


def _images(batch: int, side: int, channels_last: bool) -> Tensor:
    x = torch.randn(batch, 3, side, side)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x
