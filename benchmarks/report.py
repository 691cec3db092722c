"""Tables of what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .budgets import BUDGETS, Verdict, judge
from .results import Run, Section


def report(runs: Sequence[Run]) -> str:
    """Returns all tables, one column per run: the machine, each section, the budgets."""
    return "\n".join([*_machine_lines(runs), "", *_section_lines(runs), *_budget_lines(runs)]) + "\n"


def _machine_lines(runs: Sequence[Run]) -> Iterator[str]:
    for key, value in runs[0].machine.items():
        yield f"{key + ':':<24} {value}"
    for run in runs:
        yield f"{'allocator, ' + run.allocator + ':':<24} {run.allocator_settings}"
    yield f"{'figures:':<24} medians of {runs[0].rounds} rounds; each multiple is of its own process"


def _section_lines(runs: Sequence[Run]) -> Iterator[str]:
    for first in runs[0].sections:
        sections = [run.section(first.case, first.phase) for run in runs]
        header = "".join(f"{run.allocator + ', x ' + first.unit:>24}{'us':>12}" for run in runs)
        yield f"{first.case + ', ' + first.phase:<40}{header}"
        for call in dict.fromkeys(call for section in sections if section for call in section.seconds):
            yield f"  {call:<38}" + "".join(_cells(section, call) for section in sections)
        absences = {call: why for section in sections if section for call, why in section.absent.items()}
        yield from (f"  not timed: {call} ({why})" for call, why in absences.items())
        yield from (f"  kept after forward: {call}, {size / 2**20:.1f} MiB" for call, size in first.kept.items())
        yield ""


def _cells(section: Section | None, call: str) -> str:
    if section is None or call not in section.seconds:
        return f"{'-':>24}{'-':>12}"
    return f"{section.ratio(call, section.unit):24.2f}{section.median_seconds(call) * 1e6:12.1f}"


def _budget_lines(runs: Sequence[Run]) -> Iterator[str]:
    yield f"{'budget (of the worst case)':<64}{'required':>10}{'goal':>8}" + "".join(
        f"{run.allocator:>26}" for run in runs
    )
    measured = {(section.case, section.phase) for run in runs for section in run.sections}
    for budget in BUDGETS:
        if not any((case, budget.phase) in measured for case in budget.cases):
            continue
        sign = ">=" if budget.at_least else "<="
        verdicts = [judge(budget, run) for run in runs]
        limits = f"{sign + format(budget.required, '.4g'):>10}{format(budget.goal, '.4g'):>8}"
        worst = verdicts[0].worst
        yield f"{budget.what:<64}{limits}" + "".join(map(_verdict_cell, verdicts)) + (f"   {worst}" if worst else "")


def _verdict_cell(verdict: Verdict) -> str:
    figure = "" if verdict.figure is None else f"{verdict.figure:.2f} "
    return f"{figure + verdict.word:>26}"
