"""What was measured on a GPU: tables, and a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import names
from ..results import Section

# What a call reads and writes, in tensors of the case's size, where it reads each once and where it reads some again.
_ONCE_AND_AGAIN = {
    names.FORWARD: ("1R+1W", "2R+1W"),
    names.BACKWARD: ("2R+1W", "4R+1W"),
    names.TRAINING: ("once", "again"),
}


@dataclass
class Timings:
    """Calls that were timed side by side.

    Attributes:
        section: their seconds by the device's clock.
        bytes_moved: what each call cannot do without reading or writing, by name; empty where that is not told.
        bytes_read_again: what it reads a second time where it does not keep it on chip, by name.
        paths: which way the kernels went, by name; empty where there was no choice.
    """

    section: Section
    bytes_moved: dict[str, int]
    bytes_read_again: dict[str, int] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)

    def bandwidth(self, call: str) -> float:
        """Returns bytes per second, counting what the call cannot do without."""
        return self.bytes_moved[call] / self.section.median_seconds(call)

    def share_of_copy(self, call: str) -> float:
        """Returns the call's bandwidth as a share of the copy's: 1 is as fast as memory allows."""
        return self.bandwidth(call) / self.bandwidth(names.COPY)

    def share_of_copy_reading_again(self, call: str) -> float:
        """Returns the same where what is read a second time counts, too."""
        bytes_read_again = self.bytes_read_again.get(call, 0)
        return self.share_of_copy(call) * (1 + bytes_read_again / self.bytes_moved[call])


def heading(machine: dict[str, str], rounds: int) -> str:
    """Returns the machine, and how the tables were measured."""
    lines = [f"{key + ':':<24} {value}" for key, value in machine.items()]
    lines.append(f"{'figures:':<24} medians of {rounds} rounds by CUDA events, inputs in turn past the L2 cache")
    return "\n".join(lines)


def table(timing: Timings) -> str:
    """Returns the table of one section."""
    return "\n".join(_section_lines(timing))


def _section_lines(timing: Timings) -> Iterator[str]:
    section = timing.section
    told = bool(timing.bytes_moved)
    heads = f"{'us':>12}{'x ' + section.unit:>12}"
    if told:
        once, again = _ONCE_AND_AGAIN[section.phase]
        heads += f"{'GB/s':>10}{once:>10}{again:>10}  path"
    yield f"{section.case + ', ' + section.phase:<52}{heads}"
    for call in section.seconds:
        row = f"  {call:<50}{section.median_seconds(call) * 1e6:12.1f}{section.ratio(call, section.unit):12.2f}"
        if told:
            row += f"{timing.bandwidth(call) / 1e9:10.0f}{timing.share_of_copy(call):10.0%}"
            row += f"{timing.share_of_copy_reading_again(call):10.0%}  {timing.paths.get(call, '')}".rstrip()
        yield row
    yield from (f"  not timed: {call} ({why})" for call, why in section.absent.items())


def write(path: Path, machine: dict[str, str], rounds: int, timings: list[Timings]) -> None:
    """Writes everything as JSON, every round by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = {"machine": machine, "rounds": rounds, "sections": [asdict(timing) for timing in timings]}
    path.write_text(json.dumps(everything, indent=1) + "\n")


def read(path: Path) -> list[Timings]:
    """Returns what was written."""
    return [
        Timings(**{**timing, "section": Section(**timing["section"])})
        for timing in json.loads(path.read_text())["sections"]
    ]
