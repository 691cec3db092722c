"""`--device`. On meta, whole steps run on tensors without values, where every read from the device and every mixture of
devices is an error, as it would be a wait or an error on a GPU."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from .conftest import Run, pretrain_arguments, recipe, write_data
from .test_folders import COLOURS, coloured, write_png

STEPS = 2
SECONDS = 400
# torchvision's resnet18 and resnet50 without their classifiers, and of each the projector and the predictor.
ENCODERS = {"resnet18": 11_176_512, "resnet50": 23_508_032}
FEATURES = {"resnet18": 512, "resnet50": 2048}

SMALL = [
    {"bn": bn, "student_bn": student, "precision": precision, "optimizer": optimizer, "accumulate": accumulate}
    for bn, student, precision, (optimizer, accumulate) in itertools.product(
        ["momentum", "batch", "eman"], ["fused", "torch"], ["fp32", "bf16"], [("sgd", 1), ("lars", 1), ("sgd", 3)]
    )
]
LARGE = [
    {"architecture": "resnet18", "precision": "fp32", "optimizer": "lars"},
    {"architecture": "resnet18", "precision": "bf16", "stem": "standard"},
    {"architecture": "resnet50", "precision": "bf16", "optimizer": "lars", "accumulate": 2},
    {"architecture": "resnet50", "precision": "fp32", "bn": "batch", "student_bn": "torch"},
]

# Each takes a moment where torch is loaded already, so one process does all.
RUN_ALL = """
import json, sys
from momentum_bn import m2teacher
for arguments in json.load(sys.stdin):
    print("exit code", m2teacher.run(["pretrain", "--device", "meta", *arguments]), flush=True)
"""


def dry_runs(recipes: Sequence[list[str]]) -> list[tuple[str, int]]:
    """What each prints, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps(recipes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    parts = re.split(r"exit code (\d+)\n", done.stdout)
    return [(text, int(code)) for text, code in zip(parts[::2], parts[1::2], strict=False)]


def test_every_recipe_of_the_small_encoder(tmp_path: Path) -> None:
    write_data(tmp_path / "data", train=40, test=10)
    recipes = [recipe(tmp_path / "data", **options, steps=STEPS, warmup_steps=0) for options in SMALL]
    for options, (text, code) in zip(SMALL, dry_runs(recipes), strict=True):
        assert code == 0, f"{options}: {text}"
        assert f"dry run: {STEPS} steps of {8 * options['accumulate']} images passed" in text


def test_resnets_on_coloured_images(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(12):
        write_png(tmp_path / f"images/{number}.png", coloured(list(COLOURS.values())[number % 3], generator))
    fixed = {"steps": STEPS, "warmup_steps": 0, "batch_size": 4, "image_size": 32}
    recipes = [recipe(f"folder:{tmp_path / 'images'}", **fixed, **options) for options in LARGE]
    for options, (text, code) in zip(LARGE, dry_runs(recipes), strict=True):
        assert code == 0, f"{options}: {text}"
        architecture = str(options["architecture"])
        heads = 16 * FEATURES[architecture] + 16 * 8 + 2 * (2 * 16 + 16 * 8 + 8)
        small_stem = 0 if "stem" in options else 64 * 3 * (9 - 49)
        assert f"the student has {ENCODERS[architecture] + small_stem + heads} parameters" in text


def test_needs_the_kernels_of_the_python_package(m2teacher: Run, data: Path) -> None:
    refused = m2teacher("pretrain", "--device", "meta", *recipe(data))
    assert refused.returncode == 1
    assert "--device: got meta, which needs torch's package for Python" in refused.stderr


def test_leaves_nothing_behind(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    ((_, code),) = dry_runs([recipe(data, steps=STEPS, warmup_steps=0)])
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(
    m2teacher: Run, trained: Path, data: Path, tmp_path: Path
) -> None:
    for word in ("cuda", "cuda:1"):
        refused = m2teacher(*pretrain_arguments(data, tmp_path / "run"), "--device", word)
        assert refused.returncode == 1
        assert f"--device: got {word}, but torch finds no GPU here" in refused.stderr
        assert not (tmp_path / "run").exists()
        assert (
            f"got {word}, but torch finds no GPU" in m2teacher("knn", "--checkpoint", trained, "--device", word).stderr
        )


def test_evaluation_has_no_dry_run(m2teacher: Run, trained: Path) -> None:
    refused = m2teacher("knn", "--checkpoint", trained, "--device", "meta")
    assert refused.returncode == 1
    assert "--device: got meta, which" in refused.stderr


def test_a_run_does_not_keep_its_device(m2teacher: Run, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert m2teacher(*pretrain_arguments(data, run), "--device", "cpu").returncode == 0
    assert "device" not in (run / "config.toml").read_text()
    info = m2teacher("info", "--checkpoint", run)
    assert "device" not in info.stdout
