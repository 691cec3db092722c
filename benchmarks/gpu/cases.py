"""The tensors that are normalised on a GPU, and what must be moved for it."""

from __future__ import annotations

import torch

from .. import names
from ..cases import SMALL, SMALLEST, Case

# What follows the convolutions of a ResNet-50 at 224x224: the stem, and the widest of each stage.
_IMAGES = [(64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
BATCHES = [32, 64, 128, 256]

LARGE_CASES = [
    Case((batch, *image), channels_last, dtype)
    for batch in BATCHES
    for image in _IMAGES
    for dtype in (torch.float32, torch.bfloat16)
    for channels_last in (False, True)
]
QUICK_CASES = [case for case in LARGE_CASES if case.shape[0] == 64]
SMALL_CASES = [SMALL, SMALLEST, Case((256, 4096)), Case((32, 512, 7, 7), True, torch.bfloat16)]


def bytes_of(case: Case) -> int:
    size = torch.Size(case.shape).numel()
    return size * case.dtype.itemsize


def tensors_moved(call: str, phase: str) -> int:
    """Tensors of the case's size that a call cannot do without reading or writing.

    Forward: x and the output, and a residual. Backward: the gradient that comes in, x again (for the weight's
    gradient, and for a ReLU's mask) and dx.
    """
    if call == names.COPY:
        return 2
    forward, backward = 3 if "residual" in call else 2, 3
    return {names.FORWARD: forward, names.BACKWARD: backward, names.TRAINING: forward + backward}[phase]


def tensors_read_again(call: str, phase: str) -> int:
    """Tensors that are read a second time where the values of a channel do not stay on chip.

    Forward: x, after its statistics. Backward: x and the gradient, after their sums, where gradients flow through the
    statistics.
    """
    if call == names.COPY:
        return 0
    through_statistics = call.startswith((names.BATCH_NORM, names.TORCH))
    forward, backward = 1, 2 if through_statistics else 0
    return {names.FORWARD: forward, names.BACKWARD: backward, names.TRAINING: forward + backward}[phase]
