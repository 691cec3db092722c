"""Fixtures of all Python tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="where tests make tensors and layers that name no device: cpu; cuda; emulated-cuda, the operators on CUDA "
        "over emulated kernels (see emulated_cuda.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only: about the CPU; left out with another --device")
    # On a GPU torch's convolutions round their factors to 10 bits unless told not to; tests compare with the CPU's.
    torch.backends.cudnn.allow_tf32 = False
    if _device(config) == "emulated-cuda":
        import emulated_cuda

        emulated_cuda.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = _device(config)
    if device == "cpu":
        return
    if device.startswith("cuda") and not torch.cuda.is_available():
        pytest.exit(f"--device {device}: torch finds no such device here, no test was run", returncode=0)
    for item in items:
        if item.get_closest_marker("cpu_only"):
            item.add_marker(pytest.mark.skip(reason=f"--device {device}: a test of the CPU"))


def _device(config: pytest.Config) -> str:
    # Not known where pytest was started with other folders than this one.
    return config.getoption("--device", default="cpu")


@pytest.fixture(autouse=True)
def _on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors and layers that name no device are made on the one that --device names."""
    device = _device(request.config)
    if device in ("cpu", "emulated-cuda"):  # torch's own default: nothing stands between a test and torch
        yield
        return
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Gives torch its number of threads back after a test that changes it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def python_peer() -> Path:
    """The C++ side of the tests across languages."""
    return built_program("python_peer")


@pytest.fixture(scope="session")
def kernels_test() -> Path:
    """The C++ tests of the kernels alone."""
    return built_program("kernels_test")


@pytest.fixture(scope="session")
def momentum_bn_test() -> Path:
    """The C++ tests of the library."""
    return built_program("momentum_bn_test")


@pytest.fixture(scope="session")
def process_group_peer() -> Path:
    """Operators in C++ for the tests of process groups."""
    return built_library("process_group_peer")


def built_program(name: str) -> Path:
    """One of the C++ tests' programs. MOMENTUM_BN_BUILD_DIR names the build folder, by default `build`."""
    return _built("bin", name)


def built_library(name: str) -> Path:
    """One of the C++ tests' libraries, as `built_program`."""
    return _built("lib", f"lib{name}.so")


def _built(folder: str, name: str) -> Path:
    build = Path(os.environ.get("MOMENTUM_BN_BUILD_DIR", REPOSITORY / "build"))
    found = sorted(build.glob(f"**/{folder}/{name}"))
    if not found:
        pytest.skip(f"no C++ tests built: {build}/{folder}/{name} is missing (build the C++ tests first)")
    return found[0]
