"""Memory of large results on the CPU, which is kept to be used again.

The system hands memory of tens of megabytes out page by page and empties each page first, which costs more than to
normalise what goes into it. So the memory of results of 32 MB and more is kept when their tensor is freed, for the next
result of about that size, up to a limit.
"""

from __future__ import annotations

import torch

__all__ = ["kept", "limit", "release", "set_limit"]


def kept() -> int:
    """Returns the bytes kept now that no tensor uses."""
    count: int = torch.ops.momentum_bn._kept_memory()
    return count


def limit() -> int:
    """Returns the most bytes that are ever kept: 1 GiB at first."""
    count: int = torch.ops.momentum_bn._kept_memory_limit()
    return count


def set_limit(bytes: int) -> None:  # noqa: A002
    """Changes the limit and gives back what lies beyond it; 0 keeps nothing.

    Raises:
        ValueError: ``bytes`` is below 0.
    """
    torch.ops.momentum_bn._set_kept_memory_limit(bytes)


def release() -> None:
    """Gives all of it back to the system."""
    torch.ops.momentum_bn._release_kept_memory()
