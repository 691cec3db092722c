"""The workloads: names, what peers compute, values after many calls."""

from __future__ import annotations

import pytest
import torch

import momentum_bn
from benchmarks import names
from benchmarks.budgets import BUDGETS
from benchmarks.cases import FAR_BEYOND_CACHES, HEAD, LARGE_CASES, SMALL_CASES, SMALLEST, STAGE_2_BFLOAT16, Case
from benchmarks.layer_workloads import forward_workload, student_workload, training_workload
from benchmarks.network_workload import (
    BATCH_NORMS,
    network_name,
    network_workload,
    networks,
    step_workload,
    student_network_workload,
)
from benchmarks.peers import PublishedBatchNorm, published_formulas
from benchmarks.plan import workloads
from benchmarks.workload import Workload, kept_bytes, time_workload


def tiny_network(channels_last: bool) -> Workload:
    return network_workload(channels_last, blocks=(1, 1), width=4, batch=2, side=32)


def tiny_student(channels_last: bool) -> Workload:
    return student_network_workload(channels_last, blocks=(1, 1), width=4, batch=2, side=32)


def tiny_step(channels_last: bool) -> Workload:
    return step_workload(channels_last, blocks=(1, 1), width=4, batch=2, side=32)


TINY_CASES = [
    Case((2, 16, 2, 2)),
    Case((4, 3, 5, 5), True),
    Case((8, 5)),
    Case((2, 16, 4, 4), False, torch.bfloat16),
    Case((2, 16, 4, 4), True, torch.bfloat16),
]


def test_case_names() -> None:
    assert STAGE_2_BFLOAT16[1].name == "bf16 256x56x56 NHWC"
    assert FAR_BEYOND_CACHES.name == "256x56x56 NCHW batch 128"
    assert HEAD.name == "(256, 4096)"
    every = [case.name for case in LARGE_CASES + SMALL_CASES]
    assert len(set(every)) == len(every)


def test_case_makes_what_its_name_says() -> None:
    x = STAGE_2_BFLOAT16[1].make()
    assert x.shape == (32, 256, 56, 56)
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_plan_selects_by_name() -> None:
    assert len(list(workloads(only=SMALLEST.name, quick=True))) == 3
    assert len(list(workloads(only="ResNet", quick=False))) == 6
    assert len(list(workloads(only="", quick=False))) == 3 * len(LARGE_CASES + SMALL_CASES) + 6
    assert not list(workloads(only="no such case", quick=False))


def test_budgets_refer_to_what_is_timed() -> None:
    every = (forward_workload, training_workload, student_workload)
    timed = {
        (case.name, workload.phase): {*workload.calls}
        for workload in (make(SMALLEST, True) for make in every)
        for case in LARGE_CASES + SMALL_CASES
    }
    timed |= {(network_name(last), names.FORWARD): {*tiny_network(last).calls} for last in (False, True)}
    timed |= {(network_name(last), names.STUDENT): {*tiny_student(last).calls} for last in (False, True)}
    timed |= {(network_name(last), names.STEP): {*tiny_step(last).calls} for last in (False, True)}
    for budget in BUDGETS:
        for case in budget.cases:
            assert {*budget.calls, budget.unit} - {None} <= timed[case, budget.phase], budget.what


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("make", [forward_workload, training_workload])
def test_many_calls_leave_ordinary_values(make: object, case: Case) -> None:
    section = time_workload(make(case, False), rounds=20, seconds_per_call=1e-4)  # type: ignore[operator]
    assert section.unit == names.COPY
    assert {names.COPY, names.TORCH, names.PUBLISHED} <= set(section.seconds)


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: case.name)
def test_student_calls_leave_ordinary_values(case: Case) -> None:
    section = time_workload(student_workload(case, False), rounds=20, seconds_per_call=1e-4)
    assert {names.BATCH_NORM_RELU, names.TORCH_RELU, names.BATCH_NORM_BACKWARD_RESIDUAL_RELU} <= set(section.seconds)
    size = case.make().nbytes
    # Beside x, and where there is a residual y, only values per channel.
    assert size <= section.kept[names.BATCH_NORM_RELU] < 2 * size + 1024
    assert section.kept[names.BATCH_NORM_RESIDUAL_RELU] <= 2 * size + 1024


def test_kept_bytes() -> None:
    x, weight = torch.rand(10, requires_grad=True), torch.nn.Parameter(torch.rand(10))
    assert kept_bytes(lambda: (x * weight).exp()) == 2 * x.nbytes
    assert kept_bytes(lambda: x.sum()) == 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_students_differ_in_their_norms_implementation_alone(channels_last: bool) -> None:
    models = networks(channels_last, blocks=(2, 1), width=4, norms=BATCH_NORMS)
    x = torch.randn(4, 3, 32, 32)
    gradients = []
    for model in models.values():
        model.zero_grad()
        model(x).square().mean().backward()
        gradients.append(model.conv.weight.grad.clone())
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-4)
    section = time_workload(tiny_student(channels_last), 1, 0.0)
    assert set(section.seconds) == set(BATCH_NORMS) == set(section.kept)


@pytest.mark.parametrize("make", [forward_workload, training_workload])
def test_compiled_peers_are_there_or_reported(make: object) -> None:
    workload = make(SMALLEST, True)  # type: ignore[operator]
    assert {names.TORCH_COMPILED, names.PUBLISHED_COMPILED} == workload.may_fail <= set(workload.calls)


def test_published_layer_is_ours() -> None:
    ours = momentum_bn.MomentumBatchNorm2d(5, total_iters=4).double()
    published = PublishedBatchNorm(5, total_iters=4).double()
    for _ in range(6):
        x = torch.randn(4, 5, 3, 3, dtype=torch.float64) * 3 + 1
        torch.testing.assert_close(ours(x), published(x))
    torch.testing.assert_close(ours.running_var, published.running_var)


def test_published_formulas_are_ours() -> None:
    x, weight, bias, mean, var = torch.randn(4, 5, 3, 3), *torch.randn(3, 5), torch.rand(5)
    y = momentum_bn.functional.momentum_batch_norm(x, mean, var, weight, bias, training=True, momentum=0.5)[0]
    torch.testing.assert_close(published_formulas(x, weight, bias, mean, var), y)


@pytest.mark.parametrize("channels_last", [False, True])
def test_networks_differ_in_their_norm_alone(channels_last: bool) -> None:
    models = networks(channels_last, blocks=(2, 1), width=4)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        y = {name: model(x) for name, model in models.items()}
        torch.testing.assert_close(y[names.OURS], y[names.PUBLISHED], rtol=1e-4, atol=1e-5)
        # The variance of torch's BatchNorm is the biased one.
        torch.testing.assert_close(y[names.OURS], y[names.TORCH], rtol=0.1, atol=0.1)
        assert not torch.allclose(y[names.OURS], y[names.IDENTITY], rtol=0.1, atol=0.1)
    weights = [model.layers[0].conv2.weight for model in models.values()]
    assert all(weight is weights[0] for weight in weights)
    assert weights[0].is_contiguous(memory_format=torch.channels_last) == channels_last


def test_network_is_resnet_50() -> None:
    with torch.device("meta"):
        model = networks(False, (3, 4, 6, 3), 64)[names.TORCH]
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032


@pytest.mark.parametrize("channels_last", [False, True])
def test_network_workload(channels_last: bool) -> None:
    section = time_workload(tiny_network(channels_last), 1, 0.0)
    assert set(section.seconds) == {names.IDENTITY, names.OURS, names.TORCH, names.PUBLISHED, names.AS_MADE}


@pytest.mark.parametrize("channels_last", [False, True])
def test_step_workload(channels_last: bool) -> None:
    """Ours is fused in both networks."""
    workload = tiny_step(channels_last)
    assert time_workload(workload, 1, 0.0).seconds.keys() == workload.calls.keys()
    student, teacher = workload.calls[names.AS_MADE].args  # type: ignore[attr-defined]
    layers = [module for module in student.modules() if isinstance(module, momentum_bn.BatchNorm2d)]
    assert len(layers) == len(momentum_bn.fused_layers(student)) == 9
    assert len(teacher.fused) == 9
