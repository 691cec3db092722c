"""What is timed, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from .cases import LARGE_CASES, QUICK_CASES, SMALL_CASES
from .layer_workloads import forward_workload, student_workload, training_workload
from .network_workload import network_name, network_workload, step_workload, student_network_workload
from .workload import Workload


def workloads(only: str, quick: bool) -> Iterator[Callable[[], Workload]]:
    """Yields functions that set workloads up: each is large, and dropped before the next one.

    Args:
        only: cases whose name contains this.
        quick: few cases, and no torch.compile.
    """
    for case in QUICK_CASES if quick else LARGE_CASES + SMALL_CASES:
        if only in case.name:
            # Of small inputs the calls matter, which no compiler shortens; compiling takes minutes.
            compiled = not quick and case not in SMALL_CASES
            yield partial(forward_workload, case, compiled)
            yield partial(training_workload, case, compiled)
            yield partial(student_workload, case, compiled)
    for channels_last in (False,) if quick else (False, True):
        if only in network_name(channels_last):
            yield partial(network_workload, channels_last)
            yield partial(student_network_workload, channels_last)
            yield partial(step_workload, channels_last)
