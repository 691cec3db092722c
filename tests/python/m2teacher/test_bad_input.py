"""Bad input to the trainer's commands: one clear line, an exit code that is not 0, nothing half-written."""

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Run, pretrain_arguments

EVALUATIONS = ["knn", "linear", "compare", "neighbours"]


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
    refused(m2teacher, "pretrain", says="--out is required")
    refused(m2teacher, *pretrain_arguments(data, out), "--steps", 3, says="--steps")
    refuse("--fast", fast="yes")
    refuse("--batch-size: got 1, expected 2 or more", batch_size=1)
    refuse("--batch-size: got many, expected 2 or more", batch_size="many")
    refuse("--batch-size: 1001 is more than the 1000 training images", batch_size=1001)
    refuse("--steps: got 0, expected 1 or more", steps=0)
    refuse("--steps: got 1e400", steps="1e400")
    refuse("--learning-rate: got nan", learning_rate="nan")
    refuse("--learning-rate: got -1, expected 0 to 1000", learning_rate=-1)
    refuse("--param-momentum: got 1.5, expected 0 to 1", param_momentum=1.5)
    refuse("--widths: got 0, expected 1 to 65536", widths="8,0")
    refuse("--pool: got 0, expected 1 to 64", pool=0)
    refuse("--seed: got -1, expected 0 to 4294967295", seed=-1)
    refuse("--threads: got 0, expected 1 to 1024", threads=0)
    assert not out.exists()


@pytest.mark.parametrize("command", EVALUATIONS)
def test_evaluation_command_line(m2teacher: Run, command: str) -> None:
    refused(m2teacher, command, says="required")
    out = ["--out", "x"] if command == "neighbours" else []
    refused(m2teacher, command, "--checkpoint", "x", *out, "--wrong", says="--wrong")


def test_more_labels_than_there_are(m2teacher: Run, data: Path, train: Callable[..., Path]) -> None:
    source = ("--data", f"idx:{data}", "--checkpoint", train() / "checkpoint.safetensors")
    refused(
        *(m2teacher, "linear", *source, "--labels-per-class", 101),
        says="--labels-per-class: class 0 has 100 training images, 101 were asked for",
    )
    refused(m2teacher, "knn", *source, "--neighbours", 1001, says="--neighbours: 1001 is more than the 1000")


def test_unknown_network(m2teacher: Run, data: Path) -> None:
    refused(m2teacher, "knn", "--data", f"idx:{data}", "--checkpoint", "x", "--network", "pupil", says="pupil")


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
        (flip_a_byte_inside, ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"]),
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
def test_missing_data(m2teacher: Run, command: str, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"] if command == "neighbours" else []
    nowhere = tmp_path / "nowhere"
    refused(m2teacher, command, "--data", f"idx:{nowhere}", "--checkpoint", "x", *out, says=f"{nowhere}: no such folder")


def test_folder_that_cannot_be_written(m2teacher: Run, data: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("kept")
    for out in (in_the_way, in_the_way / "run", Path("/proc/self")):
        refused(m2teacher, *pretrain_arguments(data, out), says=f"{out}")
    assert in_the_way.read_text() == "kept"


def test_neighbours_file_that_cannot_be_written(m2teacher: Run, data: Path, train: Callable[..., Path]) -> None:
    checkpoint = train() / "checkpoint.safetensors"
    out = data / "nowhere" / "neighbours.safetensors"
    refused(
        *(m2teacher, "neighbours", "--data", f"idx:{data}", "--checkpoint", checkpoint, "--out", out),
        says="cannot be written",
    )
    assert not out.parent.exists()


@pytest.mark.parametrize("command", EVALUATIONS)
def test_bad_checkpoint(m2teacher: Run, data: Path, tmp_path: Path, train: Callable[..., Path], command: str) -> None:
    whole = (train() / "checkpoint.safetensors").read_bytes()
    out = tmp_path / "neighbours.safetensors"
    bad = tmp_path / "bad.safetensors"

    def refuse(content: bytes, says: str) -> None:
        bad.write_bytes(content)
        arguments = [command, "--data", f"idx:{data}", "--checkpoint", bad]
        refused(m2teacher, *arguments, *(["--out", out] if command == "neighbours" else []), says=says)
        assert not out.exists()

    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        refuse(whole[:length], "bad.safetensors")
    refuse(b"PK\x03\x04" + whole[4:], "truncated or damaged")
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    refuse(struct.pack("<Q", len(header)) + header + bytes(4), "no checkpoint of m2teacher")
    refuse(whole.replace(rb"\"widths\":[8,16]", rb"\"widths\":[8,12]"), "a checkpoint of another model")
    bad.unlink()
    refused(
        *(m2teacher, command, "--data", f"idx:{data}", "--checkpoint", bad),
        *(["--out", out] if command == "neighbours" else []),
        says="cannot be opened",
    )


def test_loss_that_explodes(m2teacher: Run, data: Path, tmp_path: Path) -> None:
    """A metrics.csv shows how far it came; there is no checkpoint."""
    out = tmp_path / "run"
    explosive = {"learning_rate": 1000, "sgd_momentum": 1, "weight_decay": 1, "warmup_steps": 0}
    result = m2teacher(*pretrain_arguments(data, out, steps=200, **explosive))
    assert result.returncode != 0
    assert "no longer finite" in result.stderr.splitlines()[-1]
    assert [path.name for path in out.iterdir()] == ["metrics.csv"]
