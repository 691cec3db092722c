"""What the layer is measured against."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PublishedBatchNorm(nn.BatchNorm2d):
    """Momentum BatchNorm in the published arithmetic: one torch operation for each step of the formulas.

    Restates what the authors' layer computes per forward (two passes for the statistics, unbiased variance times
    n / (n - 1), out-of-place blending, a schedule in Python), for timing only. Takes any rank from 2.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, total_iters: int = 100) -> None:
        super().__init__(num_features, momentum=1.0)
        self.total_iters = total_iters
        self.cur_iter = 0
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean, var = torch.mean(x, dim=dims), torch.var(x, dim=dims)
        n = x.numel() / x.size(1)
        m = self.momentum
        with torch.no_grad():
            blended_mean = m * mean + (1 - m) * self.running_mean
            blended_var = m * var * n / (n - 1) + (1 - m) * self.running_var
        y = (x - blended_mean.view(shape)) / torch.sqrt(blended_var.view(shape) + self.eps)
        y = y * self.weight.view(shape) + self.bias.view(shape)
        if self.last is None:
            self.last = mean.detach(), var.detach()
            return y
        with torch.no_grad():
            self.running_mean = m * ((mean + self.last[0]) * 0.5) + (1 - m) * self.running_mean
            self.running_var = m * ((var + self.last[1]) * 0.5) * n / (n - 1) + (1 - m) * self.running_var
        self.last = None
        self.cur_iter += 1
        self.momentum = (math.cos(math.pi * self.cur_iter / self.total_iters) + 1) * 0.5
        return y


def published_formulas(x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """The same without state, for torch.compile (m = 0.5)."""
    dims = [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean, var = torch.mean(x, dim=dims), torch.var(x, dim=dims)
    n = x.numel() / x.size(1)
    blended_mean = (0.5 * mean + 0.5 * running_mean).detach()
    blended_var = (0.5 * var * n / (n - 1) + 0.5 * running_var).detach()
    y = (x - blended_mean.view(shape)) / torch.sqrt(blended_var.view(shape) + 1e-5)
    return y * weight.view(shape) + bias.view(shape)
