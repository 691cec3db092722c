"""Memory of a process, in MiB."""

import os
from pathlib import Path

MIB = 1 << 20
# What memory may grow by from its warm state on: a twentieth, and what an allocator may hold beside it.
SHARE, SLACK = 1.05, 24


def resident(process: int | None = None) -> float:
    """What a process has in memory now; None: this one."""
    pages = int(Path(f"/proc/{process or 'self'}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / MIB


def has_grown(warm: float, end: float) -> bool:
    return end > SHARE * warm + SLACK
