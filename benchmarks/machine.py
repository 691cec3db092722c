"""What a benchmark was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import momentum_bn


def machine() -> dict[str, str]:
    """Returns processor, caches, threads, torch, huge pages and what of momentum_bn runs, by name."""
    return {
        "processor": _processor(),
        "caches": _caches(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "torch": f"{torch.__version__}, Python {platform.python_version()}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "transparent huge pages": _transparent_huge_pages(),
        "momentum_bn": "; ".join(momentum_bn.show_config().split("\n")).strip("; "),
    }


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _caches() -> str:
    """The sizes of the first core's caches for data, for example ``L1 32K, L2 1024K, L3 32768K``."""
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_first_line(folder / name) for name in ("level", "type", "size"))
        if level and size and kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found) or "unknown"


def _transparent_huge_pages() -> str:
    """The setting that is in force, for example ``madvise``."""
    words = (_first_line(Path("/sys/kernel/mm/transparent_hugepage/enabled")) or "").split()
    return next((word.strip("[]") for word in words if word.startswith("[")), "unknown")
