"""The recipes of the paper's runs: the trainer takes them, and their numbers are those of the published code."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import REPOSITORY, Run

RECIPES = REPOSITORY / "apps/m2teacher/recipes"
# Of github.com/zengarden/momentum2-teacher, momentum_teacher/exps/arxiv; the learning rate is per 256 images.
PUBLISHED = {
    "architecture": "resnet50",
    "projector-hidden": 4096,
    "predictor-hidden": 4096,
    "projector-out": 256,
    "epochs": 100,
    "warmup-epochs": 10,
    "optimizer": "sgd",
    "base-learning-rate": 0.05,
    "sgd-momentum": 0.9,
    "weight-decay": 1e-4,
    "param-momentum": 0.99,
}
OF_BATCH = {
    256: {},
    1024: {},
    4096: {"optimizer": "lars", "base-learning-rate": 0.45, "weight-decay": 1e-6, "lars-trust-coefficient": 1e-3},
}
# In place of a ResNet-50 and of ImageNet, for a step on a CPU.
SMALL = {
    "architecture": "small", "widths": "8", "projector-hidden": 16, "predictor-hidden": 16, "projector-out": 8,
    "batch-size": 2,
}  # fmt: skip


def settings(text: str) -> dict[str, str]:
    """The options of a file, all of which are one line each."""
    lines = (line.partition(" = ") for line in text.splitlines() if " = " in line and not line.startswith("#"))
    return {name: value.strip('"') for name, _, value in lines}


def value(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


@pytest.mark.parametrize("batch", OF_BATCH)
def test_recipe_of_the_paper(m2teacher: Run, data: Path, tmp_path: Path, batch: int) -> None:
    recipe, run = RECIPES / f"imagenet_resnet50_{batch}.toml", tmp_path / "run"
    written = {name: value(text) for name, text in settings(recipe.read_text()).items()}
    expected = {**PUBLISHED, **OF_BATCH[batch], "batch-size": batch, "image-size": 224, "precision": "bf16"}
    assert written == expected

    smaller = [word for name, option in SMALL.items() for word in (f"--{name}", option)]
    result = m2teacher("pretrain", "--config", recipe, "--data", f"idx:{data}", *smaller, "--steps", 1, "--out", run)
    assert result.returncode == 0, result.stderr
    taken = settings((run / "config.toml").read_text())
    for name, wanted in expected.items():
        assert value(taken[name]) == pytest.approx(SMALL.get(name, wanted)), name
    assert float(taken["learning-rate"]) == pytest.approx(expected["base-learning-rate"] * 2 / 256)
