"""torch.utils.checkpoint: exact where the layer's output is kept, refused where a training forward would run twice."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import momentum_bn
from inputs import randn
from snapshots import snapshot, unchanged


def by_namespace(_context, operator, *_args, **_kwargs):
    """Keeps what any of the layer's operators returns."""
    kept = operator.namespace == "momentum_bn"
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def by_operator(_context, operator, *_args, **_kwargs):
    """Keeps what the operator returns that the error names."""
    kept = operator is torch.ops.momentum_bn._forward_train.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


POLICIES = {
    "by namespace": by_namespace,
    "by operator": by_operator,
    "list": [torch.ops.momentum_bn._forward_train.default],
}


def selectively(function, x, policy):
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_recomputed_training_forward_is_refused(use_reentrant, inplace):
    m = momentum_bn.MomentumBatchNorm1d(3, inplace=inplace)
    x = torch.rand(4, 3, requires_grad=True)
    y = checkpoint(lambda x: m(x * 2).square(), x, use_reentrant=use_reentrant)
    before = snapshot(m)
    assert before[":cur_iter"] == 0 and int(m.num_batches_tracked) == 1
    with unchanged(m), pytest.raises((ValueError, RuntimeError), match=r"torch\.utils\.checkpoint") as error:
        y.sum().backward()
    assert "selective" in str(error.value) and "_forward_train" in str(error.value)


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_selective_policy(policy, training, options, inplace, frozen):
    """The gradients, the state and the memory's contents of a run without checkpointing, to the bit."""
    plain, saving = (
        momentum_bn.MomentumBatchNorm1d(3, views_per_update=1, inplace=inplace, dtype=torch.float64, **options)
        .train(training)
        .requires_grad_(not frozen)
        for _ in range(2)
    )
    for step in range(3):
        x, y = (randn(4, 3, seed=step).requires_grad_() for _ in range(2))
        plain(x * 2).sin().square().sum().backward()
        selectively(lambda x: saving(x * 2).sin().square(), y, POLICIES[policy]).sum().backward()
        assert torch.equal(x.grad, y.grad)
        assert frozen or torch.equal(plain.weight.grad, saving.weight.grad)
        assert saving.cur_iter == plain.cur_iter
        for name, value in plain.state_dict().items():
            assert torch.equal(saving.state_dict()[name], value), name


def test_in_place_memory_is_still_taken_without_gradient():
    m = momentum_bn.MomentumBatchNorm1d(3, inplace=True)
    with torch.no_grad():
        x = torch.rand(4, 3)
        assert selectively(m, x, by_namespace) is x


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_evaluation_is_recomputed(use_reentrant):
    m = momentum_bn.MomentumBatchNorm1d(3).eval()
    x, y = (torch.ones(4, 3).requires_grad_() for _ in range(2))
    m(x * 2).square().sum().backward()
    checkpoint(lambda y: m(y * 2).square(), y, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("policy", ["by namespace", "by operator"])
def test_selective_policy_compiled(policy):
    torch._dynamo.reset()
    plain, saving = (momentum_bn.MomentumBatchNorm1d(3, views_per_update=1) for _ in range(2))
    run = torch.compile(
        lambda x: selectively(lambda x: saving(x * 2).sin().square(), x, POLICIES[policy]),
        backend="aot_eager",
        fullgraph=True,
    )
    for step in range(2):
        x, y = (randn(4, 3, seed=step, dtype=torch.float32).requires_grad_() for _ in range(2))
        plain(x * 2).sin().square().sum().backward()
        run(y).sum().backward()
        torch.testing.assert_close(y.grad, x.grad)
        assert saving.cur_iter == plain.cur_iter == step + 1 and saving.momentum == plain.momentum


def test_plain_checkpoint_compiled_is_refused():
    torch._dynamo.reset()
    m = momentum_bn.MomentumBatchNorm1d(3)
    run = torch.compile(
        lambda x: checkpoint(lambda x: m(x * 2).sin(), x, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    y = run(torch.rand(4, 3, requires_grad=True))
    with unchanged(m), pytest.raises(ValueError, match=r"torch\.utils\.checkpoint"):
        y.sum().backward()
