"""Decides which layers of a traced forward do more in their own pass, and writes the forward as code that does so."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ._effects import Kind, is_layer, is_plain_layer, is_quiet
from ._stand_in import configured

__all__ = ["Plan", "plan"]

_RELU_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_RELU_METHODS = ("relu", "relu_")
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_")


class Plan(NamedTuple):
    """A forward in which layers do more."""

    run: Callable[..., Any]
    """The forward. It is called with the root and the call's tensors."""
    fused: dict[str, str]
    """What each layer does besides, by its name: "relu", "add_relu" or "in place"."""


class _Fusion:
    """What one call of a layer does besides normalising."""

    def __init__(self, layer: fx.Node) -> None:
        self.layer = layer
        self.residual: fx.Node | None = None
        self.add: fx.Node | None = None
        self.relu: fx.Node | None = None
        self.last = layer  # the node whose value the fused call makes
        self.place = layer  # the node at whose place in the order it is made
        self.absorbed: list[fx.Node] = []  # nodes that are left out
        self.overwrites = False

    @property
    def word(self) -> str:
        if self.add is not None:
            return "add_relu"
        return "relu" if self.relu is not None else "in place"


def plan(graph: fx.Graph, root: nn.Module, grad_enabled: bool) -> Plan | None:
    """The forward with everything fused that may be fused; None where nothing may be."""
    analysis = _Analysis(graph, dict(root.named_modules()))
    fusions = [analysis.fusion_of(node) for node in graph.nodes if analysis.is_layer_call(node)]
    for fusion in fusions:
        fusion.overwrites = analysis.may_overwrite(fusion, with_grad=False)
    fusions = [fusion for fusion in fusions if fusion.overwrites or fusion.relu is not None]
    if not fusions:
        return None
    fused: dict[str, str] = {}
    for fusion in fusions:
        name = str(fusion.layer.target)
        words = [word for word in fused.get(name, "").split(", ") if word]
        fused[name] = ", ".join(dict.fromkeys([*words, fusion.word]))
    if grad_enabled:
        for fusion in fusions:
            fusion.overwrites = analysis.may_overwrite(fusion, with_grad=True)
    return Plan(_Code(graph, root, fusions).compiled(), fused)


class _Analysis:
    """Who reads which memory when."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._nodes = list(graph.nodes)
        self._order = {node: index for index, node in enumerate(self._nodes)}
        self._place: dict[fx.Node, int] = {}  # of nodes that are executed elsewhere than they stand
        self._memory: dict[fx.Node, frozenset[fx.Node]] = {}  # by the nodes that brought it into being
        self._escaped: set[fx.Node] = set()
        self._absorbed: set[fx.Node] = set()  # by the fusions so far
        for node in self._nodes:
            self._memory[node] = self._memory_of(node)
        self._aliases: dict[fx.Node, list[fx.Node]] = {}
        for node, memory in self._memory.items():
            for origin in memory:
                self._aliases.setdefault(origin, []).append(node)

    def _memory_of(self, node: fx.Node) -> frozenset[fx.Node]:
        kind = node.meta["kind"]
        inherited = frozenset[fx.Node]().union(*(self._memory[argument] for argument in node.all_input_nodes))
        if kind is Kind.METADATA or node.op == "output":
            return frozenset()
        if kind in (Kind.INPUT, Kind.FRESH):
            return frozenset((node,))
        if kind is Kind.UNKNOWN:
            self._escaped |= inherited
            return inherited | {node}
        if kind is Kind.SAME:
            first = node.args[0]
            assert isinstance(first, fx.Node)
            return self._memory[first]
        return inherited

    def is_layer_call(self, node: fx.Node) -> bool:
        """Whether this calls a layer whose effect is known, with x alone or with x and a residual."""
        if node.op != "call_module" or node.meta["kind"] is Kind.UNKNOWN:
            return False
        return is_layer(self._modules[str(node.target)])

    def fusion_of(self, node: fx.Node) -> _Fusion:
        """The ReLU, or the addition and the ReLU, that the layer may do."""
        fusion = _Fusion(node)
        layer = self._modules[str(node.target)]
        if not is_plain_layer(layer):
            return fusion
        reader, passed = self._only_reader(node)
        if reader is None:
            return fusion
        if self._is_relu(reader):
            self._absorb(fusion, reader, [*passed, reader])
        elif (
            reader not in self._absorbed
            and len(node.args) == 1
            and not node.kwargs
            and (other := self._added(reader, node, passed)) is not None
        ):
            relu, between = self._only_reader(reader)
            if relu is not None and self._is_relu(relu) and self._may_add(fusion, reader, other):
                fusion.residual, fusion.add = other, reader
                self._absorb(fusion, relu, [*passed, reader, *between, relu])
        return fusion

    def _absorb(self, fusion: _Fusion, relu: fx.Node, nodes: list[fx.Node]) -> None:
        fusion.relu = fusion.last = relu
        fusion.absorbed = nodes
        self._absorbed.update(nodes)
        if fusion.residual is not None and self._order[fusion.residual] > self._order[fusion.layer]:
            assert fusion.add is not None
            fusion.place = fusion.add
            self._place[fusion.layer] = self._order[fusion.add]

    def _only_reader(self, node: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
        """The only node that reads the value, and the Identities on the way to it."""
        passed: list[fx.Node] = []
        while len(node.users) == 1:
            (reader,) = node.users
            if reader.op == "output":
                break
            module = self._modules[str(reader.target)] if reader.op == "call_module" else None
            if type(module) is not nn.Identity or reader.meta["kind"] is not Kind.SAME:
                return reader, passed
            passed.append(reader)
            node = reader
        return None, passed

    def _is_relu(self, node: fx.Node) -> bool:
        if len(node.all_input_nodes) != 1 or node.meta["kind"] not in (Kind.FRESH, Kind.SAME):
            return False
        if node.op == "call_module":
            return type(self._modules[str(node.target)]) is nn.ReLU and len(node.args) == 1
        if node.op == "call_method":
            return node.target in _RELU_METHODS and len(node.args) == 1
        return node.op == "call_function" and node.target in _RELU_FUNCTIONS

    def _added(self, node: fx.Node, layer: fx.Node, passed: list[fx.Node]) -> fx.Node | None:
        """What an addition adds to the layer's output; None if it is no plain addition of two tensors."""
        is_add = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
            node.op == "call_method" and node.target in _ADD_METHODS
        )
        values = [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)]
        if not is_add or len(values) != 2 or node.kwargs.keys() - {"input", "other"}:
            return None
        ours = passed[-1] if passed else layer
        others = [value for value in values if value is not ours]
        return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None

    def _may_add(self, fusion: _Fusion, add: fx.Node, other: fx.Node) -> bool:
        """Whether the layer may read ``other`` in its own pass instead of leaving that to the addition."""
        layer = fusion.layer
        if self._adds_too(other, add, layer):
            return False
        target = add.args[0] if add.args else add.kwargs["input"]
        if add.meta["kind"] is Kind.SAME and target is other and not self._is_dead_after(other, add, self._order[add]):
            return False  # others see what the addition writes
        between = self._nodes[self._order[layer] + 1 : self._order[add]]
        if self._order[other] < self._order[layer]:
            return not any(self._may_write(node, other) for node in between)
        return all(self._may_precede(node, layer) for node in between)

    def _adds_too(self, other: fx.Node, add: fx.Node, layer: fx.Node) -> bool:
        """Whether ``other`` comes from a later layer, which can do the addition without being moved."""
        origin = other
        while self._is_identity(origin):
            (origin,) = origin.all_input_nodes
        return (
            self.is_layer_call(origin)
            and self._order[origin] > self._order[layer]
            and self._only_reader(origin)[0] is add
            and is_plain_layer(self._modules[str(origin.target)])
            and len(origin.args) == 1
            and not origin.kwargs
        )

    def _may_write(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether ``node`` may change the memory of ``value``, or depend on when ``value`` is read."""
        touched = any(self._memory[argument] & self._memory[value] for argument in node.all_input_nodes)
        if node.meta["kind"] is Kind.UNKNOWN:
            return touched or not self._is_private(value)
        return touched and node.meta["kind"] is Kind.SAME and not self._is_identity(node)

    def _may_precede(self, node: fx.Node, layer: fx.Node) -> bool:
        """Whether ``node``, which follows the layer's call, may as well be executed before it."""
        x = layer.args[0]
        assert isinstance(x, fx.Node)
        if not self._is_private(x):
            return False
        if any(self._memory[argument] & self._memory[x] for argument in node.all_input_nodes):
            return False
        ours = self._modules[str(layer.target)]
        read = {origin for argument in node.all_input_nodes for origin in self._memory[argument]}
        if any(self._is_state_of(origin, ours) for origin in read | {node}):
            return False
        if node.op != "call_module":
            return True
        module = self._modules[str(node.target)]
        if _shares_state(module, ours):
            return False
        # The ranks of a group must gather in the same order, also if one of them does not fuse.
        return not (_has_group(ours) and any(_has_group(inner) for inner in module.modules()))

    def _is_state_of(self, node: fx.Node, layer: nn.Module) -> bool:
        """Whether this is a parameter or a buffer of the layer, which change with its call."""
        if node.op != "get_attr":
            return False
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(self._modules[owner], name)
        return any(value is tensor for tensor in (*layer.parameters(), *layer.buffers()))

    def _is_identity(self, node: fx.Node) -> bool:
        return node.op == "call_module" and type(self._modules[str(node.target)]) is nn.Identity

    def _base(self, node: fx.Node) -> fx.Node:
        """The node that made the tensor which this one passes on."""
        while node.meta["kind"] is Kind.SAME and node.op != "output" and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node

    def _is_private(self, node: fx.Node) -> bool:
        """Whether the value is a whole tensor in memory that only known operations of this graph have seen."""
        base = self._base(node)
        return (
            base.meta["kind"] is Kind.FRESH and self._memory[node] == frozenset((base,)) and base not in self._escaped
        )

    def _is_dead_after(self, value: fx.Node, reader: fx.Node, position: int) -> bool:
        """Whether the memory of ``value`` is private and nobody but ``reader`` reads it at ``position`` or later."""
        if not self._is_private(value):
            return False
        return all(
            user is reader or user.meta["kind"] is Kind.METADATA or self._position(user) < position
            for alias in self._aliases[self._base(value)]
            if self._order[alias] < self._order[reader]
            for user in alias.users
        )

    def _position(self, node: fx.Node) -> int:
        return self._place.get(node, self._order[node])

    def may_overwrite(self, fusion: _Fusion, with_grad: bool) -> bool:
        """Whether the layer's output may take the memory of its input.

        Args:
            fusion: the layer's call, with all fusions of the graph decided.
            with_grad: whether autograd may record what else happens. Where it needs the layer's own input, the layer
                keeps that by itself.
        """
        layer = fusion.layer
        x = layer.args[0]
        if not isinstance(x, fx.Node) or not self._is_dead_after(x, layer, self._position(layer)):
            return False
        residuals = [fusion.residual, *layer.args[1:], *layer.kwargs.values()]
        if any(isinstance(r, fx.Node) and self._memory[r] & self._memory[x] for r in residuals):
            return False
        if not with_grad:
            return True
        return len(x.users) == 1 and self._base(x) is x and is_quiet(x, self._modules)


def _shares_state(module: nn.Module, layer: nn.Module) -> bool:
    ours = {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
    return any(id(tensor) in ours for tensor in (*module.parameters(), *module.buffers()))


def _has_group(module: nn.Module) -> bool:
    return getattr(module, "process_group", None) is not None


class _Code:
    """The Python source of a forward."""

    def __init__(self, graph: fx.Graph, root: nn.Module, fusions: Iterable[_Fusion]) -> None:
        self._graph = graph
        self._modules = dict(root.named_modules())
        self._fusions = {fusion.place: fusion for fusion in fusions}
        self._left_out = {node for fusion in fusions for node in (fusion.layer, *fusion.absorbed)}
        self._globals: dict[str, Any] = {"normalize": _normalize, "fits": _fits}
        self._names: dict[fx.Node, str] = {}
        # Each statement with the variables that it reads.
        self._statements: list[tuple[str, set[str]]] = []
        self._reads: set[str] = set()

    def compiled(self) -> Callable[..., Any]:
        parameters = ["root"]
        for node in self._graph.nodes:
            if node.op == "placeholder":
                parameters.append(self._variable(node))
            elif node in self._fusions:
                self._fused(self._fusions[node])
            elif node not in self._left_out:
                self._plain(node)
        source = "\n".join([f"def run({', '.join(parameters)}):", *self._lines()])
        exec(compile(source, "<fused forward>", "exec"), self._globals)
        run: Callable[..., Any] = self._globals["run"]
        return run

    def _lines(self) -> list[str]:
        """The statements; a variable is cleared where it was read last, as memory depends on it."""
        last: dict[str, int] = {}
        for index, (_, reads) in enumerate(self._statements):
            last.update(dict.fromkeys(reads, index))
        lines = []
        for index, (text, reads) in enumerate(self._statements):
            lines.append(text)
            done = sorted(name for name in reads if last[name] == index)
            if done and not text.lstrip().startswith("return"):
                lines.append(f"    {' = '.join(done)} = None")
        return lines

    def _add(self, text: str) -> None:
        self._statements.append((text, self._reads))
        self._reads = set()

    def _variable(self, node: fx.Node) -> str:
        return self._names.setdefault(node, f"v{len(self._names)}")

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._globals)}"
        self._globals[name] = value
        return name

    def _fused(self, fusion: _Fusion) -> None:
        layer = self._constant(self._modules[str(fusion.layer.target)])
        arguments = [self._text(argument) for argument in fusion.layer.args]
        arguments += [f"{name}={self._text(value)}" for name, value in fusion.layer.kwargs.items()]
        target = self._variable(fusion.last)
        options = f"{layer}, {fusion.relu is not None}, {fusion.overwrites}"
        if fusion.residual is None:
            self._add(f"    {target} = normalize({options}, {', '.join(arguments)})")
            return
        assert fusion.add is not None and fusion.relu is not None
        x, residual = arguments[0], self._text(fusion.residual)
        # As written where the addition broadcasts or promotes: y stands for every value on the way.
        on_the_way = {fusion.layer, *fusion.absorbed} - {fusion.relu}
        self._names.update(dict.fromkeys(on_the_way, target))
        add, relu = self._expression(fusion.add), self._expression(fusion.relu)
        self._names.update({fusion.relu: target})
        self._add(
            f"    if fits({x}, {residual}):\n"
            f"        {target} = normalize({options}, {x}, {residual})\n"
            f"    else:\n"
            f"        {target} = normalize({layer}, False, {fusion.overwrites}, {x})\n"
            f"        {target} = {add}\n"
            f"        {target} = {relu}"
        )
        self._statements[-1][1].discard(target)

    def _plain(self, node: fx.Node) -> None:
        if node.op == "output":
            self._add(f"    return {self._text(node.args[0])}")
            return
        expression = self._expression(node)
        self._add(f"    {self._variable(node) if node.users else '_'} = {expression}")
        if not node.users:
            self._statements[-1] = (self._statements[-1][0] + "\n    _ = None", self._statements[-1][1])

    def _expression(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            owner = "root" if not path else self._constant(self._modules[path])
            return f"getattr({owner}, {name!r})"
        if node.op == "call_method":
            return f"{self._text(node.args[0])}.{node.target}{self._arguments(node.args[1:], node.kwargs)}"
        if node.op == "call_module":
            return self._constant(self._modules[str(node.target)]) + self._arguments(node.args, node.kwargs)
        return self._constant(node.target) + self._arguments(node.args, node.kwargs)

    def _arguments(self, args: Iterable[Any], kwargs: dict[str, Any]) -> str:
        texts = [self._text(argument) for argument in args]
        if all(name.isidentifier() for name in kwargs):
            texts += [f"{name}={self._text(value)}" for name, value in kwargs.items()]
        else:
            texts.append("**" + self._text(kwargs))
        return f"({', '.join(texts)})"

    def _text(self, value: Any) -> str:
        """An expression for an argument; containers are made anew in each call."""
        if isinstance(value, fx.Node):
            name = self._variable(value)
            self._reads.add(name)
            return name
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self._text(key)}: {self._text(item)}" for key, item in value.items()) + "}"
        if isinstance(value, list):
            return f"[{', '.join(map(self._text, value))}]"
        if type(value) is tuple:
            return f"({''.join(self._text(item) + ', ' for item in value)})"
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return f"{self._constant(type(value))}({', '.join(map(self._text, value))})"
        if isinstance(value, slice | range):
            ends = (value.start, value.stop, value.step)
            return f"{type(value).__name__}({', '.join(map(self._text, ends))})"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        return self._constant(value)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _fits(x: Any, residual: Any) -> bool:
    """Whether a layer's own pass may add ``residual`` to what it makes of ``x``."""
    return (
        type(x) is Tensor
        and type(residual) is Tensor
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.stride() == x.stride()
        and residual.device == x.device
        and _is_laid_out_as_output(x)
    )


def _is_laid_out_as_output(x: Tensor) -> bool:
    """Whether a layer's output, which is contiguous in x's suggested format, has x's strides."""
    channels_last = _CHANNELS_LAST.get(x.dim())
    return x.is_contiguous() or (channels_last is not None and x.is_contiguous(memory_format=channels_last))


def _normalize(layer: nn.Module, relu: bool, overwrite: bool, x: Any, residual: Any = None) -> Any:
    """Calls a layer's forward as if it were configured with a ReLU, or to work in place."""
    forward = type(layer).forward
    if type(x) not in (Tensor, nn.Parameter):
        y = forward(layer, x) if residual is None else forward(layer, x, residual)
        return torch.relu(y) if relu else y
    # A view of other strides would hand them on to what comes after it.
    inplace = overwrite and _is_laid_out_as_output(x)
    return forward(configured(layer, relu=relu, inplace=inplace), x, residual)
