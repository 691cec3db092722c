"""Memory allocators that a benchmark runs with: chosen by the environment, so each needs a process of its own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

DEFAULT = "default"
TUNED_GLIBC = "tuned glibc"
TCMALLOC = "tcmalloc"
JEMALLOC = "jemalloc"
TUNED = (TUNED_GLIBC, TCMALLOC, JEMALLOC)

_KEPT_BYTES = 16 << 30
# Large blocks come from the heap, which is never given back, and in huge pages: no page faults after the first use.
# https://sourceware.org/glibc/manual/2.36/html_node/Memory-Allocation-Tunables.html
_GLIBC_TUNABLES = ":".join(
    [
        f"glibc.malloc.mmap_threshold={_KEPT_BYTES}",
        f"glibc.malloc.trim_threshold={_KEPT_BYTES}",
        f"glibc.malloc.top_pad={64 << 20}",
        "glibc.malloc.hugetlb=1",
    ]
)


def environment(allocator: str) -> dict[str, str] | None:
    """Returns the variables that choose an allocator for a new process; None where the machine does not have it.

    ``default`` is what this process runs with, whatever that is.
    """
    if allocator == DEFAULT:
        return {}
    if allocator == TUNED_GLIBC:
        return {"GLIBC_TUNABLES": _GLIBC_TUNABLES} if platform.libc_ver()[0] == "glibc" else None
    library = _installed_library(allocator)
    return {"LD_PRELOAD": library} if library else None


def describe(variables: Mapping[str, str] = os.environ) -> str:
    """Returns the name of the allocator that a process with these environment variables has, and how it is tuned."""
    preloaded = [Path(name).name for name in variables.get("LD_PRELOAD", "").split(":") if name]
    tuned = [f"{key}={variables[key]}" for key in sorted(variables) if key.startswith(("MALLOC_", "GLIBC_TUNABLES"))]
    libc = "malloc of " + (" ".join(platform.libc_ver()).strip() or platform.system())
    return " ".join([*(preloaded or [libc]), *tuned])


def _installed_library(name: str) -> str | None:
    """The path of a shared library that the dynamic linker knows, by the beginning of its name."""
    ldconfig = shutil.which("ldconfig", path=os.environ.get("PATH", "") + ":/sbin:/usr/sbin")
    if ldconfig is None:
        return None
    lines = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=False).stdout.splitlines()
    return next((line.split("=>")[1].strip() for line in lines if line.strip().startswith(f"lib{name}")), None)
