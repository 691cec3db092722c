"""A set of calls to be timed side by side, and its timing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .results import Section
from .timing import Call, interleaved_seconds


@dataclass
class Workload:
    """Calls on one case.

    Attributes:
        case: what is normalised.
        phase: what is done with it.
        unit: the call that the others are multiples of.
        with_grad: whether the calls record graphs.
        calls: what is timed, in this order, by name.
        may_fail: names of calls that are reported rather than fatal where they fail (compilers do).
        written: the tensors that the calls write again and again, and which must stay ordinary numbers.
        forwards: forward passes whose memory for the backward pass is counted, by name of the call they belong to.
    """

    case: str
    phase: str
    unit: str
    with_grad: bool
    calls: dict[str, Call]
    may_fail: set[str] = field(default_factory=set)
    written: Callable[[], Iterable[Tensor]] = tuple
    forwards: dict[str, Callable[[], Tensor]] = field(default_factory=dict)


def time_workload(workload: Workload, rounds: int, seconds_per_call: float = 0.02) -> Section:
    """Times all calls.

    Raises:
        ArithmeticError: the calls have left values whose arithmetic is slower than that of others, or means nothing.
    """
    with torch.set_grad_enabled(workload.with_grad):
        calls = dict(workload.calls)
        absent = drop_failing(calls, workload.may_fail)
        seconds = interleaved_seconds(calls, rounds, seconds_per_call)
        for tensor in workload.written():
            check_ordinary(tensor.detach(), f"{workload.case}, {workload.phase}")
        kept = {name: kept_bytes(forward) for name, forward in workload.forwards.items()}
    return Section(workload.case, workload.phase, workload.unit, seconds, absent, kept)


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps until its backward pass, each memory counted once, without parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    del y  # until here nothing that it kept was freed, and no address used twice
    return sum(kept.values())


def drop_failing(calls: dict[str, Call], may_fail: Iterable[str]) -> dict[str, str]:
    """Runs the calls of these names once, and takes those out that fail. Returns why, by name."""
    absent = {}
    for name in may_fail:
        try:
            calls[name]()
        except Exception as error:  # a compiler may fail in any way
            del calls[name]
            absent[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return absent


def check_ordinary(values: Tensor, what: str) -> None:
    """Raises ArithmeticError where a value is infinite, NaN or subnormal."""
    if not torch.isfinite(values).all():
        raise ArithmeticError(f"{what}: the timed calls have left infinite or NaN values")
    if ((values != 0) & (values.abs() < torch.finfo(values.dtype).tiny)).any():
        raise ArithmeticError(f"{what}: the timed calls have left subnormal values")
