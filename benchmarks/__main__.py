"""Times the layer beside its peers, in multiples of a warm copy of the same tensor in the same process.

Everything is measured twice, in one process per memory allocator: the one of this environment, and a tuned one.
Prints tables and writes them as benchmark.txt, benchmark.json and benchmark.png; a partial run's are named partial.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import allocators
from .chart import draw_chart
from .plan import workloads
from .report import report
from .results import Run, read_runs, write_runs

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="few cases and rounds, no torch.compile: 2 minutes")
    parser.add_argument("--rounds", type=_positive, help="timings of each call (7; with --quick 3)")
    parser.add_argument(
        "--tuned", choices=(*allocators.TUNED, "none"), default=allocators.TUNED_GLIBC, help="the second allocator"
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs/benchmarks", help="folder of the results")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 7)
    if not any(workloads(options.only, options.quick)):
        raise SystemExit(f"no case has a name with {options.only!r}" + (" among the quick ones" * options.quick))

    runs = []
    for allocator in (allocators.DEFAULT, options.tuned):
        if allocator == "none":
            continue
        variables = allocators.environment(allocator)
        if variables is None:
            print(f"Not measured: {allocator} is not installed on this machine.", file=sys.stderr)
            continue
        runs.append(_measure_in_a_process(allocator, variables, options.only, options.quick, rounds))

    stem = options.out / ("partial" if options.quick or options.only else "benchmark")
    tables = report(runs)
    print(tables)
    write_runs(stem.with_suffix(".json"), runs)
    stem.with_suffix(".txt").write_text(tables)
    draw_chart(runs, stem.with_suffix(".png"))
    print("Written:", *(stem.with_suffix(suffix) for suffix in (".txt", ".json", ".png")))


def _measure_in_a_process(allocator: str, variables: dict[str, str], only: str, quick: bool, rounds: int) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        words = ["--allocator", allocator, "--only", only, "--rounds", str(rounds), "--out", str(out)]
        command = [sys.executable, "-m", "benchmarks.measure", *words, *(["--quick"] if quick else [])]
        finished = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **variables}, check=False)
        if finished.returncode != 0:
            raise SystemExit(f"measuring with the {allocator} allocator failed")
        return read_runs(out)[0]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 (got {value})")
    return value


if __name__ == "__main__":
    main()
