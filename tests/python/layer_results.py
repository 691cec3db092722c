"""Runs the layer on stored inputs in a process of its own, to see what one processor or one setting makes of them.

`python layer_results.py CASES RESULTS THREADS...` reads a list of `Case` and writes a `Results`, both with torch.save.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

import momentum_bn
from inputs import as_layout, layer_for, randn
from oracle import batch_statistics, normalise, variance_to_normalise


@dataclass
class Case:
    """One forward and backward; `name` says what is special."""

    name: str
    x: Tensor
    residual: Tensor | None
    dy: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    activation: str | None


@dataclass
class Results:
    config: str
    # Of each number of threads, of each case by its name: y, gradients and statistics.
    outputs: dict[int, dict[str, dict[str, Tensor]]]


def random_cases(dtypes: list[torch.dtype]) -> list[Case]:
    """Unit scale, every layout, with and without ReLU and residual."""
    cases = []
    shapes = [(33, 37), (6, 5, 7, 7), (3, 3, 17, 17), (4, 64, 16, 17)]
    for seed, (shape, layout, dtype) in enumerate(product(shapes, ["contiguous", "channels_last"], dtypes)):
        activation, with_residual = [None, "relu"][seed % 2], seed % 3 > 0
        cases.append(
            Case(
                name=f"{shape} {layout} {dtype} {activation} {with_residual}",
                x=as_layout(randn(*shape, seed=seed, dtype=dtype, shift=0.5), layout),
                residual=randn(*shape, seed=seed + 100, dtype=dtype) if with_residual else None,
                dy=randn(*shape, seed=seed + 200, dtype=dtype),
                weight=randn(shape[1], seed=seed + 300).clamp(-1, 1),
                bias=randn(shape[1], seed=seed + 400).clamp(-1, 1),
                eps=1e-5,
                activation=activation,
            )
        )
    return cases


def exact_cases(dtypes: list[torch.dtype]) -> list[Case]:
    """Whole numbers around a whole mean, variance 4, eps 12: nothing that the layer computes needs rounding.

    Blocks of two images by two positions hold the mean twice plus and twice minus 2, so that the same goes for parts.
    """
    cases = []
    for seed, (shape, layout, dtype) in enumerate(
        product([(2048, 64), (64, 16, 8, 8), (8, 3, 32, 32)], ["contiguous", "channels_last"], dtypes)
    ):
        n, c, *spatial = shape
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (n // 2, 1, c, *[1 for _ in spatial]), generator=generator).mul(2).sub(1)
        pair = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, *[1 for _ in spatial])
        x = (signs * pair).reshape(n, c, *[1 for _ in spatial]).expand(shape)
        if spatial:
            x = x * torch.tensor([1.0, -1.0]).repeat(spatial[-1] // 2)
        mean = torch.arange(c).remainder(7).sub(3).reshape(1, c, *[1 for _ in spatial])
        whole = torch.randint(-3, 4, (2, *shape), generator=generator)
        cases.append(
            Case(
                name=f"exact {shape} {layout} {dtype}",
                x=as_layout((2 * x + mean).to(dtype), layout),
                residual=whole[0].to(dtype),
                dy=whole[1].to(dtype),
                weight=torch.arange(c).remainder(3).sub(1).double(),
                bias=torch.arange(c).remainder(5).sub(2).double(),
                eps=12.0,
                activation="relu",
            )
        )
    return cases


def run(case: Case) -> dict[str, Tensor]:
    """What the layer makes of a case, with gradients and, in place, without."""
    layer = layer_for(case.x)(
        case.x.size(1),
        eps=case.eps,
        views_per_update=1,
        variance="biased",
        activation=case.activation,
        dtype=torch.float64 if case.x.dtype == torch.float64 else torch.float32,
    )
    with torch.no_grad():
        layer.weight.copy_(case.weight)
        layer.bias.copy_(case.bias)
        inplace = layer_for(case.x)(
            case.x.size(1), eps=case.eps, variance="biased", activation=case.activation, inplace=True
        ).to(layer.weight.dtype)
        inplace.weight.copy_(case.weight)
        inplace.bias.copy_(case.bias)
        memory = case.x.clone()
        y_inplace = inplace(memory) if case.residual is None else inplace(memory, case.residual)
        assert y_inplace.data_ptr() == memory.data_ptr(), case.name
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.residual) if t is not None]
    y = layer(*leaves)
    y.backward(case.dy)
    outputs = {"y": y, "y in place": y_inplace, "dx": leaves[0].grad}
    if case.residual is not None:
        outputs["dresidual"] = leaves[1].grad
    outputs |= {"dweight": layer.weight.grad, "dbias": layer.bias.grad}
    outputs |= {"mean": layer.running_mean, "var": layer.running_var}
    return {name: value.detach().clone() for name, value in outputs.items()}


def expected(case: Case, y: Tensor) -> dict[str, Tensor]:
    """The same in float64; `y` are outputs of the layer, whose signs say where ReLU let a gradient pass."""
    mean, var, n = batch_statistics(case.x)
    used = variance_to_normalise(var, n, "biased")
    leaves = [t.to(torch.float64, copy=True).requires_grad_() for t in (case.x, case.weight, case.bias)]
    residual = None if case.residual is None else case.residual.double()
    linear = normalise(leaves[0], mean, used, case.eps, leaves[1], leaves[2], residual)
    g = case.dy.double() if case.activation is None else case.dy.double() * (y > 0)
    linear.backward(g)
    out = (linear if case.activation is None else torch.relu(linear)).detach()
    outputs = {"y": out, "y in place": out, "dx": leaves[0].grad, "dresidual": g, "mean": mean, "var": var}
    return outputs | {"dweight": leaves[1].grad, "dbias": leaves[2].grad}


def main() -> None:
    cases_file, results_file, *threads = sys.argv[1:]
    cases = torch.load(cases_file, weights_only=False)
    results = Results(config=momentum_bn.show_config(), outputs={})
    for count in map(int, threads):
        torch.set_num_threads(count)
        results.outputs[count] = {case.name: run(case) for case in cases}
    torch.save((results.config, results.outputs), results_file)


if __name__ == "__main__":
    sys.modules["layer_results"] = sys.modules["__main__"]  # what torch.load looks for a Case in
    main()
