"""One normalisation on a GPU: the layer, its peers and a copy, all made on torch's default device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .. import names
from ..cases import Case
from ..layer_workloads import TOTAL_ITERS, PublishedFormulas, make_batch_norm, make_ours, make_published, make_torch
from ..timing import Call
from .timing import in_turn

Block = Callable[..., Tensor]


class Composite:
    """The layer by torch's own operations: what runs where the library has no kernels."""

    def __init__(self, case: Case) -> None:
        self.layer = make_ours(case)

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        # A device without kernels has the operator's implementation in torch's operations, which take any tensor.
        device = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
        y: Tensor = torch.ops.momentum_bn._forward_train.default.redispatch(
            device, x, None, layer.weight, layer.bias, list(layer.buffers()), layer.eps, None, TOTAL_ITERS, 2, "cosine",
            "published", True, None,
        )[0]  # fmt: skip
        return y


def without_cudnn(layer: nn.Module) -> Block:
    """torch's own kernels instead of cuDNN's."""

    def run(x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            y: Tensor = layer(x)
        return y

    return run


def forward_calls(case: Case, sets: int, compiled: bool) -> dict[str, Call]:
    """Forward in training mode, to be run without gradients; each call takes the next of ``sets`` sets of inputs."""
    inputs = [(case.make(), case.make(), case.make()) for _ in range(sets)]  # x, a residual, what is overwritten
    inplace, fused = make_ours(case, inplace=True), make_ours(case, inplace=True, activation="relu")
    with torch.no_grad():
        fused.bias.fill_(2.0)  # over its own output again and again, a ReLU would leave zeros
    on_x: dict[str, Block] = {
        names.OURS_FRESH: make_ours(case),
        names.COMPOSITE: Composite(case),
        names.TORCH: make_torch(case),
        names.TORCH_NATIVE: without_cudnn(make_torch(case)),
        names.PUBLISHED: make_published(case),
    }
    if compiled:
        on_x[names.PUBLISHED_COMPILED] = compiled_formulas(case)
    calls = {
        names.COPY: in_turn([partial(out.copy_, x) for x, _, out in inputs]),
        names.OURS_INPLACE: in_turn([partial(inplace, out) for _, _, out in inputs]),
        names.OURS_INPLACE_RELU: in_turn([partial(fused, out) for _, _, out in inputs]),
        names.OURS_INPLACE_RESIDUAL_RELU: in_turn([partial(fused, out, residual) for _, residual, out in inputs]),
    }
    return calls | {name: in_turn([partial(block, x) for x, _, _ in inputs]) for name, block in on_x.items()}


def training_calls(case: Case, sets: int, compiled: bool) -> dict[str, Call]:
    """Forward and backward (dx, dweight, dbias)."""
    blocks = _differentiated(case)
    blocks[names.PUBLISHED] = (published := make_published(case)), published
    if compiled:
        blocks[names.PUBLISHED_COMPILED] = (formulas := compiled_formulas(case)), formulas

    def training(block: Block, wanted: list[Tensor], x: Tensor, dy: Tensor) -> Call:
        return lambda: torch.autograd.grad(block(x), wanted, dy)

    return _gradient_calls(case, sets, blocks, training)


def backward_calls(case: Case, sets: int, compiled: bool) -> dict[str, Call]:  # noqa: ARG001 (as the others have it)
    """Backward alone (dx, dweight, dbias), of a forward pass that was done before and is kept."""

    def backward(block: Block, wanted: list[Tensor], x: Tensor, dy: Tensor) -> Call:
        y = block(x)
        return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)

    return _gradient_calls(case, sets, _differentiated(case), backward)


def _differentiated(case: Case) -> dict[str, tuple[Block, nn.Module]]:
    """Layers, each with what is called for it."""
    layers: dict[str, nn.Module] = {
        names.OURS: make_ours(case),
        names.OURS_RELU: make_ours(case, activation="relu"),
        names.BATCH_NORM: make_batch_norm(case),
        names.BATCH_NORM_RELU: make_batch_norm(case, activation="relu"),
        names.TORCH: make_torch(case),
    }
    torch_native = make_torch(case)
    blocks: dict[str, tuple[Block, nn.Module]] = {name: (layer, layer) for name, layer in layers.items()}
    return blocks | {names.TORCH_NATIVE: (without_cudnn(torch_native), torch_native)}


def _gradient_calls(
    case: Case,
    sets: int,
    blocks: dict[str, tuple[Block, nn.Module]],
    make_call: Callable[[Block, list[Tensor], Tensor, Tensor], Call],
) -> dict[str, Call]:
    inputs = [(case.make().requires_grad_(), case.make(), case.make()) for _ in range(sets)]  # x, dy, a copy's place
    calls = {names.COPY: in_turn([partial(out.copy_, dy) for _, dy, out in inputs])}
    return calls | {
        name: in_turn([make_call(block, [x, *layer.parameters()], x, dy) for x, dy, _ in inputs])
        for name, (block, layer) in blocks.items()
    }


def small_calls(case: Case, compiled: bool) -> dict[str, Call]:
    """Forward without gradients of an input so small that launches are all there is."""
    x, out = case.make(), case.make()
    layers: dict[str, nn.Module] = {
        names.OURS_FRESH: make_ours(case),
        names.TORCH: make_torch(case),
    }
    if compiled:
        layers[names.PUBLISHED_COMPILED] = compiled_formulas(case)
    return {names.COPY: partial(out.copy_, x)} | {name: partial(layer, x) for name, layer in layers.items()}


def compiled_formulas(case: Case) -> nn.Module:
    # Shapes of earlier cases would make the compiler assume shapes that change.
    torch.compiler.reset()
    formulas = PublishedFormulas(case)
    formulas.compile(dynamic=False)
    return formulas
