"""What is asked of the library on a GPU, and whether a folder of results shows it.

Reads what scripts/gpu_check.sh left in a folder: the tests' output, the benchmark's file and the trainer's. Prints a
table, which names what was not measured, too.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from .. import names
from .paths import ON_CHIP, SEVERAL_LAUNCHES
from .report import Timings, read

# Lines of `pytest -v`: a test's name and how it ended, or a file that could not be imported.
_OUTCOME = re.compile(r"^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
_BROKEN_FILE = re.compile(r"^ERROR (tests/\S+\.py)", re.MULTILINE)
_OF_A_CASE = {
    names.FORWARD: names.OURS_FRESH,
    names.BACKWARD: names.BATCH_NORM,
}


class Goal(NamedTuple):
    """A line of the table."""

    what: str
    wanted: str
    measured: str
    met: bool | None
    """None: it was not measured."""


class _Value(NamedTuple):
    value: float
    where: str


def goals(folder: Path) -> list[Goal]:
    """Returns the goals, with what the folder says of each."""
    file = folder / "benchmark.json"
    timings = read(file) if file.exists() else []
    return [*_of_tests(folder), *_of_the_layer(timings), _of_the_teacher(timings), _of_the_trainer(folder)]


def table(lines: list[Goal]) -> str:
    """Returns the goals as a table of goal, measured and met."""
    met = {True: "yes", False: "NO", None: "not measured"}
    rows = [("goal", "wanted", "measured", "met"), *((g.what, g.wanted, g.measured, met[g.met]) for g in lines)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def failures(folder: Path) -> list[str]:
    """Returns the tests that failed, and the files that could not be imported."""
    text = _output_of_tests(folder)
    failed = [name for name, outcome in _OUTCOME.findall(text) if outcome in ("FAILED", "ERROR")]
    return sorted({*failed, *_BROKEN_FILE.findall(text)})


def _output_of_tests(folder: Path) -> str:
    return "\n".join(file.read_text(errors="replace") for file in sorted(folder.glob("tests/*.txt")))


def _of_tests(folder: Path) -> Iterator[Goal]:
    counts = Counter(outcome for _, outcome in _OUTCOME.findall(_output_of_tests(folder)))
    failed = len(failures(folder))
    ran = counts["PASSED"] + failed
    measured = f"{failed} of {ran}, and {counts['SKIPPED']} skipped" if ran else ""
    yield Goal("tests that fail", "0", measured, failed == 0 if ran else None)
    unfinished = [
        file.stem
        for file in sorted(folder.glob("tests/*.txt"))
        if not re.search(r"^=+ .* in [\d.]+s", file.read_text(errors="replace"), re.MULTILINE)
    ]
    yield Goal(
        "files of tests cut short",
        "0",
        f"{len(unfinished)} {' '.join(unfinished)}".strip() if ran else "",
        not unfinished if ran else None,
    )


def _of_the_layer(timings: list[Timings]) -> Iterator[Goal]:
    large = [timing for timing in timings if timing.bytes_moved]
    forward = [timing for timing in large if timing.section.phase == names.FORWARD]
    faster = [_Value(t.section.ratio(names.TORCH, names.OURS_FRESH), t.section.case) for t in forward]
    what = "forward in training, times as fast as torch's BatchNorm"
    for least in (1.5, 2.5):
        yield _at_least(what, least, faster, "{:.2f}".format)
    for phase, call in _OF_A_CASE.items():
        for path, share, reads in (
            (ON_CHIP, Timings.share_of_copy, "once"),
            (SEVERAL_LAUNCHES, Timings.share_of_copy_reading_again, "twice"),
        ):
            values = [
                _Value(share(timing, call), timing.section.case)
                for timing in large
                if timing.section.phase == phase and timing.paths.get(call) == path
            ]
            what = f"{phase}, {path}: of the copy's bandwidth, inputs read {reads}"
            yield _at_least(what, 0.85, values, "{:.0%}".format)


def _of_the_teacher(timings: list[Timings]) -> Goal:
    values = [
        _Value(timing.section.ratio(names.AS_MADE, names.IDENTITY), timing.section.case)
        for timing in timings
        if names.AS_MADE in timing.section.seconds
    ]
    what, wanted = "ResNet-50 teacher, times as long as without normalisation", "at most 1.03"
    if not values:
        return Goal(what, wanted, "", None)
    worst = max(values)
    return Goal(what, wanted, f"{worst.value:.2f} ({worst.where})", worst.value <= 1.03)


def _of_the_trainer(folder: Path) -> Goal:
    file = folder / "trainer.txt"
    last = file.read_text(errors="replace").strip().splitlines()[-1:] if file.exists() else []
    done = last == ["three steps done"]
    skipped = not last or last[0].startswith("skipped")
    return Goal("three steps of the trainer on the device", "done", last[0] if last else "", None if skipped else done)


def _at_least(what: str, least: float, values: list[_Value], text: Callable[[float], str]) -> Goal:
    if not values:
        return Goal(what, f"at least {text(least)}", "", None)
    worst = min(values)
    measured = f"{text(worst.value)} ({worst.where}, the slowest of {len(values)})"
    return Goal(what, f"at least {text(least)}", measured, worst.value >= least)


def main(folder: Path) -> int:
    """Prints the table and what failed. Returns 1 where tests or the trainer failed; speed alone fails nothing."""
    lines = goals(folder)
    print(table(lines))
    failed = failures(folder)
    if failed:
        print("\nfailed:", *failed, sep="\n  ")
    return int(bool(failed) or lines[-1].met is False)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
