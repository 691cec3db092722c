"""`python -m momentum_bn.m2teacher` on several processes: what they compute, who writes, and how they end."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from ranks import run_ranks

from .conftest import TRAIN, Run, checkpoint_of, metrics, pretrain_arguments, recipe, write_data, write_idx
from .test_folders import COLOURS, coloured, write_png

STEPS = 12
SECONDS = 240  # that anything may take: torchrun starts slowly where others want the processors, too
COLLECTIVES = "collectives"

# Nothing random happens to an image; the first view has its bright half inverted.
PLAIN = {"min_area": 1, "max_area": 1, "max_aspect": 1, "flip": 0, "jitter": 0, "gamma": 0, "greyscale": 0}
PLAIN |= {"blur": "0,0", "solarise": "1,0"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "data"
    write_data(folder)
    return folder


@contextlib.contextmanager
def redirected(descriptor: int, file: Path) -> Iterator[None]:
    before = os.dup(descriptor)
    with file.open("wb") as stream:
        os.dup2(stream.fileno(), descriptor)
    try:
        yield
    finally:
        os.dup2(before, descriptor)
        os.close(before)


def command_of_a_rank(arguments: list[str], folder: str) -> dict[str, Any]:
    """Runs a command in a folder of the rank's own, which relative paths start from."""
    from momentum_bn import m2teacher

    group = dist.group.WORLD
    here = Path(folder) / f"rank-{dist.get_rank()}"
    here.mkdir(exist_ok=True)
    out, error = (Path(folder) / f"{name}-{dist.get_rank()}.txt" for name in ("stdout", "stderr"))
    before = Path.cwd()
    os.chdir(here)
    started = group._get_sequence_number_for_group()
    with redirected(1, out), redirected(2, error):
        code = m2teacher.run(arguments, group.group_name)
    os.chdir(before)
    collectives = group._get_sequence_number_for_group() - started
    return {"code": code, "stdout": out.read_text(), "stderr": error.read_text(), COLLECTIVES: collectives}


def on_ranks(ranks: int, arguments: list[str], folder: Path) -> list[dict[str, Any]]:
    """What each rank's process returned and wrote."""
    folder.mkdir(exist_ok=True)
    return run_ranks(ranks, command_of_a_rank, arguments, str(folder))


def trained(ranks: int, folder: Path, images: Path | str, **options: object) -> Path:
    """Trains on so many ranks. Returns the run's folder."""
    arguments = pretrain_arguments(images, folder / "run", **({"steps": STEPS, "eval_every": 0} | options))
    for result in on_ranks(ranks, arguments, folder):
        assert result["code"] == 0, result["stderr"]
    return folder / "run"


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    with safe_open(checkpoint, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


# --- An oracle: one step, from the formulas --------------------------------------------------------------------------


def derived_seed(*parts: int) -> int:
    """As apps/m2teacher/data/random.h has it."""
    mixed, mask = 0, (1 << 64) - 1
    for part in parts:
        mixed = ((mixed ^ part) + 0x9E3779B97F4A7C15) & mask
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & mask
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & mask
        mixed ^= mixed >> 31
    return mixed


class Step:
    """A step of the training on some ranks, in one process and float64."""

    def __init__(self, state: dict[str, Tensor], images: Tensor, ranks: int, synchronised: bool, steps: int) -> None:
        self.state = {name: value.double() for name, value in state.items()}
        self.step = int(state["step"])
        self.synchronised, self.steps = synchronised, steps
        pixels = images.double() / 255
        views = torch.where(pixels >= 0.5, 1 - pixels, pixels), pixels
        mean, std = pixels.mean(), pixels.std(unbiased=False)
        bounds = [len(images) * rank // ranks for rank in range(ranks + 1)]
        self.shares = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        self.views = views
        self.pixels = mean, std

    def standardise(self, mean: float, std: float) -> None:
        self.views = tuple((view - mean) / std for view in self.views)

    def student_norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.leaves[f"{name}.weight"], self.leaves[f"{name}.bias"]
        return torch.cat([F.batch_norm(x[share], None, None, weight, bias, True) for share in self.shares])

    def teacher_norm(self, name: str, x: Tensor) -> Tensor:
        outputs = []
        for rank, share in enumerate([slice(None)] if self.synchronised else self.shares):
            prefix = "teacher." if rank == 0 else f"rank.{rank}.teacher."
            own = {
                key: self.state[f"{prefix}{name}.{key}"] for key in ("running_mean", "running_var", "momentum_state")
            }
            part = x[share].transpose(0, 1).flatten(1)
            n, m = part.shape[1], own["momentum_state"]
            mean = m * part.mean(1) + (1 - m) * own["running_mean"]
            var = m * part.var(1) * n / (n - 1) + (1 - m) * own["running_var"]
            weight, bias = self.state[f"teacher.{name}.weight"], self.state[f"teacher.{name}.bias"]
            scale = weight / (var + 1e-5).sqrt()
            shape = (1, -1) + (1,) * (x.dim() - 2)
            outputs.append((x[share] - mean.view(shape)) * scale.view(shape) + bias.view(shape))
        return torch.cat(outputs)

    def network(self, values: dict[str, Tensor], norm: Any, x: Tensor, heads: tuple[str, ...]) -> Tensor:
        def conv(name: str, x: Tensor, stride: int) -> Tensor:
            weight = values[name + ".weight"]
            return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

        x = norm("encoder.bn1", conv("encoder.conv1", x, 2)).relu()
        for stage, stride in ((1, 1), (2, 2)):
            block = f"encoder.layer{stage}.0"
            y = norm(f"{block}.bn1", conv(f"{block}.conv1", x, stride)).relu()
            y = norm(f"{block}.bn2", conv(f"{block}.conv2", y, 1))
            if f"{block}.downsample.0.weight" in values:
                x = norm(f"{block}.downsample.1", conv(f"{block}.downsample.0", x, stride))
            x = (x + y).relu()
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        for head in heads:
            x = norm(f"{head}.bn", x @ values[f"{head}.fc1.weight"].T).relu()
            x = x @ values[f"{head}.fc2.weight"].T + values[f"{head}.fc2.bias"]
        return x

    def take(self) -> tuple[float, dict[str, Tensor]]:
        """The loss, and the student's parameters after the step."""
        prefix = "optimiser.velocity."
        names = [name.removeprefix(prefix) for name in self.state if name.startswith(prefix)]
        self.leaves = {name: self.state[f"student.{name}"].clone().requires_grad_() for name in names}
        keep = 1 - 0.01 * (math.cos(math.pi * self.step / self.steps) + 1) / 2
        for name in names:
            if f"teacher.{name}" in self.state:
                self.state[f"teacher.{name}"].lerp_(self.state[f"student.{name}"], 1 - keep)
        followed = {name: self.state[f"teacher.{name}"] for name in names if f"teacher.{name}" in self.state}
        targets = [self.network(followed, self.teacher_norm, view, ("projector",)) for view in self.views]
        answers = [
            self.network(self.leaves, self.student_norm, view, ("projector", "predictor")) for view in self.views
        ]
        loss = 4 - 2 * sum(F.cosine_similarity(answers[view], targets[1 - view]).mean() for view in (0, 1))
        loss.backward()
        rate = 0.1 * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        after = {}
        for name, leaf in self.leaves.items():
            decay = 1e-4 if leaf.dim() > 1 else 0
            velocity = 0.9 * self.state[prefix + name] + leaf.grad + decay * leaf.detach()
            after[name] = leaf.detach() - rate * velocity
        return loss.item(), after


@pytest.mark.parametrize(("ranks", "synchronised"), [(2, False), (2, True), (3, True), (3, False)])
def test_a_step_is_that_of_the_formulas(images: Path, tmp_path: Path, ranks: int, synchronised: bool) -> None:
    """The batch of 11 is divided as 5, 6 and 3, 4, 4. The student's BatchNorm is each rank's own in either case."""
    options = PLAIN | {
        "warmup_steps": 0,
        "checkpoint_every": 1,
        "keep": 9,
        "steps": 5,
        "batch_size": 11,
    }
    extra = ["--synchronise-statistics"] if synchronised else []
    arguments = [*pretrain_arguments(images, tmp_path / "run", **(options | {"eval_every": 0})), *extra]
    assert [result["code"] for result in on_ranks(ranks, arguments, tmp_path)] == [0] * ranks
    before, after = (tensors(checkpoint_of(tmp_path / "run", step)) for step in (3, 4))
    with safe_open(checkpoint_of(tmp_path / "run", 3), "pt") as file:
        trained_on = json.loads(file.metadata()["trained_on"])
    generator = torch.Generator().manual_seed(derived_seed(0, 1, 0))
    chosen = torch.randperm(TRAIN, generator=generator)[3 * 11 : 4 * 11]
    whole = torch.from_numpy(read_images(images))
    step = Step(before, whole[chosen].unsqueeze(1), ranks, synchronised, 5)
    step.standardise(trained_on["pixel_mean"][0], trained_on["pixel_std"][0])
    loss, parameters = step.take()
    measured = after["metrics.loss_sum"].item() - before["metrics.loss_sum"].item()
    assert measured == pytest.approx(loss, abs=2e-5)
    moved = 0.0
    for name, expected in parameters.items():
        torch.testing.assert_close(after[f"student.{name}"].double(), expected, rtol=1e-4, atol=2e-5)
        moved = max(moved, (expected - step.state[f"student.{name}"]).abs().max().item())
    assert moved > 1e-2  # the step is far larger than the tolerance


def read_images(folder: Path) -> np.ndarray:
    import gzip

    content = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    return np.frombuffer(bytearray(content[16:]), np.uint8).reshape(-1, 28, 28)


# --- The same images, parameters, one writer -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_ranks_see_together_what_one_process_sees(images: Path, tmp_path: Path, kind: str) -> None:
    """After the first step the teacher's statistics are those of the batch, all its augmentations included."""
    data: Path | str = images
    options: dict[str, object] = {"steps": 1, "warmup_steps": 0, "batch_size": 9}
    if kind == "folder":
        generator = np.random.default_rng(0)
        for number, (name, colour) in enumerate(20 * list(COLOURS.items())):
            write_png(tmp_path / "images" / "train" / name / f"{number}.png", coloured(colour, generator))
        data = f"folder:{tmp_path / 'images'}"
        options |= {"image_size": 16}
    states = []
    for ranks in (1, 2, 3):
        folder = tmp_path / str(ranks)
        arguments = pretrain_arguments(data, folder / "run", **(options | {"eval_every": 0}))
        results = on_ranks(ranks, [*arguments, "--synchronise-statistics"], folder)
        assert [result["code"] for result in results] == [0] * ranks, results
        states.append(tensors(checkpoint_of(folder / "run", 1)))
    one = {name: value for name, value in states[0].items() if name.startswith("teacher.") and "running" in name}
    assert len(one) > 10
    for state in states[1:]:
        torch.testing.assert_close({name: state[name] for name in one}, one, rtol=1e-4, atol=1e-5)


def test_the_first_rank_alone_reads_and_writes(images: Path, tmp_path: Path) -> None:
    """Each rank has a folder of its own for relative paths: what another one wrote would show."""
    arguments = pretrain_arguments(images, Path("run"), steps=STEPS, checkpoint_every=5, keep=9)
    arguments += ["--synchronise-statistics"]
    results = on_ranks(2, arguments, tmp_path)
    assert [result["code"] for result in results] == [0, 0], results
    run = tmp_path / "rank-0" / "run"
    steps = (5, 10, 12)
    assert {path.name for path in run.iterdir()} == {
        *("config.toml", "metrics.csv"),
        *(checkpoint_of(run, step).name for step in steps),
    }
    assert list((tmp_path / "rank-1").iterdir()) == []
    rows = metrics(run)
    assert [row[:2] for row in rows[1:]] == [["10", "80"], ["12", "96"]]
    assert rows[-1][6] != ""  # the accuracy, which the first rank measures
    assert [result["stdout"] for result in results] == [f"{checkpoint_of(Path('run'), STEPS)}\n", ""]
    checkpoint_of(run, 12).unlink()
    resumed = on_ranks(2, ["pretrain", "--resume", "run"], tmp_path)
    assert [result["code"] for result in resumed] == [0, 0], resumed
    assert "resumed after step 10" in resumed[0]["stderr"] and resumed[1]["stderr"] == ""
    assert list((tmp_path / "rank-1").iterdir()) == []


def test_collectives_of_a_step(images: Path, tmp_path: Path) -> None:
    """One for the gradients, which fit into a bucket here, and one for the loss; two views per layer in a group."""

    def of_run(steps: int, *options: str) -> int:
        folder = tmp_path / f"{steps}{len(options)}"
        arguments = [*pretrain_arguments(images, folder / "run", steps=steps, warmup_steps=0, eval_every=0), *options]
        first, second = on_ranks(2, arguments, folder)
        assert first[COLLECTIVES] == second[COLLECTIVES]
        return int(first[COLLECTIVES])

    assert of_run(3) - of_run(2) == 2
    norms = 1 + 2 + 3 + 1  # stem, two blocks (the second with a projection), the projector's
    together = "--synchronise-statistics"
    assert of_run(3, together) - of_run(2, together) == 2 + 2 * norms


# --- Cut and continued -----------------------------------------------------------------------------------------------


def assert_same_end(run: Path, other: Path, steps: int) -> None:
    assert checkpoint_of(run, steps).read_bytes() == checkpoint_of(other, steps).read_bytes()
    assert metrics(run) == metrics(other)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_goes_on_with_another_number_of_ranks(images: Path, tmp_path: Path, ranks: int) -> None:
    """Each begins with the statistics that it had, or with the first one's."""
    run = trained(2, tmp_path, images, checkpoint_every=5, keep=9)
    whole = checkpoint_of(run).parent / checkpoint_of(run, STEPS).name
    expected = whole.read_bytes()
    whole.unlink()
    results = on_ranks(ranks, ["pretrain", "--resume", str(run)], tmp_path)
    assert [result["code"] for result in results] == [0] * ranks, results
    assert "resumed after step 10" in results[0]["stderr"]
    says = f"processes: {ranks} instead of 2: each takes another share of the batch"
    assert (says in results[0]["stderr"]) == (ranks != 2)
    assert (whole.read_bytes() == expected) == (ranks == 2)
    assert [row[0] for row in metrics(run)[1:]] == ["10", "12"]
    saved = tensors(whole)
    assert saved.get("rank.count", torch.tensor(1)).item() == ranks
    assert {name.split(".")[1] for name in saved if name.startswith("rank.")} - {"count"} == {
        str(rank) for rank in range(1, ranks)
    }


def torchrun(ranks: int, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "momentum_bn.m2teacher", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        start_new_session=True,
    )


@pytest.fixture
def launched() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are killed at the end, with all that they started."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        kill_all(process)
        process.communicate()


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"momentum_bn.m2teacher" in Path(f"/proc/{child}/cmdline").read_bytes()]


def kill_all(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        for pid in [process.pid, *ranks_of(process)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while not list(run.glob("checkpoint-*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


LONG = {"steps": 400, "checkpoint_every": 30, "keep": 2}


@pytest.mark.sweep("the trainer killed at any moment")
def test_killed_and_resumed_is_the_uncut_run(
    images: Path, tmp_path: Path, launched: list[subprocess.Popen[str]]
) -> None:
    uncut = trained(2, tmp_path / "uncut", images, **LONG)
    run = tmp_path / "run"
    launched.append(torchrun(2, *pretrain_arguments(images, run, eval_every=0, **LONG)))
    wait_for_checkpoint(run, launched[0])
    kill_all(launched[0])
    launched[0].wait()
    assert not checkpoint_of(run, LONG["steps"]).exists()
    (first, _) = results = on_ranks(2, ["pretrain", "--resume", str(run)], tmp_path)
    assert [result["code"] for result in results] == [0, 0], results
    assert "resumed after step" in first["stderr"]
    assert_same_end(run, uncut, LONG["steps"])


def test_sigterm_to_torchrun_saves(images: Path, tmp_path: Path, launched: list[subprocess.Popen[str]]) -> None:
    run = tmp_path / "run"
    launched.append(torchrun(2, *pretrain_arguments(images, run, eval_every=0, **(LONG | {"steps": 10**6}))))
    wait_for_checkpoint(run, launched[0])
    launched[0].send_signal(signal.SIGTERM)
    stdout, stderr = launched[0].communicate(timeout=SECONDS)
    says = re.fullmatch(
        r"stopped after step (\d+) of 1000000; "
        rf"go on with torchrun as before and: -m momentum_bn\.m2teacher pretrain --resume {re.escape(str(run))}\n",
        stdout,
    )
    assert says, stdout + stderr
    assert checkpoint_of(run, int(says.group(1))).exists()
    assert "m2teacher: error" not in stderr


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_wrong_command_lines_are_refused_once(images: Path, tmp_path: Path) -> None:
    def refused(code: int, *arguments: object) -> str:
        results = on_ranks(3, [str(argument) for argument in arguments], tmp_path)
        assert [result["code"] for result in results] == [code] * 3, results
        lines = [line for result in results for line in result["stderr"].splitlines()]
        assert len(lines) == 1 and "".join(result["stdout"] for result in results) == ""
        assert not (tmp_path / "run").exists()
        return lines[0].removeprefix("m2teacher: error: ")

    out = tmp_path / "run"
    assert "--steps: got 0, expected" in refused(2, *pretrain_arguments(images, out, steps=0))
    assert refused(2, "knn", "--checkpoint", out) == "knn: works on one process, got 3"
    few = "--batch-size: got 5, expected 6 or more, 2 images for each of the 3 processes"
    assert refused(1, *pretrain_arguments(images, out, batch_size=5)) == few
    assert "holds no run to go on with" in refused(1, "pretrain", "--resume", out)
    both = "--synchronise-statistics: got --bn batch, expected --bn momentum"
    assert both in refused(1, *pretrain_arguments(images, out, bn="batch"), "--synchronise-statistics")
    helps = on_ranks(2, ["pretrain", "--help"], tmp_path)
    assert [result["code"] for result in helps] == [0, 0]
    assert "--synchronise-statistics" in helps[0]["stdout"] and helps[1]["stdout"] == ""


def rank_with_other_images(arguments: list[str], images: str, folder: str) -> dict[str, Any]:
    """The second rank finds something else behind the same relative path."""
    here = Path(folder) / f"rank-{dist.get_rank()}"
    here.mkdir(exist_ok=True)
    target = Path(images) if dist.get_rank() == 0 else Path(folder) / "other"
    (here / "data").symlink_to(target)
    return command_of_a_rank(arguments, folder)


def test_ranks_must_have_the_same_images(images: Path, tmp_path: Path) -> None:
    """Otherwise nothing happens to the run's folder."""
    other = tmp_path / "other"
    other.mkdir()
    for file in images.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    pixels = read_images(images).copy()
    pixels[0] ^= 1
    write_idx(other / "train-images-idx3-ubyte.gz", pixels)
    run = trained(1, tmp_path, images)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    arguments = [*pretrain_arguments("idx:/proc/self/cwd/data", run), "--overwrite"]
    first, second = run_ranks(2, rank_with_other_images, arguments, str(images), str(tmp_path))
    assert (first["code"], second["code"]) == (1, 1)
    assert second["stderr"].startswith("m2teacher: error: rank 1: --data: here are 1000 images of 1 x 28 x 28, not the")
    assert first["stderr"] == ""
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_an_error_of_one_rank_ends_all(images: Path, tmp_path: Path, launched: list[subprocess.Popen[str]]) -> None:
    run = tmp_path / "run"
    launched.append(torchrun(2, *pretrain_arguments(images, run, eval_every=0, **(LONG | {"steps": 10**6}))))
    wait_for_checkpoint(run, launched[0])
    os.kill(ranks_of(launched[0])[-1], signal.SIGKILL)
    _, stderr = launched[0].communicate(timeout=SECONDS)
    assert launched[0].returncode != 0
    lost = r"^m2teacher: error: .*the other processes of this training have ended or do not answer: [^;]* by peer[^;]*"
    assert re.search(lost + r"; step \d+ is saved, go on with torchrun", stderr, re.MULTILINE), stderr


# --- One process -----------------------------------------------------------------------------------------------------


def by_python(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "momentum_bn.m2teacher", *map(str, arguments)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def test_one_process_is_the_program(m2teacher: Run, images: Path, tmp_path: Path) -> None:
    run, program = tmp_path / "run", tmp_path / "program"
    for folder, call in ((run, by_python), (program, m2teacher)):
        assert call("pretrain", *recipe(images, steps=STEPS), "--out", folder).returncode == 0
    assert_same_end(run, program, STEPS)
    found, expected = (call("knn", "--checkpoint", run) for call in (by_python, m2teacher))
    assert (found.returncode, found.stdout) == (0, expected.stdout)
    wrong, usage = by_python("knn", "--checkpoint", tmp_path / "nothing"), by_python("nothing")
    assert (wrong.returncode, usage.returncode) == (1, 2)
    assert wrong.stderr.startswith("m2teacher: error: ") and usage.stderr.startswith("m2teacher: error: ")


def test_a_package_without_the_trainer_says_how_to_get_it(tmp_path: Path) -> None:
    result = by_python("--help", MOMENTUM_BN_TRAINER_LIBRARY=str(tmp_path / "none.so"))
    assert result.returncode == 1
    assert f"{tmp_path / 'none.so'} is not there" in result.stderr
    assert "MOMENTUM_BN_TRAINER=1 pip install --no-build-isolation" in result.stderr


def test_out_or_resume(m2teacher: Run, images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["pretrain", *recipe(images, steps=STEPS), "--out", str(run), "--or-resume"]
    assert m2teacher(*arguments).returncode == 0
    again = m2teacher(*arguments)
    assert again.returncode == 0
    assert f"resumed after step {STEPS}, its last: the run is finished, there is nothing to do" in again.stderr
    other = m2teacher(*arguments, "--seed", 5)
    assert other.returncode == 1
    assert "--seed: got 5, but the run in" in other.stderr
