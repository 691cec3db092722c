"""Statistics over several processes: `process_group=`. The oracle is one process with the whole batch."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import momentum_bn
from inputs import LAYERS, as_layout, randn, randomise_parameters
from momentum_bn import convert_momentum_batchnorm, revert_momentum_batchnorm
from oracle import MomentumBatchNormOracle
from ranks import run_ranks
from snapshots import OWN_STATE, same_bits, snapshot, unchanged

EXACT = {"rtol": 1e-10, "atol": 1e-10}

# Shape of the whole batch, layout, with a residual or not, options. The shapes take every way through the kernels.
CASES: dict[str, tuple[tuple[int, ...], str, bool, dict[str, Any]]] = {
    "rows": ((8, 3), "contiguous", False, {}),
    "short planes": ((8, 3, 5), "sliced", False, {"variance": "unbiased", "views_per_update": 1}),
    "residual and relu": ((8, 3, 4, 5), "contiguous", True, {"activation": "relu"}),
    "channels last": ((8, 3, 4, 5), "channels_last", True, {"activation": "relu", "inplace": True}),
    "segments of planes": ((8, 2, 40, 80), "contiguous", False, {"momentum": None}),
    "groups of channels": ((8, 40, 16, 17), "contiguous", False, {"schedule": "constant", "momentum": 0.3}),
    "blocks of columns": ((8, 600, 2, 2), "contiguous", False, {"variance": "biased"}),
    "three dimensions": ((8, 3, 2, 2, 2), "permuted", False, {"track_running_stats": False}),
}
SHARDS = {
    2: [[5, 3], [8, 0]],
    3: [[1, 3, 4], [0, 8, 0]],
    4: [[2, 1, 5, 0], [0, 0, 4, 4]],
}
STEPS = 4  # two updates of two views


def world() -> str:
    return dist.group.WORLD.group_name


def mine(whole: Tensor, shards: list[int]) -> Tensor:
    return whole.split(shards)[dist.get_rank()]


def layer_of(shape: tuple[int, ...], **options: Any) -> momentum_bn.MomentumBatchNorm:
    layer = LAYERS[max(1, len(shape) - 2)](shape[1], total_iters=4, dtype=torch.float64, **options)
    return randomise_parameters(layer)


def batch(shape: tuple[int, ...], step: int, kind: int) -> Tensor:
    """What all ranks have together: input (0), residual (1) or gradient of the output (2)."""
    return randn(*shape, seed=10 * step + kind, scale=1 + step, shift=3 if kind == 0 else 0)


def steps_of_a_rank(shards: list[int]) -> dict[str, dict[str, Any]]:
    results = {}
    for name, (shape, layout, with_residual, options) in CASES.items():
        layer = layer_of(shape, process_group=dist.group.WORLD, **options)
        outputs, gradients = [], []
        for step in range(STEPS):
            x, residual, g = (as_layout(mine(batch(shape, step, kind), shards), layout) for kind in range(3))
            x.requires_grad_(), residual.requires_grad_()
            y = layer(x * 1, residual if with_residual else None)  # a leaf would not be overwritten
            y.backward(g)
            assert y.shape == x.shape and y.dtype == x.dtype
            outputs.append(y.detach())
            gradients.append([x.grad, residual.grad])
        results[name] = {
            "y": outputs,
            "gradients": gradients,
            "parameters": [layer.weight.grad, layer.bias.grad],
            "state": dict(layer.named_buffers()),
            "cur_iter": layer.cur_iter,
        }
    return results


@pytest.mark.parametrize(("ranks", "shards"), [(ranks, s) for ranks, lists in SHARDS.items() for s in lists], ids=str)
def test_ranks_equal_one_process(ranks, shards):
    """Outputs, gradients and state, over unequal and empty shards: those of the whole batch. One state on all ranks."""
    of_ranks = run_ranks(ranks, steps_of_a_rank, shards)
    for name, (shape, _, with_residual, options) in CASES.items():
        results = [result[name] for result in of_ranks]
        layer = layer_of(shape, **options)
        words = {"inplace", "track_running_stats"}
        oracle = MomentumBatchNormOracle(
            shape[1],
            total_iters=4,
            track_running_stats=options.get("track_running_stats", True),
            **{word: value for word, value in options.items() if word not in words},
        )
        for step in range(STEPS):
            x, residual, g = (batch(shape, step, kind) for kind in range(3))
            x.requires_grad_(), residual.requires_grad_()
            y = oracle.train_forward(x, layer.weight, layer.bias, residual if with_residual else None)
            y.backward(g)
            assert_close(torch.cat([r["y"][step] for r in results]), y.detach(), **EXACT, msg=f"{name}: y")
            dx = torch.cat([r["gradients"][step][0] for r in results])
            assert_close(dx, x.grad, **EXACT, msg=f"{name}: dx")
            if with_residual:
                dresidual = torch.cat([r["gradients"][step][1] for r in results])
                assert_close(dresidual, residual.grad, **EXACT, msg=f"{name}: dresidual")
        for number, parameter in enumerate((layer.weight, layer.bias)):
            total = sum(r["parameters"][number] for r in results)
            assert_close(total, parameter.grad, **EXACT, msg=f"{name}: sum of the ranks' parameter gradients")
        for buffer in results[0]["state"]:
            assert all(same_bits(r["state"][buffer], results[0]["state"][buffer]) for r in results), (name, buffer)
        if oracle.track_running_stats:
            for buffer in ("running_mean", "running_var", "view_mean_sum", "view_var_sum"):
                assert_close(results[0]["state"][buffer], getattr(oracle, buffer), **EXACT, msg=f"{name}: {buffer}")
            assert {r["cur_iter"] for r in results} == {oracle.cur_iter}
            assert int(results[0]["state"]["num_batches_tracked"]) == STEPS


# --- empty batches, single values, evaluation -------------------------------------------------------------------------


def words_of(error: type[Exception], call: Any) -> str:
    """The words of the error that a call raises."""
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def edges() -> None:
    rank = dist.get_rank()
    for options in ({}, {"inplace": True}, {"track_running_stats": False}):
        layer = layer_of((8, 3), process_group=dist.group.WORLD, **options).requires_grad_(False)
        layer(mine(randn(8, 3), [5, 3]))

        # The whole group is empty: nothing changes, the output is empty.
        x = torch.empty(0, 3, dtype=torch.float64)
        with unchanged(layer):
            assert layer(x).shape == (0, 3)

        # One value in the whole group: the error of BatchNorm, on every rank.
        x = randn(1 if rank == 0 else 0, 3)
        with unchanged(layer, x):
            words = words_of(ValueError, lambda layer=layer, x=x: layer(x))
        assert words.startswith("Expected more than 1 value per channel when training, got input size")
        assert str(list(x.shape)) in words and "whole process group" in words

        # One value on each rank is no error.
        whole = randn(2, 3, seed=5)
        y = layer(mine(whole, [1, 1]).clone())
        assert y.shape == (1, 3) and y.isfinite().all()

    # An empty rank takes part in everything: its state moves, its gradients are zeros.
    layer = layer_of((8, 3, 2, 2), process_group=dist.group.WORLD, activation="relu")
    x = mine(randn(8, 3, 2, 2), [0, 8]).requires_grad_()
    layer(x).sum().backward()
    assert int(layer.num_batches_tracked) == 1 and layer.view_mean_sum.abs().min() > 0
    assert x.grad.shape == x.shape
    assert rank == 1 or (not layer.weight.grad.any() and not layer.bias.grad.any())

    # Evaluation knows no group, also where the batch normalises itself.
    layer.eval()
    alone = layer_of((8, 3, 2, 2), activation="relu").eval()
    alone.load_state_dict(layer.state_dict())
    x = randn(4 + rank, 3, 2, 2)
    assert same_bits(layer(x), alone(x))
    untracked = layer_of((8, 3), process_group=dist.group.WORLD, track_running_stats=False).eval()
    assert same_bits(untracked(x[..., 0, 0]), layer_of((8, 3), track_running_stats=False)(x[..., 0, 0]))


def test_empty_batches_and_single_values():
    run_ranks(2, edges)


# --- what is communicated ---------------------------------------------------------------------------------------------


def collectives_in(call: Any, group: Any = None) -> int:
    """How many collectives of a group a call starts: the group numbers them."""
    group = group or dist.group.WORLD
    before = group._get_sequence_number_for_group()
    call()
    return group._get_sequence_number_for_group() - before


def counts() -> dict[str, int]:
    solitude = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    layer = layer_of((4, 3, 5, 5), process_group=dist.group.WORLD)
    alone = layer_of((4, 3, 5, 5))
    solitary = layer_of((4, 3, 5, 5), process_group=solitude)
    x = randn(4, 3, 5, 5).requires_grad_()
    y = layer(x)
    return {
        "forward": collectives_in(lambda: layer(x)),
        "three forwards": collectives_in(lambda: [layer(x) for _ in range(3)]),
        "backward": collectives_in(lambda: y.sum().backward()),
        "no gradient": collectives_in(lambda: torch.no_grad()(layer)(x)),
        "alone": collectives_in(lambda: alone(x).sum().backward()),
        "group of one": collectives_in(lambda: solitary(x).sum().backward(), solitude),
        "evaluation": collectives_in(lambda: layer.eval()(x).sum().backward()),
    }


def test_one_collective_per_forward_none_elsewhere():
    for counted in run_ranks(2, counts):
        assert counted == {
            "forward": 1,
            "three forwards": 3,
            "backward": 0,
            "no gradient": 1,
            "alone": 0,
            "group of one": 0,
            "evaluation": 0,
        }


# --- groups and their names -------------------------------------------------------------------------------------------


def groups() -> None:
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own, other = pairs[rank // 2], pairs[1 - rank // 2]
    layer = layer_of((6, 3), process_group=own)
    named = layer_of((6, 3), process_group=own.group_name)
    x = randn(3, 3, seed=rank)
    expected = layer_of((6, 3))(torch.cat([randn(3, 3, seed=rank // 2 * 2 + i) for i in range(2)]))
    for each in (layer, named):
        assert each.process_group == own.group_name and f"process_group={own.group_name!r}" in repr(each)
        assert_close(each(x), expected[rank % 2 * 3 :][:3], **EXACT)

    # Copies belong to the same group, and go on between two views.
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(saved, weights_only=False)]
    expected = layer(x)
    for each in copies:
        assert each.process_group == own.group_name
        assert same_bits(each(x), expected)

    # Groups of others, and none at all.
    assert "belongs to" in words_of(ValueError, lambda: layer_of((6, 3), process_group=other))
    words = words_of(ValueError, lambda: layer_of((6, 3), process_group="nonsense"))
    assert "process_group" in words and "'nonsense'" in words
    assert "(got list)" in words_of(TypeError, lambda: layer_of((6, 3), process_group=[0, 1]))
    with unchanged(layer):
        assert "'nonsense'" in words_of(ValueError, lambda: setattr(layer, "process_group", "nonsense"))
    assert layer.process_group == own.group_name
    layer.process_group = None
    assert same_bits(layer(x[:3]), copies[0].train()(x)) is False
    layer.process_group = own
    assert layer.process_group == own.group_name

    # A layer that comes from a process with other groups evaluates here, and names what it misses in training.
    state = layer.__getstate__()
    state["_process_group"] = "of another run"
    stranger = layer_of((6, 3))
    stranger.__setstate__(state)
    assert stranger.eval()(x).isfinite().all()
    with unchanged(stranger.train()):
        assert "'of another run'" in words_of(ValueError, lambda: stranger(x))


def test_groups_by_object_and_name():
    run_ranks(4, groups)


def conversion() -> None:
    pairs = [dist.new_group([rank]) for rank in range(2)]
    own = pairs[dist.get_rank()]
    net = nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3, process_group=own, momentum=0.2), nn.SyncBatchNorm(3))
    convert_momentum_batchnorm(net, 7)
    assert [layer.process_group for layer in net] == [None] * 3, "converted without a group, no layer synchronises"
    copy.deepcopy(net), pickle.dumps(net)
    revert_momentum_batchnorm(net)
    assert net[1].process_group is own and net[1].momentum == 0.2
    assert net[2].process_group is dist.group.WORLD or net[2].process_group is None

    convert_momentum_batchnorm(net, 7, process_group=dist.group.WORLD)
    assert [layer.process_group for layer in net] == [world()] * 3
    copy.deepcopy(net), pickle.dumps(net)
    net(torch.rand(2 + dist.get_rank(), 3))
    assert all(same_bits(net[0].view_mean_sum, other) for other in gathered(net[0].view_mean_sum))
    revert_momentum_batchnorm(net)
    assert [type(layer) for layer in net] == [nn.BatchNorm1d, nn.SyncBatchNorm, nn.SyncBatchNorm]
    assert net[1].process_group is own, "the group that it had"

    layer = momentum_bn.MomentumBatchNorm(3, process_group=own)
    assert revert_momentum_batchnorm(layer).process_group is own
    convert_momentum_batchnorm(nn.Sequential(layer), 7, process_group=own.group_name)
    before = copy.deepcopy(net[0])
    words_of(ValueError, lambda: convert_momentum_batchnorm(net, 7, process_group="nonsense"))
    assert type(net[0]) is type(before) is nn.BatchNorm1d


def gathered(values: Tensor) -> list[Tensor]:
    all_values = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(all_values, values)
    return all_values


def test_conversion_and_back():
    run_ranks(2, conversion)


def test_without_torch_distributed(monkeypatch):
    """Without a process group nothing asks torch.distributed for anything."""
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert momentum_bn.MomentumBatchNorm1d(3)(torch.rand(4, 3)).shape == (4, 3)
    with pytest.raises(TypeError, match="process_group"):
        momentum_bn.MomentumBatchNorm1d(3, process_group=object())


# --- C++ --------------------------------------------------------------------------------------------------------------


def cpp_layer(library: str) -> None:
    torch.ops.load_library(library)
    xs = [mine(randn(6, 3, 4, 5, seed=step), [4, 2]) for step in range(3)]
    actual = torch.ops.momentum_bn_peer.train(xs, world())
    layer = momentum_bn.MomentumBatchNorm2d(3, total_iters=4, dtype=torch.float64, process_group=world())
    outputs = [layer(x) for x in xs]
    sum(y.square().sum() for y in outputs).backward()
    expected = [*(y.detach() for y in outputs), *layer.buffers(), layer.weight.grad]
    assert len(actual) == len(expected) == 3 + 8 + 1
    for ours, theirs in zip(actual[:-1], expected[:-1], strict=True):
        assert same_bits(ours, theirs)
    assert_close(actual[-1], expected[-1], **EXACT)
    words = words_of(ValueError, lambda: torch.ops.momentum_bn_peer.train(xs, "nonsense"))
    assert words == words_of(ValueError, lambda: momentum_bn.MomentumBatchNorm2d(3, process_group="nonsense"))


def test_cpp_layer_in_a_group_of_pythons(process_group_peer):
    """A C++ program takes the group that Python brought up, by its name."""
    run_ranks(2, cpp_layer, str(process_group_peer))


# --- compiled ---------------------------------------------------------------------------------------------------------


class TwoBranches(nn.Module):
    """Two layers whose collectives could change places: neither needs the other's result."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.second = (momentum_bn.MomentumBatchNorm2d(4, total_iters=6, **options) for _ in range(2))
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = momentum_bn.MomentumBatchNorm1d(4, total_iters=6, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head((self.second(y[..., :1]) * self.first(y)).mean((2, 3)))


def compiled(backend: str) -> None:
    torch.manual_seed(1)
    eager = TwoBranches(process_group=dist.group.WORLD)
    copied = copy.deepcopy(eager)
    with torch._dynamo.config.patch(error_on_recompile=True):
        forward = torch.compile(copied, backend=backend, fullgraph=True)
        for step in range(6):
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
        now = copied.state_dict()[name]
        if name.rsplit(".")[-1] in OWN_STATE and not value.is_floating_point():
            assert torch.equal(now, value), name
        assert_close(now, value, rtol=1e-4, atol=1e-5, msg=name)
        if ".conv" not in name:
            assert all(same_bits(now, other) for other in gathered(now)), name
    assert copied.head.cur_iter == 3

    # The same words where the group has one value, and the teacher's way: no gradient, in place.
    layer = momentum_bn.MomentumBatchNorm1d(3, process_group=dist.group.WORLD, inplace=True).requires_grad_(False)
    forward = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        x = mine(randn(6, 3, dtype=torch.float32), [4, 2])
        assert_close(forward(x), momentum_bn.MomentumBatchNorm1d(3, process_group=dist.group.WORLD)(x.clone()))
        single = torch.rand(1 - dist.get_rank(), 3)
        torch._dynamo.reset()
        with unchanged(layer):
            words = words_of(Exception, lambda: torch.compile(layer, backend="aot_eager", fullgraph=True)(single))
        assert "whole process group" in words


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend):
    """Unequal shards, one graph, no recompilation, as eager."""
    run_ranks(2, compiled, backend, seconds=240)


def collectives_of_a_graph() -> list[str]:
    seen = []

    def backend(graph, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def compile_graph(graph, _inputs):
            seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return graph.forward

        return aot_autograd(fw_compiler=compile_graph)(graph, inputs)

    torch.compile(TwoBranches(process_group=dist.group.WORLD), backend=backend, fullgraph=True)(
        torch.rand(4, 3, 4, 4)
    ).sum().backward()
    return [name for name in seen if "c10d" in name]


def test_compiler_sees_collectives():
    """An operator that communicates behind the compiler's back could change places with another one."""
    for seen in run_ranks(2, collectives_of_a_graph):
        gather, done = "_c10d_functional.all_gather_into_tensor.default", "_c10d_functional.wait_tensor.default"
        assert seen == [gather, done] * 3


# --- derivatives, transforms, checkpoints -----------------------------------------------------------------------------


def derivatives() -> None:
    shards = [4, 2]
    whole, tangent = randn(6, 3, seed=1), randn(6, 3, seed=2)

    def both(call: Any) -> tuple[Any, Any]:
        """From the ranks of a group, and from one process with the whole batch."""
        return call(layer_of((6, 3), process_group=world()), mine(whole, shards)), call(layer_of((6, 3)), whole)

    def double_backward(layer: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    def by_func(layer: nn.Module, x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: layer(x).sin().sum())(x)

    def by_jvp(layer: nn.Module, x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: layer(x).sin(), (x,), (tangent[: len(x)],))[1]

    def forward_mode(layer: nn.Module, x: Tensor) -> Tensor:
        direction = tangent if len(x) == 6 else mine(tangent, shards)
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, direction)).sin()).tangent

    for call in (double_backward, by_func, forward_mode):
        ours, expected = both(call)
        assert_close(ours, mine(expected, shards), **EXACT, msg=call.__name__)
    ours, expected = both(by_jvp)
    first = shards[0] if dist.get_rank() == 0 else 0
    assert_close(ours[:first], expected[:first], **EXACT)

    layer = layer_of((6, 3), process_group=world(), inplace=True).requires_grad_(False)
    with unchanged(layer):
        words = words_of(ValueError, lambda: torch.func.vmap(layer)(randn(5, 4, 3)))
    assert "process_group" in words and "torch.func.vmap" in words


def test_derivatives_and_transforms():
    run_ranks(2, derivatives)


def keep_the_layers_output(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = operator is torch.ops.momentum_bn._forward_train.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoints() -> None:
    x = mine(randn(6, 3), [4, 2])
    for options in ({}, {"track_running_stats": False}):
        layer = layer_of((6, 3), process_group=world(), **options)
        leaf = x.clone().requires_grad_()
        y = checkpoint(lambda x, layer=layer: layer(x * 2).square(), leaf, use_reentrant=False)
        with unchanged(layer):
            assert "torch.utils.checkpoint" in words_of(ValueError, lambda y=y: y.sum().backward())

        plain, saving = (layer_of((6, 3), process_group=world(), **options) for _ in range(2))
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        plain(leaves[0] * 2).square().sum().backward()
        y = checkpoint(
            lambda x, saving=saving: saving(x * 2).square(),
            leaves[1],
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(keep_the_layers_output),
        )
        assert collectives_in(lambda y=y: y.sum().backward()) == 0
        assert same_bits(leaves[0].grad, leaves[1].grad)
        state = snapshot(plain)
        assert all(same_bits(value, state[name]) for name, value in saving.state_dict().items())


def test_checkpointing():
    """Recomputation is refused; the selective policy of a layer without a group keeps this one's output, too."""
    run_ranks(2, checkpoints)


def operators() -> None:
    layer = momentum_bn.MomentumBatchNorm2d(3, process_group=world())
    x = mine(randn(6, 3, 4, 5, dtype=torch.float32), [4, 2]).requires_grad_()
    rows = torch.cat([torch.zeros(2, 3), torch.ones(2, 3), torch.full((2, 1), 40.0)], 1).double()
    words = (1e-5, None, 10, 2, "cosine", "published", True, "relu")
    operator = torch.ops.momentum_bn._forward_train.default
    torch.library.opcheck(operator, (x, None, layer.weight, layer.bias, list(layer.buffers()), *words, world(), None))
    torch.library.opcheck(operator, (x, None, layer.weight, layer.bias, list(layer.buffers()), *words, None, rows))
    in_place = torch.ops.momentum_bn._forward_train_.default
    torch.library.opcheck(in_place, (x.detach(), None, None, None, list(layer.buffers()), *words, world(), None))
    torch.library.opcheck(torch.ops.momentum_bn._group_statistics.default, (x, world()))
    with pytest.raises(ValueError, match="group_statistics"):
        operator(x, None, None, None, [], *words, None, rows[:, 1:])
    meta = momentum_bn.MomentumBatchNorm2d(3, process_group=world(), device="meta")
    assert meta(torch.empty(1, 3, 1, 1, device="meta")).shape == (1, 3, 1, 1)


def test_opcheck():
    run_ranks(2, operators)
