"""How near the results are to exact arithmetic, and that threads do not change a bit of them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import momentum_bn
from inputs import LAYOUTS, as_layout, layer_for, randn, randomise_parameters
from oracle import MomentumBatchNormOracle
from snapshots import same_bits

SHAPES = [(64, 37), (16, 64, 49), (8, 16, 14, 14), (4, 64, 28, 28), (2, 3, 8, 14, 14), (4, 1, 224, 224), (512, 3, 1, 1)]


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return (y.detach().double() - expected).abs().max().item()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_at_unit_scale(shape, layout):
    for variance in ("published", "biased"):
        m = layer_for(torch.empty(shape))(shape[1], affine=False, variance=variance, views_per_update=1, total_iters=8)
        oracle = MomentumBatchNormOracle(shape[1], variance=variance, views_per_update=1, total_iters=8)
        for step in range(5):
            x = as_layout(randn(*shape, seed=step, dtype=torch.float32, shift=0.3 * step), layout)
            oracle.read_state(m)
            assert error(m(x), oracle.train_forward(x)) <= 1e-6
        m.eval()
        oracle.read_state(m)
        # Evaluation is torch's own, which on a GPU takes a root that is good to two last bits.
        assert error(m(x), oracle.eval_forward(x)) <= (1e-6 if x.device.type == "cpu" else 3e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("ratio", [1e1, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("std", [1.0, 1e-3, 300.0])
def test_float32_with_a_large_offset(ratio, std, layout):
    """One forward, mean / std up to 1e6: the input's own rounding is part of the input."""
    for shape in SHAPES[1:]:
        x = as_layout(randn(*shape, dtype=torch.float32, scale=std, shift=-ratio * std), layout)
        m = layer_for(x)(shape[1], affine=False, eps=1e-12)
        assert error(m(x), MomentumBatchNormOracle(shape[1], eps=1e-12).train_forward(x)) <= 2e-6


def test_offset_of_ten_thousand_with_gradients():
    x = randn(4, 8, 16, 16, dtype=torch.float32, shift=1e4).requires_grad_()
    m = randomise_parameters(momentum_bn.MomentumBatchNorm2d(8))
    ref = x.detach().double().requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in (m.weight, m.bias))
    expected = MomentumBatchNormOracle(8).train_forward(ref, weight, bias)
    g = randn(4, 8, 16, 16, seed=1, dtype=torch.float32)
    m(x).backward(g)
    expected.backward(g.double())
    assert_close(x.grad.double(), ref.grad, rtol=1e-6, atol=1e-6)
    assert_close(m.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-4)


def test_large_offset_in_running_statistics():
    """A frozen teacher: the running mean is what offsets."""
    m = momentum_bn.MomentumBatchNorm2d(3, affine=False)
    m.momentum = 0.0
    m.running_mean.fill_(1e5)
    x = randn(4, 3, 9, 9, dtype=torch.float32, shift=1e5)
    oracle = MomentumBatchNormOracle(3)
    oracle.read_state(m)
    assert error(m(x), oracle.train_forward(x)) <= 2e-6


@pytest.mark.parametrize("magnitude", [1e-30, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_magnitudes_whose_squares_leave_float32(magnitude, layout):
    """Even where the variance itself is beyond float32 (its running value is then inf), the output is right."""
    x = as_layout(randn(8, 5, 16, 16, dtype=torch.float32, scale=magnitude), layout)
    m = momentum_bn.MomentumBatchNorm2d(5, affine=False, eps=1e-45)
    oracle = MomentumBatchNormOracle(5, eps=1e-45)
    if magnitude == 1e-30:  # a variance of 1e-60 is nothing beside any running variance, but the mean is exact
        m(x)
        assert_close(m.view_mean_sum.double() / magnitude, x.double().mean([0, 2, 3]) / magnitude, rtol=1e-5, atol=1e-6)
        return
    assert error(m(x), oracle.train_forward(x)) <= 1e-6
    assert_close(m.view_var_sum, oracle.view_var_sum.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.3, 3000.7, 1e-8])
@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 7, 9), (2, 37, 5, 5), (64, 64, 14, 14)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_constant_channels(value, shape, dtype):
    """Of a constant the mean is that constant and the variance 0: the output is the bias."""
    for layout in ("contiguous", "channels_last"):
        x = as_layout(torch.full(shape, value, dtype=dtype), layout)
        m = randomise_parameters(layer_for(x)(shape[1], dtype=torch.float64 if dtype == torch.float64 else None))
        y = m(x)
        bias = m.bias.detach().to(dtype).reshape([1, -1] + [1] * (len(shape) - 2)).expand(shape)
        atol = 1e-9 if dtype == torch.float64 else 2e-6
        assert_close(y.detach(), bias, rtol=0 if dtype != torch.bfloat16 else 2**-7, atol=atol)
        assert (m.view_var_sum >= 0).all() and (m.view_var_sum <= 1e-11 * max(1.0, value * value)).all()
        assert_close(m.view_mean_sum.double(), x.flatten()[0].double().expand(shape[1]), rtol=1e-7, atol=0)


@pytest.mark.parametrize("value", [123456.7, -1e20, 3e38])
def test_large_constant_channels_stay_finite(value):
    x = torch.full((4, 3, 9, 9), value)
    y = momentum_bn.MomentumBatchNorm2d(3)(x)
    assert torch.isfinite(y).all()


def test_statistics_that_are_exact_in_any_order_of_summation():
    """Whole numbers around a whole mean: a right sum has no rounding at all."""
    for shape in [(8, 5, 16, 16), (2, 37, 8, 16), (1024, 3)]:
        n = torch.empty(shape).numel() // shape[1]
        values = torch.arange(n, dtype=torch.float32).sub((n - 1) / 2).mul(2).sign() * 3 + 7  # half 4, half 10
        x = torch.stack([values[torch.randperm(n)] for _ in range(shape[1])], 1).reshape([shape[0], -1, shape[1]])
        x = x.movedim(2, 1).reshape(shape)
        for layout in ("contiguous", "channels_last", "permuted"):
            _, b_mean, b_var = momentum_bn.functional.momentum_batch_norm(
                as_layout(x, layout), None, None, training=True
            )
            assert torch.equal(b_mean, torch.full((shape[1],), 7.0))
            assert_close(
                b_var.double(), torch.full((shape[1],), 9.0 * n / (n - 1), dtype=torch.float64), rtol=2e-7, atol=0
            )


@pytest.mark.parametrize("activation", [None, "relu"])
def test_weight_of_zero(activation):
    m = momentum_bn.MomentumBatchNorm2d(3, activation=activation)
    torch.nn.init.zeros_(m.weight)
    torch.nn.init.constant_(m.bias, 0.5)
    x = randn(2, 3, 4, 5, dtype=torch.float32).requires_grad_()
    y = m(x)
    assert torch.equal(y, torch.full_like(y, 0.5))
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(m.bias.grad, torch.full((3,), 40.0))
    assert torch.isfinite(m.weight.grad).all()


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nan_and_inf_pass_as_in_torch(special, activation, layout, dtype):
    x = randn(2, 5, 4, 4, dtype=dtype)
    x[1, 2, 1, 3] = special
    x = as_layout(x, layout)
    for training in (True, False):
        m = momentum_bn.MomentumBatchNorm2d(
            5, activation=activation, momentum=0.5, dtype=torch.float64 if dtype == torch.float64 else None
        )
        y = m.train(training)(x).detach().double()
        oracle = MomentumBatchNormOracle(5, activation=activation, momentum=0.5)
        expected = (oracle.train_forward if training else oracle.eval_forward)(x)
        assert_close(y, expected, rtol=0.02, atol=0.02, equal_nan=True)
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())
        other_channels = [0, 1, 3, 4]
        assert torch.isfinite(y[:, other_channels]).all()


def test_special_values_in_the_residual_pass():
    residual = torch.zeros(2, 3, 4, 4)
    residual[0, 0, 0] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
    for training in (True, False):
        y = momentum_bn.MomentumBatchNorm2d(3, activation="relu").train(training)(torch.rand(2, 3, 4, 4), residual)
        assert y[0, 0, 0, 0].isnan() and y[0, 0, 0, 1].isinf() and y[0, 0, 0, 2] == 0 and torch.isfinite(y[0, 0, 0, 3])


def test_gradient_of_relu_at_nan_is_torchs():
    """threshold_backward lets the gradient through where the output is NaN: NaN <= 0 is false."""
    m = momentum_bn.MomentumBatchNorm1d(2, activation="relu").eval()
    x = torch.tensor([[float("nan"), 1.0], [-1.0, 2.0]], requires_grad=True)
    y = torch.relu(torch.nn.functional.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias))
    (expected,) = torch.autograd.grad(y.sum(), x)
    (actual,) = torch.autograd.grad(m(x).sum(), x)
    assert_close(actual, expected, equal_nan=True)


@pytest.mark.cpu_only
@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(257, 33), (5, 7, 1009), (3, 37, 31, 29), (64, 16, 14, 14), (2, 3, 129, 131)], ids=str
)
def test_threads_do_not_change_a_bit(shape, dtype):
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    for layout in LAYOUTS:
        results = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            m = layer_for(torch.empty(shape))(
                shape[1], activation="relu", views_per_update=1, momentum=0.5, dtype=parameters
            )
            randomise_parameters(m)
            x = as_layout(randn(*shape, dtype=dtype, shift=0.5), layout).detach().requires_grad_()
            y = m(x)
            y.backward(randn(*shape, seed=1, dtype=dtype))
            results.append([y, x.grad, m.weight.grad, m.bias.grad, *m.buffers()])
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True)), f"{layout}"
