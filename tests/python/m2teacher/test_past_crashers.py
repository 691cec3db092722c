"""Files that were once too much for a reader, and those that fuzzing starts from: read or refused, in little memory."""

import json
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


@pytest.mark.parametrize("reader", READERS)
def test_is_read_or_refused(files: Path, reader: str) -> None:
    program = REPOSITORY / "build/bin/fuzz_readers"
    measured = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, program, files / reader],
        env=os.environ | {"READER": reader},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    *said, figures = measured.stdout.splitlines()
    code, memory, seconds = json.loads(figures)
    assert code == 0, said
    assert said[-1] == f"{len(list((files / reader).iterdir()))} files"
    assert memory < MOST_MEMORY
    assert seconds < MOST_SECONDS
