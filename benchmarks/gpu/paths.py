"""Which way the library's CUDA kernels went."""

from __future__ import annotations

import torch

from ..timing import Call

ON_CHIP, SEVERAL_LAUNCHES = "on chip", "several launches"


def path_of(call: Call) -> str:
    """Runs the call once, and returns which way its passes went.

    Nothing where none of them had a choice, as with other layers than ours, or where there are no kernels.
    """
    if not hasattr(torch.ops.momentum_bn, "_cuda_path_counts"):
        call()
        return ""
    before = torch.ops.momentum_bn._cuda_path_counts()
    call()
    after = torch.ops.momentum_bn._cuda_path_counts()
    went = zip((ON_CHIP, SEVERAL_LAUNCHES), before, after, strict=True)
    return ", ".join(path for path, count, count_after in went if count_after > count)
