"""The options that layers and converters share, and how they are checked."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from typing_extensions import TypedDict  # torch needs it, too

Schedule = Literal["cosine", "constant"]
Variance = Literal["published", "unbiased", "biased"]
Activation = Literal["relu"]

_check_options = torch.ops.momentum_bn._check_options.default
_check_process_group = torch.ops.momentum_bn._check_process_group.default


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


def as_bool(name: str, value: Any) -> bool:
    """Returns ``value`` as a bool. Raises TypeError for what is not True or False: ``"no"`` would be true."""
    # 1 and 0 are taken, as torch's layers take them.
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise TypeError(f"{name} must be True or False (got {value!r})")


def as_word(value: Any) -> str:
    """Returns ``value`` as a str. What is none is an unknown word, too: the operators say which there are."""
    return value if isinstance(value, str) else repr(value)


def as_momentum(value: Any) -> float | None:
    """Returns ``value`` as a float, or None for a cumulative average."""
    return None if value is None else as_float("momentum", value)


def as_group_name(group: Any) -> str | None:
    """Returns the name of a process group: it stands for the group, which could be neither copied nor pickled.

    Raises:
        TypeError: neither a process group nor a name, nor None.
        ValueError: a group that this process does not belong to.
        NotImplementedError: torch was built without torch.distributed.
    """
    if group is None:
        return None
    distributed = torch.distributed
    if distributed.is_available():
        if isinstance(group, distributed.ProcessGroup):
            group = group.group_name
        elif isinstance(group, int) and group == distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group must be a group that this process belongs to (got NON_GROUP_MEMBER)")
    if not isinstance(group, str):
        raise TypeError(
            f"process_group must be a c10d process group, the name of one, or None (got {type(group).__name__})"
        )
    _check_process_group(group)
    return group


class TeacherOptions(TypedDict, total=False):
    """What :class:`momentum_bn.MomentumTeacher` makes its layers with. See :class:`momentum_bn.MomentumBatchNorm`."""

    momentum: float | None
    views_per_update: int
    schedule: Schedule
    variance: Variance
    inplace: bool
    process_group: torch.distributed.ProcessGroup | str | None
    detach_statistics: bool


class ConvertOptions(TeacherOptions, total=False):
    """What :func:`momentum_bn.convert_momentum_batchnorm` makes layers with."""

    activation: Activation | None


def check_option_names(caller: str, options: ConvertOptions | TeacherOptions, allowed: type) -> None:
    """Checks keyword arguments against a class of options. Raises TypeError for one that this class does not have."""
    names: frozenset[str] = allowed.__optional_keys__  # type: ignore[attr-defined]
    for name in options:
        if name not in names:
            raise TypeError(
                f"{caller}() got an unexpected keyword argument {name!r}; its options are {', '.join(sorted(names))}"
            )


@dataclass(frozen=True)
class Options:
    """Configuration of a layer beside what torch's BatchNorm has. See :class:`momentum_bn.MomentumBatchNorm`.

    ``process_group`` is given as a group or its name, and kept as its name.
    """

    total_iters: int = 100
    momentum: float | None = 1.0
    views_per_update: int = 2
    schedule: Schedule = "cosine"
    variance: Variance = "published"
    activation: Activation | None = None
    inplace: bool = False
    process_group: Any = None
    detach_statistics: bool = True

    def __post_init__(self) -> None:
        """Brings numbers to their types, and a process group to its name."""
        object.__setattr__(self, "total_iters", as_int("total_iters", self.total_iters))
        object.__setattr__(self, "momentum", as_momentum(self.momentum))
        object.__setattr__(self, "views_per_update", as_int("views_per_update", self.views_per_update))
        object.__setattr__(self, "inplace", as_bool("inplace", self.inplace))
        object.__setattr__(self, "detach_statistics", as_bool("detach_statistics", self.detach_statistics))
        object.__setattr__(self, "process_group", as_group_name(self.process_group))

    def check(self, num_features: int, eps: float) -> None:
        """Checks everything that a layer is configured with.

        Raises:
            ValueError: a value or a word that is not allowed.
        """
        _check_options(
            num_features,
            eps,
            self.momentum,
            self.total_iters,
            self.views_per_update,
            as_word(self.schedule),
            as_word(self.variance),
            self.detach_statistics,
            None if self.activation is None else as_word(self.activation),
        )
