"""Trains a small ResNet with the C++ trainer for a few steps, and prints its images per second last.

    python -m benchmarks.distributed.trainer_rate --ranks 2

As benchmarks/distributed/weak_scaling.py has it: one thread per rank, as many images per rank for any number of ranks.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

BATCH, SIDE, IMAGES = 16, 64, 2000  # a rank's batch; the images are noise
NETWORK = "--architecture small --widths 16,32,64,128 --pool 1 --projector-hidden 64 --predictor-hidden 64"


def write_idx(file: Path, values: torch.Tensor) -> None:
    header = bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape)
    file.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


def write_images(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "t10k"):
        images = torch.randint(0, 256, (IMAGES, SIDE, SIDE), generator=generator)
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", torch.zeros(IMAGES))


def images_per_second(ranks: int, steps: int) -> float:
    """Median over the rows of metrics.csv but the first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder)
        python = [sys.executable]
        if ranks > 1:
            python += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*python, "-m", "momentum_bn.m2teacher", "--threads", "1", "pretrain", *NETWORK.split()]
        command += ["--data", f"idx:{folder}", "--out", f"{folder}/run", "--batch-size", str(ranks * BATCH)]
        command += ["--steps", str(steps), "--eval-every", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
        with (folder / "run" / "metrics.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    return statistics.median(float(row["images_per_second"]) for row in rows[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    print(f"{images_per_second(options.ranks, options.steps):.1f}")


if __name__ == "__main__":
    main()
