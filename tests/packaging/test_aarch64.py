"""The CPU kernels on 64-bit ARM: cross-compiled, and their own tests run under an emulator."""

from __future__ import annotations

import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from installation import SOURCE, run

TOOLCHAIN = SOURCE / "cmake" / "toolchains" / "aarch64-linux-gnu.cmake"
GOOGLETEST = Path("/usr/src/googletest")
NEEDED = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}
SHARDS = 2


@pytest.fixture
def cross_compiled_googletest(tmp_path: Path) -> Path:
    """The folder of GTestConfig.cmake."""
    missing = [package for program, package in NEEDED.items() if not shutil.which(program)]
    if not GOOGLETEST.is_dir():
        missing.append("googletest")
    if missing:
        pytest.skip(f"needs the Debian packages {' '.join(missing)}")
    build, prefix = tmp_path / "googletest", tmp_path / "prefix"
    run(
        *("cmake", "-G", "Ninja", "-S", GOOGLETEST, "-B", build, "--toolchain", TOOLCHAIN, "-DBUILD_GMOCK=OFF"),
        f"-DCMAKE_INSTALL_PREFIX={prefix}",
    )
    run("cmake", "--build", build, "--target", "install")
    return prefix / "lib" / "cmake" / "GTest"


@pytest.mark.sweep("64-bit ARM, emulated")
def test_kernels_under_emulation(cross_compiled_googletest: Path, tmp_path: Path) -> None:
    build = tmp_path / "kernels"
    run(
        *("cmake", "-G", "Ninja", "-S", SOURCE, "-B", build, "--toolchain", TOOLCHAIN, "-DCMAKE_BUILD_TYPE=Release"),
        *("-DMOMENTUM_BN_BUILD_TRAINER=OFF", f"-DGTest_DIR={cross_compiled_googletest}"),
        # Of torch, headers are read.
        f"-DPython_EXECUTABLE={sys.executable}",
    )
    run("cmake", "--build", build, "--target", "kernels_test")
    program = build / "bin" / "kernels_test"
    assert "AArch64" in run("readelf", "--file-header", program)

    def run_shard(index: int) -> str:
        return run(
            *("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", program, "--gtest_brief=1"),
            # They take a third of the time and do not depend on the processor.
            "--gtest_filter=-*AnyNumberOfThreads*:*LargeOutputs*",
            GTEST_TOTAL_SHARDS=str(SHARDS),
            GTEST_SHARD_INDEX=str(index),
        )

    with ThreadPoolExecutor(SHARDS) as pool:
        for output in pool.map(run_shard, range(SHARDS)):
            passed = re.search(r"\[  PASSED  \] (\d+) tests", output)
            assert passed and int(passed.group(1)) > 10, output
