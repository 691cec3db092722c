"""Calling a layer as if it were configured in another way."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["configured"]

Layer = TypeVar("Layer", bound=torch.nn.Module)


def configured(layer: Layer, x: Any, *, relu: bool = False, inplace: bool = False) -> Layer:
    """A stand-in for ``layer``, for one call with ``x``, that also rectifies or may take x's memory.

    It has the layer's fields of this moment, so parameters, buffers and flags are the layer's own. The layer itself
    stays as it is: other threads may be in it.
    """
    kind = type(layer)
    stand_in = kind.__new__(kind)
    fields = stand_in.__dict__
    fields.update(layer.__dict__)
    if relu:
        fields["activation"] = "relu"
    if inplace and type(x) is Tensor:
        fields["inplace"] = True
    return stand_in
