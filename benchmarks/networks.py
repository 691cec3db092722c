"""Which of timm's networks are converted and fused, as a table: python -m benchmarks.networks [--compare 60]."""

from __future__ import annotations

import argparse
import collections
import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import momentum_bn
from momentum_bn.fuse import fuse_parts

from . import timm_models


class Row(NamedTuple):
    """What became of one network."""

    family: str
    model: str
    layers: int
    converted: bool
    fused: str  # "whole", "parts" or "no"
    words: dict[str, int]
    reason: str
    difference: float | None


def examine(family: str, name: str) -> Row:
    """Converts and fuses the model, without running it."""
    model = timm_models.create(name, on_meta=True)
    try:
        momentum_bn.convert_momentum_batchnorm(model, total_iters=100)
    except ValueError as error:
        return Row(family, name, 0, False, "no", {}, str(error), None)
    layers = sum(isinstance(module, momentum_bn.MomentumBatchNorm) for module in model.modules())
    reason = ""
    try:
        momentum_bn.fuse(model)
        fused = "whole"
    except ValueError as error:
        reason = str(error)
        fuse_parts(model)
        fused = "parts" if momentum_bn.fused_layers(model) else "no"
    words = collections.Counter(momentum_bn.fused_layers(model).values())
    return Row(family, name, layers, True, fused, dict(words), reason, None)


def difference(name: str, side: int = 64) -> float | None:
    """The largest relative difference of anything between the model as written and fused, in float64.

    With Momentum BatchNorm and with BatchNorm, one forward each in training and evaluation, with and without gradients:
    outputs, gradients of inputs and parameters, and buffers. None where the model does not take images of ``side``.
    """
    torch.manual_seed(0)
    model = timm_models.create(name).double()
    side = timm_models.smallest_side(model, side)
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    largest = 0.0
    for written in (
        momentum_bn.convert_momentum_batchnorm(copy.deepcopy(model), total_iters=100),
        momentum_bn.convert_batchnorm(model),
    ):
        fused = copy.deepcopy(written)
        fuse_parts(fused)
        for training in (True, False):
            for with_grad in (False, True):
                try:
                    expected = _run(written.train(training), x, with_grad)
                except (RuntimeError, AssertionError):
                    return None
                found = _run(fused.train(training), x, with_grad)
                largest = max(largest, *(_relative(a, b) for a, b in zip(expected, found, strict=True)))
    return largest


def _run(net: nn.Module, x: Tensor, with_grad: bool) -> list[Tensor]:
    """Everything that a call of the network makes."""
    x = x.clone().requires_grad_(with_grad)
    torch.manual_seed(1)  # dropout
    net.zero_grad()
    with torch.set_grad_enabled(with_grad):
        outputs = _tensors(net(x))
    if with_grad:
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    return [
        *outputs,
        x.detach(),
        *([x.grad] if x.grad is not None else []),
        *gradients,
        *map(torch.clone, net.buffers()),
    ]


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    assert isinstance(output, Iterable)
    return [tensor for item in output for tensor in _tensors(item)]


def _relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    if torch.equal(a, b):
        return 0.0
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / a.abs().max())


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model | layers | fused | ReLU | addition and ReLU | in place alone | fused and written differ by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        counts = [
            sum(n for word, n in row.words.items() if kind in word.split(", "))
            for kind in ("relu", "add_relu", "in place")
        ]
        differs = "" if row.difference is None else f"{row.difference:.0e}" if row.difference else "0"
        reason = row.reason.partition(": ")[2].partition(" (at ")[0]  # without the place, which is the machine's
        fused = row.fused if row.fused == "whole" else f"{row.fused} ({reason})"
        lines.append(f"| {row.model} | {row.layers} | {fused} | {' | '.join(map(str, counts))} | {differs} |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    count = collections.Counter(row.fused for row in rows)
    compared = [row.difference for row in rows if row.difference is not None]
    text = (
        f"{sum(row.converted for row in rows)} of {len(rows)} families convert; {count['whole']} are fused as a whole, "
        f"{count['parts']} in parts, {count['no']} not at all."
    )
    if compared:
        text += f" {len(compared)} were run: fused and written differ by at most {max(compared):.0e}."
    return text


def _is_small(name: str, parameters: float) -> bool:
    model = timm_models.create(name, on_meta=True)
    count = sum(parameter.numel() for parameter in model.parameters())
    return count <= parameters and timm_models.smallest_side(model, 64) <= 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", type=int, default=0, help="so many of the smaller networks are also run")
    parser.add_argument("--parameters", type=float, default=12e6, help="what counts as a smaller network")
    args = parser.parse_args()
    rows = []
    for family, name in timm_models.all_with_batchnorm():
        row = examine(family, name)
        compared = sum(row.difference is not None for row in rows)
        if compared < args.compare and _is_small(name, args.parameters):
            row = row._replace(difference=difference(name))
            print(f"{name}: {row.difference}", flush=True)
        rows.append(row)
    print(table(rows))
    print()
    print(summary(rows))


if __name__ == "__main__":
    main()
