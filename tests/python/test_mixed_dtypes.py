"""Autocast, and the mixtures of dtypes of input and parameters, beside torch's BatchNorm."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import momentum_bn
from inputs import randn, randomise_parameters
from oracle import MomentumBatchNormOracle
from snapshots import same_bits

SIXTEEN_BIT = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *SIXTEEN_BIT]


def layers(dtype):
    return (randomise_parameters(cls(4, dtype=dtype)) for cls in (momentum_bn.MomentumBatchNorm2d, nn.BatchNorm2d))


@pytest.mark.cpu_only  # on a GPU torch has other mixtures
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
@pytest.mark.parametrize("input_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_what_torch_takes_and_refuses(input_dtype, parameters, training):
    """The same mixtures run, with the same output dtype; all others raise, and change nothing."""
    ours, theirs = layers(parameters)
    x = randn(3, 4, 5, 5, dtype=input_dtype)
    outcomes = []
    for m in (ours.train(training), theirs.train(training)):
        try:
            outcomes.append(m(x).dtype)
        except RuntimeError:
            outcomes.append("refused")
            assert int(m.num_batches_tracked) == 0 or m is theirs  # torch counts before it looks
    assert outcomes[0] == outcomes[1]
    allowed = input_dtype == parameters or (input_dtype in SIXTEEN_BIT and parameters == torch.float32)
    assert outcomes[0] == (input_dtype if allowed else "refused")


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_autocast(dtype, training):
    """The layer runs in the dtype that reaches it, as torch's does; its state and gradients stay float32."""
    ours, theirs = (
        nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)).train(training)
        for layer in layers(torch.float32)
    )
    theirs.load_state_dict(momentum_bn.plain_state_dict(ours))
    x = randn(8, 3, 5, 5, dtype=torch.float32)
    seen = {}
    for name, net in (("ours", ours), ("theirs", theirs)):
        net[1].register_forward_hook(lambda _m, args, y, name=name: seen.update({name: (args[0].dtype, y.dtype)}))
        with torch.autocast(torch.get_default_device().type, dtype):
            loss = net(x).float().square().mean()
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    assert seen["ours"] == seen["theirs"] == (dtype, dtype)
    for name, buffer in ours[1].named_buffers():
        assert buffer.dtype in (torch.float32, torch.int64) or name == "momentum_state"
    if not training:
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-3)


def test_layer_under_autocast_alone_keeps_float32():
    """Autocast lowers matrix products and convolutions; BatchNorm takes what comes."""
    ours, theirs = layers(torch.float32)
    x = randn(3, 4, 5, 5, dtype=torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert ours(x).dtype == theirs(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("parameters", ["float32", "sixteen bits"])
def test_sixteen_bit_input_with_float32_statistics(dtype, parameters):
    """The sums are taken in float32 or better: the output is the oracle's, rounded once."""
    m = momentum_bn.MomentumBatchNorm2d(4, dtype=dtype if parameters == "sixteen bits" else None)
    x = randn(8, 4, 16, 16, dtype=dtype, shift=3)
    expected = MomentumBatchNormOracle(4).train_forward(x)
    assert_close(m(x).double(), expected, rtol=2 ** (-7 if dtype == torch.bfloat16 else -10), atol=2**-10)
    assert m.view_mean_sum.dtype == torch.float32


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_named_casts(cast):
    """`.half()` and its like: the layer runs in that dtype on, and its schedule is that of a layer never cast."""
    cast_layer, plain = (momentum_bn.MomentumBatchNorm2d(4, total_iters=1001, momentum=0.1) for _ in range(2))
    for step in range(9):
        if step == 3:
            assert getattr(cast_layer, cast)() is cast_layer
        x = randn(4, 4, 3, 3, seed=step, dtype=torch.float32)
        plain(x)
        assert cast_layer(x.to(cast_layer.weight.dtype)).dtype == cast_layer.weight.dtype
        for name in ("num_batches_tracked", "view_count", "cur_iter_state", "momentum_state"):
            assert same_bits(getattr(cast_layer, name), getattr(plain, name)), name
