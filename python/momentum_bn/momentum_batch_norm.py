"""The Momentum BatchNorm layers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ._norm_layer import NormLayer, refuse_sync_batchnorm
from ._options import (
    Activation,
    Options,
    Schedule,
    Variance,
    as_bool,
    as_float,
    as_int,
    as_momentum,
)

__all__ = ["MomentumBatchNorm", "MomentumBatchNorm1d", "MomentumBatchNorm2d", "MomentumBatchNorm3d"]

# The state that torch's BatchNorm does not have, in the operators' order.
OWN_STATE = ("view_mean_sum", "view_var_sum", "view_count", "cur_iter_state", "momentum_state")
# The attributes that hold the configuration beyond that of torch's BatchNorm.
CONFIGURATION = (
    "_total_iters",
    "views_per_update",
    "schedule",
    "variance",
    "activation",
    "inplace",
    "detach_statistics",
    "_process_group",
    "_initial_momentum",
    "_untracked_momentum",
    "_untracked_cur_iter",
)
# What extra_repr shows where it is not the default.
_OPTIONAL = (
    "views_per_update",
    "schedule",
    "variance",
    "activation",
    "inplace",
    "process_group",
    "detach_statistics",
)
_VIEW_SUMS = ("view_mean_sum", "view_var_sum")
# Kept in their own dtypes, whatever the layer is cast to.
_SCALARS = ("num_batches_tracked", "view_count", "cur_iter_state", "momentum_state")
# What stands for momentum=None in momentum_state.
_CUMULATIVE = -1.0

# Looked up once: attribute look-ups in torch.ops cost more than the dispatch.
_advance_schedule_ = torch.ops.momentum_bn._advance_schedule_.default
_scheduled_momentum = torch.ops.momentum_bn._scheduled_momentum.default


class MomentumBatchNorm(NormLayer):
    r"""Momentum BatchNorm over an input of any rank from 2: (N, C) or (N, C, ...).

    The layer of `Momentum^2 Teacher <https://arxiv.org/abs/2101.07525>`_. In training the batch normalises
    itself with a blend of its own statistics and the running ones

    .. math::

        y = \frac{x - [m \mu_b + (1 - m) \mu]}{\sqrt{[m v + (1 - m) \sigma^2] + \epsilon}} \gamma + \beta

    with :math:`\mu_b` and :math:`v` the mean and variance of the batch, :math:`\mu` and :math:`\sigma^2` the running
    ones, and *m* the current ``momentum``. The statistics are detached: no gradient flows through them. After
    ``views_per_update`` training forwards the means of their statistics enter the running ones,
    :math:`\mu \leftarrow m \bar\mu_b + (1 - m) \mu`, and the weight of the batch decays:

    .. math::

        m \leftarrow (\cos(\pi \min(t, T) / T) + 1) / 2, \quad t = \text{cur\_iter}, T = \text{total\_iters}

    In evaluation the running statistics normalise, as in torch's BatchNorm, and nothing changes.

    :class:`MomentumBatchNorm1d`, :class:`MomentumBatchNorm2d` and :class:`MomentumBatchNorm3d` take their ranks only.
    This class takes any: it is what a ``torch.nn.SyncBatchNorm`` is converted to.

    Args:
        num_features: number of channels C.
        eps: added to the variance under the square root; positive and finite.
        momentum: weight of the new batch in [0, 1] until the schedule first moves it, towards 0. (The
            ``param_momentum`` of a teacher is the weight of the old, and goes to 1.) None: a cumulative average, weight
            1 / (cur_iter + 1), and no schedule.
        affine: whether there is a weight (and see ``bias``) to learn.
        track_running_stats: False: no buffers; the batch normalises itself alone, in training and in evaluation.
        total_iters: updates after which the batch has no weight left (momentum 0) and the running statistics stand
            still; at least 1. The default of 100 is short: give the number of updates of the training.
        views_per_update: training forwards per update of the running statistics: 2 in the paper (two augmented views
            per step), 1 where all views come in one forward, 2k where a step accumulates gradients over k batches of
            two views; at least 1.
        schedule: ``"cosine"``, or ``"constant"``: momentum stays, only ``cur_iter`` advances.
        variance: which variance v of the batch enters the blend, and which the running variance, with n values per
            channel and b_var their unbiased variance: ``"published"`` b_var * n / (n - 1) in both, as the authors'
            code; ``"unbiased"`` b_var in both; ``"biased"`` b_var * (n - 1) / n in the blend and b_var in the running
            variance, as torch's BatchNorm.
        activation: None or ``"relu"``, applied to the output in the same pass, after the residual was added.
        inplace: the caller's promise that nobody else reads the input afterwards, as with
            ``torch.nn.ReLU(inplace=True)``. The output then takes the input's memory wherever no enabled gradient needs
            the input again: under ``torch.no_grad()``, or where ``weight`` takes no gradient. Elsewhere the output is
            fresh. In a network that reads the input again (a pre-activation block adds it to its result) the promise
            is false, and so is the network's result.
        process_group: a c10d process group, or its name: in training the batch statistics are those of the values of
            all its ranks together, and n is their number. A rank's batch may be empty. One all_gather per training
            forward, none in the backward pass and in evaluation; gradients of weight and bias are the rank's own.
            None: this process alone. See docs/distributed.md.
        detach_statistics: False: gradients flow through the batch's share of the statistics, as in torch's BatchNorm;
            with a ``process_group`` that takes one all_reduce in the backward pass.
        bias: False: an affine layer without a bias.
        device: device of parameters and buffers.
        dtype: dtype of parameters and running statistics.

    Shape:
        - input: (N, C) or (N, C, ...), float32, float64, bfloat16 or float16
        - residual: as the input
        - output: as the input, in its suggested memory format

    Attributes:
        weight, bias: parameters (C), or None.
        running_mean, running_var: buffers (C).
        num_batches_tracked: int64 buffer, training forwards so far.
        view_mean_sum, view_var_sum: buffers (C), sums of the batch means and of the unbiased batch variances of the
            views since the last update; float32 where the layer has 16 bits.
        view_count: int64 buffer, how many views these sums hold.
        cur_iter_state: int64 buffer, updates so far. Read and write it as ``cur_iter``.
        momentum_state: float64 buffer, current weight of the batch, -1 for None. Read and write it as ``momentum``.
        total_iters: int, may be assigned at any time; a compiled graph then recompiles.
        process_group: name of the group, or None; may be assigned at any time, also a group itself.

    All buffers are in ``state_dict()``: a run continues from it bit for bit, also between two views. The four scalars
    keep their dtype whatever the layer is cast to; a device without float64 keeps momentum in float32. A state dict of
    torch's BatchNorm loads strictly, too: the schedule then stays where it is and remembered views are dropped.

    Note:
        A batch with infinity or NaN in it spoils the running statistics for good, as every update keeps a part of the
        old ones. (torch's BatchNorm normalises a training batch by itself, and so recovers.) docs/state.md says what to
        do.

        ``torch.optim.swa_utils.update_bn`` calls ``reset_running_stats()`` and so starts the schedule anew; its
        cumulative average counts updates, of ``views_per_update`` batches each.
        ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` would replace these layers with plain ones: they refuse it.

    Raises:
        ValueError: an argument out of range or an unknown word.
        TypeError: an argument of the wrong type.

    Example:
        >>> layer = MomentumBatchNorm2d(64, total_iters=10_000, activation="relu")
        >>> layer(torch.randn(32, 64, 28, 28)).shape
        torch.Size([32, 64, 28, 28])
    """

    detach_statistics = True
    view_mean_sum: Tensor | None
    view_var_sum: Tensor | None
    view_count: Tensor | None
    cur_iter_state: Tensor | None
    momentum_state: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 1.0,
        affine: bool = True,
        track_running_stats: bool = True,
        total_iters: int = 100,
        *,
        views_per_update: int = 2,
        schedule: Schedule = "cosine",
        variance: Variance = "published",
        activation: Activation | None = None,
        inplace: bool = False,
        process_group: torch.distributed.ProcessGroup | str | None = None,
        detach_statistics: bool = True,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See the class."""
        num_features = as_int("num_features", num_features)
        eps = as_float("eps", eps)
        affine, bias = as_bool("affine", affine), as_bool("bias", bias)
        track_running_stats = as_bool("track_running_stats", track_running_stats)
        options = Options(
            total_iters,
            momentum,
            views_per_update,
            schedule,
            variance,
            activation,
            inplace,
            process_group,
            detach_statistics,
        )
        options.check(num_features, eps)
        # Before torch's constructor, which assigns momentum: that assignment is checked against the options.
        self._configure(options)
        super().__init__(num_features, eps, options.momentum, affine, track_running_stats, device=device, dtype=dtype)
        if affine and not bias:
            self.register_parameter("bias", None)
        self._register_own_state()

    def _configure(self, options: Options) -> None:
        self._total_iters = options.total_iters
        self.views_per_update = options.views_per_update
        self.schedule = options.schedule
        self.variance = options.variance
        self.activation = options.activation
        self.inplace = options.inplace
        self.detach_statistics = options.detach_statistics
        # By name: a group itself could be neither copied nor pickled.
        self._process_group: str | None = options.process_group
        self._initial_momentum = options.momentum
        # Where the layer does not track, these are all the schedule that there is.
        self._untracked_momentum = options.momentum
        self._untracked_cur_iter = 0

    def _reconfigure(self, options: Options, given: Collection[str]) -> None:
        """Takes ``total_iters`` and those options that are named in ``given``; all others stay as they are."""
        self._total_iters = options.total_iters
        for name in set(given) - {"momentum", "process_group"}:
            setattr(self, name, getattr(options, name))
        if "process_group" in given:
            self._process_group = options.process_group
        if "momentum" in given:
            self._initial_momentum = options.momentum
            state = self._buffers.get("momentum_state")
            if state is None or not state.is_meta:
                self.momentum = options.momentum

    def _state(self) -> list[Tensor]:
        buffers = self._buffers
        # Never None in a layer that tracks.
        return [
            buffers["running_mean"],  # type: ignore[list-item]
            buffers["running_var"],  # type: ignore[list-item]
            buffers["num_batches_tracked"],  # type: ignore[list-item]
            buffers["view_mean_sum"],  # type: ignore[list-item]
            buffers["view_var_sum"],  # type: ignore[list-item]
            buffers["view_count"],  # type: ignore[list-item]
            buffers["cur_iter_state"],  # type: ignore[list-item]
            buffers["momentum_state"],  # type: ignore[list-item]
        ]

    def _update_weight(self) -> None:
        return None  # it is in the state

    def _register_own_state(self) -> None:
        mean = self._buffers["running_mean"]
        if mean is None:
            for name in OWN_STATE:
                self.register_buffer(name, None)
            return
        for name in _VIEW_SUMS:
            self.register_buffer(name, torch.zeros_like(mean, dtype=_sum_dtype(mean.dtype)))
        for name in _SCALARS:
            # The first of them is torch's own, and missing in layers from before it had that.
            if self._buffers.get(name) is None:
                self.register_buffer(name, self._new_scalar(name, mean.device))

    def _new_scalar(self, name: str, device: torch.device) -> Tensor:
        if name != "momentum_state":
            return torch.zeros((), dtype=torch.int64, device=device)
        momentum = _CUMULATIVE if self._initial_momentum is None else self._initial_momentum
        return torch.full((), momentum, dtype=_scalar_dtype(name, device), device=device)

    def _scalar_on(self, device: torch.device, name: str, scalar: Tensor) -> Tensor:
        """The scalar on ``device`` in its own dtype; as the constructor made it, where it held no value (meta)."""
        if scalar.is_meta and device.type != "meta":
            return self._new_scalar(name, device)
        return scalar.to(device, _scalar_dtype(name, device))

    @property
    def momentum(self) -> float | None:
        """Current weight of the batch in the blend; None: cumulative average. Reading it may wait for a GPU.

        Assigning checks as the constructor does.
        """
        if not torch.compiler.is_compiling():
            refuse_sync_batchnorm(sys._getframe(1), "Momentum BatchNorm with its schedule")
        state = self._buffers.get("momentum_state")
        if state is None:
            return self._untracked_momentum
        if state.is_meta:
            return self._initial_momentum
        value = float(state.item())
        return None if value == _CUMULATIVE else value

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        momentum = as_momentum(value)
        Options(self._total_iters, momentum).check(self.num_features, self.eps)
        state = self._buffers.get("momentum_state")
        if state is None:
            self._untracked_momentum = momentum
        else:
            _write("momentum", state, _CUMULATIVE if momentum is None else momentum)

    @property
    def cur_iter(self) -> int:
        """Updates of the running statistics so far. Reading it may wait for a GPU.

        Assigning leaves ``momentum`` as it is.
        """
        state = self._buffers.get("cur_iter_state")
        if state is None:
            return self._untracked_cur_iter
        return 0 if state.is_meta else int(state.item())

    @cur_iter.setter
    def cur_iter(self, value: int) -> None:
        cur_iter = as_int("cur_iter", value)
        if cur_iter < 0:
            raise ValueError(f"cur_iter must be at least 0 (got {cur_iter})")
        state = self._buffers.get("cur_iter_state")
        if state is None:
            self._untracked_cur_iter = cur_iter
        else:
            _write("cur_iter", state, cur_iter)

    @property
    def total_iters(self) -> int:
        """Updates after which the batch has no weight left. Configuration, not state."""
        return self._total_iters

    @total_iters.setter
    def total_iters(self, value: int) -> None:
        self._total_iters = checked_total_iters(value)

    def momentum_cosine_decay(self) -> None:
        """Adds 1 to ``cur_iter`` and gives ``momentum`` the value that the schedule has there.

        A training forward that completes an update does so by itself. With ``schedule="constant"`` or
        ``momentum=None`` only ``cur_iter`` advances.
        """
        buffers = self._buffers
        cur_iter, momentum = buffers.get("cur_iter_state"), buffers.get("momentum_state")
        if cur_iter is not None and momentum is not None:
            _advance_schedule_(cur_iter, momentum, self._total_iters, self.schedule)
            return
        self._untracked_cur_iter += 1
        if self.schedule == "cosine" and self._untracked_momentum is not None:
            self._untracked_momentum = _scheduled_momentum(self._untracked_cur_iter, self._total_iters)

    def reset_running_stats(self) -> None:
        """Makes all of the state new: running statistics, views, ``cur_iter`` 0, ``momentum`` the constructor's."""
        super().reset_running_stats()
        if self.track_running_stats or self._buffers.get("momentum_state") is None:
            self._restart_schedule()

    def _restart_schedule(self) -> None:
        """Forgets the views, makes ``cur_iter`` 0 and ``momentum`` the constructor's; running statistics stay."""
        self._untracked_momentum = self._initial_momentum
        self._untracked_cur_iter = 0
        cur_iter, momentum = self._buffers.get("cur_iter_state"), self._buffers.get("momentum_state")
        if cur_iter is not None and momentum is not None:
            self._forget_views()
            cur_iter.zero_()
            momentum.fill_(_CUMULATIVE if self._initial_momentum is None else self._initial_momentum)

    def reset_parameters(self) -> None:
        """Makes all of the state new, the weight 1 and the bias 0."""
        self.reset_running_stats()
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def _forget_views(self) -> None:
        for name in (*_VIEW_SUMS, "view_count"):
            buffer = self._buffers[name]
            assert buffer is not None
            buffer.zero_()

    def extra_repr(self) -> str:
        """Returns the arguments, those beyond torch's BatchNorm only where they are not the defaults."""
        words = [
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}",
            f"track_running_stats={self.track_running_stats}, total_iters={self._total_iters}",
        ]
        if self.affine and self.bias is None:
            words.append("bias=False")
        defaults = Options()
        for name in _OPTIONAL:
            value = getattr(self, name)
            if value != getattr(defaults, name):
                words.append(f"{name}={value!r}")
        return ", ".join(words)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MomentumBatchNorm:
        """Casts or moves everything, but never casts the schedule and the counters, nor the sums to 16 bits."""
        buffers = self._buffers
        scalars = {name: scalar for name in _SCALARS if (scalar := buffers.get(name)) is not None}
        for name in scalars:
            buffers[name] = None  # hidden from `fn`
        # Not running_mean, which torch.func.replace_all_batch_norm_modules_ takes away.
        sums = {name: views for name in _VIEW_SUMS if (views := buffers.get(name)) is not None}
        before = sums.get("view_mean_sum")
        was_meta = before is not None and before.is_meta
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            buffers.update(scalars)
        after = buffers.get("view_mean_sum")
        if before is None or after is None:
            return self
        for name, views in sums.items():
            buffers[name] = _at_least_float32(views, buffers[name])
        for name, scalar in scalars.items():
            buffers[name] = self._moved_scalar(name, scalar, fn, after.device)
        if was_meta and not after.is_meta:
            self._forget_views()
        return self

    def _moved_scalar(self, name: str, scalar: Tensor, fn: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
        if scalar.device != device:
            return self._scalar_on(device, name, scalar)
        # Shared, pinned or copied memory. A fresh tensor (to_empty) gets the value, too: it is never undefined.
        moved = fn(scalar)
        if moved.dtype != scalar.dtype:
            return scalar
        if moved is not scalar:
            with torch.no_grad():
                moved.copy_(scalar)
        return moved

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Also accepts the five keys of torch's BatchNorm."""
        errors_before = len(error_msgs)
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        # After torch's loading, and so after hooks that rename keys.
        if self._buffers.get("running_mean") is not None and self._buffers.get("momentum_state") is not None:
            self._follow_running_mean()
            own_keys = {prefix + name for name in OWN_STATE}
            has_statistics = prefix + "running_mean" in state_dict and prefix + "running_var" in state_dict
            if has_statistics and own_keys.isdisjoint(state_dict):
                missing = [key for key in missing if key not in own_keys]
                if len(error_msgs) == errors_before:
                    self._forget_views()
        missing_keys.extend(missing)

    def _follow_running_mean(self) -> None:
        """Brings our own buffers to the device and dtype that loading with ``assign=True`` gave the running mean."""
        buffers = self._buffers
        mean = buffers["running_mean"]
        assert mean is not None
        for name in _VIEW_SUMS:
            views = buffers[name]
            assert views is not None
            dtype = _sum_dtype(mean.dtype)
            lacks_values = views.is_meta and not mean.is_meta
            buffers[name] = torch.zeros_like(mean, dtype=dtype) if lacks_values else views.to(mean.device, dtype)
        for name in _SCALARS:
            scalar = buffers[name]
            assert scalar is not None
            buffers[name] = self._scalar_on(mean.device, name, scalar)


class MomentumBatchNorm1d(MomentumBatchNorm, torch.nn.BatchNorm1d):
    """Momentum BatchNorm over (N, C) or (N, C, L). See :class:`MomentumBatchNorm`.

    Example:
        >>> MomentumBatchNorm1d(128, total_iters=10_000)(torch.randn(32, 128)).shape
        torch.Size([32, 128])
    """

    _check_input_dim = torch.nn.BatchNorm1d._check_input_dim


class MomentumBatchNorm2d(MomentumBatchNorm, torch.nn.BatchNorm2d):
    """Momentum BatchNorm over (N, C, H, W). See :class:`MomentumBatchNorm`.

    Example:
        >>> MomentumBatchNorm2d(64, total_iters=10_000)(torch.randn(32, 64, 28, 28)).shape
        torch.Size([32, 64, 28, 28])
    """

    _check_input_dim = torch.nn.BatchNorm2d._check_input_dim


class MomentumBatchNorm3d(MomentumBatchNorm, torch.nn.BatchNorm3d):
    """Momentum BatchNorm over (N, C, D, H, W). See :class:`MomentumBatchNorm`.

    Example:
        >>> MomentumBatchNorm3d(16, total_iters=10_000)(torch.randn(4, 16, 8, 14, 14)).shape
        torch.Size([4, 16, 8, 14, 14])
    """

    _check_input_dim = torch.nn.BatchNorm3d._check_input_dim


def checked_total_iters(value: Any) -> int:
    """Returns ``value`` as an int. Raises TypeError, or ValueError below 1."""
    options = Options(total_iters=value)
    options.check(num_features=0, eps=1e-5)
    return options.total_iters


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums of the views beside statistics of ``dtype``: a sum may overflow float16 where the mean fits."""
    return torch.promote_types(dtype, torch.float32)


def _at_least_float32(before: Tensor, cast: Tensor | None) -> Tensor | None:
    """``cast``, or the sums ``before`` that cast where this had fewer bits than sums need."""
    if cast is None or cast.dtype == _sum_dtype(cast.dtype):
        return cast
    return before.to(cast.device, _sum_dtype(cast.dtype))


def _scalar_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "momentum_state":
        return torch.int64
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def _write(name: str, state: Tensor, value: float) -> None:
    if state.is_meta:
        raise RuntimeError(
            f"{name} cannot be assigned on the meta device, which holds no values: materialize the layer"
        )
    with torch.no_grad():
        state.fill_(value)
