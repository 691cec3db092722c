"""No memory is leaked: short runs of the trainer as it is, under LeakSanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import checkpoint_of, pretrain_arguments

pytestmark = pytest.mark.sweep("leaks of the trainer, under LeakSanitizer")

LEAKED = 23


@pytest.fixture(scope="session")
def leak_sanitizer() -> dict[str, str]:
    """An environment in which a program is run under LeakSanitizer."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    name = "liblsan.so"
    library = (
        compiler
        and subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    if not library or library == name:
        pytest.skip("the compiler has no liblsan.so")
    # With the words about threads one sees that it was at work.
    return os.environ | {"LD_PRELOAD": library, "LSAN_OPTIONS": f"exitcode={LEAKED}:log_threads=1"}


def test_no_leaks(binary: Path, data: Path, tmp_path: Path, leak_sanitizer: dict[str, str]) -> None:
    run = tmp_path / "run"

    def call(*arguments: object) -> None:
        command = [str(binary), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=leak_sanitizer, check=False)
        assert result.returncode == 0, result.stderr
        assert "Processing thread" in result.stderr

    call(*pretrain_arguments(data, run, checkpoint_every=4, threads=2))
    checkpoint_of(run).unlink()
    call("pretrain", "--resume", run)
    call("linear", "--checkpoint", run, "--labels-per-class", "0,5")
    call("export", "--checkpoint", run, "--out", tmp_path / "encoder.safetensors")


def test_the_sanitizer_finds_a_leak(tmp_path: Path, leak_sanitizer: dict[str, str]) -> None:
    source = tmp_path / "leak.c"
    source.write_text("#include <stdlib.h>\nvoid *volatile p;\nint main(void) { p = malloc(99); p = 0; return 0; }\n")
    program = tmp_path / "leak"
    subprocess.run(["cc", "-O0", str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, env=leak_sanitizer, check=False)
    assert result.returncode == LEAKED
    assert "99 byte(s) leaked" in result.stderr
