"""One state and one set of words in both languages. `python_peer` is the C++ side (tests/cpp/python_peer.cpp)."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from torch import nn

import momentum_bn
from inputs import LAYERS, randomise_parameters
from momentum_bn.functional import momentum_batch_norm
from snapshots import OWN_STATE, PLAIN_STATE, same_bits


def inputs(first, last):
    """The inputs of forwards first to last - 1: both languages draw them from one generator."""
    drawn = []
    for step in range(first, last):
        torch.manual_seed(1000 + step)
        drawn.append(torch.randn(4, 3, 5, 2) * (1 + step % 3) + step % 4)
    return drawn


def build():
    return randomise_parameters(momentum_bn.MomentumBatchNorm2d(3, total_iters=6))


class Archive(nn.Module):
    """Writes tensors as `torch::save` of a C++ module does."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        for name, value in state.items():
            if name in ("weight", "bias"):
                self.register_parameter(name, nn.Parameter(value.detach().clone()))
            else:
                self.register_buffer(name, value.detach().clone())

    def forward(self) -> int:
        return 0


def write(path, module):
    torch.jit.save(torch.jit.script(Archive(module.state_dict())), str(path))


def read(path) -> dict[str, torch.Tensor]:
    return dict(torch.jit.load(str(path)).state_dict())


def run_peer(peer, *arguments) -> str:
    done = subprocess.run([peer, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_equal_states(state, module):
    assert set(state) == set(module.state_dict())
    for name, value in module.state_dict().items():
        assert same_bits(state[name], value), name


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 7])
def test_state_written_by_cpp_goes_on_in_python(python_peer, tmp_path, cut):
    """C++ starts from Python's state, so this is both directions."""
    uncut = build()
    write(tmp_path / "start.pt", uncut)
    run_peer(python_peer, "run", tmp_path / "start.pt", 0, cut, tmp_path / "cut.pt", tmp_path / "outputs.pt")
    for x in inputs(0, cut):
        uncut(x)
    resumed = build()
    resumed.load_state_dict(read(tmp_path / "cut.pt"), strict=True)
    assert_equal_states(resumed.state_dict(), uncut)
    for x in inputs(cut, cut + 5):
        assert same_bits(resumed(x), uncut(x))
    assert_equal_states(resumed.state_dict(), uncut)


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 7])
def test_state_written_by_python_goes_on_in_cpp(python_peer, tmp_path, cut):
    module = build()
    for x in inputs(0, cut):
        module(x)
    write(tmp_path / "cut.pt", module)
    run_peer(python_peer, "run", tmp_path / "cut.pt", cut, cut + 5, tmp_path / "end.pt", tmp_path / "outputs.pt")
    expected = torch.stack([module(x).detach() for x in inputs(cut, cut + 5)])
    (outputs,) = read(tmp_path / "outputs.pt").values()
    assert same_bits(outputs, expected)
    assert_equal_states(read(tmp_path / "end.pt"), module)


def test_names_and_dtypes_are_the_same(python_peer, tmp_path):
    module = build()
    write(tmp_path / "start.pt", module)
    run_peer(python_peer, "run", tmp_path / "start.pt", 0, 0, tmp_path / "end.pt", tmp_path / "outputs.pt")
    assert set(read(tmp_path / "end.pt")) == {*PLAIN_STATE, *OWN_STATE}


def test_defaults_are_the_same(python_peer):
    defaults = json.loads(run_peer(python_peer, "defaults"))
    m = momentum_bn.MomentumBatchNorm2d(3)
    assert defaults == {
        name: getattr(m, name)
        for name in (
            "eps", "momentum", "affine", "track_running_stats", "total_iters", "views_per_update", "schedule",
            "variance", "activation", "inplace", "detach_statistics",
        )
    }  # fmt: skip
    defaults = json.loads(run_peer(python_peer, "batch_norm_defaults"))
    m = momentum_bn.BatchNorm2d(3)
    assert defaults == {name: getattr(m, name) for name in defaults} and len(defaults) == 6


@pytest.mark.parametrize("cut", [0, 3])
def test_batch_norm_in_both_languages(python_peer, tmp_path, cut):
    """State and gradients: a run goes on from Python in C++ and back, bit for bit."""
    module = randomise_parameters(momentum_bn.BatchNorm2d(3, activation="relu"))
    for x in inputs(0, cut):
        module(x)
    write(tmp_path / "cut.pt", module)
    run_peer(python_peer, "train", tmp_path / "cut.pt", cut, cut + 3, tmp_path / "end.pt", tmp_path / "outputs.pt")
    expected = []
    for x in inputs(cut, cut + 3):
        y = module(x.requires_grad_())
        y.square().sum().backward()
        expected.append(torch.stack([y.detach(), x.grad]))
    (outputs,) = read(tmp_path / "outputs.pt").values()
    assert same_bits(outputs, torch.stack(expected))
    assert_equal_states(read(tmp_path / "end.pt"), module)
    resumed = momentum_bn.BatchNorm2d(3, activation="relu")
    resumed.load_state_dict(read(tmp_path / "end.pt"), strict=True)
    nn.BatchNorm2d(3).load_state_dict(read(tmp_path / "end.pt"), strict=True)


def layer(dim=2, **options):
    return LAYERS[dim](3, **options)


ERRORS = {
    "rank_1d": lambda: layer(1)(torch.ones(4, 3, 2, 2)),
    "rank_2d": lambda: layer(2)(torch.ones(4, 3, 2)),
    "rank_3d": lambda: layer(3)(torch.ones(4, 3, 2, 2)),
    "one_value": lambda: layer(1)(torch.ones(1, 3)),
    "one_value_2d": lambda: layer(2)(torch.ones(1, 3, 1, 1)),
    "one_value_untracked": lambda: layer(2, track_running_stats=False).eval()(torch.ones(1, 3, 1, 1)),
    "channels": lambda: layer(2)(torch.ones(4, 5, 2, 2)),
    "channels_eval": lambda: layer(2).eval()(torch.ones(4, 5, 2, 2)),
    "integer": lambda: layer(2)(torch.ones(4, 3, 2, 2, dtype=torch.int64)),
    "complex": lambda: layer(2)(torch.ones(4, 3, 2, 2, dtype=torch.complex64)),
    "residual_shape": lambda: layer(2)(torch.ones(4, 3, 2, 2), torch.ones(4, 3, 2, 1)),
    "residual_dtype": lambda: layer(2)(torch.ones(4, 3, 2, 2), torch.ones(4, 3, 2, 2, dtype=torch.float64)),
    "eps": lambda: layer(eps=-1.0),
    "momentum": lambda: layer(momentum=1.5),
    "total_iters": lambda: layer(total_iters=0),
    "views_per_update": lambda: layer(views_per_update=0),
    "process_group": lambda: layer(process_group="world"),
    "set_momentum": lambda: setattr(layer(), "momentum", -0.5),
    "set_cur_iter": lambda: setattr(layer(), "cur_iter", -1),
    "set_total_iters": lambda: setattr(layer(), "total_iters", -2),
    "set_total_iters_of_a_network": lambda: momentum_bn.set_total_iters(nn.Sequential(layer()), 0),
    "batch_norm_momentum": lambda: momentum_bn.BatchNorm2d(3, momentum=-0.5),
    "batch_norm_eps": lambda: momentum_bn.BatchNorm2d(3, eps=0.0),
    "batch_norm_one_value": lambda: momentum_bn.BatchNorm2d(3)(torch.ones(1, 3, 1, 1)),
    "batch_norm_channels": lambda: momentum_bn.BatchNorm2d(3)(torch.ones(4, 5, 2, 2)),
    "function_channels": lambda: momentum_batch_norm(torch.ones(4, 3), torch.ones(4), torch.ones(3), training=True),
    "function_weight": lambda: momentum_batch_norm(
        torch.ones(4, 3), torch.ones(3), torch.ones(3), torch.ones(2), training=True
    ),
    "function_one_of_two": lambda: momentum_batch_norm(torch.ones(4, 3), torch.ones(3), None, training=True),
    "function_one_value": lambda: momentum_batch_norm(torch.ones(1, 3), None, None, training=True),
    "function_integer": lambda: momentum_batch_norm(torch.ones(4, 3, dtype=torch.int64), None, None, training=True),
    "function_momentum": lambda: momentum_batch_norm(torch.ones(4, 3), None, None, training=True, momentum=1.5),
    "function_eps": lambda: momentum_batch_norm(torch.ones(4, 3), None, None, training=True, eps=0.0),
    "function_rank": lambda: momentum_batch_norm(torch.ones(3), None, None, training=True),
}


@pytest.fixture(scope="module")
def cpp_errors(python_peer):
    return json.loads(run_peer(python_peer, "errors"))


def test_every_case_is_in_both_languages(cpp_errors):
    assert cpp_errors.keys() == ERRORS.keys()


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_of_the_same_type_and_words(cpp_errors, case):
    with pytest.raises(Exception) as error:
        ERRORS[case]()
    assert {"type": type(error.value).__name__, "words": str(error.value)} == cpp_errors[case]
