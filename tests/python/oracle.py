"""Momentum BatchNorm in plain float64 torch operations: what the tests compare the product with.

Written from the definition of the layer alone; shares no code with the product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C) -> (1, C, 1, ...) of x's rank."""
    return values.reshape([1, -1] + [1] * (x.dim() - 2))


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Detached float64 batch mean, unbiased batch variance, and the number of values per channel."""
    values = x.detach().to(torch.float64).transpose(0, 1).reshape(x.size(1), -1)
    n = values.size(1)
    mean = values.mean(1)
    return mean, (values - mean[:, None]).square().sum(1) / (n - 1), n


def variance_to_normalise(b_var: Tensor, n: int, variance: str) -> Tensor:
    """The batch's contribution to the variance that normalises."""
    return {"published": b_var * n / (n - 1), "unbiased": b_var, "biased": b_var * (n - 1) / n}[variance]


def variance_to_keep(views_var: Tensor, n: int, variance: str) -> Tensor:
    """The contribution of the views' mean variance to the running variance; n is the last view's."""
    return {"published": views_var * n / (n - 1), "unbiased": views_var, "biased": views_var}[variance]


def cosine_schedule(cur_iter: int, total_iters: int) -> float:
    return (math.cos(math.pi * min(cur_iter, total_iters) / total_iters) + 1) / 2


def teacher_momentum(updates: int, total_iters: int, start: float) -> float:
    return 1 - (1 - start) * cosine_schedule(updates, total_iters)


def normalise(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """float64 output; differentiable in x, weight, bias and residual, not in mean and var."""
    xhat = (x.double() - per_channel(mean.detach().double(), x)) / per_channel((var.detach().double() + eps).sqrt(), x)
    y = xhat if weight is None else xhat * per_channel(weight.double(), x)
    y = y if bias is None else y + per_channel(bias.double(), x)
    y = y if residual is None else y + residual.double()
    return torch.relu(y) if activation == "relu" else y


def functional_oracle(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 1.0,
    eps: float = 1e-5,
    variance: str = "published",
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, b_mean, b_var) of one training forward, in float64."""
    b_mean, b_var, n = batch_statistics(x)
    mean, var = b_mean, variance_to_normalise(b_var, n, variance)
    if running_mean is not None and running_var is not None:
        mean = momentum * mean + (1 - momentum) * running_mean.double()
        var = momentum * var + (1 - momentum) * running_var.double()
    return normalise(x, mean, var, eps, weight, bias), b_mean, b_var


@dataclass
class MomentumBatchNormOracle:
    """The layer's state machine in float64."""

    num_features: int
    eps: float = 1e-5
    momentum: float | None = 1.0
    total_iters: int = 100
    views_per_update: int = 2
    schedule: str = "cosine"
    variance: str = "published"
    activation: str | None = None
    track_running_stats: bool = True
    cur_iter: int = 0
    view_count: int = 0
    num_batches_tracked: int = 0
    running_mean: Tensor = field(init=False)
    running_var: Tensor = field(init=False)
    view_mean_sum: Tensor = field(init=False)
    view_var_sum: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.running_mean = torch.zeros(self.num_features, dtype=torch.float64)
        self.running_var = torch.ones(self.num_features, dtype=torch.float64)
        self.forget_views()

    def forget_views(self) -> None:
        self.view_mean_sum = torch.zeros(self.num_features, dtype=torch.float64)
        self.view_var_sum = torch.zeros(self.num_features, dtype=torch.float64)
        self.view_count = 0

    def read_state(self, module: torch.nn.Module) -> None:
        """Takes over the state of a layer, so that one forward can be compared without what was rounded before."""
        for name in ("running_mean", "running_var", "view_mean_sum", "view_var_sum"):
            setattr(self, name, getattr(module, name).detach().double().clone())
        self.num_batches_tracked = int(module.num_batches_tracked)
        self.view_count = int(module.view_count)
        self.momentum, self.cur_iter = module.momentum, module.cur_iter

    def batch_weight(self) -> float:
        if not self.track_running_stats:
            return 1.0
        return 1 / (self.cur_iter + 1) if self.momentum is None else self.momentum

    def momentum_cosine_decay(self) -> None:
        self.cur_iter += 1
        if self.schedule == "cosine" and self.momentum is not None:
            self.momentum = cosine_schedule(self.cur_iter, self.total_iters)

    def train_forward(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if x.numel() == 0:
            return x.double()
        m = self.batch_weight()
        b_mean, b_var, n = batch_statistics(x)
        mean, var = b_mean, variance_to_normalise(b_var, n, self.variance)
        if self.track_running_stats:
            mean = m * mean + (1 - m) * self.running_mean
            var = m * var + (1 - m) * self.running_var
        y = normalise(x, mean, var, self.eps, weight, bias, residual, self.activation)
        if self.track_running_stats:
            self._remember(b_mean, b_var, n, m)
        return y

    def eval_forward(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if not self.track_running_stats:
            return self.train_forward(x, weight, bias, residual)
        return normalise(x, self.running_mean, self.running_var, self.eps, weight, bias, residual, self.activation)

    def _remember(self, b_mean: Tensor, b_var: Tensor, n: int, m: float) -> None:
        self.num_batches_tracked += 1
        self.view_mean_sum = self.view_mean_sum + b_mean
        self.view_var_sum = self.view_var_sum + b_var
        self.view_count += 1
        if self.view_count < self.views_per_update:
            return
        kept_var = variance_to_keep(self.view_var_sum / self.view_count, n, self.variance)
        self.running_mean = m * (self.view_mean_sum / self.view_count) + (1 - m) * self.running_mean
        self.running_var = m * kept_var + (1 - m) * self.running_var
        self.forget_views()
        self.momentum_cosine_decay()


class PublishedFormulas:
    """The arithmetic of `zengarden/momentum2-teacher`, operation by operation, in the dtype of its input."""

    def __init__(self, num_features: int, total_iters: int, eps: float = 1e-5, dtype: torch.dtype = torch.float64):
        self.total_iters, self.eps = total_iters, eps
        self.momentum, self.cur_iter = 1.0, 0
        self.running_mean = torch.zeros(num_features, dtype=dtype)
        self.running_var = torch.ones(num_features, dtype=dtype)
        self.weight = torch.ones(num_features, dtype=dtype)
        self.bias = torch.zeros(num_features, dtype=dtype)
        self.first_view: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        dims = [d for d in range(x.dim()) if d != 1]
        mean, var, n, m = torch.mean(x, dims), torch.var(x, dims), x.numel() / x.size(1), self.momentum
        used_mean = m * mean + (1 - m) * self.running_mean
        used_var = m * var * n / (n - 1) + (1 - m) * self.running_var
        y = (x - per_channel(used_mean, x)) / torch.sqrt(per_channel(used_var, x) + self.eps)
        y = y * per_channel(self.weight, x) + per_channel(self.bias, x)
        if self.first_view is None:
            self.first_view = mean, var
        else:
            mean, var = (mean + self.first_view[0]) * 0.5, (var + self.first_view[1]) * 0.5
            self.running_mean = m * mean + (1 - m) * self.running_mean
            self.running_var = m * var * n / (n - 1) + (1 - m) * self.running_var
            self.first_view = None
            self.cur_iter += 1
            self.momentum = (math.cos(math.pi * (self.cur_iter / self.total_iters)) + 1) * 0.5
        return y
