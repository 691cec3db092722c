"""Complete copies of a module's state, to be compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# The state under its documented names: as in torch, and what Momentum BatchNorm adds.
PLAIN_STATE = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
OWN_STATE = ["view_mean_sum", "view_var_sum", "view_count", "cur_iter_state", "momentum_state"]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and value of every element, where NaN equals NaN and 0 does not equal -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return torch.equal(a.view(torch.uint8) if a.dim() else a[None].view(torch.uint8),
                       b.view(torch.uint8) if b.dim() else b[None].view(torch.uint8))  # fmt: skip


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything that a forward may change: tensors, what the properties say, training flags and gradients."""
    taken: dict[str, Any] = {name: value.detach().clone() for name, value in module.state_dict().items()}
    for name, child in module.named_modules():
        taken[f"{name}:training"] = child.training
        for attribute in ("momentum", "cur_iter", "total_iters"):
            if hasattr(child, attribute):
                taken[f"{name}:{attribute}"] = getattr(child, attribute)
    for name, parameter in module.named_parameters():
        taken[f"{name}:grad"] = None if parameter.grad is None else parameter.grad.clone()
    return taken


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert same_bits(now[name], value), f"{name}: {now[name]} != {value}"
        else:
            assert now[name] == value, f"{name}: {now[name]} != {value}"


@contextmanager
def unchanged(module: nn.Module, *tensors: Tensor) -> Iterator[None]:
    """What stands inside changes neither the module's state nor the given tensors."""
    before, copies = snapshot(module), [tensor.detach().clone() for tensor in tensors]
    yield
    assert_same(snapshot(module), before)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert same_bits(tensor, copy)
