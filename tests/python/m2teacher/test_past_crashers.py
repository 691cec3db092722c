"""Files that were once too much for a reader, and those that fuzzing starts from: read or refused, in little memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REPOSITORY

READERS = ["idx", "cifar10", "jpeg", "png", "safetensors", "toml"]
# Of which loading torch takes a half.
MOST_MEMORY = 250 << 20
MOST_SECONDS = 30


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    subprocess.run([sys.executable, REPOSITORY / "tests/fuzz/make_seeds.py", folder], check=True)
    return folder


@pytest.mark.parametrize("reader", READERS)
def test_is_read_or_refused(files: Path, reader: str) -> None:
    program = REPOSITORY / "build/bin/fuzz_readers"
    process = subprocess.Popen(
        [program, files / reader], env=os.environ | {"READER": reader}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said
    assert said.splitlines()[-1] == f"{len(list((files / reader).iterdir()))} files"
    assert used.ru_maxrss << 10 < MOST_MEMORY
    assert used.ru_utime + used.ru_stime < MOST_SECONDS
