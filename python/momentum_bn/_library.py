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
# Of a wheel that has a library for each of several minor versions of torch: lib/torch-2.13/libmomentum_bn.so.
_TORCH_FOLDER = "torch-"
_BUILD_FROM_SOURCE = "pip install --no-build-isolation --force-reinstall --no-deps ."


def built_as() -> tuple[str, str | None]:
    """Returns the version of momentum_bn and the version of torch that it was built against.

    A wheel with libraries for several has None for the second. A source tree that CMake did not install has no such
    record: ``("0+source", None)``.
    """
    try:
        record = importlib.import_module("._build_info", __package__)
    except ModuleNotFoundError:
        return "0+source", None
    return record.VERSION, record.TORCH_VERSION


def find_library(folders: Iterable[str]) -> Path:
    """Returns the path of the shared library.

    Args:
        folders: the package's folders (an editable installation has several); the library lies in ``lib`` of one, or
            below that, in the folder of the torch that it was built against.

    Raises:
        ImportError: none of them has it, none is for this torch, or the file that the variable MOMENTUM_BN_LIBRARY
            names is missing.
    """
    override = os.environ.get(LIBRARY_VARIABLE)
    library_folders = [] if override else [Path(folder) / "lib" for folder in folders]
    candidates = [Path(override)] if override else [folder / name for folder in library_folders for name in _FILE_NAMES]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    for folder in library_folders:
        if _torches_in(folder):
            return _the_one_for_this_torch(folder).resolve()
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
            f"installed. Reinstall it with the torch that it shall run with: {_BUILD_FROM_SOURCE}"
        )
    if hasattr(torch.ops.momentum_bn, "_show_config"):
        _check_same_copy(path)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        there = _torches_in(path.parents[1])
        reason = error.__cause__ or error  # torch wraps what the loader says in words that leave it out
        raise ImportError(
            f"momentum_bn: cannot load {path} with torch {torch.__version__}: {reason}. "
            + (f"The package has libraries for PyPI's builds of torch {', '.join(there)}. " if there else "")
            + "If this torch is built otherwise (with another C++ ABI, say), build momentum_bn with it, in the folder "
            f"of its sources: {_BUILD_FROM_SOURCE}"
        ) from error


def prefix_of(library: Path) -> Path:
    """Returns the folder that CMake installed the library below: the one that has ``lib``."""
    return library.parents[2 if library.parent.name.startswith(_TORCH_FOLDER) else 1]


def _torches_in(library_folder: Path) -> list[str]:
    """The minor versions of torch that a wheel has libraries for, as "2.13", in rising order; else none."""
    libraries = library_folder.glob(f"{_TORCH_FOLDER}*/{_FILE_NAMES[0]}")
    minors = (path.parent.name.removeprefix(_TORCH_FOLDER) for path in libraries)
    return sorted(minors, key=lambda minor: [int(number) for number in _minor(minor)])


def _the_one_for_this_torch(library_folder: Path) -> Path:
    # The version decides, not whether a library can be loaded: that would not show that torch's classes are the same.
    minor = ".".join(_minor(torch.__version__))
    there = _torches_in(library_folder)
    if minor not in there:
        raise ImportError(
            f"momentum_bn {built_as()[0]} has libraries for torch {', '.join(there)}, but torch {torch.__version__} is "
            "installed. Install one of these, or build momentum_bn with this one, in the folder of its sources: "
            f"{_BUILD_FROM_SOURCE}"
        )
    return library_folder / f"{_TORCH_FOLDER}{minor}" / _FILE_NAMES[0]


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
