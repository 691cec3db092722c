"""Fusing a network's layers with what follows them, without changing the network."""

from __future__ import annotations

import inspect
import sys
import weakref
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._effects import is_layer
from ._plan import Plan, plan
from ._trace import Call, Watch, ambient_state, as_written, trace

__all__ = ["fuse", "fused_layers", "unfuse"]

Network = TypeVar("Network", bound=torch.nn.Module)

# A network that is another one at every call is not worth tracing at every call.
_MOST_TRACES = 64
_MOST_PLANS = 8


def fuse(module: Network) -> Network:
    """Has the layers of this library do what follows them in their own pass, in place.

    The forward of ``module`` is traced (``torch.fx``). From then on a call of ``module`` runs the same operations, but
    each of its layers

    - whose output goes to nothing but a ReLU does that in its own pass,
    - whose output goes to nothing but the addition of a tensor of its shape and dtype, and the sum to nothing but a
      ReLU, does both in its own pass,
    - whose input nobody reads again takes the input's memory for its output, where autograd does not need it and it
      is no view, no input, no parameter and nothing that an unknown module returned or kept.

    Results are those of the network as it is written (in 16 bits the sum before a ReLU is not rounded). Class,
    parameters, buffers, names, state dict and hooks stay; copies and unpickled networks are fused, too. A submodule
    called by itself runs as it is written. Whatever changes is noticed at the next call: modules that are replaced or
    converted, hooks, train and eval, attributes that the forward reads. A module with hooks is called as it is
    written. So is everything where torch itself looks at the operations: under ``torch.compile``, ``torch.export``,
    ``torch.func``, ``torch.jit.trace``, ``torch.fx`` and dispatch modes.

    What a forward reads from elsewhere than its modules and arguments (global variables, closures) is taken to stay
    the same.

    Args:
        module: a network with layers of this library. Modules inside that contain such layers are traced, too; all
            others are called as they are.

    Returns:
        ``module``.

    Raises:
        ValueError: ``module`` has no layers of this library, or its forward cannot be traced; the message says why.
            Nothing was changed then.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), MomentumBatchNorm2d(8), torch.nn.ReLU())
        >>> fused_layers(fuse(net))
        {'1': 'relu'}
    """
    _check_module(module)
    if isinstance(_forward_of(module), FusedForward) or is_layer(module):
        return module
    name = type(module).__name__
    if _is_wrapper(module):
        raise ValueError(f"cannot fuse {name}: fuse the network inside, before it is wrapped: {name}(fuse(network))")
    if not any(map(is_layer, module.modules())):
        raise ValueError(f"cannot fuse {name}: it has no layers of this library, convert its BatchNorms first")
    if _forward_of(module) is not None:
        raise ValueError(f"cannot fuse {name}: this instance has a forward of its own")
    forward = FusedForward(module)
    made = forward.plan_for(module, _foreseen_call(module))
    if made.refusal:
        raise ValueError(f"cannot fuse {name}: {made.refusal}")
    # Past Module.__setattr__, which the class may have made its own.
    module.__dict__["forward"] = forward
    return module


def unfuse(module: Network) -> Network:
    """Takes :func:`fuse` back, in ``module`` and everything inside.

    Returns:
        ``module``.
    """
    _check_module(module)
    for inner in module.modules():
        if isinstance(_forward_of(inner), FusedForward):
            del vars(inner)["forward"]
    return module


def fused_layers(module: torch.nn.Module) -> dict[str, str]:
    """What the layers of a fused network do in their own pass as the network is now, by their names.

    Returns:
        ``"relu"``: the following ReLU; ``"add_relu"``: the following addition and ReLU; ``"in place"``: nothing else,
        but the output takes the input's memory where autograd permits. A layer that is called in several places has
        all that applies, separated by commas. Layers that only normalise are missing.
    """
    _check_module(module)
    forward = _forward_of(module)
    if isinstance(forward, FusedForward):
        return dict(forward.plan_for(module, _foreseen_call(module)).fused)
    found: dict[str, str] = {}
    for name, child in module.named_children():
        found.update({f"{name}.{inner}": word for inner, word in fused_layers(child).items()})
    return found


def fuse_parts(module: torch.nn.Module) -> None:
    """Fuses ``module`` or, where its forward cannot be traced, the largest modules inside whose forward can be."""
    if is_layer(module) or not any(map(is_layer, module.modules())):
        return
    try:
        fuse(module)
    except ValueError:
        for child in module.children():
            fuse_parts(child)


class _Made(NamedTuple):
    """What was found out about one kind of call of a network, and for which state of the network."""

    watch: Watch
    plan: Plan | None
    refusal: str

    @property
    def fused(self) -> dict[str, str]:
        return {} if self.plan is None else self.plan.fused


class FusedForward:
    """The forward of a fused network: an attribute of the instance, before that of its class.

    A copy or pickle of the network has one that traces anew. The network is not kept alive.
    """

    is_fused_forward = True

    def __init__(self, module: torch.nn.Module | None) -> None:
        """Fuses nothing until it is called.

        Args:
            module: the network whose attribute this will be; None: whichever has it when it is called.
        """
        self._module = None if module is None else weakref.ref(module)
        self._made: dict[Any, list[_Made]] = {}
        self._traces = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward of the network."""
        if torch.compiler.is_compiling():
            return as_written(self._network(), args, kwargs)
        module = self._called_network(sys._getframe(1).f_locals.get("self"))
        call = Call.of(args, kwargs) if _operations_are_our_own() else None
        if call is not None:
            made = self.plan_for(module, call)
            if made.plan is not None:
                return made.plan.run(module, *call.tensors)
        return as_written(module, args, kwargs)

    def plan_for(self, module: torch.nn.Module, call: Call) -> _Made:
        """What to run for this call, of the network as it is now."""
        ambient = ambient_state()
        candidates = self._made.setdefault((ambient, call.key), [])
        for made in candidates:
            if made.watch.same(module):
                return made
        if self._traces >= _MOST_TRACES:
            return _Made(Watch(module, [], {}, [], {}), None, "it is another network at every call")
        self._traces += 1
        traced = trace(module, call)
        made = _Made(
            traced.watch,
            None if traced.graph is None else plan(traced.graph, module, grad_enabled=ambient[0]),
            traced.refusal,
        )
        candidates.insert(0, made)
        del candidates[_MOST_PLANS:]
        # Modules that were replaced are not kept alive.
        for others in self._made.values():
            others[:] = [other for other in others if other.watch.has_modules_of(module)]
        return made

    def _network(self) -> torch.nn.Module:
        module = None if self._module is None else self._module()
        if module is None:
            raise RuntimeError("the network of this fused forward is gone")
        return module

    def _called_network(self, caller: Any) -> torch.nn.Module:
        """The network that is called: a shallow copy or a replica has the same forward as what it is a copy of."""
        if isinstance(caller, torch.nn.Module) and _forward_of(caller) is self:
            return caller
        return self._network()

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        """Belongs to the copy of the network."""
        module = None if self._module is None else self._module()
        return FusedForward(memo.get(id(module)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Belongs to the unpickled network."""
        return FusedForward, (None if self._module is None else self._module(),)

    def __getattr__(self, name: str) -> Any:
        """Whatever else a method has (``__code__``, ``__self__``, ...) is the class's."""
        return getattr(MethodType(type(self._network()).forward, self._network()), name)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self._network()).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def _operations_are_our_own() -> bool:
    """Whether nobody watches or transforms the single operations, to whom fused ones would be others."""
    return not (
        torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or is_in_torch_dispatch_mode()
        or _has_any_global_hook()
    )


def _foreseen_call(module: torch.nn.Module) -> Call:
    """A call with a tensor for each argument that the forward needs."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    # Only that they are tensors matters.
    stand_in = torch.empty(0)
    for name, parameter in list(inspect.signature(type(module).forward).parameters.items())[1:]:
        if parameter.default is not parameter.empty:
            continue
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            args.append(stand_in)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[name] = stand_in
    call = Call.of(tuple(args), kwargs)
    assert call is not None
    return call


def _forward_of(module: torch.nn.Module) -> Any:
    return vars(module).get("forward")


def _is_wrapper(module: torch.nn.Module) -> bool:
    """Whether its forward is about another network's, and not to be told by a graph."""
    return isinstance(module, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel))


def _check_module(module: Any) -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module (got {type(module).__name__})")
