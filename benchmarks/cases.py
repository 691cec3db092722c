"""The tensors that are normalised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A tensor to normalise: (N, C) or (N, C, H, W)."""

    shape: tuple[int, ...]
    channels_last: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """For example ``bf16 256x56x56 NHWC`` or ``(256, 4096)``; the batch size is told where it is not 32."""
        prefix = {torch.float32: "", torch.bfloat16: "bf16 "}[self.dtype]
        if len(self.shape) == 2:
            return f"{prefix}{self.shape}"
        batch, *rest = self.shape
        layout = "NHWC" if self.channels_last else "NCHW"
        return f"{prefix}{'x'.join(map(str, rest))} {layout}" + (f" batch {batch}" if batch != 32 else "")

    @property
    def channels(self) -> int:
        return self.shape[1]

    def make(self) -> Tensor:
        """Returns a tensor of normal values."""
        x = torch.randn(self.shape).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


def _in_both_layouts(*shape: int, dtype: torch.dtype = torch.float32) -> list[Case]:
    return [Case(shape, channels_last, dtype) for channels_last in (False, True)]


# Layers of a ResNet-50 at 224x224, of float32 but for two.
STAGE_1 = _in_both_layouts(32, 64, 112, 112)
STAGE_2 = _in_both_layouts(32, 256, 56, 56)
STAGE_3 = _in_both_layouts(32, 512, 28, 28)
STAGE_5 = _in_both_layouts(32, 2048, 7, 7)
STAGE_2_BFLOAT16 = _in_both_layouts(32, 256, 56, 56, dtype=torch.bfloat16)
HEAD = Case((256, 4096))
FAR_BEYOND_CACHES = Case((128, 256, 56, 56))
# So small that only the cost of a call is left.
SMALL = Case((32, 64, 8, 8))
SMALLEST = Case((2, 16, 2, 2))

LARGE_CASES = [*STAGE_1, *STAGE_2, *STAGE_3, *STAGE_5, HEAD, *STAGE_2_BFLOAT16, FAR_BEYOND_CACHES]
SMALL_CASES = [SMALL, SMALLEST]
QUICK_CASES = [*STAGE_2, STAGE_5[0], *SMALL_CASES]
