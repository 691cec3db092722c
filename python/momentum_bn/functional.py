"""Momentum BatchNorm as a pure function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._options import Options, Variance, as_bool, as_float, as_word

__all__ = ["momentum_batch_norm"]

_check_parameters = torch.ops.momentum_bn._check_parameters.default
_forward_functional = torch.ops.momentum_bn._forward_functional.default


def momentum_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 1.0,
    eps: float = 1e-5,
    variance: Variance = "published",
) -> tuple[Tensor, Tensor, Tensor]:
    """Momentum BatchNorm as a pure function: changes nothing that it is given.

    In training, with b_mean and b_var the batch mean and unbiased batch variance per channel and m the momentum
    (arXiv 2101.07525)::

        y = (x - [m * b_mean + (1 - m) * running_mean]) / sqrt([m * v + (1 - m) * running_var] + eps) * weight + bias

    where v is b_var adjusted as ``variance`` says. The statistics are detached: no gradient flows through them.
    In evaluation it is ``torch.nn.functional.batch_norm`` with the running statistics.

    Args:
        x: (N, C) or (N, C, ...), float32, float64, bfloat16 or float16.
        running_mean: (C), or None: the batch normalises itself alone (m = 1), in training and in evaluation.
        running_var: (C), or None; both or neither.
        weight: (C), or None.
        bias: (C), or None.
        training: whether the batch enters the statistics that normalise it.
        momentum: weight m of the batch, in [0, 1].
        eps: added to the variance under the square root; positive and finite.
        variance: ``"published"``, ``"unbiased"`` or ``"biased"``, see :class:`momentum_bn.MomentumBatchNorm`.

    Returns:
        y of x's shape and dtype, and b_mean and b_var: (C), detached, in float32 for 16-bit input, else in x's dtype;
        empty unless ``training``.

    Raises:
        ValueError: a shape that does not fit, an option out of range, one value per channel.
        TypeError: integer or complex input.

    Example:
        >>> y, b_mean, b_var = momentum_batch_norm(torch.randn(8, 3), torch.zeros(3), torch.ones(3), training=True)
        >>> b_mean.shape
        torch.Size([3])
    """
    training = as_bool("training", training)
    momentum, eps = as_float("momentum", momentum), as_float("eps", eps)
    if training or running_mean is None or running_var is None:
        y, b_mean, b_var, _ = _forward_functional(
            x, weight, bias, running_mean, running_var, momentum, eps, as_word(variance)
        )
        if training:
            return y, b_mean, b_var
    else:
        if not torch.compiler.is_compiling():
            # Checks in a graph would keep it from exporting like torch's BatchNorm.
            Options(momentum=momentum, variance=variance).check(running_mean.numel(), eps)
            _check_parameters(x, weight, bias, running_mean, running_var)
        # torch.nn.functional.batch_norm fails without channels.
        has_channels = running_mean.numel() > 0
        y = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps) if has_channels else x.clone()
    statistics_dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    return y, x.new_empty(0, dtype=statistics_dtype), x.new_empty(0, dtype=statistics_dtype)
