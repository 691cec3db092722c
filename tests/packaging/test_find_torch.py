"""FindTorchLibraries: what it reads off torch's own CMake files, and how it links what it finds."""

from __future__ import annotations

import re
import venv
from pathlib import Path

import pytest
import torch

from installation import CONSUMER, SOURCE, attempt, build_consumer, run
from other_torch import TARGETS

MACROS = "USE_DISTRIBUTED;USE_C10D_GLOO;USE_RPC;USE_TENSORPIPE"

ASKS = f"""
cmake_minimum_required(VERSION 3.25)
project(asks LANGUAGES NONE)
list(APPEND CMAKE_MODULE_PATH "{SOURCE}/cmake")
find_package(TorchLibraries REQUIRED)
get_target_property(definitions TorchLibraries::torch INTERFACE_COMPILE_DEFINITIONS)
message(STATUS "macros: [${{definitions}}]")
"""


def describe_torch(folder: Path, targets: str | None) -> Path:
    """`folder` becomes a torch with this Caffe2Targets.cmake, as far as FindTorchLibraries looks at one."""
    for name in ("libtorch.so", "libtorch_cpu.so", "libc10.so"):
        (folder / "lib").mkdir(parents=True, exist_ok=True)
        (folder / "lib" / name).touch()
    header = folder / "include" / "torch" / "csrc" / "api" / "include" / "torch" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 13\n#define TORCH_VERSION_PATCH 0\n")
    cmake = folder / "share" / "cmake"
    (cmake / "Torch").mkdir(parents=True)
    (cmake / "Torch" / "TorchConfig.cmake").write_text('message(FATAL_ERROR "torch\'s own package was run")\n')
    if targets is not None:
        (cmake / "Caffe2").mkdir()
        (cmake / "Caffe2" / "Caffe2Targets.cmake").write_text(targets)
    return folder


def macros(folder: Path, torch_folder: Path) -> tuple[str, str]:
    """The macros that a project gets from this torch, and what CMake writes to standard error."""
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(ASKS)
    result = attempt(
        *("cmake", "-G", "Ninja", "-S", folder, "-B", folder / "build"),
        f"-DTorch_DIR={torch_folder}/share/cmake/Torch",
    )
    assert result.returncode == 0, result.stderr
    found = re.search(r"^-- macros: \[(.*)\]$", result.stdout, re.MULTILINE)
    assert found, result.stdout
    return found[1], " ".join(result.stderr.split())


@pytest.mark.parametrize("build", ["2.11-cpu", "2.11-cuda", "2.13-cpu", "2.13-cuda", "2.14-cpu", "2.14-cuda"])
def test_macros_are_those_of_torch_cpu(build: str, tmp_path: Path) -> None:
    """The lines are torch's own, from its wheels. In CUDA builds torch_nvshmem, with one macro, precedes torch_cpu."""
    lines = (TARGETS / f"{build}.cmake").read_text()
    assert ("USE_NVSHMEM" in lines) == build.endswith("cuda")
    assert macros(tmp_path / "asks", describe_torch(tmp_path / "torch", lines)) == (MACROS, "")


def test_macros_of_the_torch_that_is_here(tmp_path: Path) -> None:
    """If torch's files look otherwise one day, this tells."""
    found, words = macros(tmp_path / "asks", Path(torch.__path__[0]))
    assert ("USE_DISTRIBUTED" in found.split(";"), words) == (torch.distributed.is_available(), "")


def test_a_torch_without_macros(tmp_path: Path) -> None:
    lines = re.sub(r"\n.*INTERFACE_COMPILE_DEFINITIONS \"USE_D.*", "", (TARGETS / "2.13-cuda.cmake").read_text())
    assert macros(tmp_path / "none", describe_torch(tmp_path / "torch_none", lines)) == ("", "")
    assert macros(tmp_path / "no_file", describe_torch(tmp_path / "torch_no_file", None)) == ("", "")


def test_a_file_that_does_not_describe_torch_cpu_is_warned_of(tmp_path: Path) -> None:
    lines = (TARGETS / "2.13-cpu.cmake").read_text().replace("torch_cpu", "torch_host")
    found, words = macros(tmp_path / "asks", describe_torch(tmp_path / "torch", lines))
    assert found == "" and "Caffe2Targets.cmake does not describe torch_cpu" in words


def test_torch_of_the_environment_that_pip_installs_into(tmp_path: Path) -> None:
    """`pip install .` builds where that environment's packages cannot be imported."""
    venv.create(tmp_path / "environment", symlinks=True)
    python = tmp_path / "environment" / "bin" / "python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    describe_torch(site_packages / "torch", (TARGETS / "2.13-cpu.cmake").read_text())
    hides = tmp_path / "hides"
    hides.mkdir()
    (hides / "sitecustomize.py").write_text(
        f"import sys\nsys.path = [p for p in sys.path if p != {str(site_packages)!r}]\n"
    )
    assert "None" in run(python, "-c", "import importlib.util as i; print(i.find_spec('torch'))", PYTHONPATH=str(hides))
    (tmp_path / "CMakeLists.txt").write_text(ASKS)
    asks = ("cmake", "-G", "Ninja", "-S", tmp_path, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={python}")
    assert f"macros: [{MACROS}]" in run(*asks, PYTHONPATH=str(hides))


@pytest.mark.parametrize("generator", ["Ninja", "Unix Makefiles"])
@pytest.mark.parametrize("name", ["my projects (ü)", "it's [50%] & more"])
def test_torch_below_a_folder_with_special_characters(
    generator: str, name: str, install_prefix: Path, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "torch").symlink_to(torch.__path__[0])
    program = build_consumer(
        folder / "build",
        CONSUMER / "main.cpp",
        generator=generator,
        CMAKE_PREFIX_PATH=install_prefix,
        Torch_DIR=folder / "torch" / "share" / "cmake" / "Torch",
    )
    assert "libtorch.so" in run("readelf", "--dynamic", program), "kept, though the program needs nothing of it itself"
    run(program)
