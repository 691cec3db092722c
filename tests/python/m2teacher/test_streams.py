"""Standard input, output and error that are closed, full or no terminal."""

import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from .conftest import checkpoint_of, metrics, pretrain_arguments


def shell(binary: Path, *arguments: object, redirection: str = "") -> subprocess.CompletedProcess[str]:
    script = f'"$0" "$@" {redirection}'
    command = ["bash", "-c", script, str(binary), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&- 2>&-", "2>&-"])
def test_closed_ones_are_no_place_for_files(
    binary: Path, data: Path, trained: Path, tmp_path: Path, closed: str
) -> None:
    run = tmp_path / "run"
    assert shell(binary, *pretrain_arguments(data, run), redirection=closed).returncode == 0
    assert metrics(run) == metrics(trained)
    assert checkpoint_of(run).exists()


@pytest.mark.parametrize("command", [["info"], ["knn", "--neighbours", 5], ["linear", "--labels-per-class", 5]])
def test_output_that_cannot_be_written_is_an_error(binary: Path, trained: Path, command: list[object]) -> None:
    result = shell(binary, *command, "--checkpoint", trained, redirection=">/dev/full")
    assert result.returncode == 1
    # The system gives the reason to the first call that fails, which may be one that wrote in between.
    said = result.stderr.splitlines()[-1].removesuffix(": No space left on device")
    assert said == "m2teacher: error: standard output cannot be written"
    assert shell(binary, *command, "--checkpoint", trained).returncode == 0


def test_errors_that_cannot_be_written_are_errors(binary: Path, data: Path, tmp_path: Path) -> None:
    assert shell(binary, *pretrain_arguments(data, tmp_path / "run"), redirection="2>/dev/full").returncode == 1
    assert checkpoint_of(tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "escapes"), [("xterm", True), ("dumb", False)])
def test_a_terminal_gets_what_it_knows(binary: Path, data: Path, tmp_path: Path, kind: str, escapes: bool) -> None:
    ours, theirs = pty.openpty()
    arguments = [str(binary), *pretrain_arguments(data, tmp_path / "run")]
    result = subprocess.run(
        arguments, stdout=subprocess.DEVNULL, stderr=theirs, env=os.environ | {"TERM": kind}, timeout=120, check=False
    )
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 65536):
            seen += part
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert result.returncode == 0
    assert bool(re.search(rb"\x1b\[", seen)) == escapes
    assert b"step 30/30" in seen
