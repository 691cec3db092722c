"""Random layers on random inputs against the oracle: Python's layers, on any device.

tests/cpp/differential_test.cpp has many more in the same time, on the CPU. MOMENTUM_BN_TEST_SEED gives the seed
(printed, so that a failure can be repeated), MOMENTUM_BN_TEST_ITERATIONS the number of layers to try; of both tests.
"""

from __future__ import annotations

import os
import random
import time

import pytest
import torch
from torch.testing import assert_close

from inputs import LAYERS, LAYOUTS, TOLERANCE, as_layout, layer_for, randn, randomise_parameters, suggested_strides
from oracle import MomentumBatchNormOracle

SEED = int(os.environ.get("MOMENTUM_BN_TEST_SEED", time.time_ns() % 10**9))
ITERATIONS = int(os.environ.get("MOMENTUM_BN_TEST_ITERATIONS", 250))


def random_case(rng: random.Random) -> dict:
    dim = rng.choice(list(LAYERS))
    channels = rng.choice([1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 37, 64, 65])
    spatial = {1: rng.choice([[], [1], [channels], [rng.randint(2, 70)]]), 2: [1, 1], 3: [1, 1, 1]}[dim]
    spatial = spatial if dim == 1 else [rng.choice([1, 2, 3, 5, 8, 14, 17]) for _ in spatial]
    dtype = rng.choice([torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16])
    return {
        "shape": [channels, *spatial],
        "dtype": dtype,
        "parameters": rng.choice([dtype, torch.float32]) if dtype in (torch.bfloat16, torch.float16) else dtype,
        "threads": rng.choice([1, 1, 2, 3]),
        "options": {
            "eps": rng.choice([1e-5, 1e-3, 0.1]),
            "momentum": rng.choice([1.0, 0.0, 0.3, None]),
            "affine": rng.random() < 0.8,
            "bias": rng.random() < 0.8,
            "track_running_stats": rng.random() < 0.85,
            "total_iters": rng.choice([1, 2, 5, 100]),
            "views_per_update": rng.choice([1, 2, 2, 3]),
            "schedule": rng.choice(["cosine", "cosine", "constant"]),
            "variance": rng.choice(["published", "unbiased", "biased"]),
            "activation": rng.choice([None, "relu"]),
            "inplace": rng.random() < 0.4,
        },
        "frozen": [name for name in ("weight", "bias") if rng.random() < 0.3],
    }


def random_forward(rng: random.Random, case: dict) -> dict:
    forward = {
        "batch": rng.choice([1, 2, 2, 3, 4, 9, 32]),
        "layout": rng.choice(LAYOUTS),
        "shift": rng.choice([0.0, 0.0, 1.0, -30.0]),
        "scale": rng.choice([1.0, 1.0, 0.1, 20.0]),
        "grad": rng.random() < 0.6,
        "x_grad": rng.random() < 0.7,
        "residual": rng.random() < 0.3,
        "training": rng.random() < 0.85,
        "seed": rng.randrange(10**9),
    }
    if forward["batch"] == 1 and torch.Size(case["shape"][1:]).numel() == 1:
        forward["batch"] = 2
    if case["options"]["inplace"] and forward["layout"] == "expanded":  # refused where memory is taken
        forward["layout"] = "permuted"
    return forward


def check_forward(m: torch.nn.Module, oracle: MomentumBatchNormOracle, case: dict, forward: dict) -> None:
    shape, dtype = [forward["batch"], *case["shape"]], case["dtype"]
    base = randn(*shape, seed=forward["seed"], dtype=dtype, scale=forward["scale"], shift=forward["shift"])
    leaf = as_layout(base.clone(), forward["layout"]).detach().requires_grad_(forward["x_grad"])
    reference = leaf.detach().double().requires_grad_()
    residual = (
        randn(*shape, seed=forward["seed"] + 1, dtype=dtype).requires_grad_(forward["x_grad"])
        if forward["residual"]
        else None
    )
    residual_reference = None if residual is None else residual.detach().double().requires_grad_()
    parameters = {n: getattr(m, n) for n in ("weight", "bias") if getattr(m, n) is not None}
    copies = {n: p.detach().double().requires_grad_() for n, p in parameters.items()}

    m.train(forward["training"])
    if m.track_running_stats:
        oracle.read_state(m)
    run_oracle = oracle.train_forward if forward["training"] else oracle.eval_forward
    expected = run_oracle(reference, copies.get("weight"), copies.get("bias"), residual_reference)
    # What may be overwritten must not be a leaf.
    x = as_layout(leaf * 1, forward["layout"]) if case["options"]["inplace"] else leaf
    strides = x.stride()
    with torch.set_grad_enabled(forward["grad"]):
        y = m(x, residual)
    assert y.dtype == dtype and y.shape == x.shape
    assert y.stride() == (strides if y.data_ptr() == x.data_ptr() else suggested_strides(x))
    tolerance = 2 * TOLERANCE[dtype] * max(1.0, expected.detach().abs().max().item() / 4)
    # eval goes through running statistics in the input's own precision, as torch's BatchNorm does
    reach = 1.0 + abs(forward["shift"]) + 3 * forward["scale"] if not forward["training"] else 1.0
    tolerance *= reach
    # Of equal values the oracle's own mean is off by its rounding, which 1 / sqrt(eps) enlarges.
    rounding = 4 * torch.finfo(torch.float64).eps * reference.detach().abs().max().item()
    tolerance += rounding / case["options"]["eps"] ** 0.5
    assert_close(y.detach().double(), expected.detach(), rtol=tolerance, atol=tolerance)
    if m.track_running_stats:
        check_state(m, oracle, abs(forward["shift"]) + forward["scale"])
    if forward["grad"] and y.requires_grad:
        check_gradients(y, expected, forward, tolerance, {
            **{n: (p, copies[n]) for n, p in parameters.items() if p.requires_grad},
            **({"x": (leaf, reference)} if forward["x_grad"] else {}),
            **({"residual": (residual, residual_reference)} if forward["x_grad"] and residual is not None else {}),
        })  # fmt: skip


def check_state(m: torch.nn.Module, oracle: MomentumBatchNormOracle, magnitude: float) -> None:
    tolerance = TOLERANCE[m.running_mean.dtype]
    for name in ("running_mean", "running_var", "view_mean_sum", "view_var_sum"):
        expected = getattr(oracle, name)
        atol = tolerance * max(magnitude, expected.abs().max().item())
        assert_close(
            getattr(m, name).double(), expected, rtol=tolerance, atol=atol, msg=lambda t, name=name: f"{name}: {t}"
        )
    assert int(m.num_batches_tracked) == oracle.num_batches_tracked
    assert int(m.view_count) == oracle.view_count and m.cur_iter == oracle.cur_iter
    assert m.momentum == (oracle.momentum if oracle.momentum is None else pytest.approx(oracle.momentum, abs=1e-15))


def check_gradients(y, expected, forward, tolerance, pairs) -> None:
    g = randn(*y.shape, seed=forward["seed"] + 2, dtype=y.dtype)
    # Where rounding may have put the output on the other side of ReLU's kink, the mask is chance.
    g = torch.where(expected.detach().abs() <= 4 * tolerance, torch.zeros_like(g), g)
    actual = torch.autograd.grad(y, [ours for ours, _ in pairs.values()], g)
    reference = torch.autograd.grad(expected, [theirs for _, theirs in pairs.values()], g.double())
    for name, ours, theirs in zip(pairs, actual, reference, strict=True):
        terms = 1 if name in ("x", "residual") else y.numel() / y.size(1)
        atol = 2 * tolerance * max(1.0, theirs.abs().max().item(), terms**0.5)
        assert_close(
            ours.double(), theirs, rtol=2 * tolerance, atol=atol, msg=lambda t, name=name: f"gradient of {name}: {t}"
        )


@pytest.mark.usefixtures("restore_threads")
def test_random_layers_equal_the_oracle():
    print(f"MOMENTUM_BN_TEST_SEED={SEED} MOMENTUM_BN_TEST_ITERATIONS={ITERATIONS}")
    for iteration in range(ITERATIONS):
        rng = random.Random(SEED + iteration)
        case = random_case(rng)
        torch.set_num_threads(case["threads"])
        x = torch.empty([2, *case["shape"]])
        m = layer_for(x)(case["shape"][0], dtype=case["parameters"], **case["options"])
        if m.affine:
            randomise_parameters(m, seed=iteration)
            for name in case["frozen"]:
                if getattr(m, name) is not None:
                    getattr(m, name).requires_grad_(False)
        known = {n: v for n, v in case["options"].items() if n not in ("affine", "bias", "inplace")}
        oracle = MomentumBatchNormOracle(case["shape"][0], **known)
        for number in range(rng.randint(1, 5)):
            forward = random_forward(rng, case)
            try:
                check_forward(m, oracle, case, forward)
            except Exception as error:
                raise AssertionError(
                    f"MOMENTUM_BN_TEST_SEED={SEED + iteration} MOMENTUM_BN_TEST_ITERATIONS=1 repeats this: "
                    f"forward {number} {forward} of {case}: {error}"
                ) from error
