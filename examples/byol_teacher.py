"""Self-supervised training with a momentum teacher, in plain PyTorch, with checkpoints.

The student and its predictor learn to foretell what the teacher makes of another augmented view of the same images
(BYOL, arXiv 2006.07733); the teacher's Momentum BatchNorms let it do so with small batches (arXiv 2101.07525).
At the end a nearest-neighbour classifier on the teacher's features is compared with one on raw pixels and one on the
features of the network before training.

    python examples/byol_teacher.py                                     # synthetic images, some seconds
    python examples/byol_teacher.py --data /usr/share/datasets/fashion-mnist --steps 1000
    python examples/byol_teacher.py --stop-at 100 --checkpoint run.pt   # interrupted ...
    python examples/byol_teacher.py --resume run.pt                     # ... and continued, bit for bit
"""

from __future__ import annotations

import argparse
import gzip
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momentum_bn import MomentumTeacher

Images = tuple[Tensor, Tensor]  # (N, 1, H, W) float32 about zero, (N) int64 labels


def synthetic(count: int, generator: torch.Generator) -> Images:
    """Noisy 28x28 images of one of five shapes somewhere in the picture; the shape is the label."""
    shapes = torch.zeros(5, 9, 9)
    shapes[0, 3:6, :] = shapes[1, :, 3:6] = 1  # bars
    shapes[2] = ((shapes[0] + shapes[1]) > 0).float()  # a cross
    shapes[3] = 1 - F.pad(torch.ones(5, 5), (2, 2, 2, 2))  # a frame
    shapes[4] = torch.eye(9) + torch.eye(9).roll(1, 0) + torch.eye(9).roll(-1, 0)  # a diagonal
    labels = torch.randint(5, (count,), generator=generator)
    images = 0.3 * torch.randn(count, 1, 28, 28, generator=generator)
    for image, label, (top, left) in zip(
        images, labels, torch.randint(19, (count, 2), generator=generator), strict=True
    ):
        image[0, top : top + 9, left : left + 9] += shapes[label]
    return images, labels


def fashion_mnist(folder: Path, prefix: str) -> Images:
    """The files of Debian's dataset-fashion-mnist."""

    def values(name: str, header: int) -> Tensor:
        content = bytearray(gzip.decompress((folder / f"{prefix}-{name}-ubyte.gz").read_bytes()))
        return torch.frombuffer(content, dtype=torch.uint8, offset=header)

    images = values("images-idx3", 16).view(-1, 1, 28, 28).float() / 128 - 1
    return images, values("labels-idx1", 8).long()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crops each image to half of its area or more, mirrors half of them, changes contrast and brightness."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    size = uniform(0.5, 1).sqrt()
    flip = uniform(-1, 1).sign()
    none = torch.zeros(len(images))
    left, top = ((1 - size) * uniform(-1, 1) for _ in range(2))
    crops = torch.stack([torch.stack([flip * size, none, left], 1), torch.stack([none, size, top], 1)], 1)
    views = F.grid_sample(images, F.affine_grid(crops, list(images.shape), align_corners=False), align_corners=False)
    contrast, brightness = uniform(0.6, 1.4).view(-1, 1, 1, 1), uniform(-0.4, 0.4).view(-1, 1, 1, 1)
    return views * contrast + brightness


def encoder(width: int = 16) -> nn.Sequential:
    """(N, 1, 28, 28) -> (N, 16 * width) features."""
    channels = [1, width, 2 * width, 4 * width]
    stages = [
        (nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
        for i, o in pairwise(channels)
    ]
    return nn.Sequential(*(layer for stage in stages for layer in stage), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Projector and predictor."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Run:
    """Everything that training changes, and so everything that a checkpoint holds."""

    def __init__(self, steps: int, seed: int, learning_rate: float) -> None:
        """Builds a student of encoder and projector, its predictor and its teacher."""
        torch.manual_seed(seed)
        self.steps, self.learning_rate, self.step = steps, learning_rate, 0
        self.student = nn.Sequential(encoder(), mlp(256, 128, 32))
        self.predictor = mlp(32, 128, 32)
        # The teacher runs without gradients, so its normalisations overwrite their inputs, which nobody reads again.
        self.teacher = MomentumTeacher(self.student, total_iters=steps, param_momentum=0.97, inplace=True)
        self.optimizer = torch.optim.SGD(
            [*self.student.parameters(), *self.predictor.parameters()], learning_rate, momentum=0.9, weight_decay=1e-4
        )
        self.generator = torch.Generator().manual_seed(seed)

    def train_step(self, images: Tensor) -> float:
        """One update of student and teacher. Returns the loss, 0 to 4."""
        view1, view2 = augment(images, self.generator), augment(images, self.generator)
        self.teacher.update()  # first: the teacher follows the student of the step before
        target1, target2 = self.teacher(view1), self.teacher(view2)  # two views, then its statistics move
        foretold1, foretold2 = self.predictor(self.student(view1)), self.predictor(self.student(view2))
        similarity = torch.cosine_similarity(foretold1, target2) + torch.cosine_similarity(foretold2, target1)
        loss = 2 - similarity.mean()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * (math.cos(math.pi * self.step / self.steps) + 1) / 2
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        """The teacher's own state dict has its weights, its statistics and both of its schedules."""
        parts = ("student", "predictor", "teacher", "optimizer")
        state = {name: getattr(self, name).state_dict() for name in parts}
        return state | {"generator": self.generator.get_state(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the run that `state` was taken from; build this one with the same arguments."""
        for name in ("student", "predictor", "teacher", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.step = state["step"]


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = 10) -> float:
    """Accuracy of the vote of the k training images of the most similar features."""
    similarity = F.normalize(test.flatten(1)) @ F.normalize(train.flatten(1)).T
    votes = F.one_hot(train_labels[similarity.topk(k).indices]).sum(1)
    return (votes.argmax(1) == test_labels).float().mean().item()


@torch.no_grad()
def features(teacher: MomentumTeacher, images: Tensor) -> Tensor:
    """Features of the teacher's encoder, normalised with its running statistics."""
    teacher.eval()
    found = torch.cat([teacher.module[0](batch) for batch in images.split(500)])
    teacher.train()
    return found


def main() -> None:
    """Trains, saves, evaluates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST (default: synthetic images)")
    parser.add_argument("--steps", type=int, default=300, help="steps of the whole training")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-at", type=int, help="step after which to stop, as if interrupted")
    parser.add_argument("--checkpoint", type=Path, help="file to write when training stops")
    parser.add_argument("--resume", type=Path, help="file to continue from")
    args = parser.parse_args()

    if args.data:
        (train, train_labels), (test, test_labels) = (fashion_mnist(args.data, prefix) for prefix in ("train", "t10k"))
        train, train_labels, test, test_labels = train[:10000], train_labels[:10000], test[:2000], test_labels[:2000]
    else:
        generator = torch.Generator().manual_seed(args.seed)
        (train, train_labels), (test, test_labels) = (synthetic(count, generator) for count in (2000, 500))

    run = Run(args.steps, args.seed, args.learning_rate)
    if args.resume:
        run.load_state_dict(torch.load(args.resume))
    while run.step < min(args.stop_at or args.steps, args.steps):
        picked = torch.randint(len(train), (args.batch_size,), generator=run.generator)
        loss = run.train_step(train[picked])
        if run.step % 100 == 0:
            print(f"step {run.step:5d}  loss {loss:.4f}")
    if args.checkpoint:
        torch.save(run.state_dict(), args.checkpoint)
    if run.step < args.steps:
        return

    untrained = Run(args.steps, args.seed, args.learning_rate).teacher
    print("accuracy of nearest neighbours on")
    for name, find in (
        ("raw pixels", lambda images: images),
        ("an untrained network's features", lambda images: features(untrained, images)),
        ("the teacher's features", lambda images: features(run.teacher, images)),
    ):
        print(f"  {name}: {knn_accuracy(find(train), train_labels, find(test), test_labels):.1%}")


if __name__ == "__main__":
    main()
