"""Layers that several threads call: each its own, one in evaluation for all, with casts, copies and kept memory."""

import copy
import ctypes
import gc
import io
import random
import threading
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

import momentum_bn
from tests.python.snapshots import same_bits

from .memory import has_grown, resident

THREADS = 4
ROUNDS = 8
SEEDS = 8  # of each job: what comes out is known before the threads begin
SHAPE = (4, 16, 17, 17)
LARGE = (2, 64, 256, 256)  # 32 MiB: such results are kept for the next

M_MMAP_THRESHOLD = -3  # of <malloc.h>

# How often each job is chosen, in their order: large results take long.
WEIGHTS = [20, 20, 20, 20, 1]

Job = Callable[[int], list[Tensor]]


def batch(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def end_of(layer: nn.Module, results: list[Tensor]) -> list[Tensor]:
    return [*results, *(value.clone() for value in layer.state_dict().values())]


def steps(layer: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Three forwards with gradients."""
    results = []
    for step in range(3):
        x, residual = (batch(10 * seed + 2 * step + i).to(dtype).requires_grad_() for i in range(2))
        if step == 1:
            x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        y = layer(x, residual)
        # In evaluation those of parameters are torch's own, whose last bits depend on the number of threads.
        wanted = [x, residual, *(layer.parameters() if layer.training else ())]
        results += [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]
    return results


def train_momentum(seed: int) -> list[Tensor]:
    layer = momentum_bn.MomentumBatchNorm2d(16, total_iters=3, activation="relu", detach_statistics=seed % 2 == 0)
    return end_of(layer, steps(layer, seed))


def train_batch_norm(seed: int) -> list[Tensor]:
    layer = momentum_bn.BatchNorm2d(16, activation="relu")
    return end_of(layer, steps(layer, seed))


def cast_and_copy(seed: int) -> list[Tensor]:
    layer = momentum_bn.MomentumBatchNorm2d(16, total_iters=3)
    results = steps(layer, seed)
    layer = copy.deepcopy(layer).to(torch.bfloat16)
    results += steps(layer, seed, torch.bfloat16)
    file = io.BytesIO()
    torch.save(layer.float().state_dict(), file)
    file.seek(0)
    loaded = momentum_bn.MomentumBatchNorm2d(16, total_iters=3)
    loaded.load_state_dict(torch.load(file))
    return end_of(loaded, results + steps(loaded, seed))


def large_results(seed: int) -> list[Tensor]:
    layer = momentum_bn.MomentumBatchNorm2d(64, total_iters=3)
    with torch.no_grad():
        x = batch(seed, LARGE[1:]).expand(LARGE)
        results = [layer(x)[:, 1].clone(), layer(x)[:, 2].clone()]
        y = layer(x)
        layer.inplace = True
        return end_of(layer, [*results, layer(y)[:, 3].clone()])


def evaluate_together() -> Job:
    layer = momentum_bn.MomentumBatchNorm2d(16, total_iters=3, activation="relu")
    steps(layer, 0)
    layer.eval()
    return lambda seed: end_of(layer, steps(layer, seed))


def jobs() -> dict[str, Job]:
    return {
        "train_momentum": train_momentum,
        "train_batch_norm": train_batch_norm,
        "cast_and_copy": cast_and_copy,
        "evaluate_together": evaluate_together(),
        "large_results": large_results,
    }


class Soak:
    """Threads that call jobs at random, and what they found."""

    def __init__(self, seed: int) -> None:
        torch.set_num_threads(1)
        # So that glibc gives the memory of large tensors back as they are freed; else it would keep some of it.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
        self.jobs = jobs()
        self.expected = {(name, i): job(i) for name, job in self.jobs.items() for i in range(SEEDS)}
        self.choices = [random.Random(f"{seed} {thread}") for thread in range(THREADS)]
        self.calls = [Counter[str]() for _ in range(THREADS)]
        self.faults: list[str] = []

    def call(self, name: str, i: int) -> None:
        try:
            results, expected = self.jobs[name](i), self.expected[name, i]
            if len(results) != len(expected) or not all(map(same_bits, results, expected)):
                self.faults.append(f"{name} of {i}: other bits than alone")
        except Exception as error:  # of any kind: a thread must not just end
            self.faults.append(f"{name} of {i}: {error!r}")

    def work(self, thread: int, until: float) -> None:
        torch.set_num_threads(1 + thread % 2)
        choose = self.choices[thread]
        todo = list(self.jobs)  # each once, then any
        while (todo or time.monotonic() < until) and not self.faults:
            name = todo.pop() if todo else choose.choices(list(self.jobs), WEIGHTS)[0]
            self.call(name, choose.randrange(SEEDS))
            self.calls[thread][name] += 1

    def round(self, until: float) -> float:
        """New threads, up to the time; then what is left in memory."""
        threads = [threading.Thread(target=self.work, args=(i, until)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        momentum_bn.memory.release()
        return resident()


def soak(seconds: float, seed: int) -> tuple[dict[str, object], list[str]]:
    """Figures and faults."""
    threads = Soak(seed)
    begin = time.monotonic()
    memory = [threads.round(begin + seconds * (i + 1) / ROUNDS) for i in range(ROUNDS)]
    warm, end = memory[1], memory[-1]
    faults = threads.faults
    if has_grown(warm, end):
        faults.append(f"memory grew from {warm:.0f} to {end:.0f} MiB")
    calls = sum(threads.calls, Counter[str]())
    figures: dict[str, object] = {f"calls of {name}": calls[name] for name in threads.jobs}
    return figures | {"MiB after an eighth": f"{warm:.0f}", "MiB at the end": f"{end:.0f}"}, faults
