"""torch.compile: one graph, no recompilation as the schedule moves, the same state and results."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import momentum_bn
from inputs import randn
from snapshots import OWN_STATE


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), momentum_bn.MomentumBatchNorm2d(4, total_iters=6, activation="relu"),
        nn.Flatten(), nn.Linear(100, 5), momentum_bn.MomentumBatchNorm1d(5, total_iters=6),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_steps(backend):
    torch._dynamo.reset()
    eager, compiled = network(), network()
    forward = torch.compile(compiled, backend=backend, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(5):
            for view in range(3):  # several forwards per step, in and out of the half-done pair
                x = randn(4, 3, 7, 7, seed=10 * step + view, dtype=torch.float32)
                expected, actual = eager(x), forward(x)
                assert_close(actual, expected, rtol=1e-5, atol=1e-5)
                expected.square().mean().backward()
                actual.square().mean().backward()
            for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
                assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert eager[1].cur_iter == 7 and eager[1].momentum == 0.0
    for name, value in eager.state_dict().items():
        actual = compiled.state_dict()[name]
        if (name.rsplit(".")[-1] in OWN_STATE and not value.is_floating_point()) or name.endswith("momentum_state"):
            assert torch.equal(actual, value), name
        assert_close(actual, value, rtol=1e-5, atol=1e-5, msg=lambda t, name=name: f"{name}: {t}")


def test_teacher_without_gradient():
    torch._dynamo.reset()
    eager, compiled = network().requires_grad_(False), network().requires_grad_(False)
    forward = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(5):
            x = randn(4, 3, 7, 7, seed=step, dtype=torch.float32)
            assert_close(forward(x), eager(x), rtol=1e-5, atol=1e-5)
    for name, value in eager.state_dict().items():
        assert_close(compiled.state_dict()[name], value, rtol=1e-5, atol=1e-5)


def test_assigned_total_iters_recompiles():
    torch._dynamo.reset()
    m = momentum_bn.MomentumBatchNorm1d(3, total_iters=4, views_per_update=1)
    forward = torch.compile(m, backend="aot_eager", fullgraph=True)
    forward(torch.rand(4, 3))
    m.total_iters = 8
    forward(torch.rand(4, 3))
    eager = momentum_bn.MomentumBatchNorm1d(3, total_iters=8, views_per_update=1)
    eager(torch.rand(4, 3)), eager(torch.rand(4, 3))
    assert m.momentum == eager.momentum
