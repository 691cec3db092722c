"""The options that layers and converters share, and how they are checked."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch

_check_options = torch.ops.momentum_bn._check_options.default


def as_int(name: str, value: Any) -> int:
    """Returns ``value`` as an int. Raises TypeError for what is not a whole number by type."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int (got {type(value).__name__})") from None


def as_float(name: str, value: Any) -> float:
    """Returns ``value`` as a float. Raises TypeError for what is not a number by type."""
    if not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        raise TypeError(f"{name} must be a number (got {type(value).__name__})")
    return float(value)


def as_word(value: Any) -> str:
    """Returns ``value`` as a str. What is none is an unknown word, too: the operators say which there are."""
    return value if isinstance(value, str) else repr(value)


def as_momentum(value: Any) -> float | None:
    """Returns ``value`` as a float, or None for a cumulative average."""
    return None if value is None else as_float("momentum", value)


@dataclass(frozen=True)
class Options:
    """Configuration of a layer beside what torch's BatchNorm has. See :class:`momentum_bn.MomentumBatchNorm`."""

    total_iters: int = 100
    momentum: float | None = 1.0
    views_per_update: int = 2
    schedule: str = "cosine"
    variance: str = "published"
    activation: str | None = None
    inplace: bool = False
    process_group: Any = None

    def __post_init__(self) -> None:
        """Brings numbers to their types."""
        object.__setattr__(self, "total_iters", as_int("total_iters", self.total_iters))
        object.__setattr__(self, "momentum", as_momentum(self.momentum))
        object.__setattr__(self, "views_per_update", as_int("views_per_update", self.views_per_update))
        object.__setattr__(self, "inplace", bool(self.inplace))

    def check(self, num_features: int, eps: float) -> None:
        """Checks everything that a layer is configured with.

        Raises:
            ValueError: a value or a word that is not allowed.
            TypeError: a process group of the wrong type.
            NotImplementedError: a process group.
        """
        _check_options(
            num_features,
            eps,
            self.momentum,
            self.total_iters,
            self.views_per_update,
            as_word(self.schedule),
            as_word(self.variance),
            None if self.activation is None else as_word(self.activation),
        )
        if self.process_group is not None:
            _check_process_group(self.process_group)


def _check_process_group(group: Any) -> None:
    distributed = torch.distributed
    if not (isinstance(group, str) or (distributed.is_available() and isinstance(group, distributed.ProcessGroup))):
        raise TypeError(
            f"process_group must be a c10d process group, the name of one, or None (got {type(group).__name__})"
        )
    raise NotImplementedError("process_group: statistics over several processes are not implemented yet, use None")
