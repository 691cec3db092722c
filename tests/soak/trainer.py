"""Runs of the trainer that are stopped, killed, moved and left without space at random, under a memory limit."""

import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.python.m2teacher.conftest import (
    REPOSITORY,
    checkpoint_of,
    metrics,
    pretrain_arguments,
    steps_of,
    take_interrupts,
    write_data,
    write_images,
)

from .memory import MIB, has_grown, resident

BINARY = Path(os.environ.get("M2TEACHER", REPOSITORY / "build/bin/m2teacher"))
DISK = 4 * MIB
# Of what a process may write to: its heap, its stacks and torch's own data.
MEMORY = 256 * MIB
PATIENCE = 1800  # seconds that no run takes, on whatever machine
EVENTS = ["SIGTERM", "SIGINT", "SIGKILL", "full disk"]


class Ended(NamedTuple):
    """A process that is over."""

    code: int
    output: str
    errors: str
    memory: list[float]  # in MiB, many times a second


def catches(process: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)


def newest_step(out: Path) -> int:
    return max(steps_of(out), default=0)


def run(arguments: list[object], out: Path, folder: Path, number: signal.Signals | None = None, step: int = 0) -> Ended:
    """The trainer, under the memory limit; from a checkpoint on it is sent the signal, as soon as it would take it."""

    def prepare() -> None:
        take_interrupts()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))

    with (folder / "output").open("w") as output, (folder / "errors").open("w") as errors:
        command = [str(BINARY), *map(str, arguments)]
        process = subprocess.Popen(command, stdout=output, stderr=errors, preexec_fn=prepare)
    begin = time.monotonic()
    memory = []
    while True:
        time.sleep(0.01)
        ended, status, _ = os.wait4(process.pid, os.WNOHANG)
        if ended:
            process.returncode = os.waitstatus_to_exitcode(status)
            texts = [(folder / name).read_text() for name in ("output", "errors")]
            return Ended(process.returncode, *texts, memory)
        memory.append(resident(process.pid))
        if time.monotonic() > begin + PATIENCE:
            os.kill(process.pid, signal.SIGABRT)
        elif number and newest_step(out) >= step and (number == signal.SIGKILL or catches(process.pid, number)):
            os.kill(process.pid, number)
            number = None


class Small(NamedTuple):
    """A recipe, and the run of it that nothing befell."""

    name: str
    options: dict[str, object]
    uncut: Path


class Soak:
    """Runs in folders of their own below one, one of which is a small disk where that can be had."""

    def __init__(self, folder: Path, seed: int, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.choose = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.peaks: list[float] = []
        self.places = [folder / "here", folder / "there", folder / "small"]
        for place in self.places:
            place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(self.places[-1])]
        self.mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
        write_data(folder / "data")
        write_images(folder / "images")
        every = {"steps": steps, "checkpoint_every": 7, "eval_every": 25}
        images = {"image_size": 8, "batch_size": 4, "loader_threads": 2}
        self.recipes = [
            self.uncut("idx", every | {"data": folder / "data", "threads": 2}),  # each view has a thread of its own
            self.uncut("folder", every | images | {"data": f"folder:{folder / 'images'}"}),
        ]

    def uncut(self, name: str, options: dict[str, object]) -> Small:
        out = self.folder / f"uncut-{name}"
        ended = run(pretrain_arguments(out=out, **options), out, self.folder)
        if ended.code != 0:
            raise RuntimeError(f"{name}: exit code {ended.code}: {ended.errors}")
        quarter = len(ended.memory) // 4
        warm, end = max(ended.memory[quarter : 2 * quarter]), max(ended.memory[-quarter:])
        if has_grown(warm, end):
            self.faults.append(f"{name}: memory grew within a run from {warm:.0f} to {end:.0f} MiB")
        return Small(name, options, out)

    def move(self, out: Path, place: Path) -> Path:
        if out.parent == place or not out.exists():
            return place / out.name
        self.counts["moved"] += 1
        return Path(shutil.move(out, place / out.name))

    def befall(self, small: Small, out: Path, event: str) -> str:
        """Goes on with a run until something befalls it; what is wrong then."""
        began = (out / "config.toml").exists()
        arguments = ["pretrain", "--resume", out] if began else pretrain_arguments(out=out, **small.options)
        filler = out.parent / "filler"
        if event == "full disk":
            room = self.choose.randrange(checkpoint_of(small.uncut, self.steps).stat().st_size)
            filler.write_bytes(bytes(max(0, shutil.disk_usage(out.parent).free - room)))
        number = signal.Signals[event] if event.startswith("SIG") else None
        step = self.choose.randint(newest_step(out), self.steps)
        ended = run(arguments, out, self.folder, number, step)
        filler.unlink(missing_ok=True)
        self.counts["resumed"] += "resumed after step" in ended.errors
        self.peaks.append(max(ended.memory, default=0))
        if "skipped" in ended.errors or "is lost" in ended.errors:
            return f"what was saved is not whole: {ended.errors}"
        if ended.code == 0 and ended.output.endswith(f"{checkpoint_of(out, self.steps)}\n"):
            return ""  # it was over before
        self.counts[event] += 1
        if event == "full disk":
            said = "No space left on device" in ended.errors.splitlines()[-1] if ended.errors else False
            return "" if ended.code == 1 and said else f"exit code {ended.code}: {ended.errors}"
        if number in (signal.SIGTERM, signal.SIGINT) and not checkpoint_of(out, self.steps).exists():
            stopped = ended.code == 0 and ended.output.startswith("stopped after step ")
            return "" if stopped else f"exit code {ended.code}: {ended.errors}"
        return "" if number and ended.code == -number else f"exit code {ended.code}: {ended.errors}"

    def whole_run(self, small: Small) -> str:
        """One run that all of it befalls; what is wrong."""
        events = EVENTS if self.mounted.returncode == 0 else EVENTS[:-1]
        name = f"run-{self.counts['runs']}"
        self.counts["runs"] += 1
        out = self.places[0] / name
        for event in [*self.choose.sample(events, len(events)), "nothing"]:
            out = self.move(out, self.places[-1] if event == "full disk" else self.choose.choice(self.places))
            found = self.befall(small, out, event)
            if found:
                return f"{small.name}, {out}, {event}: {found}"
        last = checkpoint_of(out, self.steps)
        same = last.exists() and last.read_bytes() == checkpoint_of(small.uncut, self.steps).read_bytes()
        if not same or metrics(out) != metrics(small.uncut) or list(out.glob("*.tmp-*")):
            return f"{small.name}, {out}: does not end as the uncut run"
        self.counts["ended with the same bits"] += 1
        shutil.rmtree(out)
        return ""

    def close(self) -> None:
        if self.mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(self.places[-1])], check=True)


def soak(seconds: float, seed: int) -> tuple[dict[str, object], list[str]]:
    """Figures and faults."""
    begin = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soaked = Soak(folder, seed, steps=150 + int(seconds) // 4)
    try:
        while not soaked.faults and (time.monotonic() < begin + seconds or soaked.counts["runs"] < len(soaked.recipes)):
            recipe = soaked.recipes[soaked.counts["runs"] % len(soaked.recipes)]
            soaked.faults += filter(None, [soaked.whole_run(recipe)])
        if soaked.faults:
            shutil.copytree(folder, f"{folder}-kept", symlinks=True)
            soaked.faults.append(f"kept in {folder}-kept")
    finally:
        soaked.close()
        shutil.rmtree(folder)
    quarter = max(1, len(soaked.peaks) // 4)
    warm, end = max(soaked.peaks[:quarter]), max(soaked.peaks[-quarter:])
    if has_grown(warm, end):
        soaked.faults.append(f"the most memory of a run grew from {warm:.0f} to {end:.0f} MiB")
    names = ["runs", *EVENTS, "resumed", "moved", "ended with the same bits"]
    figures: dict[str, object] = {name: soaked.counts[name] for name in names}
    if soaked.mounted.returncode != 0:
        figures["full disk"] = "no mount"
    figures["limit of memory, MiB"] = MEMORY // MIB
    figures["most MiB of a run, at first"], figures["most MiB of a run, at last"] = f"{warm:.0f}", f"{end:.0f}"
    return figures, soaked.faults
