"""That the trainer's benchmark times the same training in both languages."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from benchmarks.trainer import table, write_jpegs
from benchmarks.trainer_library import LIBRARY, RECIPE, REPOSITORY, Trainer
from benchmarks.trainer_memory import resident_mebibytes
from benchmarks.trainer_peer import NORMS, PythonTrainer, augment, load_images

IMAGES = 200


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder in the format of Fashion-MNIST, of random images."""
    generator = torch.Generator().manual_seed(0)
    for prefix, count in (("train", IMAGES), ("t10k", 10)):
        pixels = torch.randint(0, 256, (count * 784,), dtype=torch.uint8, generator=generator).numpy().tobytes()
        sizes = b"".join(size.to_bytes(4, "big") for size in (count, 28, 28))
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + sizes + pixels))
        labels = b"\0\0\x08\x01" + count.to_bytes(4, "big") + bytes(count)
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return tmp_path


@pytest.mark.parametrize("norm", NORMS)
def test_both_trainers_take_the_same_kind_of_steps(data: Path, norm: str) -> None:
    assert LIBRARY.exists(), "build it with: ninja -C build m2teacher_benchmark"
    python = PythonTrainer(load_images(str(data)), norm, batch_size=16)
    trainer = Trainer(f"idx:{data}", RECIPE, norm, batch_size=16)
    # Unrelated networks: directions are nearly orthogonal, which is a loss of 4.
    first = {"Python": python.steps(1), "C++": trainer.steps(1)}
    assert first == pytest.approx({"Python": 4, "C++": 4}, abs=0.8)
    assert torch.isfinite(torch.tensor([python.steps(3), trainer.steps(3)])).all()
    trainer.close()


def test_our_layer_and_the_published_one_train_alike(data: Path) -> None:
    losses = {norm: Trainer(f"idx:{data}", RECIPE, norm, batch_size=16).steps(5) for norm in NORMS}
    assert losses["momentum"] == pytest.approx(losses["published"], abs=1e-3)
    assert losses["momentum"] != pytest.approx(losses["identity"], abs=1e-3)


def test_kept_batches_are_used_again(data: Path) -> None:
    kept = Trainer(f"idx:{data}", RECIPE, "momentum", batch_size=16, kept=True)
    fresh = Trainer(f"idx:{data}", RECIPE, "momentum", batch_size=16)
    assert kept.steps(4) == fresh.steps(4)
    assert kept.steps(4) != fresh.steps(4)


def test_a_wrong_folder_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no such folder"):
        Trainer("idx:/nowhere", RECIPE, "momentum", batch_size=16)


def test_python_augmentations_keep_the_range_and_change_every_image(data: Path) -> None:
    images = load_images(str(data)).float().mul_(1 / 255)
    out = augment(images)
    assert out.shape == images.shape
    assert out.min() >= 0 and out.max() <= 1
    assert (out != images).flatten(1).any(1).all()


def test_jpegs_are_as_large_as_they_should_be(tmp_path: Path) -> None:
    matplotlib_image = pytest.importorskip("matplotlib.image", reason="pictures are written with matplotlib")
    write_jpegs(tmp_path, count=2)
    assert matplotlib_image.imread(tmp_path / "0001.jpg").shape == (224, 224, 3)


def test_table_gives_medians_and_ratios() -> None:
    text = table("Batch 32", {"C++, momentum": [30.0, 10.0, 20.0], "Python, identity": [10.0, 10.0, 12.0]})
    assert "| C++, momentum | 20 | 2.000 |" in text
    assert "| Python, identity | 10 | 1.000 |" in text
    assert "| A, loader | 9 | 0.900 |" in table("Loader", {"A, loader": [9.0], "A, in memory": [10.0]})


def test_memory_is_that_of_the_training(data: Path) -> None:
    small = ["--batch-size", "8", "--eval-every", "0", "--warmup-steps", "0"]
    early, late = resident_mebibytes(REPOSITORY / "build/bin/m2teacher", str(data), [10, 20], small)
    assert 50 < early < 2000
    assert late == pytest.approx(early, abs=50)
