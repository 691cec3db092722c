"""Commands run, README blocks taken and projects built on behalf of the packaging tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).resolve().parents[2]
CONSUMER = Path(__file__).parent / "consumer"


def attempt(*command: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command with `variables` added to its environment."""
    # Nor is it told of a make that runs these tests: its make would report the folders that it enters.
    left_out = ("PYTHONPATH", "CMAKE_PREFIX_PATH", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    # build/ was compiled through ccache where there is one: the library need not be compiled again.
    environment.setdefault("CMAKE_CXX_COMPILER_LAUNCHER", shutil.which("ccache") or "")
    environment.setdefault("CMAKE_EXECUTABLE", shutil.which("cmake") or "")
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def run(*command: str | Path, cwd: Path | None = None, **variables: str) -> str:
    """Runs a command, fails the test with all of its output if it fails, and returns its standard output."""
    result = attempt(*command, cwd=cwd, **variables)
    if result.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\nexit code {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def package_folder(python: Path) -> Path:
    """The folder of momentum_bn in an environment, which pip installed there."""
    (folder,) = python.parents[1].glob("lib/python3*/site-packages/momentum_bn")
    return folder


def cuda_kernels_line() -> str:
    """What show_config() says of CUDA kernels after a build that was asked for nothing: as docs/install.md has it."""
    nvcc = shutil.which("nvcc")
    release = re.search(r"release (\d+)", run(nvcc, "--version")) if nvcc else None
    if torch.version.cuda and release and release[1] == torch.version.cuda.partition(".")[0]:
        return "CUDA kernels: built for compute capability"
    return "CUDA kernels: not built; tensors on a GPU take the composite path"


def readme_snippet(language: str) -> str:
    """The first code block of README.md in `language`."""
    match = re.search(rf"^```{language}\n(.*?)^```", (SOURCE / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert match, f"README.md has no {language} block"
    return match.group(1)


def configure_consumer(
    folder: Path, source: Path, *, generator: str = "Ninja", **definitions: str | Path
) -> subprocess.CompletedProcess[str]:
    """Configures a project of the one file `source` in `folder`; CMake gets `definitions` and nothing else."""
    return attempt(
        *("cmake", "-G", generator, "-S", CONSUMER, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"),
        f"-DCONSUMER_SOURCE={source}",
        *(f"-D{name}={value}" for name, value in definitions.items()),
    )


def build_consumer(folder: Path, source: Path, *, generator: str = "Ninja", **definitions: str | Path) -> Path:
    """Builds such a project. Returns the program."""
    result = configure_consumer(folder, source, generator=generator, **definitions)
    if result.returncode != 0:
        pytest.fail(f"CMake: exit code {result.returncode}\n{result.stdout}{result.stderr}")
    run("cmake", "--build", folder)
    return folder / "consumer"
