"""No instruction that the processor lacks, and the same results: under qemu, which emulates older processors."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import layer_results
from layer_results import Case
from test_capabilities import check_outputs

# A processor without AVX-512 and one without AVX2 either; the kernels that it gets; a name for the tests of these.
PROCESSORS = {"Haswell": "AVX2", "Nehalem": "DEFAULT"}
# What may be set for the processor that there is, and is wrong for another one: OpenBLAS runs what it is told.
OF_THIS_PROCESSOR = {"ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"}
KERNEL_TESTS = ["ForwardTest.EverySize", "BackwardTest.EverySize", "SpecialValuesTest.EveryValueOfSixteenBits"]

pytestmark = [
    pytest.mark.sweep("older processors, emulated"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86-64 processors"),
]


@pytest.fixture(scope="module")
def qemu() -> str:
    found = shutil.which("qemu-x86_64")
    if not found:
        pytest.skip("no qemu-x86_64: install Debian's qemu-user")
    return found


def emulate(qemu: str, processor: str, *command: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [qemu, "-cpu", processor, *map(str, command)],
        env={name: value for name, value in os.environ.items() if name not in OF_THIS_PROCESSOR}
        | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_kernels(qemu, kernels_test):
    processes = {
        processor: emulate(
            qemu, processor, kernels_test, "--gtest_brief=1",
            "--gtest_filter=" + ":".join(f"*{test}/{kernels}_*" for test in KERNEL_TESTS),
        )
        for processor, kernels in PROCESSORS.items()
    }  # fmt: skip
    for processor, process in processes.items():
        output, _ = process.communicate()
        assert process.returncode == 0, f"{processor}: {output}"
        assert "[  PASSED  ] 10 tests" in output, f"{processor}: {output}"


def test_layer(qemu, tmp_path):
    cases = layer_results.random_cases([torch.float32, torch.bfloat16]) + layer_results.exact_cases([torch.float32])
    cases = [case for case in cases if case.x.numel() < (30_000 if case.name.startswith("exact") else 3_000)]
    torch.save(cases, tmp_path / "cases")
    processes = {
        processor: emulate(
            qemu, processor, sys.executable, layer_results.__file__, tmp_path / "cases", tmp_path / processor, "1"
        )
        for processor in PROCESSORS
    }
    for processor, process in processes.items():
        output, _ = process.communicate()
        assert process.returncode == 0, f"{processor}: {output}"
        config, outputs = torch.load(tmp_path / processor)
        assert f"CPU kernels in use: {PROCESSORS[processor]} " in config
        for case in cases:
            check_results(case, outputs[1][case.name])


def check_results(case: Case, outputs: dict[str, torch.Tensor]) -> None:
    """Within the error that is stated for every processor; bit for bit as here where nothing is rounded."""
    check_outputs(case, outputs)
    if case.name.startswith("exact"):
        for name, value in layer_results.run(case).items():
            assert torch.equal(outputs[name], value), f"{case.name}: {name}"
