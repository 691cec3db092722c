"""Draws the report of a training run: report.png from what m2teacher has left in the run's folder."""

import argparse
import csv
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from safetensors import safe_open

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


@dataclass
class Neighbours:
    """Rows of images: one, then those that the teacher finds nearest to it, nearest first."""

    images: np.ndarray  # (rows, 1 + neighbours, C, H, W), uint8
    labels: np.ndarray | None  # (rows, 1 + neighbours)
    class_names: list[str]


def read_neighbours(path: Path) -> Neighbours:
    with safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        labels = file.get_tensor("labels") if "labels" in names else None
        return Neighbours(file.get_tensor("images"), labels, json.loads(file.metadata()["class_names"]))


def draw_image(axes: Axes, image: np.ndarray) -> None:
    """Draws a (C, H, W) image; one channel as ink on paper."""
    if image.shape[0] == 1:
        axes.imshow(image[0], cmap="gray_r", vmin=0, vmax=255)
    else:
        axes.imshow(image.transpose(1, 2, 0))
    axes.set_xticks([])
    axes.set_yticks([])


def draw_neighbours(figure: Figure | SubFigure, neighbours: Neighbours) -> None:
    figure.suptitle("Images (left) and those that the teacher finds nearest")
    rows, columns = neighbours.images.shape[:2]
    grid = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        for column in range(columns):
            axes = grid[row, column]
            draw_image(axes, neighbours.images[row, column])
            if neighbours.labels is None:
                continue
            label = neighbours.labels[row, column]
            if label < 0:  # an image without a label
                continue
            colour = "black" if column == 0 else RIGHT if label == neighbours.labels[row, 0] else WRONG
            axes.set_title(neighbours.class_names[label], fontsize=7, color=colour, pad=2)
            for spine in axes.spines.values():
                spine.set_color(colour)
                spine.set_linewidth(2 if column == 0 else 1)


def draw_report(run: Path, class_names: list[str] | None = None) -> Path:
    """Draws `run`/report.png from metrics.csv and neighbours.safetensors in `run`.

    class_names stand for those that the data set gives.
    """
    metrics = read_metrics(run / "metrics.csv")
    figure = plt.figure(figsize=(14, 11), layout="constrained")
    curves, pictures = figure.subfigures(1, 2, width_ratios=[1, 1.25])
    draws = [draw_loss, draw_schedules]
    if not np.isnan(metrics["teacher_knn"]).all():
        draws.append(draw_accuracy)
    for axes, draw in zip(curves.subplots(len(draws), 1), draws, strict=True):
        draw(axes, metrics)
    neighbours = read_neighbours(run / "neighbours.safetensors")
    if class_names:
        neighbours.class_names = class_names
    draw_neighbours(pictures, neighbours)
    out = run / "report.png"
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder with metrics.csv and neighbours.safetensors")
    parser.add_argument("--class-names", type=lambda names: names.split(","), help="separated by commas")
    arguments = parser.parse_args()
    print(draw_report(arguments.run, arguments.class_names))


if __name__ == "__main__":
    main()
