"""The demo's training in Python, as one would write it with torch: what the C++ trainer is measured against.

The same networks, in the same memory format, the same augmentations by the same tensor operations (both views of a
batch in one go), torch's fused SGD, and a foreach average of the parameters.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import momentum_bn

from .network_workload import SeparatePasses
from .peers import PublishedBatchNorm

WIDTHS, POOL = (32, 64, 128), 2
HIDDEN, OUT = 512, 128
MEAN, STD = 0.2860, 0.3530
STEPS = 1_000_000
TEACHER_MOMENTUM = 0.97

# (channels, relu) to a module that takes x and perhaps a residual.
NormFactory = Callable[[int, bool], nn.Module]


def student_norm(channels: int, relu: bool) -> nn.Module:
    return SeparatePasses(nn.BatchNorm2d(channels), relu)


def student_norm_1d(channels: int, relu: bool) -> nn.Module:
    return SeparatePasses(nn.BatchNorm1d(channels), relu)


def _ours(layer: type[nn.Module]) -> NormFactory:
    return lambda channels, relu: layer(channels, total_iters=STEPS, inplace=True, activation="relu" if relu else None)


def _published(channels: int, relu: bool) -> nn.Module:
    return SeparatePasses(PublishedBatchNorm(channels, STEPS), relu)


class _Identity(nn.Identity):
    """Has weight and bias, so that it can follow a student."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))


def _identity(channels: int, relu: bool) -> nn.Module:
    return SeparatePasses(_Identity(channels), relu)


# Of the teacher: for (N, C, H, W) and for (N, C).
NORMS: dict[str, tuple[NormFactory, NormFactory]] = {
    "momentum": (_ours(momentum_bn.MomentumBatchNorm2d), _ours(momentum_bn.MomentumBatchNorm1d)),
    "published": (_published, _published),
    "identity": (_identity, _identity),
}


class Block(nn.Module):
    def __init__(self, inside: int, out: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = norm(out, True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = norm(out, True)
        self.downsample = None
        if stride != 1 or inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), norm(out, False))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x))), shortcut)
        return y


class Encoder(nn.Module):
    def __init__(self, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, WIDTHS[0], 3, 2, 1, bias=False)
        self.bn1 = norm(WIDTHS[0], True)
        inside = [WIDTHS[0], *WIDTHS[:-1]]
        self.layers = nn.Sequential(
            *(Block(i, o, 1 if n == 0 else 2, norm) for n, (i, o) in enumerate(zip(inside, WIDTHS, strict=True)))
        )

    def forward(self, x: Tensor) -> Tensor:
        # One channel, with strides that say channels last: otherwise the convolution's output is NCHW and is copied.
        n, c, h, w = x.shape
        x = self.bn1(self.conv1(x.as_strided((n, c, h, w), (h * w, 1, w, 1))))
        return F.adaptive_avg_pool2d(self.layers(x), POOL).flatten(1)


class Branch(nn.Module):
    """Encoder and projector, and for the student a predictor."""

    def __init__(self, norm: NormFactory, norm_1d: NormFactory, predictor: bool) -> None:
        super().__init__()

        def head(inside: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(inside, HIDDEN, bias=False), norm_1d(HIDDEN, True), nn.Linear(HIDDEN, OUT))

        self.encoder = Encoder(norm)
        self.projector = head(WIDTHS[-1] * POOL * POOL)
        self.predictor = head(OUT) if predictor else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.predictor(self.projector(self.encoder(x)))
        return y


def load_images(folder: str) -> Tensor:
    """Fashion-MNIST's training images, (N, 1, 28, 28), uint8."""
    content = gzip.decompress((Path(folder) / "train-images-idx3-ubyte.gz").read_bytes())
    return torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)


def augment(images: Tensor) -> Tensor:
    """Crop, flip, gamma, then brightness and contrast in an order drawn for each image; (N, 1, H, W) in [0, 1]."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count) * (high - low) + low

    area, aspect = uniform(0.45, 1), uniform(-0.25, 0.25).exp_()
    width, height = (area * aspect).sqrt_().clamp_max_(1), (area / aspect).sqrt_().clamp_max_(1)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = torch.where(torch.rand(count) < 0.5, -width, width)
    affine[:, 1, 1] = height
    affine[:, 0, 2] = (1 - width) * uniform(-1, 1)
    affine[:, 1, 2] = (1 - height) * uniform(-1, 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    out = F.grid_sample(images, grid, align_corners=False).clamp_(0, 1)
    out.pow_(uniform(-0.5, 0.5).exp_().view(-1, 1, 1, 1))

    brightness, contrast = uniform(0.8, 1.2).view(-1, 1, 1, 1), uniform(0.6, 1.4).view(-1, 1, 1, 1)
    brightness_first = torch.rand(count) < 0.5
    for first in (True, False):
        chosen = (brightness_first == first).nonzero().flatten()
        out.index_copy_(0, chosen, out.index_select(0, chosen).mul_(brightness[chosen]).clamp_(0, 1))
        chosen = (brightness_first != first).nonzero().flatten()
        some = out.index_select(0, chosen)
        mean = some.mean(dim=(1, 2, 3), keepdim=True)
        some = some.mul_(contrast[chosen]).add_(mean * (1 - contrast[chosen])).clamp_(0, 1)
        out.index_copy_(0, chosen, some)
    return out


class PythonTrainer:
    """One training run; ``norm`` as in NORMS."""

    def __init__(self, images: Tensor, norm: str, batch_size: int) -> None:
        torch.manual_seed(0)
        self.images = images
        self.batch_size = batch_size
        self.student = Branch(student_norm, student_norm_1d, predictor=True)
        self.teacher = Branch(*NORMS[norm], predictor=False).requires_grad_(False)
        for network in (self.student, self.teacher):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.followed = [p.detach() for name, p in self.student.named_parameters() if not name.startswith("predictor")]
        self.following = list(self.teacher.parameters())
        decayed = [p for p in self.student.parameters() if p.dim() > 1]
        undecayed = [p for p in self.student.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": undecayed, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=1e-4, momentum=0.9, fused=True)
        torch._foreach_copy_(self.following, self.followed)
        self.step_number = 0
        self.order = torch.randperm(len(images))

    def views(self) -> Tensor:
        """Both views, (2 B, 1, 28, 28)."""
        start = self.step_number * self.batch_size % (len(self.images) - self.batch_size)
        batch = self.images[self.order[start : start + self.batch_size]].float().mul_(1 / 255)
        return augment(torch.cat([batch, batch])).sub_(MEAN).div_(STD).contiguous()

    def step(self) -> float:
        cosine = (math.cos(math.pi * self.step_number / STEPS) + 1) / 2
        view1, view2 = self.views().chunk(2)
        with torch.no_grad():
            torch._foreach_lerp_(self.following, self.followed, (1 - TEACHER_MOMENTUM) * cosine)
            target1, target2 = self.teacher(view1), self.teacher(view2)
        similarity = (
            F.cosine_similarity(self.student(view1), target2).mean()
            + F.cosine_similarity(self.student(view2), target1).mean()
        )
        loss = 4 - 2 * similarity
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step_number += 1
        return loss.item()

    def steps(self, count: int) -> float:
        """Takes steps; returns the last one's loss."""
        loss = 0.0
        for _ in range(count):
            loss = self.step()
        return loss
