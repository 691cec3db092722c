"""Interleaved timing by the device's own clock."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence

import torch

from ..timing import Call

# What the device does before the first timed call: the host gets ahead meanwhile, so its pace is not what is timed.
HEAD_START_CYCLES = 20_000_000


def sets_past_cache(bytes_per_set: int, cache_bytes: int, most_bytes: int) -> int:
    """How many sets of inputs to go through in turn, so that none is still in the cache when its turn comes again.

    Args:
        bytes_per_set: what a call reads and writes.
        cache_bytes: the last cache of the device.
        most_bytes: memory that all sets together may take; at least one is made.
    """
    needed = -(-4 * cache_bytes // bytes_per_set) + 1
    return max(1, min(needed, most_bytes // bytes_per_set))


def in_turn(calls: Sequence[Call]) -> Call:
    """One call that is each of ``calls`` in turn."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def interleaved_device_seconds(calls: dict[str, Call], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Returns the seconds per call that the device took, one value per round, as `interleaved_seconds` does for a CPU.

    In each round every call runs once untimed, then ``repeats`` times between two events.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                call()
                torch.cuda._sleep(HEAD_START_CYCLES)
                start.record()
                for _ in range(repeats):
                    call()
                end.record()
                end.synchronize()
                seconds[name].append(start.elapsed_time(end) / 1e3 / repeats)
    finally:
        gc.enable()
    return seconds


def captured(call: Call, repeats: int) -> Callable[[], None]:
    """A CUDA graph of ``repeats`` calls, one after the other: what is left of small inputs without the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay
