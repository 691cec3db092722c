"""Prints the share of the lines that tests ran through, by folder: python -m tests.coverage BUILD.

BUILD is a build of the CMake preset `coverage` whose programs and library the tests have used; it also holds what
coverage.py recorded. With --lines, the lines are named that no test ran through. Processes that end without exit
handlers are not counted: ranks that tests fork, and what is killed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

# What is not counted, and why. Every other source of the library and the trainer must have been measured.
EXCLUDED = {
    "src/kernels/cuda/": "needs nvcc; cuda_kernels_test runs the kernels over emulated threads",
    "src/ops/cuda/": "needs CUDA's runtime and a GPU",
    "src/ops/normalise/cuda.cpp": "the same; tests/python/test_emulated_cuda.py runs it over emulated kernels",
    "src/ops/teacher/cuda.cpp": "the same",
    "apps/m2teacher/benchmark/python_interface.cpp": "for `python -m benchmarks.trainer` alone",
}
COUNTED = ("include", "src", "apps/m2teacher")


class File(NamedTuple):
    """A measured source."""

    name: str
    lines: int
    missed: list[int]


def of_cpp(build: Path) -> Iterator[File]:
    """What gcov's counters say. A line of a template counts as run if any instance of it ran."""
    command = [sys.executable, "-m", "gcovr", "--root", ROOT, "--json", "--gcov-ignore-parse-errors=all", "-j", "2"]
    filters = [argument for folder in COUNTED for argument in ("--filter", f"{ROOT / folder}/")]
    excluded = [argument for name in EXCLUDED for argument in ("--exclude", f"{ROOT / name}")]
    found = subprocess.run([*command, *filters, *excluded, build], cwd=ROOT, check=True, capture_output=True).stdout
    for file in json.loads(found)["files"]:
        counts: dict[int, int] = defaultdict(int)
        for line in file["lines"]:
            if not line.get("gcovr/excluded") and not line.get("gcovr/noncode"):
                counts[line["line_number"]] += line["count"]
        yield File(file["file"], len(counts), [number for number, count in counts.items() if count == 0])


def of_python(build: Path) -> Iterator[File]:
    """What coverage.py recorded in BUILD."""
    report = build / "python.json"
    data = f"--data-file={build / 'python.coverage'}"
    subprocess.run([sys.executable, "-m", "coverage", "json", "--quiet", data, "-o", report], cwd=ROOT, check=True)
    for name, file in json.loads(report.read_text())["files"].items():
        yield File(name, file["summary"]["num_statements"], file["missing_lines"])


def unmeasured(files: list[File]) -> list[str]:
    """Sources that the build left out, and EXCLUDED does not name."""
    measured = {file.name for file in files}
    sources = (str(path.relative_to(ROOT)) for folder in COUNTED for path in (ROOT / folder).rglob("*.c*"))
    return sorted(
        name for name in sources if name.endswith((".cpp", ".cu")) and name not in measured and not is_excluded(name)
    )


def is_excluded(name: str) -> bool:
    return name.startswith(tuple(EXCLUDED))


def row(name: str, files: list[File]) -> str:
    lines = sum(file.lines for file in files)
    missed = sum(len(file.missed) for file in files)
    return f"{name:32} {lines:6} {missed:6}  {100 * (lines - missed) / max(lines, 1):5.1f} %"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=__doc__.partition("\n")[0])
    parser.add_argument("build", type=Path, help="the folder of the build")
    parser.add_argument("--lines", action="store_true", help="name the lines that no test ran through")
    options = parser.parse_args()
    cpp, python = list(of_cpp(options.build.resolve())), list(of_python(options.build.resolve()))
    folders: dict[str, list[File]] = defaultdict(list)
    for file in [*cpp, *python]:
        folders[str(Path(file.name).parent)].append(file)
        if options.lines and file.missed:
            print(f"{file.name}: {', '.join(map(str, file.missed))}")
    print(f"{'folder':32} {'lines':>6} {'missed':>6}")
    for folder in sorted(folders):
        print(row(folder, folders[folder]))
    print(row("C++", cpp))
    print(row("Python", python))
    for name, reason in EXCLUDED.items():
        print(f"not counted: {name}: {reason}")
    left_out = unmeasured(cpp)
    for name in left_out:
        print(f"error: {name} was not measured, and EXCLUDED in {__file__} does not name it", file=sys.stderr)
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
