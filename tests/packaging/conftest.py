"""The package installed as users install it, by pip and by CMake, away from the source tree."""

from __future__ import annotations

import fcntl
import os
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import torch

from installation import SOURCE, run
from other_torch import dress_as_cuda_build

# Users have such folders: what CMake, pip and the linker are given is below one.
FOLDER_NAME = "my projects (ü)"


@pytest.fixture(scope="session")
def cuda_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a torch whose CMake files insist on a CUDA toolkit and find none."""
    return dress_as_cuda_build(
        Path(torch.__path__[0]), tmp_path_factory.mktemp(FOLDER_NAME) / "site-packages" / "torch"
    )


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run of pytest have."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= FOLDER_NAME
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def installed_python(shared_folder: Path) -> Path:
    """The interpreter of an environment that had torch, into which `pip install .` then put the package.

    torch is one that insists on CUDA (the ordinary one serves build/), the build backend is this environment's. pip
    gets no index: whatever it would download is an error. One worker makes the environment, and the others wait for it.
    """
    python, made = shared_folder / "environment" / "bin" / "python", shared_folder / "made"
    with (shared_folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            install_package(shared_folder)
            made.touch()
    return python


def install_package(folder: Path) -> None:
    """Makes the environment `environment` and its torch in `folder`."""
    venv.create(folder / "environment", symlinks=True, clear=True)
    python = folder / "environment" / "bin" / "python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    dress_as_cuda_build(Path(torch.__path__[0]), site_packages / "torch")
    visible = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    visible.update(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    (site_packages / "more_packages.pth").write_text("\n".join(sorted(visible)) + "\n")
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"),
        *("--no-build-isolation", "--no-deps", SOURCE),
        # The same headers under the name that ccache knows.
        *("-C", f"cmake.define.TorchLibraries_INCLUDE_DIR={Path(torch.__path__[0]) / 'include'}"),
    )


@pytest.fixture(scope="session")
def install_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which CMake installed the library of build/."""
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", SOURCE / "build", "--prefix", prefix, "--component", "library")
    return prefix


@pytest.fixture(scope="session")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the source distribution of this tree unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", code, folder, cwd=SOURCE).splitlines()[-1]
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    return folder / name.removesuffix(".tar.gz")
