"""Commands run, README blocks taken and projects built on behalf of the packaging tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Runs a command, fails the test with all of its output if it fails, and returns its standard output."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CMAKE_PREFIX_PATH")}
    # build/ was compiled through ccache where there is one: the library need not be compiled again.
    environment.setdefault("CMAKE_CXX_COMPILER_LAUNCHER", shutil.which("ccache") or "")
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\nexit code {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def readme_snippet(language: str) -> str:
    """The first code block of README.md in `language`."""
    match = re.search(rf"^```{language}\n(.*?)^```", (SOURCE / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert match, f"README.md has no {language} block"
    return match.group(1)


def build_consumer(source: Path, prefix: Path, folder: Path) -> Path:
    """Builds `source` in `folder` as a project that knows of momentum_bn only by CMAKE_PREFIX_PATH."""
    run(
        *("cmake", "-G", "Ninja", "-S", Path(__file__).parent / "consumer", "-B", folder),
        *("-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={prefix}", f"-DPython_EXECUTABLE={sys.executable}"),
        f"-DCONSUMER_SOURCE={source}",
    )
    run("cmake", "--build", folder)
    return folder / "consumer"
