"""torch's BatchNorm with a fused activation and residual, on this library's kernels."""

from __future__ import annotations

import sys
from typing import Literal

import torch
from torch import Tensor

from ._norm_layer import NormLayer, refuse_sync_batchnorm
from ._options import Activation, Options, as_bool, as_float, as_int, as_momentum

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

# The attributes that hold the configuration beyond that of torch's BatchNorm.
CONFIGURATION = ("activation", "inplace", "_process_group")


class BatchNorm(NormLayer):
    r"""torch's BatchNorm over an input of any rank from 2: (N, C) or (N, C, ...), in fewer passes over memory.

    In numbers, errors and state dict it is ``torch.nn.BatchNorm*d`` (with a ``process_group``: ``SyncBatchNorm``). It
    does an activation and a residual in its own passes. Gradients flow through the batch statistics (Ioffe, Szegedy
    2015, arXiv 1502.03167).

    :class:`BatchNorm1d`, :class:`BatchNorm2d` and :class:`BatchNorm3d` take their ranks only. This class takes any: it
    is what a ``torch.nn.SyncBatchNorm`` is converted to.

    Args:
        num_features: number of channels C.
        eps: added to the variance under the square root; positive and finite.
        momentum: weight of the new batch in the running statistics. None: a cumulative average.
        affine: whether there is a weight (and see ``bias``) to learn.
        track_running_stats: False: no buffers; the batch normalises itself, in training and in evaluation.
        activation: None or ``"relu"``, applied to the output in the same pass, after the residual was added.
        inplace: the caller's promise that nobody else reads the input afterwards: the output then takes the input's
            memory where no gradient is recorded, and in evaluation where ``weight`` takes none.
        process_group: a c10d process group, or its name: in training the batch statistics are those of the values of
            all its ranks together. One all_gather per training forward, one all_reduce in its backward pass, none in
            evaluation. The second derivative, forward-mode tangents and torch.func are then not supported. None: this
            process alone.
        bias: False: an affine layer without a bias.
        device: device of parameters and buffers.
        dtype: dtype of parameters and running statistics.

    Shape:
        - input: (N, C) or (N, C, ...), float32, float64, bfloat16 or float16
        - residual: as the input
        - output: as the input, in its suggested memory format

    Raises:
        ValueError: an argument out of range or an unknown word.
        TypeError: an argument of the wrong type.

    Example:
        >>> layer = BatchNorm2d(64, activation="relu")
        >>> layer(torch.randn(32, 64, 28, 28), residual=torch.randn(32, 64, 28, 28)).shape
        torch.Size([32, 64, 28, 28])
    """

    detach_statistics = False
    schedule: Literal["constant"] = "constant"
    variance: Literal["biased"] = "biased"
    views_per_update = 1
    _total_iters = 1

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: Activation | None = None,
        inplace: bool = False,
        process_group: torch.distributed.ProcessGroup | str | None = None,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See the class."""
        num_features = as_int("num_features", num_features)
        eps = as_float("eps", eps)
        affine, bias = as_bool("affine", affine), as_bool("bias", bias)
        track_running_stats = as_bool("track_running_stats", track_running_stats)
        options = Options(momentum=momentum, activation=activation, inplace=inplace, process_group=process_group)
        options.check(num_features, eps)
        super().__init__(num_features, eps, options.momentum, affine, track_running_stats, device=device, dtype=dtype)
        if affine and not bias:
            self.register_parameter("bias", None)
        self._configure(options)

    def _configure(self, options: Options) -> None:
        self.activation = options.activation
        self.inplace = options.inplace
        self._process_group = options.process_group

    @property
    def momentum(self) -> float | None:
        """Weight of the new batch in the running statistics; None: cumulative average.

        Assigning checks as the constructor does.
        """
        if self.activation is not None and not torch.compiler.is_compiling():
            refuse_sync_batchnorm(sys._getframe(1), "BatchNorm with its activation")
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        momentum = as_momentum(value)
        Options(momentum=momentum).check(num_features=0, eps=1e-5)
        self._momentum = momentum

    def _state(self) -> list[Tensor]:
        buffers = self._buffers
        counter = buffers["num_batches_tracked"]
        if counter is None:  # as in layers from before torch had it
            assert buffers["running_mean"] is not None
            counter = torch.zeros((), dtype=torch.int64, device=buffers["running_mean"].device)
        return [buffers["running_mean"], buffers["running_var"], counter]  # type: ignore[list-item]

    def _update_weight(self) -> float | None:
        return self._momentum

    def extra_repr(self) -> str:
        """Returns the arguments, those beyond torch's BatchNorm only where they are not the defaults."""
        words = [
            f"{self.num_features}, eps={self.eps}, momentum={self._momentum}, affine={self.affine}",
            f"track_running_stats={self.track_running_stats}",
        ]
        if self.affine and self.bias is None:
            words.append("bias=False")
        words.extend(
            f"{name}={value!r}"
            for name in ("activation", "inplace", "process_group")
            if (value := getattr(self, name)) not in (None, False)
        )
        return ", ".join(words)


class BatchNorm1d(BatchNorm, torch.nn.BatchNorm1d):
    """torch's BatchNorm1d on this library's kernels. See :class:`BatchNorm`.

    Example:
        >>> BatchNorm1d(128)(torch.randn(32, 128)).shape
        torch.Size([32, 128])
    """

    _check_input_dim = torch.nn.BatchNorm1d._check_input_dim


class BatchNorm2d(BatchNorm, torch.nn.BatchNorm2d):
    """torch's BatchNorm2d on this library's kernels. See :class:`BatchNorm`.

    Example:
        >>> BatchNorm2d(64, activation="relu")(torch.randn(32, 64, 28, 28)).shape
        torch.Size([32, 64, 28, 28])
    """

    _check_input_dim = torch.nn.BatchNorm2d._check_input_dim


class BatchNorm3d(BatchNorm, torch.nn.BatchNorm3d):
    """torch's BatchNorm3d on this library's kernels. See :class:`BatchNorm`.

    Example:
        >>> BatchNorm3d(16)(torch.randn(4, 16, 8, 14, 14)).shape
        torch.Size([4, 16, 8, 14, 14])
    """

    _check_input_dim = torch.nn.BatchNorm3d._check_input_dim
