"""Times the layer on a GPU beside its peers and a copy of the same tensor, all in one process.

A ResNet-50 teacher's forward; the shapes of a ResNet-50 in training mode, forward, backward alone and both; small
tensors in CUDA graphs. Prints each table when it is measured, and writes all so far: benchmark.txt and benchmark.json.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from .. import names
from ..cases import Case
from ..network_workload import network_name, network_workload
from ..results import Section
from ..workload import drop_failing
from .cases import BATCHES, LARGE_CASES, QUICK_CASES, SMALL_CASES, bytes_of, tensors_moved, tensors_read_again
from .machine import gpu_machine
from .paths import path_of
from .report import Timings, heading, table, write
from .timing import captured, interleaved_device_seconds, sets_past_cache
from .workloads import backward_calls, forward_calls, small_calls, training_calls

REPOSITORY = Path(__file__).resolve().parents[2]
LARGE_REPEATS, GRAPH_REPEATS = 10, 100
# What a call reads and writes; and what is kept for it, of all layers where their forward passes are done before.
TENSORS_PER_SET = 3
TENSORS_KEPT = {names.FORWARD: 3, names.TRAINING: 3, names.BACKWARD: 10}
MAKE_CALLS = {names.FORWARD: forward_calls, names.BACKWARD: backward_calls, names.TRAINING: training_calls}
IN_A_GRAPH = "forward in a CUDA graph"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="one batch size, few rounds, no torch.compile")
    parser.add_argument("--rounds", type=int, help="timings of each call (11; with --quick 5)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no other case is begun")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs/gpu", help="folder of the results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here: nothing to time")
    rounds = options.rounds or (5 if options.quick else 11)
    torch.manual_seed(0)
    began = time.perf_counter()
    measure_all(list(plan(options.only, options.quick, rounds)), options.out, rounds, began + options.seconds)


def measure_all(measures: Sequence[Callable[[], Timings]], out: Path, rounds: int, deadline: float) -> None:
    """Measures one after the other, and writes after each: what cuts this short leaves what was measured so far."""
    about = gpu_machine()
    timings: list[Timings] = []
    out.mkdir(parents=True, exist_ok=True)
    with torch.device("cuda"), (out / "benchmark.txt").open("w") as tables:
        _print_to(tables, heading(about, rounds))
        for measure in measures:
            if time.perf_counter() > deadline:
                _print_to(tables, f"no time left for {len(measures) - len(timings)} of {len(measures)} tables")
                break
            start = time.perf_counter()
            timings.append(measure())
            gc.collect()
            torch.cuda.empty_cache()
            _print_to(tables, table(timings[-1]))
            print(f"  ({time.perf_counter() - start:.1f} s)", flush=True)
            write(out / "benchmark.json", about, rounds, timings)
    print("Written:", out / "benchmark.txt", out / "benchmark.json")


def _print_to(file: TextIO, text: str) -> None:
    for stream in (sys.stdout, file):
        print("\n" + text, file=stream, flush=True)


def plan(only: str, quick: bool, rounds: int) -> Iterator[Callable[[], Timings]]:
    """Yields functions that make tensors, time what is done with them, and drop them."""
    for channels_last in (False, True):
        for autocast in (False, True):
            if only in network_name(channels_last):
                yield partial(measure_network, channels_last, autocast, rounds)
    for case in QUICK_CASES if quick else LARGE_CASES:
        if only in case.name:
            # Compiling takes seconds per case: for the largest batch alone.
            compiled = not quick and case.shape[0] == BATCHES[-1]
            yield partial(measure_large, case, names.FORWARD, compiled, rounds)
            yield partial(measure_large, case, names.BACKWARD, compiled, rounds)
            if not quick:
                yield partial(measure_large, case, names.TRAINING, compiled, rounds)
    for case in SMALL_CASES:
        if only in case.name:
            yield partial(measure_small, case, not quick, rounds)


def measure_large(case: Case, phase: str, compiled: bool, rounds: int) -> Timings:
    cache = torch.cuda.get_device_properties().L2_cache_size
    free = torch.cuda.mem_get_info()[0] // 2
    most_bytes = free * TENSORS_PER_SET // TENSORS_KEPT[phase]
    sets = sets_past_cache(TENSORS_PER_SET * bytes_of(case), cache, most_bytes)
    with torch.set_grad_enabled(phase != names.FORWARD):
        calls = MAKE_CALLS[phase](case, sets, compiled)
        absent = drop_failing(calls, calls.keys() & {names.PUBLISHED_COMPILED})
        paths = {name: path_of(call) for name, call in calls.items()}
        seconds = interleaved_device_seconds(calls, rounds, LARGE_REPEATS)
    return Timings(
        Section(case.name, phase, names.COPY, seconds, absent),
        {name: tensors_moved(name, phase) * bytes_of(case) for name in seconds},
        {name: tensors_read_again(name, phase) * bytes_of(case) for name in seconds},
        paths,
    )


def measure_small(case: Case, compiled: bool, rounds: int) -> Timings:
    with torch.no_grad():
        calls = small_calls(case, compiled)
        absent = drop_failing(calls, calls.keys() & {names.PUBLISHED_COMPILED})
        graphs = {name: captured(call, GRAPH_REPEATS) for name, call in calls.items()}
        seconds = interleaved_device_seconds(graphs, rounds, 1)
    per_call = {name: [value / GRAPH_REPEATS for value in values] for name, values in seconds.items()}
    return Timings(Section(case.name, IN_A_GRAPH, names.COPY, per_call, absent), {})


def measure_network(channels_last: bool, autocast: bool, rounds: int) -> Timings:
    workload = network_workload(channels_last, batch=64, side=224)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        seconds = interleaved_device_seconds(workload.calls, rounds, 3)
    case = f"{workload.case} batch 64, {'autocast to bf16' if autocast else 'float32'}"
    return Timings(Section(case, workload.phase, workload.unit, seconds), {})


if __name__ == "__main__":
    main()
