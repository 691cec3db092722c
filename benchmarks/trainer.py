"""Times the C++ trainer beside the same training in Python, and its loader beside images in memory.

Everything that is compared runs in one process, in turns; a figure is the median over the rounds. Prints tables and
writes them as trainer.txt and trainer.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from . import allocators
from .machine import machine
from .timing import interleaved_seconds
from .trainer_library import FASHION_MNIST, RECIPE, REPOSITORY, Trainer
from .trainer_peer import NORMS, PythonTrainer, load_images

FOLDER_IMAGES, FOLDER_SIDE, FOLDER_BATCH = 2000, 224, 16

Rates = dict[str, list[float]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainer", description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["32", "128", "loader"], metavar="PART")
    parser.add_argument("--data", default=FASHION_MNIST, help="folder with Fashion-MNIST's files")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each contender")
    parser.add_argument("--seconds", type=float, default=0.7, help="of each timing, at least one step")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs/benchmarks", help="folder of the results")
    options = parser.parse_args()

    subprocess.run(["cmake", "--build", str(REPOSITORY / "build"), "--target", "m2teacher_benchmark"], check=True)
    tables, results = [], {}
    for part in options.parts:
        if part == "loader":
            title, rates = "Loader", loader_rates(options.data, options.rounds, options.seconds)
        else:
            title, rates = f"Batch {part}", peer_rates(options.data, int(part), options.rounds, options.seconds)
        results[title] = rates
        tables.append(table(title, rates))
        print(tables[-1])
    where = {**machine(), "allocator": allocators.describe()}
    tables.append("\n".join(f"{key}: {value}" for key, value in where.items()))
    print(tables[-1])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "trainer.txt").write_text("\n".join(tables) + "\n")
    (options.out / "trainer.json").write_text(json.dumps({"machine": where, "images_per_second": results}, indent=1))


def rates_of(contenders: dict[str, Callable[[], object]], images: int, rounds: int, seconds: float) -> Rates:
    """Images per second, one value per round."""
    timings = interleaved_seconds(contenders, rounds, seconds)
    return {name: [images / taken for taken in values] for name, values in timings.items()}


def peer_rates(data: str, batch_size: int, rounds: int, seconds: float) -> Rates:
    """The demo's encoder with each normalisation in the teacher, in C++ and in Python."""
    images = load_images(data)
    contenders: dict[str, Callable[[], object]] = {}
    for norm in NORMS:
        contenders[f"C++, {norm}"] = partial(Trainer(f"idx:{data}", RECIPE, norm, batch_size).steps, 1)
        contenders[f"Python, {norm}"] = partial(PythonTrainer(images, norm, batch_size).steps, 1)
    return rates_of(contenders, batch_size, rounds, seconds)


def loader_rates(data: str, rounds: int, seconds: float) -> Rates:
    """With the loader and with batches that are in memory: Fashion-MNIST, and a folder of JPEG files."""
    small = {
        "Fashion-MNIST, loader": Trainer(f"idx:{data}", RECIPE, "momentum", 32),
        "Fashion-MNIST, in memory": Trainer(f"idx:{data}", RECIPE, "momentum", 32, kept=True),
    }
    rates = rates_of({name: partial(trainer.steps, 1) for name, trainer in small.items()}, 32, rounds, seconds)
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder))
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text('[pretrain]\narchitecture = "resnet18"\n')
        large = {
            "JPEG folder, loader": Trainer(f"folder:{folder}", recipe, "momentum", FOLDER_BATCH),
            "JPEG folder, in memory": Trainer(f"folder:{folder}", recipe, "momentum", FOLDER_BATCH, kept=True),
        }
        calls = {name: partial(trainer.steps, 1) for name, trainer in large.items()}
        rates |= rates_of(calls, FOLDER_BATCH, rounds, seconds)
        for trainer in large.values():
            trainer.close()
    return rates


def write_jpegs(folder: Path, count: int = FOLDER_IMAGES) -> None:
    """Smooth random pictures, as large as those that the networks see."""
    from matplotlib import image

    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        coarse = torch.rand(1, 3, 28, 28, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, size=(FOLDER_SIDE, FOLDER_SIDE), mode="bicubic")
        pixels = smooth.clamp(0, 1).mul(255).byte()[0].permute(1, 2, 0).contiguous().numpy()
        image.imsave(folder / f"{number:04}.jpg", pixels)


def table(title: str, rates: Rates) -> str:
    """Medians, and each in multiples of the Python training whose teacher has no normalisation (or of the last row)."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    base = medians.get("Python, identity")
    lines = [f"| {title} | images/s | of Python with Identity |" if base else f"| {title} | images/s | of in memory |"]
    lines.append("| --- | ---: | ---: |")
    for name, rate in medians.items():
        reference = base or medians[name.split(",")[0] + ", in memory"]
        lines.append(f"| {name} | {rate:.0f} | {rate / reference:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
