"""Momentum against plain BatchNorm in the teacher: small batches, several seeds, the same images seen.

Usage: study.py OUT [--images N] [--seeds N] [--data KIND:FOLDER]. Environment: BIN (the trainer).

Trains on Fashion-MNIST by the demo's recipe, whose learning rate grows with the batch and whose teacher averages over
the same number of images. The two normalisations of a batch size and a seed see the same images in the same order, and
are trained side by side, one thread each. Steps are timed afterwards, in one process and in turns. Writes OUT/study.md
and OUT/study.json. A study that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "apps/m2teacher/recipes/fashion_mnist.toml"
BATCHES, NORMS = (16, 64), ("momentum", "batch")
# The recipe's, which the others are scaled from.
RECIPE_BATCH, RECIPE_RATE, RECIPE_MOMENTUM, RECIPE_WARMUP = 32, 0.1, 0.97, 50
MEASURES = {"kNN": ("knn",), "kNN shifted": ("knn", "--shift", "0.3"), "linear": ("linear", "--labels-per-class", "0")}
STEP_TIME = "ms per step"
# How `time-layers` calls them, in the teacher and in the student.
TIMED = {
    "momentum": ("Momentum BatchNorm, ours", "BatchNorm, ours"),
    "batch": ("BatchNorm, torch's", "BatchNorm, torch's"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--images", type=int, default=32_000, help="seen by each training (32000)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (3)")
    parser.add_argument("--data", help="in place of Debian's dataset-fashion-mnist")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = ["--data", options.data] if options.data else []

    results: dict[str, list[dict[str, float]]] = {}
    with ThreadPoolExecutor(len(NORMS)) as pool:
        for batch, seed in itertools.product(BATCHES, range(options.seeds)):
            print(f"batch {batch}, seed {seed}", file=sys.stderr, flush=True)
            runs = [options.out / f"{norm}-{batch}-{seed}" for norm in NORMS]
            list(pool.map(lambda run, b=batch, s=seed: train(run, b, s, options.images, data), runs))
            for norm, found in zip(NORMS, pool.map(evaluate, runs), strict=True):
                results.setdefault(f"{norm}-{batch}", []).append(found)
    times = {batch: step_times(options.out, batch) for batch in BATCHES}
    tables = report(results, times, options.images, options.seeds)
    print(tables, end="")
    (options.out / "study.md").write_text(tables)
    written = {"images": options.images, "results": results, STEP_TIME: times}
    (options.out / "study.json").write_text(json.dumps(written, indent=1) + "\n")


def trainer(*arguments: object) -> str:
    """Runs the trainer with one thread; returns what it printed."""
    binary = os.environ.get("BIN", str(REPOSITORY / "build/bin/m2teacher"))
    command = [binary, "--threads", "1", *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise SystemExit(finished.stderr.splitlines()[-1] if finished.stderr else f"{command} failed")
    return finished.stdout


def train(run: Path, batch: int, seed: int, images: int, data: list[str]) -> None:
    """The run's name begins with its normalisation. A run that is there goes on, or is left as it is where complete."""
    if (run / "config.toml").exists():
        trainer("pretrain", "--resume", run)
        return
    scale = batch / RECIPE_BATCH
    trainer(
        *("--config", RECIPE, "pretrain", "--out", run, "--bn", run.name.split("-")[0], "--seed", seed, *data),
        *("--batch-size", batch, "--steps", images // batch, "--warmup-steps", round(RECIPE_WARMUP / scale)),
        *("--learning-rate", RECIPE_RATE * scale, "--param-momentum", round(RECIPE_MOMENTUM**scale, 6)),
        *("--eval-every", 0, "--keep", 1),
    )


def kept(file: Path, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What the file holds; where it is not there, measures and writes it first."""
    if not file.exists():
        file.write_text(json.dumps(measure()) + "\n")
    loaded: dict[str, float] = json.loads(file.read_text())
    return loaded


def evaluate(run: Path) -> dict[str, float]:
    """The teacher's accuracies in percent."""

    def measure() -> dict[str, float]:
        printed = {name: trainer(*arguments, "--checkpoint", run) for name, arguments in MEASURES.items()}
        return {name: float(re.findall(r"([\d.]+) %", text)[0]) for name, text in printed.items()}

    return kept(run / "accuracy.json", measure)


def step_times(out: Path, batch: int) -> dict[str, float]:
    """Milliseconds of a training step with this library's layers, and with torch's: medians, one process, in turns."""

    def measure() -> dict[str, float]:
        table = trainer("time-layers", "--recipe", out / f"momentum-{batch}-0" / "config.toml")
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
        last = {(row[0], row[1]): row[-1] for row in rows}
        return {norm: float(last[names]) for norm, names in TIMED.items()}

    return kept(out / f"step-times-{batch}.json", measure)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


def report(
    results: dict[str, list[dict[str, float]]], times: dict[int, dict[str, float]], images: int, seeds: int
) -> str:
    """A row for each normalisation and batch, then what may be said."""
    names = [*MEASURES, STEP_TIME]
    lines = [f"| teacher's normalisation, batch | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for batch, norm in itertools.product(BATCHES, NORMS):
        found = results[f"{norm}-{batch}"]
        cells = [spread([run[name] for run in found]) for name in MEASURES] + [f"{times[batch][norm]:.1f}"]
        lines.append(
            f"| {'Momentum BatchNorm' if norm == 'momentum' else 'plain BatchNorm'}, {batch} | {' | '.join(cells)} |"
        )
    lines += ["", f"Accuracy in %, mean ± standard deviation of {seeds} seeds; {images} images seen by each training."]
    lines += [verdict(results, batch) for batch in BATCHES]
    return "\n".join(lines) + "\n"


def verdict(results: dict[str, list[dict[str, float]]], batch: int) -> str:
    """What the pairs of one batch say: momentum less plain BatchNorm, seed by seed."""
    parts = []
    for name in MEASURES:
        pairs = zip(results[f"momentum-{batch}"], results[f"batch-{batch}"], strict=True)
        differences = [ours[name] - theirs[name] for ours, theirs in pairs]
        mean = statistics.mean(differences)
        deviation = statistics.stdev(differences) if len(differences) > 1 else 0.0
        same_sign = min(differences) > 0 or max(differences) < 0
        clear = same_sign and abs(mean) > 2 * deviation
        parts.append(f"{name} {mean:+.2f} ± {deviation:.2f}{'' if clear else ' (within the spread)'}")
    return f"Batch {batch}, momentum less plain, seed by seed: {'; '.join(parts)}."


if __name__ == "__main__":
    main()
