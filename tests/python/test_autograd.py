"""Gradients, first and second, and what must not be recorded."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import momentum_bn
from inputs import layer_for, randn, randomise_parameters
from oracle import MomentumBatchNormOracle

SHAPES = [(4, 3), (3, 2, 4), (2, 3, 2, 3), (2, 2, 2, 1, 3)]


def away_from_zero(values: torch.Tensor) -> torch.Tensor:
    """No element near 0, where a finite difference would step over the kink of ReLU."""
    return values + 0.1 * torch.sign(values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_finite_differences_with_frozen_statistics(shape, activation, check):
    """Momentum 0: the statistics do not depend on x, so finite differences see what autograd must give."""
    m = layer_for(torch.empty(shape))(
        shape[1], momentum=0.0, schedule="constant", activation=activation, dtype=torch.float64
    )
    randomise_parameters(m)
    x = away_from_zero(randn(*shape)).requires_grad_()
    residual = away_from_zero(randn(*shape, seed=1)).requires_grad_()

    def layer(x, weight, bias, residual):
        return torch.func.functional_call(m, {"weight": weight, "bias": bias}, (x, residual))

    weight, bias = (p.detach().clone().requires_grad_() for p in (m.weight, m.bias))
    assert check(layer, (x, weight, bias, residual), fast_mode=False)
    assert check(lambda x: m(x), (x,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_finite_differences_in_parameters_and_residual(shape, check):
    """At any momentum, for what the statistics do not depend on."""
    x = randn(*shape)
    state = [randn(shape[1], seed=5), randn(shape[1], seed=6).abs() + 0.5]

    def layer(weight, bias, residual):
        m = layer_for(x)(shape[1], momentum=0.5, activation="relu", dtype=torch.float64)
        m.running_mean.copy_(state[0])
        m.running_var.copy_(state[1])
        return torch.func.functional_call(m, {"weight": weight, "bias": bias}, (x, residual))

    arguments = [randn(shape[1], seed=1), randn(shape[1], seed=2), away_from_zero(randn(*shape, seed=3))]
    assert check(layer, [a.requires_grad_() for a in arguments])


@pytest.mark.parametrize("shape", [*SHAPES, (2, 37, 5, 3)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_against_autograd_through_the_oracle(shape, activation, with_residual, options, training):
    """First and second order, with the statistics detached."""
    m = layer_for(torch.empty(shape))(shape[1], momentum=0.5, activation=activation, dtype=torch.float64, **options)
    if m.affine:
        randomise_parameters(m)
    for warm_up in range(2):
        m(randn(*shape, seed=20 + warm_up, shift=1))
    m.train(training)
    oracle = MomentumBatchNormOracle(shape[1], activation=activation, track_running_stats=m.track_running_stats)
    if m.track_running_stats:
        oracle.read_state(m)

    def gradients(forward, weight, bias):
        x, g = randn(*shape).requires_grad_(), randn(*shape, seed=1).requires_grad_()
        residual = randn(*shape, seed=2).requires_grad_() if with_residual else None
        leaves = [t for t in (x, weight, bias, residual) if t is not None]
        y = forward(x, residual)
        first = torch.autograd.grad(y, leaves, g, create_graph=True)
        directions = [randn(*t.shape, seed=30 + i) for i, t in enumerate(first)]
        second = torch.autograd.grad(
            sum((t * d).sum() for t, d in zip(first, directions, strict=True)), [*leaves, g], allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        return y, first, second

    run_oracle = oracle.train_forward if training else oracle.eval_forward
    copies = [p if p is None else p.detach().clone().requires_grad_() for p in (m.weight, m.bias)]
    expected = gradients(lambda x, residual: run_oracle(x, *copies, residual), *copies)
    actual = gradients(lambda x, residual: m(x, residual), m.weight, m.bias)
    for name, ours, theirs in zip(("y", "first", "second"), actual, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "frozen",
    [{"weight"}, {"bias"}, {"weight", "bias"}, {"x"}, {"x", "weight"}, {"x", "bias"}],
    ids=lambda names: ",".join(sorted(names)),
)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_frozen_parameters_and_input(frozen, activation):
    shape = (3, 4, 2, 5)
    m = randomise_parameters(momentum_bn.MomentumBatchNorm2d(4, activation=activation, dtype=torch.float64))
    x = randn(*shape).requires_grad_("x" not in frozen)
    copies = {n: getattr(m, n).detach().clone().requires_grad_(n not in frozen) for n in ("weight", "bias")}
    for name in frozen - {"x"}:
        getattr(m, name).requires_grad_(False)
    ours = {n: t for n, t in {"x": x, "weight": m.weight, "bias": m.bias}.items() if n not in frozen}
    theirs = {n: t for n, t in {"x": x, **copies}.items() if n not in frozen}
    g = randn(*shape, seed=1)
    actual = torch.autograd.grad(m(x), list(ours.values()), g)
    oracle = MomentumBatchNormOracle(4, activation=activation)
    expected = torch.autograd.grad(oracle.train_forward(x, copies["weight"], copies["bias"]), list(theirs.values()), g)
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", ["sixteen bits", "float32"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_have_the_dtypes_of_what_they_are_of(dtype, parameters, training):
    m = momentum_bn.MomentumBatchNorm2d(4, activation="relu", dtype=dtype if parameters == "sixteen bits" else None)
    x, residual = (randn(3, 4, 2, 5, seed=s, dtype=dtype).requires_grad_() for s in range(2))
    m.train(training)(x, residual).backward(randn(3, 4, 2, 5, seed=2, dtype=dtype))
    assert x.grad.dtype == residual.grad.dtype == dtype
    assert m.weight.grad.dtype == m.weight.dtype and m.bias.grad.dtype == m.bias.dtype


def test_nothing_recorded_without_need():
    m = momentum_bn.MomentumBatchNorm1d(3)
    x = torch.rand(4, 3, requires_grad=True)
    with torch.no_grad():
        assert not m(x).requires_grad
    m.requires_grad_(False)
    assert not m(x.detach()).requires_grad
    with torch.inference_mode():
        assert m(x).is_inference()


def test_state_never_records_a_graph():
    m = momentum_bn.MomentumBatchNorm1d(3, views_per_update=2)
    w = torch.rand(3, requires_grad=True)
    for _ in range(5):
        x = torch.rand(4, 3) * w
        m(x).sum().backward()
        for name, buffer in m.named_buffers():
            assert not buffer.requires_grad and buffer.grad_fn is None and buffer.is_leaf, name


def test_backward_after_later_forwards():
    """What backward needs of the statistics is its own, whatever the state does in between."""
    m = momentum_bn.MomentumBatchNorm1d(3, views_per_update=1, dtype=torch.float64)
    oracle = MomentumBatchNormOracle(3, views_per_update=1)
    xs = [randn(4, 3, seed=s, shift=s).requires_grad_() for s in range(4)]
    ours = [m(x) for x in xs]
    weight, bias = (p.detach().clone().requires_grad_() for p in (m.weight, m.bias))
    theirs = [oracle.train_forward(x, weight, bias) for x in xs]
    g = randn(4, 3, seed=9)
    for y, ref, x in zip(ours, theirs, xs, strict=True):
        actual = torch.autograd.grad(y, [x, m.weight, m.bias], g)
        assert_close(actual, torch.autograd.grad(ref, [x, weight, bias], g), rtol=1e-12, atol=1e-12)


def test_expanded_gradient_and_undefined_gradient():
    m = momentum_bn.MomentumBatchNorm2d(3, dtype=torch.float64)
    x = randn(2, 3, 4, 5).requires_grad_()
    m(x).sum().backward()  # the gradient of a sum is one number, expanded
    rstd = 1 / (x.detach().var([0, 2, 3]) * 40 / 39 + 1e-5).sqrt()
    assert_close(x.grad, rstd.reshape(1, 3, 1, 1).expand_as(x).contiguous(), rtol=1e-12, atol=1e-12)
    assert_close(m.bias.grad, torch.full((3,), 40.0, dtype=torch.float64))


def test_input_changed_before_backward_is_noticed():
    m = momentum_bn.MomentumBatchNorm1d(3)
    x = torch.rand(4, 3) * torch.ones(3, requires_grad=True)
    y = m(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


UNPACKED = {
    "another dtype": lambda t: t.half(),
    "integers": lambda t: t.int(),
    "bytes": lambda t: t.to(torch.int8),
    "fewer values": lambda t: t[:1].contiguous(),
    "another number of dimensions": lambda t: t.unsqueeze(0),
    "no values": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"inplace": True}], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("unpacked", UNPACKED)
def test_what_a_saved_tensor_hook_gives_back_is_checked(unpacked, number, training, options):
    """As hooks that compress or offload activations may: of the tensors saved, one comes back as something else."""
    layer = momentum_bn.MomentumBatchNorm2d(4, **options).train(training)
    if options.get("inplace"):
        layer.weight.requires_grad_(False)
    x = torch.randn(16, 4, 8, 8, requires_grad=True)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return len(packed) - 1, tensor

    def unpack(saved):
        index, tensor = saved
        return UNPACKED[unpacked](tensor) if index == number else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = layer(x.clone())
    if number >= len(packed):
        return  # so many tensors were not saved
    if not training and not options.get("inplace"):
        return  # torch's own operators
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        y.sum().backward()
