"""Times the layer beside its peers, in multiples of a warm copy of the same tensor in the same process.

    python benchmarks/layer.py                    all shapes, eager peers
    python benchmarks/layer.py --compiled         torch.compile of the peers, too (minutes)
    python benchmarks/layer.py --only 256x56x56   shapes whose name contains this

Prints a table and writes runs/benchmarks/layer.json.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import momentum_bn
from peers import PublishedBatchNorm, published_formulas
from timing import Call, interleaved_medians, machine


@dataclass(frozen=True)
class Case:
    """A tensor to normalise."""

    shape: tuple[int, ...]
    channels_last: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """For example ``bf16 256x56x56 NHWC``; the batch size is told where it is not 32."""
        batch, *rest = self.shape
        words = [{torch.float32: "", torch.bfloat16: "bf16"}[self.dtype], "x".join(map(str, rest))]
        if len(self.shape) == 4:
            words.append("NHWC" if self.channels_last else "NCHW")
        if batch != 32:
            words.append(f"batch {batch}")
        return " ".join(filter(None, words))

    def make(self) -> Tensor:
        """Returns a tensor of normal values."""
        x = torch.randn(self.shape).to(self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


CASES = [
    *(
        Case((32, *rest), channels_last)
        for rest in ((64, 112, 112), (256, 56, 56), (512, 28, 28), (2048, 7, 7))
        for channels_last in (False, True)
    ),
    Case((256, 4096)),
    Case((32, 256, 56, 56), False, torch.bfloat16),
    Case((32, 256, 56, 56), True, torch.bfloat16),
    Case((128, 256, 56, 56)),
    Case((32, 64, 8, 8)),
    Case((2, 16, 2, 2)),
]


def forward_calls(case: Case, compiled: bool) -> dict[str, Call]:
    """What is timed without gradients. "copy" is the unit."""
    channels = case.shape[1]
    x, residual, out = case.make(), case.make(), case.make()
    layer = _layer(channels)
    inplace = _layer(channels, inplace=True)
    fused = _layer(channels, inplace=True, activation="relu")
    torch_layer = torch.nn.BatchNorm2d(channels)
    torch_layer._check_input_dim = lambda _: None  # type: ignore[method-assign]
    published = PublishedBatchNorm(channels, total_iters=10**9)
    saved = torch.empty(channels), torch.empty(channels)

    def torch_into_out() -> object:
        return torch.native_batch_norm(
            x,
            torch_layer.weight,
            torch_layer.bias,
            torch_layer.running_mean,
            torch_layer.running_var,
            True,
            0.1,
            1e-5,
            out=(out, *saved),
        )

    calls: dict[str, Call] = {
        "copy": lambda: out.copy_(x),
        "relu_": lambda: residual.relu_(),
        "clone": lambda: x.clone(),
        "ours in place": lambda: inplace(x),
        "ours in place + relu": lambda: fused(x),
        "ours in place + residual + relu": lambda: fused(x, residual),
        "ours": lambda: layer(x),
        "torch BN": lambda: torch_layer(x),
        "torch BN, out reused": torch_into_out,
        "torch BN + relu_": lambda: torch_layer(x).relu_(),
        "published": lambda: published(x),
    }
    if compiled:
        parameters = torch.ones(channels), torch.zeros(channels), torch.zeros(channels), torch.ones(channels)
        compiled_published = torch.compile(published_formulas)
        compiled_torch = torch.compile(torch_layer)
        calls["torch.compile(published)"] = lambda: compiled_published(x, *parameters)
        calls["torch.compile(torch BN)"] = lambda: compiled_torch(x)
    return {name: _without_grad(call) for name, call in calls.items()}


def training_calls(case: Case, compiled: bool) -> dict[str, Call]:
    """Forward and backward; the gradient that comes in is not the layer's to overwrite."""
    channels = case.shape[1]
    x = case.make().requires_grad_()
    dy, out = case.make(), case.make()
    torch_layer = torch.nn.BatchNorm2d(channels)
    torch_layer._check_input_dim = lambda _: None  # type: ignore[method-assign]
    models: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": _layer(channels),
        "ours + relu": _layer(channels, activation="relu"),
        "torch BN": torch_layer,
        "published": PublishedBatchNorm(channels, total_iters=10**9),
    }
    if compiled:
        parameters = (
            torch.ones(channels, requires_grad=True),
            torch.zeros(channels, requires_grad=True),
            torch.zeros(channels),
            torch.ones(channels),
        )
        compiled_published = torch.compile(published_formulas)
        models["torch.compile(published)"] = lambda x: compiled_published(x, *parameters)

    def training(model: Callable[[Tensor], Tensor]) -> Call:
        return lambda: torch.autograd.grad(model(x), x, dy)

    calls: dict[str, Call] = {"copy": lambda: out.copy_(dy)}
    calls.update((f"{name}: forward + backward", training(model)) for name, model in models.items())

    # The kernel alone.
    weight = torch.ones(channels)
    with torch.no_grad():
        _, saved = torch.ops.momentum_bn._forward_train(
            x, None, weight, weight, [], 1e-5, 100, 2, "cosine", "published", None
        )
    backward = torch.ops.momentum_bn._backward.default
    calls["ours: backward, fresh dx"] = _without_grad(
        lambda: backward(dy, x, None, weight, saved, None, [True, True, True, False])
    )
    return calls


def _layer(channels: int, **options: object) -> momentum_bn.MomentumBatchNorm:
    # Far from its end, the schedule changes nothing that is timed.
    return momentum_bn.MomentumBatchNorm(channels, total_iters=10**9, **options)  # type: ignore[arg-type]


def _without_grad(call: Call) -> Call:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def main() -> None:
    """Times all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--compiled", action="store_true", help="torch.compile of the peers, too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/layer.json"))
    options = parser.parse_args()

    about = machine()
    print(", ".join(f"{key}: {value}" for key, value in about.items()))
    print("Multiples of a warm copy_ of the same tensor in the same process; medians of", options.rounds, "rounds.\n")
    results: dict[str, dict[str, dict[str, float]]] = {}
    for case in CASES:
        if options.only not in case.name:
            continue
        results[case.name] = {}
        for title, make in (("forward", forward_calls), ("training", training_calls)):
            seconds = interleaved_medians(make(case, options.compiled), options.rounds, 0.02)
            results[case.name][title] = seconds
            _print(f"{case.name}, {title}", seconds)
            gc.collect()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": about, "seconds": results}, indent=2) + "\n")
    print("Written:", options.out)


def _print(title: str, seconds: dict[str, float]) -> None:
    unit = seconds["copy"]
    print(f"{title} (copy_ {unit * 1e6:.1f} us)")
    for name, value in seconds.items():
        if name != "copy":
            print(f"  {name:<36} {value / unit:8.2f}  {value * 1e6:10.1f} us")
    print()


if __name__ == "__main__":
    main()
