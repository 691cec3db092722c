"""Images per second of a training step with a momentum teacher, on 1 process of 1 thread and on 2, weak scaling.

Each rank trains on as many images as the one process does. The network is a small ResNet on small images; a step has
two views, a student that learns by DistributedDataParallel and a teacher that follows it. All ways and both numbers of
ranks are interleaved in the same two processes; while one rank measures alone, the other sleeps.

A program that is no Python (a trainer in C++) gets a row by an entry in PROGRAMS.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import momentum_bn

from .. import allocators
from ..machine import machine
from ..network_workload import SeparatePasses
from ..peers import PublishedBatchNorm
from ..resnet import NormFactory, ResNet
from .collectives import count_collectives
from .launch import on_ranks
from .sync_batchnorm import SyncBatchNorm

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCKS, WIDTH, FEATURES = (1, 1, 1, 1), 16, 64
BATCH, SIDE = 16, 64  # of a rank and view
RANKS = (1, 2)


# Makes normalisations for a number of ranks.
NormOfRanks = Callable[[int], NormFactory]


@dataclass(frozen=True)
class Way:
    """How student and teacher normalise."""

    student: NormOfRanks
    teacher: NormOfRanks


def _torch(_ranks: int) -> NormFactory:
    return lambda channels, relu: SeparatePasses(nn.BatchNorm2d(channels), relu)


def _sync(ranks: int) -> NormFactory:
    # By itself, a process has nothing to synchronise: torch's SyncBatchNorm then is BatchNorm.
    norm = SyncBatchNorm if ranks > 1 else nn.BatchNorm2d
    return lambda channels, relu: SeparatePasses(norm(channels), relu)


def _published(_ranks: int) -> NormFactory:
    return lambda channels, relu: SeparatePasses(PublishedBatchNorm(channels, 10**9), relu)


def _ours(ranks: int, in_group: bool = False) -> NormFactory:
    group = dist.group.WORLD if in_group and ranks > 1 else None
    return lambda channels, relu: momentum_bn.MomentumBatchNorm2d(
        channels, total_iters=10**9, inplace=True, activation="relu" if relu else None, process_group=group
    )


WAYS = {
    "Momentum BatchNorm in the teacher": Way(_torch, _ours),
    "Momentum BatchNorm in the teacher, process_group": Way(_torch, partial(_ours, in_group=True)),
    "published layer in the teacher": Way(_torch, _published),
    "SyncBatchNorm, emulated, in student and teacher": Way(_sync, _sync),
}
# Trainings that are no Python: given the number of ranks, a command that prints its images per second last.
RATE = [sys.executable, "-m", "benchmarks.distributed.trainer_rate", "--ranks"]
PROGRAMS: dict[str, Callable[[int], list[str]]] = {"the C++ trainer": lambda ranks: [*RATE, str(ranks)]}


class Training:
    """A student, its teacher and the steps of one rank."""

    def __init__(self, way: Way, ranks: int) -> None:
        torch.manual_seed(0)
        student = ResNet(way.student(ranks), BLOCKS, WIDTH, FEATURES)
        self.teacher = ResNet(way.teacher(ranks), BLOCKS, WIDTH, FEATURES).requires_grad_(False)
        self.followed = list(student.parameters())
        self.following = list(self.teacher.parameters())
        self.student: nn.Module = DistributedDataParallel(student, broadcast_buffers=False) if ranks > 1 else student
        self.optimizer = torch.optim.SGD(student.parameters(), 1e-3, momentum=0.9)
        self.views = [torch.randn(BATCH, 3, SIDE, SIDE) for _ in range(2)]

    def step(self) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(self.following, [parameter.detach() for parameter in self.followed], 0.01)
            targets = [self.teacher(view.clone()) for view in self.views]
        loss = sum(self._distance(self.student(view), targets[1 - i]) for i, view in enumerate(self.views))
        self.optimizer.zero_grad()
        assert isinstance(loss, Tensor)
        loss.backward()
        self.optimizer.step()

    @staticmethod
    def _distance(a: Tensor, b: Tensor) -> Tensor:
        return 1 - torch.cosine_similarity(a, b).mean()


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """To be called on both ranks. Returns images per second of all ranks together, and collectives per step."""
    rank = dist.get_rank()
    trainings = {(name, ranks): Training(way, ranks) for name, way in WAYS.items() for ranks in RANKS if rank < ranks}
    rates: dict[str, dict[int, list[float]]] = {name: {ranks: [] for ranks in RANKS} for name in WAYS}
    collectives = {}
    for name in WAYS:
        training = trainings[name, 2]
        training.step()  # the first one of DistributedDataParallel is unlike the others
        collectives[name] = count_collectives(training.step)
    for _ in range(rounds):
        for name in WAYS:
            for ranks in RANKS:
                dist.barrier()
                if rank < ranks:
                    rates[name][ranks].append(ranks * _images_per_second(trainings[name, ranks], steps))
    return {"rates": rates, "collectives": collectives}


def _images_per_second(training: Training, steps: int) -> float:
    training.step()
    start = time.perf_counter()
    for _ in range(steps):
        training.step()
    return steps * BATCH / (time.perf_counter() - start)


def measure_program(command: Callable[[int], list[str]], rounds: int) -> dict[int, list[float]]:
    """Images per second that a program prints, by number of ranks."""

    def once(ranks: int) -> float:
        done = subprocess.run(command(ranks), capture_output=True, text=True, check=True, cwd=REPOSITORY)
        return float(done.stdout.split()[-1])

    rounds_of_ranks = [{ranks: once(ranks) for ranks in RANKS} for _ in range(rounds)]
    return {ranks: [rates[ranks] for rates in rounds_of_ranks] for ranks in RANKS}


def report(result: dict[str, Any]) -> str:
    """Returns a table: medians, and medians of the rounds' ratios."""
    rates = result["rates"]
    unit = rates[next(iter(rates))][2]
    heading = "".join(f"{f'{ranks} x 1 thread':>16}" for ranks in RANKS)
    lines = [f"{'images/s':<56}{heading}{'efficiency':>12}{'beside first':>14}{'collectives per step':>22}"]
    for name, by_ranks in rates.items():
        one, two = by_ranks[1], by_ranks[2]
        efficiency = statistics.median(b / (2 * a) for a, b in zip(one, two, strict=True))
        beside = statistics.median(b / u for b, u in zip(two, unit, strict=True))
        figures = f"{statistics.median(one):16.1f}{statistics.median(two):16.1f}{efficiency:12.2f}{beside:14.2f}"
        lines.append(f"{name:<56}{figures}{result['collectives'].get(name, '-'):>22}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed.weak_scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="timed back to back in a round")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs/benchmarks", help="folder of the results")
    options = parser.parse_args()
    result = on_ranks(max(RANKS), measure, options.rounds, options.steps)
    for name, command in PROGRAMS.items():
        result["rates"][name] = measure_program(command, options.rounds)
    facts = {
        **machine(),
        "threads": "1 per rank",
        "allocator": allocators.describe(),
        "workload": f"ResNet {BLOCKS}, width {WIDTH}, 2 views of {BATCH} images of {SIDE}x{SIDE} per rank",
    }
    tables = "\n".join(f"{key + ':':<24} {value}" for key, value in facts.items()) + "\n\n" + report(result) + "\n"
    print(tables)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "weak_scaling.json").write_text(json.dumps({"machine": facts, **result}, indent=1) + "\n")
    (options.out / "weak_scaling.txt").write_text(tables)


if __name__ == "__main__":
    main()
