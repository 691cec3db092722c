"""BYOL with lightly's transforms, heads and loss, and a momentum teacher with statistics of its own.

lightly's own BYOL example copies backbone and projection head and averages them by hand
(`update_momentum`); here `MomentumTeacher` is that copy, and its BatchNorms are Momentum BatchNorms, so that small
batches do.

    pip install lightly torchvision
    python examples/lightly_byol.py
    python examples/lightly_byol.py --data /path/to/images --size 224 --batch-size 64 --epochs 100
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from lightly.utils.scheduler import CosineWarmupScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

from momentum_bn import MomentumTeacher


class Stripes(Dataset[tuple[list[Tensor], int]]):
    """Images of stripes in one of four directions, in place of a folder of images."""

    def __init__(self, transform: BYOLTransform, count: int, size: int) -> None:
        """Draws the images."""
        generator = torch.Generator().manual_seed(0)
        y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
        self.images = []
        for i in range(count):
            angle, phase = torch.tensor(i % 4 * torch.pi / 4), 6 * torch.rand((), generator=generator)
            stripes = 0.5 + 0.5 * torch.sin(12 * (x * angle.cos() + y * angle.sin()) + phase)
            color = torch.rand(3, 1, 1, generator=generator)
            self.images.append(to_pil_image(color * stripes))
        self.transform = transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        """Two views of an image, and its direction."""
        return self.transform(self.images[index]), index % 4


class Student(nn.Module):
    """Backbone and projection head: what the teacher is a copy of. The prediction head is the student's alone."""

    def __init__(self) -> None:
        """A small ResNet of torchvision and lightly's head."""
        super().__init__()
        self.backbone = torchvision.models.resnet18()
        self.backbone.fc = nn.Identity()
        self.projection_head = BYOLProjectionHead(512, 256, 64)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 64)."""
        return self.projection_head(self.backbone(images))


def main() -> None:
    """Trains student and teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of images (default: drawn stripes)")
    parser.add_argument("--size", type=int, default=32, help="side of the views")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()

    torch.manual_seed(0)
    transform = BYOLTransform(
        BYOLView1Transform(input_size=args.size, gaussian_blur=0.0),
        BYOLView2Transform(input_size=args.size, gaussian_blur=0.0),
    )
    images = LightlyDataset(str(args.data), transform=transform) if args.data else Stripes(transform, 64, args.size)
    loader = DataLoader(images, args.batch_size, shuffle=True, drop_last=True)
    steps = args.epochs * len(loader)

    student, prediction_head = Student(), BYOLPredictionHead(64, 256, 64)
    teacher = MomentumTeacher(student, total_iters=steps)  # two views per step are what it expects
    print(f"layers of the teacher that do more in their pass: {len(teacher.fused)}")
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD([*student.parameters(), *prediction_head.parameters()], lr=0.06, momentum=0.9)
    scheduler = CosineWarmupScheduler(optimizer, warmup_epochs=0, max_epochs=steps)

    for epoch in range(args.epochs):
        total = 0.0
        for batch in loader:
            view1, view2 = batch[0]
            teacher.update()  # first: the teacher follows the student of the step before
            target1, target2 = teacher(view1), teacher(view2)
            predicted1, predicted2 = prediction_head(student(view1)), prediction_head(student(view2))
            loss = 0.5 * (criterion(predicted1, target2) + criterion(predicted2, target1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item() / len(loader)
        print(f"epoch {epoch}  loss {total:.4f}")


if __name__ == "__main__":
    main()
