"""What was measured, and how it is kept in a file."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Section:
    """Calls that were timed side by side.

    Attributes:
        case: what was normalised, for example ``256x56x56 NCHW``.
        phase: what was done with it, for example ``forward``.
        unit: the call that the others are multiples of.
        seconds: of each call, one value per round; the n-th values of all calls were taken in the same round.
        absent: why a call was not timed, by name.
        kept: bytes that a forward pass keeps for its backward pass, by call, where that was counted.
    """

    case: str
    phase: str
    unit: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)

    def median_seconds(self, call: str) -> float:
        return statistics.median(self.seconds[call])

    def ratio(self, call: str, unit: str) -> float:
        """Returns the median over all rounds of how many times longer ``call`` took than ``unit`` in that round."""
        return statistics.median(a / b for a, b in zip(self.seconds[call], self.seconds[unit], strict=True))


@dataclass
class Run:
    """All that one process measured."""

    allocator: str
    allocator_settings: str
    machine: dict[str, str]
    rounds: int
    sections: list[Section]

    def section(self, case: str, phase: str) -> Section | None:
        return next((section for section in self.sections if (section.case, section.phase) == (case, phase)), None)


def write_runs(path: Path, runs: list[Run]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": [asdict(run) for run in runs]}, indent=1) + "\n")


def read_runs(path: Path) -> list[Run]:
    return [
        Run(**{**run, "sections": [Section(**section) for section in run["sections"]]})
        for run in json.loads(path.read_text())["runs"]
    ]
