"""Each call on a file fails once, in each way that it can: nothing is lost, nothing is silent, and the run goes on.

`failing_calls.c` makes one call of a run fail. Then the exit code and the message tell, unless the call did not matter
and the run is as it would have been; and the same command once more, without a failure, ends with the same bytes.
"""

import errno
import os
import shutil
import signal
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest

from .conftest import checkpoint_of, metrics, pretrain_arguments, write_data, write_images

STEPS = 12
# A test that is no sweep tries so many cases of each run.
SAMPLE = 6

KINDS = {
    "open": ["EIO", "EMFILE", "ENOSPC", "EINTR", "kill"],
    "read": ["EIO", "EINTR", "short", "kill"],
    "write": ["ENOSPC", "EIO", "short", "EINTR", "kill"],
    "fsync": ["EIO", "ENOSPC", "kill"],
    "truncate": ["EIO", "kill"],
    "close": ["EIO", "ENOSPC", "kill"],
    "rename": ["EIO", "ENOSPC", "kill"],
    "unlink": ["EIO", "kill"],
    "mkdir": ["EIO", "ENOSPC", "kill"],
    "readdir": ["EIO", "kill"],
    "stat": ["EIO", "kill"],
    "mmap": ["EIO", "kill"],
}


class Call(NamedTuple):
    """A call on a file, as failing_calls.c notes it."""

    number: int
    name: str
    path: str


class Case(NamedTuple):
    number: int
    kind: str


def cases_of(calls: list[Call]) -> list[Case]:
    """Every call in each of its ways; those amid many alike on one file, as the writes of a checkpoint, in one."""
    cases = []
    for _, group in groupby(calls, lambda call: (call.name, call.path)):
        alike = list(group)
        for place, call in enumerate(alike):
            kinds = KINDS[call.name]
            amid = 1 < place < len(alike) - 2
            cases += [Case(call.number, kind) for kind in ([kinds[place % len(kinds)]] if amid else kinds)]
    return cases


class Trainer(NamedTuple):
    """Runs the trainer in folders below one of its own, with a call that fails or without."""

    binary: Path
    library: Path
    folder: Path
    options: dict[str, object]
    flags: list[str]

    def run(self, place: Path, fails: Case | None = None) -> int:
        """Goes on with the run in `place`, if any. Output goes to files there, so that writing it can fail, too."""
        variables = {"LD_PRELOAD": self.library, "FAULT_FOLDER": self.folder, "FAULT_LOG": f"{place}.calls"}
        if fails:
            variables |= {"FAULT_AT": fails.number, "FAULT_KIND": getattr(errno, fails.kind, fails.kind)}
        command = [str(self.binary), *pretrain_arguments(out=place / "run", **self.options), *self.flags, "--or-resume"]
        with (place / "output").open("w") as output, (place / "errors").open("w") as errors:
            return subprocess.run(
                command,
                stdout=output,
                stderr=errors,
                env=os.environ | {name: str(value) for name, value in variables.items()},
                timeout=120,
                check=False,
            ).returncode

    def calls(self, place: Path) -> list[Call]:
        """Of all runs in `place`."""
        lines = Path(f"{place}.calls").read_text().splitlines()
        return [Call(int(number), name, path) for number, name, path in (line.split(" ", 2) for line in lines)]


def same_end(place: Path, uncut: Path) -> bool:
    run, other = place / "run", uncut / "run"
    return (
        checkpoint_of(run, STEPS).exists()
        and checkpoint_of(run, STEPS).read_bytes() == checkpoint_of(other, STEPS).read_bytes()
        and metrics(run) == metrics(other)
        and (run / "config.toml").read_bytes() == (other / "config.toml").read_bytes()
        and (place / "output").read_text() == f"{checkpoint_of(run, STEPS)}\n"
    )


def temporary_files(place: Path) -> list[Path]:
    return list((place / "run").glob("*.tmp-*"))


def wrong_at_failure(code: int, call: Call, kind: str, place: Path, uncut: Path) -> str:
    """What is wrong with a run that one call failed in; empty: nothing."""
    errors = (place / "errors").read_text()
    if kind == "kill":
        return "" if code == -signal.SIGKILL else f"exit code {code}"
    if code == 0:
        unsaid = call.path == str(place / "errors") and kind != "short"
        left_over = temporary_files(place) and "m2teacher: warning: " not in errors
        return "is silent" if unsaid or left_over or not same_end(place, uncut) else ""
    if code != 1 or kind == "short":
        return f"exit code {code}: {errors}"
    if call.path == str(place / "errors"):
        return ""
    named = "standard output" if call.path == str(place / "output") else call.path.split(".tmp-")[0]
    message = errors.splitlines()[-1] if errors else ""
    told = message.startswith("m2teacher: error: ") and named in message
    return "" if told and os.strerror(getattr(errno, kind)) in message else f"does not say what or why: {errors}"


def wrong(trainer: Trainer, case: Case, before: Path | None, uncut: Path) -> str:
    """What is wrong where the call fails; empty: nothing.

    before is a run that is cut short, to go on with; None: a run begins.
    """
    place = trainer.folder / f"{case.number}-{case.kind}"
    place.mkdir()
    Path(f"{place}.calls").unlink(missing_ok=True)  # of the same case of another test
    if before:
        shutil.copytree(before, place / "run")
    code = trainer.run(place, case)
    call = trainer.calls(place)[case.number - 1]
    found = wrong_at_failure(code, call, case.kind, place, uncut)
    if not found:
        code = trainer.run(place)
        errors = (place / "errors").read_text()
        if code != 0 or "skipped" in errors or not same_end(place, uncut) or temporary_files(place):
            found = f"the run does not go on as if nothing had happened: exit code {code}: {errors}"
    if not found:
        shutil.rmtree(place)
    return found and f"{call.name} of {call.path} (call {case.number}), {case.kind}: {found}"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("library") / "failing_calls.so"
    source = Path(__file__).with_name("failing_calls.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", str(source), "-o", str(built), "-ldl"], check=True)
    return built


@pytest.fixture(scope="module", params=["idx", "folder"])
def trainer(
    binary: Path, library: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Trainer:
    folder = tmp_path_factory.mktemp(request.param)
    small = {"widths": "4", "projector_hidden": 8, "predictor_hidden": 8, "projector_out": 4, "batch_size": 4}
    small |= {"steps": STEPS, "checkpoint_every": 8, "keep": 1, "warmup_steps": 2, "eval_every": 0}
    if request.param == "idx":
        write_data(folder / "data", train=40, test=10)
        return Trainer(binary, library, folder, small | {"data": folder / "data", "eval_every": 6}, [])
    write_images(folder / "data")
    loader = {"image_size": 8, "loader_threads": 1, "batches_ahead": 1}
    return Trainer(binary, library, folder, small | loader | {"data": f"folder:{folder / 'data'}"}, ["--strict"])


@pytest.fixture(scope="module")
def uncut(trainer: Trainer) -> Path:
    place = trainer.folder / "uncut"
    place.mkdir()
    assert trainer.run(place) == 0, (place / "errors").read_text()
    return place


@pytest.fixture(scope="module")
def cut(trainer: Trainer, uncut: Path) -> Path:
    """A run that was killed as it wrote its second checkpoint, a row of metrics after the first."""
    place = trainer.folder / "cut"
    place.mkdir()
    calls = trainer.calls(uncut)
    renamed = next(
        call.number for call in calls if (call.name, Path(call.path).name) == ("rename", checkpoint_of(Path(), 8).name)
    )
    second = next(call.number for call in calls[renamed:] if call.name == "write" and "safetensors" in call.path)
    assert trainer.run(place, Case(second, "kill")) == -signal.SIGKILL
    return place / "run"


def try_all(trainer: Trainer, uncut: Path, before: Path | None, sample: int | None) -> None:
    """sample: how many cases to try, spread over all of them; None: all."""
    counted = trainer.folder / "counted"
    counted.mkdir()
    if before:
        shutil.copytree(before, counted / "run")
    assert trainer.run(counted) == 0
    assert same_end(counted, uncut)
    calls = trainer.calls(counted)
    shutil.rmtree(counted)
    Path(f"{counted}.calls").unlink()
    cases = cases_of(calls)
    if sample:
        cases = cases[:: len(cases) // sample]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [what for what in pool.map(lambda case: wrong(trainer, case, before, uncut), cases) if what]
    kinds = Counter((calls[case.number - 1].name, case.kind) for case in cases)
    print(f"\n{len(cases)} failures of {len({case.number for case in cases})} calls: {dict(kinds)}")
    assert not found, f"{len(found)} of {len(cases)}:\n" + "\n".join(found)


EVERY = pytest.param(None, marks=pytest.mark.sweep("every call of the trainer on a file fails once"), id="all")


@pytest.mark.parametrize("sample", [pytest.param(SAMPLE, id="some"), EVERY])
def test_a_run_that_begins(trainer: Trainer, uncut: Path, sample: int | None) -> None:
    try_all(trainer, uncut, None, sample)


@pytest.mark.parametrize("sample", [pytest.param(SAMPLE, id="some"), EVERY])
def test_a_run_that_goes_on(trainer: Trainer, uncut: Path, cut: Path, sample: int | None) -> None:
    try_all(trainer, uncut, cut, sample)
