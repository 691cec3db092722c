"""The trainer ``m2teacher`` on one process, or on those that torchrun has started.

    python -m momentum_bn.m2teacher pretrain --data folder:IMAGES --out RUN
    torchrun --nproc-per-node 4 -m momentum_bn.m2teacher pretrain --data folder:IMAGES --out RUN

All of it is C++: this joins the processes by torch.distributed and hands them the command line.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from . import _library_path

LIBRARY_VARIABLE = "MOMENTUM_BN_TRAINER_LIBRARY"


def run(arguments: Sequence[str], process_group: str = "") -> int:
    """Runs a command of the trainer in this process.

    Args:
        arguments: the command line, without the program's name.
        process_group: name of the c10d group whose ranks all call this; empty: this process alone.

    Returns:
        The program's exit code.

    Raises:
        ImportError: this installation of the package is without the trainer.
    """
    command = [os.fsencode(text) for text in ("m2teacher", *arguments)]
    library = ctypes.CDLL(str(_library()))
    library.m2teacher_run.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p), ctypes.c_char_p]
    argv = (ctypes.c_char_p * (len(command) + 1))(*command, None)
    code: int = library.m2teacher_run(len(command), argv, process_group.encode())
    return code


def _library() -> Path:
    path = Path(os.environ.get(LIBRARY_VARIABLE) or _library_path.with_name("libm2teacher.so"))
    if not path.is_file():
        raise ImportError(
            f"m2teacher: {path} is not there: momentum_bn was installed without its trainer. From its source tree, "
            "MOMENTUM_BN_TRAINER=1 pip install --no-build-isolation --force-reinstall --no-deps . installs it with the "
            f"trainer (docs/m2teacher.md says what that needs); or set {LIBRARY_VARIABLE} to the library's path."
        )
    return path


def _backend() -> str:
    """What carries gradients between GPUs, if there are any, and all else between CPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"


def main() -> int:
    """Joins the processes that torchrun started, if it did, and runs the command line. Returns the exit code."""
    try:
        _library()
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the trainer has a handler of its own
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return run(sys.argv[1:])
    dist.init_process_group(_backend())
    code = run(sys.argv[1:], dist.distributed_c10d._get_default_group().group_name)
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
