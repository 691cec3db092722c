"""torch.compile: one graph, no recompilation as the schedule moves, no copies, the same state and results."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.testing import assert_close

import momentum_bn
from inputs import randn
from momentum_bn.functional import momentum_batch_norm
from snapshots import OWN_STATE, snapshot, unchanged


@pytest.fixture(autouse=True)
def _no_graphs_from_before() -> None:
    torch._dynamo.reset()


@pytest.fixture
def no_recompilation():
    """A second graph for what was compiled once is an error."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), momentum_bn.MomentumBatchNorm2d(4, total_iters=6, activation="relu"),
        nn.Flatten(), nn.Linear(100, 5), momentum_bn.MomentumBatchNorm1d(5, total_iters=6),
    )  # fmt: skip


class Block(nn.Module):
    """A residual block, whose layers may work in place."""

    def __init__(self, inplace=False):
        super().__init__()
        options = {"activation": "relu", "inplace": inplace, "total_iters": 4, "views_per_update": 1}
        self.conv1, self.conv2 = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (momentum_bn.MomentumBatchNorm2d(4, **options) for _ in range(2))

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), x)


def images(batch=4, seed=0):
    return randn(batch, 3, 7, 7, seed=seed, dtype=torch.float32)


def assert_same_state(actual, expected):
    """Schedule and counters to the bit; statistics and parameters up to what the convolutions round."""
    for name, value in expected.state_dict().items():
        now = actual.state_dict()[name]
        if (name.rsplit(".")[-1] in OWN_STATE and not value.is_floating_point()) or name.endswith("momentum_state"):
            assert torch.equal(now, value), name
        assert_close(now, value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("no_recompilation")
def test_training_steps(backend):
    """Twelve steps of three forwards each, in and out of the half-done pair, over the whole schedule and past it."""
    eager, compiled = network(), network()
    forward = torch.compile(compiled, backend=backend, fullgraph=True)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.002) for net in (eager, compiled)]
    for step in range(12):
        losses = []
        for call, optimizer in zip((eager, forward), optimizers, strict=True):
            loss = sum((call(images(seed=10 * step + view)) - 0.5).square().mean() for view in range(3))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert losses[0].isfinite()
        assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    assert eager[1].cur_iter == 18 and eager[1].momentum == 0.0
    assert_same_state(compiled, eager)


@pytest.mark.usefixtures("no_recompilation")
def test_teacher_without_gradient():
    eager, compiled = network().requires_grad_(False), network().requires_grad_(False)
    forward = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for step in range(5):
            x = images(seed=step)
            assert_close(forward(x), eager(x), rtol=1e-5, atol=1e-5)
    assert_same_state(compiled, eager)


@pytest.mark.usefixtures("no_recompilation")
def test_dynamic_batch():
    """One graph for batches of any size, in training and in evaluation."""
    eager, compiled = network(), network()
    for training in (True, False):
        eager.train(training), compiled.train(training)
        torch._dynamo.reset()
        forward = torch.compile(compiled, backend="aot_eager", fullgraph=True, dynamic=True)
        for step, batch in enumerate((4, 9, 2, 6)):
            x = images(batch, step)
            expected, actual = eager(x), forward(x)
            assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            expected.sum().backward(), actual.sum().backward()
    assert_same_state(compiled, eager)


@pytest.mark.usefixtures("no_recompilation")
def test_evaluation():
    net = network()
    for step in range(4):
        net(images(seed=step))
    net.eval()
    forward = torch.compile(net, backend="aot_eager", fullgraph=True)
    with unchanged(net):
        for step in range(3):
            x = images(seed=step).requires_grad_()
            assert_close(forward(x), net(x), rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                before = net(x)
        assert_close(before, net(x))


@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("no_recompilation")
def test_in_place_residual_block(training, with_gradient):
    """The flag never changes a result; an input that belongs to the caller is never overwritten."""
    eager = Block().requires_grad_(with_gradient).train(training)
    compiled = Block(inplace=True).requires_grad_(with_gradient).train(training)
    compiled.load_state_dict(eager.state_dict())
    forward = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for step in range(5):
        x = randn(2, 4, 5, 5, seed=step, dtype=torch.float32)
        kept = x.clone()
        with torch.set_grad_enabled(with_gradient):
            assert_close(forward(x), eager(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(x, kept)
    assert_same_state(compiled, eager)


def test_in_place_on_the_callers_input():
    """Where the compiled function is the layer itself, the caller's tensor holds the output, as in eager mode."""
    eager, compiled = (momentum_bn.MomentumBatchNorm1d(3, inplace=True) for _ in range(2))
    forward = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        x, y = (randn(4, 3, dtype=torch.float32) for _ in range(2))
        assert_close(forward(x), eager(y))
        assert_close(x, y)
        assert_same_state(compiled, eager)
        compiled.eval()
        kept = x.clone()
        assert_close(forward(x), eager.eval()(y))
        assert torch.equal(x, kept), "a compiled evaluation takes no memory"


def test_double_backward_is_refused_by_torch():
    forward = torch.compile(momentum_bn.MomentumBatchNorm1d(3), backend="aot_eager", fullgraph=True)
    x = torch.rand(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(forward(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("activation", [None, "relu"])
def test_no_copies_of_channels_last(activation):
    """Inductor hands a convolution's output to the layer, and the layer's on, without changing their layout."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), momentum_bn.MomentumBatchNorm2d(8, activation=activation), nn.Conv2d(8, 4, 3)
    ).to(memory_format=torch.channels_last)  # fmt: skip
    forward = torch.compile(net, fullgraph=True)

    def step(x):
        y = forward(x)
        y.backward(torch.ones_like(y))
        return y

    y, code = run_and_get_code(step, images().contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert len(code) == 2, "one graph forward, one backward"
    layer_calls = [line for text in code for line in text.splitlines() if " = torch.ops.momentum_bn." in line]
    assert len(layer_calls) == 2, layer_calls
    for text in code:
        for word in ("clone", "contiguous(", "empty_strided_cpu((4, 8, 5, 5), (200, 25, 5, 1)", "copy_("):
            assert word not in text, f"{word} in:\n{text}"


def test_assigned_total_iters_recompiles():
    m = momentum_bn.MomentumBatchNorm1d(3, total_iters=4, views_per_update=1)
    forward = torch.compile(m, backend="aot_eager", fullgraph=True)
    forward(torch.rand(4, 3))
    m.total_iters = 8
    forward(torch.rand(4, 3))
    eager = momentum_bn.MomentumBatchNorm1d(3, total_iters=8, views_per_update=1)
    eager(torch.rand(4, 3)), eager(torch.rand(4, 3))
    assert m.momentum == eager.momentum


@pytest.mark.usefixtures("no_recompilation")
def test_assigned_momentum_and_cur_iter_do_not_recompile():
    m, eager = (momentum_bn.MomentumBatchNorm1d(3, total_iters=9, views_per_update=1) for _ in range(2))
    forward = torch.compile(m, backend="aot_eager", fullgraph=True)
    x = randn(4, 3, dtype=torch.float32)
    for call, layer in ((forward, m), (eager, eager)):
        call(x)
        layer.cur_iter, layer.momentum = 5, 0.25
        call(x)
        layer.momentum = None
        call(x)
    assert_same_state(m, eager)
    assert m.momentum is None and m.cur_iter == 7


@pytest.mark.usefixtures("no_recompilation")
def test_transforms_of_the_layer_and_the_function():
    """torch.func inside a compiled function: the state moves there, too."""
    compiled, eager = (momentum_bn.MomentumBatchNorm1d(3, total_iters=4, views_per_update=1) for _ in range(2))

    def gradient(m, x):
        loss = lambda p: torch.func.functional_call(m, p, (x,)).sin().sum()  # noqa: E731
        return torch.func.grad(loss)(dict(m.named_parameters()))

    run = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    for step in range(6):
        x = randn(4, 3, seed=step, dtype=torch.float32)
        assert_close(run(compiled, x), gradient(eager, x))
    assert_same_state(compiled, eager)

    def mapped(xs):
        return torch.func.vmap(lambda x: momentum_batch_norm(x, None, None, training=True))(xs)

    xs = randn(5, 4, 3, dtype=torch.float32)
    assert_close(torch.compile(mapped, backend="aot_eager", fullgraph=True)(xs), mapped(xs))


def test_autocast():
    eager, compiled = network(), network()
    forward = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for step in range(2):
        x = images(seed=step)
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = forward(x), eager(x)
        assert actual.dtype == expected.dtype
        assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert compiled[1].cur_iter == eager[1].cur_iter == 1


def test_errors_reach_the_caller():
    m = momentum_bn.MomentumBatchNorm1d(3)
    forward = torch.compile(m, backend="aot_eager")
    with unchanged(m):
        for bad in (torch.rand(1, 3), torch.rand(4, 2), torch.rand(4, 3, 2, 2)):
            with pytest.raises(Exception, match=r"Expected more than 1 value|channels|expected 2D or 3D"):
                forward(bad)


def test_compiled_module_is_copied_with_its_state():
    m = momentum_bn.MomentumBatchNorm1d(3)
    torch.compile(m, backend="aot_eager", fullgraph=True)(torch.rand(4, 3))
    assert snapshot(copy.deepcopy(m)).keys() == snapshot(m).keys()
    assert int(copy.deepcopy(m).view_count) == 1
