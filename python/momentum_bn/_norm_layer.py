"""What the layers of this library have in common."""

from __future__ import annotations

from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ._options import Activation, Schedule, Variance, as_group_name

# torch's function of this name, and those made after it (timm's), replace every subclass of torch's BatchNorm without
# asking it, and read `momentum` of each.
_CONVERT_SYNC_BATCHNORM = torch.nn.SyncBatchNorm.convert_sync_batchnorm.__name__

# Looked up once: attribute look-ups in torch.ops cost more than the dispatch.
_batch_statistics = torch.ops.momentum_bn._batch_statistics.default
_check_input = torch.ops.momentum_bn._check_input.default
_forward_eval_ = torch.ops.momentum_bn._forward_eval_.default
_forward_train = torch.ops.momentum_bn._forward_train.default
_forward_train_ = torch.ops.momentum_bn._forward_train_.default


class NormLayer(torch.nn.modules.batchnorm._BatchNorm):
    """A BatchNorm with a fused activation, a residual and a process group, over an input of any rank from 2.

    What a subclass adds is its state and how the batch enters it: the attributes below, and :meth:`_state`.
    """

    activation: Activation | None
    inplace: bool
    _process_group: str | None
    # What a training forward is given; see the operators' schemas.
    detach_statistics: bool
    schedule: Schedule
    variance: Variance
    views_per_update: int
    _total_iters: int

    def _state(self) -> list[Tensor]:
        """The buffers of a layer that tracks, in the operators' order."""
        raise NotImplementedError

    def _update_weight(self) -> float | None:
        """The batch's weight in the update of the running statistics, where the state does not hold it."""
        raise NotImplementedError

    @property
    def process_group(self) -> str | None:
        """Name of the process group whose values make the batch statistics. Configuration, not state."""
        return self._process_group

    @process_group.setter
    def process_group(self, value: Any) -> None:
        self._process_group = as_group_name(value)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002 (torch's name)
        """Normalises ``input``; in training also updates the state.

        Args:
            input: (N, C) or (N, C, ...) of the layer's rank; float32, float64, bfloat16 or float16.
            residual: of the input's shape and dtype, added before the activation.

        Returns:
            The output, of the input's shape and dtype. With ``inplace`` it may be ``input`` itself. An empty input
            gives an empty output and changes nothing.

        Raises:
            ValueError: wrong rank or number of channels, a residual that does not fit, one value per channel in
                training, or a training forward inside a backward pass (plain ``torch.utils.checkpoint``).
            TypeError: integer or complex input, a residual that is no tensor.
        """
        self._check_input_dim(input)
        # Straight from the dicts: Module.__getattr__ would cost more than the rest of this function.
        parameters = self._parameters
        # Replicas, pruned and otherwise wrapped layers have a parameter as a plain attribute.
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401 (self.weight is slow)
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (self.bias is slow)
        buffers = self._buffers
        running_mean = buffers["running_mean"]
        if residual is not None and not isinstance(residual, Tensor):
            raise TypeError(f"residual must be a tensor or None (got {type(residual).__name__})")
        may_overwrite = self.inplace and self._may_overwrite(input, residual, weight, bias)

        if self.training or running_mean is None:
            tracks = self.track_running_stats and running_mean is not None
            if not tracks:
                self._check_fits(input, residual)
            # In evaluation a batch that normalises itself does so by itself.
            group = self._process_group if self.training else None
            gathered = None
            if group is not None and torch.compiler.is_compiling():
                gathered = _all_gathered(_batch_statistics(input), group)
                if self.detach_statistics:
                    group = None  # the backward pass asks the others for nothing
            train = _forward_train_ if may_overwrite else _forward_train
            out = train(
                input,
                residual,
                weight,
                bias,
                self._state() if tracks else [],
                self.eps,
                self._update_weight(),
                self._total_iters,
                self.views_per_update,
                self.schedule,
                self.variance,
                self.detach_statistics,
                self.activation,
                group,
                gathered,
            )
            return input if may_overwrite else out[0]

        running_var = buffers["running_var"]
        if may_overwrite and not torch.compiler.is_compiling():
            _forward_eval_(input, residual, weight, bias, running_mean, running_var, self.eps, self.activation)
            return input
        return self._forward_eval(input, residual, weight, bias, running_mean, running_var)

    def _check_fits(self, x: Tensor, residual: Tensor | None) -> None:
        """Checks the input where no operator of ours does: against num_features, or before torch's operator runs."""
        if torch.jit.is_tracing():
            return
        # The operator only where there is something to refuse: it would keep a graph from exporting.
        if (
            x.shape[1] != self.num_features
            or not x.is_floating_point()
            or (
                residual is not None
                and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device)
            )
        ):
            _check_input(x, residual, self.num_features)

    def _forward_eval(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor | None,
    ) -> Tensor:
        self._check_fits(x, residual)
        if self.activation not in (None, "relu"):  # it may have been assigned
            raise ValueError(f"activation must be None or 'relu' (got {self.activation!r})")
        if self.num_features == 0:  # torch.nn.functional.batch_norm fails without channels
            return x.clone()
        y = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, self.eps)
        if residual is not None:
            y = y + residual
        return torch.relu(y) if self.activation == "relu" else y

    def _may_overwrite(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Whether no gradient that is recorded needs the input again."""
        if not torch.is_grad_enabled():
            return True
        if weight is not None and weight.requires_grad:
            return False
        if not self.detach_statistics and (self.training or self._buffers["running_mean"] is None):
            others = (x, residual, bias)
            if any(tensor is not None and tensor.requires_grad for tensor in others):
                return False
        # Selective checkpointing is a dispatch mode that keeps what operators return: one that returns its result in x
        # would leave x as it was when the pass is repeated.
        return torch.compiler.is_compiling() or not is_in_torch_dispatch_mode()


def _all_gathered(values: Tensor, group: str) -> Tensor:
    """``values`` (size) of all ranks of a group, (ranks, size), by an operator that compilers know for a collective.

    They never change the order of two of these, which must be the same on all ranks.
    """
    ranks = torch.distributed.distributed_c10d._get_group_size_by_name(group)  # type: ignore[arg-type]
    collectives = torch.ops._c10d_functional
    rows: Tensor = collectives.wait_tensor(collectives.all_gather_into_tensor(values, ranks, group))
    return rows.view(ranks, -1)


def refuse_sync_batchnorm(reader: FrameType, what: str) -> None:
    """Raises RuntimeError where ``reader`` is the function that would replace the layer whose attribute it reads."""
    if reader.f_code.co_name == _CONVERT_SYNC_BATCHNORM:
        raise RuntimeError(
            f"convert_sync_batchnorm would replace {what} by SyncBatchNorm, which has none of "
            "that. Give the layers a process_group instead, or call it on the parts of the network that have torch's "
            "BatchNorm, or before the others are converted."
        )
