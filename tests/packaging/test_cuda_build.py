"""The CUDA kernels: whether CMake builds them, and that a library with them loads on a machine without a GPU."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from installation import SOURCE, attempt, run

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH: CUDA kernels cannot be compiled")

ASKS = f"""
cmake_minimum_required(VERSION 3.25)
project(asks LANGUAGES CXX)
list(APPEND CMAKE_MODULE_PATH "{SOURCE}/cmake")
include(CudaKernels)
"""


def decide(folder: Path, torch: Path, *definitions: str, **variables: str) -> tuple[int, str]:
    """Exit code and words of a project that only decides about the kernels; `torch` has the libraries of one."""
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(ASKS)
    result = attempt(
        *("cmake", "-G", "Ninja", "-S", folder, "-B", folder / "build", f"-DTorchLibraries_LIBRARY_DIR={torch}"),
        *definitions,
        **variables,
    )
    return result.returncode, " ".join((result.stdout + result.stderr).split())


@pytest.fixture
def cuda_torch_libraries(tmp_path: Path) -> Path:
    """What of a CUDA build of torch is read: the name of the CUDA runtime that it links."""
    folder = tmp_path / "lib"
    folder.mkdir()
    toolkit = re.search(r"release (\d+)", run("nvcc", "--version"))
    assert toolkit
    (folder / "libc10_cuda.so").write_bytes(b"\x7fELF\0libc10.so\0libcudart.so.%b\0" % toolkit[1].encode())
    return folder


def test_cpu_build_of_torch_needs_no_nvcc(tmp_path: Path) -> None:
    code, words = decide(tmp_path / "auto", tmp_path, PATH="/usr/bin:/bin", CUDACXX="")
    assert code == 0 and "CUDA kernels: not built (torch is not a CUDA build)" in words
    code, words = decide(tmp_path / "wrong", tmp_path, "-DMOMENTUM_BN_CUDA=perhaps")
    assert code != 0 and "MOMENTUM_BN_CUDA must be AUTO, ON or OFF (got 'perhaps')" in words


@needs_nvcc
def test_built_where_torch_and_nvcc_are_of_one_cuda(tmp_path: Path, cuda_torch_libraries: Path) -> None:
    code, words = decide(tmp_path / "auto", cuda_torch_libraries, "-DMOMENTUM_BN_CUDA_ARCHITECTURES=80;99;90")
    assert code == 0 and "CUDA kernels: for 80 90, PTX of 90, by nvcc" in words, words
    (cuda_torch_libraries / "libc10_cuda.so").write_bytes(b"\0libcudart.so.9\0")
    code, words = decide(tmp_path / "other", cuda_torch_libraries)
    assert code == 0 and "CUDA kernels: not built (torch is built with CUDA 9, nvcc is of CUDA" in words, words
    code, words = decide(tmp_path / "off", cuda_torch_libraries, "-DMOMENTUM_BN_CUDA=OFF")
    assert code == 0 and "CUDA kernels: not built (MOMENTUM_BN_CUDA=OFF)" in words, words


@pytest.mark.sweep("CUDA kernels compiled by nvcc")
@needs_nvcc
def test_kernels_are_compiled_and_load_without_a_gpu(installed_python: Path, tmp_path: Path) -> None:
    run(
        *("cmake", "-G", "Ninja", "-S", SOURCE, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DMOMENTUM_BN_CUDA=ON", "-DMOMENTUM_BN_CUDA_ARCHITECTURES=80"),
        *("-DMOMENTUM_BN_BUILD_TESTS=OFF", "-DMOMENTUM_BN_BUILD_TRAINER=OFF"),
        # What is compiled here runs once.
        *("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0"),
    )
    run("cmake", "--build", tmp_path / "build", "--target", "momentum_bn")
    library = tmp_path / "build" / "lib" / "libmomentum_bn.so"
    assert "cuda" not in run("readelf", "--dynamic", library), "the CUDA runtime is inside the library"
    exported = run("nm", "--dynamic", "--defined-only", library)
    assert not re.search(r" _*cuda", exported), "and hidden in it"
    said, registered = use_library(installed_python, library, tmp_path)
    assert "CUDA kernels: built for compute capability 80, PTX of 80; no NVIDIA driver here" in said
    assert set(registered) == NORMALISE | {"_teacher_update_"}

    # A driver that is older than the runtime inside: torch's operations alone.
    write_driver(tmp_path / "old", 12040)
    said, registered = use_library(installed_python, library, tmp_path, LD_LIBRARY_PATH=str(tmp_path / "old"))
    assert re.search(
        r"80, PTX of 80; the driver's CUDA is 12\.4, older than the kernels' 1[3-9]\.\d: tensors on a GPU", said
    )
    assert set(registered) == {"_teacher_update_"}
    write_driver(tmp_path / "new", 99000)
    said, registered = use_library(installed_python, library, tmp_path, LD_LIBRARY_PATH=str(tmp_path / "new"))
    assert "; the driver's CUDA is 99.0\n" in said
    assert set(registered) >= NORMALISE


NORMALISE = {
    *("_advance_schedule_", "_backward", "_backward_", "_batch_statistics", "_forward_functional"),
    *("_forward_train", "_forward_train_", "_gradient_of_input", "_gradient_sums"),
}


def use_library(python: Path, library: Path, folder: Path, **variables: str) -> tuple[str, list[str]]:
    """What show_config() says after a layer was used, and the names of the operators on CUDA."""
    code = """
        import momentum_bn, torch
        print(momentum_bn.show_config())
        assert momentum_bn.MomentumBatchNorm2d(3)(torch.rand(2, 3, 4, 4)).shape == (2, 3, 4, 4)
        registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
        print(*(name.partition("::")[2] for name in registered if name.startswith("momentum_bn::")))
    """
    said = run(python, "-c", "if True:" + code, cwd=folder, MOMENTUM_BN_LIBRARY=str(library), **variables)
    return said, said.splitlines()[-1].split()


def write_driver(folder: Path, version: int) -> None:
    """A libcuda.so.1 that knows its version and no more."""
    folder.mkdir()
    (folder / "driver.c").write_text(f"int cuDriverGetVersion(int* version) {{ *version = {version}; return 0; }}")
    run("cc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "driver.c")
