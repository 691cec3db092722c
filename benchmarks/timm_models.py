"""timm's models, the first of each family; without torchvision, too, of which the models need next to nothing."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

TIMM_VERSION = "1.0.31"  # of which docs/networks.md tells


def import_timm() -> Any:
    """timm, beside stand-ins for torchvision's classes where there are none. Raises ImportError without timm."""
    stands_in = importlib.util.find_spec("torchvision") is None
    finder = _TorchvisionFinder()
    if stands_in:
        sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            import timm
    finally:
        if stands_in:
            sys.meta_path.remove(finder)
            # Nobody else is to take the stand-ins for torchvision.
            for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
    return timm


def families() -> dict[str, str]:
    """The first model of each family, which is the first part of a model's name."""
    first: dict[str, str] = {}
    for name in import_timm().list_models():
        first.setdefault(name.partition("_")[0], name)
    return first


def create(name: str, on_meta: bool = False) -> nn.Module:
    """A model with random parameters; with ``on_meta`` without values, where its constructor can do without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if on_meta:
            # A few constructors read values.
            with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
                model: nn.Module = import_timm().create_model(name)
                return model
        return import_timm().create_model(name)  # type: ignore[no-any-return]


def has_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def smallest_side(model: Any, wanted: int) -> int:
    """The side of the images that the model takes: the wanted one, or the only one that it can take."""
    configuration = model.pretrained_cfg
    fixed = configuration.get("fixed_input_size", False)
    side: int = configuration["input_size"][-1] if fixed else wanted
    return side


class _StandIn(type):
    """A class that has every attribute that is asked of it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Torchvision(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(name, (nn.Module,), {})


class _TorchvisionFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        is_ours = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Torchvision(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        del module


def all_with_batchnorm() -> Iterator[tuple[str, str]]:
    """The families whose first model has a BatchNorm, and that model."""
    for family, name in families().items():
        if has_batchnorm(create(name, on_meta=True)):
            yield family, name
