"""Runs that are stopped, killed, damaged and taken up again end as if nothing had happened."""

import gzip
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from .conftest import Run, Start, checkpoint_of, metrics, pretrain_arguments, steps_of, wait_for, write_data

# Steps that take a second or two: enough for moments to differ.
STEPS = 240
# What a measurement raises: kills of one run.
KILLS = int(os.environ.get("M2TEACHER_KILLS", "3"))


def long_run(data: Path, out: Path, **options: object) -> list[str]:
    # 7 steps between checkpoints: most do not end a row of metrics.csv.
    return pretrain_arguments(data, out, **({"steps": STEPS, "checkpoint_every": 7, "eval_every": 25} | options))


def assert_same_end(run: Path, uninterrupted: Path, steps: int = STEPS) -> None:
    """The last checkpoints hold the same bytes, and metrics.csv the same numbers."""
    assert checkpoint_of(run, steps).read_bytes() == checkpoint_of(uninterrupted, steps).read_bytes()
    assert metrics(run) == metrics(uninterrupted)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One data set for all runs here, whose checkpoints name its folder."""
    folder = tmp_path_factory.mktemp("images") / "data"
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(m2teacher: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = m2teacher(*long_run(data, out))
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A run that may be changed."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.sweep("the trainer killed at any moment")
def test_killed_at_random_moments(start: Start, m2teacher: Run, data: Path, tmp_path: Path) -> None:
    # Each view has a thread of its own here.
    options = {"threads": 2}
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    began = time.monotonic()
    assert m2teacher(*long_run(data, uninterrupted, **options)).returncode == 0
    duration = time.monotonic() - began

    moments = random.Random(0)
    arguments = long_run(data, run, **options)
    kills = 0
    while kills < KILLS:
        process = start(*arguments)
        try:
            # Each time a part of the whole, so that the run is not over before the last kill.
            process.wait(timeout=0.2 + moments.random() * duration * 1.5 / KILLS)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            if (run / "config.toml").exists():
                arguments = ["pretrain", "--resume", str(run)]
    print(f"{kills} kills, checkpoints left: {steps_of(run)}")
    assert kills > 0
    result = m2teacher(*arguments)
    assert result.returncode == 0, result.stderr
    assert_same_end(run, uninterrupted)
    assert not list(run.glob("*.tmp-*"))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(
    start: Start, m2teacher: Run, data: Path, uninterrupted: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = start(*long_run(data, run))
    wait_for(lambda: (run / "metrics.csv").exists() and len(metrics(run)) > 1, process)
    process.send_signal(stop)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    step = steps_of(run)[-1]
    assert stdout == f"stopped after step {step} of {STEPS}; go on with: m2teacher pretrain --resume {run}\n"
    result = m2teacher("pretrain", "--resume", run)
    assert result.returncode == 0, result.stderr
    assert f"resumed after step {step}" in result.stderr
    assert_same_end(run, uninterrupted)


def test_a_second_signal_ends_at_once(start: Start, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # Steps that take long enough for the second signal to come within the same one.
    slow = {"batch_size": 500, "widths": "256,256"}
    process = start(*long_run(data, run, **slow))
    wait_for(lambda: (run / "metrics.csv").exists(), process)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert steps_of(run) == []


def test_keeps_the_last_checkpoints(train: Callable[..., Path]) -> None:
    assert steps_of(train(checkpoint_every=4, keep=3)) == [24, 28, 30]
    assert steps_of(train(checkpoint_every=30, keep=1)) == [30]


def test_damaged_checkpoints_are_skipped_and_named(m2teacher: Run, train: Callable[..., Path], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    # Step 16 lies between two rows of metrics.csv: the losses since the last one are in the checkpoint.
    shutil.copytree(train(checkpoint_every=8), whole)
    run = tmp_path / "run"
    flipped = bytearray(checkpoint_of(run).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    checkpoint_of(run).write_bytes(flipped)
    checkpoint_of(run, 24).write_bytes(checkpoint_of(run, 24).read_bytes()[:-1])
    result = m2teacher("pretrain", "--resume", run)
    assert result.returncode == 0, result.stderr
    for step in (30, 24):
        assert f"skipped: {checkpoint_of(run, step)}: truncated or damaged" in result.stderr
    assert "resumed after step 16" in result.stderr
    assert_same_end(run, whole, steps=30)
    # Commands that read a run's folder skip them, too.
    checkpoint_of(run).write_bytes(flipped)
    info = m2teacher("info", "--checkpoint", run)
    assert info.returncode == 0, info.stderr
    assert "after step 24 of 30" in info.stdout
    assert "skipped: " in info.stderr


def test_a_run_with_lars_goes_on(m2teacher: Run, train: Callable[..., Path], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(train(checkpoint_every=10, optimizer="lars"), whole)
    assert 'optimizer = "lars"\nlars-trust-coefficient = 0.001\n' in (whole / "config.toml").read_text()
    run = tmp_path / "run"
    checkpoint_of(run).unlink()
    result = m2teacher("pretrain", "--resume", run)
    assert result.returncode == 0, result.stderr
    assert "resumed after step 20" in result.stderr
    assert_same_end(run, whole, steps=30)


def test_a_trust_coefficient_without_lars_is_refused(m2teacher: Run, data: Path, tmp_path: Path) -> None:
    result = m2teacher(*pretrain_arguments(data, tmp_path / "run", lars_trust_coefficient=0.01))
    assert result.returncode == 1
    assert "--lars-trust-coefficient: got --optimizer sgd, expected --optimizer lars" in result.stderr


def test_a_run_of_damaged_checkpoints_is_left_alone(m2teacher: Run, finished: Path) -> None:
    run = finished
    checkpoint_of(run).write_bytes(checkpoint_of(run).read_bytes()[:-1])
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    result = m2teacher("pretrain", "--resume", run)
    assert result.returncode == 1
    assert f"{run}: none of its checkpoints is whole" in result.stderr.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_without_a_checkpoint_it_starts_again(m2teacher: Run, trained: Path, finished: Path) -> None:
    run = finished
    checkpoint_of(run).unlink()
    result = m2teacher("pretrain", "--resume", run)
    assert result.returncode == 0, result.stderr
    assert "no checkpoint yet: the run starts from the beginning" in result.stderr
    assert_same_end(run, trained, steps=30)


def test_a_finished_run_has_nothing_left_to_do(m2teacher: Run, finished: Path) -> None:
    run = finished
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    result = m2teacher("pretrain", "--resume", run)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{checkpoint_of(run)}\n"
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_another_runs_settings_are_refused_by_name(
    m2teacher: Run, data: Path, train: Callable[..., Path], tmp_path: Path
) -> None:
    run = train(checkpoint_every=10)
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    def refuse(says: str, *options: object) -> None:
        result = m2teacher("pretrain", "--resume", run, *options)
        assert result.returncode == 1
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert says in result.stderr
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before

    refuse(f"--batch-size: got 16, but the run in {run} was started with 8, which it keeps", "--batch-size", 16)
    refuse("--widths: got 8,8, but the run", "--widths", "8,8")
    refuse("--seed: got 3", "--seed", 3)
    refuse("--steps: got 31", "--steps", 31)
    refuse("--blur: got 0,0, but", "--blur", "0,0")
    config = tmp_path / "other.toml"
    config.write_text("[pretrain]\nweight-decay = 0.5\n")
    refuse("--weight-decay: got 0.5", "--config", config)

    # The images may have moved, but they must be the same.
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    result = m2teacher("pretrain", "--resume", run, "--data", f"idx:{moved}", "--keep", 2, "--checkpoint-every", 5)
    assert result.returncode == 0, result.stderr
    assert f'data = "idx:{moved}"' in (run / "config.toml").read_text()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    images = moved / "train-images-idx3-ubyte.gz"
    pixels = bytearray(gzip.decompress(images.read_bytes()))
    pixels[5000] ^= 0x7F
    images.write_bytes(gzip.compress(bytes(pixels)))
    refuse("--data: not the images that the run was started with: their pixels have another mean")

    # Another run's checkpoint.
    other = tmp_path / "other"
    assert m2teacher(*pretrain_arguments(data, other, seed=4)).returncode == 0
    shutil.copy(checkpoint_of(other), checkpoint_of(run))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    refuse("a checkpoint of another run: --seed is 4 there, 0 in this run's config.toml", "--data", f"idx:{data}")


def test_a_run_is_not_overwritten_unasked(m2teacher: Run, data: Path, train: Callable[..., Path]) -> None:
    run = train()
    (run / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    result = m2teacher(*pretrain_arguments(data, run, seed=1))
    assert result.returncode == 1
    assert f"{run}: holds a run already: go on with it by --resume, or give --overwrite" in result.stderr
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    train(seed=1, steps=20)
    assert steps_of(run) == [20]
    assert (run / "notes.txt").read_text() == "mine"


def test_settings_that_config_cannot_hold_change_nothing(
    m2teacher: Run, data: Path, finished: Path, tmp_path: Path
) -> None:
    run = finished
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    awkward = tmp_path / "images #1"
    shutil.copytree(data, awkward)
    result = m2teacher(*pretrain_arguments(awkward, run), "--overwrite")
    assert result.returncode == 1
    assert f"--data: 'idx:{awkward}' cannot be kept in config.toml" in result.stderr
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_relative_data_is_found_from_anywhere(
    m2teacher: Run, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert m2teacher(*pretrain_arguments(Path(os.path.relpath(data)), Path("run"))).returncode == 0
    monkeypatch.chdir("/")
    assert f'data = "idx:{data}"' in (tmp_path / "run/config.toml").read_text()
    assert m2teacher("knn", "--checkpoint", tmp_path / "run").returncode == 0


def test_nothing_to_resume(m2teacher: Run, tmp_path: Path) -> None:
    result = m2teacher("pretrain", "--resume", tmp_path)
    assert result.returncode == 1
    assert f"{tmp_path}: holds no run to go on with (there is no config.toml)" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_train_in_one_folder(start: Start, m2teacher: Run, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(*long_run(data, run, steps=100000))
    wait_for(lambda: (run / "metrics.csv").exists(), process)
    for arguments in (["pretrain", "--resume", run], [*long_run(data, run), "--overwrite"]):
        result = m2teacher(*arguments)
        assert result.returncode == 1
        assert f"{run}: another process is training in this folder" in result.stderr
    assert process.poll() is None


def test_a_folder_made_anew_has_one_writer(start: Start, m2teacher: Run, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start(*long_run(data, run, steps=100000))
    wait_for(lambda: (run / "metrics.csv").exists() and len(metrics(run)) > 1, first)
    run.rename(tmp_path / "moved")
    result = m2teacher(*long_run(data, run, seed=7))
    assert result.returncode == 0, result.stderr
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == 1
    assert f"{run}: is no longer the folder that this run was started in" in stderr.splitlines()[-1]
    assert "is saved" not in stderr
    assert "seed = 7" in (run / "config.toml").read_text()
    assert steps_of(run)[-1] == STEPS
    assert m2teacher("pretrain", "--resume", run).returncode == 0


def test_a_checkpoint_is_enough_to_go_on(m2teacher: Run, train: Callable[..., Path], tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    shutil.copytree(train(checkpoint_every=10), whole)
    for name in ("config.toml", "metrics.csv"):
        (run / name).unlink()
    checkpoint_of(run).unlink()
    result = m2teacher("pretrain", "--resume", run)
    assert result.returncode == 0, result.stderr
    assert f"{run}/config.toml: is lost: the settings are those of checkpoint-00000020.safetensors" in result.stderr
    assert f"{run}/metrics.csv: is lost: a new one goes on after step 20" in result.stderr
    ends = [load_file(checkpoint_of(folder)) for folder in (run, whole)]
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[1] if name != "metrics.rows")
    assert metrics(run) == metrics(whole)[:1] + metrics(whole)[-1:]
    assert (run / "config.toml").read_text() == (whole / "config.toml").read_text()


def test_the_config_repeats_the_run(binary: Path, m2teacher: Run, train: Callable[..., Path], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(train(seed=3), whole)
    again = tmp_path / "again"
    result = m2teacher("pretrain", "--config", whole / "config.toml", "--out", again)
    assert result.returncode == 0, result.stderr
    assert_same_end(again, whole, steps=30)
    assert (again / "config.toml").read_bytes() == (whole / "config.toml").read_bytes()
    # The command line counts first.
    longer = tmp_path / "longer"
    result = m2teacher("pretrain", "--config", whole / "config.toml", "--steps", 20, "--out", longer)
    assert result.returncode == 0, result.stderr
    assert steps_of(longer) == [20]
    piped = ["bash", "-c", 'cat "$1" | "$0" pretrain --config /dev/stdin --steps 20 --out "$2"']
    subprocess.run([*piped, binary, whole / "config.toml", tmp_path / "piped"], check=True, timeout=120)
    assert metrics(tmp_path / "piped") == metrics(longer)


def test_a_limit_on_the_size_of_files_leaves_nothing_half_written(binary: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["bash", "-c", 'ulimit -f 4; exec "$0" "$@"', str(binary), *long_run(data, run)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    first = checkpoint_of(run, 7)
    assert f"m2teacher: error: {first}: cannot be written: File too large" in result.stderr.splitlines()[-1]
    assert sorted(path.name for path in run.iterdir()) == ["config.toml", "metrics.csv"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing_that_was_saved(
    m2teacher: Run, data: Path, uninterrupted: Path, small_disk: Path
) -> None:
    run = small_disk / "run"
    filler = small_disk / "filler"
    size = checkpoint_of(uninterrupted, STEPS).stat().st_size
    # Room for two checkpoints and a half.
    filler.write_bytes(bytes((1 << 20) - size * 5 // 2 - (16 << 10)))
    result = m2teacher(*long_run(data, run, keep=1000))
    assert result.returncode == 1
    saved = steps_of(run)
    assert f"cannot be written: No space left on device; step {saved[-1]} is saved" in result.stderr.splitlines()[-1]
    assert saved[:2] == [7, 14]
    assert not list(run.glob("*.tmp-*"))
    for step in saved:
        assert m2teacher("info", "--checkpoint", checkpoint_of(run, step)).returncode == 0
    filler.unlink()
    result = m2teacher("pretrain", "--resume", run, "--keep", 3)
    assert result.returncode == 0, result.stderr
    assert f"resumed after step {saved[-1]}" in result.stderr
    assert metrics(run) == metrics(uninterrupted)
