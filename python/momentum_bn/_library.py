"""Finds and loads the shared library that holds the operators."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch

LIBRARY_VARIABLE = "MOMENTUM_BN_LIBRARY"
_FILE_NAMES = ("libmomentum_bn.so", "libmomentum_bn.dylib")


def built_as() -> tuple[str, str | None]:
    """Returns the version of momentum_bn and the version of torch that it was built against.

    A source tree that CMake did not install has no such record: ``("0+source", None)``.
    """
    try:
        record = importlib.import_module("._build_info", __package__)
    except ModuleNotFoundError:
        return "0+source", None
    return record.VERSION, record.TORCH_VERSION


def find_library(folders: Iterable[str]) -> Path:
    """Returns the path of the shared library.

    Args:
        folders: the package's folders (an editable installation has several); the library lies in ``lib`` of one.

    Raises:
        ImportError: none of them has it, or the file that the variable MOMENTUM_BN_LIBRARY names is missing.
    """
    override = os.environ.get(LIBRARY_VARIABLE)
    if override:
        candidates = [Path(override)]
    else:
        candidates = [Path(folder) / "lib" / name for folder in folders for name in _FILE_NAMES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    raise ImportError(
        "momentum_bn: its shared library is missing, looked for "
        + ", ".join(map(str, candidates))
        + f". Install the package (pip install --no-build-isolation .) or set {LIBRARY_VARIABLE} to the library's path."
    )


def load_library(path: Path) -> None:
    """Loads the operators into ``torch.ops.momentum_bn``.

    Raises:
        ImportError: the library was built against another minor version of torch, or cannot be loaded.
    """
    version, torch_version = built_as()
    if torch_version is not None and _minor(torch_version) != _minor(torch.__version__):
        raise ImportError(
            f"momentum_bn {version} was built against torch {torch_version}, but torch {torch.__version__} is "
            "installed. Reinstall it with the torch that it shall run with: "
            "pip install --no-build-isolation --force-reinstall --no-deps ."
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"momentum_bn: cannot load {path} with torch {torch.__version__}: {error}") from error


def _minor(version: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", version)[:2])
