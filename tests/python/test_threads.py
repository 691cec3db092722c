"""Layers called from several threads at once: what docs/state.md promises of them."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import momentum_bn
from inputs import randn, randomise_parameters
from snapshots import assert_same, same_bits, snapshot, unchanged

pytestmark = pytest.mark.cpu_only
THREADS = 4
STEPS = 40
SHAPE = (6, 8, 9, 9)

LAYERS = {
    "MomentumBatchNorm2d": lambda: momentum_bn.MomentumBatchNorm2d(8, total_iters=15, activation="relu"),
    "BatchNorm2d": lambda: momentum_bn.BatchNorm2d(8, activation="relu"),
}


@pytest.fixture(params=LAYERS)
def build(request):
    return lambda: randomise_parameters(LAYERS[request.param]())


def batch(seed):
    return randn(*SHAPE, seed=seed, dtype=torch.float32)


def at_once(*calls):
    """Runs each in a thread of its own, all of them beginning together; returns what they return."""
    start = threading.Barrier(len(calls))

    def run(call):
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, call) for call in calls]]


def train(layer, seed):
    """Steps with gradients; returns outputs and gradients of all."""
    results = []
    for step in range(STEPS):
        x, residual = (batch(100 * seed + 2 * step + i).requires_grad_() for i in range(2))
        y = layer(x, residual)
        results += [y, *torch.autograd.grad(y.square().sum(), (x, residual, layer.weight, layer.bias))]
    return results


def assert_all_same(actual, expected):
    assert len(actual) == len(expected)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


def test_layers_of_different_threads_are_independent(build):
    alone = [build() for _ in range(THREADS)]
    expected = [train(layer, seed) for seed, layer in enumerate(alone)]
    together = [build() for _ in range(THREADS)]
    results = at_once(*(lambda s=seed, m=layer: train(m, s) for seed, layer in enumerate(together)))
    for layer, result, other, other_result in zip(together, results, alone, expected, strict=True):
        assert_all_same(result, other_result)
        assert_same(snapshot(layer), snapshot(other))


def test_one_layer_is_evaluated_by_several_threads(build):
    layer = build()
    train(layer, 0)
    layer.eval()
    expected = [train(layer, seed) for seed in range(THREADS)]
    with unchanged(layer):
        for result, alone in zip(
            at_once(*(lambda s=seed: train(layer, s) for seed in range(THREADS))), expected, strict=True
        ):
            assert_all_same(result, alone)


def test_evaluation_beside_copies_and_state_dicts(build):
    layer = build()
    train(layer, 0)
    layer.eval()
    x = batch(1)
    expected, state = layer(x), snapshot(layer)

    def evaluate():
        assert all(same_bits(layer(x), expected) for _ in range(10 * STEPS))

    def read(copied):
        for _ in range(STEPS):
            assert_same(snapshot(copied()), state)

    at_once(evaluate, evaluate, lambda: read(lambda: copy.deepcopy(layer)), lambda: read(lambda: layer))


def test_under_a_lock_one_layer_is_trained_by_several_threads_and_copied(build):
    # All with the same batch: the order of the threads does not matter then.
    x = batch(1)
    alone = build()
    states = [snapshot(alone)]
    for _ in range(THREADS * STEPS):
        alone(x)
        states.append(snapshot(alone))

    layer, lock = build(), threading.Lock()

    def forward():
        for _ in range(STEPS):
            with lock:
                layer(x)

    def read():
        for _ in range(STEPS):
            with lock:
                copied = copy.deepcopy(layer)
            taken = snapshot(copied)
            assert_same(taken, states[int(taken["num_batches_tracked"])])

    at_once(*[forward] * THREADS, read)
    assert_same(snapshot(layer), states[-1])


def test_training_one_layer_from_several_threads_without_a_lock_breaks_nothing_else(build):
    layer, neighbour = build(), build()
    alone = build()
    expected = train(alone, 7)

    def forward(seed):
        for step in range(5 * STEPS):
            x = batch(seed + step)
            before = x.clone()
            assert layer(x).isfinite().all()
            assert same_bits(x, before)

    def read():
        for _ in range(STEPS):
            taken = copy.deepcopy(layer)
            assert all(value.isfinite().all() for value in taken.state_dict().values())
            taken(batch(1))
            build().load_state_dict(layer.state_dict())

    calls = [lambda s=1000 * seed: forward(s) for seed in range(THREADS - 1)]
    *_, beside = at_once(*calls, read, lambda: train(neighbour, 7))
    assert_all_same(beside, expected)
    assert_same(snapshot(neighbour), snapshot(alone))
    # Counts may be wrong, by no more than was counted; made anew, the layer is as any other.
    assert 0 < layer.num_batches_tracked <= 5 * STEPS * (THREADS - 1)
    layer.reset_running_stats()
    x = batch(1)
    assert same_bits(layer(x), build()(x))
