"""DistributedDataParallel, FSDP2 and distributed checkpoints. The oracle is one process with the whole batch.

The tests called test_DistributedDataParallel_SyncBatchNorm... are those that torch has for its SyncBatchNorm.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from inputs import randn
from momentum_bn import MomentumTeacher, convert_momentum_batchnorm
from ranks import run_ranks
from snapshots import same_bits

EXACT = {"rtol": 1e-10, "atol": 1e-10}
STEPS = 5


@dataclass(frozen=True)
class Case:
    """A training run of two views per step."""

    shape: tuple[int, ...] = (8, 3, 6, 6)  # of the whole batch
    shards: tuple[int, ...] = (4, 4)
    dtype: torch.dtype = torch.float64
    affine: bool = True
    channels_last: bool = False
    ddp: dict[str, Any] = field(default_factory=dict)

    def network(self, process_group: Any = None) -> nn.Module:
        torch.manual_seed(3)
        channels = self.shape[1]
        if len(self.shape) == 2:
            layers = [nn.Linear(channels, 6, bias=False), nn.BatchNorm1d(6, affine=self.affine), nn.ReLU()]
        else:
            norm = nn.BatchNorm2d(6, affine=self.affine)
            layers = [nn.Conv2d(channels, 6, 3, bias=False), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        net = nn.Sequential(*layers, nn.Linear(6, 4), nn.BatchNorm1d(4, affine=self.affine), nn.Linear(4, 2))
        convert_momentum_batchnorm(net, total_iters=STEPS, process_group=process_group)
        net.to(self.dtype)
        return net.to(memory_format=torch.channels_last) if self.channels_last else net

    def view(self, step: int, number: int) -> Tensor:
        x = randn(*self.shape, seed=2 * step + number, scale=1 + step / 4, shift=1, dtype=self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def mine(self, whole: Tensor) -> Tensor:
        return whole.split(self.shards)[dist.get_rank()]


def loss_of(y: Tensor, whole_batch: int) -> Tensor:
    """A mean over the whole batch, as far as this process has it."""
    return (y - 0.5).square().sum() / whole_batch


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those of all ranks put together."""
    state = {name: value.detach() for name, value in module.state_dict().items()}
    return {name: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for name, v in state.items()}


def train_in_one_process(case: Case) -> dict[str, Tensor]:
    net = case.network()
    optimizer = optimizer_of(net)
    for step in range(STEPS):
        optimizer.zero_grad()
        sum(loss_of(net(case.view(step, number)), case.shape[0]) for number in range(2)).backward()
        optimizer.step()
    return whole_state(net)


def train_with_ddp(case: Case) -> dict[str, Tensor]:
    net = DistributedDataParallel(case.network(dist.group.WORLD), **case.ddp)
    optimizer = optimizer_of(net)
    for step in range(STEPS):
        optimizer.zero_grad()
        # DistributedDataParallel divides the gradients' sum by the number of ranks.
        losses = [loss_of(net(case.mine(case.view(step, number))), case.shape[0]) for number in range(2)]
        (sum(losses) * dist.get_world_size()).backward()
        optimizer.step()
    return whole_state(net.module)


def assert_same_training(case: Case, **tolerance: Any) -> list[dict[str, Tensor]]:
    expected = train_in_one_process(case)
    states = run_ranks(len(case.shards), train_with_ddp, case)
    for state in states:
        for name, value in expected.items():
            assert_close(state[name], value, **(tolerance or EXACT), msg=lambda text, name=name: f"{name}: {text}")
            assert same_bits(state[name], states[0][name]), name
    return states


@pytest.mark.parametrize("broadcast_buffers", [True, False])
@pytest.mark.parametrize("static_graph", [True, False])
def test_DistributedDataParallel_SyncBatchNorm(broadcast_buffers, static_graph):  # noqa: N802
    """Two forwards before each backward, parameters and all of the state."""
    assert_same_training(Case(ddp={"broadcast_buffers": broadcast_buffers, "static_graph": static_graph}))


def test_DistributedDataParallel_SyncBatchNorm_Channels_Last():  # noqa: N802
    assert_same_training(Case(channels_last=True))


def test_DistributedDataParallel_SyncBatchNorm_No_Affine():  # noqa: N802
    assert_same_training(Case(affine=False))


def test_DistributedDataParallel_SyncBatchNorm_2D_Input():  # noqa: N802
    assert_same_training(Case(shape=(8, 3)))


def test_DistributedDataParallel_SyncBatchNorm_Single_Input_Per_Process():  # noqa: N802
    assert_same_training(Case(shape=(3, 3), shards=(1, 1, 1)))


@pytest.mark.parametrize("shards", [(7, 1), (0, 8), (2, 1, 5, 0)], ids=str)
def test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_Running_Value(shards):  # noqa: N802
    """Also of empty ranks (pytorch#74944)."""
    (state, *_) = assert_same_training(Case(shards=shards))
    assert int(state["1.num_batches_tracked"]) == 2 * STEPS and int(state["1.cur_iter_state"]) == STEPS


def gradients_of_ddp(case: Case) -> tuple[list[Tensor], Tensor]:
    net = DistributedDataParallel(case.network(dist.group.WORLD))
    x = case.mine(case.view(0, 0)).clone().requires_grad_()
    (loss_of(net(x), case.shape[0]) * dist.get_world_size()).backward()
    return [parameter.grad for parameter in net.parameters()], x.grad / dist.get_world_size()


def test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_gradient():  # noqa: N802
    case = Case(shards=(5, 2, 1))
    net, x = case.network(), case.view(0, 0).clone().requires_grad_()
    loss_of(net(x), case.shape[0]).backward()
    results = run_ranks(3, gradients_of_ddp, case)
    for gradients, _ in results:
        assert_close(gradients, [parameter.grad for parameter in net.parameters()], **EXACT)
    assert_close(torch.cat([dx for _, dx in results]), x.grad, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_DistributedDataParallel_SyncBatchNorm_half(dtype):  # noqa: N802
    """The statistics of 16-bit values are in float32; what is left is the rounding of the network's outputs."""
    case = Case(dtype=dtype, ddp={"gradient_as_bucket_view": True})
    expected = train_in_one_process(replace(case, dtype=torch.float64))
    for state in run_ranks(2, train_with_ddp, case):
        assert state["1.running_mean"].dtype == dtype
        assert state["1.momentum_state"] == expected["1.momentum_state"], "the schedule is not rounded"
        assert_close(state["1.running_var"].double(), expected["1.running_var"], rtol=0.1, atol=0.1)


def pair_of_four(case: Case) -> dict[str, Tensor] | None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank, own = dist.get_rank() % 2, pairs[dist.get_rank() // 2]
    net = DistributedDataParallel(case.network(own), process_group=own)
    optimizer = optimizer_of(net)
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(2):
            x = case.view(step, number).split(case.shards)[rank]
            (loss_of(net(x), case.shape[0]) * 2).backward()
        optimizer.step()
    return whole_state(net.module)


def test_DistributedDataParallel_SyncBatchNorm_process_group():  # noqa: N802
    """Two trainings side by side, of a group each; the two views' gradients of two backward passes add up."""
    case = Case(shards=(3, 5))
    expected = train_in_one_process(case)
    for state in run_ranks(4, pair_of_four, case):
        for name, value in expected.items():
            assert_close(state[name], value, **EXACT, msg=name)


# --- without a group --------------------------------------------------------------------------------------------------


def states_seen_by_ddp(broadcast_buffers: bool) -> list[dict[str, Tensor]]:
    case = Case()
    net = DistributedDataParallel(case.network(), broadcast_buffers=broadcast_buffers)
    seen: list[dict[str, Tensor]] = []
    net.module[1].register_forward_pre_hook(
        lambda layer, _: seen.append({name: value.clone() for name, value in layer.named_buffers()})
    )
    for step in range(3):
        sum(net(case.mine(case.view(step, number))).square().sum() for number in range(2)).backward()
    return seen


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_state_without_a_group(broadcast_buffers):
    """Broadcast buffers: before each forward all ranks have the first one's state, half-done updates too. Otherwise
    each rank has its own statistics, and all have one schedule."""
    first, second = run_ranks(2, states_seen_by_ddp, broadcast_buffers)
    assert len(first) == 6
    for forward, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        for name in ("num_batches_tracked", "view_count", "cur_iter_state", "momentum_state"):
            assert same_bits(ours[name], theirs[name]), name
        for name in ("running_mean", "running_var", "view_mean_sum", "view_var_sum"):
            zero_yet = forward == 0 or (name.startswith("running") and forward < 2)
            zero_again = name.startswith("view") and forward % 2 == 0
            assert same_bits(ours[name], theirs[name]) == (broadcast_buffers or zero_yet or zero_again), (forward, name)


# --- the teacher ------------------------------------------------------------------------------------------------------


def train_with_teacher(case: Case, group: Any, view_of_rank: Any, wrap: Any, ranks: int) -> dict[str, Tensor]:
    student = case.network(group)
    teacher = MomentumTeacher(student, total_iters=STEPS, process_group=group)
    net = wrap(student)
    optimizer = optimizer_of(net)
    for step in range(STEPS):
        teacher.update()
        views = [view_of_rank(case.view(step, number)) for number in range(2)]
        targets = [teacher(view) for view in views]
        losses = [(net(views[i]) - targets[1 - i]).square().sum() / case.shape[0] for i in range(2)]
        optimizer.zero_grad()
        (sum(losses) * ranks).backward()
        optimizer.step()
    return {f"{name}.{key}": v for name, m in (("s", student), ("t", teacher)) for key, v in whole_state(m).items()}


def teacher_of_a_rank(case: Case, synchronised: bool) -> dict[str, Tensor]:
    group = dist.group.WORLD if synchronised else None
    wrapped = DistributedDataParallel(case.network(group))
    assert type(MomentumTeacher(wrapped, total_iters=STEPS).module) is type(wrapped.module), "not a wrapped one"
    return train_with_teacher(
        case, group, case.mine, lambda net: DistributedDataParallel(net, **case.ddp), dist.get_world_size()
    )


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_teacher_in_a_group(broadcast_buffers):
    case = Case(shards=(3, 5), ddp={"broadcast_buffers": broadcast_buffers})
    expected = train_with_teacher(case, None, lambda whole: whole, lambda net: net, 1)
    states = run_ranks(2, teacher_of_a_rank, case, True)
    for state in states:
        for name, value in expected.items():
            assert_close(state[name], value, **EXACT, msg=name)
            assert same_bits(state[name], states[0][name]), name


def test_teacher_with_statistics_of_each_rank():
    """The paper's way: parameters are the same on all ranks, to the bit; the teacher's statistics are each rank's."""
    first, second = run_ranks(2, teacher_of_a_rank, Case(), False)
    for name, value in first.items():
        statistics = name.rsplit(".")[-1] in ("running_mean", "running_var")
        assert statistics or same_bits(second[name], value), name
    assert not same_bits(first["t.module.1.running_mean"], second["t.module.1.running_mean"])


# --- FSDP2 and distributed checkpoints --------------------------------------------------------------------------------


def sharded(case: Case) -> nn.Module:
    net = case.network(dist.group.WORLD)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def train_sharded(
    case: Case, first: int, last: int, load: Path | None = None, save: Path | None = None
) -> dict[str, Tensor]:
    """Forwards ``first`` to ``last`` - 1; every second one completes a step."""
    net = sharded(case)
    optimizer = optimizer_of(net)
    if load:
        model_state, optimizer_state = get_state_dict(net, optimizer)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=load)
        set_state_dict(net, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    for forward in range(first, last):
        x = case.mine(case.view(*divmod(forward, 2)))
        # FSDP2 divides the gradients' sum by the number of ranks.
        (loss_of(net(x), case.shape[0]) * dist.get_world_size()).backward()
        optimizer.step()
        optimizer.zero_grad()
    if save:
        model_state, optimizer_state = get_state_dict(net, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=save)
    assert isinstance(net[1].weight, DTensor), "sharded"
    return whole_state(net)


def steps_in_one_process(case: Case, forwards: int) -> dict[str, Tensor]:
    net = case.network()
    optimizer = optimizer_of(net)
    for forward in range(forwards):
        loss_of(net(case.view(*divmod(forward, 2))), case.shape[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole_state(net)


def test_fully_shard():
    case = Case(shards=(5, 3))
    expected = steps_in_one_process(case, 6)
    for state in run_ranks(2, train_sharded, case, 0, 6):
        for name, value in expected.items():
            assert_close(state[name], value, **EXACT, msg=name)


def sharded_teacher(case: Case) -> dict[str, Tensor]:
    student = case.network(dist.group.WORLD)
    teacher = MomentumTeacher(student, total_iters=STEPS, process_group=dist.group.WORLD)
    for net in (student, teacher.module):
        fully_shard(net, reshard_after_forward=True)
    optimizer = optimizer_of(student)
    for step in range(STEPS):
        teacher.update()
        views = [case.mine(case.view(step, number)) for number in range(2)]
        losses = [(student(views[i]) - teacher(views[1 - i])).square().sum() / case.shape[0] for i in range(2)]
        optimizer.zero_grad()
        (sum(losses) * dist.get_world_size()).backward()
        optimizer.step()
    other = case.network(dist.group.WORLD)
    with pytest.raises(ValueError, match="must be sharded"):
        teacher.update(other)
    return {f"{name}.{key}": v for name, m in (("s", student), ("t", teacher)) for key, v in whole_state(m).items()}


def test_fully_shard_student_and_teacher():
    case = Case(shards=(3, 5))
    expected = train_with_teacher(case, None, lambda whole: whole, lambda net: net, 1)
    for state in run_ranks(2, sharded_teacher, case):
        for name, value in expected.items():
            assert_close(state[name], value, **EXACT, msg=name)


@pytest.mark.parametrize("shards", [(3, 3, 2), (8,)], ids=str)
def test_distributed_checkpoint_onto_another_number_of_ranks(shards, tmp_path):
    """Saved by two ranks between two views, the run goes on as one that was never cut."""
    run_ranks(2, train_sharded, Case(), 0, 5, None, tmp_path)
    expected = steps_in_one_process(Case(), 9)
    for state in run_ranks(len(shards), train_sharded, Case(shards=shards), 5, 9, tmp_path):
        for name, value in expected.items():
            assert_close(state[name], value, **EXACT, msg=name)


def teacher_run(case: Case, first: int, last: int, load: Path | None = None, save: Path | None = None) -> Any:
    student = case.network(dist.group.WORLD)
    teacher = MomentumTeacher(student, total_iters=STEPS, process_group=dist.group.WORLD)
    net = DistributedDataParallel(student)
    optimizer = optimizer_of(net)
    state: dict[str, Any] = {"student": student.state_dict(), "teacher": teacher.state_dict()}
    if load:
        state |= {"optimizer": get_state_dict(student, optimizer)[1]}
        dcp.load(state, checkpoint_id=load)
        set_state_dict(student, optimizer, model_state_dict=state["student"], optim_state_dict=state["optimizer"])
        teacher.load_state_dict(state["teacher"])
    for step in range(first, last):
        teacher.update()
        views = [case.mine(case.view(step, number)) for number in range(2)]
        losses = [(net(views[i]) - teacher(views[1 - i])).square().sum() / case.shape[0] for i in range(2)]
        optimizer.zero_grad()
        (sum(losses) * dist.get_world_size()).backward()
        optimizer.step()
    if save:
        dcp.save(state | {"optimizer": get_state_dict(student, optimizer)[1]}, checkpoint_id=save)
    return whole_state(student), whole_state(teacher)


def test_teacher_and_ddp_go_on_from_a_distributed_checkpoint(tmp_path):
    run_ranks(2, teacher_run, Case(), 0, 2, None, tmp_path)
    (uncut,) = run_ranks(1, teacher_run, Case(shards=(8,)), 0, 4)
    for resumed in run_ranks(3, teacher_run, Case(shards=(3, 3, 2)), 2, 4, tmp_path):
        assert_close(resumed, uncut, **EXACT)
