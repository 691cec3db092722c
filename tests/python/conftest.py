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
        "--device", default="cpu", help="where tests make tensors and layers that name no device: cpu, cuda"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only: about the CPU; left out with another --device")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = torch.device(config.getoption("--device", default="cpu"))
    if device.type == "cpu":
        return
    usable = device.type != "cuda" or torch.cuda.is_available()
    absent = pytest.mark.skip(reason=f"--device {device}: torch finds no such device here")
    for item in items:
        if not usable:
            item.add_marker(absent)
        elif item.get_closest_marker("cpu_only"):
            item.add_marker(pytest.mark.skip(reason=f"--device {device}: a test of the CPU"))


@pytest.fixture(autouse=True)
def _on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors and layers that name no device are made on the one that --device names."""
    device = request.config.getoption("--device", default="cpu")
    if device != "cpu":  # torch's own default: nothing is set, and nothing stands between a test and torch
        torch.set_default_device(device)
    yield
    if device != "cpu":
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
def process_group_peer() -> Path:
    """Operators in C++ for the tests of process groups."""
    return _built("lib", "libprocess_group_peer.so")


def built_program(name: str) -> Path:
    """One of the C++ tests' programs. MOMENTUM_BN_BUILD_DIR names the build folder, by default `build`."""
    return _built("bin", name)


def _built(folder: str, name: str) -> Path:
    build = Path(os.environ.get("MOMENTUM_BN_BUILD_DIR", REPOSITORY / "build"))
    found = sorted(build.glob(f"**/{folder}/{name}"))
    if not found:
        pytest.skip(f"no C++ tests built: {build}/{folder}/{name} is missing (build the C++ tests first)")
    return found[0]
