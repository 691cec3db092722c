"""Times the layer on a GPU beside its peers and a copy of the same tensor, all in one process.

The shapes of a ResNet-50 in training mode, forward and with backward; small tensors in CUDA graphs; a ResNet-50
teacher's forward. Prints tables and writes them as benchmark.txt and benchmark.json.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from .. import names
from ..cases import Case
from ..network_workload import network_name, network_workload
from ..results import Section
from ..workload import drop_failing
from .cases import BATCHES, LARGE_CASES, QUICK_CASES, SMALL_CASES, bytes_of, tensors_moved
from .machine import gpu_machine
from .report import Timings, report, write
from .timing import captured, interleaved_device_seconds, sets_past_cache
from .workloads import forward_calls, small_calls, training_calls

REPOSITORY = Path(__file__).resolve().parents[2]
LARGE_REPEATS, GRAPH_REPEATS = 10, 100
TENSORS_PER_SET = 3
IN_A_GRAPH = "forward in a CUDA graph"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="few cases and rounds, no torch.compile of large ones")
    parser.add_argument("--rounds", type=int, help="timings of each call (11; with --quick 5)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs/gpu", help="folder of the results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here: nothing to time")
    rounds = options.rounds or (5 if options.quick else 11)
    torch.manual_seed(0)
    timings = []
    with torch.device("cuda"):
        for measure in plan(options.only, options.quick, rounds):
            start = time.perf_counter()
            timings.append(measure())
            gc.collect()
            torch.cuda.empty_cache()
            section = timings[-1].section
            took = f"{section.case}, {section.phase}: {time.perf_counter() - start:.1f} s"
            print(took, file=sys.stderr, flush=True)
    about = gpu_machine()
    tables = report(about, rounds, timings)
    print(tables)
    write(options.out / "benchmark.json", about, rounds, timings)
    (options.out / "benchmark.txt").write_text(tables)
    print("Written:", options.out / "benchmark.txt", options.out / "benchmark.json")


def plan(only: str, quick: bool, rounds: int) -> Iterator[Callable[[], Timings]]:
    """Yields functions that make tensors, time what is done with them, and drop them."""
    for case in QUICK_CASES if quick else LARGE_CASES:
        if only in case.name:
            # Compiling takes seconds per case: for the largest batch alone.
            compiled = not quick and case.shape[0] == BATCHES[-1]
            yield partial(measure_large, case, names.FORWARD, compiled, rounds)
            yield partial(measure_large, case, names.TRAINING, compiled, rounds)
    for case in SMALL_CASES:
        if only in case.name:
            yield partial(measure_small, case, rounds)
    for channels_last in (False, True):
        for autocast in (False, True):
            if only in network_name(channels_last):
                yield partial(measure_network, channels_last, autocast, rounds)


def measure_large(case: Case, phase: str, compiled: bool, rounds: int) -> Timings:
    cache = torch.cuda.get_device_properties().L2_cache_size
    free = torch.cuda.mem_get_info()[0] // 2
    sets = sets_past_cache(TENSORS_PER_SET * bytes_of(case), cache, free)
    make = forward_calls if phase == names.FORWARD else training_calls
    with torch.set_grad_enabled(phase == names.TRAINING):
        calls = make(case, sets, compiled)
        absent = drop_failing(calls, calls.keys() & {names.PUBLISHED_COMPILED})
        seconds = interleaved_device_seconds(calls, rounds, LARGE_REPEATS)
    moved = {name: tensors_moved(name, phase) * bytes_of(case) for name in seconds}
    return Timings(Section(case.name, phase, names.COPY, seconds, absent), moved)


def measure_small(case: Case, rounds: int) -> Timings:
    with torch.no_grad():
        calls = small_calls(case)
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
