"""A chart of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from . import names
from .cases import SMALL_CASES
from .results import Run, Section

# Ours in blue, torch's in orange, the published formulas in grey, passes over memory in green.
_STYLES = {
    names.RELU: ("tab:green", "s"),
    names.CLONE: ("tab:green", "P"),
    names.OURS_INPLACE_RELU: ("tab:blue", "o"),
    names.OURS_INPLACE_RESIDUAL_RELU: ("tab:blue", "D"),
    names.OURS_FRESH: ("tab:blue", "^"),
    names.OURS: ("tab:blue", "o"),
    names.OURS_BACKWARD_FRESH: ("tab:blue", "<"),
    names.OURS_BACKWARD_OVER_DY: ("tab:blue", ">"),
    names.BATCH_NORM_RELU: ("tab:blue", "o"),
    names.BATCH_NORM_RESIDUAL_RELU: ("tab:blue", "D"),
    names.BATCH_NORM_BACKWARD_RELU: ("tab:blue", ">"),
    names.TORCH_RELU: ("tab:orange", "s"),
    names.TORCH_RESIDUAL_RELU: ("tab:orange", "D"),
    names.TORCH_RELU_COMPILED: ("tab:orange", "X"),
    names.TORCH: ("tab:orange", "o"),
    names.TORCH_REUSED: ("tab:orange", "v"),
    names.TORCH_COMPILED: ("tab:orange", "*"),
    names.PUBLISHED: ("tab:gray", "o"),
    names.PUBLISHED_COMPILED: ("tab:gray", "*"),
}
_TICKS = [0.3, 0.5, 1, 2, 5, 10, 20, 50]


def draw_chart(runs: Sequence[Run], path: Path) -> None:
    """Draws ``path``: filled marks for the first run, hollow ones for the others; bars in the order of the runs."""
    figure, axes = plt.subplots(2, 3, figsize=(25, 12), layout="constrained", height_ratios=[2, 1])
    machine = runs[0].machine
    figure.suptitle(
        f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']} ({machine['capability']})\n"
        + "; ".join(f"{'hollow' if i else 'filled'}: {run.allocator}" for i, run in enumerate(runs))
    )
    small = {case.name for case in SMALL_CASES}
    for panel, phase in zip(axes[0], (names.FORWARD, names.TRAINING, names.STUDENT), strict=True):
        _draw_multiples(panel, runs, phase, small)
    _draw_small(axes[1, 0], runs, small)
    _draw_networks(axes[1, 1], runs, names.IDENTITY, "A whole teacher forward")
    _draw_networks(axes[1, 2], runs, names.TORCH, "A student's whole forward and backward")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _of_layers(run: Run) -> list[Section]:
    return [section for section in run.sections if section.unit == names.COPY]


def _draw_multiples(axes: Axes, runs: Sequence[Run], phase: str, small: set[str]) -> None:
    cases = [s.case for s in _of_layers(runs[0]) if s.phase == phase and s.case not in small]
    axes.set_visible(bool(cases))
    shown: set[str] = set()
    for row, case in enumerate(cases):
        for run_index, run in enumerate(runs):
            section = run.section(case, phase)
            if section is None:
                continue
            for call, (colour, marker) in _STYLES.items():
                if call in section.seconds:
                    shown.add(call)
                    face = "none" if run_index else colour
                    height = row + 0.3 * run_index
                    axes.plot(section.ratio(call, names.COPY), height, marker, color=colour, markerfacecolor=face)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="multiples of a warm copy_", title=phase)
    limits = axes.get_xlim()
    axes.set_xticks(_TICKS, map(str, _TICKS))
    axes.set_xlim(limits)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    handles = [
        Line2D([], [], linestyle="", marker=_STYLES[c][1], color=_STYLES[c][0], label=c) for c in _STYLES if c in shown
    ]
    axes.legend(handles=handles, fontsize="small", loc="upper center", bbox_to_anchor=(0.45, -0.08), ncols=3)


def _draw_small(axes: Axes, runs: Sequence[Run], small: set[str]) -> None:
    shown = {
        names.FORWARD: (names.OURS_INPLACE, names.OURS_FRESH, names.TORCH),
        names.TRAINING: (names.OURS, names.TORCH),
        names.STUDENT: (names.BATCH_NORM, names.TORCH),
    }
    bars = [
        (
            f"{section.case}\n{section.phase}: {call}",
            _colour(call),
            [beside.median_seconds(call) * 1e6 for beside in _beside(runs, section, call)],
        )
        for section in _of_layers(runs[0])
        if section.case in small
        for call in shown[section.phase]
    ]
    _draw_bars(axes, bars)
    axes.set(xlabel="microseconds", title="A call on small inputs")


def _draw_networks(axes: Axes, runs: Sequence[Run], unit: str, title: str) -> None:
    bars = [
        (
            f"{section.case}: {call}",
            _colour(call),
            [beside.ratio(call, section.unit) for beside in _beside(runs, section, call)],
        )
        for section in runs[0].sections
        if section.unit == unit
        for call in section.seconds
    ]
    _draw_bars(axes, bars)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel=f"multiples of the network with {unit}", title=title)


def _beside(runs: Sequence[Run], section: Section, call: str) -> list[Section]:
    """The sections of all runs that timed the call in the same case and phase."""
    found = [run.section(section.case, section.phase) for run in runs]
    return [beside for beside in found if beside and call in beside.seconds]


def _colour(call: str) -> str:
    if call.startswith(names.OURS):
        return "tab:blue"
    return _STYLES[call][0] if call in _STYLES else "tab:green"


def _draw_bars(axes: Axes, bars: Sequence[tuple[str, str, Sequence[float]]]) -> None:
    """One row per label and colour, with one bar per value."""
    axes.set_visible(bool(bars))
    for row, (_, colour, values) in enumerate(bars):
        height = 0.8 / max(1, len(values))
        for index, value in enumerate(values):
            face = "none" if index else colour
            axes.barh(row + (index - (len(values) - 1) / 2) * height, value, height, color=face, edgecolor=colour)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], fontsize=8)
    axes.invert_yaxis()
