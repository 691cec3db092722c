"""Interleaved timing in one process, and what it was measured on."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

Call = Callable[[], object]


def interleaved_medians(calls: dict[str, Call], rounds: int, seconds_per_call: float) -> dict[str, float]:
    """Returns the median seconds of each call.

    In each round every call is timed once, one after the other, so that whatever slows the machine slows all of them. A
    short call is repeated within a round until ``seconds_per_call`` have passed.
    """
    repeats = {name: _repeats(call, seconds_per_call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # brings code and data back after the other calls
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


def _repeats(call: Call, seconds: float) -> int:
    call()
    start = time.perf_counter()
    call()
    return max(1, int(seconds / max(time.perf_counter() - start, 1e-7)))


def machine() -> dict[str, str]:
    """Returns processor, threads, torch and allocator by name."""
    return {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "allocator": allocator(),
    }


def allocator() -> str:
    """Returns the name of the memory allocator and how it was tuned."""
    preloaded = [Path(name).name for name in os.environ.get("LD_PRELOAD", "").split(":") if name]
    tuned = [
        f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(("MALLOC_", "GLIBC_", "THP_"))
    ]
    return " ".join([preloaded[0] if preloaded else "malloc of " + " ".join(platform.libc_ver()), *tuned])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
