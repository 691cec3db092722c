"""torch.nn.SyncBatchNorm in operations that every device has: torch's own refuses tensors on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# The same under its name before torch 2.13.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class SyncBatchNorm(nn.BatchNorm2d):
    """As torch's: an all_gather of 2 C + 1 float32 per training forward, an all_reduce of 2 C in the backward pass."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, var, n = _SyncBatchNorm.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (n / (n - 1)), momentum)
        result: Tensor = y
        return result


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.size(1)
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        own = torch.cat([mean, var, mean.new_full((1,), x.numel() / channels)])
        rows = own.new_empty(dist.get_world_size(), own.numel())
        all_gather(rows.view(-1), own)
        counts = rows[:, -1:]
        n = counts.sum()
        mean = (rows[:, :channels] * counts).sum(0) / n
        second_moments = rows[:, channels:-1] + (rows[:, :channels] - mean).square()
        var = (second_moments * counts).sum(0) / n
        y = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), n)
        ctx.mark_non_differentiable(mean, var, n)
        return y, mean, var, n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd, n = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        xhat = (x - mean.view(shape)) * rstd.view(shape)
        dweight, dbias = (dy * xhat).sum((0, 2, 3)), dy.sum((0, 2, 3))
        sums = torch.cat([dweight, dbias])
        dist.all_reduce(sums)
        of_xhat, of_one = (sums / n).chunk(2)
        dx = (dy - of_one.view(shape) - xhat * of_xhat.view(shape)) * (weight * rstd).view(shape)
        return dx, dweight, dbias, None
