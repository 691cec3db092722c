"""A tiny data set in Fashion-MNIST's format, and the trainer to run on it."""

import csv
import gzip
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[3]
TRAIN, TEST = 1000, 40

# The last two columns of metrics.csv hold times.
TIMES = 2

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    payload = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(payload) if path.suffix == ".gz" else payload)


def bars(count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images with one bright bar, whose place is the label."""
    labels = np.arange(count) % 10
    images = generator.integers(0, 60, size=(count, 28, 28))
    for image, label in zip(images, labels, strict=True):
        image[2 + 2 * label : 5 + 2 * label, 4:24] = 220
    return images, labels


def write_data(folder: Path, train: int = TRAIN, test: int = TEST) -> None:
    """The four files of the MNIST family, two of them compressed, with so many images."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    train_images, train_labels = bars(train, generator)
    test_images, test_labels = bars(test, generator)
    write_idx(folder / "train-images-idx3-ubyte.gz", train_images)
    write_idx(folder / "train-labels-idx1-ubyte", train_labels)
    write_idx(folder / "t10k-images-idx3-ubyte.gz", test_images)
    write_idx(folder / "t10k-labels-idx1-ubyte", test_labels)


def write_images(folder: Path) -> None:
    """Four small images in colour, of both formats."""
    folder.mkdir()
    for i, ending in enumerate(["jpg", "png", "jpg", "png"]):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{ending}")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the data set."""
    folder = tmp_path / "data"
    write_data(folder)
    return folder


@pytest.fixture(scope="session")
def binary() -> Path:
    """The trainer. M2TEACHER in the environment names another one."""
    path = Path(os.environ.get("M2TEACHER", REPOSITORY / "build/bin/m2teacher"))
    if not path.exists():
        pytest.fail(f"{path} is not there: build it first (make setup), or set M2TEACHER")
    return path


@pytest.fixture(scope="session")
def m2teacher(binary: Path) -> Run:
    """Runs the trainer with the given arguments."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(binary), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    return run


def recipe(data: Path | str, **options: object) -> list[str]:
    """Options for a short training of a small model; `options` in place of or beside those below.

    data is the folder of an IDX data set, or what --data takes.
    """
    spec = data if isinstance(data, str) else f"idx:{data}"
    chosen: dict[str, object] = {"data": spec, "threads": 1, "architecture": "small", "widths": "8,16"}
    chosen |= {"projector_hidden": 16, "predictor_hidden": 16, "projector_out": 8, "steps": 30, "batch_size": 8}
    chosen |= {"warmup_steps": 5, "learning_rate": 0.1} | options
    return [text for name, value in chosen.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def pretrain_arguments(data: Path | str, out: Path, **options: object) -> list[str]:
    return ["pretrain", *recipe(data, **({"eval_every": 10} | options)), "--out", str(out)]


@pytest.fixture
def train(m2teacher: Run, data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains a small model on the tiny data set; returns the run's folder, which the next call uses again."""

    def run(**options: object) -> Path:
        out = tmp_path / "run"
        result = m2teacher(*pretrain_arguments(data, out, **options), "--overwrite")
        assert result.returncode == 0, result.stderr
        return out

    return run


@pytest.fixture(scope="session")
def trained(m2teacher: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder for tests that only read it."""
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder / "data")
    result = m2teacher(*pretrain_arguments(folder / "data", folder / "run"))
    assert result.returncode == 0, result.stderr
    return folder / "run"


def checkpoint_of(run: Path, step: int = 30) -> Path:
    return run / f"checkpoint-{step:08}.safetensors"


def steps_of(run: Path) -> list[int]:
    """The steps that a run has checkpoints of, in order."""
    return sorted(int(path.stem.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*.safetensors"))


def metrics(run: Path) -> list[list[str]]:
    with (run / "metrics.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert not rows or rows[0][-TIMES:] == ["seconds", "images_per_second"]  # none: it is just being made
    return [row[:-TIMES] for row in rows]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def take_interrupts() -> None:
    """What a shell runs in the background ignores SIGINT, as the trainer then does; these tests may be run so."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(binary: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the trainer without waiting for its end."""
    started = []

    def run(*arguments: object, output: int = subprocess.PIPE) -> subprocess.Popen[str]:
        command = [str(binary), *map(str, arguments)]
        process = subprocess.Popen(command, stdout=output, stderr=output, text=True, preexec_fn=take_interrupts)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()
