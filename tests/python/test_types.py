"""What mypy says of users' code: types/accepted.py passes, types/refused.py does not, line by line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY

FILES = Path(__file__).parent / "types"


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[tuple[int, str]]]:
    """Lines with errors and their kinds, by file. One run for both files: it reads all of torch."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--hide-error-context", "--no-pretty",
               "--cache-dir", str(tmp_path_factory.mktemp("mypy")), "accepted.py", "refused.py"]  # fmt: skip
    result = subprocess.run(
        command,
        cwd=FILES,
        env={**os.environ, "MYPYPATH": str(REPOSITORY / "python")},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 1 and not result.stderr, result.stdout + result.stderr
    found: dict[str, set[tuple[int, str]]] = {}
    for file, line, kind in re.findall(r"^([^:\n]+):(\d+): error: .*\[([a-z-]+)\]$", result.stdout, re.MULTILINE):
        found.setdefault(file, set()).add((int(line), kind))
    return found


def test_users_code_is_accepted(errors: dict[str, set[tuple[int, str]]]) -> None:
    assert "accepted.py" not in errors, errors


def test_mistakes_are_refused(errors: dict[str, set[tuple[int, str]]]) -> None:
    lines = enumerate((FILES / "refused.py").read_text().splitlines(), start=1)
    expected = {(number, kind) for number, line in lines for kind in re.findall(r"# refused: ([a-z-]+)$", line)}
    assert len(expected) > 20 and errors["refused.py"] == expected


def test_the_package_passes(errors: dict[str, set[tuple[int, str]]]) -> None:
    assert set(errors) == {"refused.py"}
