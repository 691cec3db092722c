"""Bad input to the trainer's commands: one clear line, an exit code that is not 0, nothing half-written."""

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Run, checkpoint_of, pretrain_arguments, write_data, write_images

EVALUATIONS = ["knn", "linear", "features", "compare", "neighbours"]
READERS = [*EVALUATIONS, "export", "info"]


def out_of(command: str, path: object) -> list[str]:
    """--out where the command needs it."""
    return ["--out", str(path)] if command in ("features", "neighbours", "export") else []


def refused(run: Run, *arguments: object, says: str) -> None:
    result = run(*arguments)
    assert result.returncode not in (0, None)
    assert result.returncode > 0, "died of a signal"
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("m2teacher: error: ")
    assert says in lines[0]


def test_command_line(m2teacher: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def refuse(says: str, **options: object) -> None:
        refused(m2teacher, *pretrain_arguments(data, out, **options), says=says)

    refused(m2teacher, says="subcommand")
    refused(m2teacher, "fly", says="fly")
    refused(m2teacher, *pretrain_arguments(data, out), "--steps", 3, says="--steps")
    refuse("--fast", fast="yes")
    refuse("--batch-size: 1001 is more than the 1000 training images", batch_size=1001)
    refuse("--min-area: got 1, expected at most --max-area (0.5)", min_area=1, max_area=0.5)
    assert not out.exists()


def test_more_labels_than_there_are(m2teacher: Run, trained: Path) -> None:
    source = ("--checkpoint", trained)
    refused(
        *(m2teacher, "linear", *source, "--labels-per-class", 101),
        says="--labels-per-class: class 0 has 100 training images, 101 were asked for",
    )
    refused(m2teacher, "knn", *source, "--neighbours", 1001, says="--neighbours: 1001 is more than the 1000")
    refused(
        *(m2teacher, "neighbours", *source, "--out", "x", "--queries", 41),
        says="--queries: 41 is more than the 40 test images",
    )
    refused(
        *(m2teacher, "neighbours", *source, "--out", "x", "--neighbours", 1001),
        says="--neighbours: 1001 is more than the 1000 images to look among",
    )


def test_images_that_an_evaluation_cannot_use(m2teacher: Run, trained: Path, tmp_path: Path) -> None:
    def refuse(command: str, data: str, says: str) -> None:
        refused(m2teacher, command, "--checkpoint", trained, "--data", data, says=says)

    write_images(tmp_path / "colour")
    refuse("knn", f"folder:{tmp_path}/colour", "--data: images of 3 channels, the encoder was trained on 1")
    write_data(tmp_path / "few", train=10, test=2)
    refuse("compare", f"idx:{tmp_path}/few", "--data: has 10 training images, compare needs 20")


def test_test_images_without_labels(m2teacher: Run, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    write_images(data / "train")
    write_images(data / "test")
    options = {"steps": 2, "warmup_steps": 0, "batch_size": 2, "eval_every": 0, "image_size": 8}
    result = m2teacher(*pretrain_arguments(f"folder:{data}", out, **options))
    assert result.returncode == 0, result.stderr
    refused(m2teacher, "knn", "--checkpoint", out, says=f"--data: folder:{data} has no labels, which knn needs")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def garble_magic(path: Path) -> None:
    path.write_bytes(b"\x7fELF" + path.read_bytes()[4:])


def garble_sizes(path: Path) -> None:
    payload = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    payload = payload[:4] + struct.pack(">I", 2**32 - 1) + payload[8:]
    path.write_bytes(gzip.compress(payload) if path.suffix == ".gz" else payload)


def flip_a_byte_inside(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (truncate, ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"]),
        (garble_magic, ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"]),
        (garble_sizes, ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"]),
        # What is not compressed has no checksum.
        (flip_a_byte_inside, ["train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"]),
        (Path.unlink, ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"]),
    ],
)
def test_damaged_data(
    m2teacher: Run, data: Path, tmp_path: Path, damage: Callable[[Path], None], names: list[str]
) -> None:
    for name in names:
        path = data / name
        kept = path.read_bytes()
        damage(path)
        refused(m2teacher, *pretrain_arguments(data, tmp_path / "run"), says=name.removesuffix(".gz"))
        path.write_bytes(kept)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", EVALUATIONS)
def test_missing_data(m2teacher: Run, command: str, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nowhere = tmp_path / "nowhere"
    arguments = [command, "--checkpoint", trained, *out_of(command, out)]
    refused(m2teacher, *arguments, "--data", f"idx:{nowhere}", says=f"{nowhere}: no such folder")
    assert not out.exists()


def test_folder_that_cannot_be_written(m2teacher: Run, data: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("kept")
    for out in (in_the_way, in_the_way / "run", Path("/proc/self")):
        refused(m2teacher, *pretrain_arguments(data, out), says=f"{out}")
    assert in_the_way.read_text() == "kept"


@pytest.mark.parametrize("command", ["features", "neighbours", "export"])
def test_file_that_cannot_be_written(m2teacher: Run, tmp_path: Path, trained: Path, command: str) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("kept")
    refused(m2teacher, command, "--checkpoint", trained, "--out", in_the_way / "out", says="cannot be")
    assert in_the_way.read_text() == "kept"


def test_bad_checkpoint(m2teacher: Run, tmp_path: Path, trained: Path) -> None:
    whole = checkpoint_of(trained).read_bytes()
    bad = tmp_path / "bad.safetensors"

    def refuse(content: bytes, says: str) -> None:
        bad.write_bytes(content)
        refused(m2teacher, "info", "--checkpoint", bad, says=says)

    for length in (0, 8, len(whole) // 2, len(whole) - 1):
        refuse(whole[:length], "bad.safetensors")
    refuse(b"PK\x03\x04" + whole[4:], "truncated or damaged")
    refuse(whole.replace(b"widths = [8, 16]", b"widths = [8, 12]"), "truncated or damaged: its checksum is")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    refuse(struct.pack("<Q", len(header)) + header + bytes(4), "no checkpoint")
    bad.unlink()
    refused(m2teacher, "info", "--checkpoint", bad, says="cannot be opened")


@pytest.mark.parametrize("command", READERS)
def test_no_command_takes_a_damaged_checkpoint(m2teacher: Run, tmp_path: Path, trained: Path, command: str) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    damaged = checkpoint_of(run)
    content = bytearray(checkpoint_of(trained).read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    refused(m2teacher, command, "--checkpoint", damaged, *out_of(command, out), says="damaged: its checksum is")
    damaged.write_bytes(content[:-1])
    refused(m2teacher, command, "--checkpoint", damaged, *out_of(command, out), says="truncated or damaged")
    damaged.unlink()
    refused(m2teacher, command, "--checkpoint", run, *out_of(command, out), says="holds no whole checkpoint of a run")
    assert not out.exists()


def test_loss_that_explodes(m2teacher: Run, data: Path, tmp_path: Path) -> None:
    """metrics.csv shows how far it came; there is no checkpoint."""
    out = tmp_path / "run"
    explosive = {"learning_rate": 1000, "sgd_momentum": 1, "weight_decay": 1, "warmup_steps": 0}
    result = m2teacher(*pretrain_arguments(data, out, steps=200, **explosive))
    assert result.returncode != 0
    assert "no longer finite" in result.stderr.splitlines()[-1]
    assert sorted(path.name for path in out.iterdir()) == ["config.toml", "metrics.csv"]
