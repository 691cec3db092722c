"""The benchmarks of several processes: that they count and compute what they say, on networks of no size."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.distributed import collectives, cost_model, weak_scaling
from benchmarks.distributed.cost_model import Link, Ranks
from benchmarks.distributed.launch import on_ranks
from benchmarks.distributed.sync_batchnorm import SyncBatchNorm

REPOSITORY = Path(__file__).resolve().parents[2]


def sync_batchnorm_of_two() -> list[torch.Tensor]:
    """Sums, over both ranks, of the parameters' gradients, then all outputs, gradients and statistics."""
    torch.manual_seed(0)
    layer = SyncBatchNorm(3).double()
    x, dy = (torch.randn(6, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    mine = slice(0, 4) if dist.get_rank() == 0 else slice(4, 6)
    leaf = x[mine].clone().requires_grad_()
    y = layer(leaf)
    y.backward(dy[mine])
    for gradient in (layer.weight.grad, layer.bias.grad):
        dist.all_reduce(gradient)
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, (y.detach(), leaf.grad))
    joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    return [*joined, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]


def test_emulated_sync_batchnorm_is_batchnorm_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    layer = torch.nn.BatchNorm2d(3).double()
    x, dy = (torch.randn(6, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    y = layer(x.requires_grad_())
    y.backward(dy)
    assert layer.weight.grad is not None and layer.bias.grad is not None
    expected = [y, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
    torch.testing.assert_close(on_ranks(2, sync_batchnorm_of_two), expected)


def small_collectives() -> list[dict[str, Any]]:
    collectives.CHANNELS, collectives.REPEATS = (4,), 1  # type: ignore[assignment]
    return collectives.measure(rounds=1)


def test_collectives_are_counted() -> None:
    (record,) = on_ranks(2, small_collectives)
    assert record["collectives"] == {
        "Momentum BatchNorm, forward": 0,
        "Momentum BatchNorm, forward + backward": 0,
        "Momentum BatchNorm, process_group, forward": 1,
        "Momentum BatchNorm, process_group, forward + backward": 1,
        "SyncBatchNorm, emulated, forward": 1,
        "SyncBatchNorm, emulated, forward + backward": 2,
        "all_gather of its statistics alone": 1,
    }
    link = Link(latency=1e-3, bandwidth=1e6)
    model = collectives.predicted(record, link)
    assert model["all_gather of its statistics alone"] == pytest.approx(2e-3 + 8 * 9e-6)
    sync = collectives.median(record, "Momentum BatchNorm, forward + backward") + 2e-3 + 4 * 9e-6 + 4e-3 + 4 * 8e-6
    assert model["SyncBatchNorm, emulated, forward + backward"] == pytest.approx(sync)
    assert "measured / model: Momentum BatchNorm, process_group, forward" in collectives.report([record], link)


def small_training() -> dict[str, Any]:
    weak_scaling.BLOCKS, weak_scaling.WIDTH, weak_scaling.BATCH, weak_scaling.SIDE = (1,), 4, 2, 32  # type: ignore[assignment]
    return weak_scaling.measure(rounds=1, steps=1)


def test_weak_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    result = on_ranks(2, small_training)
    of_ddp, in_group, published, sync = result["collectives"].values()
    norms = 5  # the stem's, three and the projection's
    assert of_ddp == published > 0
    assert in_group == of_ddp + 2 * norms
    assert sync == of_ddp + (4 + 2) * norms
    monkeypatch.setattr(weak_scaling, "RANKS", (1, 2))
    program = [sys.executable, "-c", "import sys; print('images/s', 10 * int(sys.argv[1]))"]
    result["rates"]["a program"] = weak_scaling.measure_program(lambda ranks: [*program, str(ranks)], rounds=1)
    assert result["rates"]["a program"] == {1: [10.0], 2: [20.0]}
    assert re.search(r"a program +10\.0 +20\.0 +1\.00 ", weak_scaling.report(result))


def test_cost_of_a_collective() -> None:
    ranks = Ranks(8, Link(latency=1.0, bandwidth=1.0))
    assert cost_model.all_gather_seconds(ranks, 10) == 3 + 7 * 10
    assert cost_model.all_reduce_seconds(ranks, 16) == 2 * 3 + 2 * 7 / 8 * 16
    assert len(cost_model.resnet50_norm_channels()) == 53 and sum(cost_model.resnet50_norm_channels()) == 26560
    assert cost_model.sync_batchnorm_step(ranks, [2]).collectives == 6
    assert cost_model.group_step(ranks, [2]).received == 2 * 7 * 8 * 5


def test_documented_costs_are_computed() -> None:
    page = (REPOSITORY / "docs" / "distributed.md").read_text()
    assert cost_model.table(cost_model.resnet50_norm_channels()) in page
