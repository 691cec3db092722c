"""Sends the operators of CPU tensors to the operators on CUDA, over kernels that the host emulates.

For a library that has them, as the C++ tests build one (tests/cpp/ops): MOMENTUM_BN_LIBRARY names it.
"""

from __future__ import annotations

import ctypes
import os
from functools import partial

import torch

import momentum_bn

OPERATORS = [
    *("_advance_schedule_", "_backward", "_backward_", "_batch_statistics", "_gradient_of_input", "_gradient_sums"),
    *("_forward_functional", "_forward_train", "_forward_train_", "_teacher_update_"),
]
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_registered = torch.library.Library("momentum_bn", "IMPL")


def install() -> None:
    """From now on the CPU's operators are those on CUDA."""
    assert "emulated" in os.environ["MOMENTUM_BN_LIBRARY"], momentum_bn.show_config()
    for name in OPERATORS:
        operator = getattr(torch.ops.momentum_bn, name).default
        _registered.impl(name, partial(operator.redispatch, _CUDA), "CPU", allow_override=True)


def number(name: str) -> ctypes.c_int:
    """A variable of the emulated runtime: see tests/cpp/ops/cuda/cuda_runtime_api.h."""
    return ctypes.c_int.in_dll(ctypes.CDLL(os.environ["MOMENTUM_BN_LIBRARY"]), name)
