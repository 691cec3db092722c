"""The layers' part of `make soak`, for seconds: it runs, and it sees what it is there to see.

The trainer's part is in m2teacher/test_soak.py.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from conftest import REPOSITORY

pytestmark = pytest.mark.cpu_only


def soak_layers(planted: str = "") -> subprocess.CompletedProcess[str]:
    """The layers' part, in which `planted` has been run first."""
    code = f"import sys\nfrom tests.soak import __main__, layers\n{planted}\nsys.exit(__main__.main())"
    return subprocess.run(
        [sys.executable, "-c", code, "--minutes", "0.02", "layers"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_layers() -> None:
    result = soak_layers()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "calls of large_results" in result.stdout
    assert result.stdout.endswith("nothing was wrong\n")


def test_other_bits_are_seen() -> None:
    share = "shared = layers.momentum_bn.BatchNorm2d(16)\nlayers.momentum_bn.BatchNorm2d = lambda *a, **k: shared"
    result = soak_layers(share)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "WRONG: train_batch_norm of " in result.stdout
    assert "other bits than alone" in result.stdout


def test_growing_memory_is_seen() -> None:
    leak = "leaked = []\nlook = layers.resident\n"
    leak += "layers.resident = lambda: (leaked.append(bytes(b'x') * (16 << 20)), look())[1]"
    result = soak_layers(leak)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "WRONG: memory grew from " in result.stdout
