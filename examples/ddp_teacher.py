"""Self-supervised training with a momentum teacher on several processes and machines, with DistributedDataParallel.

The training of byol_teacher.py: each rank has a shard of the batch. Gradients are averaged by DistributedDataParallel;
the teacher needs no gradient, follows the same parameters on every rank, and so needs no communication at all. Its
statistics are each rank's own, as in the paper; with --synchronise they are those of the whole batch.

    torchrun --nproc-per-node 2 examples/ddp_teacher.py
    torchrun --nproc-per-node 2 --max-restarts 3 examples/ddp_teacher.py --checkpoint run.pt   # goes on if a rank dies

On two machines, on each of them (docs/distributed.md has more):

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/ddp_teacher.py
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from byol_teacher import augment, encoder, mlp, synthetic
from momentum_bn import MomentumTeacher


def random_numbers(seed: int, step: int, purpose: int) -> torch.Generator:
    """Depends on nothing that happened before: a run that goes on draws what it would have drawn."""
    return torch.Generator().manual_seed((seed << 48) + (step << 16) + purpose)


class Run:
    """Everything that training changes, and so everything that a checkpoint holds. Build it the same on all ranks."""

    def __init__(self, steps: int, seed: int, synchronise: bool, device: torch.device) -> None:
        """Builds the student with its predictor, which learn, and the teacher, which follows."""
        torch.manual_seed(seed)
        self.steps, self.seed, self.step, self.device = steps, seed, 0, device
        student = nn.Sequential(encoder(), mlp(256, 128, 32))
        self.online = nn.Sequential(student, mlp(32, 128, 32)).to(device)
        group = dist.group.WORLD if synchronise else None
        self.teacher = MomentumTeacher(student, steps, param_momentum=0.97, inplace=True, process_group=group)
        self.optimizer = torch.optim.SGD(self.online.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def train_step(self, online: nn.Module, images: Tensor) -> Tensor:
        """One update from this rank's images. Returns their loss, 0 to 4."""
        generator = random_numbers(self.seed, self.step, 1 + dist.get_rank())
        view1, view2 = (augment(images, generator).to(self.device) for _ in range(2))
        self.teacher.update()
        target1, target2 = self.teacher(view1), self.teacher(view2)
        similarity = torch.cosine_similarity(online(view1), target2) + torch.cosine_similarity(online(view2), target1)
        loss = 2 - similarity.mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """The teacher's own state dict has its weights, its statistics and both of its schedules."""
        return {name: getattr(self, name).state_dict() for name in ("online", "teacher", "optimizer")} | {
            "step": self.step
        }

    def save(self, path: Path) -> None:
        """Writes the file as a whole or not at all; one rank does."""
        partial = path.with_name(path.name + ".partial")
        torch.save(self.state_dict(), partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Continues from a file that the first rank has; the others need not see its disk."""
        found = [torch.load(path, map_location="cpu") if dist.get_rank() == 0 and path.exists() else None]
        dist.broadcast_object_list(found)
        if found[0] is None:
            return
        for name in ("online", "teacher", "optimizer"):
            getattr(self, name).load_state_dict(found[0][name])
        self.step = found[0]["step"]


def train(run: Run, images: Tensor, batch_size: int, checkpoint: Path | None, save_every: int, log_every: int) -> None:
    """Trains to the end; `batch_size` images per step, of all ranks together."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    gpu = [run.device] if run.device.type == "cuda" else None
    online = DistributedDataParallel(run.online, device_ids=gpu)
    while run.step < run.steps:
        # All ranks draw the same batch, and take a shard of it.
        picked = torch.randint(len(images), (batch_size,), generator=random_numbers(run.seed, run.step, 0))
        loss = run.train_step(online, images[picked.tensor_split(ranks)[rank]])
        if run.step % log_every == 0 or run.step == run.steps:
            dist.all_reduce(loss)
            if rank == 0:
                print(f"step {run.step:5d}  loss {loss.item() / ranks:.6f}", flush=True)
        if checkpoint and rank == 0 and (run.step % save_every == 0 or run.step == run.steps):
            run.save(checkpoint)


def main() -> None:
    """Joins the other ranks, continues where they were, trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="steps of the whole training")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step, of all ranks together")
    parser.add_argument("--synchronise", action="store_true", help="the teacher's statistics are the whole batch's")
    parser.add_argument("--checkpoint", type=Path, help="file to write, and to continue from where it exists")
    parser.add_argument("--save-every", type=int, default=20, help="steps from one checkpoint to the next")
    parser.add_argument("--log-every", type=int, default=20, help="steps from one line of output to the next")
    parser.add_argument("--timeout", type=float, default=60, help="seconds that a rank waits for the others")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=args.timeout))
    run = Run(args.steps, args.seed, args.synchronise, device)
    if args.checkpoint:
        run.load(args.checkpoint)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks, from step {run.step}", flush=True)
    images, _ = synthetic(2000, torch.Generator().manual_seed(args.seed))
    train(run, images, args.batch_size, args.checkpoint, args.save_every, args.log_every)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
