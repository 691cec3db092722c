"""A network of timm as the student of a momentum teacher, whatever its normalisations are.

`MomentumTeacher` copies the student, makes every BatchNorm of the copy a Momentum BatchNorm (timm's BatchNormAct2d,
too, which keeps its activation and dropout), and fuses the layers with the ReLUs and additions behind them. With
`--statistics student` the teacher is EMAN's instead, which normalises by an average of the student's statistics.

    pip install timm torchvision
    python examples/timm_teacher.py
    python examples/timm_teacher.py --model efficientnet_b0 --statistics student
"""

from __future__ import annotations

import argparse

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from momentum_bn import MomentumBatchNorm, MomentumTeacher


def views(generator: torch.Generator, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Two noisy views of the same random textures, (count, 3, size, size) each."""
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    textures = F.interpolate(coarse, size=(size, size), mode="bilinear")
    noise = torch.randn(2, count, 3, size, size, generator=generator)
    return textures + 0.3 * noise[0], textures + 0.3 * noise[1]


def main() -> None:
    """Trains some steps and says what became of the layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="regnetx_002", help="name of a model of timm")
    parser.add_argument("--statistics", choices=["own", "student"], default="own", help="the teacher's statistics")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    args = parser.parse_args()

    torch.manual_seed(0)
    backbone = timm.create_model(args.model, num_classes=0)
    student = nn.Sequential(backbone, nn.Linear(backbone.num_features, 64))
    predictor = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    teacher = MomentumTeacher(student, total_iters=args.steps, statistics=args.statistics)

    parameters = [*student.parameters(), *predictor.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-4)
    generator = torch.Generator().manual_seed(0)
    for step in range(args.steps):
        view1, view2 = views(generator, args.batch_size, args.size)
        teacher.update()
        target1, target2 = teacher(view1), teacher(view2)
        similarity = F.cosine_similarity(predictor(student(view1)), target2).mean()
        similarity = similarity + F.cosine_similarity(predictor(student(view2)), target1).mean()
        loss = 2 - similarity
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}  loss {loss.item():.4f}")

    layers = sum(isinstance(module, MomentumBatchNorm) for module in teacher.modules())
    print(
        f"{args.model}: {layers} Momentum BatchNorms in the teacher, {len(teacher.fused)} of them do more in their pass"
    )


if __name__ == "__main__":
    main()
