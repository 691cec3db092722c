"""What the source distribution holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from installation import SOURCE, attempt

OF_CONTINUOUS_INTEGRATION = (".ci/", ".github/")


def test_holds_the_repository_and_no_more(unpacked_sdist: Path) -> None:
    """All that is not ignored, so that everything in docs/hacking.md works there; nothing that was built or trained."""
    if not shutil.which("git"):
        pytest.skip("git is not on PATH: it tells which files are the repository's")
    listed = attempt("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=SOURCE)
    if listed.returncode != 0:
        pytest.skip(f"{SOURCE} is not a clone: git tells which files are the repository's")
    expected = {
        name
        for name in listed.stdout.split("\0")
        if (SOURCE / name).is_file() and not name.startswith(OF_CONTINUOUS_INTEGRATION)
    }
    held = {str(path.relative_to(unpacked_sdist)) for path in unpacked_sdist.rglob("*") if not path.is_dir()}
    assert held == expected | {"PKG-INFO"}
