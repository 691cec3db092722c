"""A package with a library for each of several minor versions of torch, as `make wheel` makes one: which is taken."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from installation import CONSUMER, SOURCE, attempt, configure_consumer, package_folder, run
from other_torch import dress_as_version

MINOR = ".".join(torch.__version__.split(".")[:2])
BUILD_FROM_SOURCE = "pip install --no-build-isolation --force-reinstall --no-deps ."


@pytest.fixture
def package(installed_python: Path, tmp_path: Path) -> Path:
    """The installed package with its library in lib/torch-MINOR, and what would not load in the folders of others."""
    package = tmp_path / "momentum_bn"
    shutil.copytree(package_folder(installed_python), package, ignore=shutil.ignore_patterns("__pycache__", "cmake"))
    record = package / "_build_info.py"
    record.write_text(re.sub(r'TORCH_VERSION = ".*"', "TORCH_VERSION = None", record.read_text()))
    library = package / "lib" / "libmomentum_bn.so"
    for minor in ("2.9", "2.10", MINOR):
        folder = package / "lib" / f"torch-{minor}"
        folder.mkdir()
        (folder / library.name).write_text("not a library")
    library.rename(package / "lib" / f"torch-{MINOR}" / library.name)
    return package


def import_error(python: Path, package: Path) -> str:
    """What the import of this package says, which fails."""
    result = attempt(python, "-c", "import momentum_bn", cwd=package.parent)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: momentum_bn")
    return message


def test_the_library_of_this_torch_is_loaded(installed_python: Path, package: Path) -> None:
    code = """
        import momentum_bn, torch
        print(momentum_bn._library_path, momentum_bn.cmake_prefix_path)
        momentum_bn.MomentumBatchNorm2d(3)(torch.rand(2, 3, 4, 4))
    """
    said = run(installed_python, "-c", "if True:" + code, cwd=package.parent)
    assert said.split() == [str(package / "lib" / f"torch-{MINOR}" / "libmomentum_bn.so"), str(package)]


def test_torch_that_has_no_library(installed_python: Path, package: Path) -> None:
    shutil.rmtree(package / "lib" / f"torch-{MINOR}")
    message = import_error(installed_python, package)
    assert f"has libraries for torch 2.9, 2.10, but torch {torch.__version__} is installed" in message
    assert BUILD_FROM_SOURCE in message


def test_torch_that_was_built_otherwise(installed_python: Path, package: Path, tmp_path: Path) -> None:
    """With another C++ ABI the version is the same, but functions that take a string have other names."""
    library = package / "lib" / f"torch-{MINOR}" / "libmomentum_bn.so"
    source = tmp_path / "other_abi.cpp"
    source.write_text("namespace c10 { void function_of_this_torch(const char*); }\n"
                      "struct Load { Load() { c10::function_of_this_torch(nullptr); } } load;\n")  # fmt: skip
    run("c++", "-shared", "-fPIC", source, "-o", library)
    message = import_error(installed_python, package)
    assert str(library) in message and "function_of_this_torch" in message
    assert f"libraries for PyPI's builds of torch 2.9, 2.10, {MINOR}" in message
    assert BUILD_FROM_SOURCE in message


@pytest.fixture
def cmake_package(tmp_path: Path) -> Path:
    """The CMake files of such a package; those of each library only say that they were taken."""
    prefix = tmp_path / "momentum_bn"
    for minor in ("2.9", "2.10", MINOR):
        inner = prefix / "lib" / f"torch-{minor}" / "cmake" / "momentum_bn" / "momentum_bn-config.cmake"
        inner.parent.mkdir(parents=True)
        inner.write_text(
            f'message(STATUS "taken: {minor}")\nadd_library(momentum_bn::momentum_bn INTERFACE IMPORTED)\n'
        )
    outer = prefix / "lib" / "cmake" / "momentum_bn"
    outer.mkdir(parents=True)
    shutil.copy(SOURCE / "cmake" / "several_torches-config.cmake", outer / "momentum_bn-config.cmake")
    shutil.copy(SOURCE / "cmake" / "FindTorchLibraries.cmake", outer)
    (outer / "momentum_bn-config-version.cmake").write_text(
        'set(PACKAGE_VERSION "1.2.3")\nset(PACKAGE_VERSION_COMPATIBLE TRUE)\n'
    )
    return prefix


def test_cmake_takes_the_library_of_the_torch_that_it_finds(cmake_package: Path, tmp_path: Path) -> None:
    result = configure_consumer(
        tmp_path / "build",
        CONSUMER / "main.cpp",
        CMAKE_PREFIX_PATH=cmake_package,
        Torch_DIR=Path(torch.__path__[0]) / "share" / "cmake" / "Torch",
    )
    assert f"taken: {MINOR}\n" in result.stdout and result.stdout.count("taken") == 1


def test_cmake_and_a_torch_that_has_no_library(cmake_package: Path, tmp_path: Path) -> None:
    other = dress_as_version(Path(torch.__path__[0]), tmp_path / "torch", "2.99.1")
    result = configure_consumer(
        tmp_path / "build",
        CONSUMER / "main.cpp",
        CMAKE_PREFIX_PATH=cmake_package,
        Torch_DIR=other / "share" / "cmake" / "Torch",
    )
    words = " ".join(result.stderr.split())
    assert result.returncode != 0
    assert f"momentum_bn 1.2.3 has libraries for torch 2.9, 2.10, {MINOR}, but torch 2.99.1 was found" in words
    assert BUILD_FROM_SOURCE in words
