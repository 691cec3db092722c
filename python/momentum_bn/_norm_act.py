"""What timm's BatchNormAct2d is converted to: a normalisation with a dropout and an activation of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._effects import is_untouched
from ._options import Activation
from ._stand_in import configured
from .batch_norm import BatchNorm2d
from .momentum_batch_norm import MomentumBatchNorm2d

__all__ = ["BatchNormAct2d", "MomentumBatchNormAct2d", "NormAct", "is_norm_act"]


def is_norm_act(layer: _BatchNorm) -> bool:
    """Whether ``layer`` is timm's BatchNormAct2d, or was converted from it. timm need not be installed."""
    if isinstance(layer, NormAct):
        return True
    owner = next(kind for kind in type(layer).__mro__ if "forward" in vars(kind))
    return (
        owner.__name__ == "BatchNormAct2d"
        and owner.__module__.partition(".")[0] == "timm"
        and {"drop", "act"} <= layer._modules.keys()
    )


class NormAct(nn.Module):
    """Applies the submodules ``drop`` and ``act`` to the output of the next class in the method resolution order.

    Where ``act`` is a ReLU and ``drop`` does nothing, that class applies the ReLU, in its own pass.
    """

    drop: nn.Module
    act: nn.Module
    activation: Activation | None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002 (torch's name)
        """Normalises, adds the residual, drops and activates.

        Args:
            input: see :class:`momentum_bn.MomentumBatchNorm`, as all that follows.
            residual: added before dropout and activation.
        """
        if not torch.compiler.is_compiling() and _is_relu_alone(self.drop, self.act):
            rectified: Tensor = super(NormAct, configured(self, relu=True)).forward(input, residual)
            return rectified
        y: Any = self.act(self.drop(super().forward(input, residual)))
        return y  # type: ignore[no-any-return]


def _is_relu_alone(drop: nn.Module, act: nn.Module) -> bool:
    return type(act) is nn.ReLU and type(drop) is nn.Identity and is_untouched(act) and is_untouched(drop)


class MomentumBatchNormAct2d(NormAct, MomentumBatchNorm2d):
    """Momentum BatchNorm over (N, C, H, W) with the dropout and the activation of timm's BatchNormAct2d.

    Made by :func:`momentum_bn.convert_momentum_batchnorm`. Both stay the submodules ``drop`` and ``act``.
    """


class BatchNormAct2d(NormAct, BatchNorm2d):
    """BatchNorm over (N, C, H, W) with the dropout and the activation of timm's BatchNormAct2d.

    Made by :func:`momentum_bn.convert_batchnorm`. Both stay the submodules ``drop`` and ``act``.
    """
