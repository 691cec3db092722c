"""Networks of random operations on tensors of one shape, for comparing a network with its fused self."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import momentum_bn

CHANNELS = 4
SHAPE = (2, CHANNELS, 3, 3)

Choice = tuple[str, int, int, int]  # an operation and three numbers to choose its operands with


class Keeps(nn.Module):
    """Keeps what it is given, and returns it or what it kept before."""

    def __init__(self, returns: str) -> None:
        super().__init__()
        self.returns = returns
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        before, self.kept = self.kept, x
        if self.returns == "copy":
            return x.clone()
        return x if self.returns == "same" or before is None else before.detach()


class Writes(nn.Module):
    """Changes what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.mul_(0.5)
        return x * 2


class ReturnsItsBuffer(nn.Module):
    """Returns the same memory every time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.ones(SHAPE, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.memory.copy_(x)
        return self.memory


class Halves(nn.Module):
    """Returns two views."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :2], x[:, 2:]


class Block(nn.Module):
    """A residual block: entered where it contains layers."""

    def __init__(self, layers: nn.ModuleList, inplace: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.first, self.second = layers[0], layers[1]
        self.act = nn.ReLU(inplace)
        self.shortcut = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.AvgPool2d(1))
        self.projects = False

    def forward(self, x: Tensor, scale: float = 1.0, *, extra: Tensor | None = None) -> Tensor:
        y = self.act(self.first(self.conv(x)))
        y = self.second(self.conv(y))
        if extra is not None:
            y = y + extra
        y += self.shortcut(x) if self.projects else x
        return self.act(y) * scale


class PreActivation(nn.Module):
    """Normalises first, and adds what it normalised."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.first, self.second = layers[1], layers[2]
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + self.conv(F.relu(self.second(self.conv(F.relu(self.first(x))))))


Operation = Callable[["RandomNetwork", Tensor, Tensor, int], Any]

OPERATIONS: dict[str, Operation] = {
    "layer": lambda net, a, b, k: net.layers[k % 4](a),
    "layer of conv": lambda net, a, b, k: net.layers[k % 4](net.convs[k % 2](a)),
    "layer and relu": lambda net, a, b, k: net.relus[k % 2](net.layers[k % 4](net.convs[k % 2](a))),
    "layer, sum and relu": lambda net, a, b, k: F.relu(net.layers[k % 4](net.convs[k % 2](a)) + b),
    "layer with residual": lambda net, a, b, k: net.layers[k % 4](a, residual=b),
    "keyword": lambda net, a, b, k: net.convs[k % 2](input=a),
    "conv": lambda net, a, b, k: net.convs[k % 2](a),
    "relu module": lambda net, a, b, k: net.relus[k % 2](a),
    "F.relu": lambda net, a, b, k: F.relu(a, bool(k % 2)),
    "F.relu keyword": lambda net, a, b, k: F.relu(a, inplace=bool(k % 2)),
    "torch.relu": lambda net, a, b, k: torch.relu(a),
    "torch.relu_": lambda net, a, b, k: torch.relu_(a),
    "relu method": lambda net, a, b, k: a.relu(),
    "relu_ method": lambda net, a, b, k: a.relu_(),
    "+": lambda net, a, b, k: a + b,
    "+=": lambda net, a, b, k: operator.iadd(a, b),
    "torch.add": lambda net, a, b, k: torch.add(a, b),
    "torch.add keyword": lambda net, a, b, k: torch.add(input=a, other=b),
    "torch.add alpha": lambda net, a, b, k: torch.add(a, b, alpha=k),
    "add": lambda net, a, b, k: a.add(b),
    "add_": lambda net, a, b, k: a.add_(b),
    "add number": lambda net, a, b, k: a + k,
    "add broadcast": lambda net, a, b, k: a + b.mean((2, 3), keepdim=True),
    "add parameter": lambda net, a, b, k: a + net.offset,
    "add float32": lambda net, a, b, k: a + b.float(),
    "mul": lambda net, a, b, k: a * b,
    "mul_": lambda net, a, b, k: a.mul_(0.5),
    "sigmoid": lambda net, a, b, k: a * torch.sigmoid(b),
    "in place of a view": lambda net, a, b, k: (a, operator.iadd(a[:, : k % 4 + 1], 1.0))[0],
    "setitem": lambda net, a, b, k: (a, operator.setitem(a, (slice(None), k % 4), 0.5))[0],
    "view": lambda net, a, b, k: a.flatten(1).view(SHAPE),
    "transposed": lambda net, a, b, k: a.transpose(2, 3),
    "layer of view": lambda net, a, b, k: net.layers[k % 4](a.transpose(2, 3)),
    "halves": lambda net, a, b, k: torch.cat(a.chunk(2, dim=1)[:: 1 - 2 * (k % 2)], dim=1),
    "halves module": lambda net, a, b, k: torch.cat([net.halves(a)[k % 2], net.halves(b)[0]], dim=1),
    "detach": lambda net, a, b, k: a.detach(),
    "clone": lambda net, a, b, k: a.clone(),
    "contiguous": lambda net, a, b, k: a.contiguous(),
    "identity": lambda net, a, b, k: net.identity(a),
    "dropout": lambda net, a, b, k: net.dropout(a),
    "pool": lambda net, a, b, k: F.max_pool2d(a, 1) + net.pool(b),
    "keeps": lambda net, a, b, k: net.keepers[k % 3](a),
    "writes": lambda net, a, b, k: net.writes(a),
    "its buffer": lambda net, a, b, k: net.its_buffer(a),
    "block": lambda net, a, b, k: net.blocks[k % 2](a),
    "block with arguments": lambda net, a, b, k: net.blocks[k % 2](a, 2.0, extra=b),
    "preactivation": lambda net, a, b, k: net.preactivation(a),
    "if training": lambda net, a, b, k: net.layers[k % 4](a) if net.training else a + b,
    "if gradient": lambda net, a, b, k: net.layers[k % 4](a) if torch.is_grad_enabled() else a - b,
    "shape": lambda net, a, b, k: a.reshape(a.shape[0], -1).reshape(a.size()),
    "functional": lambda net, a, b, k: F.batch_norm(a, None, None, training=True),
}


class RandomNetwork(nn.Module):
    """Applies a list of operations, each to two of the values so far."""

    def __init__(self, choices: list[Choice], outputs: int) -> None:
        super().__init__()
        self.choices = choices
        self.outputs = outputs
        self.layers = nn.ModuleList(
            [
                momentum_bn.MomentumBatchNorm2d(CHANNELS, total_iters=20),
                momentum_bn.MomentumBatchNorm2d(CHANNELS, total_iters=20, views_per_update=1, detach_statistics=False),
                momentum_bn.MomentumBatchNorm2d(CHANNELS, track_running_stats=False),
                momentum_bn.BatchNorm2d(CHANNELS),
            ]
        )
        self.convs = nn.ModuleList(
            [nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=2)]
        )
        self.relus = nn.ModuleList([nn.ReLU(), nn.ReLU(inplace=True)])
        self.identity, self.dropout, self.pool = nn.Identity(), nn.Dropout(0.3), nn.AvgPool2d(1)
        self.keepers = nn.ModuleList([Keeps("same"), Keeps("copy"), Keeps("before")])
        self.writes, self.its_buffer, self.halves = Writes(), ReturnsItsBuffer(), Halves()
        self.blocks = nn.ModuleList([Block(self.layers, inplace=True), Block(self.layers, inplace=False)])
        self.preactivation = PreActivation(self.layers)
        self.offset = nn.Parameter(torch.randn(1, CHANNELS, 1, 1))
        self.double()

    def forward(self, x: Tensor, y: Tensor, flag: bool = False) -> Any:
        values = [x, y]
        if flag:
            values.append(x * 2)
        for name, first, second, third in self.choices:
            # Mostly the newest values, so that operations follow each other.
            a, b = values[-1 - first % len(values)], values[-1 - second % len(values)]
            values.append(OPERATIONS[name](self, a, b, third))
        made = values[2:]
        if self.outputs == 0:
            return made[-1]
        if self.outputs == 1:
            return {"last": made[-1], "all": made[::2], "views": (made[-1][:, :1],)}
        return values[-self.outputs :]


class Change(NamedTuple):
    """What happens to a network between two calls."""

    name: str
    number: int


def _hook(records: list[Tensor]) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        records.append(output if isinstance(output, Tensor) else args[0])

    return record


def _modules(net: RandomNetwork) -> list[nn.Module]:
    return [module for module in net.modules() if module is not net and not isinstance(module, nn.ModuleList)]


def _add_hook(net: RandomNetwork, number: int, records: list[Tensor]) -> None:
    modules = _modules(net)
    modules[number % len(modules)].register_forward_hook(_hook(records))


def _remove_hooks(net: RandomNetwork, number: int, records: list[Tensor]) -> None:
    for module in _modules(net):
        module._forward_hooks.clear()


def _replace_relu(net: RandomNetwork, number: int, records: list[Tensor]) -> None:
    net.relus[number % 2] = [nn.ReLU(), nn.GELU(), nn.Identity(), nn.LeakyReLU(inplace=True)][number % 4]


def _replace_layer(net: RandomNetwork, number: int, records: list[Tensor]) -> None:
    torch.manual_seed(number)
    new: list[nn.Module] = [
        momentum_bn.MomentumBatchNorm2d(CHANNELS, activation="relu"),
        nn.BatchNorm2d(CHANNELS),
        momentum_bn.BatchNorm2d(CHANNELS),
        nn.Conv2d(CHANNELS, CHANNELS, 1),
    ]
    net.layers[number % 4] = new[number % 4].double()


def _revert(net: RandomNetwork, number: int, records: list[Tensor]) -> None:
    if all(getattr(layer, "activation", None) is None for layer in net.layers):
        momentum_bn.revert_momentum_batchnorm(net)


def _convert(net: RandomNetwork, number: int, records: list[Tensor]) -> None:
    momentum_bn.convert_momentum_batchnorm(net, total_iters=30)


def _freeze(net: RandomNetwork, number: int, records: list[Tensor]) -> None:
    for layer in net.layers:
        layer.requires_grad_(bool(number % 2))


def _activate(net: RandomNetwork, number: int, records: list[Tensor]) -> None:
    layer = net.layers[number % 4]
    if isinstance(layer, momentum_bn.MomentumBatchNorm | momentum_bn.BatchNorm):
        layer.activation = [None, "relu"][number % 2]


def _project(net: RandomNetwork, number: int, records: list[Tensor]) -> None:
    net.blocks[number % 2].projects ^= True


def _other_program(net: RandomNetwork, number: int, records: list[Tensor]) -> None:
    net.choices.insert(number % (len(net.choices) + 1), ("layer and relu", 0, 1, number))


CHANGES: dict[str, Callable[[RandomNetwork, int, list[Tensor]], Any]] = {
    "train": lambda net, number, records: net.train(),
    "eval": lambda net, number, records: net.eval(),
    "eval of a layer": lambda net, number, records: net.layers[number % 4].train(bool(number % 2)),
    "add hook": _add_hook,
    "remove hooks": _remove_hooks,
    "replace relu": _replace_relu,
    "replace layer": _replace_layer,
    "revert": _revert,
    "convert": _convert,
    "freeze": _freeze,
    "activate": _activate,
    "project": _project,
    "other program": _other_program,
    "inplace relu": lambda net, number, records: setattr(net.relus[number % 2], "inplace", bool(number % 3)),
    "nothing": lambda net, number, records: None,
}


def moved(net: RandomNetwork, number: int) -> RandomNetwork:
    """The same network, as it comes out of a copy or a pickle, where it can be copied."""
    kept = [keeper.kept for keeper in net.keepers if keeper.kept is not None]
    if any(module._forward_hooks for module in net.modules()) or not all(t.is_leaf for t in [*kept, *net.buffers()]):
        return net
    if number % 4 == 0:
        return copy.deepcopy(net)
    return pickle.loads(pickle.dumps(net)) if number % 4 == 1 else net
