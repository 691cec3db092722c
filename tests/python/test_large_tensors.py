"""More than 2**31 values in one tensor: no index is kept in 32 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import momentum_bn

pytestmark = pytest.mark.sweep("more values than 32 bits count")

PERIOD = 64 * 1024


def require_memory(gigabytes: float) -> None:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = [int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")]
    if not available or available[0] < gigabytes + 1:
        pytest.skip(f"needs {gigabytes} GB of free memory, there are {available}")


def repeated(pattern: torch.Tensor, *shape: int) -> torch.Tensor:
    """A tensor of the pattern's values over and over along each row."""
    rows = torch.empty(shape, dtype=pattern.dtype)
    whole = shape[-1] // pattern.numel() * pattern.numel()
    rows[..., :whole].unflatten(-1, (-1, pattern.numel())).copy_(pattern)
    rows[..., whole:] = pattern[: shape[-1] - whole]
    return rows


def probes(size: int) -> list[slice]:
    """The first, the middle and the last values."""
    return [slice(0, PERIOD), slice(size // 2 // PERIOD * PERIOD, size // 2 // PERIOD * PERIOD + PERIOD),
            slice(size // PERIOD * PERIOD - PERIOD, size)]  # fmt: skip


def normalised(pattern: torch.Tensor) -> torch.Tensor:
    values = pattern.double()
    return (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()


def test_long_planes():
    require_memory(4.5)
    pattern = torch.randn(PERIOD).bfloat16()
    length = 2**30 + 64
    x = repeated(pattern, 1, 2, length)
    m = momentum_bn.MomentumBatchNorm1d(2, affine=False, inplace=True)
    with torch.no_grad():
        y = m(x)
    assert y.data_ptr() == x.data_ptr() and y.numel() > 2**31
    expected = normalised(pattern).repeat(2)
    for channel in range(2):
        for part in probes(length):
            got = y[0, channel, part].double()
            torch.testing.assert_close(got, expected[: got.numel()], rtol=2**-8, atol=1e-6)


def test_many_rows():
    """As in NHWC; forward in place, then the same memory as a gradient."""
    require_memory(8.8)
    channels, rows = 64, 2**25 + 2
    pattern = torch.randn(PERIOD).bfloat16()
    x = repeated(pattern, rows * channels).view(rows, channels)
    m = momentum_bn.MomentumBatchNorm1d(channels, affine=False, inplace=True)
    with torch.no_grad():
        y = m(x)
    assert y.numel() > 2**31
    by_channel = pattern.view(-1, channels)
    expected = torch.stack([normalised(by_channel[:, c]) for c in range(channels)], 1).view(-1).repeat(2)
    for part in probes(rows * channels):
        got = y.view(-1)[part].double()
        torch.testing.assert_close(got, expected[: got.numel()], rtol=2**-8, atol=2e-6)

    saved = torch.stack([torch.zeros(channels), torch.zeros(channels), torch.full((channels,), 0.5)])
    dx, _, dbias, _ = torch.ops.momentum_bn._backward(
        y, None, None, None, None, saved, None, [True, False, True, False]
    )
    for part in probes(rows * channels):
        assert torch.equal(dx.view(-1)[part], y.view(-1)[part] * 0.5)
    assert dbias.abs().max() < 1e-3 * rows
