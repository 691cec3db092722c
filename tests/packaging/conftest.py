"""The package installed as users install it, by pip and by CMake, away from the source tree."""

from __future__ import annotations

import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from installation import SOURCE, run


@pytest.fixture(scope="session")
def installed_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that had torch, into which `pip install .` then put the package.

    torch and the build backend are this environment's. pip gets no index: whatever it would download is an error.
    """
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    visible = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    visible.update(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
    (site_packages / "has_torch.pth").write_text("\n".join(sorted(visible)) + "\n")
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"),
        *("--no-build-isolation", SOURCE),
    )
    return python


@pytest.fixture(scope="session")
def install_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which CMake installed the library of build/."""
    prefix = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", SOURCE / "build", "--prefix", prefix, "--component", "library")
    return prefix
