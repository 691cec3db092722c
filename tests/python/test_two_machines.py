"""Training on two machines over a slow link, as torchrun starts it: a rank that dies, and one that comes back.

The machines are network namespaces of this one, which needs root: see machines.py.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from conftest import REPOSITORY
from m2teacher.conftest import checkpoint_of, metrics, recipe, write_data
from machines import CannotMakeMachinesError, Machines
from ranks import run_ranks
from snapshots import same_bits

DELAY, RATE = 0.005, "200mbit"
STEPS = 20
COLLECTIVE_SECONDS = 20  # that a rank waits for another one
SECONDS = 240  # for any run as a whole: torchrun starts slowly where others want the processors, too


class Example:
    """The training in Python, examples/ddp_teacher.py. It writes a checkpoint after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = [
            str(REPOSITORY / "examples" / "ddp_teacher.py"),
            *f"--synchronise --steps {STEPS} --batch-size 32 --timeout {COLLECTIVE_SECONDS} --log-every 1".split(),
            *f"--save-every 1 --checkpoint {folder / 'run.pt'}".split(),
        ]

    def step(self, output: str) -> int:
        """The last step that was reported."""
        return max(map(int, re.findall(r"^step +(\d+) ", output, re.MULTILINE)), default=0)

    def saved_step(self) -> int:
        """That of the checkpoint, which is read."""
        return int(torch.load(self.folder / "run.pt")["step"])

    def first_steps(self, output: str) -> list[int]:
        """The steps that each start went on from."""
        return list(map(int, re.findall(r"^2 ranks, from step (\d+)$", output, re.MULTILINE)))

    def assert_ended_as_uncut(self) -> None:
        run_ranks(2, uncut_example, str(self.folder / "uncut.pt"))
        uncut, resumed = (tensors(torch.load(self.folder / name)) for name in ("uncut.pt", "run.pt"))
        assert uncut.keys() == resumed.keys() and len(uncut) > 60
        assert [name for name in uncut if not same_bits(uncut[name], resumed[name])] == []


class Trainer:
    """The trainer in C++, each rank with statistics of its own. It writes a checkpoint after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_data(folder / "data")
        options = {"steps": STEPS, "checkpoint_every": 1, "eval_every": 0, "process_timeout": COLLECTIVE_SECONDS}
        self.command = ["-m", "momentum_bn.m2teacher", *self._arguments("run", **options), "--or-resume"]
        self._uncut = self._arguments("uncut", **options)

    def _arguments(self, out: str, **options: object) -> list[str]:
        return ["pretrain", *recipe(self.folder / "data", **options), "--out", str(self.folder / out)]

    def _steps(self) -> list[int]:
        return [int(path.stem.split("-")[1]) for path in (self.folder / "run").glob("checkpoint-*.safetensors")]

    def step(self, output: str) -> int:  # noqa: ARG002
        """The last step that was saved."""
        return max(self._steps(), default=0)

    def saved_step(self) -> int:
        """That of the newest checkpoint; all are read."""
        for step in self._steps():
            load_file(checkpoint_of(self.folder / "run", step))
        return max(self._steps())

    def first_steps(self, output: str) -> list[int]:
        """The steps that each start went on from."""
        return [0, *map(int, re.findall(r"^resumed after step (\d+)$", output, re.MULTILINE))]

    def assert_ended_as_uncut(self) -> None:
        assert run_ranks(2, uncut_trainer, self._uncut) == [0, 0]
        run, uncut = self.folder / "run", self.folder / "uncut"
        assert checkpoint_of(run, STEPS).read_bytes() == checkpoint_of(uncut, STEPS).read_bytes()
        assert metrics(run) == metrics(uncut)


pytestmark = pytest.mark.sweep("two machines on a slow network")

Program = Example | Trainer


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    try:
        with Machines(2, DELAY, RATE) as made:
            yield made
    except CannotMakeMachinesError as error:
        pytest.skip(f"no two machines here: {error}")


class Training:
    """A run of a program on both machines, one rank on each."""

    def __init__(self, machines: Machines, program: Program, folder: Path, port: int, restarts: int) -> None:
        self.program = program
        self.outputs = [folder / f"output-{machine}.txt" for machine in range(2)]
        self.agents: list[subprocess.Popen[str]] = []
        for machine, address in enumerate(machines.addresses):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
            meeting = [
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={machines.addresses[0]}:{port}",
                f"--local-addr={address}",
            ]
            # A namespace has no host name by which torchrun would know that it is the first machine.
            first = f"--rdzv-conf=is_host={int(machine == 0)}"
            command = [*torchrun, *meeting, first, f"--max-restarts={restarts}", *program.command]
            environment = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": str(folder / f"error-{machine}.json")}
            self.agents.append(machines.start(machine, command, self.outputs[machine], environment))

    def output(self) -> str:
        return "\n".join(file.read_text() for file in self.outputs)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + SECONDS
        while self.program.step(self.output()) < step:
            assert time.monotonic() < deadline and None in [a.poll() for a in self.agents], self.output()
            time.sleep(0.02)

    def kill_rank_on(self, machine: int) -> None:
        """As the kernel does where memory runs out: the rank, not what started it."""
        agent = self.agents[machine].pid
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
        for child in children:
            if self.program.command[-1].encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)
                return
        raise AssertionError(f"no rank among {children}")

    def wait(self, seconds: float) -> list[int]:
        """The agents' exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [agent.wait(timeout=max(0.1, deadline - time.monotonic())) for agent in self.agents]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended after {seconds} s:\n{self.output()}") from None


def uncut_trainer(arguments: list[str]) -> int:
    from momentum_bn import m2teacher

    return m2teacher.run(arguments, dist.group.WORLD.group_name)


def uncut_example(checkpoint: str) -> None:
    """The program without torchrun, namespaces or delay."""
    sys.path.insert(0, str(REPOSITORY / "examples"))
    import ddp_teacher

    run = ddp_teacher.Run(STEPS, 0, True, torch.device("cpu"))
    images, _ = ddp_teacher.synthetic(2000, torch.Generator().manual_seed(0))
    ddp_teacher.train(run, images, 32, Path(checkpoint), save_every=STEPS, log_every=STEPS)


def tensors(state: Any, path: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {path: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {name: value for key, part in items for name, value in tensors(part, f"{path}/{key}").items()}


@pytest.mark.parametrize("kind", [Example, Trainer])
def test_restarted_training_is_the_uncut_one(machines, tmp_path, kind):
    """torchrun --max-restarts: a rank dies, all start again from the checkpoint, and end where no rank had died."""
    program = kind(tmp_path)
    training = Training(machines, program, tmp_path, port=29501, restarts=1)
    training.wait_for_step(4)
    training.kill_rank_on(1)
    assert training.wait(SECONDS) == [0, 0], training.output()
    first, second = program.first_steps(training.output())
    assert first == 0 and 4 <= second < STEPS
    program.assert_ended_as_uncut()


@pytest.mark.parametrize("kind", [Example, Trainer])
def test_killed_rank_ends_all(machines, tmp_path, kind):
    """Without restarts all end soon, and say why; the checkpoint is whole."""
    program = kind(tmp_path)
    training = Training(machines, program, tmp_path, port=29502, restarts=0)
    training.wait_for_step(4)
    training.kill_rank_on(1)
    assert 0 not in training.wait(COLLECTIVE_SECONDS + 20), training.output()
    survivor, killed = (file.read_text() for file in training.outputs)
    assert "SIGKILL" in killed
    assert re.search(r"Connection (closed|reset) by peer", survivor + killed), survivor
    assert 4 <= program.saved_step() < STEPS
