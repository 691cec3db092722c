"""Every layout, dtype and mixture of dtypes against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import momentum_bn
from inputs import (
    FLOATS,
    LAYOUTS,
    SIXTEEN_BIT,
    TOLERANCE,
    as_layout,
    layer_for,
    randn,
    randomise_parameters,
    suggested_strides,
)
from oracle import MomentumBatchNormOracle
from snapshots import unchanged

# (N, C, L) with L equal to C or 1, (N, C), odd sizes that leave tails to vector loops, and larger ones.
SHAPES = [
    (4, 5), (2, 37), (7, 1), (3, 64),
    (4, 5, 5), (4, 5, 1), (3, 1, 7), (2, 3, 37),
    (3, 5, 4, 3), (2, 64, 1, 1), (3, 1, 5, 7), (2, 37, 3, 3), (1, 3, 9, 11), (2, 16, 8, 8),
    (2, 5, 3, 2, 4), (2, 37, 1, 3, 2), (1, 1, 2, 3, 5),
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_and_dtype(layout, dtype):
    for seed, shape in enumerate(SHAPES):
        for parameters in {dtype, torch.float32} if dtype in SIXTEEN_BIT else {dtype}:
            for activation, with_residual in [(None, False), ("relu", True)]:
                x = as_layout(randn(*shape, seed=seed, dtype=dtype, shift=0.5), layout)
                residual = randn(*shape, seed=seed + 100, dtype=dtype) if with_residual else None
                check_against_oracle(x, residual, parameters, activation, f"{shape} {parameters}")


def check_against_oracle(x, residual, parameters, activation, what):
    m = randomise_parameters(layer_for(x)(x.size(1), dtype=parameters, activation=activation, momentum=0.75))
    with torch.no_grad():
        m.running_mean.copy_(randn(x.size(1), seed=5, scale=0.5))
        m.running_var.copy_(randn(x.size(1), seed=6).abs() + 0.5)
    oracle = MomentumBatchNormOracle(x.size(1), activation=activation)
    for forward in range(2):
        oracle.read_state(m)
        kept = x.clone()
        y = m(x) if residual is None else m(x, residual)
        expected = oracle.train_forward(x, m.weight, m.bias, residual)
        assert y.dtype == x.dtype and y.shape == x.shape, what
        assert y.stride() == suggested_strides(x), f"{what}: {y.stride()} of {x.stride()}"
        # An output near 0 may stand for the difference of larger numbers, so the tolerance goes with these.
        tolerance = TOLERANCE[x.dtype] * 2
        assert_close(
            y.detach().double(), expected.detach(), rtol=tolerance, atol=tolerance, msg=lambda t: f"{what}: {t}"
        )
        assert torch.equal(x, kept), f"{what}: the input was changed"
        state_tolerance = max(TOLERANCE[parameters], 1e-12)
        for name in ("running_mean", "running_var", "view_mean_sum", "view_var_sum"):
            assert_close(
                getattr(m, name).double(), getattr(oracle, name), rtol=state_tolerance, atol=state_tolerance,
                msg=lambda t, name=name, forward=forward: f"{what} {name} after {forward + 1}: {t}",
            )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_in_every_layout(layout, dtype):
    for shape in [(4, 5), (4, 5, 5), (3, 5, 4, 3), (2, 37, 3, 3), (2, 5, 3, 2, 4)]:
        base = randn(*shape, dtype=dtype)
        x, ref = (as_layout(base.clone(), layout).detach().requires_grad_() for _ in range(2))
        m = randomise_parameters(
            layer_for(x)(shape[1], activation="relu", dtype=torch.float64 if dtype == torch.float64 else None)
        )
        weight, bias = (p.detach().double().requires_grad_() for p in (m.weight, m.bias))
        g = as_layout(randn(*shape, seed=3, dtype=dtype), layout if layout != "expanded" else "permuted")
        # Where rounding may have put the output on the other side of 0, the mask is chance: no gradient there.
        expected = MomentumBatchNormOracle(shape[1], activation="relu").train_forward(ref, weight, bias)
        g = torch.where(expected.detach().abs() < 0.02, torch.zeros_like(g), g)
        m(x).backward(g)
        expected.backward(g.double())
        tolerance = TOLERANCE[dtype] * 4
        assert x.grad.dtype == dtype
        assert_close(x.grad.double(), ref.grad.double(), rtol=tolerance, atol=tolerance)
        # Sums of as many terms as there are values per channel.
        assert_close(m.weight.grad.double(), weight.grad, rtol=tolerance, atol=tolerance * 16)
        assert_close(m.bias.grad.double(), bias.grad, rtol=tolerance, atol=tolerance * 16)


@pytest.mark.parametrize("n", [2, 3, 15, 16, 17, 31, 33, 63, 65, 127, 129, 1000, 4097])
@pytest.mark.parametrize("channels", [1, 3, 5, 37, 64])
def test_tails_of_vector_loops(n, channels):
    for shape, layout in [
        ((n, channels), "contiguous"),
        ((1, channels, n), "contiguous"),
        ((1, channels, n), "channels_last"),
    ]:
        x = as_layout(randn(*shape, dtype=torch.float32), layout)
        y = momentum_bn.MomentumBatchNorm1d(channels)(x)
        expected = MomentumBatchNormOracle(channels).train_forward(x)
        assert_close(y.detach().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
def test_functional_statistics_of_sixteen_bit_input_are_float32(dtype):
    x = randn(8, 3, 5, 5, dtype=dtype)
    _, b_mean, b_var = momentum_bn.functional.momentum_batch_norm(x, None, None, training=True)
    assert b_mean.dtype == b_var.dtype == torch.float32
    assert_close(b_mean.double(), x.double().mean([0, 2, 3]), rtol=1e-6, atol=1e-6)
    assert_close(b_var.double(), x.double().var([0, 2, 3]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("input_dtype", "parameter_dtype"),
    [
        (torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float64), (torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.cpu_only  # on a GPU torch has other words
@pytest.mark.parametrize("training", [True, False])
def test_other_mixtures_of_dtypes_are_an_error_as_in_torch(input_dtype, parameter_dtype, training):
    x = randn(4, 3, 5, 5, dtype=input_dtype)
    m = momentum_bn.MomentumBatchNorm2d(3, dtype=parameter_dtype).train(training)
    with pytest.raises(RuntimeError) as torchs:
        torch.nn.BatchNorm2d(3, dtype=parameter_dtype).train(training)(x)
    with unchanged(m, x), pytest.raises(type(torchs.value)) as ours:
        m(x)
    assert str(torchs.value).startswith("mixed dtype") and str(ours.value).startswith("mixed dtype")
