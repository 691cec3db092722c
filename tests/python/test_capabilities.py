"""Every instruction set that ATEN_CPU_CAPABILITY can choose, through the layer, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import layer_results
import momentum_bn
from inputs import FLOATS, TOLERANCE, as_layout, randn
from layer_results import Case
from snapshots import same_bits


def named(line: str) -> list[str]:
    """What show_config() names in this line."""
    return re.search(rf"^{line}: ([A-Z0-9 ]+[A-Z0-9])", momentum_bn.show_config(), re.MULTILINE)[1].lower().split()


CAPABILITIES = named("CPU kernels built")  # the least first
THREADS = [1, 2, 3, 4]
SCRIPT = Path(layer_results.__file__)


def native(capability: str) -> bool:
    """Whether it is what runs here, or less."""
    return CAPABILITIES.index(capability) <= CAPABILITIES.index(named("CPU kernels in use")[0])


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return layer_results.random_cases(FLOATS) + layer_results.exact_cases([torch.float32, torch.bfloat16])


@pytest.fixture(scope="module")
def results(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict]]:
    """Of each capability that the processor has: show_config() and the outputs of the cases."""
    folder = tmp_path_factory.mktemp("capabilities")
    torch.save(cases, folder / "cases")
    processes = {}
    for capability in filter(native, CAPABILITIES):
        processes[capability] = subprocess.Popen(
            [sys.executable, SCRIPT, folder / "cases", folder / capability, *map(str, THREADS)],
            env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
            stderr=subprocess.PIPE,
            text=True,
        )
    for capability, process in processes.items():
        _, errors = process.communicate()
        assert process.returncode == 0, f"{capability}: {errors}"
    return {capability: torch.load(folder / capability) for capability in processes}


def results_of(capability: str, results: dict[str, tuple[str, dict]]) -> tuple[str, dict]:
    if capability not in results:
        pytest.skip(f"this processor does not have {capability}")
    return results[capability]


def check_outputs(case: Case, outputs: dict[str, torch.Tensor]) -> None:
    """Against float64, where sums of n terms may be off n times as far."""
    wanted = layer_results.expected(case, outputs["y"])
    in_double = case.x.dtype == torch.float64
    tolerance = 1e-6 if case.x.dtype == torch.float32 else TOLERANCE[case.x.dtype]
    of_statistics = 1e-12 if in_double else 1e-6
    n = case.x.numel() / case.x.size(1)
    absolute = {"mean": of_statistics, "var": of_statistics, "dweight": of_statistics * n, "dbias": of_statistics * n}
    for name, value in outputs.items():
        assert_close(
            value.double(), wanted[name], rtol=tolerance, atol=absolute.get(name, tolerance),
            msg=lambda text, name=name: f"{case.name} {name}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_show_config_names_the_instruction_set(capability, results):
    config, _ = results_of(capability, results)
    assert f"CPU kernels in use: {capability.upper()} " in config


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_against_the_oracle(capability, cases, results):
    _, outputs = results_of(capability, results)
    for case in cases:
        check_outputs(case, outputs[1][case.name])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_random_layers_equal_the_formulas(capability, momentum_bn_test):
    """tests/cpp/differential_test.cpp, which ctest runs with the instruction set in use alone."""
    if not native(capability):
        pytest.skip(f"this processor does not have {capability}")
    done = subprocess.run(
        [momentum_bn_test, "--gtest_filter=Differential.*"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"ATEN_CPU_CAPABILITY={capability} " in done.stdout, done.stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_same_bits_on_any_number_of_threads(capability, results):
    _, outputs = results_of(capability, results)
    for threads in THREADS[1:]:
        for name, values in outputs[threads].items():
            for key, value in values.items():
                assert same_bits(value, outputs[1][name][key]), f"{name}: {key} on {threads} threads"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_exact_inputs_have_exact_results(capability, cases, results):
    """Nothing but the kept variance is rounded, so every instruction set has the oracle's very numbers."""
    _, outputs = results_of(capability, results)
    for case in cases:
        if case.name.startswith("exact"):
            got = outputs[1][case.name]
            for name, value in layer_results.expected(case, got["y"]).items():
                assert torch.equal(got[name], value.to(got[name].dtype)), f"{case.name}: {name}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 3, 20, 20)], ids=str)
def test_relu_masks_gradients_as_torch_does(shape, layout):
    """Where the output is NaN, infinite or 0 too."""
    x = as_layout(randn(*shape, dtype=torch.float32), layout)
    residual = randn(*shape, seed=1, dtype=torch.float32)
    residual.view(-1)[::7] = float("nan")
    residual.view(-1)[1::7] = float("inf")
    residual.view(-1)[2::7] = -float("inf")
    fused = momentum_bn.MomentumBatchNorm2d(3, activation="relu")
    plain = momentum_bn.MomentumBatchNorm2d(3)
    results = []
    for forward in (fused, lambda x, residual: torch.relu(plain(x) + residual)):
        leaves = [t.clone().requires_grad_() for t in (x, residual)]
        y = forward(*leaves)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), leaves[0].grad, leaves[1].grad))
    for fused_value, plain_value in zip(*results, strict=True):
        assert_close(fused_value, plain_value, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_weight_of_zero_leaves_the_bias(layout, dtype):
    """However large x is: its distance from the mean may be more than the type holds."""
    largest = torch.finfo(dtype).max
    x = torch.full((4, 3, 20, 20), largest, dtype=dtype)
    x[:, :, ::3] = -largest
    m = momentum_bn.MomentumBatchNorm2d(3)
    with torch.no_grad():
        m.weight.zero_()
        m.bias.fill_(1.25)
    assert torch.equal(m(as_layout(x, layout)), torch.full_like(x, 1.25))
