"""What the trainer hands over: features for NumPy and state dicts for PyTorch, the same numbers in both."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from .conftest import TEST, TRAIN, Run, bars, pretrain_arguments, write_data
from .resnet18 import STATE_DICT_NAMES, ResNet18

Train = Callable[..., Path]
IMAGES = 50  # a ResNet-18 takes its time


def standardised(images: np.ndarray, metadata: dict[str, str]) -> torch.Tensor:
    """(N, H, W) pixels as the exported encoder takes them."""
    mean, std = (torch.tensor(json.loads(metadata[key])) for key in ("pixel_mean", "pixel_std"))
    pixels = torch.from_numpy(images.astype(np.float32)).unsqueeze(1) / 255
    return (pixels - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


@pytest.mark.parametrize("stem", ["small", "standard"])
def test_resnet18_gives_the_same_features_in_python(m2teacher: Run, tmp_path: Path, stem: str) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    write_data(data, IMAGES, TEST)
    # Large steps, so that no statistic is near its initial value.
    options = {"architecture": "resnet18", "stem": stem, "steps": 3, "warmup_steps": 0, "eval_every": 0}
    result = m2teacher(*pretrain_arguments(data, run, **options))
    assert result.returncode == 0, result.stderr
    for network in ("teacher", "student"):
        state_dict = tmp_path / f"{network}.safetensors"
        source = ("--checkpoint", run, "--network", network)
        assert m2teacher("export", *source, "--out", state_dict).returncode == 0
        assert m2teacher("features", *source, "--out", tmp_path / network).returncode == 0

        tensors = load_file(state_dict)
        assert sorted(tensors) == sorted(STATE_DICT_NAMES)
        encoder = ResNet18(1, small_stem=stem == "small")
        encoder.load_state_dict(tensors, strict=True)
        encoder.eval()
        with safe_open(state_dict, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        assert (metadata["architecture"], metadata["stem"]) == ("resnet18", stem)
        images, labels = bars(IMAGES, np.random.default_rng(0))
        with torch.no_grad():
            expected = encoder(standardised(images, metadata)).numpy()
        features = np.load(tmp_path / network / "train-features.npy")
        assert features.shape == (IMAGES, 512)
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        assert np.std(expected, axis=0).max() > 0.01  # different for different images
        assert (np.load(tmp_path / network / "train-labels.npy") == labels).all()
        assert np.load(tmp_path / network / "test-features.npy").shape == (TEST, 512)
    student, teacher = (np.load(tmp_path / network / "test-features.npy") for network in ("student", "teacher"))
    assert not np.allclose(student, teacher)


def test_export_holds_batchnorms_keys_only(trained: Path, m2teacher: Run, tmp_path: Path) -> None:
    out = tmp_path / "encoder.safetensors"
    result = m2teacher("export", "--checkpoint", trained, "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{out}\n"
    tensors = load_file(out)
    assert {name.split(".")[-1] for name in tensors} == {
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert tensors["layer2.0.downsample.0.weight"].shape == (16, 8, 1, 1)
    assert not any(name.startswith(("projector", "predictor", "fc")) for name in tensors)


def test_info_tells_what_a_checkpoint_holds(train: Train, m2teacher: Run) -> None:
    run = train(checkpoint_every=20)
    result = m2teacher("info", "--checkpoint", run / "checkpoint-00000020.safetensors")
    assert result.returncode == 0, result.stderr
    assert "whole, after step 20 of 30" in result.stdout
    assert f"trained on {TRAIN} images of 1 x 28 x 28" in result.stdout
    assert (run / "config.toml").read_text() in result.stdout
    for part in ("student", "teacher", "optimiser"):
        assert f"| {part} " in result.stdout
    listed = m2teacher("info", "--checkpoint", run, "--tensors").stdout
    assert "| teacher.encoder.conv1.weight " in listed
    assert "[8, 1, 3, 3]" in listed


def test_info_shows_a_strangers_escapes_as_text(m2teacher: Run, data: Path, tmp_path: Path) -> None:
    link, run = tmp_path / "\x1b[2Jdata", tmp_path / "run"
    link.symlink_to(data)
    trained = m2teacher(*pretrain_arguments(link, run))
    assert trained.returncode == 0, trained.stderr
    info = m2teacher("info", "--checkpoint", run)
    assert info.returncode == 0, info.stderr
    assert f'data = "idx:{tmp_path}/\\x1b[2Jdata"\n' in info.stdout
    assert "\x1b" not in info.stdout
