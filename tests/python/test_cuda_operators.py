"""The private operators where devices differ: given statistics of ranks, counters, what falls back. On any --device."""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.testing import assert_close

import momentum_bn
from inputs import TOLERANCE, as_layout, randn, randomise_parameters
from oracle import MomentumBatchNormOracle, cosine_schedule
from snapshots import same_bits, snapshot, unchanged

SHAPE = (8, 5, 3, 4)
OPTIONS = (1e-5, None, 10, 2, "cosine", "published", True)


def layer(**options):
    return randomise_parameters(momentum_bn.MomentumBatchNorm2d(SHAPE[1], total_iters=10, **options))


def state(m):
    return list(m.buffers())


@pytest.fixture
def emulation(request):
    if request.config.getoption("--device", default="cpu") != "emulated-cuda":
        pytest.skip("looks into the emulated CUDA runtime: --device emulated-cuda")
    import emulated_cuda

    return emulated_cuda


def train(m, x, *, activation=None, detach_statistics=True, statistics=None):
    """y and `saved` of a training forward of the layer's state."""
    with torch.no_grad():
        return torch.ops.momentum_bn._forward_train(
            x, None, m.weight, m.bias, state(m), *OPTIONS[:-1], detach_statistics, activation, None, statistics
        )


@pytest.fixture
def force_path(request):
    """A context in which a forward and a backward pass go one way, and no other."""
    if request.config.getoption("--device") == "cpu":
        pytest.skip("no tensor is on a GPU here: --device cuda or emulated-cuda")
    if not hasattr(torch.ops.momentum_bn, "_use_cuda_paths"):
        pytest.skip("this library has no CUDA kernels")

    @contextmanager
    def force(paths):
        before = torch.ops.momentum_bn._cuda_path_counts()
        torch.ops.momentum_bn._use_cuda_paths(paths)
        refused = paths == "on_chip" and os.environ.get("EMULATED_SHARED_KIB") == "0"
        try:
            with pytest.raises(RuntimeError, match="launch failed") if refused else nullcontext():
                yield
        finally:
            torch.ops.momentum_bn._use_cuda_paths("best")
        if refused:
            pytest.skip("nothing fits on this emulated chip, and the pass said so")
        after = torch.ops.momentum_bn._cuda_path_counts()
        assert [a - b for a, b in zip(after, before, strict=True)] == ([2, 0] if paths == "on_chip" else [0, 2])

    return force


def statistics_of_ranks(pieces):
    return torch.stack([torch.ops.momentum_bn._batch_statistics(piece) for piece in pieces])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shards", [(5, 3), (7, 1), (8, 0), (1, 1, 6)], ids=str)
def test_statistics_of_several_ranks_equal_the_whole_batch(shards, dtype):
    """What a group's collective would gather is given, so that one process can play all ranks."""
    whole = layer(activation="relu", dtype=dtype)
    parts = [layer(activation="relu", dtype=dtype) for _ in shards]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    with torch.no_grad():
        for step in range(4):
            x = randn(*SHAPE, seed=step, dtype=dtype, shift=step)
            pieces = x.split(shards)
            gathered = statistics_of_ranks(pieces)
            ys = [
                torch.ops.momentum_bn._forward_train(
                    piece, None, part.weight, part.bias, state(part), *OPTIONS, "relu", None, gathered
                )[0]
                for piece, part in zip(pieces, parts, strict=True)
            ]
            assert_close(torch.cat(ys), whole(x), rtol=tolerance, atol=tolerance)
    for part in parts:
        for name, buffer in part.named_buffers():
            assert_close(buffer, getattr(whole, name), rtol=tolerance, atol=tolerance, msg=name)


def test_one_value_in_a_whole_group_is_refused_and_none_changes_nothing():
    m, x = layer(), randn(1, SHAPE[1], 1, 1, dtype=torch.float32)
    for pieces in ((x, x[:0]), (x[:0], x)):
        gathered = statistics_of_ranks(pieces)
        with unchanged(m, x), pytest.raises(ValueError, match="1 value per channel in the whole process group"):
            torch.ops.momentum_bn._forward_train(
                pieces[0], None, m.weight, m.bias, state(m), *OPTIONS, None, None, gathered
            )
    nothing = x[:0]
    with unchanged(m), torch.no_grad():
        y, saved = torch.ops.momentum_bn._forward_train(
            nothing, None, None, None, state(m), *OPTIONS, None, None, statistics_of_ranks([nothing, nothing])
        )
        assert y.shape == nothing.shape and torch.equal(saved, torch.zeros_like(saved))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("detach_statistics", [True, False])
@pytest.mark.parametrize("mask_from_x", [True, False])
def test_backward_over_its_gradient_equals_backward(layout, activation, detach_statistics, mask_from_x):
    x = as_layout(randn(*SHAPE, dtype=torch.float32), layout)
    m = layer(activation=activation)
    y, saved = train(m, x, activation=activation, detach_statistics=detach_statistics)
    dy = as_layout(randn(*SHAPE, seed=1, dtype=torch.float32), layout)
    masked = None if mask_from_x or not activation else y.detach()
    arguments = x, masked, m.weight.detach(), m.bias.detach(), saved, activation
    dx, dweight, dbias, dresidual = torch.ops.momentum_bn._backward(dy, *arguments, [True] * 4)
    over = dy.clone(memory_format=torch.preserve_format)
    results = torch.ops.momentum_bn._backward_(over, *arguments, [True] * 4)
    for ours, theirs in zip((over, *results), (dx, dweight, dbias, dresidual), strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("detach_statistics", [True, False])
def test_mask_made_from_x_has_the_bits_of_the_mask_from_y(dtype, detach_statistics):
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    m, x, dy = layer(dtype=kept), randn(*SHAPE, dtype=dtype), randn(*SHAPE, seed=1, dtype=dtype)
    y, saved = train(m, x, activation="relu", detach_statistics=detach_statistics)
    parameters = m.weight.detach(), m.bias.detach()
    from_y, from_x = (
        torch.ops.momentum_bn._backward(dy, x, mask, *parameters, saved, "relu", [True] * 4) for mask in (y, None)
    )
    for ours, theirs in zip(from_x, from_y, strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shards", [(8,), (5, 3), (8, 0), (1, 1, 6)], ids=str)
@pytest.mark.parametrize("mask_from_x", [True, False])
@pytest.mark.parametrize("with_dresidual", [True, False])
def test_backward_in_halves_equals_that_of_the_whole_batch(dtype, shards, mask_from_x, with_dresidual):
    """The ranks' sums are added up here, so that one process can play all ranks."""
    whole, x, dy = layer(dtype=dtype), randn(*SHAPE, dtype=dtype, shift=1), randn(*SHAPE, seed=1, dtype=dtype)
    wanted = [True, True, True, with_dresidual]
    part, pieces = layer(dtype=dtype), x.split(shards)
    y, saved = train(whole, x, activation="relu", detach_statistics=False)
    parameters = whole.weight.detach(), whole.bias.detach()
    expected = torch.ops.momentum_bn._backward(dy, x, y, *parameters, saved, "relu", wanted)
    results, gathered = [], statistics_of_ranks(pieces)
    initial = [buffer.clone() for buffer in state(part)]
    for piece, of_piece in zip(pieces, dy.split(shards), strict=True):
        for buffer, value in zip(state(part), initial, strict=True):
            buffer.copy_(value)
        y, saved = train(part, piece, activation="relu", detach_statistics=False, statistics=gathered)
        arguments = piece, None if mask_from_x else y, *parameters, saved
        halves = torch.ops.momentum_bn._gradient_sums(of_piece, *arguments, "relu", wanted)
        results.append((of_piece, arguments, halves))
    sums = sum(halves[0] for _, _, halves in results)
    assert sums.dtype == torch.float64 and sums.shape == (2, SHAPE[1])
    dx = [
        torch.ops.momentum_bn._gradient_of_input(of_piece, *arguments, sums, "relu")
        for of_piece, arguments, _ in results
    ]
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    assert_close(torch.cat(dx), expected[0], **tolerance)
    for index in (1, 2):
        assert_close(sum(halves[index] for _, _, halves in results), expected[index], **tolerance)
    if with_dresidual:
        assert_close(torch.cat([halves[3] for _, _, halves in results]), expected[3], **tolerance)


@pytest.mark.parametrize("paths", ["on_chip", "several_launches"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_path_against_float64(paths, layout, dtype, force_path):
    ours, theirs = momentum_bn.BatchNorm2d(SHAPE[1]), torch.nn.BatchNorm2d(SHAPE[1], dtype=torch.float64)
    x, dy = (as_layout(randn(*SHAPE, seed=seed, dtype=dtype, shift=seed), layout) for seed in (0, 1))
    exact = x.double().requires_grad_()
    x.requires_grad_()
    with force_path(paths):
        y = ours(x)
        y.backward(dy)
    expected = theirs(exact)
    expected.backward(dy.double())
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    assert_close(y.double(), expected, **tolerance)
    assert_close(x.grad.double(), exact.grad, **tolerance)
    for name in ("weight", "bias"):
        assert_close(getattr(ours, name).grad.double(), getattr(theirs, name).grad, rtol=1e-4, atol=1e-4, msg=name)
    for name in ("running_mean", "running_var"):
        assert_close(getattr(ours, name).double(), getattr(theirs, name), rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.usefixtures("force_path")
def test_unknown_path_is_refused():
    with pytest.raises(ValueError, match=r"paths must be .*got 'both'"):
        torch.ops.momentum_bn._use_cuda_paths("both")


@pytest.mark.usefixtures("emulation")
def test_batch_norm_runs_no_composite_operation():
    """Forward and backward leave torch's operations nothing but memory to allocate."""
    m, x = momentum_bn.BatchNorm2d(SHAPE[1], activation="relu"), randn(*SHAPE, dtype=torch.float32).requires_grad_()
    m(x).sum().backward()
    with torch.profiler.profile() as profile:
        m(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    composite = {"aten::mean", "aten::square", "aten::rsqrt", "aten::mul", "aten::sub", "aten::threshold_backward"}
    assert "momentum_bn::_backward" in names or "momentum_bn::_backward_" in names, names
    assert not names & composite, names & composite


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_state_of_any_dtype_and_stride_is_written(dtype):
    m = layer(dtype=dtype)
    oracle = MomentumBatchNormOracle(SHAPE[1], total_iters=10)
    for name in ("running_mean", "running_var", "view_mean_sum", "view_var_sum"):
        values = getattr(m, name)
        setattr(m, name, torch.stack([values, values + 7], 1)[:, 0])
    for step in range(4):
        oracle.read_state(m)
        x = randn(*SHAPE, seed=step, dtype=dtype, shift=step)
        with torch.no_grad():
            m(x)
        oracle.train_forward(x)
        for name in ("running_mean", "running_var", "view_mean_sum", "view_var_sum"):
            value = getattr(m, name)
            assert value.stride() == (2,)
            assert_close(value.double(), getattr(oracle, name), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], msg=name)
        assert int(m.num_batches_tracked) == oracle.num_batches_tracked and m.cur_iter == oracle.cur_iter


def test_counters_are_made_once_per_stream_and_by_each_captured_call(emulation):
    m, x = layer(), randn(*SHAPE, dtype=torch.float32)
    allocations, capturing = (emulation.number(f"emulated_{n}") for n in ("allocations", "stream_is_capturing"))
    other = layer()
    m(x)
    assert allocations.value == 1
    m(x)
    other(x)
    capturing.value = 1
    try:
        other(x)
    finally:
        capturing.value = 0
    assert allocations.value == 1
    ours, theirs = snapshot(m), snapshot(other)
    assert all(same_bits(ours[name], theirs[name]) for name, _ in m.named_buffers())


def test_schedule_moves_a_momentum_of_either_precision():
    for dtype in (torch.float64, torch.float32):
        cur_iter, momentum = torch.tensor(3), torch.tensor(0.9, dtype=dtype)
        torch.ops.momentum_bn._advance_schedule_(cur_iter, momentum, 10, "cosine")
        assert int(cur_iter) == 4
        assert float(momentum) == pytest.approx(cosine_schedule(4, 10))
        for kept in (-1.0, 0.25):
            momentum.fill_(kept)
            torch.ops.momentum_bn._advance_schedule_(cur_iter, momentum, 10, "constant" if kept > 0 else "cosine")
            assert float(momentum) == kept
