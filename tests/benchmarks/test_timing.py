"""Calls are interleaved, and failures and bad values are told."""

from __future__ import annotations

import pytest
import torch

from benchmarks.timing import interleaved_seconds
from benchmarks.workload import Workload, check_ordinary, time_workload


def test_each_round_times_every_call_once() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = interleaved_seconds(calls, rounds=3, seconds_per_call=0.0)
    # Once each untimed and once to see how long it takes, then the rounds.
    assert "".join(order) == "aabbcc" + 3 * "abc"
    assert list(seconds) == ["a", "b", "c"]
    assert all(len(values) == 3 and min(values) > 0 for values in seconds.values())


def test_short_calls_are_repeated() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    interleaved_seconds({"short": call}, rounds=1, seconds_per_call=0.01)
    assert count > 10


def _workload(**changes: object) -> Workload:
    fields = {"case": "case", "phase": "phase", "unit": "copy_", "with_grad": False, "calls": {"copy_": lambda: None}}
    return Workload(**(fields | changes))  # type: ignore[arg-type]


def _fail() -> None:
    raise RuntimeError("no compiler\nand more")


def test_a_call_that_may_fail_is_reported() -> None:
    workload = _workload(calls={"copy_": lambda: None, "compiled": _fail}, may_fail={"compiled"})
    section = time_workload(workload, 2, 0.0)
    assert list(section.seconds) == ["copy_"]
    assert section.absent == {"compiled": "RuntimeError: no compiler"}


def test_any_other_failure_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no compiler"):
        time_workload(_workload(calls={"ours": _fail}), 1)


@pytest.mark.parametrize("with_grad", [False, True])
def test_gradients_as_the_workload_says(with_grad: bool) -> None:
    seen: list[bool] = []
    calls = {"copy_": lambda: seen.append(torch.is_grad_enabled())}
    time_workload(_workload(with_grad=with_grad, calls=calls), 1, 0.0)
    assert set(seen) == {with_grad}


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e-40])
def test_values_that_are_not_ordinary(value: float) -> None:
    check_ordinary(torch.tensor([0.0, 1.0]), "case")
    with pytest.raises(ArithmeticError, match="case"):
        check_ordinary(torch.tensor([0.0, value]), "case")
    with pytest.raises(ArithmeticError):
        time_workload(_workload(written=lambda: [torch.tensor(value)]), 1, 0.0)
