"""Inputs of every shape and layout that the layers meet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import momentum_bn

LAYERS = {
    1: momentum_bn.MomentumBatchNorm1d,
    2: momentum_bn.MomentumBatchNorm2d,
    3: momentum_bn.MomentumBatchNorm3d,
}
BATCH_NORMS = {1: momentum_bn.BatchNorm1d, 2: momentum_bn.BatchNorm2d, 3: momentum_bn.BatchNorm3d}
TORCH_LAYERS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIXTEEN_BIT = [torch.bfloat16, torch.float16]

LAYOUTS = ["contiguous", "channels_last", "permuted", "sliced", "sliced_channels", "offset", "expanded"]

# What one output may differ by from the rounded float64 reference, at unit scale.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def layer_for(x: Tensor, layers: dict[int, type[nn.Module]] = LAYERS) -> type[nn.Module]:
    """The layer class that takes x."""
    return layers[max(1, x.dim() - 2)]


def as_layout(x: Tensor, layout: str) -> Tensor:
    """x's values (of "expanded": those of its first item) over strides of the named kind."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":  # for 2- and 3-dimensional input: channels innermost, which is the same idea
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":  # batch innermost
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "sliced":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "sliced_channels":
        return torch.cat([x, torch.full_like(x, 7.0)], dim=1)[:, : x.size(1)]
    if layout == "offset":
        flat = torch.cat([x.new_full((3,), 5.0), x.reshape(-1)])
        return flat[3:].view(x.shape)
    assert layout == "expanded", layout
    return x[:1].contiguous().expand_as(x)


def suggested_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of a new tensor of x's shape in x's suggested memory format."""
    from torch._prims_common import suggest_memory_format

    return torch.empty(x.shape, memory_format=suggest_memory_format(x)).stride()


def randn(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0, shift: float = 0.0
) -> Tensor:
    """The same values on every device; on the one of --device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale + shift
    return values.to(torch.get_default_device(), dtype)


def randomise_parameters(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights in [0.5, 1.5], biases in [-0.5, 0.5]."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for parameter in (module.weight, module.bias):
            if parameter is not None:
                values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64, device="cpu") - 0.5
                parameter.copy_(values + 1 if parameter is module.weight else values)
    return module
