"""Draws the report of a training run: report.png from what m2teacher has left in the run's folder."""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from safetensors.numpy import load_file

CLASS_NAMES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"]
RIGHT, WRONG = "tab:green", "tab:red"


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of a metrics.csv; NaN where a cell is empty."""
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        raise SystemExit(f"{path}: holds no rows")
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def draw_loss(axes: Axes, metrics: dict[str, np.ndarray]) -> None:
    axes.plot(metrics["step"], metrics["loss"], linewidth=1)
    axes.set(title="Loss", xlabel="step", ylabel="4 - 2 (q1·k2 + q2·k1)")


def draw_schedules(axes: Axes, metrics: dict[str, np.ndarray]) -> None:
    axes.plot(metrics["step"], metrics["bn_momentum"], label="of the batch in the teacher's BatchNorm")
    axes.plot(metrics["step"], metrics["param_momentum"], label="of the teacher's own parameters")
    axes.set(title="Momentum schedule", xlabel="step", ylabel="weight", ylim=(-0.05, 1.2))
    axes.legend(loc="upper center", fontsize="small", ncols=1)


def draw_accuracy(axes: Axes, metrics: dict[str, np.ndarray]) -> None:
    measured = ~np.isnan(metrics["teacher_knn"])
    axes.plot(metrics["step"][measured], metrics["teacher_knn"][measured], marker="o", markersize=3)
    axes.set(title="Teacher's kNN accuracy (a sample of the images)", xlabel="step", ylabel="%")


def draw_neighbours(figure: Figure | SubFigure, images: np.ndarray, labels: np.ndarray) -> None:
    """One row per test image: the image itself, then its nearest training images, nearest first.

    images is (rows, 1 + neighbours, H, W), labels is (rows, 1 + neighbours).
    """
    figure.suptitle("Test images (left) and the training images that the teacher finds nearest")
    grid = figure.subplots(*labels.shape, squeeze=False)
    for row, (row_images, row_labels) in enumerate(zip(images, labels, strict=True)):
        for column, (image, label) in enumerate(zip(row_images, row_labels, strict=True)):
            axes = grid[row, column]
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=255)
            axes.set_xticks([])
            axes.set_yticks([])
            colour = "black" if column == 0 else RIGHT if label == row_labels[0] else WRONG
            axes.set_title(CLASS_NAMES[label], fontsize=7, color=colour, pad=2)
            for spine in axes.spines.values():
                spine.set_color(colour)
                spine.set_linewidth(2 if column == 0 else 1)


def draw_report(run: Path) -> Path:
    """Draws `run`/report.png from metrics.csv and neighbours.safetensors in `run`."""
    metrics = read_metrics(run / "metrics.csv")
    neighbours = load_file(run / "neighbours.safetensors")
    figure = plt.figure(figsize=(14, 11), layout="constrained")
    curves, pictures = figure.subfigures(1, 2, width_ratios=[1, 1.25])
    panels = curves.subplots(3, 1)
    draw_loss(panels[0], metrics)
    draw_schedules(panels[1], metrics)
    draw_accuracy(panels[2], metrics)
    draw_neighbours(pictures, neighbours["images"], neighbours["labels"])
    out = run / "report.png"
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder with metrics.csv and neighbours.safetensors")
    print(draw_report(parser.parse_args().run))


if __name__ == "__main__":
    main()
