"""The C++ package as users get it: from an install tree or as a part of their own project, with any torch."""

from __future__ import annotations

import sys
import venv
from pathlib import Path

import pytest
import torch

from installation import (
    CONSUMER,
    SOURCE,
    attempt,
    build_consumer,
    configure_consumer,
    cuda_kernels_line,
    readme_snippet,
    run,
)
from other_torch import dress_as_version

TORCH = Path(torch.__path__[0])


def test_readme_cpp_with_cmake_install(install_prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "snippet.cpp").write_text(readme_snippet("cpp"))
    program = build_consumer(
        tmp_path / "build", tmp_path / "snippet.cpp", CMAKE_PREFIX_PATH=install_prefix, Python_EXECUTABLE=sys.executable
    )
    run(program)


def test_torch_package_of_a_cuda_build_fails_here(cuda_torch: Path, tmp_path: Path) -> None:
    """What the next tests are about: with such a torch find_package(Torch) ends in an error."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(asks LANGUAGES CXX)\nfind_package(Torch REQUIRED)\n"
    )
    result = attempt(
        "cmake", "-G", "Ninja", "-S", tmp_path, "-B", tmp_path / "build", f"-DTorch_DIR={cuda_torch}/share/cmake/Torch"
    )
    assert result.returncode != 0
    assert "Your installed Caffe2 version uses CUDA but I cannot find the CUDA" in " ".join(result.stderr.split())


def test_install_tree_with_a_cuda_torch(install_prefix: Path, cuda_torch: Path, tmp_path: Path) -> None:
    program = build_consumer(
        tmp_path / "build",
        CONSUMER / "main.cpp",
        CMAKE_PREFIX_PATH=f"{install_prefix};{cuda_torch}/share/cmake",
        CMAKE_DISABLE_FIND_PACKAGE_Python="ON",
    )
    assert str(cuda_torch / "lib") in run("readelf", "--dynamic", program)
    assert cuda_kernels_line() in run(program)


@pytest.mark.sweep("the library built in other ways")
def test_add_subdirectory_of_the_sdist_with_a_cuda_torch(
    unpacked_sdist: Path, cuda_torch: Path, tmp_path: Path
) -> None:
    """The whole library is compiled: away from the source tree, without Python, with a torch that insists on CUDA."""
    program = build_consumer(
        tmp_path / "build",
        CONSUMER / "main.cpp",
        MOMENTUM_BN_SOURCE=unpacked_sdist,
        Torch_DIR=cuda_torch / "share" / "cmake" / "Torch",
        CMAKE_DISABLE_FIND_PACKAGE_Python="ON",
        # What is compiled here runs once.
        CMAKE_BUILD_TYPE="Debug",
        CMAKE_CXX_FLAGS_DEBUG="-O0",
    )
    run(program)


def test_other_torch_minor_is_refused(install_prefix: Path, tmp_path: Path) -> None:
    other = dress_as_version(TORCH, tmp_path / "torch", "2.12.1")
    result = configure_consumer(
        tmp_path / "build", CONSUMER / "main.cpp", CMAKE_PREFIX_PATH=f"{install_prefix};{other}/share/cmake"
    )
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert f"was built against torch {torch.__version__.partition('+')[0]}, but torch 2.12.1 was found" in message
    assert "pip install --no-build-isolation --force-reinstall" in message and "-DTorch_DIR=" in message


def test_torch_too_old_to_build_with_is_refused(tmp_path: Path) -> None:
    old = dress_as_version(TORCH, tmp_path / "torch", "2.10.0")
    result = attempt(
        *("cmake", "-G", "Ninja", "-S", SOURCE, "-B", tmp_path / "build"), f"-DTorch_DIR={old}/share/cmake/Torch"
    )
    assert result.returncode != 0
    assert "needs torch 2.11 or newer" in " ".join(result.stderr.split())


def test_build_without_torch_names_the_way_out(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    result = attempt(
        *("cmake", "-G", "Ninja", "-S", SOURCE, "-B", tmp_path / "build"),
        f"-DPython_EXECUTABLE={tmp_path}/bare/bin/python",
    )
    assert result.returncode != 0
    assert "--no-build-isolation" in result.stderr


@pytest.mark.sweep("the library built in other ways")
def test_build_without_openmp_has_threads_and_the_same_results(installed_python: Path, tmp_path: Path) -> None:
    run(
        *("cmake", "-G", "Ninja", "-S", SOURCE, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DMOMENTUM_BN_OPENMP=OFF", "-DMOMENTUM_BN_BUILD_TESTS=OFF", "-DMOMENTUM_BN_BUILD_TRAINER=OFF"),
    )
    run("cmake", "--build", tmp_path / "build", "--target", "momentum_bn")
    library = tmp_path / "build" / "lib" / "libmomentum_bn.so"
    assert "gomp" not in run("readelf", "--dynamic", library)
    code = """
        import hashlib, os, torch, momentum_bn
        torch.set_num_threads(2)
        torch.manual_seed(0)
        layer, x = momentum_bn.MomentumBatchNorm2d(64, momentum=0.5), torch.rand(8, 64, 32, 32)
        threads = len(os.listdir("/proc/self/task"))
        y = layer(x)
        print(len(os.listdir("/proc/self/task")) - threads)
        print(hashlib.sha256(y.detach().numpy().tobytes()).hexdigest())
        print(momentum_bn.show_config())
    """
    with_openmp = run(installed_python, "-c", "if True:" + code, cwd=tmp_path).split("\n", 2)
    without = run(installed_python, "-c", "if True:" + code, cwd=tmp_path, MOMENTUM_BN_LIBRARY=str(library)).split(
        "\n", 2
    )
    assert without[:2] == with_openmp[:2]
    assert without[0] == "1", "one thread beside the main one"
    assert "CPU threads: 2, torch's own loops (built without OpenMP)" in without[2]
    assert "CPU threads: 2, OpenMP" in with_openmp[2]
