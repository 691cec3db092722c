"""A training checkpoint in safetensors, taken between the two views of a step, continues bit for bit.

All state of the teacher, its schedules and half-done updates too, is tensors in its state dict, so it fits a format
that holds nothing else. Configuration (sizes, `total_iters`) is not state: here it goes into the file's metadata.

    pip install safetensors
    python examples/safetensors_checkpoint.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from momentum_bn import MomentumTeacher


class Run:
    """A student, its teacher and its optimizer, with a training step in two halves."""

    def __init__(self, width: int, total_iters: int, seed: int) -> None:
        """The arguments are the configuration."""
        torch.manual_seed(seed)
        self.configuration = {"width": width, "total_iters": total_iters, "seed": seed}
        self.student = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4))
        self.teacher = MomentumTeacher(self.student, total_iters=total_iters)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)

    def first_half(self, view1: Tensor) -> Tensor:
        """The teacher has now seen one view of two: its layers remember that view's statistics."""
        self.teacher.update()
        return self.teacher(view1)

    def second_half(self, view1: Tensor, view2: Tensor, target1: Tensor) -> float:
        """The teacher's second view moves its running statistics; then the student learns."""
        target2 = self.teacher(view2)
        similarity = torch.cosine_similarity(self.student(view1), target2)
        loss = 2 - (similarity + torch.cosine_similarity(self.student(view2), target1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def save(self, path: Path, **more: Tensor) -> None:
        """Writes every tensor of the run, and `more`, under one flat set of names."""
        tensors = {f"student.{name}": tensor for name, tensor in self.student.state_dict().items()}
        tensors |= {f"teacher.{name}": tensor for name, tensor in self.teacher.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
        save_file(tensors | more, path, metadata={"configuration": json.dumps(self.configuration)})

    @classmethod
    def load(cls, path: Path) -> tuple[Run, dict[str, Tensor]]:
        """Builds the run that the file is of. Returns what else was saved, too."""
        with safe_open(path, framework="pt") as file:
            run = cls(**json.loads(file.metadata()["configuration"]))
        tensors = load_file(path)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}

        run.student.load_state_dict(part("student."))
        run.teacher.load_state_dict(part("teacher."))
        optimizer_state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in part("optimizer.").items():
            index, name = key.split(".", 1)
            optimizer_state.setdefault(int(index), {})[name] = tensor
        run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": optimizer_state})
        return run, tensors


def main() -> None:
    """Saves in the middle of a step, loads, and trains both runs to the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="file to write (default: a temporary one)")
    args = parser.parse_args()
    views = torch.randn(args.steps, 2, 16, 8, generator=torch.Generator().manual_seed(args.seed))
    middle = args.steps // 2

    run = Run(width=16, total_iters=args.steps, seed=args.seed)
    for view1, view2 in views[:middle]:
        run.second_half(view1, view2, run.first_half(view1))
    view1, view2 = views[middle]
    target1 = run.first_half(view1)
    assert int(run.teacher.module[1].view_count) == 1  # half of an update is done
    with tempfile.TemporaryDirectory() as folder:
        path = args.checkpoint or Path(folder) / "run.safetensors"
        run.save(path, target1=target1)
        loaded, more = Run.load(path)

    losses = []
    for one, target in ((run, target1), (loaded, more["target1"])):
        one.second_half(view1, view2, target)
        losses.append([one.second_half(v1, v2, one.first_half(v1)) for v1, v2 in views[middle + 1 :]])
    print(f"last losses, whole run:  {losses[0][-3:]}")
    print(f"last losses, loaded run: {losses[1][-3:]}")
    assert losses[0] == losses[1]
    torch.testing.assert_close(loaded.teacher.state_dict(), run.teacher.state_dict(), rtol=0, atol=0)
    print(f"the same bits in all {len(run.teacher.state_dict())} tensors of the teacher")


if __name__ == "__main__":
    main()
