"""Loading the shared library: what is said where it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import momentum_bn

LIBRARY = momentum_bn._library_path
IMPORT = """
import ctypes, sys, torch
for library in sys.argv[1:]:
    ctypes.CDLL(library)  # as a C++ extension that links to it does
try:
    import momentum_bn
except ImportError as error:
    print(error)
else:
    print("imported", torch.ops.momentum_bn._scheduled_momentum(0, 10))
"""


def imported_after(*libraries: Path, **environment: str) -> str:
    """What a new process says that imports the package after it has loaded these."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT, *map(str, libraries)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_another_copy_in_the_process_is_an_import_error_that_names_both_files(tmp_path: Path) -> None:
    copied = Path(shutil.copy(LIBRARY, tmp_path))
    words = imported_after(copied)
    assert str(copied) in words and str(LIBRARY) in words and "find_package(momentum_bn)" in words


def test_the_same_library_loaded_before_is_no_error(tmp_path: Path) -> None:
    link = tmp_path / "another_name.so"
    link.symlink_to(LIBRARY)
    assert imported_after(LIBRARY) == imported_after(link) == "imported 1.0\n"


def test_the_loaded_copy_can_be_named(tmp_path: Path) -> None:
    copied = Path(shutil.copy(LIBRARY, tmp_path))
    assert imported_after(copied, MOMENTUM_BN_LIBRARY=str(copied)) == "imported 1.0\n"
