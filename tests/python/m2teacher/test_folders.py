"""The trainer on folders of images: with labels and without, with a file that is no image, stopped and resumed."""

import re
import signal
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from .conftest import REPOSITORY, Run, Start, checkpoint_of, metrics, pretrain_arguments, wait_for

PER_CLASS = 20
COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 50, 30)}


def write_png(path: Path, image: np.ndarray) -> None:
    """Writes an (H, W, 3) image, uint8."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = image.shape
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def coloured(colour: tuple[int, int, int], generator: np.random.Generator) -> np.ndarray:
    height, width = generator.integers(36, 48, size=2)
    return np.clip(np.array(colour) + generator.integers(-25, 25, size=(height, width, 3)), 0, 255).astype(np.uint8)


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Three classes to train on and to test, and one file that is no image."""
    folder = tmp_path / "images"
    generator = np.random.default_rng(0)
    for part, count in {"train": PER_CLASS, "test": 5}.items():
        for name, colour in COLOURS.items():
            for i in range(count):
                write_png(folder / part / name / f"{i:02}.png", coloured(colour, generator))
    (folder / "train/red/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot an image")
    return folder


def folder_arguments(images: Path, out: Path, **options: object) -> list[str]:
    chosen = {"image_size": 32, "checkpoint_every": 7, "loader_threads": 2} | options
    return pretrain_arguments(f"folder:{images}", out, **chosen)


def test_images_with_labels(m2teacher: Run, labelled: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = m2teacher(*folder_arguments(labelled, run))
    assert result.returncode == 0, result.stderr
    broken = labelled / "train/red/broken.png"
    assert result.stderr.count(str(broken)) == 1
    assert "1 of 61 images could not be read and were passed over" in result.stderr
    rows = metrics(run)
    assert all(0 <= float(row[rows[0].index("teacher_knn")]) <= 100 for row in rows[1:])

    knn = m2teacher("knn", "--checkpoint", run, "--neighbours", 5)
    assert knn.returncode == 0, knn.stderr
    assert float(re.search(r"([\d.]+) %", knn.stdout)[1]) > 80  # of three classes

    features = tmp_path / "features"
    assert m2teacher("features", "--checkpoint", run, "--out", features).returncode == 0
    assert np.load(features / "train-features.npy").shape == (3 * PER_CLASS, 64)
    assert np.load(features / "train-labels.npy").tolist() == [0] * PER_CLASS + [1] * PER_CLASS + [2] * PER_CLASS
    assert np.load(features / "test-labels.npy").tolist() == [0] * 5 + [1] * 5 + [2] * 5

    strict = m2teacher(*folder_arguments(labelled, tmp_path / "strict"), "--strict")
    assert strict.returncode == 1
    assert str(broken) in strict.stderr.splitlines()[-1]
    shifted = m2teacher("knn", "--checkpoint", run, "--shift", 0.1)
    assert shifted.returncode == 1
    assert "--data: this needs images of one size in memory" in shifted.stderr


def test_images_without_labels(m2teacher: Run, tmp_path: Path) -> None:
    images = tmp_path / "images"
    generator = np.random.default_rng(0)
    for i in range(30):
        write_png(images / f"{i:02}.png", coloured(list(COLOURS.values())[i % 3], generator))
    run = tmp_path / "run"
    result = m2teacher(*folder_arguments(images, run))
    assert result.returncode == 0, result.stderr
    rows = metrics(run)
    assert all(row[rows[0].index("teacher_knn")] == "" for row in rows[1:])
    features = tmp_path / "features"
    assert m2teacher("features", "--checkpoint", run, "--out", features).returncode == 0
    assert sorted(path.name for path in features.iterdir()) == ["train-features.npy"]
    for command in ("knn", "linear", "compare"):
        refused = m2teacher(command, "--checkpoint", run)
        assert refused.returncode == 1
        assert f"--data: folder:{images} has no test images, which {command} needs" in refused.stderr

    found = run / "neighbours.safetensors"
    result = m2teacher("neighbours", "--checkpoint", run, "--out", found, "--queries", 4, "--neighbours", 3)
    assert result.returncode == 0, result.stderr
    tensors = load_file(found)
    assert tensors["images"].shape == (4, 4, 3, 32, 32)
    assert "labels" not in tensors
    # No image is its own neighbour.
    for row in tensors["images"]:
        assert not any((row[0] == other).all() for other in row[1:])
    pytest.importorskip("matplotlib", reason="the report is drawn with matplotlib")
    sys.path.insert(0, str(REPOSITORY / "apps/m2teacher"))
    from report import draw_report

    assert draw_report(run).read_bytes().startswith(b"\x89PNG")


def test_threads_that_read_change_nothing(m2teacher: Run, labelled: Path, tmp_path: Path) -> None:
    one = {"loader_threads": 1, "batches_ahead": 1}
    assert m2teacher(*folder_arguments(labelled, tmp_path / "one", **one)).returncode == 0
    assert m2teacher(*folder_arguments(labelled, tmp_path / "many", loader_threads=5)).returncode == 0
    one_end, many_end = (load_file(checkpoint_of(tmp_path / run)) for run in ("one", "many"))
    assert one_end.keys() == many_end.keys()
    assert all((one_end[name] == many_end[name]).all() for name in one_end)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "many")


def test_stopped_and_taken_up_again(start: Start, m2teacher: Run, labelled: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    long = {"steps": 200, "eval_every": 50}
    assert m2teacher(*folder_arguments(labelled, whole, **long)).returncode == 0
    process = start(*folder_arguments(labelled, run, **long))
    wait_for(lambda: (run / "metrics.csv").exists() and len(metrics(run)) > 4, process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "go on with: m2teacher pretrain --resume" in stdout
    assert m2teacher("pretrain", "--resume", run).returncode == 0
    assert checkpoint_of(run, 200).read_bytes() == checkpoint_of(whole, 200).read_bytes()
    assert metrics(run) == metrics(whole)
