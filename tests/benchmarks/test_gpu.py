"""The GPU benchmark's parts that need no GPU: what is computed, what is counted, what is printed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import names
from benchmarks.cases import Case
from benchmarks.gpu import __main__ as main
from benchmarks.gpu import workloads
from benchmarks.gpu.cases import LARGE_CASES, QUICK_CASES, SMALL_CASES, bytes_of, tensors_moved, tensors_read_again
from benchmarks.gpu.paths import ON_CHIP, SEVERAL_LAUNCHES, path_of
from benchmarks.gpu.report import Timings, heading, read, table, write
from benchmarks.gpu.timing import in_turn, sets_past_cache
from benchmarks.layer_workloads import make_ours
from benchmarks.results import Section
from benchmarks.timing import Call

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = [Case((4, 3, 5, 5), True), Case((8, 5)), Case((2, 16, 4, 4), False, torch.bfloat16)]


def test_cases_cover_shapes_batches_dtypes_and_layouts() -> None:
    every = [case.name for case in LARGE_CASES]
    assert len(set(every)) == len(every) == 5 * 4 * 2 * 2
    assert {case.shape[0] for case in LARGE_CASES} == {32, 64, 128, 256}
    assert len(QUICK_CASES) == 5 * 2 * 2 and {case.shape[0] for case in QUICK_CASES} == {64}
    assert bytes_of(Case((2, 3, 4, 5), dtype=torch.bfloat16)) == 2 * 3 * 4 * 5 * 2


@pytest.mark.parametrize(
    ("call", "phase", "tensors"),
    [
        (names.COPY, names.TRAINING, 2),
        (names.OURS_FRESH, names.FORWARD, 2),
        (names.OURS_INPLACE_RESIDUAL_RELU, names.FORWARD, 3),
        (names.TORCH, names.TRAINING, 5),
        (names.OURS_RELU, names.TRAINING, 5),  # its mask is made of x again
        (names.BATCH_NORM, names.BACKWARD, 3),
    ],
)
def test_tensors_that_must_be_moved(call: str, phase: str, tensors: int) -> None:
    assert tensors_moved(call, phase) == tensors


@pytest.mark.parametrize(
    ("call", "phase", "tensors"),
    [
        (names.COPY, names.BACKWARD, 0),
        (names.OURS_INPLACE_RESIDUAL_RELU, names.FORWARD, 1),  # x, and not the residual
        (names.OURS, names.BACKWARD, 0),  # no gradient waits for sums
        (names.BATCH_NORM_RELU, names.BACKWARD, 2),
        (names.TORCH_NATIVE, names.TRAINING, 3),
    ],
)
def test_tensors_that_are_read_again(call: str, phase: str, tensors: int) -> None:
    assert tensors_read_again(call, phase) == tensors


def test_sets_of_inputs_pass_the_cache_within_memory() -> None:
    assert sets_past_cache(10, 50, 10**6) == 21
    assert sets_past_cache(10**6, 50, 10**9) == 2
    assert sets_past_cache(10, 50, 45) == 4
    assert sets_past_cache(10**6, 50, 10) == 1


def test_calls_in_turn() -> None:
    order: list[str] = []
    call = in_turn([lambda name=name: order.append(name) for name in "ab"])
    for _ in range(5):
        call()
    assert "".join(order) == "ababa"


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_call_of_a_workload_runs(case: Case) -> None:
    with torch.no_grad():
        forward = workloads.forward_calls(case, sets=2, compiled=False)
        for _ in range(6):
            for name, call in forward.items():
                y = call()
                assert isinstance(y, torch.Tensor) and y.shape == case.shape, name
                assert torch.isfinite(y).all(), name
    training = workloads.training_calls(case, sets=2, compiled=False)
    backward = workloads.backward_calls(case, sets=2, compiled=False)
    for name, call in [*training.items(), *backward.items(), *backward.items()]:
        results = call()
        if name != names.COPY:
            assert [tuple(r.shape) for r in results] == [case.shape, (case.shape[1],), (case.shape[1],)], name
    assert {names.BATCH_NORM, names.BATCH_NORM_RELU, names.OURS, names.OURS_RELU} <= backward.keys() <= training.keys()
    for calls, phase in ((forward, names.FORWARD), (training, names.TRAINING), (backward, names.BACKWARD)):
        assert {names.COPY, names.TORCH, names.TORCH_NATIVE} <= calls.keys()
        assert all(tensors_moved(name, phase) >= 2 for name in calls)


def test_composite_is_the_layer_by_other_operations() -> None:
    case = TINY[0]
    composite, layer = workloads.Composite(case), make_ours(case)
    with torch.no_grad():
        for _ in range(3):
            x = case.make()
            torch.testing.assert_close(composite(x), layer(x))
    torch.testing.assert_close(composite.layer.state_dict(), layer.state_dict())


def test_plan_selects_by_name() -> None:
    assert len(list(main.plan("", quick=False, rounds=1))) == 3 * len(LARGE_CASES) + len(SMALL_CASES) + 4
    assert len(list(main.plan("7x7", quick=True, rounds=1))) == 2 * 4 + 1
    assert not list(main.plan("no such case", quick=False, rounds=1))


def example() -> list[Timings]:
    section = Section("case", names.FORWARD, names.COPY, {names.COPY: [1e-3, 2e-3, 1e-3], names.OURS_FRESH: [2e-3] * 3})
    small = Section("small", main.IN_A_GRAPH, names.COPY, {names.COPY: [1e-6]}, {names.PUBLISHED_COMPILED: "no triton"})
    moved, again = {names.COPY: 2 * 10**9, names.OURS_FRESH: 3 * 10**9}, {names.COPY: 0, names.OURS_FRESH: 10**9}
    return [Timings(section, moved, again, {names.OURS_FRESH: SEVERAL_LAUNCHES}), Timings(small, {})]


def test_bandwidth_and_share_of_copy() -> None:
    timing = example()[0]
    assert timing.bandwidth(names.COPY) == pytest.approx(2e12)
    assert timing.bandwidth(names.OURS_FRESH) == pytest.approx(1.5e12)
    assert timing.share_of_copy(names.OURS_FRESH) == pytest.approx(0.75)
    assert timing.share_of_copy_reading_again(names.OURS_FRESH) == pytest.approx(1.0)
    assert timing.share_of_copy_reading_again(names.COPY) == pytest.approx(1.0)


def test_report_and_file(tmp_path: Path) -> None:
    assert heading({"GPU": "G", "driver": "D"}, 3).splitlines()[0].split() == ["GPU:", "G"]
    head, *rows = table(example()[0]).splitlines()
    assert head.split()[-4:] == ["GB/s", "1R+1W", "2R+1W", "path"]
    row = next(line for line in rows if line.startswith(f"  {names.OURS_FRESH}"))
    words = ["2000.0", "2.00", "1500", "75%", "100%", *SEVERAL_LAUNCHES.split()]
    assert row.removeprefix(f"  {names.OURS_FRESH}").split() == words
    assert f"  not timed: {names.PUBLISHED_COMPILED} (no triton)" in table(example()[1]).splitlines()
    write(tmp_path / "new" / "benchmark.json", {"GPU": "G"}, 3, example())
    kept = json.loads((tmp_path / "new" / "benchmark.json").read_text())
    assert kept["machine"] == {"GPU": "G"}
    assert kept["sections"][0]["section"]["seconds"][names.COPY] == [1e-3, 2e-3, 1e-3]
    assert kept["sections"][0]["bytes_moved"][names.OURS_FRESH] == 3 * 10**9
    assert read(tmp_path / "new" / "benchmark.json") == example()


def test_the_path_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [0, 0]

    def passes(on_chip: int, several: int) -> Call:
        def call() -> None:
            counts[0] += on_chip
            counts[1] += several

        return call

    if not hasattr(torch.ops.momentum_bn, "_cuda_path_counts"):
        assert path_of(passes(1, 0)) == "", "nobody counts"
    monkeypatch.setattr(torch.ops.momentum_bn, "_cuda_path_counts", lambda: tuple(counts), raising=False)
    assert path_of(passes(1, 0)) == ON_CHIP
    assert path_of(passes(0, 2)) == SEVERAL_LAUNCHES
    assert path_of(passes(1, 1)) == f"{ON_CHIP}, {SEVERAL_LAUNCHES}"
    assert path_of(passes(0, 0)) == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would be timed")
def test_command_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "torch finds no GPU here: nothing to time"
    assert not list(tmp_path.iterdir())


ON_EMULATED_KERNELS = """
import sys, torch
sys.path.insert(0, "tests/python")
import emulated_cuda
emulated_cuda.install()
from benchmarks.cases import Case
from benchmarks.gpu import workloads
from benchmarks.gpu.paths import path_of
case = Case((4, 3, 5, 5), True)
with torch.no_grad():
    forward = workloads.forward_calls(case, sets=2, compiled=False)
    paths = {name: path_of(call) for name, call in forward.items()}
for name, call in workloads.backward_calls(case, sets=2, compiled=False).items():
    paths["backward, " + name] = path_of(call)
print(paths)
"""


@pytest.mark.parametrize(("shared_kib", "path"), [(0, SEVERAL_LAUNCHES), (28, ON_CHIP)])
def test_paths_on_emulated_kernels(shared_kib: int, path: str) -> None:
    """What a device that keeps nothing on chip does, and one that keeps these few values."""
    build = Path(os.environ.get("MOMENTUM_BN_BUILD_DIR", REPOSITORY / "build"))
    library = next(build.glob("**/lib/libemulated_cuda.so"), None)
    if library is None:
        pytest.skip("no C++ tests built: libemulated_cuda.so is missing")
    environment = {"MOMENTUM_BN_LIBRARY": str(library), "EMULATED_SHARED_KIB": str(shared_kib), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ON_EMULATED_KERNELS]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    paths = ast.literal_eval(done.stdout)
    assert {paths[name] for name in (names.OURS_FRESH, names.OURS_INPLACE, names.OURS_INPLACE_RESIDUAL_RELU)} == {path}
    assert {paths[f"backward, {name}"] for name in (names.BATCH_NORM, names.BATCH_NORM_RELU)} == {path}
    # Constant statistics leave no choice, and torch's layers and a copy have none.
    for name in (names.OURS, names.OURS_RELU, names.TORCH, names.COPY):
        assert paths[f"backward, {name}"] == ""


def test_results_are_written_after_each_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the run leaves what was measured before; after the deadline nothing is begun."""
    monkeypatch.setattr(main, "gpu_machine", lambda: {"GPU": "G"})
    monkeypatch.setattr(torch, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def killed() -> Timings:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        main.measure_all([lambda: example()[0], killed], tmp_path / "new", 3, deadline=float("inf"))
    assert read(tmp_path / "new" / "benchmark.json") == example()[:1]
    assert "case, forward" in (tmp_path / "new" / "benchmark.txt").read_text()
    main.measure_all([killed], tmp_path, 3, deadline=0)
    assert "no time left for 1 of 1 tables" in (tmp_path / "benchmark.txt").read_text()


@pytest.mark.parametrize("phase", [names.FORWARD, names.TRAINING, names.BACKWARD])
def test_measuring_with_a_clock_of_its_own(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the device's clock, cache and memory."""

    def run_once(calls: dict[str, Call], rounds: int, repeats: int) -> dict[str, list[float]]:
        assert torch.is_grad_enabled() == (phase != names.FORWARD) and repeats > 0
        for call in calls.values():
            call()
        return {name: [1e-3] * rounds for name in calls}

    monkeypatch.setattr(main, "interleaved_device_seconds", run_once)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(L2_cache_size=10**4))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**6, 10**6))
    timing = main.measure_large(TINY[0], phase, compiled=False, rounds=3)
    assert timing.section.case == TINY[0].name and timing.section.absent == {}
    assert timing.bytes_moved.keys() == timing.section.seconds.keys() == timing.paths.keys()
    shares = {names.FORWARD: (1.0, 1.5), names.TRAINING: (2.5, 4.0), names.BACKWARD: (1.5, 2.5)}
    assert (timing.share_of_copy(names.TORCH), timing.share_of_copy_reading_again(names.TORCH)) == shares[phase]
