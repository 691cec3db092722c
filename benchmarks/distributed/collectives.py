"""Counts and times the collectives of synchronised statistics on 2, 3 and 4 ranks of this machine, or on torchrun's.

    python -m benchmarks.distributed.collectives
    torchrun --nnodes ... --nproc-per-node ... -m benchmarks.distributed.collectives

All calls of one number of ranks are interleaved in the same processes, one thread each. Where the network is known, its
--latency a and --bandwidth b hold a model against them. Gloo passes messages around a ring, and sends one only after
its receiver has said that it waits for it, which makes two latencies:

    all_gather of s bytes from each of R ranks:    (R - 1) (2 a + s / b)
    all_reduce of s bytes:                       2 (R - 1) (2 a + s / R / b)

What a layer computes besides is taken from Momentum BatchNorm by itself. tests/python/machines.py makes such a network.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import momentum_bn

from .. import allocators
from ..machine import machine
from .cost_model import Link, Ranks, gathered_bytes
from .launch import on_ranks, under_torchrun
from .sync_batchnorm import SyncBatchNorm, all_gather

REPOSITORY = Path(__file__).resolve().parents[2]
CHANNELS = (64, 256, 512, 2048)
REPEATS = 10  # of a call in a round, back to back

FORWARD = "forward"
TRAINING = "forward + backward"
ALONE = "Momentum BatchNorm"
GROUP = "Momentum BatchNorm, process_group"
SYNC = "SyncBatchNorm, emulated"
GATHER = "all_gather of its statistics alone"

Calls = dict[str, Callable[[], object]]


def calls_of(channels: int) -> Calls:
    """On a batch so small that communication is most of the time: (4, C, 4, 4)."""
    x = torch.randn(4, channels, 4, 4)
    leaf = x.clone().requires_grad_()
    dy = torch.randn_like(x)
    options: dict[str, Any] = {"total_iters": 10**9}
    layers: dict[str, torch.nn.Module] = {
        ALONE: momentum_bn.MomentumBatchNorm2d(channels, **options),
        GROUP: momentum_bn.MomentumBatchNorm2d(channels, process_group=dist.group.WORLD, **options),
        SYNC: SyncBatchNorm(channels),
    }
    calls: Calls = {}
    for name, layer in layers.items():
        calls[f"{name}, {FORWARD}"] = partial(torch.no_grad()(layer), x)
        calls[f"{name}, {TRAINING}"] = partial(_forward_and_backward, layer, leaf, dy)
    rows = torch.empty(dist.get_world_size() * (2 * channels + 1), dtype=torch.float64)
    own = torch.zeros(2 * channels + 1, dtype=torch.float64)
    calls[GATHER] = partial(all_gather, rows, own)
    return calls


def _forward_and_backward(layer: torch.nn.Module, x: Tensor, dy: Tensor) -> None:
    layer(x).backward(dy)


def count_collectives(call: Callable[[], object]) -> int:
    """How many collectives of the default group a call starts: the group numbers them."""
    group = dist.group.WORLD
    assert group is not None
    before = group._get_sequence_number_for_group()
    call()
    return group._get_sequence_number_for_group() - before


def measure(rounds: int) -> list[dict[str, Any]]:
    """To be called on every rank. Returns one record per number of channels."""
    records = []
    for channels in CHANNELS:
        calls = calls_of(channels)
        counts = {name: count_collectives(call) for name, call in calls.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                call()
                dist.barrier()
                start = time.perf_counter()
                for _ in range(REPEATS):
                    call()
                seconds[name].append((time.perf_counter() - start) / REPEATS)
        records.append(
            {"ranks": dist.get_world_size(), "channels": channels, "collectives": counts, "seconds": seconds}
        )
    return records


def median(record: dict[str, Any], call: str) -> float:
    """Seconds."""
    return statistics.median(record["seconds"][call])


def gather_seconds(ranks: Ranks, size: float) -> float:
    """Of an all_gather of ``size`` bytes from each rank, as Gloo does it."""
    return (ranks.count - 1) * (2 * ranks.link.latency + size / ranks.link.bandwidth)


def reduce_seconds(ranks: Ranks, size: float) -> float:
    """Of an all_reduce of ``size`` bytes, as Gloo does it."""
    return 2 * (ranks.count - 1) * (2 * ranks.link.latency + size / ranks.count / ranks.link.bandwidth)


def predicted(record: dict[str, Any], link: Link) -> dict[str, float]:
    """What the model says of some of the calls, in seconds."""
    ranks, channels = Ranks(record["ranks"], link), record["channels"]
    gather = gather_seconds(ranks, gathered_bytes(channels, 8))
    sync = gather_seconds(ranks, gathered_bytes(channels, 4)) + reduce_seconds(ranks, 4 * 2 * channels)
    return {
        GATHER: gather,
        f"{GROUP}, {FORWARD}": gather + median(record, f"{ALONE}, {FORWARD}"),
        f"{SYNC}, {TRAINING}": sync + median(record, f"{ALONE}, {TRAINING}"),
    }


def _column(record: dict[str, Any]) -> str:
    return f"C = {record['channels']}, us"


def report(records: list[dict[str, Any]], link: Link | None = None) -> str:
    """Returns all tables."""
    lines = []
    for ranks in sorted({record["ranks"] for record in records}):
        of_ranks = [record for record in records if record["ranks"] == ranks]
        heading = "".join(f"{_column(record):>16}" for record in of_ranks)
        lines.append(f"{f'{ranks} ranks':<60}{'collectives':>12}{heading}")
        for call, count in of_ranks[0]["collectives"].items():
            figures = "".join(f"{median(record, call) * 1e6:16.0f}" for record in of_ranks)
            lines.append(f"  {call:<58}{count:>12}{figures}")
        if link is not None:
            models = [predicted(record, link) for record in of_ranks]
            for call in models[0]:
                ratios = "".join(f"{median(r, call) / m[call]:16.2f}" for r, m in zip(of_ranks, models, strict=True))
                lines.append(f"  {f'measured / model: {call}':<70}{ratios}")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed.collectives",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4], help="without torchrun")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each call")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs/benchmarks", help="folder of the results")
    parser.add_argument("--latency", type=float, help="of a message, in seconds, for the model")
    parser.add_argument("--bandwidth", type=float, help="of a rank, in bytes per second, for the model")
    options = parser.parse_args()
    link = Link(options.latency, options.bandwidth) if options.latency and options.bandwidth else None
    if under_torchrun():
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        records = measure(options.rounds)
        first = dist.get_rank() == 0
        dist.destroy_process_group()
        if not first:
            return
    else:
        records = [record for ranks in options.ranks for record in on_ranks(ranks, measure, options.rounds)]
    facts = {**machine(), "threads": "1 per rank", "allocator": allocators.describe()}
    tables = "\n".join(f"{key + ':':<24} {value}" for key, value in facts.items()) + "\n\n" + report(records, link)
    print(tables)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "collectives.json").write_text(json.dumps({"machine": facts, "records": records}, indent=1) + "\n")
    (options.out / "collectives.txt").write_text(tables + "\n")


if __name__ == "__main__":
    main()
