"""A momentum teacher with gradient accumulation, multi-crop and a learning-rate schedule.

One optimizer step accumulates the gradients of several batches. The student sees two large and several small crops of
each image; the teacher sees the large ones only (multi-crop, arXiv 2006.09882). Three settings belong together:

- `total_iters` is the number of optimizer steps of the whole training, the same number that the learning-rate schedule
  is given: all of them end together.
- `teacher.update()` is called once per optimizer step.
- `views_per_update` is the number of the teacher's forwards from one update to the next: its views of a batch times the
  batches that a step accumulates. With another number the layers' schedule would run too fast or too slowly, which the
  teacher warns of.

The two momenta have opposite senses. A layer's `momentum` is the weight of the new batch and falls from 1 to 0; the
teacher's `param_momentum` is the weight of its old parameters and grows to 1.

    python examples/accumulation_and_crops.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momentum_bn import MomentumTeacher


def encoder(width: int = 16) -> nn.Sequential:
    """(N, 3, H, W) -> (N, 32), for crops of any size."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, stride=2, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, stride=2, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 32), nn.BatchNorm1d(32)),
    )


def crop(images: Tensor, share: float, size: int) -> Tensor:
    """A random square of each image, of `share` of its side, brought to `size` pixels."""
    shifts = (1 - share) * (2 * torch.rand(len(images), 2) - 1)
    corners = torch.zeros(len(images), 2, 3)
    corners[:, 0, 0] = corners[:, 1, 1] = share
    corners[:, :, 2] = shifts
    grid = F.affine_grid(corners, [*images.shape[:2], size, size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def main() -> None:
    """Trains, and shows that all schedules end together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of the whole training")
    parser.add_argument("--accumulate", type=int, default=4, help="batches per optimizer step")
    parser.add_argument("--small-crops", type=int, default=4, help="small crops per image, for the student alone")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    student, predictor = encoder(), nn.Linear(32, 32)
    large_crops = 2
    teacher = MomentumTeacher(student, total_iters=args.steps, views_per_update=large_crops * args.accumulate)
    optimizer = torch.optim.SGD([*student.parameters(), *predictor.parameters()], lr=0.05, momentum=0.9)
    learning_rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.steps)

    for step in range(args.steps):
        if step % 10 == 0:
            print(
                f"step {step:3d}  learning rate {optimizer.param_groups[0]['lr']:.4f}  "
                f"param_momentum {teacher.param_momentum:.4f}  momentum of the layers {teacher.module[1].momentum:.4f}"
            )
        teacher.update()  # once per optimizer step, before its forwards
        for images in torch.rand(args.accumulate, args.batch_size, 3, 32, 32):
            crops = [crop(images, 0.8, 32) for _ in range(large_crops)]
            targets = [teacher(view) for view in crops]  # not the small ones
            crops += [crop(images, 0.4, 16) for _ in range(args.small_crops)]
            predictions = [predictor(student(view)) for view in crops]
            pairs = [(p, t) for i, p in enumerate(predictions) for j, t in enumerate(targets) if i != j]
            loss = 1 - torch.stack([torch.cosine_similarity(p, t).mean() for p, t in pairs]).mean()
            (loss / args.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        learning_rate.step()

    layer = teacher.module[1]
    assert (layer.cur_iter, layer.momentum, teacher.param_momentum) == (args.steps, 0.0, 1.0)
    print(
        f"after {args.steps} steps: learning rate {optimizer.param_groups[0]['lr']:.4f}, "
        f"param_momentum {teacher.param_momentum:.4f}, momentum of the layers {layer.momentum:.4f}"
    )


if __name__ == "__main__":
    main()
