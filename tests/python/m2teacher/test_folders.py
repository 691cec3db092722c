"""The trainer on folders of images: with labels and without, with a file that is no image, stopped and resumed."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
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
    assert (features / "classes.txt").read_text().splitlines() == ["blue", "green", "red"]
    whole = sorted(path for path in (labelled / "train").rglob("*.png") if path != broken)
    assert (features / "train-files.txt").read_text().splitlines() == [str(path) for path in whole]
    assert len((features / "test-files.txt").read_text().splitlines()) == 15

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
    assert sorted(path.name for path in features.iterdir()) == ["train-features.npy", "train-files.txt"]
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


def test_an_image_beside_the_classes(m2teacher: Run, labelled: Path, tmp_path: Path) -> None:
    write_png(labelled / "train/cover.png", coloured(COLOURS["red"], np.random.default_rng(1)))
    (labelled / "train/red/broken.png").unlink()
    (labelled / "train/notes.txt").write_text("mine")
    run = tmp_path / "run"
    result = m2teacher(*folder_arguments(labelled, run))
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 2
    assert (
        "1 file passed over, as images are files whose names end in .jpg, .jpeg or .png (found: 1 of .txt)"
        in warnings[0]
    )
    assert "1 of 61 images in no class's folder, the first: cover.png" in warnings[1]
    rows = metrics(run)
    assert all(row[rows[0].index("teacher_knn")] for row in rows[1:])
    for command in (("knn", "--neighbours", 5), ("linear", "--labels-per-class", "0,20")):
        assert m2teacher(*command, "--checkpoint", run).returncode == 0
    features = tmp_path / "features"
    assert m2teacher("features", "--checkpoint", run, "--out", features).returncode == 0
    labels = np.load(features / "train-labels.npy")
    files = (features / "train-files.txt").read_text().splitlines()
    assert [file for file, label in zip(files, labels, strict=True) if label < 0] == [str(labelled / "train/cover.png")]
    found = run / "neighbours.safetensors"
    result = m2teacher("neighbours", "--checkpoint", run, "--out", found, "--queries", 6, "--neighbours", 60)
    assert result.returncode == 0, result.stderr
    assert load_file(found)["labels"][:, 0].tolist() == [0, 1, 2, 0, 1, 2]


def test_probes_with_more_labels_than_there_are(m2teacher: Run, labelled: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert m2teacher(*folder_arguments(labelled, run)).returncode == 0
    for image in list((labelled / "train/green").iterdir())[:5]:
        image.unlink()
    # A default that cannot be had is left out; what was asked for is an error, before the work.
    default = m2teacher("linear", "--checkpoint", run)
    assert default.returncode == 0, default.stderr
    assert [line.split(":")[0] for line in default.stdout.splitlines()] == [
        "linear (all labels)",
        "linear (10 labels per class)",
    ]
    why = "class green has 15 training images, 100 were asked for"
    assert f"left out: linear (100 labels per class): class blue has {PER_CLASS} training images" in default.stderr
    asked = m2teacher("linear", "--checkpoint", run, "--labels-per-class", "0,16")
    assert asked.returncode == 1
    assert asked.stdout == ""
    assert asked.stderr.splitlines() == [f"m2teacher: error: --labels-per-class: {why.replace('100', '16')}"]
    # Only reading shows that images are missing: then the rest is printed.
    for image in list((labelled / "train/green").iterdir())[:3]:
        image.write_bytes(b"no image")
    late = m2teacher("linear", "--checkpoint", run, "--labels-per-class", "0,14,3")
    assert late.returncode == 1
    assert [line.split(":")[0] for line in late.stdout.splitlines()] == [
        "linear (all labels)",
        "linear (3 labels per class)",
    ]
    assert "--labels-per-class: class green has 12 training images, 14 were asked for" in late.stderr


def test_names_that_are_no_utf8(m2teacher: Run, tmp_path: Path) -> None:
    root = os.fsencode(tmp_path)
    for folder, classes in {b"im\xe4ges": (b"a", b"b"), b"images": (b"\xe4a", b"b")}.items():
        for part, count in {b"train": PER_CLASS, b"test": 5}.items():
            for name, colour in zip(classes, COLOURS.values(), strict=False):
                for i in range(count):
                    path = Path(os.fsdecode(os.path.join(root, folder, part, name, b"\xfc%d.png" % i)))
                    write_png(path, coloured(colour, np.random.default_rng(i)))
    # Settings are text in UTF-8: refused before anything is done.
    run = tmp_path / "run"
    refused = m2teacher(*folder_arguments(tmp_path / os.fsdecode(b"im\xe4ges"), run))
    assert refused.returncode == 1
    assert refused.stderr == (
        f"m2teacher: error: --data: 'folder:{tmp_path}/im\\xe4ges' cannot be kept in config.toml, which is UTF-8: "
        "give the folder a link with another name\n"
    )
    assert not run.exists()
    # Names of classes and files are none of the settings.
    assert m2teacher(*folder_arguments(tmp_path / "images", run)).returncode == 0
    features, found = tmp_path / "features", tmp_path / "neighbours.safetensors"
    assert m2teacher("features", "--checkpoint", run, "--out", features).returncode == 0
    assert (features / "classes.txt").read_bytes() == b"b\n\xe4a\n"
    assert (features / "test-files.txt").read_bytes().splitlines()[-1] == root + b"/images/test/\xe4a/\xfc4.png"
    result = m2teacher("neighbours", "--checkpoint", run, "--out", found, "--queries", 2, "--neighbours", 2)
    assert result.returncode == 0, result.stderr
    with safe_open(found, framework="numpy") as file:
        assert json.loads(file.metadata()["class_names"]) == ["b", "\ufffda"]
    (tmp_path / os.fsdecode(b"images/train/\xe4a/\xfc0.png")).write_bytes(b"no image")
    assert r"train/\xe4a/\xfc0.png: unreadable image" in m2teacher("knn", "--checkpoint", run, "--neighbours", 3).stderr


def test_the_command_that_goes_on_can_be_pasted(start: Start, binary: Path, labelled: Path, tmp_path: Path) -> None:
    run = tmp_path / "it's my $RUN (ü)"
    process = start(*folder_arguments(labelled, run, steps=2000))
    wait_for(lambda: (run / "metrics.csv").exists() and len(metrics(run)) > 1, process)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    command = stdout.split("go on with: ")[1].strip()
    script = f'm2teacher() {{ "{binary}" "$@"; }}; ' + command.replace("pretrain", "pretrain --steps 7")
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert f"--steps: got 7, but the run in {run} was started with 2000" in result.stderr


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
