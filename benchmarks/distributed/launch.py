"""Runs a function on several ranks: those of torchrun, or processes of this machine on one thread each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what ``function(*arguments)`` returned on the first rank. ``function`` must be of a module."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OMP_NUM_THREADS"] = "1"
        # One process imports torch, and ranks are forked from it.
        mp.get_context("forkserver").set_forkserver_preload(["momentum_bn"])
        mp.start_processes(  # type: ignore[no-untyped-call]
            _run, args=(ranks, folder, function, arguments), nprocs=ranks, start_method="forkserver"
        )
        return torch.load(Path(folder) / "result", weights_only=False)


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _run(rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    result = function(*arguments)
    if rank == 0:
        torch.save(result, Path(folder) / "result")
    dist.barrier()
    dist.destroy_process_group()
