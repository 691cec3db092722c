"""One normalisation: the layer, its peers, and what a pass over memory costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import momentum_bn

from . import names, operators
from .cases import Case
from .peers import PublishedBatchNorm, published_formulas
from .timing import Call
from .workload import Workload

TOTAL_ITERS = 10**9  # so far from its end, the schedule changes nothing that is timed


def forward_workload(case: Case, compiled: bool) -> Workload:
    """Forward in training mode without gradients, as in a teacher. ``compiled`` adds torch.compile of the peers."""
    x, residual, overwritten, out = case.make(), case.make(), case.make(), case.make()
    rectified = case.make()
    layer = make_ours(case)
    inplace = make_ours(case, inplace=True)
    fused = make_ours(case, inplace=True, activation="relu")
    with torch.no_grad():
        # Over its own output again and again, a ReLU would leave fewer and fewer values other than 0.
        fused.bias.fill_(2.0)
    torch_layer = make_torch(case)
    published = make_published(case)
    calls: dict[str, Call] = {
        names.COPY: lambda: out.copy_(x),
        names.RELU: lambda: rectified.relu_(),
        names.CLONE: lambda: x.clone(),
        names.OURS_INPLACE: lambda: inplace(overwritten),
        names.OURS_INPLACE_RELU: lambda: fused(overwritten),
        names.OURS_INPLACE_RESIDUAL_RELU: lambda: fused(overwritten, residual),
        names.OURS_FRESH: lambda: layer(x),
        names.TORCH: lambda: torch_layer(x),
        names.TORCH_REUSED: _torch_into(torch_layer, x, out),
        names.TORCH_RELU: lambda: torch_layer(x).relu_(),
        names.PUBLISHED: lambda: published(x),
    }
    peers = _compiled_peers(case) if compiled else {}
    calls |= {name: partial(model, x) for name, model in peers.items()}
    return Workload(
        case.name,
        names.FORWARD,
        names.COPY,
        with_grad=False,
        calls=calls,
        may_fail=set(peers),
        written=lambda: [out, rectified, overwritten],
    )


def training_workload(case: Case, compiled: bool) -> Workload:
    """Forward and backward (dx, dweight, dbias); the gradient that comes in is not the layer's to overwrite."""
    x = case.make().requires_grad_()
    dy, overwritten, out = case.make(), case.make(), case.make()
    models: dict[str, nn.Module] = {
        names.OURS: make_ours(case),
        names.OURS_RELU: make_ours(case, activation="relu"),
        names.TORCH: make_torch(case),
        names.PUBLISHED: make_published(case),
    }
    peers = _compiled_peers(case) if compiled else {}

    def training(model: nn.Module) -> Call:
        inputs = [x, *model.parameters()]
        return lambda: torch.autograd.grad(model(x), inputs, dy)

    calls: dict[str, Call] = {names.COPY: lambda: out.copy_(dy)}
    calls |= {name: training(model) for name, model in (models | peers).items()}
    calls[names.OURS_BACKWARD_FRESH] = operators.backward_fresh(dy, x.detach())
    calls[names.OURS_BACKWARD_OVER_DY] = operators.backward_over(overwritten, x.detach())
    return Workload(
        case.name,
        names.TRAINING,
        names.COPY,
        with_grad=True,
        calls=calls,
        may_fail=set(peers),
        written=lambda: [out, overwritten],
    )


def student_workload(case: Case, compiled: bool) -> Workload:
    """BatchNorm whose statistics take gradients, as in a student: forward and backward, and the backward pass alone."""
    x, residual = case.make().requires_grad_(), case.make().requires_grad_()
    dy, out = case.make(), case.make()
    overwritten = [case.make() for _ in range(3)]
    plain, fused = make_batch_norm(case), make_batch_norm(case, activation="relu")
    torch_layer = make_torch(case)
    forwards: dict[str, Callable[[], Tensor]] = {
        names.BATCH_NORM: lambda: plain(x),
        names.BATCH_NORM_RELU: lambda: fused(x),
        names.BATCH_NORM_RESIDUAL_RELU: lambda: fused(x, residual),
        names.TORCH: lambda: torch_layer(x),
        names.TORCH_RELU: lambda: torch_layer(x).relu_(),
        names.TORCH_RESIDUAL_RELU: lambda: torch_layer(x).add_(residual).relu_(),
    }
    with_residual = {names.BATCH_NORM_RESIDUAL_RELU, names.TORCH_RESIDUAL_RELU}
    layers: dict[str, nn.Module] = {names.BATCH_NORM: plain}
    layers |= dict.fromkeys((names.TORCH, names.TORCH_RELU, names.TORCH_RESIDUAL_RELU), torch_layer)

    def training(name: str, forward: Callable[[], Tensor]) -> Call:
        inputs = [x, *layers.get(name, fused).parameters(), *([residual] if name in with_residual else [])]
        return lambda: torch.autograd.grad(forward(), inputs, dy)

    calls: dict[str, Call] = {names.COPY: lambda: out.copy_(dy)}
    calls |= {name: training(name, forward) for name, forward in forwards.items()}
    if compiled:
        torch.compiler.reset()
        peer = nn.Sequential(make_torch(case), nn.ReLU())
        peer.compile(dynamic=False)
        layers[names.TORCH_RELU_COMPILED] = peer
        calls[names.TORCH_RELU_COMPILED] = training(names.TORCH_RELU_COMPILED, lambda: peer(x))
    backward = partial(operators.backward_over, x=x.detach(), detach_statistics=False)
    calls[names.BATCH_NORM_BACKWARD] = backward(overwritten[0])
    calls[names.BATCH_NORM_BACKWARD_RELU] = backward(overwritten[1], activation="relu")
    calls[names.BATCH_NORM_BACKWARD_RESIDUAL_RELU] = backward(
        overwritten[2], activation="relu", residual=residual.detach()
    )
    return Workload(
        case.name,
        names.STUDENT,
        names.COPY,
        with_grad=True,
        calls=calls,
        may_fail={names.TORCH_RELU_COMPILED} & set(calls),
        written=lambda: [out, *overwritten],
        forwards=forwards,
    )


class PublishedFormulas(nn.Module):
    """The published formulas without what a compiler could not see through: the remembered view and the schedule."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(case.channels, dtype=case.dtype))
        self.bias = nn.Parameter(torch.zeros(case.channels, dtype=case.dtype))
        self.register_buffer("running_mean", torch.zeros(case.channels, dtype=case.dtype))
        self.register_buffer("running_var", torch.ones(case.channels, dtype=case.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return published_formulas(x, self.weight, self.bias, self.running_mean, self.running_var)


def _compiled_peers(case: Case) -> dict[str, nn.Module]:
    # Shapes of earlier cases would otherwise make the compiler assume shapes that change, and give up in the end.
    torch.compiler.reset()
    peers: dict[str, nn.Module] = {
        names.TORCH_COMPILED: make_torch(case),
        names.PUBLISHED_COMPILED: PublishedFormulas(case),
    }
    for peer in peers.values():
        peer.compile(dynamic=False)
    return peers


def make_ours(case: Case, **options: object) -> momentum_bn.MomentumBatchNorm:
    layer = momentum_bn.MomentumBatchNorm1d if len(case.shape) == 2 else momentum_bn.MomentumBatchNorm2d
    return layer(case.channels, total_iters=TOTAL_ITERS, **options)  # type: ignore[arg-type]


def make_batch_norm(case: Case, **options: object) -> momentum_bn.BatchNorm:
    layer = momentum_bn.BatchNorm1d if len(case.shape) == 2 else momentum_bn.BatchNorm2d
    return layer(case.channels, **options)  # type: ignore[arg-type]


def make_torch(case: Case) -> nn.BatchNorm1d | nn.BatchNorm2d:
    return (nn.BatchNorm1d if len(case.shape) == 2 else nn.BatchNorm2d)(case.channels)


def make_published(case: Case) -> nn.Module:
    """Its parameters have x's dtype: mixed ones would promote the output."""
    return PublishedBatchNorm(case.channels, total_iters=TOTAL_ITERS).to(case.dtype)


def _torch_into(layer: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor, out: Tensor) -> Call:
    statistics = torch.empty(x.size(1)), torch.empty(x.size(1))
    parameters = layer.weight, layer.bias, layer.running_mean, layer.running_var
    return lambda: torch.native_batch_norm(x, *parameters, True, 0.1, 1e-5, out=(out, *statistics))
