"""Standard input, output and error that are closed, full or no terminal."""

import os
import pty
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import Start, checkpoint_of, metrics, pretrain_arguments, steps_of, wait_for


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


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe to write to whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_a_run_goes_on_when_nobody_reads_its_output(
    start: Start, data: Path, trained: Path, tmp_path: Path, unread: int
) -> None:
    run = tmp_path / "run"
    assert start(*pretrain_arguments(data, run), output=unread).wait(timeout=120) == 1
    assert metrics(run) == metrics(trained)
    assert checkpoint_of(run).exists()


def test_a_signal_saves_when_nobody_reads_the_output(start: Start, data: Path, tmp_path: Path, unread: int) -> None:
    run = tmp_path / "run"
    process = start(*pretrain_arguments(data, run, steps=100_000, checkpoint_every=100_000), output=unread)
    wait_for(lambda: (run / "metrics.csv").exists() and len(metrics(run)) > 1, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 1
    assert len(steps_of(run)) == 1


def test_results_that_nobody_reads_are_an_error(binary: Path, trained: Path, unread: int) -> None:
    command = [str(binary), "info", "--checkpoint", str(trained)]
    result = subprocess.run(command, stdout=unread, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert result.returncode == 1
    said = result.stderr.removesuffix("\n").removesuffix(": Broken pipe")  # for the reason see above
    assert said == "m2teacher: error: standard output cannot be written"


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
