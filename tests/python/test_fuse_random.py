"""Random networks and their fused selves: nobody can tell them apart."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import momentum_bn
from momentum_bn.fuse import FusedForward
from random_networks import CHANGES, OPERATIONS, SHAPE, Change, Choice, RandomNetwork, moved

# `FUSE_EXAMPLES=10000` for a night, of other networks each time. Without it they are the same ones every time.
EXAMPLES = int(os.environ.get("FUSE_EXAMPLES", "40"))
OF_A_NIGHT = EXAMPLES >= 1000

PHASES = (Phase.generate,) if OF_A_NIGHT else tuple(Phase)

numbers = st.integers(0, 11)
choices = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 4), st.integers(0, 4), numbers),
    min_size=1,
    max_size=12,
)
changes = st.lists(st.builds(Change, st.sampled_from(sorted(CHANGES)), numbers), min_size=1, max_size=4)


@pytest.mark.cpu_only
@settings(
    max_examples=EXAMPLES,
    derandomize=not OF_A_NIGHT,
    database=None,
    deadline=None,
    phases=PHASES,
    suppress_health_check=list(HealthCheck),
)
@given(choices, st.integers(0, 3), changes, numbers)
def test_nobody_can_tell_a_fused_network(
    program: list[Choice], outputs: int, between: list[Change], number: int
) -> None:
    torch.manual_seed(number)
    written = RandomNetwork(program, outputs)
    fused = copy.deepcopy(written)
    try:
        momentum_bn.fuse(fused)
    except ValueError:
        # What cannot be traced at first may be later: changes between the calls are seen all the same.
        vars(fused)["forward"] = FusedForward(fused)
    records: tuple[list[Tensor], list[Tensor]] = ([], [])
    for call, change in enumerate([Change("nothing", number), *between]):
        for net, recorded in zip((written, fused), records, strict=True):
            CHANGES[change.name](net, change.number, recorded)
        fused = moved(fused, change.number + call)
        if not _compare_calls(written, fused, change.number + number + call, records):
            return


def _compare_calls(
    written: RandomNetwork, fused: RandomNetwork, number: int, records: tuple[list[Tensor], list[Tensor]]
) -> bool:
    """Whether the network as written could be called and differentiated; asserts that so could the fused one."""
    torch.manual_seed(number)
    inputs = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(2)]
    with_grad, leaves = number % 3 > 0, number % 3 == 2
    flag: dict[str, Any] = {"flag": True} if number % 5 == 0 else {}
    with torch.inference_mode() if number % 7 == 0 else torch.set_grad_enabled(with_grad):
        ours, theirs = (_Call(net, inputs, leaves, flag, number) for net in (fused, written))
    if theirs.error is not None:
        return False
    assert ours.error is None, ours.error
    _assert_same(ours.output, theirs.output)
    _assert_same(ours.inputs, theirs.inputs)
    if with_grad and number % 7 != 0:
        error = theirs.backward()
        if error is not None:
            return False
        assert (ours_error := ours.backward()) is None, ours_error
        _assert_same([x.grad for x in ours.leaves], [x.grad for x in theirs.leaves])
        _assert_same([p.grad for p in fused.parameters()], [p.grad for p in written.parameters()])
    for module, other in zip(fused.modules(), written.modules(), strict=True):
        assert type(module) is type(other) and module.training == other.training
        _assert_same(getattr(module, "kept", None), getattr(other, "kept", None))
    _assert_same(dict(fused.named_buffers()), dict(written.named_buffers()))
    _assert_same(*records)
    for net in (fused, written):
        net.zero_grad()
    return True


class _Call:
    """One call of a network on copies of the inputs."""

    def __init__(self, net: nn.Module, inputs: list[Tensor], leaves: bool, keywords: dict[str, Any], seed: int) -> None:
        self.leaves = [x.clone().requires_grad_(leaves) for x in inputs]
        # Results of an operation, so that they may be written to.
        self.inputs = [x * 1 for x in self.leaves]
        self.error: Exception | None = None
        torch.manual_seed(seed)
        try:
            self.output = net(*self.inputs, **keywords)
        except Exception as error:
            self.error = error

    def backward(self) -> Exception | None:
        loss: Any = sum((value.square().sum() for value in _tensors(self.output) if value.requires_grad), start=0)
        try:
            if isinstance(loss, Tensor):
                loss.backward()
        except Exception as error:
            return error
        return None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)]


def _assert_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, tuple | list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            _assert_same(one, other)
    elif isinstance(theirs, Tensor):
        assert ours.stride() == theirs.stride() and ours.requires_grad == theirs.requires_grad
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-9, atol=1e-9)
    else:
        assert ours == theirs
