"""The trainer's commands from end to end on a tiny data set."""

import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .conftest import REPOSITORY, TRAIN, Run, checkpoint_of, pretrain_arguments, recipe, write_data, write_idx

Train = Callable[..., Path]


def test_pretrain_leaves_settings_metrics_and_checkpoints_alone(train: Train) -> None:
    out = train(checkpoint_every=20)
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-00000020.safetensors",
        "checkpoint-00000030.safetensors",
        "config.toml",
        "metrics.csv",
    ]


def test_metrics_show_the_schedules_and_a_falling_loss(train: Train) -> None:
    with (train(warmup_steps=15, learning_rate=0.1) / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == [10, 20, 30]
    assert [int(row["images"]) for row in rows] == [80, 160, 240]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    # Step n is the n-th update: the schedules stand at n - 1.
    cosine = (np.cos(np.pi * np.array([9, 19, 29]) / 30) + 1) / 2
    assert [float(row["bn_momentum"]) for row in rows] == pytest.approx(cosine, rel=1e-4)
    assert [float(row["param_momentum"]) for row in rows] == pytest.approx(1 - 0.01 * cosine, rel=1e-6)
    # The learning rate has risen by a fifteenth of its peak at each of 15 steps; then 15 steps of a cosine follow.
    after_warmup = (np.cos(np.pi * np.array([4, 14]) / 15) + 1) / 2
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx(0.1 * np.array([10 / 15, *after_warmup]))
    assert all(0 <= float(row["teacher_knn"]) <= 100 for row in rows)


def test_python_reads_the_checkpoint(train: Train) -> None:
    path = checkpoint_of(train(seed=5))
    tensors = load_file(path)
    assert tensors["teacher.encoder.conv1.weight"].shape == (8, 1, 3, 3)
    assert tensors["student.predictor.fc2.bias"].shape == (8,)
    assert tensors["teacher.encoder.bn1.cur_iter_state"].item() == 30
    assert tensors["teacher.encoder.bn1.momentum_state"].dtype == torch.float64
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "m2teacher"
    assert metadata["config"] == (path.parent / "config.toml").read_text()
    assert "widths = [8, 16]" in metadata["config"]
    assert "seed = 5" in metadata["config"]
    assert json.loads(metadata["trained_on"])["images"] == TRAIN


def test_same_seed_same_bytes(train: Train) -> None:
    def digest(**options: object) -> str:
        return hashlib.sha256(checkpoint_of(train(**options)).read_bytes()).hexdigest()

    first = digest(seed=1)
    assert digest(seed=1) == first
    assert digest(seed=2) != first


def test_looking_at_the_accuracy_changes_nothing(train: Train) -> None:
    looked = load_file(checkpoint_of(train(eval_every=10)))
    not_looked = load_file(checkpoint_of(train(eval_every=0)))
    assert looked.keys() == not_looked.keys()
    assert all(torch.equal(looked[name], not_looked[name]) for name in looked)


def test_accuracies_of_sorted_classes_are_of_all_classes(m2teacher: Run, tmp_path: Path) -> None:
    """Noise, sorted by class as folders are: nothing can tell the classes apart."""
    classes, data, run = 5, tmp_path / "data", tmp_path / "run"
    data.mkdir()
    generator = np.random.default_rng(0)
    for name, per_class in {"train": 2100, "t10k": 510}.items():
        labels = np.repeat(np.arange(classes), per_class)
        write_idx(data / f"{name}-images-idx3-ubyte", generator.integers(0, 256, (len(labels), 8, 8)))
        write_idx(data / f"{name}-labels-idx1-ubyte", labels)
    result = m2teacher(*pretrain_arguments(data, run, steps=10, warmup_steps=0))
    assert result.returncode == 0, result.stderr
    with (run / "metrics.csv").open(newline="") as stream:
        accuracies = [float(row["teacher_knn"]) for row in csv.DictReader(stream)]
    assert accuracies == [pytest.approx(100 / classes, abs=8)]
    out = tmp_path / "neighbours.safetensors"
    drawn = []
    for seed in (0, 0, 1):
        assert m2teacher("neighbours", "--checkpoint", run, "--out", out, "--seed", seed).returncode == 0
        drawn.append(load_file(out))
        assert drawn[-1]["labels"][:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert torch.equal(drawn[0]["images"], drawn[1]["images"])
    assert not torch.equal(drawn[0]["images"], drawn[2]["images"])


def test_compare_leaves_out_what_a_class_has_too_few_labels_for(m2teacher: Run, tmp_path: Path) -> None:
    write_data(tmp_path / "data", train=200)
    assert m2teacher(*pretrain_arguments(tmp_path / "data", tmp_path / "run")).returncode == 0
    result = m2teacher("compare", "--checkpoint", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()]
    assert [row[-1] for row in rows[2:]] == ["-"] * 4
    assert all(float(row[-2]) > 5 for row in rows[2:])


def percent(text: str) -> list[float]:
    return [float(figure) for figure in re.findall(r"([\d.]+) %", text)]


def test_knn_and_linear_print_accuracies(trained: Path, m2teacher: Run, data: Path) -> None:
    source = ("--checkpoint", trained)
    knn = m2teacher("knn", *source, "--neighbours", 5)
    assert knn.returncode == 0, knn.stderr
    assert len(percent(knn.stdout)) == 1
    assert percent(knn.stdout)[0] > 30  # of ten classes
    assert m2teacher("knn", *source, "--neighbours", 5).stdout == knn.stdout
    assert m2teacher("knn", *source, "--neighbours", 5, "--network", "student").returncode == 0
    assert m2teacher("knn", *source, "--neighbours", 5, "--shift", 0.3).returncode == 0
    # The run's own images unless others are given.
    assert m2teacher("knn", *source, "--neighbours", 5, "--data", f"idx:{data}").stdout == knn.stdout
    linear = m2teacher("linear", *source, "--labels-per-class", "0,10,5")
    assert linear.returncode == 0, linear.stderr
    assert len(percent(linear.stdout)) == 3
    assert min(percent(linear.stdout)) > 30


def test_compare_prints_a_table(trained: Path, m2teacher: Run) -> None:
    result = m2teacher("compare", "--checkpoint", trained)
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()]
    assert rows[0][1:] == ["kNN", "kNN shifted", "linear", "10 labels", "100 labels"]
    assert [row[0] for row in rows[2:]] == ["raw pixels", "untrained encoder", "trained student", "trained teacher"]
    figures = np.array([[float(cell) for cell in row[1:]] for row in rows[2:]])
    # The bar's place is the class: easy for pixels, until the images are shifted.
    assert figures[0, 0] == 100
    assert figures[0, 1] < 90
    assert ((figures > 5) & (figures <= 100)).all()


def test_neighbours_and_report(train: Train, m2teacher: Run) -> None:
    out = train()
    result = m2teacher(
        *("neighbours", "--checkpoint", out, "--out", out / "neighbours.safetensors"),
        *("--queries", 3, "--neighbours", 4),
    )
    assert result.returncode == 0, result.stderr
    found = load_file(out / "neighbours.safetensors")
    assert found["images"].shape == (3, 5, 1, 28, 28)
    assert found["images"].dtype == torch.uint8
    assert found["labels"][:, 0].tolist() == [0, 1, 2]

    pytest.importorskip("matplotlib", reason="the report is drawn with matplotlib")
    sys.path.insert(0, str(REPOSITORY / "apps/m2teacher"))
    from report import draw_report

    picture = draw_report(out)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_time_layers_names_the_machine(m2teacher: Run, data: Path) -> None:
    result = m2teacher("time-layers", *recipe(data, batch_size=4), "--rounds", 1)
    assert result.returncode == 0, result.stderr
    rows = re.findall(r"^\| +(.*?) +\| +(.*?) +\| +\d+\.\d\d \| +\d+\.\d\d \|$", result.stdout, re.MULTILINE)
    assert rows == [
        ("published formulas, eager", "BatchNorm, torch's"),
        ("BatchNorm, torch's", "BatchNorm, torch's"),
        ("Momentum BatchNorm, ours", "BatchNorm, torch's"),
        ("Momentum BatchNorm, ours", "BatchNorm, ours"),
    ]
    assert "1 threads, allocator" in result.stdout
    assert "views_per_update" not in result.stderr, "nobody trains with these teachers"


def test_progress_is_plain_lines_where_stderr_is_no_terminal(m2teacher: Run, data: Path, tmp_path: Path) -> None:
    result = m2teacher(*pretrain_arguments(data, tmp_path / "run", steps=2, warmup_steps=0))
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stderr
    assert re.search(r"^step 2/2  loss \d\.\d{3}  \d+ images/s  0:00 left$", result.stderr, re.MULTILINE)
