"""Turning a network's BatchNorms into Momentum BatchNorms, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.modules.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm, _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from typing_extensions import Unpack

from . import batch_norm
from ._norm_act import BatchNormAct2d, MomentumBatchNormAct2d, NormAct, is_norm_act
from ._norm_layer import NormLayer
from ._options import Activation, ConvertOptions, Options, check_option_names
from .batch_norm import BatchNorm
from .momentum_batch_norm import (
    CONFIGURATION,
    OWN_STATE,
    MomentumBatchNorm,
    MomentumBatchNorm1d,
    MomentumBatchNorm2d,
    MomentumBatchNorm3d,
)

__all__ = ["convert_batchnorm", "convert_momentum_batchnorm", "revert_momentum_batchnorm"]

Network = TypeVar("Network", bound=torch.nn.Module)

_TORCH_MOMENTUM = 0.1

# torch's layer of each rank, and those of this library.
_BY_RANK: list[tuple[type[_BatchNorm], type[MomentumBatchNorm], type[BatchNorm]]] = [
    (BatchNorm1d, MomentumBatchNorm1d, batch_norm.BatchNorm1d),
    (BatchNorm2d, MomentumBatchNorm2d, batch_norm.BatchNorm2d),
    (BatchNorm3d, MomentumBatchNorm3d, batch_norm.BatchNorm3d),
]


class _Origin(NamedTuple):
    """What a layer was before it was converted. Kept on the layer, so of plain values only."""

    layer_class: type[_BatchNorm]
    momentum: float | None
    group_name: str | None


def convert_momentum_batchnorm(module: Network, total_iters: int, **options: Unpack[ConvertOptions]) -> Network:
    """Makes every torch BatchNorm in a network a Momentum BatchNorm, in place.

    The layer objects stay the same and only change their class, so whatever refers to them stays right: parents that
    share a layer, hooks and their handles, optimizers. Parameters, buffers, ``eps``, ``affine``, ``bias``, tracking,
    device, dtype and the training flag are kept; the old ``momentum`` is not taken over. A ``SyncBatchNorm`` becomes a
    :class:`momentum_bn.MomentumBatchNorm`, which takes any rank and synchronises only with a ``process_group`` given
    here. A subclass of torch's layers is converted where its forward is torch's. timm's ``BatchNormAct2d`` keeps its
    dropout and activation; a ReLU is applied in the layer's own pass. Layers that are Momentum BatchNorm already get
    ``total_iters`` and those options that are given; all else of them stays as it is.

    Args:
        module: the network, or a single BatchNorm.
        total_iters: updates after which the batch has no weight left. There is no default: with a forgotten one the
            statistics would freeze early.
        **options: ``momentum``, ``views_per_update``, ``schedule``, ``variance``, ``activation``, ``inplace``,
            ``process_group`` and ``detach_statistics`` of :class:`momentum_bn.MomentumBatchNorm`, with its defaults.
            ``activation`` applies to every layer: the network must not apply it again. ``inplace`` is the caller's
            promise that the network reads no layer's input again. The group of a ``SyncBatchNorm`` is not taken over:
            without a ``process_group`` its layer does not synchronise any more.

    Returns:
        ``module``.

    Raises:
        ValueError: an option out of range; options for a network without any BatchNorm; an uninitialised
            ``LazyBatchNorm``; a parametrized layer, or one with a forward of its own. Nothing was changed then.
        TypeError: an unknown option. Nothing was changed then.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> convert_momentum_batchnorm(net, total_iters=10_000)[1]
        MomentumBatchNorm2d(8, eps=1e-05, momentum=1.0, affine=True, track_running_stats=True, total_iters=10000)
    """
    check_option_names("convert_momentum_batchnorm", options, ConvertOptions)
    configuration = Options(total_iters, **options)
    configuration.check(num_features=0, eps=1e-5)
    already = list(_layers(module, lambda layer: isinstance(layer, MomentumBatchNorm)))
    plain = list(
        _layers(module, lambda layer: isinstance(layer, _BatchNorm) and not isinstance(layer, MomentumBatchNorm))
    )
    if options and not already and not plain:
        raise ValueError(f"{', '.join(options)} would have no effect: {type(module).__name__} has no BatchNorm")
    for path, layer in plain:
        _check_convertible(path, layer, configuration)

    for _, layer in already:
        layer._reconfigure(configuration, options.keys())
    for _, layer in plain:
        _convert(layer, configuration)
    return module


def convert_batchnorm(
    module: Network,
    *,
    activation: Activation | None = None,
    inplace: bool = False,
    process_group: torch.distributed.ProcessGroup | str | None = None,
) -> Network:
    """Makes every torch BatchNorm in a network one of this library, in place: the same numbers in fewer passes.

    The layer objects stay the same and only change their class, as in :func:`convert_momentum_batchnorm`; their
    ``momentum`` stays, too. A ``SyncBatchNorm`` becomes a :class:`momentum_bn.BatchNorm`, which takes any rank, over
    the same process group. Layers of this library stay as they are.

    Args:
        module: the network, or a single BatchNorm.
        activation: None or ``"relu"``, applied by every layer: the network must not apply it again. See
            :func:`momentum_bn.fuse`, which finds out where this is so.
        inplace: the caller's promise that the network reads no layer's input again.
        process_group: a c10d process group or its name, for every layer; None: a ``SyncBatchNorm`` keeps its group, all
            others are this process's alone.

    Returns:
        ``module``.

    Raises:
        ValueError: an unknown word; an option where there is no BatchNorm to convert; an uninitialised
            ``LazyBatchNorm``; a parametrized layer, or one with a forward of its own. Nothing was changed then.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> type(convert_batchnorm(net)[1])
        <class 'momentum_bn.batch_norm.BatchNorm2d'>
    """
    options = Options(activation=activation, inplace=inplace, process_group=process_group)
    options.check(num_features=0, eps=1e-5)
    layers = list(_layers(module, lambda layer: isinstance(layer, _BatchNorm) and not isinstance(layer, NormLayer)))
    given = {"activation": activation is not None, "inplace": inplace, "process_group": process_group is not None}
    if any(given.values()) and not layers:
        raise ValueError(
            f"{', '.join(name for name in given if given[name])} would have no effect: {type(module).__name__} has no "
            "BatchNorm to convert"
        )
    for path, layer in layers:
        _check_convertible(path, layer, replace(options, momentum=layer.momentum))
    for _, layer in layers:
        origin = _take_origin(layer)
        group = options.process_group
        if origin.layer_class is SyncBatchNorm and group is None:
            group = origin.group_name or _default_group()
        layer.__class__ = _batch_norm_class(layer)
        layer._configure(Options(activation=options.activation, inplace=options.inplace, process_group=group))
        layer.momentum = origin.momentum
        layer.__dict__["_origin"] = origin
    return module


def revert_momentum_batchnorm(module: Network) -> Network:
    """Makes every layer of this library in a network a torch BatchNorm again, in place.

    The layer objects, their parameters, running statistics, hooks and flags stay, as in
    :func:`convert_momentum_batchnorm`; the schedule and remembered views are dropped. A converted layer gets its class
    and momentum back, a ``SyncBatchNorm`` its process group, too; any other becomes torch's layer of its rank (of any
    rank: ``SyncBatchNorm`` over the layer's ``process_group``): a Momentum BatchNorm with torch's momentum of 0.1, a
    BatchNorm with its own. Only ``SyncBatchNorm`` synchronises.

    Args:
        module: the network, or a single layer.

    Returns:
        ``module``.

    Raises:
        ValueError: a layer has a fused activation, which torch's BatchNorm cannot apply, or a forward of its own.
            Nothing was changed then.

    Example:
        >>> revert_momentum_batchnorm(MomentumBatchNorm1d(8, total_iters=1000))
        BatchNorm1d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    layers = list(_layers(module, lambda layer: isinstance(layer, NormLayer)))
    for path, layer in layers:
        if layer.activation is not None:
            raise ValueError(
                f"cannot revert {path}: torch's BatchNorm has no activation (got activation={layer.activation!r}); "
                "only layers with activation=None can be reverted"
            )
        _check_replaceable(path, layer, (NormLayer.forward, NormAct.forward))
    origins = [_origin(layer) for _, layer in layers]
    groups = [None if origin.group_name is None else _group_named(origin.group_name) for origin in origins]
    for (_, layer), origin, group in zip(layers, origins, groups, strict=True):
        _revert(layer, origin, group)
    return module


def _layers(module: torch.nn.Module, wanted: Callable[[torch.nn.Module], bool]) -> Iterator[tuple[str, Any]]:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be a torch.nn.Module (got {type(module).__name__})")
    for path, layer in module.named_modules():
        if wanted(layer):
            yield path or type(layer).__name__, layer


def _check_convertible(path: str, layer: _BatchNorm, options: Options) -> None:
    if isinstance(layer, LazyModuleMixin):
        raise ValueError(
            f"cannot convert {path}: {type(layer).__name__} is uninitialised, run a forward pass before converting"
        )
    _check_replaceable(path, layer, (_BatchNorm.forward, SyncBatchNorm.forward, NormLayer.forward, NormAct.forward))
    try:
        options.check(layer.num_features, layer.eps)
    except ValueError as error:
        raise ValueError(f"cannot convert {path}: {error}") from None


def _check_replaceable(path: str, layer: _BatchNorm, known: tuple[Callable[..., Any], ...]) -> None:
    if parametrize.is_parametrized(layer):
        raise ValueError(f"cannot replace {path}: it is parametrized, remove its parametrizations first")
    if type(layer).forward not in known and not is_norm_act(layer):
        raise ValueError(
            f"cannot replace {path}: {type(layer).__name__} has a forward of its own, which would be lost; "
            "only layers with the forward of the class that they extend can be replaced"
        )


def _convert(layer: _BatchNorm, options: Options) -> None:
    origin = _take_origin(layer)
    if isinstance(layer, BatchNorm):
        # The network relies on what the layer does beside normalising.
        options = replace(
            options,
            activation=options.activation or layer.activation,
            inplace=options.inplace or layer.inplace,
            process_group=options.process_group or layer.process_group,
        )
    layer.__class__ = _momentum_class(layer)
    assert isinstance(layer, MomentumBatchNorm)
    layer._configure(options)
    layer._register_own_state()
    layer.__dict__["_origin"] = origin


def _momentum_class(layer: _BatchNorm) -> type[MomentumBatchNorm]:
    if is_norm_act(layer):
        return MomentumBatchNormAct2d
    return next((ours for theirs, ours, _ in _BY_RANK if isinstance(layer, theirs)), MomentumBatchNorm)


def _batch_norm_class(layer: _BatchNorm) -> type[BatchNorm]:
    if is_norm_act(layer):
        return BatchNormAct2d
    return next((ours for theirs, _, ours in _BY_RANK if isinstance(layer, theirs)), BatchNorm)


def _take_origin(layer: _BatchNorm) -> _Origin:
    """Returns what a layer is, or was before it was converted; removes what its next class does not have."""
    if isinstance(layer, BatchNorm):
        origin = _origin(layer)
        del layer._momentum
        return origin
    group = layer.__dict__.pop("process_group", None)  # a SyncBatchNorm's
    # A group's name stands for it: the group itself could not be copied.
    return _Origin(type(layer), layer.__dict__.pop("momentum"), None if group is None else group.group_name)


def _origin(layer: NormLayer) -> _Origin:
    if "_origin" in layer.__dict__:
        origin: _Origin = layer.__dict__["_origin"]
    else:
        layer_class = next((theirs for theirs, _, _ in _BY_RANK if isinstance(layer, theirs)), SyncBatchNorm)
        group_name = layer.process_group if layer_class is SyncBatchNorm else None
        origin = _Origin(layer_class, _TORCH_MOMENTUM, group_name)
    return origin._replace(momentum=layer._momentum) if isinstance(layer, BatchNorm) else origin


def _revert(layer: _BatchNorm, origin: _Origin, group: Any) -> None:
    of_momentum = isinstance(layer, MomentumBatchNorm)
    for name in (*OWN_STATE, *CONFIGURATION) if of_momentum else (*batch_norm.CONFIGURATION, "_momentum"):
        delattr(layer, name)
    layer.__dict__.pop("_origin", None)
    layer.__class__ = origin.layer_class
    layer.momentum = origin.momentum
    if isinstance(layer, SyncBatchNorm):
        layer.process_group = group


def _default_group() -> str | None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    name: str = distributed.distributed_c10d._get_default_group().group_name
    return name


def _group_named(name: Any) -> Any:
    return torch.distributed.distributed_c10d._resolve_process_group(name)
