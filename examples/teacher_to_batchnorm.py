"""Handing a teacher to a network built with torch's BatchNorm, and the other way round.

Code that evaluates or fine-tunes a network need not know of Momentum BatchNorm: in evaluation it is BatchNorm.

    python examples/teacher_to_batchnorm.py
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn

from momentum_bn import MomentumTeacher, convert_momentum_batchnorm, plain_state_dict, revert_momentum_batchnorm


def encoder() -> nn.Sequential:
    """A network as it stands in somebody's repository."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32)),
    )


def trained_teacher(steps: int) -> MomentumTeacher:
    """A teacher after some steps of training."""
    student = encoder()
    teacher = MomentumTeacher(student, total_iters=steps)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    for view1, view2 in torch.rand(steps, 2, 16, 3, 15, 15):
        teacher.update()
        target1, target2 = teacher(view1), teacher(view2)
        similarity = torch.cosine_similarity(student(view1), target2) + torch.cosine_similarity(student(view2), target1)
        optimizer.zero_grad()
        (2 - similarity.mean()).backward()
        optimizer.step()
    return teacher


def main() -> None:
    """Passes a teacher on in two ways and takes a network over in one; each time outputs must agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images = torch.rand(64, 3, 15, 15)
    teacher = trained_teacher(args.steps).eval()
    expected = teacher(images)

    # 1. As a state dict: it loads strictly into the network as it stands; save it with torch.save for others.
    plain = encoder().eval()
    plain.load_state_dict(plain_state_dict(teacher.module))
    torch.testing.assert_close(plain(images), expected, rtol=0, atol=0)
    print("plain_state_dict:           same outputs from the network built with torch's BatchNorm")

    # 2. As a module, to fine-tune: a copy, as reverting works in place and the teacher may train on. A teacher's
    #    parameters take no gradient; from now on these do.
    reverted = revert_momentum_batchnorm(copy.deepcopy(teacher.module)).requires_grad_(True)
    torch.testing.assert_close(reverted(images), expected, rtol=0, atol=0)
    assert type(reverted[1]) is nn.BatchNorm2d
    reverted.train()(images).square().mean().backward()
    assert reverted[0].weight.grad is not None
    assert reverted[1].num_batches_tracked == teacher.module[1].num_batches_tracked + 1
    print("revert_momentum_batchnorm:  same outputs, and the copy trains on with torch's BatchNorm")

    # 3. The other way: a checkpoint of torch's BatchNorm, loaded strictly into a converted network. Weights and running
    #    statistics come from it; the schedule starts where the network has it, at the beginning.
    converted = convert_momentum_batchnorm(encoder(), total_iters=1000).eval()
    converted.load_state_dict(plain.state_dict())
    torch.testing.assert_close(converted(images), expected, rtol=0, atol=0)
    assert (converted[1].cur_iter, converted[1].momentum) == (0, 1.0)
    print("convert_momentum_batchnorm: same outputs after loading a BatchNorm checkpoint; momentum 1.0 at update 0")


if __name__ == "__main__":
    main()
