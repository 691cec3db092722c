"""The commands of the Makefile, and what the documents and continuous integration say of them."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from installation import SOURCE, attempt, run

MAKEFILE = (SOURCE / "Makefile").read_text()


def copy_of_the_tree(folder: Path) -> Path:
    """The files of a clone, as far as one can tell without git."""
    left_out = (".git", ".venv", "build*", "dist", "runs", "__pycache__", ".*_cache")
    return Path(shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns(*left_out)))


def test_help_says_how_long_each_command_takes() -> None:
    lines = run("make", "help", cwd=SOURCE).splitlines()
    commands = [line.split()[1] for line in lines]
    assert {"setup", "test", "test-all", "lint", "demo"} <= set(commands)
    without_time = [line.split()[1] for line in lines if not re.search(r"\(.*\d+ (seconds|minutes?|hours?).*\)", line)]
    assert without_time == ["help", "clean"]


def test_another_torch_than_that_of_the_environment_is_refused(tmp_path: Path) -> None:
    shutil.copy(SOURCE / "Makefile", tmp_path)
    shutil.copytree(SOURCE / "scripts", tmp_path / "scripts")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".torch").write_text("torch==2.13.0\n")
    asked = attempt("make", ".venv/.torch", "TORCH=torch==2.14.1", "SKIP_APT=1", cwd=tmp_path)
    assert asked.returncode != 0
    assert "error: .venv was made with torch==2.13.0, not with TORCH=torch==2.14.1: make clean first" in asked.stderr
    run("make", ".venv/.torch", "TORCH=torch==2.13.0", "SKIP_APT=1", cwd=tmp_path)


def test_sweeps_are_listed_for_contributors() -> None:
    """docs/hacking.md lists what `make test` leaves out, by the words of the marks."""
    sweeps = {
        name
        for file in (SOURCE / "tests").rglob("test_*.py")
        for name in re.findall(r"pytest\.mark\.sweep\(\"(.+?)\"\)", file.read_text())
    }
    page = (SOURCE / "docs" / "hacking.md").read_text()
    listed = set(re.findall(r"^\| (.+?) \| `tests/", page, re.MULTILINE))
    assert sweeps and sweeps == listed


@pytest.mark.sweep("a clone below a folder with spaces, built")
def test_setup_below_a_folder_with_spaces(tmp_path: Path) -> None:
    """With the torch of this environment: nothing is downloaded."""
    clone = copy_of_the_tree(tmp_path / "my projects (ü)" / "clone")
    run("make", "setup", f"PYTHON={sys.executable}", "SKIP_APT=1", cwd=clone)
    assert "Usage: m2teacher" in run(clone / "build" / "bin" / "m2teacher", "--help")
    code = "import momentum_bn, torch; print(momentum_bn.MomentumBatchNorm2d(3)(torch.rand(2, 3, 4, 4)).shape)"
    assert "[2, 3, 4, 4]" in run(clone / ".venv" / "bin" / "python", "-c", code, cwd=tmp_path)
