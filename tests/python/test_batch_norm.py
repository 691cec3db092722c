"""BatchNorm, whose statistics take gradients, beside torch.nn.BatchNorm; and the same switch of Momentum BatchNorm."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, func, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.export import Dim, export
from torch.testing import assert_close

import momentum_bn
from inputs import (
    BATCH_NORMS,
    FLOATS,
    LAYERS,
    LAYOUTS,
    SIXTEEN_BIT,
    TOLERANCE,
    TORCH_LAYERS,
    as_layout,
    layer_for,
    randn,
    randomise_parameters,
    suggested_strides,
)
from oracle import per_channel
from snapshots import PLAIN_STATE, assert_same, same_bits, snapshot, unchanged

SHAPES = [(4, 3), (3, 37), (5, 3, 4), (4, 3, 5, 6), (2, 37, 3, 3), (3, 64, 8, 8), (2, 3, 2, 4, 3)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"momentum": 0.7, "eps": 1e-3},
    {"track_running_stats": False},
    {"affine": False},
    {"bias": False},
    {"affine": False, "track_running_stats": False},
]
EXACT = {"rtol": 1e-12, "atol": 1e-12}
STEPS = 3


class TorchsLayer(nn.Module):
    """torch's BatchNorm, then what a network writes behind it."""

    def __init__(self, norm: nn.Module, activation: str | None = None):
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        y = y if residual is None else y + residual
        return torch.relu(y) if self.activation == "relu" else y


def torchs(x: Tensor, activation: str | None = None, **options: Any) -> TorchsLayer:
    options = {name: value for name, value in options.items() if name != "inplace"}
    bias = options.pop("bias", True)
    norm = layer_for(x, TORCH_LAYERS)(x.size(1), **options)
    if not bias:
        norm.register_parameter("bias", None)  # what its bias=False does, where torch has that already
    return TorchsLayer(randomise_parameters(norm), activation)


def ours(x: Tensor, **options: Any) -> momentum_bn.BatchNorm:
    return randomise_parameters(layer_for(x, BATCH_NORMS)(x.size(1), **options))


def step(layer: nn.Module, x: Tensor, residual: Tensor | None, g: Tensor) -> dict[str, Tensor]:
    """The output and all gradients of one forward and backward pass."""
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    parameters = dict(layer.named_parameters())
    leaves = [x, *([] if residual is None else [residual]), *parameters.values()]
    y = layer(x * 1, residual)  # a copy, which an in-place layer may take
    gradients = torch.autograd.grad(y, leaves, g)
    names = ["dx", *([] if residual is None else ["dresidual"]), *(f"d{n.removeprefix('norm.')}" for n in parameters)]
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def plain_buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("norm."): buffer.clone() for name, buffer in layer.named_buffers()}


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_float64_beside_torch(shape, options, activation, with_residual):
    """Outputs, gradients and running statistics over some steps of training, then evaluation."""
    template = torch.empty(shape)
    options = {**options, "activation": activation, "dtype": torch.float64}
    for inplace in (False, True):
        mine, theirs = ours(template, inplace=inplace, **options), torchs(template, **options)
        for training in [True] * STEPS + [False] * 2:
            seed = int(mine.num_batches_tracked or 0) + 10 * (not training)
            x, g = randn(*shape, seed=seed, shift=seed, scale=1 + seed), randn(*shape, seed=seed + 50)
            residual = randn(*shape, seed=seed + 100) if with_residual else None
            actual, expected = (step(layer.train(training), x, residual, g) for layer in (mine, theirs))
            assert_close(actual, expected, **EXACT)
            assert_close(plain_buffers(mine), plain_buffers(theirs), **EXACT)
            with torch.no_grad():
                assert_close(mine(x.clone(), residual), theirs(x, residual), **EXACT)
            assert_close(plain_buffers(mine), plain_buffers(theirs), **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_layouts(layout, activation):
    """Every layout of input, residual and gradient; outputs and gradients in the input's suggested memory format."""
    for shape, with_residual in itertools.product(SHAPES, [False, True]):
        x, residual, g = (as_layout(randn(*shape, seed=seed), layout) for seed in range(3))
        options = {"activation": activation, "dtype": torch.float64}
        results = [step(layer(x, **options), x, residual if with_residual else None, g) for layer in (ours, torchs)]
        assert_close(*results, **EXACT)
        assert results[0]["y"].stride() == suggested_strides(x * 1)
        # Each operand in a layout of its own.
        for other in ("contiguous", "channels_last"):
            mixed = step(ours(x, **options), x, as_layout(residual, other) if with_residual else None,
                         as_layout(g, other))  # fmt: skip
            assert_close(mixed, results[1], **EXACT)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_dtypes_and_mixtures(dtype, layout):
    """16-bit input with parameters of its dtype or float32: output and gradients are float64's, rounded."""
    for shape, parameters in itertools.product(SHAPES, {dtype, torch.float32} if dtype in SIXTEEN_BIT else {dtype}):
        if shape[0] * torch.empty(shape[2:]).numel() < 8:
            continue  # so few values per channel that their rounding decides
        x, residual, g = (as_layout(randn(*shape, seed=seed, dtype=dtype), layout) for seed in range(3))
        mine = ours(x, activation="relu", dtype=parameters)
        reference = torchs(x, activation="relu", dtype=parameters).double()
        with torch.no_grad():
            near_zero = copy.deepcopy(reference)(x.double(), residual.double()).abs() < 0.02
        g = torch.where(near_zero, torch.zeros_like(g), g)  # where rounding may have decided the mask
        actual = step(mine, x, residual, g)
        expected = step(reference, x.double(), residual.double(), g.double())
        tolerance = 4 * TOLERANCE[dtype]
        for name, value in actual.items():
            assert value.dtype == (parameters if name in ("dweight", "dbias") else dtype), name
            scale = max(1.0, expected[name].abs().max().item())
            assert_close(value.double() / scale, expected[name] / scale, rtol=0, atol=tolerance, msg=name)
        assert mine.running_mean.dtype == parameters


@pytest.mark.parametrize("offset", [0, 30, 1000])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_float32_is_never_further_from_float64_than_torchs(offset, layout, activation, with_residual):
    for shape in [(64, 37), (32, 8, 7, 7), (8, 16, 28, 28), (4, 64, 14, 14), (2, 3, 4, 14, 14)]:
        x = as_layout(randn(*shape, dtype=torch.float32, shift=offset), layout)
        residual = randn(*shape, seed=2, dtype=torch.float32) if with_residual else None
        g = randn(*shape, seed=1, dtype=torch.float32)
        reference = torchs(x, activation=activation).double()
        wide = None if residual is None else residual.double()
        with torch.no_grad():
            near_zero = copy.deepcopy(reference)(x.double(), wide).abs() < 1e-3
        g = torch.where(near_zero, torch.zeros_like(g), g) if activation else g
        exact = step(reference, x.double(), wide, g.double())
        mine, theirs = (step(layer(x, activation=activation), x, residual, g) for layer in (ours, torchs))
        for name in ("dx", "dweight", "dbias"):
            errors = [(result[name].double() - exact[name]).abs().max().item() for result in (mine, theirs)]
            # Both round their results at the end, by up to half of the last bit: where all that comes before is exact
            # to that bit, which of the two lies nearer is chance.
            largest = exact[name].abs().max().float()
            last_bit = (torch.nextafter(largest, 2 * largest) - largest).item()
            assert errors[0] <= errors[1] + last_bit / 2, f"{shape} {name}: {errors}, {last_bit}"
        if not with_residual:
            assert (mine["y"].double() - exact["y"]).abs().max() <= 2e-6


@pytest.mark.cpu_only
@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(257, 33), (5, 7, 1009), (3, 37, 31, 29), (64, 16, 14, 14)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_threads_do_not_change_a_bit(shape, dtype, with_residual):
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    for layout in LAYOUTS:
        x, residual, g = (as_layout(randn(*shape, seed=s, dtype=dtype, shift=0.5), layout) for s in range(3))
        results = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            layer = ours(x, activation="relu", dtype=parameters)
            result = step(layer, x, residual if with_residual else None, g)
            results.append({**result, **plain_buffers(layer)})
        for other in results[1:]:
            assert_same(other, results[0])


# --- the mask of the activation -----------------------------------------------------------------------------------


def saved_bytes(layer: nn.Module, x: Tensor, residual: Tensor | None = None) -> int:
    """Of tensors of x's size that the forward pass keeps."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= x.numel():
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x.requires_grad_(), residual)
    del y
    return sum(kept.values())


@pytest.mark.cpu_only
def test_backward_keeps_x_alone_where_there_is_no_residual():
    x, residual = randn(4, 3, 5, 5, dtype=torch.float32), randn(4, 3, 5, 5, seed=1, dtype=torch.float32)
    for activation in (None, "relu"):
        assert saved_bytes(ours(x, activation=activation), x) == x.nbytes
    assert saved_bytes(ours(x), x, residual) == x.nbytes
    assert saved_bytes(ours(x, activation="relu"), x, residual) == 2 * x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
def test_mask_made_again_from_x_is_that_of_y(dtype, layout, options):
    """The same gradients to the bit; with outputs that are zero exactly, and ones that rounding made zero, too."""
    for shape in SHAPES:
        parameters = torch.float64 if dtype == torch.float64 else torch.float32
        x = as_layout(randn(*shape, dtype=dtype).round(decimals=1), layout)
        layer = ours(x, activation="relu", dtype=parameters, **options)
        if layer.weight is not None:
            with torch.no_grad():
                layer.weight[0] = 0  # all outputs of this channel are the bias
                layer.weight[1] = -1
        if layer.bias is not None:
            with torch.no_grad():
                layer.bias[0] = 0
                layer.bias[-1] = 1e-20
        g = as_layout(randn(*shape, seed=1, dtype=dtype), layout)
        from_x = step(layer, x, None, g)
        # A residual that changes nothing: -0 keeps the sign of every sum.
        from_y = step(layer, x, torch.full_like(x, -0.0), g)
        for name, value in from_x.items():
            assert same_bits(value, from_y[name]), f"{shape}: {name}"


# --- derivatives --------------------------------------------------------------------------------------------------


def blended(
    x: Tensor, running: tuple[Tensor, Tensor] | None, m: float, variance: str, eps: float,
    weight: Tensor | None, bias: Tensor | None, residual: Tensor | None = None, activation: str | None = None,
) -> Tensor:  # fmt: skip
    """A training forward of either layer in plain operations, through which autograd goes."""
    dims = [d for d in range(x.dim()) if d != 1]
    n = x.numel() / x.size(1)
    mean = x.mean(dims)
    var = (x - per_channel(mean, x)).square().mean(dims)
    var = var * {"published": (n / (n - 1)) ** 2, "unbiased": n / (n - 1), "biased": 1.0}[variance]
    if running is not None:
        mean = m * mean + (1 - m) * running[0]
        var = m * var + (1 - m) * running[1]
    y = (x - per_channel(mean, x)) / per_channel((var + eps).sqrt(), x)
    y = y if weight is None else y * per_channel(weight, x)
    y = y if bias is None else y + per_channel(bias, x)
    y = y if residual is None else y + residual
    return torch.relu(y) if activation == "relu" else y


def momentum_layer(shape: tuple[int, ...], momentum: float | None = 0.4, **options: Any) -> Any:
    """In the middle of a pair, with running statistics that are not new."""
    layer = layer_for(torch.empty(shape))(
        shape[1], momentum=momentum, total_iters=9, detach_statistics=False, dtype=torch.float64, **options
    )
    randomise_parameters(layer)
    if layer.running_mean is not None:
        layer.running_mean.copy_(randn(shape[1], seed=5))
        layer.running_var.copy_(randn(shape[1], seed=6).abs() + 0.5)
    layer(randn(*shape, seed=7))
    return layer


def batch_norm_layer(shape: tuple[int, ...], **options: Any) -> Any:
    return ours(torch.empty(shape), dtype=torch.float64, **options)


def pure(layer: nn.Module) -> Any:
    """The layer as a function of x, its parameters and a residual that starts from the same state in every call."""
    names = [name for name, _ in layer.named_parameters()]
    state = {name: buffer.clone() for name, buffer in layer.named_buffers()}

    def call(x: Tensor, residual: Tensor | None, *parameters: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in state.items()}
        overridden = {**buffers, **dict(zip(names, parameters, strict=True))}
        return func.functional_call(layer, overridden, (x, residual))

    return call


def oracle_of(layer: Any) -> Any:
    """The same function in plain operations."""
    tracks = isinstance(layer, momentum_bn.MomentumBatchNorm) and layer.running_mean is not None
    running = (layer.running_mean.clone(), layer.running_var.clone()) if tracks else None
    m = layer.momentum if tracks else 1.0
    m = 1 / (layer.cur_iter + 1) if m is None else m
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, residual: Tensor | None, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        return blended(x, running, m, layer.variance, layer.eps, given.get("weight"), given.get("bias"), residual,
                       layer.activation)  # fmt: skip

    return call


LAYERS_THROUGH_STATISTICS: dict[str, Any] = {
    "BatchNorm": batch_norm_layer,
    "BatchNorm affine=False": partial(batch_norm_layer, affine=False),
    "BatchNorm bias=False": partial(batch_norm_layer, bias=False),
    "BatchNorm untracked": partial(batch_norm_layer, track_running_stats=False),
    "published": momentum_layer,
    "unbiased": partial(momentum_layer, variance="unbiased"),
    "biased": partial(momentum_layer, variance="biased"),
    "the batch alone": partial(momentum_layer, momentum=1.0),
    "frozen": partial(momentum_layer, momentum=0.0),
    "cumulative": partial(momentum_layer, momentum=None, views_per_update=1),
    "untracked": partial(momentum_layer, track_running_stats=False),
}
EVERY_LAYER = pytest.mark.parametrize("kind", LAYERS_THROUGH_STATISTICS)
SMALL_SHAPES = [(5, 3), (3, 2, 4), (2, 3, 2, 3), (2, 2, 2, 1, 3)]


def away_from_zero(y: Tensor) -> Tensor:
    """A residual that brings no output near the kink of ReLU, which a finite difference would step over."""
    return torch.where(y >= 0, y + 0.5, y - 0.5).detach() - y.detach()


def check_inputs(layer: nn.Module, shape: tuple[int, ...]) -> list[Tensor]:
    x = randn(*shape)
    parameters = [p.detach().clone() for p in layer.parameters()]
    plain = copy.deepcopy(layer)
    plain.activation = None
    residual = away_from_zero(pure(plain)(x, None, *parameters))
    return [t.requires_grad_() for t in (x, residual, *parameters)]


@EVERY_LAYER
@pytest.mark.parametrize("shape", SMALL_SHAPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_finite_differences(kind, shape, activation, check):
    layer = LAYERS_THROUGH_STATISTICS[kind](shape, activation=activation)
    assert check(pure(layer), check_inputs(layer, shape), fast_mode=len(shape) > 3)


@EVERY_LAYER
@pytest.mark.parametrize("shape", [*SMALL_SHAPES, (2, 37, 5, 3)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_first_and_second_order_beside_plain_operations(kind, shape, activation, with_residual):
    layer = LAYERS_THROUGH_STATISTICS[kind](shape, activation=activation)

    def gradients(call: Any) -> Any:
        x, g = randn(*shape).requires_grad_(), randn(*shape, seed=1).requires_grad_()
        residual = randn(*shape, seed=2).requires_grad_() if with_residual else None
        parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
        leaves = [x, *parameters, *([residual] if with_residual else [])]
        y = call(x, residual, *parameters)
        first = torch.autograd.grad(y, leaves, g, create_graph=True)
        directions = [randn(*t.shape, seed=30 + i) for i, t in enumerate(first)]
        loss = sum((t * d).sum() for t, d in zip(first, directions, strict=True))
        second = torch.autograd.grad(loss, [*leaves, g], allow_unused=True, materialize_grads=True)
        return y.detach(), first, second

    expected = gradients(oracle_of(layer))
    assert_close(gradients(pure(layer)), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "frozen",
    [{"weight"}, {"bias"}, {"weight", "bias"}, {"x"}, {"x", "weight"}],
    ids=lambda names: ",".join(sorted(names)),
)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_frozen_parameters_and_input(frozen, activation):
    shape = (3, 4, 2, 5)
    layers = [layer(torch.empty(shape), activation=activation, dtype=torch.float64) for layer in (ours, torchs)]
    results = []
    for layer in layers:
        norm = layer if isinstance(layer, momentum_bn.BatchNorm) else layer.norm
        for name in frozen - {"x"}:
            getattr(norm, name).requires_grad_(False)
        x = randn(*shape).requires_grad_("x" not in frozen)
        leaves = [t for t in (x, norm.weight, norm.bias) if t.requires_grad]
        results.append(torch.autograd.grad(layer(x), leaves, randn(*shape, seed=1)))
    assert_close(*results, **EXACT)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_detached_statistics_are_the_default_of_the_momentum_layer(momentum):
    """detach_statistics=False changes gradients alone; where the batch has no weight, not even these."""
    shape = (4, 3, 5, 5)
    x, g = randn(*shape), randn(*shape, seed=1)
    results = []
    for detach in (True, False):
        layer = LAYERS[2](3, momentum=momentum, detach_statistics=detach, dtype=torch.float64)
        results.append({**step(randomise_parameters(layer), x, None, g), **plain_buffers(layer)})
    for name, value in results[0].items():
        if name == "dx" and momentum > 0:
            assert not torch.allclose(value, results[1][name])
        else:
            assert_close(results[1][name], value, rtol=1e-14, atol=1e-14)


@EVERY_LAYER
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=str)
def test_forward_mode_and_transforms(kind, options):
    """Dual numbers, torch.func's vjp, jvp, jacrev, jacfwd and hessian, against autograd through plain operations."""
    shape = (4, 3)
    layer = LAYERS_THROUGH_STATISTICS[kind](shape, **options)
    x, tangent, residual, g = (randn(*shape, seed=seed) for seed in range(4))
    parameters = [p.detach().clone() for p in layer.parameters()]
    mine, theirs = (partial(lambda call, x: call(x, residual, *parameters), call)
                    for call in (pure(layer), oracle_of(layer)))  # fmt: skip
    close = {"rtol": 1e-11, "atol": 1e-12}
    primal, expected = torch.autograd.functional.jvp(theirs, x, tangent)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(mine(forward_ad.make_dual(x, tangent)))
        assert_close((dual.primal, dual.tangent), (primal, expected), **close)
    assert_close(func.jvp(mine, (x,), (tangent,))[1], expected, **close)
    _, pull_back = func.vjp(mine, x)
    assert_close(pull_back(g)[0], torch.autograd.functional.vjp(theirs, x, g)[1], **close)
    for transform in (func.jacrev, func.jacfwd):
        assert_close(transform(mine)(x), torch.autograd.functional.jacobian(theirs, x), **close)
    loss = partial(lambda call, x: (call(x) * g).sin().sum(), mine)
    assert_close(func.grad(loss)(x), torch.autograd.functional.jacobian(lambda x: (theirs(x) * g).sin().sum(), x),
                 **close)  # fmt: skip
    expected = torch.autograd.functional.hessian(lambda x: (theirs(x) * g).sin().sum(), x)
    assert_close(func.hessian(loss)(x), expected, **close)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
def test_layer_under_a_transform_is_the_layer(activation, training):
    """torch.func.grad gives the gradients of plain autograd, and in training the same state."""
    shape = (4, 3, 2, 2)
    plain, transformed = (batch_norm_layer(shape, activation=activation).train(training) for _ in range(2))
    for seed in range(3):
        x, g = randn(*shape, seed=seed), randn(*shape, seed=50 + seed)
        expected = step(plain, x, None, g)
        parameters = {name: p.detach() for name, p in transformed.named_parameters()}

        def loss(parameters, x, g=g):
            return (func.functional_call(transformed, parameters, (x,)) * g).sum()

        by_name, by_x = func.grad(loss, argnums=(0, 1))(parameters, x)
        assert_close({"dx": by_x, **{f"d{n}": t for n, t in by_name.items()}},
                     {n: t for n, t in expected.items() if n != "y"}, rtol=1e-11, atol=1e-12)  # fmt: skip
        assert_close(plain_buffers(transformed), plain_buffers(plain), **EXACT)


@pytest.mark.parametrize("inplace", [False, True])
def test_vmap(inplace):
    """Refused over examples of one training layer with a state; mapped without one, and in evaluation."""
    layer = momentum_bn.BatchNorm1d(3, inplace=inplace).requires_grad_(False)
    xs = randn(5, 4, 3, dtype=torch.float32)
    with unchanged(layer, xs), pytest.raises(ValueError, match=r"torch\.func\.vmap"):
        func.vmap(layer)(xs)
    untracked = momentum_bn.BatchNorm1d(3, track_running_stats=False)
    assert_close(func.vmap(untracked)(xs), torch.stack([untracked(x) for x in xs]))
    layer(xs[0].clone())
    layer.eval()
    with torch.no_grad():
        expected = torch.stack([layer(x.clone()) for x in xs])
        assert_close(func.vmap(layer)(xs.clone()), expected)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_batched_gradients(activation):
    shape = (2, 3, 4, 5)
    layer = batch_norm_layer(shape, activation=activation)
    x, residual = (randn(*shape, seed=s).requires_grad_() for s in range(2))
    leaves = [x, residual, layer.weight, layer.bias]
    y = layer(x, residual)
    gs = randn(6, *shape, seed=7)
    actual = torch.autograd.grad(y, leaves, gs, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in gs]
    assert_close(actual, tuple(torch.stack(parts) for parts in zip(*expected, strict=True)), rtol=1e-11, atol=1e-12)


def test_state_never_records_a_graph():
    layer = momentum_bn.BatchNorm1d(3)
    w = torch.rand(3, requires_grad=True)
    for _ in range(3):
        layer(torch.rand(4, 3) * w).sum().backward()
        for name, buffer in layer.named_buffers():
            assert not buffer.requires_grad and buffer.grad_fn is None, name


def test_input_changed_before_backward_is_noticed():
    layer = momentum_bn.BatchNorm1d(3)
    x = torch.rand(4, 3) * torch.ones(3, requires_grad=True)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- compiled, exported -------------------------------------------------------------------------------------------


def block() -> nn.Module:
    torch.manual_seed(1)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
            self.norm = momentum_bn.BatchNorm2d(3, activation="relu")
            self.momentum_norm = momentum_bn.MomentumBatchNorm2d(3, total_iters=5, detach_statistics=False)
            self.head = nn.Linear(3, 5)
            self.last = momentum_bn.BatchNorm1d(5, momentum=None)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.head(self.momentum_norm(self.norm(self.conv(x), x)).mean((2, 3))))

    return Block()


def images(seed: int, batch: int = 4) -> Tensor:
    return randn(batch, 3, 6, 6, seed=seed, dtype=torch.float32)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend):
    torch._dynamo.reset()
    eager, compiled = block(), block()
    with torch._dynamo.config.patch(error_on_recompile=True):
        forward = torch.compile(compiled, backend=backend, fullgraph=True)
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.01) for net in (eager, compiled)]
        for seed in range(6):
            losses = []
            for call, optimizer in zip((eager, forward), optimizers, strict=True):
                loss = (call(images(seed)) - 0.5).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for name, value in eager.state_dict().items():
        assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)
    with torch.no_grad():
        assert_close(torch.compile(compiled.eval(), backend=backend, fullgraph=True)(images(9)), compiled(images(9)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [False, True])
def test_exported(training, strict):
    net = block()
    net(images(0))
    net.train(training)
    program = export(net, (images(1),), strict=strict, dynamic_shapes=({0: Dim("batch", min=2, max=64)},))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert ("momentum_bn._forward_train.default" in names) == training
    other, module = copy.deepcopy(net), program.module()
    for seed, batch in enumerate((4, 2, 7)):
        x = images(seed, batch)
        assert_close(module(x), other(x), rtol=1e-5, atol=1e-5)
    for name, value in module.state_dict().items():
        assert_close(value, other.state_dict()[name], rtol=1e-5, atol=1e-5, msg=name)


def test_meta_device():
    for layer in (momentum_bn.BatchNorm2d, partial(momentum_bn.MomentumBatchNorm2d, detach_statistics=False)):
        m = layer(3, activation="relu", device="meta")
        x = torch.empty(4, 3, 5, 5, device="meta").to(memory_format=torch.channels_last).requires_grad_()
        y = m(x)
        y.sum().backward()
        assert y.is_contiguous(memory_format=torch.channels_last) and x.grad.shape == x.shape
        assert m.weight.grad.shape == (3,)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_autocast(dtype):
    mine, theirs = (
        nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
        for norm in (momentum_bn.BatchNorm2d(4), nn.BatchNorm2d(4))
    )
    theirs.load_state_dict(mine.state_dict())
    x = randn(8, 3, 5, 5, dtype=torch.float32)
    for net in (mine, theirs):
        with torch.autocast(torch.get_default_device().type, dtype):
            loss = net(x).float().square().mean()
        loss.backward()
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert a.grad.dtype == b.grad.dtype
        assert_close(a.grad, b.grad, rtol=5e-2, atol=5e-3, msg=name)
    assert_close(plain_buffers(mine), plain_buffers(theirs), rtol=1e-3, atol=1e-4)


# --- in place -----------------------------------------------------------------------------------------------------


def takes_memory(layer: nn.Module, x: Tensor) -> bool:
    address, version = x.data_ptr(), x._version
    y = layer(x)
    taken = y.data_ptr() == address
    assert (x._version > version) == taken, "the version counter tells what happened"
    return taken


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("kind", ["BatchNorm", "detach_statistics=False"])
def test_memory_is_taken_exactly_where_no_gradient_needs_the_input(kind, activation):
    def layer(frozen: tuple[str, ...] = (), **options: Any) -> Any:
        options = {"inplace": True, "activation": activation, **options}
        m = (momentum_bn.BatchNorm2d(3, **options) if kind == "BatchNorm"
             else momentum_bn.MomentumBatchNorm2d(3, detach_statistics=False, **options))  # fmt: skip
        for name in frozen:
            getattr(m, name).requires_grad_(False)
        return m

    def fresh() -> Tensor:
        return torch.rand(2, 3, 4, 5)

    both = ("weight", "bias")
    for training in (True, False):
        with torch.no_grad():
            assert takes_memory(layer().train(training), fresh())
            assert takes_memory(layer().train(training), fresh().requires_grad_())
        assert not takes_memory(layer().train(training), fresh())
        assert takes_memory(layer(both).train(training), fresh())
        # Of what the input's own gradient needs: in training the input, through the statistics.
        assert takes_memory(layer(both).train(training), fresh().requires_grad_() * 1) != training
        assert takes_memory(layer(("weight",)).train(training), fresh().requires_grad_() * 1) != training
    untracked = layer(both, track_running_stats=False).eval()
    assert not takes_memory(untracked, fresh().requires_grad_() * 1)
    assert takes_memory(untracked, fresh())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced", "offset"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_in_place_gives_the_same_bits(layout, dtype):
    for shape, activation, with_residual in itertools.product(SHAPES, [None, "relu"], [False, True]):
        parameters = dtype if dtype == torch.float64 else torch.float32
        x = as_layout(randn(*shape, dtype=dtype), layout)
        residual = randn(*shape, seed=1, dtype=dtype) if with_residual else None
        inplace, fresh = (ours(x, inplace=flag, activation=activation, dtype=parameters) for flag in (True, False))
        taken = as_layout(randn(*shape, dtype=dtype), layout)
        with torch.no_grad():
            y = inplace(taken, residual)
            assert y.data_ptr() == taken.data_ptr() and same_bits(y, fresh(x, residual))
        assert_same(snapshot(inplace), snapshot(fresh))


def test_leaf_that_requires_grad_is_refused_in_place():
    layer = momentum_bn.BatchNorm2d(3, inplace=True).requires_grad_(False).eval()
    x = torch.rand(2, 3, 4, 5, requires_grad=True)
    with unchanged(layer, x), pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        layer(x)


# --- state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dict_is_torchs(dim, options):
    """The same keys in the same order, loaded strictly both ways; a run goes on from it."""
    shape = (4, 3, *[3] * dim) if dim > 1 else (4, 3)
    mine, theirs = ours(torch.empty(shape), **options), torchs(torch.empty(shape), **options).norm
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert set(mine.state_dict()) <= set(PLAIN_STATE)
    theirs(randn(*shape, dtype=torch.float32))
    mine.load_state_dict(theirs.state_dict(), strict=True)
    x = randn(*shape, seed=1, dtype=torch.float32)
    assert_close(mine(x), theirs(x))
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert_same(dict(theirs.state_dict()), dict(mine.state_dict()))
    missing = {name: value for name, value in mine.state_dict().items() if name != "running_var"}
    if "running_var" in mine.state_dict():
        for layer in (mine, theirs):
            with pytest.raises(RuntimeError, match=r"Missing key.*running_var"):
                layer.load_state_dict(missing)


def test_state_dict_from_before_torch_counted():
    """Version 1 of torch's state dict has no num_batches_tracked."""
    mine, theirs = momentum_bn.BatchNorm1d(3), nn.BatchNorm1d(3)
    old = {n: v for n, v in theirs.state_dict().items() if n != "num_batches_tracked"}
    for layer in (mine, theirs):
        layer.load_state_dict(old, strict=True)
        assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("options", [{}, {"activation": "relu", "inplace": True}], ids=str)
def test_copies_go_on_bit_for_bit(options, momentum):
    layer = ours(torch.empty(4, 3), momentum=momentum, **options)
    layer(randn(4, 3, dtype=torch.float32))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    loaded = momentum_bn.BatchNorm1d(3, momentum=momentum, **options)
    loaded.load_state_dict(layer.state_dict())
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False), loaded]
    x = randn(4, 3, seed=1, dtype=torch.float32)
    y = layer(x.clone())
    for other in copies:
        assert same_bits(other(x.clone()), y)
        assert_same(snapshot(other), snapshot(layer))
        assert repr(other) == repr(layer)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_casts_are_torchs(cast):
    mine, theirs = momentum_bn.BatchNorm2d(4), nn.BatchNorm2d(4)
    for layer in (mine, theirs):
        assert getattr(layer, cast)() is layer
        layer(randn(4, 4, 3, 3, dtype=layer.weight.dtype))
    for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert a.dtype == b.dtype, name
        tolerance = 2 * TOLERANCE[mine.weight.dtype]
        assert_close(a, b, rtol=tolerance, atol=tolerance, msg=name)


def test_reset():
    layer = ours(torch.empty(4, 3))
    layer(torch.rand(4, 3))
    layer.reset_running_stats()
    assert_close(plain_buffers(layer), plain_buffers(nn.BatchNorm1d(3)))
    layer.reset_parameters()
    assert_same(dict(layer.state_dict()), dict(nn.BatchNorm1d(3).state_dict()))


def test_empty_input_changes_nothing():
    for options in ({}, {"track_running_stats": False}, {"inplace": True, "activation": "relu"}):
        layer = momentum_bn.BatchNorm2d(3, **options)
        with unchanged(layer):
            x = torch.empty(0, 3, 4, 4, requires_grad=True)
            y = layer(x * 1)
            assert y.shape == x.shape
            (gradient,) = torch.autograd.grad(y.sum(), x)
            assert gradient.shape == x.shape


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True"),
        ({"momentum": None, "bias": False},
         "3, eps=1e-05, momentum=None, affine=True, track_running_stats=True, bias=False"),
        ({"activation": "relu", "inplace": True},
         "3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, activation='relu', inplace=True"),
    ],
)  # fmt: skip
def test_repr(options, words):
    assert repr(momentum_bn.BatchNorm2d(3, **options)) == f"BatchNorm2d({words})"


def test_is_torchs_class():
    for dim, layer in BATCH_NORMS.items():
        assert issubclass(layer, TORCH_LAYERS[dim]) and issubclass(layer, momentum_bn.BatchNorm)


# --- errors -------------------------------------------------------------------------------------------------------


def raised(call: Any) -> Exception:
    with pytest.raises(Exception) as error:
        call()
    return error.value


@pytest.mark.parametrize(("dim", "shape"), [(1, (4, 3, 2, 2)), (1, (3,)), (2, (4, 3, 2)), (3, (4, 3, 2, 2))], ids=str)
def test_wrong_rank_in_torchs_words(dim, shape):
    layers = [BATCH_NORMS[dim](3), TORCH_LAYERS[dim](3)]
    errors = [raised(partial(layer, torch.ones(shape))) for layer in layers]
    assert type(errors[0]) is type(errors[1]) is ValueError and str(errors[0]) == str(errors[1])


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1)], ids=str)
def test_one_value_per_channel_in_torchs_words(shape, options):
    words = "Expected more than 1 value per channel when training, got input size"
    for training in (True, False):
        mine, theirs = (layer[1](3, **options).train(training) for layer in (BATCH_NORMS, TORCH_LAYERS))
        if not training and mine.track_running_stats:
            assert_close(mine(torch.ones(shape)), theirs(torch.ones(shape)))
            continue
        with unchanged(mine):
            errors = [raised(partial(layer, torch.ones(shape))) for layer in (mine, theirs)]
        assert all(type(error) is ValueError and str(error).startswith(words) for error in errors)


@pytest.mark.parametrize("training", [True, False])
def test_input_that_is_refused(training):
    layer = momentum_bn.BatchNorm2d(3).train(training)
    x = torch.ones(4, 3, 2, 2)
    for wrong, error, words in [
        ((x.int(),), TypeError, "got Int"),
        ((x.to(torch.complex64),), TypeError, "got Complex"),
        ((torch.ones(4, 5, 2, 2),), ValueError, "3 channels"),
        ((x, torch.ones(4, 3, 2, 1)), ValueError, "residual"),
        ((x, x.double()), ValueError, "residual"),
        ((x.double(),), RuntimeError, "mixed dtype"),
    ]:
        with unchanged(layer), pytest.raises(error, match=words):
            layer(*wrong)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"eps": 0.0}, ValueError, "eps"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"momentum": 1.5}, ValueError, "momentum"),
        ({"momentum": -0.1}, ValueError, "momentum"),
        ({"momentum": "0.1"}, TypeError, "momentum"),
        ({"activation": "gelu"}, ValueError, "activation"),
        ({"process_group": "nonsense"}, ValueError, "nonsense"),
        ({"num_features": -1}, ValueError, "num_features"),
        ({"num_features": 1.5}, TypeError, "num_features"),
    ],
    ids=str,
)
def test_options_that_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        momentum_bn.BatchNorm2d(**{"num_features": 3, **options})


def test_assigned_momentum_is_checked():
    layer = momentum_bn.BatchNorm1d(3)
    layer.momentum = None
    assert layer.momentum is None
    layer.momentum = 0
    assert layer.momentum == 0.0
    with unchanged(layer), pytest.raises(ValueError, match="momentum"):
        layer.momentum = 2.0


def test_recomputation_is_refused():
    from torch.utils.checkpoint import checkpoint

    layer = momentum_bn.BatchNorm1d(3)
    y = checkpoint(layer, torch.rand(4, 3, requires_grad=True), use_reentrant=False)
    with unchanged(layer), pytest.raises(ValueError, match=r"torch\.utils\.checkpoint"):
        y.sum().backward()


def test_convert_sync_batchnorm():
    """Takes torch's place: it becomes SyncBatchNorm; with an activation, which that would lose, it is refused."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(momentum_bn.BatchNorm1d(3, momentum=0.3)))
    assert type(net[0]) is nn.SyncBatchNorm and net[0].momentum == 0.3
    with pytest.raises(RuntimeError, match="activation"):
        nn.SyncBatchNorm.convert_sync_batchnorm(momentum_bn.BatchNorm1d(3, activation="relu"))


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_special_values_are_torchs(special, layout):
    x, g = as_layout(randn(2, 5, 4, 4), layout), randn(2, 5, 4, 4, seed=1)
    x[1, 2, 1, 3] = special
    results = [step(layer(x, activation="relu", dtype=torch.float64), x, None, g) for layer in (ours, torchs)]
    others = [0, 1, 3, 4]
    for name, value in results[0].items():
        pick = (lambda t: t[others]) if value.dim() == 1 else (lambda t: t[:, others])
        assert_close(pick(value), pick(results[1][name]), **EXACT)
    assert results[0]["y"][:, 2].isnan().all()
