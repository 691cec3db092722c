"""From figures to verdicts, tables, files and a chart."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import allocators, names
from benchmarks.budgets import Budget, judge
from benchmarks.machine import machine
from benchmarks.report import report
from benchmarks.results import Run, Section, read_runs, write_runs

REPOSITORY = Path(__file__).resolve().parents[2]
CASE, SMALL, NETWORK = "256x56x56 NCHW", "16x2x2 NCHW batch 2", "ResNet-50 NCHW"
MACHINE = {"processor": "P", "threads": "1 of 2", "torch": "2", "capability": "DEFAULT"}


def example_run(allocator: str, ours: float) -> Run:
    forward = {names.COPY: [1.0, 2.0, 1.0], names.OURS_INPLACE: [ours, 2 * ours, 9.0], names.TORCH: [5.0, 10.0, 5.0]}
    sections = [
        Section(CASE, names.FORWARD, names.COPY, forward, {names.TORCH_COMPILED: "no compiler"}),
        Section(SMALL, names.FORWARD, names.COPY, forward),
        Section(NETWORK, names.FORWARD, names.IDENTITY, {names.IDENTITY: [1.0], names.OURS: [ours]}),
    ]
    return Run(allocator, f"malloc {allocator}", MACHINE, 3, sections)


def budget(required: float, goal: float, **changes: object) -> Budget:
    fields = {
        "what": "in place",
        "cases": (CASE,),
        "phase": names.FORWARD,
        "calls": (names.OURS_INPLACE,),
        "unit": names.COPY,
        "required": required,
        "goal": goal,
    }
    return Budget(**(fields | changes))  # type: ignore[arg-type]


def test_ratios_are_medians_of_ratios_within_a_round() -> None:
    section = Section("case", "phase", "a", {"a": [1.0, 10.0, 2.0], "b": [2.0, 30.0, 8.0]})
    assert section.ratio("b", "a") == 3.0
    assert section.median_seconds("b") == 8.0


@pytest.mark.parametrize(("required", "goal", "word"), [(0.6, 0.5, "goal"), (0.6, 0.4, "met"), (0.4, 0.3, "missed")])
def test_verdict_of_an_upper_limit(required: float, goal: float, word: str) -> None:
    verdict = judge(budget(required, goal), example_run("default", 0.5))
    assert (verdict.figure, verdict.worst, verdict.word) == (0.5, CASE, word)


@pytest.mark.parametrize(("required", "goal", "word"), [(8, 10, "goal"), (8, 12, "met"), (11, 12, "missed")])
def test_verdict_of_a_lower_limit(required: float, goal: float, word: str) -> None:
    limit = budget(required, goal, calls=(names.TORCH,), unit=names.OURS_INPLACE, at_least=True)
    verdict = judge(limit, example_run("default", 0.5))
    assert (verdict.figure, verdict.word) == (10.0, word)


def test_the_worst_call_decides() -> None:
    limit = budget(1, 1, calls=(names.OURS_INPLACE, names.TORCH))
    verdict = judge(limit, example_run("default", 0.5))
    assert (verdict.figure, verdict.worst, verdict.word) == (5.0, f"{CASE}: {names.TORCH}", "missed")


def test_microseconds() -> None:
    assert judge(budget(2e6, 1e6, unit=None), example_run("default", 0.5)).figure == 1e6


def test_what_was_left_out_is_told() -> None:
    run = example_run("default", 0.5)
    assert judge(budget(1, 1, cases=(CASE, "other")), run).word == "incomplete"
    assert judge(budget(1, 1, cases=("other",)), run).word == "not measured"
    assert judge(budget(1, 1, calls=(names.OURS_FRESH,)), run).word == "not measured"


def test_memory() -> None:
    kept = {names.TORCH: 4 * 2**20, names.OURS: 3 * 2**20}
    run = example_run("default", 0.5)
    run.sections.append(Section("other", names.STUDENT, names.TORCH, {names.TORCH: [1.0]}, kept=kept))
    limit = budget(1, 0.8, cases=("other",), phase=names.STUDENT, calls=(names.OURS,), unit=names.TORCH, of_memory=True)
    assert (judge(limit, run).figure, judge(limit, run).word) == (0.75, "goal")
    assert f"  kept after forward: {names.OURS}, 3.0 MiB" in report([run]).splitlines()


def test_report_has_a_column_per_run() -> None:
    tables = report([example_run("default", 0.5), example_run("tuned", 0.75)])
    lines = tables.splitlines()
    row = next(line for line in lines if line.strip().startswith(names.OURS_INPLACE))
    assert row.removeprefix(f"  {names.OURS_INPLACE}").split() == ["0.50", "1000000.0", "0.75", "1500000.0"]
    assert f"  not timed: {names.TORCH_COMPILED} (no compiler)" in lines
    assert any(line.startswith("ResNet-50 teacher forward: ours / Identity") for line in lines)
    assert not any("7x7" in line for line in lines), "budgets of cases that were not chosen"
    assert "malloc tuned" in tables


def test_results_survive_a_file(tmp_path: Path) -> None:
    runs = [example_run("default", 0.5), example_run("tuned", 0.75)]
    write_runs(tmp_path / "new" / "runs.json", runs)
    assert read_runs(tmp_path / "new" / "runs.json") == runs


def test_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib: pip install 'momentum-bn[bench]'")
    from benchmarks.chart import draw_chart

    draw_chart([example_run("default", 0.5), example_run("tuned", 0.75)], tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_machine_names_what_decides_speed() -> None:
    about = machine()
    assert {"processor", "caches", "threads", "torch", "capability", "transparent huge pages"} < set(about)
    assert "CPU kernels in use" in about["momentum_bn"]


def test_allocators_are_named() -> None:
    assert allocators.environment(allocators.DEFAULT) == {}
    assert allocators.describe({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}) == "libjemalloc.so.2"
    assert allocators.describe({"GLIBC_TUNABLES": "a=1", "PATH": "/"}).endswith(" GLIBC_TUNABLES=a=1")


def test_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib: pip install 'momentum-bn[bench]'")
    command = [sys.executable, "-m", "benchmarks", "--only", SMALL, "--rounds", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "in place on (2, 16, 2, 2) / torch BN" in done.stdout
    runs = read_runs(tmp_path / "partial.json")
    assert runs[0].allocator == allocators.DEFAULT
    assert [section.phase for section in runs[0].sections] == [names.FORWARD, names.TRAINING, names.STUDENT]
    assert (tmp_path / "partial.txt").read_text() in done.stdout
    assert (tmp_path / "partial.png").stat().st_size > 0


def test_command_refuses_an_unknown_case(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib: pip install 'momentum-bn[bench]'")
    command = [sys.executable, "-m", "benchmarks", "--only", "none", "--tuned", "none", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "no case has a name with 'none'"
    assert not list(tmp_path.iterdir())
