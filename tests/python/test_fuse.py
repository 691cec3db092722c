"""Fused networks: what is fused, that nobody can tell, and what is left alone."""

from __future__ import annotations

import copy
import gc
import inspect
import operator
import pickle
import random
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import momentum_bn
from momentum_bn import MomentumBatchNorm2d, _norm_layer, fuse, fused_layers, unfuse
from momentum_bn.fuse import fuse_parts
from snapshots import assert_same, snapshot

pytestmark = pytest.mark.cpu_only

Forward = Callable[[Any, Tensor], Any]


def norm(**options: Any) -> MomentumBatchNorm2d:
    return MomentumBatchNorm2d(4, total_iters=10, views_per_update=1, **options)


class Net(nn.Module):
    """Layers to write a forward with."""

    of_the_class = 1.0

    def method(self, x: Tensor) -> Tensor:
        return x

    def __init__(self, forward: Forward | None = None, layer: Callable[[], nn.Module] = norm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bn, self.bn2 = layer(), layer()
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.identity, self.pool = nn.Identity(), nn.AvgPool2d(1)
        self.unknown = Unknown()
        self.weight = nn.Parameter(torch.randn(4, 4, 5, 5))
        self.generator = random.Random(0)
        self.written = forward

    def forward(self, x: Tensor) -> Any:
        return self.written(self, x)


class Unknown(nn.Module):
    """Returns its argument and remembers it."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        return x


class Bottleneck(nn.Module):
    def __init__(self, channels_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or channels_in != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """As torchvision writes it."""

    def __init__(self, blocks: tuple[int, ...] = (2, 1), width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        layers, channels = [], width
        for stage, count in enumerate(blocks):
            for block in range(count):
                layers.append(Bottleneck(channels, width << stage, 2 if stage and not block else 1))
                channels = 4 * (width << stage)
        self.layers = nn.Sequential(*layers)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layers(x)), 1))


def resnet() -> nn.Module:
    return momentum_bn.convert_momentum_batchnorm(ResNet().double(), total_iters=10)


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def small() -> Tensor:
    return torch.randn(4, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_nobody_can_tell(written: nn.Module, fused: nn.Module, x: Tensor, calls: int = 2) -> None:
    """Both networks give the same in all modes, outputs, gradients, state, and leave the same in the input."""
    for training in (True, False):
        for with_grad in (False, True):
            for _ in range(calls):
                results = [_everything(net.train(training), x, with_grad) for net in (written, fused)]
                for ours, theirs in zip(*results, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def _everything(net: nn.Module, x: Tensor, with_grad: bool) -> list[Any]:
    leaf = x.clone().requires_grad_(with_grad)
    given = leaf * 1
    net.zero_grad()
    torch.manual_seed(2)
    with torch.set_grad_enabled(with_grad):
        outputs = net(given)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if with_grad:
        sum(output.square().sum() for output in outputs).backward()
    gradients = [leaf.grad, *(parameter.grad for parameter in net.parameters())]
    kept = [module.kept.detach() for module in net.modules() if isinstance(getattr(module, "kept", None), Tensor)]
    found = [*outputs, given, *gradients, *kept, *net.buffers()]
    return [value.detach().clone() if isinstance(value, Tensor) else value for value in found]


# The layers whose statistics take no gradient, and those whose do.
LAYERS: list[Callable[[], nn.Module]] = [
    norm,
    lambda: norm(detach_statistics=False),
    lambda: momentum_bn.BatchNorm2d(4),
]


def fused_and_written(forward: Forward, layer: Callable[[], nn.Module] = norm) -> tuple[nn.Module, nn.Module]:
    written = Net(forward, layer).double()
    return fuse(copy.deepcopy(written)), written


def check(forward: Forward, **expected: str) -> None:
    """The forward is fused as expected, and nobody can tell."""
    for layer in LAYERS:
        fused, written = fused_and_written(forward, layer)
        assert fused_layers(fused) == expected
        assert_nobody_can_tell(written, fused, small())


# What is fused.


@pytest.mark.parametrize("layer", ["momentum", "batch"])
def test_resnet(layer: str) -> None:
    written = resnet() if layer == "momentum" else momentum_bn.convert_batchnorm(ResNet().double())
    fused = fuse(copy.deepcopy(written))
    words = fused_layers(fused)
    assert Counter(words.values()) == {"relu": 7, "add_relu": 3, "in place": 2}
    assert words["bn1"] == words["layers.0.bn1"] == "relu"
    # Whichever of the two sums that are added is made last adds the other.
    assert (words["layers.0.bn3"], words["layers.0.downsample.1"]) == ("in place", "add_relu")
    assert words["layers.1.bn3"] == "add_relu"
    assert_nobody_can_tell(written, fused, images())


@pytest.mark.parametrize(
    "relu",
    [
        lambda net, y: net.relu(y),
        lambda net, y: net.relu_(y),
        lambda net, y: F.relu(y),
        lambda net, y: F.relu(y, True),
        lambda net, y: F.relu(y, inplace=True),
        lambda net, y: F.relu_(y),
        lambda net, y: torch.relu(y),
        lambda net, y: torch.relu_(y),
        lambda net, y: y.relu(),
        lambda net, y: y.relu_(),
        lambda net, y: net.relu_(net.identity(y)),
    ],
)
@pytest.mark.parametrize(
    "add",
    [
        None,
        lambda y, r: y + r,
        lambda y, r: r + y,
        operator.iadd,
        torch.add,
        lambda y, r: torch.add(y, other=r),
        lambda y, r: torch.add(input=y, other=r),
        lambda y, r: y.add(r),
        lambda y, r: y.add_(r),
        lambda y, r: r.add(y),
    ],
)
def test_every_form_of_relu_and_addition(
    relu: Callable[[Any, Tensor], Tensor], add: Callable[[Tensor, Tensor], Tensor] | None
) -> None:
    if add is None:
        check(lambda net, x: relu(net, net.bn(net.conv(x))), bn="relu")
    else:
        check(lambda net, x: relu(net, add(net.bn(net.conv(x)), x)), bn="add_relu")


def test_the_addition_may_come_before_the_residual_is_made() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.bn(net.conv(x))
        return net.relu(y + net.pool(net.conv2(x)))

    check(forward, bn="add_relu")


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: (lambda y: (net.relu(y), y))(net.bn(net.conv(x))),
        lambda net, x: (lambda y: net.relu(y) + y)(net.bn(net.conv(x))),
        lambda net, x: (lambda y: net.relu(y + y))(net.bn(net.conv(x))),
        lambda net, x: net.relu(torch.add(net.bn(net.conv(x)), x, alpha=2)),
        lambda net, x: net.relu(net.bn(net.conv(x)) + 1.0),
        lambda net, x: net.relu(net.bn(net.conv(x)) * x),
        lambda net, x: net.bn(net.conv(x)) + x,
        lambda net, x: F.leaky_relu(net.bn(net.conv(x))),
        lambda net, x: net.unknown(net.bn(net.conv(x))),
        lambda net, x: F.relu6(net.bn(net.conv(x))),
    ],
)
def test_nothing_else_is_fused_but_memory(forward: Forward) -> None:
    check(forward, bn="in place")


@pytest.mark.parametrize(
    "residual",
    [
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: x[:1],
        lambda x: x.float(),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.mean(),
    ],
)
def test_an_addition_that_broadcasts_or_promotes_is_done_as_written(residual: Callable[[Tensor], Tensor]) -> None:
    check(lambda net, x: net.relu(net.bn(net.conv(x)) + residual(x)), bn="add_relu")
    check(lambda net, x: net.relu_(net.bn(net.conv(x)).add_(residual(x))), bn="add_relu")


def test_a_layer_with_a_relu_of_its_own_takes_no_other() -> None:
    written = Net(lambda net, x: net.relu(net.bn(net.conv(x)) + x)).double()
    written.bn.activation = "relu"
    fused = fuse(copy.deepcopy(written))
    assert fused_layers(fused) == {"bn": "in place"}
    assert_nobody_can_tell(written, fused, small())


def test_a_layer_that_is_called_in_several_places() -> None:
    check(
        lambda net, x: net.bn(net.conv(net.relu(net.bn(net.conv(net.relu(net.bn(net.conv(x)) + x)))))),
        bn="add_relu, relu, in place",
    )


def test_a_layer_that_is_promised_its_input() -> None:
    written = momentum_bn.convert_momentum_batchnorm(ResNet().double(), total_iters=10, inplace=True)
    fused = fuse(copy.deepcopy(written))
    assert Counter(fused_layers(fused).values()) == {"relu": 7, "add_relu": 3, "in place": 2}
    assert_nobody_can_tell(written, fused, images())


def test_state_that_the_forward_reads_between_the_layer_and_the_addition() -> None:
    def reads(net: Any, x: Tensor) -> Any:
        y = net.bn(net.conv(x))
        mean = net.bn.running_mean.clone()
        return net.relu(y + net.pool(net.conv2(x))), mean

    check(reads, bn="in place")

    def writes(net: Any, x: Tensor) -> Any:
        y = net.bn(net.conv(x))
        if net.training:  # in evaluation autograd would refuse this
            net.bn.running_var.mul_(2)
        return net.relu(y + net.pool(net.conv2(x)))

    check(writes, bn="in place")


# Memory.


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of the inputs that layers overwrote."""
    found: list[int] = []
    in_place = _norm_layer._forward_train_

    def train_(x: Tensor, *args: Any) -> Any:
        found.append(x.data_ptr())
        return in_place(x, *args)

    monkeypatch.setattr(_norm_layer, "_forward_train_", train_)
    return found


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.bn(net.conv(x)),
        lambda net, x: net.bn(net.conv(x) + x),
        lambda net, x: net.bn(torch.cat([x[:, :2], x[:, 2:]], 1)),
        lambda net, x: net.bn(F.relu(net.conv(x), inplace=True)),
        lambda net, x: net.bn(F.max_pool2d(x, 1)),
        lambda net, x: net.bn(x * x),
        lambda net, x: net.bn(net.identity(net.conv(x))),
        lambda net, x: (lambda y: net.bn(y) * y.shape[0])(net.conv(x)),
        lambda net, x: (lambda y: (y.mean(), net.bn(y)))(net.conv(x)),
    ],
)
def test_memory_that_nobody_reads_again_is_taken(forward: Forward, taken: list[int]) -> None:
    fused, written = fused_and_written(forward)
    with torch.no_grad():
        fused(small())
        assert len(taken) == 1
        taken.clear()
        written(small())
    assert not taken
    assert_nobody_can_tell(written, fused, small())


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.bn(x),
        lambda net, x: net.bn(x.view(x.shape)),
        lambda net, x: net.bn(net.weight),
        lambda net, x: net.bn(net.unknown(net.conv(x))),
        lambda net, x: (lambda y: (net.unknown(y), net.bn(y))[1])(net.conv(x)),
        lambda net, x: (lambda y: (net.bn(y), y))(net.conv(x)),
        lambda net, x: (lambda y: net.bn(y) + y)(net.conv(x)),
        lambda net, x: (lambda y: net.relu(net.bn(y) + y))(net.conv(x)),
        lambda net, x: (lambda y, v: net.bn(y) + v)(*(lambda y: (y, y.flatten(1).view(y.shape)))(net.conv(x))),
        lambda net, x: (lambda y, v: (net.bn(y), v))(*(lambda y: (y, y[:, :1]))(net.conv(x))),
        lambda net, x: (lambda y, parts: net.bn(y) + torch.cat(parts, 1))(*(lambda y: (y, y.chunk(2, 1)))(net.conv(x))),
        lambda net, x: net.bn(net.conv(x).transpose(2, 3)),
        lambda net, x: net.bn(net.conv(x)[:, :4]),
        lambda net, x: net.bn(net.conv(x).detach()),
        lambda net, x: net.bn(F.dropout(net.conv(x), 0.5, net.training)),
        lambda net, x: net.bn(net.conv(x).to(torch.float64)),
        lambda net, x: net.bn(operator.iadd(x, 1.0)),
    ],
)
def test_memory_of_others_is_not_taken(forward: Forward, taken: list[int]) -> None:
    fused, written = fused_and_written(forward)
    with torch.no_grad():
        for net in (fused, written):
            torch.manual_seed(0)
            net(small())
    assert not taken
    assert_nobody_can_tell(written, fused, small())


@pytest.mark.parametrize("make", LAYERS)
def test_memory_under_autograd(taken: list[int], make: Callable[[], nn.Module]) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        # What the sigmoid returned its gradient needs again; what a convolution returned nobody does.
        return net.bn2(torch.sigmoid(net.bn(net.conv(x))))

    fused, written = fused_and_written(forward, make)
    assert fused_layers(fused) == {"bn": "in place", "bn2": "in place"}
    fused(small())
    assert not taken  # the gradients of weights need the inputs
    written(small())
    for net in (fused, written):
        for layer in (net.bn, net.bn2):
            layer.requires_grad_(False)
    fused(small())
    # Where the statistics take a gradient, it needs the input for that.
    assert len(taken) == (make is norm)
    written(small())
    assert_nobody_can_tell(written, fused, small())


def test_pre_activation() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.conv(x)
        for _ in range(2):
            x = x + net.conv2(F.relu(net.bn2(net.conv(F.relu(net.bn(x))))))
        return F.relu(net.bn(x))

    check(forward, bn="relu", bn2="relu")


def test_concatenations() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norms = nn.ModuleList(MomentumBatchNorm2d(4 * (i + 1), total_iters=10) for i in range(3))
            self.convs = nn.ModuleList(nn.Conv2d(4 * (i + 1), 4, 3, padding=1) for i in range(3))
            self.last = MomentumBatchNorm2d(16, total_iters=10)

        def forward(self, x: Tensor) -> Tensor:
            features = [x]
            for layer, conv in zip(self.norms, self.convs, strict=True):
                features.append(conv(F.relu(layer(torch.cat(features, 1)), inplace=True)))
            return F.relu(self.last(torch.cat(features, 1)))

    written = Dense().double()
    fused = fuse(copy.deepcopy(written))
    assert fused_layers(fused) == dict.fromkeys(["norms.0", "norms.1", "norms.2", "last"], "relu")
    assert_nobody_can_tell(written, fused, small())


def test_squeeze_and_excitation() -> None:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.reduce, self.expand = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)), inplace=True)))

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.se(F.silu(net.bn(net.conv(x)), inplace=True))
        return net.bn2(net.conv2(y)) + x

    written = Net(forward)
    written.se = Squeeze()
    written.double()
    fused = fuse(copy.deepcopy(written))
    assert fused_layers(fused) == {"bn": "in place", "bn2": "in place"}
    assert_nobody_can_tell(written, fused, small())


def test_operations_in_place_on_what_others_read() -> None:
    def residual_is_written(net: Any, x: Tensor) -> Any:
        shortcut = net.conv2(x)
        view = shortcut[:, :2]
        shortcut += net.bn(net.conv(x))
        return net.relu(shortcut), view

    check(residual_is_written, bn="in place")

    def input_is_written(net: Any, x: Tensor) -> Tensor:
        x += net.bn(net.conv(x))
        return net.relu(x)

    fused, written = fused_and_written(input_is_written)
    assert fused_layers(fused) == {"bn": "in place"}
    inputs = [small(), small()]
    with torch.no_grad():
        torch.testing.assert_close(fused(inputs[0]), written(inputs[1]))
    torch.testing.assert_close(*inputs)

    def view_of_the_input_is_written(net: Any, x: Tensor) -> Tensor:
        y = net.conv(x)
        view = y[:, 1:]
        view *= 2
        y[:, 0] = 1
        return net.relu(net.bn(y))

    fused, written = fused_and_written(view_of_the_input_is_written)
    assert_nobody_can_tell(written, fused, small())

    def residual_is_written_in_between(net: Any, x: Tensor) -> Tensor:
        residual = net.conv2(x)
        y = net.bn(net.conv(x))
        residual.mul_(2)
        return net.relu(y + residual)

    check(residual_is_written_in_between, bn="in place")


def test_fresh_memory_is_fresh() -> None:
    """Everything that counts as making memory of its own does, also where there is nothing to do."""
    from momentum_bn import _effects

    x = torch.randn(2, 4, 4, 4)
    arguments: dict[Any, tuple[Any, ...]] = {
        **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), (4, 4, 1)),
        **dict.fromkeys((nn.AvgPool2d, nn.MaxPool2d), (1,)),
        **dict.fromkeys((nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), (4,)),
        **dict.fromkeys((nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d), (0,)),
        nn.ConstantPad2d: (0, 0.0), nn.BatchNorm2d: (4,), nn.GroupNorm: (2, 4), nn.LayerNorm: (4,), nn.Linear: (4, 4),
        nn.Upsample: (None, 1), nn.UpsamplingNearest2d: (None, 1), nn.UpsamplingBilinear2d: (None, 1),
        nn.Softmax: (1,), nn.LogSoftmax: (1,),
    }  # fmt: skip
    for kind in _effects._FRESH_MODULES:
        if kind.__name__[-2:] in ("1d", "3d"):
            continue  # as 2d
        module = kind(*arguments.get(kind, ())).eval()
        assert module(x).untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), kind
    scale = (x.abs() + 1).requires_grad_(False)
    for function in _effects._FRESH_FUNCTIONS | _effects._FRESH_OPERATORS:
        name = function.__name__
        result = _called(function, name, scale)
        assert result.untyped_storage().data_ptr() != scale.untyped_storage().data_ptr(), name
    for name in _effects._FRESH_METHODS:
        result = _called(getattr(torch.Tensor, name), name, scale)
        assert result.untyped_storage().data_ptr() != scale.untyped_storage().data_ptr(), name


def _called(function: Any, name: str, x: Tensor) -> Tensor:
    """The function called on x with arguments that leave it next to nothing to do."""
    if name in ("where", "masked_fill"):
        return function(x, x > 1e9, 0.0)
    image = torch.randn(4, 4, 1, 1)
    tries: list[Callable[[], Any]] = [
        *([lambda: function(x, 0)] if name in ("softmax", "log_softmax", "logsumexp") else []),
        *([lambda: function(x, 1, 1, 1, 1)] if name == "repeat" else []),
        *([lambda: function(x, x.shape)] if name in ("new_empty", "new_zeros", "new_ones") else []),
        *([lambda: function(x, x.shape, 1.0)] if name == "new_full" else []),
        *([lambda: function(x, 1)] if "pow" in name or "mul" in name or "div" in name else []),
        *([lambda: function(x, 0)] if "add" in name or "sub" in name else []),
        *([lambda: function([x])] if name in ("cat", "concat", "concatenate", "stack") else []),
        *([lambda: function(x, -1e9)] if name in ("clamp", "clamp_min") else []),
        *([lambda: function(x, 1e9)] if name == "clamp_max" else []),
        *([lambda: function(x, (0, 0))] if name == "pad" else []),
        *([lambda: function(x, scale_factor=1)] if name in ("interpolate", "upsample") else []),
        *([lambda: function(x, None, None, training=True)] if function is F.batch_norm else []),
        *(
            [lambda: function(x, None, None, None, None, True, 0.1, 1e-5, False)]
            if function is torch.batch_norm
            else []
        ),
        *([lambda: function(x, 2)] if name == "group_norm" else []),
        *([lambda: function(x, [4])] if name == "layer_norm" else []),
        *([lambda: function(x, torch.ones(1))] if name == "prelu" else []),
        *([lambda: function(x, image)] if "conv" in name and "2d" in name else []),
        *([lambda: function(x, torch.eye(4))] if name in ("linear", "matmul") else []),
        *([lambda: function(x[0], x[0], x[0])] if name == "baddbmm" else []),
        *([lambda: function(x[0], x[0])] if name == "bmm" else []),
        *([lambda: function(x[0, 0], x[0, 0], x[0, 0])] if name == "addmm" else []),
        *([lambda: function(x[0, 0], x[0, 0])] if name == "mm" else []),
        *([lambda: function(x > 0, x > 0)] if name in ("and_", "or_") else []),
        *([lambda: function(x > 0)] if name == "invert" else []),
        *([lambda: function(x[:, 0], 1)] if "1d" in name and "pool" in name else []),
        *([lambda: function(x[:, None], 1)] if "3d" in name and "pool" in name else []),
        *([lambda: function(x, 1)] if "pool2d" in name and "adaptive" not in name else []),
        *([lambda: function(x, 4)] if "adaptive" in name else []),
        *([lambda: function(x[:, 0], image[:, :, 0])] if "conv" in name and "1d" in name else []),
        *([lambda: function(x[:, :, None], image[:, :, None])] if "conv" in name and "3d" in name else []),
        lambda: function(x),
        lambda: function(x, x),
    ]
    errors = []
    for attempt in tries:
        try:
            result = attempt()
        except (TypeError, RuntimeError, IndexError) as error:
            errors.append(error)
        else:
            assert isinstance(result, Tensor), name
            return result
    raise AssertionError(f"{name}: {errors}")


# What stays.


def test_the_network_stays_what_it_is() -> None:
    net = resnet()
    before, kind, names = snapshot(net), type(net), [name for name, _ in net.named_modules()]
    parameters, signature = list(net.parameters()), inspect.signature(net.forward)
    assert fuse(net) is net
    assert fuse(net) is net
    assert type(net) is kind and [name for name, _ in net.named_modules()] == names
    assert all(ours is theirs for ours, theirs in zip(net.parameters(), parameters, strict=True))
    assert inspect.signature(net.forward) == signature
    assert_same(snapshot(net), before)
    assert unfuse(net) is net
    assert net.forward == type(net).forward.__get__(net)
    assert fused_layers(net) == {}


def test_hooks_of_the_network_itself() -> None:
    net = fuse(resnet())
    seen: list[Any] = []
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape) or (args[0] * 2,))
    net.register_forward_hook(lambda module, args, output: seen.append(output.shape) or output + 1)
    written = resnet()
    torch.testing.assert_close(net(images()), written(images() * 2) + 1)
    assert len(seen) == 2 and fused_layers(net)


@pytest.mark.parametrize("move", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_fused_and_their_own(move: Callable[[nn.Module], nn.Module]) -> None:
    net = fuse(resnet())
    net(images())
    moved = move(net)
    assert fused_layers(moved) == fused_layers(net)
    before = snapshot(net)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.5)
    written = unfuse(copy.deepcopy(moved))
    torch.testing.assert_close(moved(images()), written(images()))
    assert_same(snapshot(net), before)
    # Also as a part of something else.
    whole = move(nn.ModuleDict({"net": net}))
    assert fused_layers(whole) == {f"net.{name}": word for name, word in fused_layers(net).items()}
    assert vars(whole["net"])["forward"]._network() is whole["net"]


def test_shallow_copies_and_replicas_run_themselves() -> None:
    net = fuse(resnet())
    replica = net._replicate_for_data_parallel()
    replica._modules["fc"] = nn.Linear(32, 3).double()
    assert replica(images()).shape == (2, 3)
    assert net(images()).shape == (2, 5)


def test_a_fused_network_is_freed_with_its_last_reference() -> None:
    net = fuse(resnet())
    net(images())
    gone = weakref.ref(net)
    gc.collect()
    gc.disable()
    try:
        del net
        assert gone() is None
    finally:
        gc.enable()


def test_a_submodule_called_by_itself_runs_as_written() -> None:
    net = fuse(resnet())
    block = net.layers[1]
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    bn = block.bn3(x)
    assert (bn < 0).any()
    assert fused_layers(block) == {}


def test_convert_revert_casts_and_state_dicts() -> None:
    net = fuse(resnet())
    words = fused_layers(net)
    net.load_state_dict(resnet().state_dict())
    net.float()
    assert net(images().float()).dtype == torch.float32
    assert fused_layers(net) == words
    momentum_bn.revert_momentum_batchnorm(net)
    assert fused_layers(net) == {}
    plain = ResNet().float()
    plain.load_state_dict(net.state_dict())
    torch.testing.assert_close(net(images().float()), plain(images().float()))
    momentum_bn.convert_momentum_batchnorm(net, total_iters=10)
    assert fused_layers(net) == words


def test_threads() -> None:
    net = fuse(resnet()).eval()
    written = unfuse(copy.deepcopy(net))
    inputs = [images() * (i + 1) for i in range(8)]
    expected = [written(x) for x in inputs]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = net(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, y in enumerate(expected):
        torch.testing.assert_close(found[i], y)


# What changes after the trace.


def test_hooks_see_what_they_would_see() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.relu_(net.bn2(net.conv2(net.relu_(net.bn(net.conv(x))))))

    for name in ("conv", "bn", "relu_", "conv2"):
        fused, written = fused_and_written(forward)
        assert fused_layers(fused) == {"bn": "relu", "bn2": "relu"}
        fused(small())
        written(small())
        seen: list[Any] = []
        handles = []
        for net in (fused, written):
            handles.append(
                net.get_submodule(name).register_forward_hook(
                    lambda module, args, output, seen=seen: seen.append(
                        (args[0], output, args[0].clone(), output.clone())
                    )
                )
            )
        assert (Counter(fused_layers(fused).values())["relu"] == 2) is name.startswith("conv")
        with torch.no_grad():
            torch.testing.assert_close(fused(small()), written(small()))
        for ours, theirs in zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True):
            torch.testing.assert_close(ours, theirs)  # what it saw, and what became of that
        for handle in handles:
            handle.remove()
        assert fused_layers(fused) == {"bn": "relu", "bn2": "relu"}
        assert_nobody_can_tell(written, fused, small())


@pytest.mark.parametrize("kind", ["forward_pre", "full_backward", "full_backward_pre"])
def test_other_hooks_on_a_block(kind: str) -> None:
    net, written = fuse(resnet()), resnet()
    words = fused_layers(net)
    calls: list[str] = []
    for each in (net, written):
        hook = getattr(each.layers[1], f"register_{kind}_hook")
        hook(lambda *args: calls.append("called"))
        for leaf in each.parameters():
            leaf.grad = None
        each(images()).sum().backward()
    assert len(calls) == 2
    inside = {name for name in words if name.startswith("layers.1.")}
    assert fused_layers(net).keys() == words.keys() - inside
    for ours, theirs in zip(net.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_hooks_of_all_modules() -> None:
    net = fuse(resnet())
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(type(module).__name__)
    )
    try:
        net(images())
    finally:
        handle.remove()
    assert seen.count("MomentumBatchNorm2d") == 12 and seen.count("Bottleneck") == 3


def test_replaced_modules_are_noticed() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.relu(net.bn(net.conv(x)))

    fused, written = fused_and_written(forward)
    for name, replacement, word in (
        ("relu", nn.GELU(), "in place"),
        ("relu", nn.ReLU(), "relu"),
        ("conv", nn.Conv2d(4, 4, 1).double(), "relu"),
        ("bn", norm(momentum=0.3).double(), "relu"),
        ("conv", Unknown(), "relu"),
        ("bn", nn.BatchNorm2d(4).double(), None),
        ("bn", norm(activation="relu").double(), None),
    ):
        setattr(fused, name, copy.deepcopy(replacement))
        setattr(written, name, copy.deepcopy(replacement))
        assert fused_layers(fused) == ({} if word is None else {"bn": word})
        assert_nobody_can_tell(written, fused, small(), calls=1)


def test_attributes_that_the_forward_reads_are_noticed() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.method(net.conv(x) * getattr(net, "late", 1.0) * net.of_the_class)
        for layer in net.steps:
            x = layer(x)
        return F.relu(net.bn(x)) * net.scale if net.wide else F.relu(net.bn(x) + x)

    fused, written = fused_and_written(lambda net, x: net.bn(net.conv(x)))
    for net in (fused, written):
        net.written, net.steps, net.scale, net.wide = forward, [], 2.0, True
    for change in (
        lambda net: setattr(net, "scale", 3.0),
        lambda net: setattr(net, "wide", False),
        lambda net: net.steps.append(net.bn2),
        lambda net: setattr(net.bn, "activation", "relu"),
        lambda net: setattr(net.bn, "inplace", True),
        lambda net: setattr(net.bn, "total_iters", 5),
        lambda net: setattr(net.bn, "momentum", 0.5),
        lambda net: net.bn.eval(),
        lambda net: setattr(net, "late", 2.0),
        lambda net: setattr(net, "of_the_class", 3.0),
        lambda net: setattr(net, "method", torch.neg),
    ):
        for net in (fused, written):
            change(net)
        x = small()
        torch.testing.assert_close(fused(x), written(x))
        assert_nobody_can_tell(written, fused, small(), calls=1)


def test_train_and_eval_of_parts() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.bn(net.conv(x))
        return net.relu(y) if net.training else F.leaky_relu(net.bn2(y))

    fused, written = fused_and_written(forward)
    for training in (True, False, True, False):
        for net in (fused, written):
            net.train(training)
            net.bn2.train(not training)
        assert fused_layers(fused) == ({"bn": "relu"} if training else {"bn": "in place", "bn2": "in place"})
        torch.testing.assert_close(fused(small()), written(small()))
    assert vars(fused)["forward"]._traces == 2


def test_a_network_that_is_another_one_at_every_call_is_not_traced_for_ever() -> None:
    written = Net(lambda net, x: F.relu(net.bn(net.conv(x))) * net.scale).double()
    written.scale = 0.0
    fused = fuse(copy.deepcopy(written))
    for call in range(100):
        fused.scale = written.scale = call / 10
        torch.testing.assert_close(fused(small()), written(small()))
    assert vars(fused)["forward"]._traces <= 64


def test_parts_that_are_fused_already() -> None:
    written = resnet()
    net = copy.deepcopy(written)
    fuse(net.layers[0])
    assert fused_layers(net).keys() == {f"layers.0.{name}" for name in ("bn1", "bn2", "bn3", "downsample.1")}
    fuse(net)
    assert fused_layers(net) == fused_layers(fuse(copy.deepcopy(written)))
    assert_nobody_can_tell(written, net, images())
    unfuse(net.layers[0])
    assert_nobody_can_tell(written, net, images())
    assert fused_layers(unfuse(net)) == {}


# How a network is called.


def test_arguments() -> None:
    class Called(Net):
        def forward(  # type: ignore[override]
            self, x: Any, mask: Tensor | None = None, *, flag: bool = False, scale: float = 1.0, **more: Any
        ) -> Any:
            if not isinstance(x, Tensor) and isinstance(x, list | dict):
                return [self(part) for part in x] if flag else self.relu(self.bn(self.conv(x[0]))) + x[1]
            y = self.bn(self.conv(x))
            y = y + x if mask is None else y * mask
            return {"y": self.relu(y) * scale, **more} if flag else self.relu(y)

    torch.manual_seed(0)
    written = Called().double()
    fused = fuse(copy.deepcopy(written))
    x = small()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}),
        ((), {"x": x}),
        ((x, x > 0), {}),
        ((x,), {"mask": None, "flag": True}),
        ((x,), {"flag": True, "scale": 2.0}),
        ((x,), {"flag": True, "scale": 2, "a": x, "b": (1, [x, {"c": None}])}),
        (([x, x * 2],), {}),
        (([x, x],), {"flag": True}),
        ((x,), {"flag": True, "something": object}),
        ((nn.Parameter(x),), {}),
    ]
    for args, kwargs in calls * 2:
        ours, theirs = fused(*args, **kwargs), written(*args, **kwargs)
        assert type(ours) is type(theirs)
        if isinstance(theirs, dict):
            assert list(ours) == list(theirs)
            ours, theirs = ours["y"], theirs["y"]
        torch.testing.assert_close(ours, theirs)
        assert_same(snapshot(fused), snapshot(written))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        fused()


class Doubled(Tensor):
    """A tensor whose every operation does something else."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 2 if func is F.conv2d else result


def test_subclasses_of_tensor_run_as_written() -> None:
    fused, written = fused_and_written(lambda net, x: net.relu(net.bn(net.conv(x))))
    ours, theirs = (net(small().as_subclass(Doubled)) for net in (fused, written))
    assert type(ours) is type(theirs) is Doubled
    torch.testing.assert_close(ours, theirs)


def test_errors_are_the_layers() -> None:
    net = fuse(resnet())
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="expected input"):
        net(torch.randn(2, 5, 32, 32, dtype=torch.float64))
    assert_same(snapshot(net), before)
    fused, _ = fused_and_written(lambda net, x: net.relu(net.bn(F.adaptive_avg_pool2d(net.conv(x), 1))))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fused(small()[:1])


# Transforms and compilers run it as written.


def test_compiled() -> None:
    net, written = fuse(resnet()), resnet()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        torch.testing.assert_close(compiled.train(training)(images()), written.train(training)(images()))
        assert_same(snapshot(net), snapshot(written))


def test_exported_traced_and_transformed() -> None:
    net, written = fuse(resnet()).eval(), resnet().eval()
    x = images()
    expected = written(x)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(net, x)(x), expected)
    torch.testing.assert_close(torch.func.vmap(net)(x[:, None])[:, 0], expected)
    scaled = {name: parameter * 1.1 for name, parameter in net.named_parameters()}
    torch.testing.assert_close(*(torch.func.functional_call(each, scaled, (x,)) for each in (net, written)))
    tangents = [torch.func.jvp(each, (x,), (x,))[1] for each in (net, written)]
    torch.testing.assert_close(*tangents)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, MomentumBatchNorm2d) or super().is_leaf_module(m, name)

    outer = nn.Sequential(net, nn.ReLU())
    graph = torch.fx.GraphModule(outer, Tracer().trace(outer))
    torch.testing.assert_close(graph(x), expected.relu())
    assert sum(node.op == "call_module" for node in graph.graph.nodes) > 20


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_from_outside(use_reentrant: bool) -> None:
    grads = []
    for net in (fuse(resnet()).eval(), resnet().eval()):
        x = images().requires_grad_()
        checkpoint(net, x, use_reentrant=use_reentrant).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match="checkpoint"):
        checkpoint(fuse(resnet()), images().requires_grad_(), use_reentrant=use_reentrant).sum().backward()


def test_autocast() -> None:
    net, written = fuse(resnet().float()), resnet().float()
    x = images().float()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            ours, theirs = net(x), written(x)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net, written = fuse(resnet()), resnet()
        wrapped = nn.parallel.DistributedDataParallel(net)
        with pytest.raises(ValueError, match=r"DistributedDataParallel\(fuse\(network\)\)"):
            fuse(wrapped)
        for each in (wrapped, written):
            each(images()).sum().backward()
        for ours, theirs in zip(net.parameters(), written.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_the_order_of_collectives_stays() -> None:
    """A layer in a group is not moved past another one: a rank that runs as written gathers in the written order."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.bn(net.conv(x))
        return net.relu(y + net.pool(net.bn2(net.conv2(x))))

    net = Net(forward).double()
    assert fused_layers(fuse(net)) == {"bn": "add_relu", "bn2": "in place"}
    unfuse(net)
    net.bn._process_group = net.bn2._process_group = "some group"
    assert fused_layers(fuse(net)) == {"bn": "in place", "bn2": "in place"}


# What cannot be traced.


class Negated(torch.autograd.Function):
    """Its gradient is not that of its operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = norm()
        self.hidden = [norm()]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.bn(x))


def _counts(net: Any, x: Tensor) -> Tensor:
    net.calls = getattr(net, "calls", 0) + 1
    return net.bn(x)


def _keeps(net: Any, x: Tensor) -> Tensor:
    net.features = net.bn(x)
    return net.features


KEPT: list[Any] = []


def _no_grad(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = net.bn(net.conv(x))
    return net.conv2(x)


def _autocast(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net.bn(net.conv(x))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda net, x: net.bn(x) if x.sum() > 0 else x, "control flow"),
        (lambda net, x: net.bn(x) if x.shape[0] > 2 else x, "control flow"),
        (lambda net, x: net.bn(x)[: len(x)], "len"),
        (_counts, "changes calls"),
        (_keeps, "control flow"),
        (lambda net, x: KEPT.append(x) or net.bn(x), "beyond its end"),
        (_no_grad, "context of their own"),
        (_autocast, "context of their own"),
        (lambda net, x: checkpoint(net.bn, x, use_reentrant=False), "control flow"),
        (lambda net, x: checkpoint(net.bn, x, use_reentrant=True), "arguments|control flow"),
        (lambda net, x: net.bn(x) * random.random(), "random numbers"),
        (lambda net, x: net.bn(x) * net.generator.random(), "draws random numbers from generator"),
        (lambda net, x: Negated.apply(net.bn(x)), "arguments|context of their own"),
        (lambda net, x: net.bn(x) * torch.rand(()), "nothing that comes from its inputs"),
        (lambda net, x: net.bn(x).to(next(net.parameters()).dtype), "nothing that comes from its inputs"),
        (lambda net, x: net.bn(x) + KEPT_TENSOR, "neither an input nor a parameter"),
        (lambda net, x: net.bn.momentum_cosine_decay() or net.bn(x), "momentum|inputs"),
        (lambda net, x: setattr(x, "requires_grad", False) or net.bn(x), "assigns to requires_grad"),
        (lambda net, x: net.bn(x) if isinstance(net.unknown(x), Tensor) else x, "class of what"),
        (lambda net, x: 1 / 0, "division by zero"),
    ],
)
def test_what_cannot_be_traced(forward: Forward, reason: str) -> None:
    net = Net(forward)
    before, fields = snapshot(net), {id(module): dict(vars(module)) for module in net.modules()}
    state = random.getstate()
    with pytest.raises(ValueError, match=f"cannot fuse Net: .*({reason})"):
        fuse(net)
    KEPT.clear()
    assert_same(snapshot(net), before)
    assert {id(module): dict(vars(module)) for module in net.modules()} == fields
    assert random.getstate() == state
    assert "__getattribute__" not in vars(nn.Module) and type(isinstance) is type(len)


KEPT_TENSOR = torch.ones(())


def test_other_networks_that_cannot_be_fused() -> None:
    with pytest.raises(ValueError, match="cannot fuse Hidden: it calls a MomentumBatchNorm2d that is none of its"):
        fuse(Hidden())
    with pytest.raises(ValueError, match="cannot fuse Sequential: it has no layers of this library"):
        fuse(nn.Sequential(nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match="cannot fuse ModuleList"):
        fuse(nn.ModuleList([norm()]))
    net = Net()
    net.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="cannot fuse Net: this instance has a forward of its own"):
        fuse(net)
    for function in (fuse, unfuse, fused_layers):
        with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module \(got int\)"):
            function(1)


def test_a_wrapped_network_is_fused_inside() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"cannot fuse DataParallel: .* inside.*: DataParallel\(fuse\(network\)\)"):
        fuse(nn.DataParallel(net))
    assert "forward" not in vars(net)


def test_a_refusal_names_the_line_of_the_network() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = norm()

        def forward(self, x: Tensor) -> Tensor:
            return x if x.mean() > 0 else self.bn(x)

    line = Inner.forward.__code__.co_firstlineno + 1
    words = f"cannot fuse Sequential: .*control flow.* (at {__file__}:{line}, in forward: return x if x.mean() > 0 else"
    with pytest.raises(ValueError) as e:
        fuse(nn.Sequential(Inner()))
    start, end = words.split(".*control flow.* ")
    assert str(e.value).startswith(start) and end in str(e.value) and "control flow" in str(e.value)
    with pytest.raises(ValueError) as e:
        fuse(Net(_no_grad))
    assert f"at {__file__}:{_no_grad.__code__.co_firstlineno + 2}, in _no_grad:" in str(e.value)


def test_a_layer_alone() -> None:
    layer = norm()
    assert fuse(layer) is layer and fused_layers(layer) == {} and "forward" not in vars(layer)


def test_a_subclass_with_its_own_forward_is_called_as_it_is() -> None:
    class Mine(MomentumBatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input) - 1

    written = Net(lambda net, x: net.relu(net.bn2(net.conv2(net.relu(net.bn(net.conv(x)))))))
    written.bn = Mine(4)
    written.double()
    fused = fuse(copy.deepcopy(written))
    assert fused_layers(fused) == {"bn2": "relu"}
    assert_nobody_can_tell(written, fused, small())


def test_the_largest_parts_that_can_be_traced() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.other = resnet(), Net(lambda net, x: net.relu(net.bn(x)) if x.sum() > 0 else x)
            self.plain = nn.Linear(5, 5).double()

        def forward(self, x: Tensor) -> Tensor:
            y = self.plain(self.net(x))
            return y if y.sum() > 0 else -y

    written = Branching()
    fused = copy.deepcopy(written)
    fuse_parts(fused)
    assert fused_layers(fused) == {f"net.{name}": word for name, word in fused_layers(fuse(resnet())).items()}
    assert_nobody_can_tell(written, fused, images())


class AsksForWhatItHas(nn.Module):
    """Decides by which parameters, buffers and attributes there are, of its own and of its class."""

    doubles = False

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = momentum_bn.BatchNorm2d(4)
        self.register_buffer("mask", None)
        self.scale = nn.Parameter(torch.full((4, 4), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        if self.mask is not None:
            y = y * self.mask
        if self.scale is not None:
            y = y * self.scale
        if hasattr(self, "extra"):
            y = y + self.extra
        for _, parameter in self.named_parameters(recurse=False):
            y = y + parameter
        return y * 2 if self.doubles else y


def _set(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda net: setattr(net, name, value)


@pytest.mark.parametrize(
    "change",
    [
        _set("mask", torch.zeros(4, 4)),
        _set("scale", None),
        lambda net: net.register_buffer("extra", torch.ones(4, 4)),
        lambda net: net.register_parameter("more", nn.Parameter(torch.ones(4, 4))),
        lambda net: setattr(type(net), "doubles", True),
        lambda net: setattr(type(net), "forward", lambda self, x: self.norm(self.conv(x)) * 3),
    ],
    ids=[
        "buffer that was None",
        "parameter becomes None",
        "new buffer",
        "new parameter",
        "class",
        "forward of the class",
    ],
)
def test_what_a_module_or_its_class_has_is_noticed(change: Callable[[nn.Module], None]) -> None:
    kind = type("AsksForWhatItHas", (AsksForWhatItHas,), {"forward": AsksForWhatItHas.forward})
    written = kind()
    fused = momentum_bn.fuse(copy.deepcopy(written))
    x = torch.randn(2, 3, 6, 6)
    before = written(x)
    torch.testing.assert_close(fused(x), before)
    for net in (written, fused):
        change(net)
    after = written(x)
    assert not torch.equal(after, before)
    torch.testing.assert_close(fused(x), after)


class OfViews(nn.Module):
    """Normalises views of other strides; what comes out has the strides of a fresh output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.other = momentum_bn.BatchNorm2d(4), momentum_bn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, z = self.conv(x).transpose(2, 3), self.conv(x + 1).transpose(2, 3)
        return self.norm(y), F.relu(z.clone() + self.other(z))


@pytest.mark.parametrize("with_grad", [False, True])
def test_strides_of_views_are_those_of_the_written_forward(with_grad: bool) -> None:
    written = OfViews()
    fused = momentum_bn.fuse(copy.deepcopy(written))
    x = torch.randn(2, 3, 5, 5)
    with torch.set_grad_enabled(with_grad):
        for ours, theirs in zip(fused(x), written(x), strict=True):
            assert ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs)
