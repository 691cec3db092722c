"""What a network's forward does, as a graph, and everything about the network that this graph depends on."""

from __future__ import annotations

import builtins
import gc
import operator
import os
import random
import sys
import threading
import traceback
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from ._effects import Kind, describe, is_layer, is_untouched, module_kind, returns_tensors

__all__ = ["Call", "Trace", "Watch", "ambient_state", "as_written", "trace"]

_HOOKS = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What nn.Module has for itself. Its `training` is an attribute like a network's own.
_OF_EVERY_MODULE = frozenset(dir(torch.nn.Module())) - {"training"}
_DEVICES_WITH_AUTOCAST = ("cpu", "cuda", "xpu", "mps")
_MISSING = object()
# Folders whose code is none of the network's. torch has layers, too, which are called as they are.
_NOT_THE_NETWORKS = tuple(os.path.dirname(source) + os.sep for source in (__file__, torch.__file__))
_EXAMPLES: dict[type, Any] = {Tensor: torch.empty(0, device="cpu"), tuple: ()}
# Tracing patches classes of torch, for all threads.
_LOCK = threading.RLock()


class Untraceable(Exception):  # noqa: N818
    """The reason why a forward cannot be recorded as a graph."""


class Call(NamedTuple):
    """The arguments of one call, with its tensors taken out."""

    template: Any
    """Plain values, and an index for each tensor, in tuples, lists and dicts as in the call."""
    tensors: tuple[Any, ...]
    key: Any
    """Equal where one graph serves both calls."""

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call; None if there are arguments of which nothing is known (subclasses of Tensor, objects)."""
        if not kwargs and len(args) == 1 and type(args[0]) is Tensor:
            return _CALL_OF_ONE._replace(tensors=args)
        tensors: list[Any] = []
        template = _without_tensors((args, kwargs), tensors)
        if template is None:
            return None
        return Call(template, tuple(tensors), _key(template))

    def filled(self, values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the same structure with other values for the tensors."""
        args, kwargs = _filled(self.template, values)
        return args, kwargs


class _Index(int):
    """The place of a tensor among a call's tensors."""


def _without_tensors(value: Any, tensors: list[Any]) -> Any:
    if type(value) in (Tensor, torch.nn.Parameter):  # others may do anything
        tensors.append(value)
        return _Index(len(tensors) - 1)
    if type(value) in (tuple, list):
        items = [_without_tensors(item, tensors) for item in value]
        return None if any(item is None for item in items) else type(value)(items)
    if type(value) is dict:
        named = {name: _without_tensors(item, tensors) for name, item in value.items()}
        return None if any(item is None for item in named.values()) else named
    if value is None or type(value) in (bool, int, float, str, torch.dtype, torch.device):
        return _Plain((value,))
    return None


class _Plain(tuple[Any]):
    """A value that is no tensor."""


def _filled(template: Any, values: list[Any]) -> Any:
    if type(template) is _Index:
        return values[template]
    if type(template) is _Plain:
        return template[0]
    if type(template) is dict:
        return {name: _filled(item, values) for name, item in template.items()}
    return type(template)(_filled(item, values) for item in template)


def _key(template: Any) -> Any:
    if type(template) is _Index:
        return "tensor"
    if type(template) is _Plain:
        return type(template[0]), template[0]
    if type(template) is dict:
        return dict, tuple((name, _key(item)) for name, item in template.items())
    return type(template), tuple(_key(item) for item in template)


_CALL_OF_ONE = Call(((_Index(0),), {}), (), _key(((_Index(0),), {})))


def ambient_state() -> tuple[Any, ...]:
    """What a forward may ask of torch beside its arguments, and what may surround its operations."""
    autocast: Any = torch._C._is_any_autocast_enabled() and tuple(
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES_WITH_AUTOCAST
    )
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


class Watch:
    """The parts of a network that a trace depended on. They are cheap to compare with the network as it is now."""

    def __init__(
        self,
        root: torch.nn.Module,
        passed: list[torch.nn.Module],
        reads: dict[int, tuple[torch.nn.Module, dict[str, Any]]],
        looked_into: list[torch.nn.Module],
        class_reads: dict[tuple[type, str], Any],
    ) -> None:
        """Notes the present state.

        Args:
            root: the traced network. It is not kept: whoever asks passes it again. Its own hooks do not matter.
            passed: modules that must stay what they are: the graph replaces their forward, or relies on what they do.
            reads: for each module the attributes that were read while its forward was traced.
            looked_into: modules whose forward was traced, or whose parameters or buffers were asked for.
            class_reads: the attributes of classes that were read, methods among them.
        """
        self._passed = [module for module in passed if module is not root]
        self._classes = [type(module) for module in self._passed]
        self._root_class = type(root)
        # Their dicts themselves: this is compared in every call, and asking a module for its dict takes longer.
        self._untouched = [vars(module) for module in self._passed if is_untouched(module)]
        self._touched = [
            (vars(module), any(_HOOKS(vars(module))), vars(module).get("forward"))
            for module in self._passed
            if not is_untouched(module)
        ]
        self._root_children = dict(root._modules)
        self._children = [(vars(module), dict(module._modules)) for module in self._passed if module._modules]
        self._root_reads = reads.get(id(root), (root, {}))[1]
        self._reads = [
            (vars(module), name, value)
            for key, (module, values) in reads.items()
            if key != id(root)
            for name, value in values.items()
        ]
        self._root_tensors = _tensor_names(vars(root))
        self._tensors = [(vars(module), _tensor_names(vars(module))) for module in looked_into if module is not root]
        self._class_reads = [(cls, name, value) for (cls, name), value in class_reads.items()]

    def has_modules_of(self, root: torch.nn.Module) -> bool:
        """Whether ``root`` still consists of the same modules, whatever else has changed."""
        return root._modules == self._root_children and all(
            fields["_modules"] == children for fields, children in self._children
        )

    def same(self, root: torch.nn.Module) -> bool:
        """Whether a trace of ``root`` would be the same now."""
        try:
            return (
                all(map(_is_untouched, self._untouched))
                and list(map(type, self._passed)) == self._classes
                and type(root) is self._root_class
                and self.has_modules_of(root)
                and all(
                    any(_HOOKS(fields)) is hooked and fields.get("forward") is forward
                    for fields, hooked, forward in self._touched
                )
                and _have((vars(root), name, value) for name, value in self._root_reads.items())
                and _have(self._reads)
                and _tensor_names(vars(root)) == self._root_tensors
                and all(_tensor_names(fields) == names for fields, names in self._tensors)
                and all(_is_same(getattr(cls, name, _MISSING), value) for cls, name, value in self._class_reads)
            )
        except Exception:
            # Some value of the network cannot be compared (an array), so it counts as another one.
            return False


def _is_untouched(fields: dict[str, Any]) -> bool:
    return not (
        fields["_forward_hooks"]
        or fields["_forward_pre_hooks"]
        or fields["_backward_hooks"]
        or fields["_backward_pre_hooks"]
        or "forward" in fields
    )


def _have(reads: Iterable[tuple[dict[str, Any], str, Any]]) -> bool:
    """Whether each module's dict still has this value under this name."""
    for fields, name, value in reads:
        now = fields.get(name, _MISSING)
        # Most values are what they were: a call for each would take as long as everything else.
        if now is not value and not _is_same(now, value):
            return False
    return True


def _is_same(now: Any, before: Any) -> bool:
    # True equals 1, but is not formatted as it.
    return now is before or (type(now) is type(before) and bool(now == before))


def _tensor_names(fields: dict[str, Any]) -> list[tuple[str, bool]]:
    """The names of a module's parameters and buffers, and which of them are None. A graph asks for the tensors anew."""
    parameters, buffers = fields["_parameters"], fields["_buffers"]
    if not parameters and not buffers:
        return []
    return [(name, tensor is None) for members in (parameters, buffers) for name, tensor in members.items()]


class Trace(NamedTuple):
    """What tracing one forward gave."""

    graph: fx.Graph | None
    """None if there is none, for the reason in ``refusal``."""
    refusal: str
    watch: Watch


def trace(root: torch.nn.Module, call: Call) -> Trace:
    """Traces the forward of ``root`` as its class has it, without running anything.

    Modules that contain layers of this library are entered; all others, and those with hooks, are called as they are.
    The network is unchanged afterwards, whatever its forward tried.
    """
    with _LOCK:
        recorder = _Recorder(root)
        before = _Snapshot(root)
        graph, refusal = None, ""
        try:
            graph = recorder.record(call)
        except Untraceable as error:
            refusal = f"{error}{_place(error)}"
        except Exception as error:
            refusal = f"{type(error).__name__}: {error}{_place(error)}"
        finally:
            changed = before.restore()
        if changed and not refusal:
            graph, refusal = None, f"its forward changes {changed}"
        return Trace(graph, refusal, recorder.watch())


def _place(error: Exception) -> str:
    """The line of the network's code that led to an error, where there is one: beyond it are torch and this package."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*_NOT_THE_NETWORKS, "<frozen", "<eval_with_key")):
            place = f"at {frame.filename}:{frame.lineno}, in {frame.name}"
            return f" ({place}: {frame.line})" if frame.line else f" ({place})"
    return ""


class _Recorder(fx.Tracer):
    """Records calls on stand-ins for tensors as nodes of a graph. Refuses what nodes cannot express."""

    proxy_buffer_attributes = True

    def __init__(self, root: torch.nn.Module) -> None:
        super().__init__()
        self._network = root
        self._modules = dict(root.named_modules())
        self._foreseen = {name: module for name, module in self._modules.items() if is_untouched(module)}
        self._names = {module: name for name, module in self._modules.items()}
        self._holders = _holders(root)
        self._members = {id(tensor) for tensor in chain(root.parameters(), root.buffers())}
        self._thread = threading.get_ident()
        self._ambient: tuple[Any, ...] = ()
        self._reads: dict[int, tuple[torch.nn.Module, dict[str, Any]]] = {}
        self._looked_into: dict[int, torch.nn.Module] = {}
        self._class_reads: dict[tuple[type, str], Any] = {}
        self._called: list[torch.nn.Module] = []
        self._proxies: list[weakref.ref[fx.Proxy]] = []

    def record(self, call: Call) -> fx.Graph:
        self._call = call
        self._ambient = _ambient_and_contexts()
        self._enter(self._network)
        with _OnlyRecorded(self), self._recording_reads(), _answering_isinstance():
            graph = self.trace(self._network)
        self._call = None  # type: ignore[assignment]
        if any(proxy() is not None for proxy in self._proxies):
            gc.collect()
            if any(proxy() is not None for proxy in self._proxies):
                raise Untraceable("its forward keeps values beyond its end")
        return graph

    def watch(self) -> Watch:
        """What the graph depends on, also where it could not be finished."""
        # What is called as it is may do what it likes, and with the modules inside it, too.
        unforeseen = {id(leaf) for leaf in self._called if is_untouched(leaf) and module_kind(leaf) is Kind.UNKNOWN}
        inside = {
            id(inner) for leaf in self._called if not is_layer(leaf) for inner in leaf.modules() if inner is not leaf
        }
        passed = [module for module in self._network.modules() if id(module) not in unforeseen | inside]
        for layer in filter(is_layer, self._called):
            configuration = {name: vars(layer)[name] for name in ("activation", "inplace")}
            self._reads.setdefault(id(layer), (layer, {}))[1].update(configuration)
        return Watch(self._network, passed, self._reads, list(self._looked_into.values()), self._class_reads)

    def _enter(self, module: torch.nn.Module) -> None:
        """Notes that the forward of this module is traced."""
        self._looked_into[id(module)] = module
        self._class_reads[type(module), "forward"] = type(module).forward

    # What torch.fx asks of a tracer.

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,  # noqa: ARG002
        concrete_args: Any = None,  # noqa: ARG002
    ) -> tuple[Callable[..., Any], list[Any]]:
        call, network = self._call, self._network

        def run() -> Any:
            inputs: list[Any] = [
                self.create_proxy("placeholder", f"input_{index}", (), {}) for index in range(len(call.tensors))
            ]
            args, kwargs = call.filled(inputs)
            output = root_fn(network, *args, **kwargs)
            if not _same_things((args, kwargs), call.filled(inputs)):
                raise Untraceable("its forward changes the containers that it is given")
            return output

        return run, []

    def call_module(
        self, m: torch.nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if m is self._network or m not in self._names:
            raise Untraceable(f"it calls a {type(m).__name__} that is none of its submodules")
        if m in self._holders and not any(_HOOKS(vars(m))):
            self._enter(m)
            return as_written(m, args, kwargs)
        self._called.append(m)
        return self.create_proxy("call_module", self._names[m], args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient_and_contexts() != self._ambient:
            raise Untraceable(
                "some of its operations run in a context of their own (torch.no_grad, torch.autocast, "
                "torch.utils.checkpoint, ...)"
            )
        node = super().create_node(*args, **kwargs)
        node.meta["kind"], node.meta["is_tensor"] = describe(node, self._foreseen)
        return node

    def create_arg(self, a: Any) -> Any:
        if type(a) in (_Proxy, _Attribute):
            return a.node
        if isinstance(a, torch.nn.Module):
            raise Untraceable(f"it passes a {type(a).__name__} to a function")
        if isinstance(a, Tensor) and id(a) not in self._members:
            raise Untraceable("it uses a tensor that is neither an input nor a parameter nor a buffer")
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (self.create_arg(list(a.items())),), {})
        if isinstance(a, list | dict) and type(a) not in (list, dict):
            raise Untraceable(f"it makes a {type(a).__name__}")
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        self._proxies.append(weakref.ref(proxy))
        return proxy

    @contextmanager
    def _recording_reads(self) -> Iterator[None]:
        """Notes which attributes of the network's modules are read: the graph may depend on any of them."""
        members = {id(module) for module in self._modules.values()}

        def read(module: torch.nn.Module, name: str) -> Any:
            if id(module) in members and threading.get_ident() == self._thread:
                if name in ("_parameters", "_buffers"):
                    self._looked_into[id(module)] = module
                elif name not in _OF_EVERY_MODULE:
                    self._note_read(module, name)
            return object.__getattribute__(module, name)

        own = vars(torch.nn.Module).get("__getattribute__")
        torch.nn.Module.__getattribute__ = read  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            if own is None:
                del torch.nn.Module.__getattribute__
            else:
                torch.nn.Module.__getattribute__ = own  # type: ignore[method-assign]

    def _note_read(self, module: torch.nn.Module, name: str) -> None:
        fields = object.__getattribute__(module, "__dict__")
        if name not in fields:
            if name in fields["_modules"]:
                return  # they are watched in any case
            # A parameter or buffer. What only the class has, or nobody, may be one later.
            self._looked_into[id(module)] = module
            if name in fields["_parameters"] or name in fields["_buffers"]:
                return
            cls = type(module)
            self._class_reads.setdefault((cls, name), getattr(cls, name, _MISSING))
        value = fields.get(name, _MISSING)
        if isinstance(value, random.Random) or type(value).__module__.startswith("numpy.random"):
            raise Untraceable(f"it draws random numbers from {name}")
        self._reads.setdefault(id(module), (module, {}))[1].setdefault(name, _kept(value))


def as_written(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs the forward of the instance or the class; never a fused one."""
    own = vars(module).get("forward")
    if own is None or hasattr(own, "is_fused_forward"):
        return type(module).forward(module, *args, **kwargs)
    return own(*args, **kwargs)


def _holders(root: torch.nn.Module) -> set[torch.nn.Module]:
    """Modules of ``root`` that contain layers of this library, and are not such layers themselves."""
    return {
        module
        for module in root.modules()
        if not is_layer(module) and any(is_layer(inner) for inner in module.modules())
    }


def _ambient_and_contexts() -> tuple[Any, ...]:
    """The ambient state, and contexts that change what autograd keeps or what operations do."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return *ambient_state(), hooks, torch._C._len_torch_dispatch_stack()


class _OnlyRecorded(TorchFunctionMode):
    """Records every function of torch on stand-ins, and refuses those on tensors.

    The results of those would be constants of the graph: random numbers drawn once, values of one device and dtype, or
    parts of an autograd graph that is soon freed.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if threading.get_ident() != self._recorder._thread:
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            return func(*args, **kwargs)  # the next operation will notice
        if not _has_proxy((args, kwargs)):
            raise Untraceable(f"it calls {getattr(func, '__name__', func)} with nothing that comes from its inputs")
        if is_tensor_method_or_property(func):
            return self._recorder.create_proxy("call_method", func.__name__, args, kwargs)
        return self._recorder.create_proxy("call_function", func, args, kwargs)


def _has_proxy(value: Any) -> bool:
    if type(value) in (_Proxy, _Attribute):
        return True
    if isinstance(value, tuple | list):
        return any(map(_has_proxy, value))
    if isinstance(value, dict):
        return any(map(_has_proxy, value.values()))
    return isinstance(value, slice) and _has_proxy((value.start, value.stop, value.step))


class _Recorded:
    """What torch.fx's stand-ins would leave out: assignments in place and to attributes."""

    node: fx.Node
    tracer: Any

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("node", "tracer", "root", "attr", "_node"):
            object.__setattr__(self, name, value)
        else:
            raise Untraceable(f"it assigns to {name} of a tensor")

    def __setitem__(self, index: Any, value: Any) -> None:
        self._record(operator.setitem, index, value)

    def __delitem__(self, index: Any) -> None:
        self._record(operator.delitem, index)

    def _record(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *args), {})


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self._record(function, other)


for _name in ("add", "and", "concat", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub"):
    setattr(_Recorded, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))
_Recorded.__itruediv__ = _in_place(operator.itruediv)  # type: ignore[attr-defined]
_Recorded.__ixor__ = _in_place(operator.ixor)  # type: ignore[attr-defined]


class _Proxy(_Recorded, fx.Proxy):
    """What stands for a value while a forward is traced."""


class _Attribute(_Recorded, fx.proxy.Attribute):
    """What stands for an attribute of such a value."""


@contextmanager
def _answering_isinstance() -> Iterator[None]:
    """Python's isinstance() takes a stand-in for what it stands for; torch's C++ must not take it for a tensor."""
    asked = builtins.isinstance

    def answer(value: Any, classes: Any) -> bool:
        if type(value) not in (_Proxy, _Attribute) or asked(value, classes):
            return asked(value, classes)
        node = value.node
        kind = Tensor if node.meta["is_tensor"] else tuple if returns_tensors(node) else None
        if kind is None:
            name = getattr(node.target, "__name__", node.target)
            raise Untraceable(f"it asks for the class of what {name} returned")
        return asked(_EXAMPLES[kind], classes)

    builtins.isinstance = answer
    try:
        yield
    finally:
        builtins.isinstance = asked


class _Snapshot:
    """The attributes of a network's modules, its containers of plain values and Python's random numbers."""

    def __init__(self, root: torch.nn.Module) -> None:
        self._names = {id(module): name for name, module in root.named_modules()}
        self._fields = [(module, vars(module), dict(vars(module))) for module in root.modules()]
        self._containers = [
            (module, name, value, value.copy())
            for module, fields, _ in self._fields
            for name, value in fields.items()
            if type(value) in (list, dict, set, OrderedDict)
        ]
        self._random = random.getstate()
        self._numpy = sys.modules.get("numpy")
        self._numpy_random = self._numpy and self._numpy.random.get_state()

    def restore(self) -> str:
        """Brings all of it back. Returns what had changed, or nothing."""
        changed = ""
        for module, name, value, content in self._containers:
            if not _same_things(value, content):
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)
                changed = self._path(module, name)
        for module, fields, content in self._fields:
            if not _same_things(fields, content):
                names = [
                    name for name in {**fields, **content} if fields.get(name, self) is not content.get(name, self)
                ]
                fields.clear()
                fields.update(content)
                changed = self._path(module, names[0] if names else "")
        if random.getstate() != self._random:
            random.setstate(self._random)
            changed = "Python's random numbers"
        if self._numpy and not _same_numpy_random(self._numpy.random.get_state(), self._numpy_random):
            self._numpy.random.set_state(self._numpy_random)
            changed = "NumPy's random numbers"
        return changed

    def _path(self, module: torch.nn.Module, name: str) -> str:
        return ".".join(filter(None, (self._names[id(module)], name)))


def _same_numpy_random(ours: Any, theirs: Any) -> bool:
    return bool(ours[1].tobytes() == theirs[1].tobytes() and ours[2:] == theirs[2:])


def _same_things(ours: Any, theirs: Any) -> bool:
    if ours is theirs:
        return True
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(map(_same_things, ours.values(), theirs.values()))
    if isinstance(ours, tuple | list):
        return len(ours) == len(theirs) and all(map(_same_things, ours, theirs))
    return isinstance(ours, set | int | float | str) and bool(ours == theirs)


def _kept(value: Any) -> Any:
    """The value as it is now, also if it is a container that changes."""
    return value.copy() if type(value) in (list, dict, set) else value
