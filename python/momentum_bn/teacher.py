"""The momentum teacher."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Unpack

from ._options import TeacherOptions, as_bool, as_float, as_int, check_option_names
from .convert import Network, convert_momentum_batchnorm
from .fuse import fuse_parts, fused_layers, unfuse
from .momentum_batch_norm import MomentumBatchNorm, checked_total_iters

__all__ = ["MomentumTeacher", "set_total_iters"]

_teacher_param_momentum = torch.ops.momentum_bn._teacher_param_momentum.default
_teacher_update_ = torch.ops.momentum_bn._teacher_update_.default

_NEED_MASTER = (torch.bfloat16, torch.float16)


class MomentumTeacher(torch.nn.Module, Generic[Network]):
    """A teacher whose parameters follow a student's and whose Momentum BatchNorms keep statistics of their own.

    The teacher of `Momentum^2 Teacher <https://arxiv.org/abs/2101.07525>`_. It starts as a copy of the student, in
    training mode; every BatchNorm in it is a Momentum BatchNorm, whose running statistics start as the student's and
    whose schedule starts anew. Update number t (from 0) averages the parameters::

        teacher = p * teacher + (1 - p) * student
        p = 1 - (1 - param_momentum) * (cos(pi * min(t, total_iters) / total_iters) + 1) / 2

    Parameters are paired in order, whatever their names. Where the teacher's are bfloat16 or float16, float32 master
    copies are averaged and the parameters are their rounding: an average in 16 bits would stand still. A parameter that
    was loaded or assigned, and so is not its master's rounding any more, gives its master a new value at the next
    update or cast. Buffers do not follow the student's: the layers keep statistics of the teacher's own activations, so
    run it in training mode. Its Dropout and DropPath are active then, too.

    The student is referenced, not registered: it is in neither ``parameters()`` nor ``state_dict()``. In a deep copy or
    pickle of a module that holds student (or the parts of which it is made) and teacher, the copied teacher follows the
    copied student. A teacher that is copied alone follows the same student; one that is pickled alone takes the student
    with it.

    Args:
        student: the network to follow, without its predictor. It is copied once and never changed. Where it is wrapped
            by ``DistributedDataParallel`` or ``torch.compile``, the network inside is copied.
        total_iters: updates of both schedules, T; at least 1: the optimizer steps of the whole training, as of a
            learning-rate schedule.
        param_momentum: weight of the teacher's own, old parameters in the first update, in [0, 1]; it grows to 1. (The
            layers' ``momentum`` is the weight of the new batch, and falls to 0.)
        teacher: a network of yours to use in place of a copy, with as many parameters of the same shapes, none of them
            the student's. It is taken as it is, parameters and running statistics too; its BatchNorms are converted.
        statistics: ``"own"``: as above. ``"student"``: the teacher of `EMAN <https://arxiv.org/abs/2101.08482>`_, for
            comparison: its BatchNorms stay what they are, in evaluation mode, and normalise by running statistics that
            follow the student's by the same average as the parameters (``num_batches_tracked`` is copied). It takes
            no options.
        fuse: whether the layers do the ReLUs and additions that follow them in their own pass, and take memory that
            nobody reads again (:func:`momentum_bn.fuse`): in the whole network, or where its forward cannot be traced
            in the largest modules inside that can be. No result depends on it, but for a rounding in 16 bits.
        **options: ``momentum`` (the layers', of the batch), ``views_per_update``, ``schedule``, ``variance``,
            ``inplace``, ``process_group`` and ``detach_statistics`` of :class:`momentum_bn.MomentumBatchNorm`, for
            every layer. Layers that are Momentum BatchNorm already keep what is not given. ``inplace`` promises that
            the network reads no layer's input again.

    Attributes:
        module: the teacher network. Its parameters take no gradient.
        updates: int64 buffer, updates so far.

    State: the network's under ``module.``, ``updates``, and for each 16-bit parameter its master as the buffer
    ``master/`` and the parameter's name with ``/`` for ``.``.

    Warns:
        UserWarning: once per teacher, where the training forwards between two updates are not ``views_per_update``, so
            that the layers' schedule does not keep pace with the parameters'.

    Raises:
        ValueError: an argument out of range, a layer that cannot be converted, options for a network without BatchNorm,
            a ``teacher`` that does not pair with the student or shares parameters with it, options beside
            ``statistics="student"``.
        TypeError: an argument of the wrong type or an unknown option. ``activation`` is not among the options, as every
            layer would apply it.

    A teacher is for one thread at a time.

    Example:
        >>> teacher = MomentumTeacher(encoder, total_iters=epochs * len(loader))
        >>> for view1, view2 in loader:
        ...     teacher.update()
        ...     k1, k2 = teacher(view1), teacher(view2)
    """

    updates: Tensor
    module: Network

    _statistics: str = "own"
    # Training forwards since the last update; None before the first one.
    _forwards: int | None = None
    _has_warned: bool = False
    # What was copied with this teacher, by the ids of the originals, until the student is looked up in it.
    _copied_with: dict[int, Any] | None = None

    def __init__(
        self,
        student: Network,
        total_iters: int,
        param_momentum: float = 0.99,
        *,
        teacher: Network | None = None,
        statistics: Literal["own", "student"] = "own",
        fuse: bool = True,
        **options: Unpack[TeacherOptions],
    ) -> None:
        """See the class."""
        super().__init__()
        self._total_iters = as_int("total_iters", total_iters)
        self._initial_param_momentum = as_float("param_momentum", param_momentum)
        _teacher_param_momentum(0, self._total_iters, self._initial_param_momentum)
        fuse = as_bool("fuse", fuse)
        _check_is_module("student", student)
        if "activation" in options:
            raise TypeError(
                "activation is no option of MomentumTeacher(): every layer would apply it, also those without a ReLU "
                "behind them. Build a network whose layers have the activation, and pass it as teacher="
            )
        check_option_names("MomentumTeacher", options, TeacherOptions)
        _check_statistics(statistics, options)
        if teacher is not None:
            _check_is_module("teacher", teacher)
            _check_own_parameters(teacher, student)
        # Past Module.__setattr__, which would register it.
        self.__dict__["_student"] = student
        self._statistics = statistics
        self.module = _copy_of(student) if teacher is None else teacher
        if teacher is None:
            unfuse(self.module)
        if statistics == "own":
            convert_momentum_batchnorm(self.module, self._total_iters, **options)
        else:
            if not _running_statistics(student):
                raise ValueError(
                    f'statistics="student" would have no effect: {type(student).__name__} has no BatchNorm with '
                    "running statistics"
                )
            _check_statistics_pair(_norms(self.module), _norms(student))
        self.module.requires_grad_(False)
        self.train()
        for layer in self._layers():
            layer._restart_schedule()
        if fuse:
            fuse_parts(self.module)
        device = next((parameter.device for parameter in self.module.parameters()), None)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        self._refresh_masters()

    @property
    def student(self) -> Network | None:
        """The network that :meth:`update` follows."""
        if self._copied_with is not None:
            self.__dict__["_student"] = _counterpart(self.__dict__["_student"], self._copied_with)
            self._copied_with = None
        student: Network | None = self.__dict__["_student"]
        return student

    @property
    def total_iters(self) -> int:
        """Updates of the schedules, T. Assigning sets that of the parameters' schedule and every layer's."""
        return self._total_iters

    @total_iters.setter
    def total_iters(self, value: int) -> None:
        self._total_iters = checked_total_iters(value)
        for layer in self._layers():
            layer.total_iters = self._total_iters

    @property
    def param_momentum(self) -> float:
        """Weight of the teacher's own parameters in the next update. Reading it may wait for a GPU.

        Assigning sets where its schedule starts, as the constructor does.
        """
        momentum: float = _teacher_param_momentum(
            int(self.updates.item()), self._total_iters, self._initial_param_momentum
        )
        return momentum

    @param_momentum.setter
    def param_momentum(self, value: float) -> None:
        start = as_float("param_momentum", value)
        _teacher_param_momentum(0, self._total_iters, start)
        self._initial_param_momentum = start

    @property
    def statistics(self) -> str:
        """Whose statistics normalise: the teacher's ``"own"``, or an average of the ``"student"``'s running ones."""
        return self._statistics

    @property
    def fused(self) -> dict[str, str]:
        """What the layers of ``module`` do in their own pass, by their names: :func:`momentum_bn.fused_layers`."""
        return fused_layers(self.module)

    def train(self, mode: bool = True) -> MomentumTeacher[Network]:
        """Sets the mode; but BatchNorms that normalise by an average of the student's statistics stay in evaluation."""
        super().train(mode)
        if self._statistics == "student":
            for norm in _norms(self.module):
                norm.eval()
        return self

    def reset(self) -> None:
        """Starts both schedules anew: update 0, and ``cur_iter`` and ``momentum`` of every layer as in a new one.

        Parameters and running statistics stay; the views of an unfinished update are forgotten.
        """
        self.updates.zero_()
        self._forwards = None
        for layer in self._layers():
            layer._restart_schedule()

    @torch.no_grad()
    def update(self, student: torch.nn.Module | None = None) -> None:
        """Moves the parameters towards the student's. Call it before the teacher's forwards of a step.

        Args:
            student: another network to follow this time, with parameters of the same count, order and shapes.

        Raises:
            ValueError: the parameters do not pair. Nothing was changed then.
        """
        if student is None:
            student = self.student
            if student is None:
                raise ValueError("student is missing: this teacher was unpickled without one, call update(student)")
        parameters = list(student.named_parameters())
        _check_pairs(list(self.module.named_parameters()), parameters)
        theirs: list[tuple[str, Tensor]] = list(parameters)
        if self._statistics == "student":
            norms, their_norms = _norms(self.module), _norms(student)
            _check_statistics_pair(norms, their_norms)
            theirs = theirs + _running_statistics(student)
            for norm, their_norm in zip(norms, their_norms, strict=True):
                if norm.num_batches_tracked is not None and their_norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.copy_(their_norm.num_batches_tracked)
        else:
            self._check_pace()
        self._refresh_masters()
        named, masters = self._averages(), self._masters()
        none_needed = self.updates.new_empty(0, dtype=torch.float32)
        _teacher_update_(
            [_shard_of(parameter) for _, parameter in named],
            [_shard_of(masters.get(name, none_needed)) for name, _ in named],
            [_shard_of(parameter) for _, parameter in theirs],
            self.updates,
            self._total_iters,
            self._initial_param_momentum,
        )
        self._forwards = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the teacher network under ``torch.no_grad()``."""
        with torch.no_grad():
            output = self.module(*args, **kwargs)
        # Under torch.compile each new count would mean another graph.
        if not torch.compiler.is_compiling() and self._forwards is not None and self.module.training:
            self._forwards += 1
        return output

    def _layers(self) -> Iterator[MomentumBatchNorm]:
        return (layer for layer in self.module.modules() if isinstance(layer, MomentumBatchNorm))

    def _check_pace(self) -> None:
        """Warns where a layer's schedule does not keep pace with the parameters'."""
        forwards = self._forwards
        if not forwards or self._has_warned:
            return
        for layer in self._layers():
            if layer.views_per_update != forwards and _follows_cosine(layer):
                self._has_warned = True
                # Above this: update, its decorator, its caller.
                warnings.warn(_words_about_pace(forwards, layer.views_per_update, layer.total_iters), stacklevel=4)
                return

    def _averages(self) -> list[tuple[str, Tensor]]:
        """What follows the student, by its name in ``module``."""
        followers: list[tuple[str, Tensor]] = list(self.module.named_parameters())
        return followers if self._statistics == "own" else followers + _running_statistics(self.module)

    def _masters(self) -> dict[str, Tensor]:
        """The masters under the names of their parameters."""
        buffers = {name: self._buffers.get(_master_name(name)) for name, _ in self._averages()}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}

    @torch.no_grad()
    def _refresh_masters(self) -> None:
        """Each 16-bit parameter has a master of which it is the rounding, and no other parameter has one."""
        masters = self._masters()
        for name, parameter in self._averages():
            master = masters.get(name)
            if parameter.dtype in _NEED_MASTER:
                if master is None:
                    self.register_buffer(_master_name(name), parameter.detach().to(torch.float32, copy=True))
                else:
                    _renew_if_stale(_shard_of(master), _shard_of(parameter))
            elif master is not None:
                if _is_rounding(_shard_of(parameter), _shard_of(master)):
                    parameter.copy_(master)
                delattr(self, _master_name(name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MomentumTeacher[Network]:
        """Casts or moves everything, but keeps the averages as precise as they are and the counter as it is."""
        self._refresh_masters()
        masters, updates = self._masters(), self.updates
        precise = {name: masters.get(name, parameter.detach()) for name, parameter in self._averages()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.updates = _moved(updates, self.updates)
        self._restore_precise(precise)
        return self

    @torch.no_grad()
    def _restore_precise(self, precise: dict[str, Tensor]) -> None:
        """Makes of the values from before a cast what the parameters' new dtypes ask for."""
        for name, parameter in self._averages():
            value, had_master = precise[name], _master_name(name) in self._buffers
            if parameter.dtype in _NEED_MASTER:
                if had_master:
                    value = _moved(value, self.get_buffer(_master_name(name)))
                else:
                    value = value.to(parameter.device, torch.float32, copy=True)
                self.register_buffer(_master_name(name), value)
            elif had_master:
                delattr(self, _master_name(name))
            else:
                continue
            if not value.is_meta and not parameter.is_meta:
                parameter.copy_(value)  # its rounding in the new dtype, not the rounding of a rounding

    def __deepcopy__(self, memo: dict[int, Any]) -> MomentumTeacher[Network]:
        """Copies everything but the student, which may be copied as another part of the same whole, before or after."""
        student = self.student
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self._state_without_student(), memo))  # type: ignore[no-untyped-call]
        copied.__dict__["_student"] = student
        copied._copied_with = memo
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a pickle holds: the student's network, too, as it may be another part of the same whole."""
        student = self.student
        state = self._state_without_student()
        state["_student"] = None if student is None else _unwrapped(student)
        return state

    def _state_without_student(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state["_student"] = None
        return state


def set_total_iters(module: torch.nn.Module, total_iters: int) -> None:
    """Sets ``total_iters`` of every Momentum BatchNorm and every MomentumTeacher in ``module``, itself included.

    Raises:
        ValueError: ``total_iters`` below 1. Nothing was changed then.

    Example:
        >>> set_total_iters(network, epochs * steps_per_epoch)
    """
    _check_is_module("module", module)
    checked = checked_total_iters(total_iters)
    for part in module.modules():
        if isinstance(part, (MomentumBatchNorm, MomentumTeacher)):
            part.total_iters = checked


def _check_is_module(name: str, value: Any) -> None:
    if not isinstance(value, torch.nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module (got {type(value).__name__})")


def _follows_cosine(layer: MomentumBatchNorm) -> bool:
    return layer.track_running_stats and layer.schedule == "cosine" and layer._initial_momentum is not None


def _words_about_pace(forwards: int, views_per_update: int, total_iters: int) -> str:
    pace = forwards / views_per_update
    if pace > 1:
        over = math.ceil(total_iters / pace)
        consequence = f"after {over} of {total_iters} updates their running statistics stand still"
    else:
        consequence = f"after all {total_iters} updates they are where they should be after {int(total_iters * pace)}"
    return (
        f"between two updates this teacher ran {forwards} training forwards, but its layers have "
        f"views_per_update={views_per_update}: their schedule runs {pace:g} times as fast as the parameters', so "
        f"{consequence}. Give MomentumTeacher views_per_update={forwards}: the forwards per batch (2 views, or 1 where "
        "views are concatenated) times the batches over which a step accumulates gradients"
    )


def _check_statistics(statistics: str, options: TeacherOptions) -> None:
    if statistics not in ("own", "student"):
        raise ValueError(f'statistics must be "own" or "student" (got {statistics!r})')
    if statistics == "student" and options:
        raise ValueError(
            f'{", ".join(options)} would have no effect: with statistics="student" the teacher has no Momentum '
            "BatchNorms"
        )


def _norms(module: torch.nn.Module) -> list[_BatchNorm]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def _running_statistics(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Running means and variances of all BatchNorms, by their names."""
    return [
        (f"{prefix}.{name}".lstrip("."), statistic)
        for prefix, norm in module.named_modules()
        if isinstance(norm, _BatchNorm)
        for name in ("running_mean", "running_var")
        if (statistic := getattr(norm, name)) is not None
    ]


def _check_statistics_pair(teacher: list[_BatchNorm], student: list[_BatchNorm]) -> None:
    ours, theirs = ([_shape_of_statistics(norm) for norm in norms] for norms in (teacher, student))
    if ours != theirs:
        raise ValueError(
            "student must have the teacher's BatchNorms, whose running statistics are of these sizes: "
            f"{ours} (got {theirs})"
        )


def _shape_of_statistics(norm: _BatchNorm) -> int | None:
    return None if norm.running_mean is None else norm.num_features


def _master_name(parameter_name: str) -> str:
    return "master/" + parameter_name.replace(".", "/")  # a buffer's name may have no dots


def _renew_if_stale(master: Tensor, parameter: Tensor) -> None:
    """Takes the parameter into a master of which it is not the rounding; without waiting for a GPU."""
    is_stale = (master.to(parameter.dtype) != parameter).any()
    master.copy_(torch.where(is_stale, parameter.to(master.dtype), master))


def _is_rounding(parameter: Tensor, master: Tensor) -> bool:
    """Whether a wide parameter is what a cast made of the 16-bit rounding of its master."""
    if parameter.is_meta:
        return False
    return any(torch.equal(parameter, master.to(dtype).to(parameter.dtype)) for dtype in _NEED_MASTER)


def _inside(module: torch.nn.Module) -> torch.nn.Module | None:
    """The network that ``module`` wraps, if it is a wrapper."""
    if isinstance(module, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
        inside: torch.nn.Module | None = module.module
    else:
        inside = module._modules.get("_orig_mod")  # of torch.compile
    return inside


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    inside = _inside(module)
    return module if inside is None else _unwrapped(inside)


def _copy_of(student: Network) -> Network:
    """A copy without wrappers, which average gradients that a teacher does not have, and change the keys."""
    # Process groups cannot be copied; the teacher's layers need none.
    groups = (getattr(part, "process_group", None) for part in student.modules())
    memo: dict[int, Any] = {id(group): group for group in groups if group is not None}
    for part in reversed(list(student.modules())):  # the innermost first
        inside = _inside(part)
        if inside is not None:
            memo[id(part)] = copy.deepcopy(inside, memo)
    return copy.deepcopy(student, memo)


def _counterpart(student: torch.nn.Module, copies: dict[int, Any]) -> torch.nn.Module:
    """The student among ``copies``, made of its parts there; itself, where no parameter of it was copied.

    Args:
        student: what the original teacher follows.
        copies: by the ids of their originals, as copy.deepcopy keeps them.
    """
    if id(student) in copies:
        copied: torch.nn.Module = copies[id(student)]
        return copied
    network = _unwrapped(student)

    def is_copied(part: torch.nn.Module) -> bool:
        return any(id(parameter) in copies for parameter in part.parameters())

    if not is_copied(network):
        return student
    for part in network.modules():
        if not is_copied(part):
            copies.setdefault(id(part), part)
    return copy.deepcopy(network, copies)


def _check_own_parameters(teacher: torch.nn.Module, student: torch.nn.Module) -> None:
    _check_pairs(list(teacher.named_parameters()), list(student.named_parameters()))
    theirs = {id(parameter) for parameter in student.parameters()}
    for name, parameter in teacher.named_parameters():
        if id(parameter) in theirs:
            raise ValueError(f"teacher must have parameters of its own (got {name}, which is the student's)")


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
