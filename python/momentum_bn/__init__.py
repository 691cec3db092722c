"""Momentum BatchNorm and momentum teachers for PyTorch (`arXiv 2101.07525 <https://arxiv.org/abs/2101.07525>`_).

The batch normalises itself with a blend of its own statistics and the running ones, and its weight in that blend decays
by a cosine over training: a teacher network needs no large batch and no synchronised BatchNorm.

Example:
    >>> import momentum_bn
    >>> teacher = momentum_bn.MomentumTeacher(encoder, total_iters=epochs * len(loader))
    >>> for view1, view2 in loader:
    ...     teacher.update()
    ...     k1, k2 = teacher(view1), teacher(view2)
"""

# ruff: noqa: E402  (the library is loaded before the modules that look its operators up)

import torch

from ._library import built_as, find_library, load_library, prefix_of

_library_path = find_library(__path__)
load_library(_library_path)

from . import functional, memory
from .batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from .convert import convert_batchnorm, convert_momentum_batchnorm, revert_momentum_batchnorm
from .fuse import fuse, fused_layers, unfuse
from .momentum_batch_norm import MomentumBatchNorm, MomentumBatchNorm1d, MomentumBatchNorm2d, MomentumBatchNorm3d
from .state_dict import plain_state_dict
from .teacher import MomentumTeacher, set_total_iters

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "MomentumBatchNorm",
    "MomentumBatchNorm1d",
    "MomentumBatchNorm2d",
    "MomentumBatchNorm3d",
    "MomentumTeacher",
    "cmake_prefix_path",
    "convert_batchnorm",
    "convert_momentum_batchnorm",
    "functional",
    "fuse",
    "fused_layers",
    "memory",
    "plain_state_dict",
    "revert_momentum_batchnorm",
    "set_total_iters",
    "show_config",
    "unfuse",
]

__version__: str = built_as()[0]

cmake_prefix_path: str = str(prefix_of(_library_path))
"""Where CMake finds the C++ package, as CMAKE_PREFIX_PATH. The package finds torch by itself: docs/install.md."""


def show_config() -> str:
    """Returns what was built and what runs: versions, CPU instruction sets built and in use, accelerators, threads."""
    config: str = torch.ops.momentum_bn._show_config()
    return config
