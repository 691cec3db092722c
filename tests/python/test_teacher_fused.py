"""MomentumTeacher: its fused network, and statistics that follow the student's."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import momentum_bn
from momentum_bn import MomentumTeacher
from oracle import teacher_momentum
from snapshots import assert_same, same_bits, snapshot, unchanged

pytestmark = pytest.mark.cpu_only


def make_student(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5)
    ).to(dtype)


def images(step: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, 3, 5, 5, dtype=dtype, generator=torch.Generator().manual_seed(step))


def train(student: nn.Module, step: int) -> None:
    """A step of an optimiser."""
    parameter = next(student.parameters())
    loss = student(images(step, parameter.dtype)).square().sum()
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    with torch.no_grad():
        for p, g in zip(student.parameters(), gradients, strict=True):
            p -= 0.01 * g


# --- fuse ------------------------------------------------------------------------------------------


def test_a_teacher_is_fused_unless_asked_not_to_be() -> None:
    student = make_student()
    before = snapshot(student)
    fused, written = MomentumTeacher(student, 10), MomentumTeacher(student, 10, fuse=False)
    assert fused.fused == {"1": "relu", "5": "in place"} and written.fused == {}
    assert "forward" not in vars(student) and type(fused.module) is nn.Sequential
    assert_same(snapshot(student), before)
    for step in range(6):
        train(student, step)
        for teacher in (fused, written):
            teacher.update()
        for view in range(2):
            x = images(100 + 2 * step + view)
            assert_close(fused(x), written(x), rtol=1e-12, atol=1e-12)
            assert_close(x, images(100 + 2 * step + view), rtol=0, atol=0)
    assert list(fused.state_dict()) == list(written.state_dict())
    for ours, theirs in zip(fused.state_dict().values(), written.state_dict().values(), strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("move", [copy.deepcopy, lambda teacher: pickle.loads(pickle.dumps(teacher))])
def test_a_copied_teacher_is_fused(move: Any) -> None:
    teacher = MomentumTeacher(make_student(), 10)
    teacher.update()
    teacher(images())
    moved = move(teacher)
    assert moved.fused == teacher.fused
    assert_close(moved(images(1)), teacher(images(1)))
    whole = move(nn.ModuleDict({"teacher": teacher, "student": teacher.student}))
    assert whole["teacher"].fused == teacher.fused and whole["teacher"].student is whole["student"]


def test_a_fused_student_has_a_teacher_that_is_asked_about_itself() -> None:
    student = momentum_bn.fuse(momentum_bn.convert_momentum_batchnorm(make_student(), 10))
    assert MomentumTeacher(student, 10, fuse=False).fused == {}
    assert MomentumTeacher(student, 10).fused == momentum_bn.fused_layers(student) != {}


def test_a_network_that_can_be_traced_in_parts_only() -> None:
    class Head(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body, self.bn, self.relu = body, nn.BatchNorm1d(5), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.relu(self.bn(y)) if y.isfinite().all() else y

    student = Head(make_student()).double()
    teacher, written = MomentumTeacher(student, 10), MomentumTeacher(student, 10, fuse=False)
    assert teacher.fused == {"body.1": "relu", "body.5": "in place"}
    assert_close(teacher(images()), written(images()))


def test_a_network_without_batchnorm() -> None:
    teacher = MomentumTeacher(nn.Linear(3, 3), 10)
    assert teacher.fused == {}
    teacher.update()


def test_a_network_of_ones_own() -> None:
    own = make_student()
    teacher = MomentumTeacher(make_student(), 10, teacher=own)
    assert teacher.module is own and teacher.fused == {"1": "relu", "5": "in place"}


# --- statistics="student" --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_statistics_follow_the_students(dtype: torch.dtype) -> None:
    student = make_student(dtype)
    train(student, 50)
    teacher = MomentumTeacher(student, total_iters=8, param_momentum=0.7, statistics="student")
    norms, theirs = [teacher.module[1], teacher.module[5]], [student[1], student[5]]
    assert [type(norm) for norm in norms] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert teacher.statistics == "student" and teacher.fused == {}
    followers = {name: value.double().clone() for name, value in _followers(teacher.module).items()}
    for step in range(10):
        train(student, step)
        teacher.update()
        p = teacher_momentum(step, 8, 0.7)
        for name, value in _followers(student).items():
            followers[name] = p * followers[name] + (1 - p) * value.double()
        with unchanged(student):
            y = teacher(images(step, dtype))
        for name, value in _followers(teacher.module).items():
            bound = 1e-12 if dtype == torch.float64 else 1e-2
            assert_close(value.double(), followers[name], rtol=bound, atol=bound)
        for norm, their in zip(norms, theirs, strict=True):
            assert int(norm.num_batches_tracked) == int(their.num_batches_tracked) == step + 2
        evaluated = copy.deepcopy(teacher.module).eval()
        assert same_bits(evaluated(images(step, dtype)), y)
    assert not y.requires_grad


def _followers(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in net.state_dict().items() if "num_batches" not in name}


def test_sixteen_bit_statistics_do_not_stand_still() -> None:
    student = make_student(torch.bfloat16)
    teacher = MomentumTeacher(student, total_iters=1000, param_momentum=0.999, statistics="student")
    with torch.no_grad():
        student[1].running_mean.fill_(1.0)
    for _ in range(400):
        teacher.update()
    assert 0.2 < float(teacher.module[1].running_mean[0]) < 0.5
    assert "master/1/running_mean" in teacher.state_dict()
    teacher.double()
    assert not any(name.startswith("master/") for name in teacher.state_dict())


def test_norms_stay_in_evaluation_mode() -> None:
    student = nn.Sequential(make_student(), nn.Dropout())
    teacher = MomentumTeacher(student, 10, statistics="student")
    for mode in (True, False, True):
        whole = nn.ModuleList([teacher]).train(mode)
        assert teacher.module[1].training is mode and whole.training is mode
        assert not teacher.module[0][1].training and not teacher.module[0][5].training
    before = snapshot(teacher)
    teacher(images())
    assert_same(snapshot(teacher), before)


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_cut_run_goes_on_bit_for_bit(way: str) -> None:
    student = make_student()
    teacher = MomentumTeacher(student, 10, statistics="student")
    for step in range(3):
        train(student, step)
        teacher.update()
    if way == "state_dict":
        resumed = MomentumTeacher(make_student(), 10, statistics="student")
        file = io.BytesIO()
        torch.save(teacher.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file))
    else:
        resumed = copy.deepcopy(teacher) if way == "deepcopy" else pickle.loads(pickle.dumps(teacher))
    for step in range(3, 6):
        train(student, step)
        teacher.update()
        resumed.update(student)
        assert same_bits(resumed(images(step)), teacher(images(step)))
    assert resumed.statistics == "student"


def test_what_does_not_fit_is_refused() -> None:
    student = make_student()
    with pytest.raises(ValueError, match=r'statistics must be "own" or "student" \(got \'mine\'\)'):
        MomentumTeacher(student, 10, statistics="mine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="views_per_update would have no effect"):
        MomentumTeacher(student, 10, statistics="student", views_per_update=1)
    teacher = MomentumTeacher(student, 10, statistics="student")
    other = make_student()
    other[5] = nn.BatchNorm1d(5, track_running_stats=False).double()
    with unchanged(teacher), pytest.raises(ValueError, match=r"student must have the teacher's BatchNorms.*\[4, 5\]"):
        teacher.update(other)
    with pytest.raises(ValueError, match="student must have the teacher's BatchNorms"):
        MomentumTeacher(student, 10, teacher=other, statistics="student")


def test_a_wrapped_student() -> None:
    student = make_student()
    teacher, wrapped = (MomentumTeacher(s, 10, 0.5, statistics="student") for s in (student, nn.DataParallel(student)))
    train(student, 0)
    for each in (teacher, wrapped):
        each.update()
    assert_close(teacher(images()), wrapped(images()))
    assert list(teacher.state_dict()) == list(wrapped.state_dict())


def test_a_student_of_momentum_batchnorms() -> None:
    student = momentum_bn.convert_momentum_batchnorm(make_student(), 10, views_per_update=1)
    teacher = MomentumTeacher(student, 10, 0.5, statistics="student")
    train(student, 0)
    teacher.update()
    before = snapshot(teacher)
    assert teacher.fused == {"1": "relu", "5": "in place"}
    teacher(images())
    assert_same(snapshot(teacher), before)


@pytest.mark.parametrize("norm", [nn.Identity(), nn.BatchNorm1d(2, track_running_stats=False)])
def test_a_student_without_running_statistics_is_refused(norm: nn.Module) -> None:
    with pytest.raises(ValueError, match='statistics="student" would have no effect: Sequential has no BatchNorm with'):
        MomentumTeacher(nn.Sequential(nn.Linear(2, 2), norm), 10, statistics="student")
