"""Code written for `flame.pytorch.nn.momentum_bn` runs with its import line changed.

`train` below is such code: constructors as flame documents them, `total_iters` assigned afterwards, the weights of the
teacher averaged by hand. Its numbers are those of the code published with the paper. `differences` then goes through
what behaves differently here on purpose, and how to get the old behaviour where somebody relied on it.

    python examples/flame_import.py
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator

import torch
from torch import nn

# Was: from flame.pytorch.nn.momentum_bn import MomentumBatchNorm1d, MomentumBatchNorm2d
from momentum_bn import MomentumBatchNorm1d, MomentumBatchNorm2d, plain_state_dict


def network(norm1d: type[nn.Module], norm2d: type[nn.Module]) -> nn.Sequential:
    """Builds the same network with any normalisation."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, bias=False), norm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, bias=False), norm2d(16, 1e-5), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 32), norm1d(32, eps=1e-5), nn.ReLU(), nn.Linear(32, 8)),
    )


def train(steps: int, seed: int) -> list[float]:
    """Trains a student against its momentum teacher. Returns the losses. Nothing here is particular to momentum_bn."""
    torch.manual_seed(seed)
    student = network(nn.BatchNorm1d, nn.BatchNorm2d).double()
    teacher = network(MomentumBatchNorm1d, MomentumBatchNorm2d).double()
    for parameter, follower in zip(student.parameters(), teacher.parameters(), strict=True):
        follower.data.copy_(parameter.data)
        follower.requires_grad = False
    for layer in teacher.modules():
        if isinstance(layer, (MomentumBatchNorm1d, MomentumBatchNorm2d)):
            layer.total_iters = steps

    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        view1, view2 = torch.randn(2, 16, 3, 15, 15, dtype=torch.float64)
        with torch.no_grad():
            for parameter, follower in zip(student.parameters(), teacher.parameters(), strict=True):
                follower.data = follower.data * 0.99 + parameter.data * 0.01
            target1, target2 = teacher(view1), teacher(view2)
        similarity = torch.cosine_similarity(student(view1), target2) + torch.cosine_similarity(student(view2), target1)
        loss = 2 - similarity.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def differences() -> Iterator[tuple[str, str, str]]:
    """Yields (case, here, for the behaviour of the published code); each was just checked."""
    torch.manual_seed(0)
    view1, view2 = torch.randn(2, 8, 4)
    trained = MomentumBatchNorm1d(4, total_iters=10)
    trained(view1), trained(view2)  # two views: one update of the statistics

    layer = copy.deepcopy(trained).eval()
    expected = (view1 - layer.running_mean) / torch.sqrt(layer.running_var + layer.eps)
    torch.testing.assert_close(layer(view1), expected)
    assert layer.cur_iter == trained.cur_iter
    yield "eval()", "running statistics, nothing is updated", "leave the layer in train()"

    variances = {}
    for variance in ("published", "unbiased", "biased"):
        fresh = MomentumBatchNorm1d(4, total_iters=10, affine=False, variance=variance)
        variances[variance] = ((view1 - view1.mean(0)) / fresh(view1)).square()[0] - fresh.eps
    torch.testing.assert_close(variances["published"], view1.var(0) * 8 / 7, rtol=1e-4, atol=0)
    torch.testing.assert_close(variances["unbiased"], view1.var(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(variances["biased"], view1.var(0, correction=0), rtol=1e-4, atol=0)
    yield "variance", 'variance="published": unbiased * n/(n-1)', 'the default ("biased": as flame documents it)'

    layer = MomentumBatchNorm1d(4, total_iters=10)
    for _ in range(13):
        layer.momentum_cosine_decay()
    assert layer.momentum == 0
    layer.momentum = (math.cos(math.pi * layer.cur_iter / layer.total_iters) + 1) / 2
    assert 0.2 < layer.momentum < 0.21
    yield "past total_iters", "momentum stays 0", "assign layer.momentum before each step"

    try:
        MomentumBatchNorm1d(4)(view1[:1])
    except ValueError as error:
        message = str(error)
    assert "Expected more than 1 value per channel" in message
    yield "one value per channel", "ValueError", "none: it was NaN"

    assert MomentumBatchNorm1d(4)(torch.randn(8, 4, 5)).shape == (8, 4, 5)
    assert MomentumBatchNorm1d(4, track_running_stats=False)(view1).isfinite().all()
    assert MomentumBatchNorm1d(4, momentum=None)(view1).isfinite().all()
    yield "(N, C, L), momentum=None, track_running_stats=False", "work", "none: they failed"

    view1.requires_grad_()
    layer = MomentumBatchNorm1d(4)
    layer(view1), layer(view2)
    assert not layer.running_mean.requires_grad
    yield "graph in the running statistics", "none", "none: it leaked memory"

    assert not hasattr(trained, "mean_last_batch")
    yield "mean_last_batch, var_last_batch", "buffers view_mean_sum, view_var_sum, view_count", "read these"

    updates, old_checkpoint = 1, plain_state_dict(trained)  # what such code saved; its schedule it did not save
    layer = MomentumBatchNorm1d(4, total_iters=10)
    layer.load_state_dict(old_checkpoint)
    assert (layer.cur_iter, layer.momentum) == (0, 1.0)
    layer.cur_iter = updates - 1
    layer.momentum_cosine_decay()  # to `updates`, and momentum to its place in the schedule
    torch.testing.assert_close(layer.state_dict(), trained.state_dict(), rtol=0, atol=0)
    yield "checkpoints", "hold the schedule and a first view", "old ones load; then set the schedule as above"


def main() -> None:
    """Trains, then prints the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    losses = train(args.steps, args.seed)
    print(f"loss of {args.steps} steps: {losses[0]:.6f} ... {losses[-1]:.6f}")
    rows = [("case", "momentum_bn", "to get what the published code did"), *differences()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
