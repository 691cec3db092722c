"""Measures everything in this process, with the allocator that its environment chose, for ``python -m benchmarks``.

Writes a file of one run; tells on standard error how far it is.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

import torch

from . import allocators
from .machine import machine
from .plan import workloads
from .results import Run, write_runs
from .workload import time_workload


def measure(allocator: str, only: str, quick: bool, rounds: int) -> Run:
    """Times all workloads of the plan."""
    torch.manual_seed(0)
    run = Run(allocator, allocators.describe(), machine(), rounds, [])
    for make in workloads(only, quick):
        start = time.perf_counter()
        section = time_workload(make(), rounds)
        run.sections.append(section)
        gc.collect()  # compiled calls hold large tensors in cycles
        took = f"{time.perf_counter() - start:.1f} s"
        print(f"[{allocator}] {section.case}, {section.phase}: {took}", file=sys.stderr, flush=True)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allocator", required=True, help="its name, for the report")
    parser.add_argument("--only", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    write_runs(options.out, [measure(options.allocator, options.only, options.quick, options.rounds)])


if __name__ == "__main__":
    main()
