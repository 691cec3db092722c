"""Calling a layer as if it were configured in another way."""

from __future__ import annotations

from typing import TypeVar

import torch

__all__ = ["configured"]

Layer = TypeVar("Layer", bound=torch.nn.Module)


def configured(layer: Layer, *, relu: bool = False, inplace: bool = False) -> Layer:
    """A stand-in for ``layer``, for one call, that also rectifies or may take its input's memory.

    It has the layer's fields of this moment, so parameters, buffers and flags are the layer's own. The layer itself
    stays as it is: other threads may be in it.
    """
    kind = type(layer)
    stand_in = kind.__new__(kind)
    fields = stand_in.__dict__
    fields.update(layer.__dict__)
    if relu:
        fields["activation"] = "relu"
    if inplace:
        fields["inplace"] = True
    return stand_in
