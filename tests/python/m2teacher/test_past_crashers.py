"""Files that were once too much for a reader, and those that fuzzing starts from: read or refused, in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REPOSITORY

READERS = ["idx", "cifar10", "jpeg", "png", "safetensors", "toml"]
MOST_MEMORY = 125 << 20  # beside what loading torch takes
MOST_SECONDS = 30


# A process counts the memory of the one that started it, which is large here.
MEASURE = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, used = os.wait4(process.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_maxrss << 10, used.ru_utime + used.ru_stime]))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    subprocess.run([sys.executable, REPOSITORY / "tests/fuzz/make_seeds.py", folder], check=True)
    return folder


def measure(reader: str, folder: Path) -> tuple[list[str], int, float]:
    """Lines that the reader printed, bytes that it took at most, and seconds of processor time."""
    measured = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, REPOSITORY / "build/bin/fuzz_readers", folder],
        env=os.environ | {"READER": reader},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    *said, figures = measured.stdout.splitlines()
    code, memory, seconds = json.loads(figures)
    assert code == 0, said
    return said, memory, seconds


@pytest.mark.parametrize("reader", READERS)
def test_is_read_or_refused(files: Path, tmp_path: Path, reader: str) -> None:
    said, memory, seconds = measure(reader, files / reader)
    assert said[-1] == f"{len(list((files / reader).iterdir()))} files"
    _, without_files, _ = measure(reader, tmp_path)
    assert memory - without_files < MOST_MEMORY
    assert seconds < MOST_SECONDS
