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
        ImportError: the library was built against another minor version of torch, or cannot be loaded, or another copy
            of it is loaded already (two would register the same operators, at which torch ends the process).
    """
    version, torch_version = built_as()
    if torch_version is not None and _minor(torch_version) != _minor(torch.__version__):
        raise ImportError(
            f"momentum_bn {version} was built against torch {torch_version}, but torch {torch.__version__} is "
            "installed. Reinstall it with the torch that it shall run with: "
            "pip install --no-build-isolation --force-reinstall --no-deps ."
        )
    if hasattr(torch.ops.momentum_bn, "_show_config"):
        _check_same_copy(path)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"momentum_bn: cannot load {path} with torch {torch.__version__}: {error}") from error


def _check_same_copy(path: Path) -> None:
    loaded = _loaded_files()
    if any(file.samefile(path) for file in loaded):
        return
    others = [str(file) for file in loaded if "momentum_bn" in file.name] or ["a library of this process"]
    raise ImportError(
        f"momentum_bn: another copy of its operators is loaded already, {', '.join(others)}; this package would load "
        f"{path}. A process can have one of them: build C++ extensions against the package's own library "
        "(find_package(momentum_bn) with momentum_bn.cmake_prefix_path), or name the loaded one in "
        f"{LIBRARY_VARIABLE}."
    )


def _loaded_files() -> list[Path]:
    """The files that this process has mapped into memory, as far as the system tells and they are still there."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    names = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return sorted(path for path in map(Path, names) if path.is_file())


def _minor(version: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+", version)[:2])
