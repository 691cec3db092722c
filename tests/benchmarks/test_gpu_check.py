"""scripts/gpu_check.sh without a GPU: what it starts, what it writes, and its table of goals."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import names
from benchmarks.gpu.goals import failures, goals, main, table
from benchmarks.gpu.paths import ON_CHIP, SEVERAL_LAUNCHES
from benchmarks.gpu.report import Timings, write
from benchmarks.results import Section

REPOSITORY = Path(__file__).resolve().parents[2]
PASSED = "tests/python/test_a.py::test_one[x y] PASSED [ 50%]\ntests/python/test_a.py::test_two SKIPPED (no) [100%]\n"
ENDED = "=== 1 passed, 1 skipped in 0.10s ===\n"


def timing(case: str, phase: str, ours: str, seconds: float, path: str) -> Timings:
    """A copy takes 1 s, torch's BatchNorm 2 s; ours as told."""
    section = Section(case, phase, names.COPY, {names.COPY: [1.0] * 3, names.TORCH: [2.0] * 3, ours: [seconds] * 3})
    moved, again = (2, 1) if phase == names.FORWARD else (3, 2)
    return Timings(section, {names.COPY: 2, names.TORCH: moved, ours: moved}, {ours: again}, {ours: path})


def network(seconds: float) -> Timings:
    return Timings(
        Section(f"N{seconds}", names.FORWARD, names.IDENTITY, {names.IDENTITY: [1.0], names.AS_MADE: [seconds]}), {}
    )


def results(folder: Path, timings: list[Timings], tests: str = PASSED + ENDED, trainer: str | None = None) -> Path:
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "a.txt").write_text(tests)
    write(folder / "benchmark.json", {"GPU": "G"}, 3, timings)
    if trainer is not None:
        (folder / "trainer.txt").write_text(trainer)
    return folder


def test_goals_that_are_met_and_missed(tmp_path: Path) -> None:
    fresh, backward = names.OURS_FRESH, names.BATCH_NORM
    timings = [
        timing("A", names.FORWARD, fresh, 1.0, ON_CHIP),  # 100% of 1R+1W
        timing("B", names.FORWARD, fresh, 1.25, ON_CHIP),  # 80%
        timing("C", names.FORWARD, fresh, 1.6, SEVERAL_LAUNCHES),  # 94% of 2R+1W, 1.25 times as fast as torch's
        timing("A", names.BACKWARD, backward, 1.6, ON_CHIP),  # 94% of 2R+1W
        timing("C", names.BACKWARD, backward, 5.0, SEVERAL_LAUNCHES),  # 50% of 4R+1W
        network(1.02),
        network(1.05),
    ]
    rows = {
        f"{goal.what} {goal.wanted}": goal
        for goal in goals(results(tmp_path / "r", timings, trainer="three steps done\n"))
    }
    found = {what: (goal.measured.split(" (")[0], goal.met) for what, goal in rows.items()}
    assert found == {
        "tests that fail 0": ("0 of 1, and 1 skipped", True),
        "files of tests cut short 0": ("0", True),
        "forward in training, times as fast as torch's BatchNorm at least 1.50": ("1.25", False),
        "forward in training, times as fast as torch's BatchNorm at least 2.50": ("1.25", False),
        "forward, on chip: of the copy's bandwidth, inputs read once at least 85%": ("80%", False),
        "forward, several launches: of the copy's bandwidth, inputs read twice at least 85%": ("94%", True),
        "backward alone, on chip: of the copy's bandwidth, inputs read once at least 85%": ("94%", True),
        "backward alone, several launches: of the copy's bandwidth, inputs read twice at least 85%": ("50%", False),
        "ResNet-50 teacher, times as long as without normalisation at most 1.03": ("1.05", False),
        "three steps of the trainer on the device done": ("three steps done", True),
    }
    assert (
        rows["forward, on chip: of the copy's bandwidth, inputs read once at least 85%"].measured
        == "80% (B, the slowest of 2)"
    )
    lines = table(list(rows.values())).splitlines()
    assert lines[0].split() == ["goal", "wanted", "measured", "met"]
    assert [line.split()[-1] for line in lines[1:]] == ["yes", "yes", "NO", "NO", "NO", "yes", "yes", "NO", "NO", "yes"]
    assert main(tmp_path / "r") == 0, "a speed that is missed is no failure"


def test_what_was_not_measured_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trainer.txt").write_text("skipped, as a library of the trainer is missing: CLI11\n")
    assert all(goal.met is None for goal in goals(tmp_path))
    assert main(tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.endswith("not measured") for line in lines[1:]) and len(lines) == 11
    assert "skipped, as a library of the trainer is missing: CLI11" in lines[-1]


@pytest.mark.parametrize(
    ("tests", "failed"),
    [
        (
            "tests/python/test_a.py::test_one[x y] FAILED [ 50%]\n" + PASSED + ENDED,
            ["tests/python/test_a.py::test_one[x y]"],
        ),
        ("tests/python/test_a.py::test_one ERROR [ 50%]\n" + ENDED, ["tests/python/test_a.py::test_one"]),
        ("ERROR tests/python/test_a.py - ModuleNotFoundError\n" + ENDED, ["tests/python/test_a.py"]),
    ],
)
def test_failures_of_tests_are_named(
    tmp_path: Path, tests: str, failed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = results(tmp_path / "r", [], tests)
    assert failures(folder) == failed
    assert main(folder) == 1
    assert capsys.readouterr().out.splitlines()[-1].strip() == failed[0]


def test_what_was_cut_short_is_named_and_a_trainer_that_failed_fails(tmp_path: Path) -> None:
    folder = results(tmp_path / "r", [], PASSED, trainer="error: --device: no such option\n")
    cut, trainer = goals(folder)[1], goals(folder)[-1]
    assert (cut.measured, cut.met) == ("1 a", False)
    assert (trainer.measured, trainer.met) == ("error: --device: no such option", False)
    assert main(folder) == 1


# --- the script, with programs that stand for those of a machine with a GPU ---------------------------

STUBS = {
    "cmake": """#!/usr/bin/env bash
echo "cmake $*" >>"$CALLS"
[[ $1 != --build ]] || sleep "${BUILD_SECONDS:-0}"
if [[ $* == *TRAINER=ON* && $LIBRARIES == none ]]; then
  printf 'CMake Error at apps/m2teacher/CMakeLists.txt:3 (find_package):\n  no CLI11\n' >&2
  exit 1
fi
[[ $1 != -L ]] || echo "MOMENTUM_BN_BUILD_TRAINER:BOOL=$([[ $LIBRARIES == none ]] && echo OFF || echo ON)"
""",
    "ninja": "#!/bin/sh\n",
    "nvcc": "#!/bin/sh\n",
    "fake-python": """#!/usr/bin/env bash
echo "python $*" >>"$CALLS"
case "$*" in
  -c*torch*) exit "$NO_GPU" ;;
  -c*) echo /python ;;
  "-m pytest"*)
    file=${*: -1}
    echo "$file::test PASSED [100%]"
    [[ $file != *test_cuda.py ]] || echo "$file::test_two FAILED [100%]"
    echo "=== 1 passed in 0.1s ==="
    ;;
  "-m benchmarks.gpu "*) echo '{"sections": []}' >"${*: -1}/benchmark.json" ;;
  "-m benchmarks.gpu.goals"* | -*) exec "$REAL_PYTHON" "$@" ;;
esac
""",
}


def check(
    tmp_path: Path, *arguments: str, libraries: str = "none", no_gpu: str = "0"
) -> tuple[subprocess.CompletedProcess[str], str]:
    """Runs a copy of the script in a folder of its own. Returns how it ended, and what it called."""
    programs, tree = tmp_path / "bin", tmp_path / "tree"
    programs.mkdir()
    for name, text in STUBS.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tree / "scripts").mkdir(parents=True)
    shutil.copy(REPOSITORY / "scripts/gpu_check.sh", tree / "scripts")
    (tree / "benchmarks").symlink_to(REPOSITORY / "benchmarks")
    calls = tmp_path / "calls"
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": "fake-python",
        "REAL_PYTHON": sys.executable,
        "CALLS": str(calls),
        "LIBRARIES": libraries,
        "NO_GPU": no_gpu,
    }
    command = ["bash", str(tree / "scripts/gpu_check.sh"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    return done, calls.read_text() if calls.exists() else ""


def test_tests_and_benchmark_end_with_the_table(tmp_path: Path) -> None:
    done, calls = check(tmp_path, "all", "results")
    assert done.returncode == 1, done.stderr
    folder = tmp_path / "results"
    assert calls.index("cmake -G Ninja") < calls.index("-m pytest") < calls.index("-m benchmarks.gpu --quick --seconds")
    assert "-DMOMENTUM_BN_CUDA_ARCHITECTURES=native" in calls
    ran = {path.stem for path in (folder / "tests").iterdir()}
    assert {"cuda", "cuda_operators", "accuracy", "differential", "errors", "func", "convert"} <= ran
    for name in ran:
        assert (REPOSITORY / f"tests/python/test_{name}.py").exists(), name
    goal_lines = (folder / "goals.txt").read_text()
    assert f"1 of {len(ran) + 1}, and 0 skipped" in goal_lines and goal_lines in done.stdout
    assert "failed:\n  tests/python/test_cuda.py::test_two\n" in goal_lines
    trainer = (folder / "trainer.txt").read_text()
    assert (
        trainer.startswith("skipped, as a library of the trainer is missing: CMake Error at apps/m2teacher")
        and "CLI11" in trainer
    )


def test_the_trainer_takes_three_steps_on_the_device(tmp_path: Path) -> None:
    trainer = tmp_path / "tree/build-gpu/bin/m2teacher"
    trainer.parent.mkdir(parents=True)
    trainer.write_text('#!/usr/bin/env bash\necho "trainer $*" >>"$CALLS"\n')
    trainer.chmod(0o755)
    _, calls = check(tmp_path, "tests", str(tmp_path / "results"), libraries="all")
    assert (tmp_path / "results/trainer.txt").read_text() == "three steps done\n"
    line = next(line for line in calls.splitlines() if line.startswith("trainer "))
    assert "--steps 3" in line and "--device cuda" in line
    images = tmp_path / "results/images"
    assert (images / "train-images-idx3-ubyte").stat().st_size == 16 + 256 * 28 * 28
    assert (images / "t10k-labels-idx1-ubyte").stat().st_size == 8 + 64
    assert "-m benchmarks.gpu --quick" not in calls


def test_a_trainer_that_fails_is_told(tmp_path: Path) -> None:
    trainer = tmp_path / "tree/build-gpu/bin/m2teacher"
    trainer.parent.mkdir(parents=True)
    trainer.write_text("#!/bin/sh\necho no such device >&2\nexit 1\n")
    trainer.chmod(0o755)
    done, _ = check(tmp_path, "tests", "results", libraries="all")
    assert done.returncode == 1
    assert (tmp_path / "results/trainer.txt").read_text() == "no such device\nfailed: no such device\n"
    assert re.search(r"three steps of the trainer .* failed: no such device +NO$", done.stdout, re.MULTILINE)


def test_benchmark_alone(tmp_path: Path) -> None:
    done, calls = check(tmp_path, "bench")
    assert done.returncode == 0, done.stderr
    assert "-m pytest" not in calls
    assert (tmp_path / "runs/gpu/goals.txt").exists(), "below the folder that it was called from"


def test_a_build_that_takes_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECONDS_EACH", "1")
    monkeypatch.setenv("BUILD_SECONDS", "2")
    done, calls = check(tmp_path, "all", "results")
    assert done.returncode == 0, done.stderr
    assert "-m pytest" not in calls, "the tests were left no time"
    goal = next(line for line in done.stdout.splitlines() if line.startswith("tests that fail"))
    assert goal.endswith("not measured")


@pytest.mark.parametrize("arguments", [("speed",), ("all", "a", "b")])
def test_unknown_arguments(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done, calls = check(tmp_path, *arguments)
    assert (done.returncode, calls) == (2, "")
    assert done.stderr == "usage: scripts/gpu_check.sh [tests|bench|all|sanitize] [FOLDER]\n"


def test_without_a_gpu(tmp_path: Path) -> None:
    done, calls = check(tmp_path, no_gpu="1")
    assert done.returncode == 1 and "cmake" not in calls
    assert done.stderr == "error: torch of fake-python finds no GPU here\n"
    assert not (tmp_path / "runs").exists()
