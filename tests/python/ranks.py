"""Runs a function on several processes that torch.distributed joins by gloo."""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 60.0  # that a function may take
COLLECTIVE_SECONDS = 20  # that a rank waits for another one

# One process imports torch; ranks are forked from it, in a tenth of the time that they would need by themselves.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["momentum_bn", "torch.distributed.fsdp", "torch._dynamo", "torch._inductor.compile_fx"]
)


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
    """Calls ``function(*arguments)`` on each rank of the default group, on one thread, and returns what they return.

    Args:
        function: of a module, so that each process finds it; it asks torch.distributed for its rank.

    Raises:
        AssertionError: with what a rank raised, or which of them did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # of the process that ranks are forked from
        for rank in range(ranks):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_run, args=(rank, ranks, folder, sender, function, arguments), daemon=True, name=f"rank {rank}"
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
        try:
            return _results(pipes, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.join(timeout=2)
                if process.is_alive():
                    process.kill()
                    process.join()


def _results(pipes: Sequence[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    while len(results) + len(errors) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results and rank not in errors]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            errors |= {pipes.index(pipe): "did not end in time" for pipe in waiting}
            break
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                failed, payload = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                failed, payload = True, "ended without a word"
            if failed:
                errors[rank] = payload
                deadline = min(deadline, time.monotonic() + 5)  # the others wait for this one in vain
            else:
                results[rank] = torch.load(io.BytesIO(payload), weights_only=False)
    assert not errors, "\n".join(f"rank {rank}: {words}" for rank, words in errors.items())
    return [results[rank] for rank in range(len(pipes))]


def _run(
    rank: int, ranks: int, folder: str, sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(Path(folder) / "store"), ranks),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        )
        result = function(*arguments)
        dist.barrier()
        buffer = io.BytesIO()
        torch.save(result, buffer)
        sender.send((False, buffer.getvalue()))
    except BaseException:
        sender.send((True, traceback.format_exc()))
    finally:
        sender.close()
        if dist.is_initialized():
            dist.destroy_process_group()
