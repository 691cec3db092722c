"""The trainer's part of `make soak`, for seconds: it runs, and it sees a run that ends otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REPOSITORY

pytestmark = pytest.mark.sweep("a soak of the trainer, for seconds")


def soak_trainer(binary: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.soak", "--minutes", "0.02", "trainer"],
        cwd=REPOSITORY,
        env=os.environ | {"M2TEACHER": str(binary), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_whole_runs_end_with_the_same_bits(binary: Path, tmp_path: Path) -> None:
    result = soak_trainer(binary, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split("ended with the same bits")[1].split()[0] == "2"
    assert result.stdout.endswith("nothing was wrong\n")


def test_a_run_that_ends_otherwise_is_seen(binary: Path, tmp_path: Path) -> None:
    """A trainer that takes another seed, but not in the run that nothing befalls."""
    other = tmp_path / "m2teacher"
    seed = 'case "$*" in *uncut*|*--resume*) ;; *) set -- "$@" --seed 9 ;; esac'
    other.write_text(f'#!/bin/sh\n{seed}\nexec {binary} "$@"\n')
    other.chmod(0o755)
    result = soak_trainer(other, tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "WRONG: idx, " in result.stdout
    assert "does not end as the uncut run" in result.stdout
    assert list(tmp_path.glob("soak-*-kept/small"))
