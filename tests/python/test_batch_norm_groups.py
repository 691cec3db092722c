"""BatchNorm over several processes, and gradients through their statistics: torch's SyncBatchNorm in numbers.

The oracle is one process with the whole batch.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing import assert_close

import momentum_bn
from inputs import BATCH_NORMS, LAYERS, as_layout, randn, randomise_parameters
from momentum_bn import convert_batchnorm, convert_momentum_batchnorm, revert_momentum_batchnorm
from ranks import run_ranks
from snapshots import same_bits, unchanged

EXACT = {"rtol": 1e-10, "atol": 1e-10}

# Whose layer, shape of the whole batch, layout, with a residual or not, options.
CASES: dict[str, tuple[dict[int, Any], tuple[int, ...], str, bool, dict[str, Any]]] = {
    "rows": (BATCH_NORMS, (8, 3), "contiguous", False, {}),
    "short planes": (BATCH_NORMS, (8, 3, 5), "sliced", False, {"momentum": None}),
    "relu": (BATCH_NORMS, (8, 3, 4, 5), "contiguous", False, {"activation": "relu"}),
    "residual and relu": (BATCH_NORMS, (8, 3, 4, 5), "channels_last", True, {"activation": "relu"}),
    "residual": (BATCH_NORMS, (8, 3, 4, 5), "contiguous", True, {"bias": False}),
    "segments of planes": (BATCH_NORMS, (8, 2, 40, 80), "contiguous", False, {"affine": False}),
    "blocks of columns": (BATCH_NORMS, (8, 600, 2, 2), "channels_last", False, {"activation": "relu"}),
    "untracked": (BATCH_NORMS, (8, 3, 2, 2, 2), "permuted", False, {"track_running_stats": False}),
    "momentum": (LAYERS, (8, 3, 4, 5), "contiguous", True, {"activation": "relu", "momentum": 0.4}),
    "momentum unbiased": (LAYERS, (8, 3), "contiguous", False, {"variance": "unbiased", "momentum": 0.7}),
}
SHARDS = {2: [[5, 3], [8, 0]], 3: [[1, 3, 4], [0, 8, 0]], 4: [[2, 1, 5, 0], [0, 0, 4, 4]]}
STEPS = 3


def mine(whole: Tensor, shards: list[int]) -> Tensor:
    return whole.split(shards)[dist.get_rank()]


def layer_of(layers: dict[int, Any], shape: tuple[int, ...], **options: Any) -> Any:
    if layers is LAYERS:
        options = {"detach_statistics": False, "total_iters": 4, **options}
    return randomise_parameters(layers[max(1, len(shape) - 2)](shape[1], dtype=torch.float64, **options))


def batch(shape: tuple[int, ...], step: int, kind: int) -> Tensor:
    """What all ranks have together: input (0), residual (1) or gradient of the output (2)."""
    return randn(*shape, seed=10 * step + kind, scale=1 + step, shift=3 if kind == 0 else 0)


def steps_of(layer: Any, case: str, take: Any) -> dict[str, Any]:
    _, shape, layout, with_residual, _ = CASES[case]
    outputs, gradients = [], []
    for step in range(STEPS):
        x, residual, g = (as_layout(take(batch(shape, step, kind)), layout) for kind in range(3))
        x.requires_grad_(), residual.requires_grad_()
        y = layer(x * 1, residual if with_residual else None)
        y.backward(g)
        outputs.append(y.detach())
        gradients.append([x.grad, residual.grad] if with_residual else [x.grad])
    return {
        "y": outputs,
        "gradients": gradients,
        "parameters": [p.grad for p in layer.parameters()],
        "state": {name: buffer.clone() for name, buffer in layer.named_buffers()},
    }


def steps_of_a_rank(shards: list[int]) -> dict[str, Any]:
    return {
        case: steps_of(
            layer_of(layers, shape, process_group=dist.group.WORLD, **options), case, lambda whole: mine(whole, shards)
        )
        for case, (layers, shape, _, _, options) in CASES.items()
    }


def torchs_layer(shape: tuple[int, ...], **options: Any) -> nn.Module:
    """torch's BatchNorm behind our interface; over the whole batch it is what SyncBatchNorm is over its shards."""
    activation, bias = options.pop("activation", None), options.pop("bias", True)
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[max(1, len(shape) - 2)](
        shape[1], dtype=torch.float64, **options
    )
    if not bias:
        norm.register_parameter("bias", None)
    plain_forward = norm.forward

    def forward(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = plain_forward(x)
        y = y if residual is None else y + residual
        return torch.relu(y) if activation == "relu" else y

    norm.forward = forward
    return randomise_parameters(norm)


@pytest.mark.parametrize(("ranks", "shards"), [(ranks, s) for ranks, lists in SHARDS.items() for s in lists], ids=str)
def test_ranks_equal_one_process(ranks, shards):
    """Outputs, gradients and state, over unequal and empty shards: those of the whole batch. One state on all ranks."""
    of_ranks = run_ranks(ranks, steps_of_a_rank, shards)
    for case, (layers, shape, _, _, options) in CASES.items():
        results = [result[case] for result in of_ranks]
        # The Momentum layer by itself is compared with plain operations in test_batch_norm.py.
        alone = torchs_layer(shape, **options) if layers is BATCH_NORMS else layer_of(layers, shape, **options)
        expected = steps_of(alone, case, lambda whole: whole)
        for step in range(STEPS):
            assert_close(torch.cat([r["y"][step] for r in results]), expected["y"][step], **EXACT, msg=f"{case}: y")
            for number, gradient in enumerate(expected["gradients"][step]):
                actual = torch.cat([r["gradients"][step][number] for r in results])
                assert_close(actual, gradient, **EXACT, msg=f"{case}: gradient {number}")
        for number, gradient in enumerate(expected["parameters"]):
            total = sum(r["parameters"][number] for r in results)
            assert_close(total, gradient, **EXACT, msg=f"{case}: sum of the ranks' parameter gradients")
        for name, value in expected["state"].items():
            assert all(same_bits(r["state"][name], results[0]["state"][name]) for r in results), (case, name)
            assert_close(results[0]["state"][name], value, **EXACT, msg=f"{case}: {name}")


# --- what is communicated ---------------------------------------------------------------------------------------------


def collectives_in(call: Any, group: Any = None) -> int:
    """How many collectives of a group a call starts: the group numbers them."""
    group = group or dist.group.WORLD
    before = group._get_sequence_number_for_group()
    call()
    return group._get_sequence_number_for_group() - before


def counts() -> list[dict[str, int]]:
    solitude = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    counted = []
    for layers in (BATCH_NORMS, LAYERS):
        for options in ({}, {"activation": "relu"}):
            layer = layer_of(layers, (4, 3, 5, 5), process_group=dist.group.WORLD, **options)
            solitary = layer_of(layers, (4, 3, 5, 5), process_group=solitude, **options)
            x, residual = randn(4, 3, 5, 5).requires_grad_(), randn(4, 3, 5, 5, seed=1).requires_grad_()
            y, added = layer(x), layer(x, residual)
            of_weight = layer(x.detach())
            counted.append(
                {
                    "forward": collectives_in(lambda: layer(x)),  # noqa: B023
                    "backward": collectives_in(lambda: y.sum().backward()),  # noqa: B023
                    "backward with a residual": collectives_in(lambda: added.sum().backward()),  # noqa: B023
                    "backward without dx": collectives_in(lambda: of_weight.sum().backward()),  # noqa: B023
                    "no gradient": collectives_in(lambda: torch.no_grad()(layer)(x)),  # noqa: B023
                    "group of one": collectives_in(lambda: solitary(x).sum().backward(), solitude),  # noqa: B023
                    "evaluation": collectives_in(lambda: layer.eval()(x).sum().backward()),  # noqa: B023
                }
            )
    return counted


def test_one_collective_forward_and_one_backward():
    for of_rank in run_ranks(2, counts):
        for counted in of_rank:
            assert counted == {
                "forward": 1,
                "backward": 1,
                "backward with a residual": 1,
                "backward without dx": 1,
                "no gradient": 1,
                "group of one": 0,
                "evaluation": 0,
            }


# --- edges --------------------------------------------------------------------------------------------------------


def words_of(error: type[Exception], call: Any) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def edges() -> None:
    rank = dist.get_rank()
    layer = layer_of(BATCH_NORMS, (8, 3), process_group=dist.group.WORLD)
    with unchanged(layer):
        assert layer(torch.empty(0, 3, dtype=torch.float64)).shape == (0, 3)
    x = randn(1 if rank == 0 else 0, 3)
    with unchanged(layer, x):
        words = words_of(ValueError, lambda: layer(x))
    assert words.startswith("Expected more than 1 value per channel") and "whole process group" in words
    y = layer(mine(randn(2, 3, seed=5), [1, 1]))
    assert y.shape == (1, 3) and y.isfinite().all()

    # A rank whose part takes no gradient at all of its own still gives the others its sums.
    layer = layer_of(BATCH_NORMS, (8, 3), process_group=dist.group.WORLD)
    whole, g = randn(8, 3), randn(8, 3, seed=1)
    part = mine(whole, [8, 0]).requires_grad_()
    layer(part).backward(mine(g, [8, 0]))
    alone, leaf = layer_of(BATCH_NORMS, (8, 3)), whole.clone().requires_grad_()
    alone(leaf).backward(g)
    assert_close(part.grad, mine(leaf.grad, [8, 0]), **EXACT)

    # A group of one is this process by itself: second derivatives, too.
    solitude = [dist.new_group([rank]) for rank in range(2)][rank]
    solitary = layer_of(BATCH_NORMS, (8, 3), process_group=solitude)
    x = randn(4, 3).requires_grad_()
    (dx,) = torch.autograd.grad(solitary(x).sin().sum(), x, create_graph=True)
    dx.square().sum().backward()
    torch.func.grad(lambda x: solitary(x).sin().sum())(x.detach())


def test_empty_batches_and_single_values():
    run_ranks(2, edges)


def derivatives() -> None:
    """What a group does not do is refused in words, and gives no wrong number."""
    x = mine(randn(6, 3), [4, 2])
    for layers in (BATCH_NORMS, LAYERS):
        layer = layer_of(layers, (6, 3), process_group=dist.group.WORLD)

        def double_backward(layer=layer):
            leaf = x.clone().requires_grad_()
            torch.autograd.grad(layer(leaf).sin().sum(), leaf, create_graph=True)

        def forward_mode(layer=layer):
            with forward_ad.dual_level():
                layer(forward_ad.make_dual(x, torch.ones_like(x)))

        def by_func(layer=layer):
            torch.func.grad(lambda x: layer(x).sin().sum())(x)

        assert "gradient of the gradient" in words_of(NotImplementedError, double_backward)
        for call in (forward_mode, by_func):
            with unchanged(layer):
                assert "process_group" in words_of(NotImplementedError, call)


def test_derivatives_that_are_not_there_are_refused():
    run_ranks(2, derivatives)


# --- conversion, copies -----------------------------------------------------------------------------------------------


def conversion() -> None:
    own = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    net = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3, process_group=own, momentum=0.2), nn.SyncBatchNorm(3))
    convert_batchnorm(net)
    world = dist.group.WORLD.group_name
    assert [layer.process_group for layer in net] == [None, own.group_name, world], "a SyncBatchNorm keeps its group"
    assert [layer.momentum for layer in net] == [0.1, 0.2, 0.1]
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert [layer.process_group for layer in other] == [layer.process_group for layer in net]
    net(torch.rand(2 + dist.get_rank(), 3)).sum().backward()

    # On to Momentum BatchNorm, which keeps the group that the layer has now.
    momentum = convert_momentum_batchnorm(copy.deepcopy(net), 7)
    assert [layer.process_group for layer in momentum] == [None, own.group_name, world]

    revert_momentum_batchnorm(net)
    assert [type(layer) for layer in net] == [nn.BatchNorm1d, nn.SyncBatchNorm, nn.SyncBatchNorm]
    assert net[1].process_group is own and net[1].momentum == 0.2

    convert_batchnorm(net, process_group=dist.group.WORLD)
    assert [layer.process_group for layer in net] == [world] * 3
    for layer in revert_momentum_batchnorm(net):
        layer.num_features  # noqa: B018
    assert net[1].process_group is own


def test_conversion_and_back():
    run_ranks(2, conversion)


# --- compiled ---------------------------------------------------------------------------------------------------------


class TwoBranches(nn.Module):
    """Two layers whose collectives could change places: neither needs the other's result."""

    def __init__(self) -> None:
        super().__init__()
        group = dist.group.WORLD
        self.first = momentum_bn.BatchNorm2d(4, process_group=group, activation="relu")
        self.second = momentum_bn.MomentumBatchNorm2d(4, total_iters=6, process_group=group, detach_statistics=False)
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = momentum_bn.BatchNorm1d(4, process_group=group)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head((self.second(y[..., :1]) * self.first(y)).mean((2, 3)))


def compiled(backend: str) -> None:
    torch.manual_seed(1)
    eager = TwoBranches()
    copied = copy.deepcopy(eager)
    forward = torch.compile(copied, backend=backend, fullgraph=True)
    for step in range(4):
        x = mine(randn(6, 3, 4, 4, seed=step, dtype=torch.float32), [4, 2])
        losses = []
        for call, net in ((eager, eager), (forward, copied)):
            loss = (call(x) - 0.5).square().sum()
            loss.backward()
            losses.append(loss.detach())
            with torch.no_grad():
                for parameter in net.parameters():
                    dist.all_reduce(parameter.grad)
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
        assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for name, value in eager.state_dict().items():
        assert_close(copied.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend):
    run_ranks(2, compiled, backend, seconds=240)
