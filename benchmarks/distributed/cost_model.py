"""What synchronised statistics cost per training step of a teacher and its student, from bytes and latencies.

A collective of R ranks takes at least (Thakur, Rabenseifner, Gropp 2005, https://doi.org/10.1177/1094342005051521)

    all_gather of s bytes from each:  ceil(log2 R) a + (R - 1) s / b
    all_reduce of s bytes:          2 ceil(log2 R) a + 2 (R - 1) / R s / b

where a is the latency of a message and b the bandwidth of a rank. Waiting for the slowest rank comes on top.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What joins the ranks."""

    latency: float  # seconds, of a message
    bandwidth: float  # bytes per second, of a rank


@dataclass(frozen=True)
class Ranks:
    count: int
    link: Link


# Eight GPUs of a machine by NVLink, and each GPU with a network card of 200 Gbit/s.
NVLINK = Link(latency=3e-6, bandwidth=200e9)
NETWORK = Link(latency=8e-6, bandwidth=25e9)
CLUSTERS = (Ranks(8, NVLINK), Ranks(64, NETWORK), Ranks(1024, NETWORK))


def all_gather_seconds(ranks: Ranks, size: float) -> float:
    """Args: size: bytes of each rank."""
    return math.ceil(math.log2(ranks.count)) * ranks.link.latency + (ranks.count - 1) * size / ranks.link.bandwidth


def all_reduce_seconds(ranks: Ranks, size: float) -> float:
    """Args: size: bytes of the tensor."""
    share = (ranks.count - 1) / ranks.count * size
    return 2 * (math.ceil(math.log2(ranks.count)) * ranks.link.latency + share / ranks.link.bandwidth)


def gathered_bytes(channels: int, width: int) -> int:
    """What a rank tells the others of its batch: two numbers per channel and one count, of ``width`` bytes each."""
    return width * (2 * channels + 1)


def resnet50_norm_channels() -> list[int]:
    """Of the 53 normalisations."""
    channels = [64]
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        channels += [width, width, 4 * width] * blocks + [4 * width]
    return channels


@dataclass(frozen=True)
class Step:
    """The communication of one training step for statistics, on one rank."""

    collectives: int
    received: float  # bytes
    seconds: float


VIEWS = 2


def sync_batchnorm_step(ranks: Ranks, channels: Sequence[int]) -> Step:
    """torch's SyncBatchNorm in student and teacher: float32, an all_gather of mean, 1 / std and count in each forward,
    an all_reduce of two sums in the student's backward pass."""
    gathered = [gathered_bytes(c, 4) for c in channels]
    reduced = [4 * 2 * c for c in channels]
    others = ranks.count - 1
    forwards = 2 * VIEWS
    return Step(
        (forwards + VIEWS) * len(channels),
        forwards * others * sum(gathered) + VIEWS * 2 * others / ranks.count * sum(reduced),
        forwards * sum(all_gather_seconds(ranks, size) for size in gathered)
        + VIEWS * sum(all_reduce_seconds(ranks, size) for size in reduced),
    )


def group_step(ranks: Ranks, channels: Sequence[int]) -> Step:
    """Momentum BatchNorm with a process_group in the teacher, the student by itself: float64, an all_gather of mean,
    sum of squares and count in each forward."""
    gathered = [gathered_bytes(c, 8) for c in channels]
    return Step(
        VIEWS * len(channels),
        VIEWS * (ranks.count - 1) * sum(gathered),
        VIEWS * sum(all_gather_seconds(ranks, size) for size in gathered),
    )


def table(channels: Sequence[int], clusters: Sequence[Ranks] = CLUSTERS) -> str:
    """Returns a table in Markdown."""
    lines = [
        "| GPUs | statistics | collectives | received per GPU | time |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for ranks in clusters:
        for name, step in (
            ("SyncBatchNorm in student and teacher", sync_batchnorm_step(ranks, channels)),
            ("Momentum BatchNorm, `process_group` in the teacher", group_step(ranks, channels)),
            ("Momentum BatchNorm, each process by itself", Step(0, 0, 0)),
        ):
            lines.append(
                f"| {ranks.count:,} | {name} | {step.collectives} | {step.received / 1e6:,.1f} MB "
                f"| {step.seconds * 1e3:,.1f} ms |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distributed.cost_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of GPUs (8, 64 and 1024)")
    parser.add_argument("--latency", type=float, default=NETWORK.latency, help="seconds, with --ranks")
    parser.add_argument("--bandwidth", type=float, default=NETWORK.bandwidth, help="bytes per second, with --ranks")
    options = parser.parse_args()
    link = Link(options.latency, options.bandwidth)
    clusters = [Ranks(count, link) for count in options.ranks] if options.ranks else CLUSTERS
    print(table(resnet50_norm_channels(), clusters))


if __name__ == "__main__":
    main()
