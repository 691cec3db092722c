"""The C++ trainer in this process, from the shared library that ``ninja -C build m2teacher_benchmark`` builds."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch  # noqa: F401  (the library takes torch's from this process)

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = REPOSITORY / "apps/m2teacher/recipes/fashion_mnist.toml"
# Where Debian's package puts the demo's images.
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
LIBRARY = REPOSITORY / "build/lib/libm2teacher_benchmark.so"


class Trainer:
    """One training run.

    ``config`` is a config.toml with the recipe; ``norm`` of the teacher is ``momentum``, ``published`` or ``identity``;
    with ``kept`` a few batches are read once and used again and again.
    """

    def __init__(self, data: str, config: Path, norm: str, batch_size: int, *, kept: bool = False) -> None:
        self._functions = _functions()
        self._handle = self._functions.m2teacher_create(
            data.encode(), str(config).encode(), norm.encode(), batch_size, kept
        )
        if not self._handle:
            raise RuntimeError(self._functions.m2teacher_error().decode())

    def steps(self, count: int) -> float:
        """Takes steps; returns the last one's loss."""
        loss: float = self._functions.m2teacher_steps(self._handle, count)
        if loss < 0:
            raise RuntimeError(self._functions.m2teacher_error().decode())
        return loss

    def close(self) -> None:
        self._functions.m2teacher_destroy(self._handle)
        self._handle = None


def _functions() -> ctypes.CDLL:
    if not LIBRARY.exists():
        raise SystemExit(f"{LIBRARY} is not there: build it with ninja -C build m2teacher_benchmark")
    library = ctypes.CDLL(str(LIBRARY))
    library.m2teacher_create.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_int64, ctypes.c_int]
    library.m2teacher_create.restype = ctypes.c_void_p
    library.m2teacher_steps.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.m2teacher_steps.restype = ctypes.c_double
    library.m2teacher_destroy.argtypes = [ctypes.c_void_p]
    library.m2teacher_destroy.restype = None
    library.m2teacher_error.restype = ctypes.c_char_p
    return library
