"""The memory of large results is kept, reused and given back; gradients that nobody else holds are overwritten."""

import gc
import os

import pytest
import torch

import momentum_bn
from momentum_bn import memory

LARGE = (2, 64, 256, 256)  # 32 MiB
BYTES = 2 * 64 * 256 * 256 * 4


@pytest.fixture(autouse=True)
def nothing_kept():
    before = memory.limit()
    gc.collect()
    memory.release()
    yield
    memory.release()
    memory.set_limit(before)


@pytest.fixture
def norm():
    return momentum_bn.MomentumBatchNorm2d(64, total_iters=10)


@torch.no_grad()
def test_a_large_result_takes_the_memory_of_the_one_freed_before(norm):
    y = norm(torch.randn(LARGE))
    address = y.data_ptr()
    expected = y.clone()
    assert memory.kept() == 0
    del y
    assert memory.kept() == BYTES
    norm.reset_running_stats()
    x = torch.randn(LARGE)
    y = norm(x)
    assert y.data_ptr() == address
    assert memory.kept() == 0
    norm.reset_running_stats()
    assert torch.equal(y, norm(x))
    assert not torch.equal(y, expected)


@torch.no_grad()
def test_results_that_live_at_once_have_memory_of_their_own(norm):
    x = torch.randn(LARGE)
    norm(x)
    first, second = norm(x), norm(x)
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_reused_memory_holds_the_same_values(norm, channels_last):
    # Written past the caches where it was in use before.
    x = torch.randn(LARGE)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    first = norm(x).clone()
    assert memory.kept() == BYTES
    norm.reset_running_stats()
    second = norm(x)
    assert memory.kept() == 0
    assert torch.equal(first, second)
    assert second.stride() == x.stride()


@torch.no_grad()
def test_limit(norm):
    x = torch.randn(LARGE)
    memory.set_limit(BYTES)
    results = [norm(x), norm(x)]
    results.clear()
    assert memory.kept() == BYTES
    memory.set_limit(BYTES - 1)
    assert memory.kept() == 0
    norm(x)
    assert memory.kept() == 0
    with pytest.raises(ValueError, match=r"at least 0 bytes \(got -1\)"):
        memory.set_limit(-1)
    assert memory.limit() == BYTES - 1


@torch.no_grad()
def test_small_results_are_not_kept(norm):
    norm(torch.randn(2, 64, 8, 8))
    assert memory.kept() == 0


@torch.no_grad()
def test_a_result_can_grow_and_be_copied(norm):
    x = torch.randn(LARGE)
    y = norm(x)
    values = y.clone()
    y.resize_(2, 64, 256, 512)
    assert torch.equal(y.flatten()[: values.numel()], values.flatten())
    del y
    memory.release()
    assert memory.kept() == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@torch.no_grad()
def test_a_forked_process_has_memory(norm):
    x = torch.randn(LARGE)
    norm(x)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        # Reading alone: the threads of the parent are not there.
        os._exit(0 if memory.kept() == BYTES and momentum_bn.memory.limit() > 0 else 1)
    torch.set_num_threads(threads)
    assert os.waitpid(child, 0)[1] == 0


def overwrites(y, dy=None):
    """Whether the backward pass from y leaves a gradient in the memory of another."""
    with torch.profiler.profile() as profile:
        y.backward(dy)
    names = {event.name for event in profile.events()}
    assert len(names & {"momentum_bn::_backward", "momentum_bn::_backward_"}) == 1
    return "momentum_bn::_backward_" in names


@pytest.mark.parametrize("activation", [None, "relu"])
def test_backward_overwrites_a_gradient_that_nobody_else_holds(activation):
    norm = momentum_bn.MomentumBatchNorm2d(3, activation=activation, total_iters=10)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    weights = torch.randn(4, 3, 5, 5)
    assert overwrites((norm(x) * weights).sum())
    held = []
    for hold in (held.append, lambda dy: held.append(dy.view(-1))):
        y = norm(x)
        y.register_hook(hold)
        assert not overwrites((y * weights).sum())
    # A gradient without memory for each value.
    assert not overwrites(norm(x).sum())
    assert not overwrites(norm(x), weights)


def test_backward_leaves_other_gradients_alone():
    norm = momentum_bn.MomentumBatchNorm2d(3, total_iters=10)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    dy = torch.randn(4, 3, 5, 5)
    kept = dy.clone()
    torch.autograd.grad(norm(x), x, dy)
    assert torch.equal(dy, kept)
    # Both branches of a sum are given the same gradient.
    y, z = norm(x), norm(x)
    y.retain_grad()
    (2 * (y + z)).backward(dy)
    assert torch.equal(y.grad, 2 * dy)
    # A residual's gradient is dy itself.
    residual = torch.randn_like(x).requires_grad_()
    (2 * norm(x, residual)).backward(dy)
    assert torch.equal(residual.grad, 2 * dy)


def test_gradients_are_the_same_overwritten_or_not():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    scale = torch.randn(4, 3, 5, 5)
    results = []
    for hold in (False, True):
        norm = momentum_bn.MomentumBatchNorm2d(3, activation="relu", total_iters=10)
        y = norm(x)
        held = []
        if hold:
            y.register_hook(held.append)
        results.append(torch.autograd.grad((y * scale).sum(), (x, norm.weight, norm.bias)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
