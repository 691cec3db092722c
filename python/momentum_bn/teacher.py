"""The momentum teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._options import as_float, as_int
from .convert import convert_momentum_batchnorm

__all__ = ["MomentumTeacher"]

_teacher_param_momentum = torch.ops.momentum_bn._teacher_param_momentum.default
_teacher_update_ = torch.ops.momentum_bn._teacher_update_.default

_NEED_MASTER = (torch.bfloat16, torch.float16)


class MomentumTeacher(torch.nn.Module):
    """A teacher whose parameters follow a student's and whose Momentum BatchNorms keep statistics of their own.

    The teacher of `Momentum^2 Teacher <https://arxiv.org/abs/2101.07525>`_. It starts as a copy of the student; every
    BatchNorm in it is a Momentum BatchNorm. Update number t (from 0) averages the parameters::

        teacher = p * teacher + (1 - p) * student
        p = 1 - (1 - param_momentum) * (cos(pi * min(t, total_iters) / total_iters) + 1) / 2

    Parameters are paired in order. Where the teacher's are bfloat16 or float16, float32 master copies are averaged and
    the parameters are their rounding: an average in 16 bits would stand still. Buffers do not follow the student's: the
    layers keep statistics of the teacher's own activations, so run it in training mode.

    The student is referenced, not registered: it is in neither ``parameters()`` nor ``state_dict()``, a deep copy
    follows the same student, and a pickle has none (pass one to :meth:`update` then).

    Args:
        student: the network to follow, without its predictor. It is copied once and never changed. Of a
            ``DistributedDataParallel`` the network inside is copied.
        total_iters: updates of both schedules, T; at least 1.
        param_momentum: weight of the teacher's own parameters in the first update, in [0, 1].
        **options: passed to :func:`momentum_bn.convert_momentum_batchnorm`.

    Attributes:
        module: the teacher network. Its parameters take no gradient.
        updates: int64 buffer, updates so far.

    State: the network's under ``module.``, ``updates``, and for each 16-bit parameter its master as the buffer
    ``master/`` and the parameter's name with ``/`` for ``.``.

    Raises:
        ValueError: an argument out of range, or a layer that cannot be converted.

    Example:
        >>> teacher = MomentumTeacher(encoder, total_iters=epochs * len(loader))
        >>> for view1, view2 in loader:
        ...     teacher.update()
        ...     k1, k2 = teacher(view1), teacher(view2)
    """

    updates: Tensor
    module: torch.nn.Module

    def __init__(
        self, student: torch.nn.Module, total_iters: int, param_momentum: float = 0.99, **options: Any
    ) -> None:
        """See the class."""
        super().__init__()
        self._total_iters = as_int("total_iters", total_iters)
        self._initial_param_momentum = as_float("param_momentum", param_momentum)
        _teacher_param_momentum(0, self._total_iters, self._initial_param_momentum)
        if not isinstance(student, torch.nn.Module):
            raise TypeError(f"student must be a torch.nn.Module (got {type(student).__name__})")
        # Past Module.__setattr__, which would register it.
        self.__dict__["_student"] = student
        self.module = convert_momentum_batchnorm(_copy_of(student), self._total_iters, **options)
        self.module.requires_grad_(False)
        device = next((parameter.device for parameter in self.module.parameters()), None)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        self._refresh_masters()

    @property
    def student(self) -> torch.nn.Module | None:
        """The network that :meth:`update` follows; None after unpickling."""
        student: torch.nn.Module | None = self.__dict__["_student"]
        return student

    @property
    def total_iters(self) -> int:
        """Updates of the parameters' schedule, T."""
        return self._total_iters

    @property
    def param_momentum(self) -> float:
        """Weight of the teacher's own parameters in the next update. Reading it may wait for a GPU."""
        momentum: float = _teacher_param_momentum(
            int(self.updates.item()), self._total_iters, self._initial_param_momentum
        )
        return momentum

    @torch.no_grad()
    def update(self, student: torch.nn.Module | None = None) -> None:
        """Moves the parameters towards the student's. Call it before the teacher's forwards of a step.

        Args:
            student: another network to follow this time, with parameters of the same count, order and shapes.

        Raises:
            ValueError: the parameters do not pair, or there is no student. Nothing was changed then.
        """
        if student is None:
            student = self.student
            if student is None:
                raise ValueError("student is missing: a pickled teacher forgets it, call update(student)")
        named = list(self.module.named_parameters())
        theirs = list(student.named_parameters())
        _check_pairs(named, theirs)
        self._refresh_masters()
        masters = self._masters()
        none_needed = self.updates.new_empty(0, dtype=torch.float32)
        _teacher_update_(
            [_shard_of(parameter) for _, parameter in named],
            [_shard_of(masters.get(name, none_needed)) for name, _ in named],
            [_shard_of(parameter) for _, parameter in theirs],
            self.updates,
            self._total_iters,
            self._initial_param_momentum,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the teacher network under ``torch.no_grad()``."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def _masters(self) -> dict[str, Tensor]:
        """The masters under the names of their parameters."""
        buffers = {name: self._buffers.get(_master_name(name)) for name, _ in self.module.named_parameters()}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}

    @torch.no_grad()
    def _refresh_masters(self, precise: dict[str, Tensor] | None = None) -> None:
        """Makes a master for each 16-bit parameter that has none, and dissolves those of wider parameters.

        Args:
            precise: values from before parameters were cast, where there are better ones than theirs.
        """
        precise = precise or {}
        masters = self._masters()
        for name, parameter in self.module.named_parameters():
            if parameter.dtype in _NEED_MASTER:
                if name not in masters:
                    value = precise.get(name, parameter)
                    self.register_buffer(
                        _master_name(name), value.detach().to(parameter.device, torch.float32, copy=True)
                    )
            elif name in masters:
                parameter.copy_(masters[name])
                delattr(self, _master_name(name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MomentumTeacher:
        """Casts or moves everything, but keeps the masters in float32 and the counter as it is."""
        masters, updates = self._masters(), self.updates
        precise = {name: masters.get(name, parameter.detach()) for name, parameter in self.module.named_parameters()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._restore(updates, masters, precise)
        return self

    @torch.no_grad()
    def _restore(self, updates: Tensor, masters: dict[str, Tensor], precise: dict[str, Tensor]) -> None:
        self.updates = _moved(updates, self.updates)
        for name, parameter in self.module.named_parameters():
            if name not in masters:
                continue
            master = _moved(masters[name], self.get_buffer(_master_name(name)))
            self.register_buffer(_master_name(name), master)
            if not master.is_meta:
                parameter.copy_(master)  # its rounding in the new dtype, not the rounding of a rounding
        self._refresh_masters({name: value for name, value in precise.items() if not value.is_meta})

    def __deepcopy__(self, memo: dict[int, Any]) -> MomentumTeacher:
        """Copies everything but the student."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        # Where the student was copied before, as part of the same whole, the copy follows that copy.
        copied.__dict__["_student"] = memo.get(id(self.student), self.student)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a pickle holds: all but the student."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state["_student"] = None
        return state


def _master_name(parameter_name: str) -> str:
    return "master/" + parameter_name.replace(".", "/")  # a buffer's name may have no dots


def _copy_of(student: torch.nn.Module) -> torch.nn.Module:
    if isinstance(student, torch.nn.parallel.DistributedDataParallel):
        student = student.module  # the teacher takes no gradient, so has nothing to be averaged
    # Process groups cannot be copied; the teacher's layers need none.
    groups = (getattr(layer, "process_group", None) for layer in student.modules())
    return copy.deepcopy(student, {id(group): group for group in groups if group is not None})


def _check_pairs(teacher: list[tuple[str, torch.nn.Parameter]], student: list[tuple[str, torch.nn.Parameter]]) -> None:
    if len(teacher) != len(student):
        raise ValueError(
            f"student must have as many parameters as the teacher, {len(teacher)} (got {len(student)}); "
            "leave out what the teacher does not have, such as the predictor"
        )
    for (our_name, ours), (their_name, theirs) in zip(teacher, student, strict=True):
        if ours.shape != theirs.shape:
            raise ValueError(
                f"student's parameter {their_name} must have the shape of the teacher's {our_name}, "
                f"{list(ours.shape)} (got {list(theirs.shape)})"
            )
        our_shard, their_shard = _shard_of(ours), _shard_of(theirs)
        if (our_shard is not ours or their_shard is not theirs) and our_shard.shape != their_shard.shape:
            raise ValueError(
                f"student's parameter {their_name} must be sharded as the teacher's {our_name} (got a shard of "
                f"{list(their_shard.shape)} for one of {list(our_shard.shape)}): use fully_shard(..., "
                "reshard_after_forward=True) on both"
            )


def _shard_of(tensor: Tensor) -> Tensor:
    """What this process has of a DTensor; any other tensor itself."""
    if type(tensor) in (Tensor, torch.nn.Parameter) or not hasattr(tensor, "to_local"):
        return tensor
    shard: Tensor = tensor.to_local()
    return shard


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """``before`` with its dtype where ``after`` is; in ``after``'s memory, where that has the dtype."""
    if before.is_meta and not after.is_meta:
        return torch.zeros_like(before, device=after.device)
    if after is before or after.dtype != before.dtype:
        return before.to(after.device)
    return after.copy_(before)
