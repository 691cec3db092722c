"""Creates a virtual environment with torch in it: `create_venv.py FOLDER [TORCH_REQUIREMENT]`.

With TORCH_REQUIREMENT (as `torch==2.14.1`) pip installs that torch into it. Without, the environment uses the torch of
the Python that runs this, if that is new enough, and otherwise pip installs DEFAULT_TORCH. Needs nothing but the
standard library.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

MINIMUM_PYTHON = (3, 10)
MINIMUM_TORCH = (2, 11)
DEFAULT_TORCH = "torch==2.13.0"


def has_torch() -> bool:
    """Whether this Python has a torch of at least MINIMUM_TORCH, found without importing it."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= MINIMUM_TORCH


def create(folder: Path, *, share_packages: bool) -> Path:
    """Makes the environment, empty or with this Python's packages visible in it. Returns its interpreter."""
    venv.create(folder, clear=True, with_pip=True, symlinks=True, system_site_packages=share_packages)
    if share_packages and sys.prefix != sys.base_prefix:
        # This Python is itself of a virtual environment, which system_site_packages passes over.
        variables = {"base": str(folder), "platbase": str(folder)}
        site_packages = Path(sysconfig.get_path("purelib", "venv", variables))
        shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site_packages / "active_environment.pth").write_text("\n".join(sorted(shared)) + "\n")
    return folder / "bin" / "python"


def main() -> None:
    """Creates the environment and makes sure that torch can be imported there."""
    folder, requested = Path(sys.argv[1]), sys.argv[2:]
    if sys.version_info < MINIMUM_PYTHON:
        sys.exit(f"error: Python {sys.version.split()[0]} at {sys.executable}: 3.10 or newer is needed")
    torch_requirement = requested[0] if requested else DEFAULT_TORCH
    share_packages = not requested and has_torch()
    origin = f"torch of {sys.prefix}" if share_packages else torch_requirement
    print(f"-- creating {folder} with {origin}", flush=True)
    python = create(folder, share_packages=share_packages)
    if not share_packages:
        subprocess.run([python, "-m", "pip", "install", "-qq", torch_requirement], check=True)
    subprocess.run([python, "-W", "ignore", "-c", "import torch"], check=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {' '.join(map(str, error.cmd))} failed")
