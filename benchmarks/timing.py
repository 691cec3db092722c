"""Interleaved timing in one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

Call = Callable[[], object]


def interleaved_seconds(calls: dict[str, Call], rounds: int, seconds_per_call: float) -> dict[str, list[float]]:
    """Returns the seconds that each call took, one value per round.

    In each round every call is timed once, one after the other, so that whatever slows the machine slows all of them. A
    short call is repeated within a round until ``seconds_per_call`` have passed, and runs once untimed before: that
    brings code and data back into the caches after the other calls.
    """
    repeats = {name: _repeats(call, seconds_per_call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                if repeats[name] > 1:
                    call()
                seconds[name].append(_timed(call, repeats[name]))
    finally:
        gc.enable()
    return seconds


def _timed(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _repeats(call: Call, seconds: float) -> int:
    call()  # what is done but once, such as starting threads, must not count
    return max(1, int(seconds / max(_timed(call, 1), 1e-7)))
