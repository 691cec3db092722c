"""What was measured on a GPU: tables, and a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import names
from ..results import Section


@dataclass
class Timings:
    """Calls that were timed side by side.

    Attributes:
        section: their seconds by the device's clock.
        bytes_moved: what each call cannot do without reading or writing, by name; empty where that is not told.
    """

    section: Section
    bytes_moved: dict[str, int]

    def bandwidth(self, call: str) -> float:
        """Returns bytes per second, counting what the call cannot do without."""
        return self.bytes_moved[call] / self.section.median_seconds(call)

    def share_of_copy(self, call: str) -> float:
        """Returns the call's bandwidth as a share of the copy's: 1 is as fast as memory allows."""
        return self.bandwidth(call) / self.bandwidth(names.COPY)


def report(machine: dict[str, str], rounds: int, timings: list[Timings]) -> str:
    """Returns all tables: the machine, then each section."""
    lines = [f"{key + ':':<24} {value}" for key, value in machine.items()]
    lines += [f"{'figures:':<24} medians of {rounds} rounds by CUDA events, inputs in turn past the L2 cache", ""]
    for timing in timings:
        lines += [*_section_lines(timing), ""]
    return "\n".join(lines)


def _section_lines(timing: Timings) -> Iterator[str]:
    section = timing.section
    told = bool(timing.bytes_moved)
    heads = f"{'us':>12}{'x ' + section.unit:>12}" + (f"{'GB/s':>10}{'of copy':>10}" if told else "")
    yield f"{section.case + ', ' + section.phase:<52}{heads}"
    for call in section.seconds:
        row = f"  {call:<50}{section.median_seconds(call) * 1e6:12.1f}{section.ratio(call, section.unit):12.2f}"
        yield row + (f"{timing.bandwidth(call) / 1e9:10.0f}{timing.share_of_copy(call):10.0%}" if told else "")
    yield from (f"  not timed: {call} ({why})" for call, why in section.absent.items())


def write(path: Path, machine: dict[str, str], rounds: int, timings: list[Timings]) -> None:
    """Writes everything as JSON, every round by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = {"machine": machine, "rounds": rounds, "sections": [asdict(timing) for timing in timings]}
    path.write_text(json.dumps(everything, indent=1) + "\n")
