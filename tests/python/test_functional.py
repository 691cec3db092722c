"""functional.momentum_batch_norm against the oracle."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.testing import assert_close

from inputs import randn
from momentum_bn.functional import momentum_batch_norm
from oracle import functional_oracle
from snapshots import same_bits

SHAPES = [(4, 5), (4, 5, 5), (4, 5, 1), (3, 5, 4, 2), (2, 5, 3, 2, 4)]


def test_signature():
    defaults = {n: p.default for n, p in inspect.signature(momentum_batch_norm).parameters.items()}
    empty = inspect.Parameter.empty
    assert defaults == {
        "x": empty, "running_mean": empty, "running_var": empty, "weight": None, "bias": None, "training": False,
        "momentum": 1.0, "eps": 1e-5, "variance": "published",
    }  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variance", ["published", "unbiased", "biased"])
@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_training(shape, variance, momentum):
    x, mean, var = randn(*shape, shift=1), randn(5, seed=1), randn(5, seed=2).abs() + 0.1
    weight, bias = randn(5, seed=3), randn(5, seed=4)
    given = [x, mean, var, weight, bias]
    kept, versions = [t.clone() for t in given], [t._version for t in given]
    for args in [
        (mean, var, weight, bias),
        (mean, var, weight, None),
        (mean, var, None, bias),
        (None, None, weight, bias),
    ]:
        actual = momentum_batch_norm(x, *args, training=True, momentum=momentum, eps=1e-3, variance=variance)
        expected = functional_oracle(x, *args, momentum=momentum, eps=1e-3, variance=variance)
        assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert all(same_bits(t, k) for t, k in zip(given, kept, strict=True)), "pure"
    assert versions == [t._version for t in given]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_evaluation(shape):
    x, mean, var = randn(*shape, dtype=torch.float32), randn(5, dtype=torch.float32), torch.rand(5) + 0.1
    weight, bias = randn(5, seed=3, dtype=torch.float32), randn(5, seed=4, dtype=torch.float32)
    y, b_mean, b_var = momentum_batch_norm(x, mean, var, weight, bias, eps=1e-3)
    assert same_bits(y, torch.nn.functional.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-3))
    assert b_mean.numel() == b_var.numel() == 0


def test_evaluation_without_running_statistics_uses_the_batch():
    x = randn(4, 5, 3)
    y, b_mean, b_var = momentum_batch_norm(x, None, None, variance="biased")
    assert_close(y, functional_oracle(x, None, None, variance="biased")[0], rtol=1e-12, atol=1e-12)
    assert b_mean.numel() == b_var.numel() == 0, "empty in eval"


def test_statistics_are_detached():
    x, weight = randn(4, 5, 3).requires_grad_(), randn(5).requires_grad_()
    y, b_mean, b_var = momentum_batch_norm(x, None, None, weight, training=True)
    assert y.requires_grad and not b_mean.requires_grad and not b_var.requires_grad


def test_gradients():
    shape = (4, 5, 3)
    inputs = [randn(*shape), randn(5, seed=3), randn(5, seed=4)]
    ours, theirs = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    running = randn(5, seed=1), randn(5, seed=2).abs() + 0.1
    g = randn(*shape, seed=7)
    actual = torch.autograd.grad(momentum_batch_norm(ours[0], *running, *ours[1:], True, 0.5)[0], ours, g)
    expected = torch.autograd.grad(functional_oracle(theirs[0], *running, *theirs[1:], momentum=0.5)[0], theirs, g)
    assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_parameters_and_statistics_of_any_stride():
    x = randn(4, 5, 3)
    dense = [randn(5, seed=1), randn(5, seed=2).abs() + 0.1, randn(5, seed=3), randn(5, seed=4)]
    strided = [torch.stack([value, value + 1], dim=1)[:, 0] for value in dense]
    for training in (True, False):
        expected = momentum_batch_norm(x, *dense, training=training, momentum=0.5)
        assert_close(momentum_batch_norm(x, *strided, training=training, momentum=0.5), expected, rtol=0, atol=1e-14)


def test_empty_input():
    for training in (True, False):
        y, _, _ = momentum_batch_norm(torch.empty(0, 5, 3), torch.zeros(5), torch.ones(5), training=training)
        assert y.shape == (0, 5, 3)
