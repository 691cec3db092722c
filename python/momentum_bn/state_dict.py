"""State dicts for networks built with torch's own BatchNorm."""

from __future__ import annotations

from typing import Any

import torch

from .momentum_batch_norm import OWN_STATE, MomentumBatchNorm

__all__ = ["plain_state_dict"]


def plain_state_dict(module: torch.nn.Module) -> dict[str, Any]:
    """Returns the state dict of a network, without what torch's BatchNorm does not have.

    Args:
        module: a network with Momentum BatchNorms inside, or such a layer itself.

    Returns:
        ``module.state_dict()`` less ``view_mean_sum``, ``view_var_sum``, ``view_count``, ``cur_iter_state`` and
        ``momentum_state`` of every Momentum BatchNorm: it loads strictly into the same network built with torch's
        BatchNorm. As in ``state_dict()``, the tensors share memory with the network's.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), MomentumBatchNorm1d(8, total_iters=1000))
        >>> plain = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
        >>> plain.load_state_dict(plain_state_dict(net))
        <All keys matched successfully>
    """
    state: dict[str, Any] = module.state_dict()
    # A layer that stands in several places has its keys under each of its names.
    for path, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, MomentumBatchNorm):
            for name in OWN_STATE:
                state.pop(f"{path}.{name}" if path else name, None)
    return state
