"""The operators on CUDA without a GPU: over emulated kernels, with the host's memory for the device's.

Tests of the CPU run on them in a process of its own. Kernels are emulated thread by thread: the longest are left out.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from conftest import REPOSITORY, built_library

FILES = (
    "accuracy",
    "autograd",
    "batch_norm",
    "convert",
    "cuda_operators",
    "differential",
    "errors",
    "func",
    "functional",
    "inplace",
    "layouts",
    "mixed_dtypes",
    "modules",
    "state",
    "teacher",
)
LEFT_OUT = "two_hundred or layout_and_dtype or large_batch or half_overflow or cut_run and not deepcopy"


@pytest.mark.parametrize("shared_kib", [0, 28])
def test_tests_of_the_cpu_pass_on_the_operators_of_cuda(shared_kib: int) -> None:
    """Forward by a kernel for statistics and another one, and where values fit, by one that keeps them on the chip."""
    library = built_library("emulated_cuda")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--device", "emulated-cuda", "-k", f"not ({LEFT_OUT})"),
            *(f"tests/python/test_{name}.py" for name in FILES),
        ],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "MOMENTUM_BN_LIBRARY": str(library),
            "OMP_NUM_THREADS": "1",
            "EMULATED_SHARED_KIB": str(shared_kib),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout
