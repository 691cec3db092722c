"""The commands of the Makefile, and what the documents and continuous integration say of them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

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
