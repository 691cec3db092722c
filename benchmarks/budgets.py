"""How fast the layer has to be, and how fast it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import cases, names
from .cases import Case
from .network_workload import network_name
from .results import Run, Section


@dataclass(frozen=True)
class Budget:
    """A limit on how much longer some calls take than another one, on every one of some cases.

    Attributes:
        what: the requirement in words.
        cases: names of the cases.
        phase: the phase of the cases' sections.
        calls: what takes time.
        unit: the call that is compared with; None: microseconds.
        required: the limit.
        goal: a stricter limit.
        at_least: the figure has to reach the limits rather than stay below them.
        of_memory: the figure is of the bytes that forward passes keep, not of time.
    """

    what: str
    cases: tuple[str, ...]
    phase: str
    calls: tuple[str, ...]
    unit: str | None
    required: float
    goal: float
    at_least: bool = False
    of_memory: bool = False

    def keeps(self, figure: float, limit: float) -> bool:
        return figure >= limit if self.at_least else figure <= limit


@dataclass(frozen=True)
class Verdict:
    """What a run says about a budget.

    Attributes:
        figure: the worst one of all cases and calls; None where nothing was measured.
        worst: its case, and its call where the budget has several.
        word: ``goal``, ``met``, ``missed`` or ``not measured``; ``incomplete`` where what was measured keeps the
            budget, but cases or calls were left out.
    """

    figure: float | None
    worst: str
    word: str


def judge(budget: Budget, run: Run) -> Verdict:
    """Compares a run with a budget."""
    figures: list[tuple[float, str]] = []
    for case in budget.cases:
        section = run.section(case, budget.phase)
        for call in budget.calls:
            figure = _figure(section, call, budget) if section else None
            if figure is not None:
                figures.append((figure, f"{case}: {call}" if len(budget.calls) > 1 else case))
    if not figures:
        return Verdict(None, "", "not measured")
    figure, worst = (min if budget.at_least else max)(figures)
    if not budget.keeps(figure, budget.required):
        return Verdict(figure, worst, "missed")
    if len(figures) < len(budget.cases) * len(budget.calls):
        return Verdict(figure, worst, "incomplete")
    return Verdict(figure, worst, "goal" if budget.keeps(figure, budget.goal) else "met")


def _figure(section: Section, call: str, budget: Budget) -> float | None:
    unit = budget.unit
    if budget.of_memory:
        kept = section.kept
        return kept[call] / kept[unit] if call in kept and unit in kept else None
    if call not in section.seconds or (unit is not None and unit not in section.seconds):
        return None
    return section.median_seconds(call) * 1e6 if unit is None else section.ratio(call, unit)


def _names(some: Sequence[Case]) -> tuple[str, ...]:
    return tuple(case.name for case in some)


_MAPS = [*cases.STAGE_1, *cases.STAGE_2, *cases.STAGE_3]  # of 28x28 values and more
_NCHW = _names([case for case in _MAPS if not case.channels_last])
_NHWC = _names([case for case in _MAPS if case.channels_last])
_SMALLEST = (cases.SMALLEST.name,)
_NETWORKS = (network_name(False), network_name(True))
_INPLACE = (names.OURS_INPLACE,)
_INPLACE_AND_RELU = (names.OURS_INPLACE, names.OURS_INPLACE_RELU)
_FRESH = (names.OURS_FRESH,)
_OURS = (names.OURS,)

_TIMES_COPY = [
    Budget(
        "in place, with or without ReLU, NCHW from 28x28",
        _NCHW,
        names.FORWARD,
        _INPLACE_AND_RELU,
        names.COPY,
        0.55,
        0.40,
    ),
    Budget("in place, NCHW 7x7", _names(cases.STAGE_5[:1]), names.FORWARD, _INPLACE, names.COPY, 0.75, 0.50),
    Budget("in place, NHWC from 28x28", _NHWC, names.FORWARD, _INPLACE, names.COPY, 1.0, 0.75),
    Budget("in place, (256, 4096)", (cases.HEAD.name,), names.FORWARD, _INPLACE, names.COPY, 1.2, 0.8),
    Budget("in place, bf16 NCHW", _names(cases.STAGE_2_BFLOAT16[:1]), names.FORWARD, _INPLACE, names.COPY, 0.55, 0.45),
    Budget("fresh output, NCHW from 28x28", _NCHW, names.FORWARD, _FRESH, names.COPY, 2.0, 1.0),
    Budget(
        "backward alone over dy, from 28x28",
        _NCHW + _NHWC,
        names.TRAINING,
        (names.OURS_BACKWARD_OVER_DY,),
        names.COPY,
        1.05,
        0.70,
    ),
]
_OVERHEAD = [
    Budget("a call in place on (32, 64, 8, 8), us", (cases.SMALL.name,), names.FORWARD, _INPLACE, None, 25, 12),
    Budget("a call in place on (2, 16, 2, 2) / torch BN", _SMALLEST, names.FORWARD, _INPLACE, names.TORCH, 1.0, 0.5),
    Budget("a fresh output of (2, 16, 2, 2) / torch BN", _SMALLEST, names.FORWARD, _FRESH, names.TORCH, 1.0, 0.5),
    Budget("forward + backward on (2, 16, 2, 2) / torch BN", _SMALLEST, names.TRAINING, _OURS, names.TORCH, 1.1, 0.8),
]
_SPEEDUPS = [
    Budget(
        "torch BN / in place, NCHW from 28x28",
        _NCHW,
        names.FORWARD,
        (names.TORCH,),
        names.OURS_INPLACE,
        10,
        18,
        at_least=True,
    ),
    Budget(
        "torch BN / in place, NHWC from 28x28",
        _NHWC,
        names.FORWARD,
        (names.TORCH,),
        names.OURS_INPLACE,
        5,
        7,
        at_least=True,
    ),
    Budget(
        "forward + backward: torch BN / ours, from 28x28",
        _NCHW + _NHWC,
        names.TRAINING,
        (names.TORCH,),
        names.OURS,
        2.5,
        6,
        at_least=True,
    ),
    Budget(
        "forward + backward: torch.compile(published) / ours, from 28x28",
        _NCHW + _NHWC,
        names.TRAINING,
        (names.PUBLISHED_COMPILED,),
        names.OURS,
        2,
        5,
        at_least=True,
    ),
]
_NETWORK = [
    Budget("ResNet-50 teacher forward: ours / Identity", _NETWORKS, names.FORWARD, _OURS, names.IDENTITY, 1.06, 1.00),
    Budget(
        "ResNet-50 teacher forward: published / ours",
        _NETWORKS,
        names.FORWARD,
        (names.PUBLISHED,),
        names.OURS,
        2.0,
        2.6,
        at_least=True,
    ),
]


def _of_step(what: str, of: slice, call: str, unit: str, required: float, goal: float) -> Budget:
    at_least = unit == names.AS_MADE
    return Budget(f"ResNet-50 step{what}", _NETWORKS[of], names.STEP, (call,), unit, required, goal, at_least=at_least)


_AS_MADE = [
    Budget(
        "ResNet-50 teacher as made, forward: ours / Identity",
        _NETWORKS,
        names.FORWARD,
        (names.AS_MADE,),
        names.IDENTITY,
        1.06,
        1.03,
    ),
    Budget(
        "ResNet-50 teacher as made, forward: published / ours",
        _NETWORKS,
        names.FORWARD,
        (names.PUBLISHED,),
        names.AS_MADE,
        1.95,
        2.1,
        at_least=True,
    ),
    _of_step(" as made: ours / Identity", slice(2), names.AS_MADE, names.IDENTITY, 1.08, 1.04),
    _of_step(": published teacher and torch BN / ours", slice(2), names.PUBLISHED, names.AS_MADE, 1.2, 1.27),
    _of_step(", NCHW: torch BN / ours", slice(0, 1), names.TORCH, names.AS_MADE, 1.1, 1.15),
    _of_step(", NHWC: torch BN / ours", slice(1, 2), names.TORCH, names.AS_MADE, 1.03, 1.06),
]

_STUDENT = [
    Budget(
        "BatchNorm: backward over dy, NCHW from 28x28, with or without ReLU",
        _NCHW,
        names.STUDENT,
        (names.BATCH_NORM_BACKWARD, names.BATCH_NORM_BACKWARD_RELU),
        names.COPY,
        1.5,
        1.25,
    ),
    Budget(
        "BatchNorm: backward over dy, NCHW from 28x28, residual and ReLU",
        _NCHW,
        names.STUDENT,
        (names.BATCH_NORM_BACKWARD_RESIDUAL_RELU,),
        names.COPY,
        2.2,
        1.8,
    ),
    Budget(
        "BatchNorm: backward over dy, NHWC from 28x28",
        _NHWC,
        names.STUDENT,
        (names.BATCH_NORM_BACKWARD, names.BATCH_NORM_BACKWARD_RELU, names.BATCH_NORM_BACKWARD_RESIDUAL_RELU),
        names.COPY,
        2.6,
        2.0,
    ),
    Budget(
        "BatchNorm + ReLU, forward + backward: torch BN + relu_ / ours",
        _NCHW + _NHWC,
        names.STUDENT,
        (names.TORCH_RELU,),
        names.BATCH_NORM_RELU,
        4,
        6,
        at_least=True,
    ),
    Budget(
        "BatchNorm, forward + backward on (2, 16, 2, 2) / torch BN",
        _SMALLEST,
        names.STUDENT,
        (names.BATCH_NORM,),
        names.TORCH,
        1.0,
        0.8,
    ),
    Budget(
        "ResNet-50 student, NCHW: ours / torch BN",
        _NETWORKS[:1],
        names.STUDENT,
        (names.BATCH_NORM_RESIDUAL_RELU,),
        names.TORCH,
        0.92,
        0.87,
    ),
    Budget(
        "ResNet-50 student, NHWC: ours / torch BN",
        _NETWORKS[1:],
        names.STUDENT,
        (names.BATCH_NORM_RESIDUAL_RELU,),
        names.TORCH,
        0.95,
        0.91,
    ),
    Budget(
        "ResNet-50 student, memory kept after forward: ours / torch BN",
        _NETWORKS,
        names.STUDENT,
        (names.BATCH_NORM_RESIDUAL_RELU,),
        names.TORCH,
        1.0,
        0.9,
        of_memory=True,
    ),
]

# Of float32 where not told otherwise, on two threads, with the default allocator.
BUDGETS = [*_TIMES_COPY, *_OVERHEAD, *_SPEEDUPS, *_NETWORK, *_AS_MADE, *_STUDENT]
