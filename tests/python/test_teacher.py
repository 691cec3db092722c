"""MomentumTeacher: what it averages, what it keeps, and what it refuses."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import momentum_bn
from inputs import randn
from momentum_bn import MomentumTeacher
from oracle import MomentumBatchNormOracle, teacher_momentum
from snapshots import PLAIN_STATE, same_bits, snapshot, unchanged


def make_student(dtype=torch.float32, width=4):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(),
        nn.Linear(width * 9, 5), nn.BatchNorm1d(5),
    ).to(dtype)  # fmt: skip


def move(student, step):
    """What an optimiser would do, in numbers that are the same everywhere."""
    with torch.no_grad():
        for i, p in enumerate(student.parameters()):
            p.add_(randn(*p.shape, seed=100 * step + i, scale=0.1).to(p.dtype))


def images(step=0, dtype=torch.float32):
    return randn(6, 3, 5, 5, seed=step, dtype=dtype)


def layers_of(teacher):
    return [
        m
        for m in teacher.modules()
        if isinstance(m, (momentum_bn.MomentumBatchNorm1d, momentum_bn.MomentumBatchNorm2d))
    ]


def test_new_teacher_is_a_copy_with_momentum_batchnorms():
    student = make_student()
    with torch.no_grad():
        student[1].weight.fill_(1.5)
    before = snapshot(student)
    teacher = MomentumTeacher(student, total_iters=40, views_per_update=3, variance="biased")
    assert isinstance(teacher, nn.Module)
    assert isinstance(student[1], nn.BatchNorm2d) and type(student[1]) is nn.BatchNorm2d, "the student is left alone"
    for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
        assert same_bits(p, q) and p.data_ptr() != q.data_ptr()
    layers = layers_of(teacher)
    assert [type(m) for m in layers] == [momentum_bn.MomentumBatchNorm2d, momentum_bn.MomentumBatchNorm1d]
    assert all(m.total_iters == 40 and m.views_per_update == 3 and m.variance == "biased" for m in layers)
    assert all(m.momentum == 1.0 and m.cur_iter == 0 for m in layers)
    assert before.keys() == snapshot(student).keys()
    with unchanged(student):
        teacher(images())
        teacher.update()


def test_the_students_layers_are_not_shared():
    student = make_student()
    teacher = MomentumTeacher(student, total_iters=40)
    for _ in range(2):
        teacher(images())
    assert torch.equal(student[1].running_mean, torch.zeros(4)) and int(student[1].num_batches_tracked) == 0
    layer = layers_of(teacher)[0]
    assert layer.cur_iter == 1 and not torch.equal(layer.running_mean, torch.zeros(4))
    student(images())
    assert int(layer.num_batches_tracked) == 2


def test_averages_follow_the_formula():
    """The first update uses t = 0; past total_iters the teacher stands still."""
    student = make_student(torch.float64)
    teacher = MomentumTeacher(student, total_iters=10, param_momentum=0.9)
    expected = [p.detach().clone() for p in student.parameters()]
    for t in range(14):
        move(student, t)
        teacher.update()
        m = teacher_momentum(t, 10, 0.9)
        expected = [m * e + (1 - m) * p.detach() for e, p in zip(expected, student.parameters(), strict=True)]
        for ours, theirs in zip(teacher.parameters(), expected, strict=True):
            assert_close(ours.detach(), theirs, rtol=1e-12, atol=1e-12)
    assert teacher_momentum(0, 10, 0.9) == pytest.approx(0.9) and teacher_momentum(10, 10, 0.9) == 1.0


def test_default_param_momentum():
    student = make_student(torch.float64)
    teacher = MomentumTeacher(student, 10)
    old = next(teacher.parameters()).detach().clone()
    move(student, 0)
    teacher.update()
    assert_close(
        next(teacher.parameters()).detach(),
        0.99 * old + 0.01 * next(student.parameters()).detach(),
        rtol=1e-12,
        atol=1e-13,
    )


def test_float32_average():
    student = make_student()
    teacher = MomentumTeacher(student, total_iters=300, param_momentum=0.99)
    expected = [p.detach().double() for p in student.parameters()]
    for t in range(50):
        move(student, t)
        teacher.update()
        m = teacher_momentum(t, 300, 0.99)
        expected = [m * e + (1 - m) * p.detach().double() for e, p in zip(expected, student.parameters(), strict=True)]
    for ours, theirs in zip(teacher.parameters(), expected, strict=True):
        assert_close(ours.detach().double(), theirs, rtol=2e-6, atol=2e-6)


def test_update_from_another_student():
    student, other = make_student(torch.float64), make_student(torch.float64)
    teacher = MomentumTeacher(student, total_iters=10, param_momentum=0.5)
    expected = [p.detach().clone() for p in student.parameters()]
    move(other, 1)
    teacher.update(other)
    for ours, old, new in zip(teacher.parameters(), expected, other.parameters(), strict=True):
        assert_close(ours.detach(), 0.5 * old + 0.5 * new.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_student_has_a_float32_master(dtype):
    """An average in 16 bits would stand still: a step of 0.001 is below half a unit in the last place."""
    student = make_student(dtype)
    teacher = MomentumTeacher(student, total_iters=10_000, param_momentum=0.999)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.5)
    master = [p.detach().float() for p in MomentumTeacher(make_student(dtype), 10).parameters()]
    start = [m.clone() for m in master]
    for t in range(200):
        teacher.update()
        m = teacher_momentum(t, 10_000, 0.999)
        master = [m * e + (1 - m) * p.detach().float() for e, p in zip(master, student.parameters(), strict=True)]
    kept = [v for v in teacher.state_dict().values() if v.dtype == torch.float32 and v.numel() > 1]
    for ours, expected, first in zip(teacher.parameters(), master, start, strict=True):
        assert ours.dtype == dtype
        assert (ours.detach().float() - first).abs().max() > 0.05, "it moved"
        assert_close(ours.detach().float(), expected, rtol=2**-8, atol=2**-10)
        mine = [v for v in kept if v.shape == expected.shape and torch.allclose(v, expected, rtol=1e-4, atol=1e-5)]
        assert mine, "the master is in the state"
        assert any(same_bits(v.to(dtype), ours) for v in mine), "the parameter is the master's rounding"


def test_no_masters_without_sixteen_bit_parameters():
    student = make_student()
    state = MomentumTeacher(student, 10).state_dict()
    parameters = sum(p.numel() for p in student.parameters())
    buffers = sum(b.numel() for b in student.buffers())
    assert sum(v.numel() for v in state.values()) <= parameters + 2 * buffers + 16


@pytest.mark.parametrize("cut_after", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy"])
def test_cut_run_goes_on_bit_for_bit(cut_after, dtype, way):
    student = make_student(dtype)
    teacher = MomentumTeacher(student, total_iters=6, param_momentum=0.6)
    for step in range(cut_after):
        move(student, step)
        teacher.update()
        teacher(images(step, dtype))
    if way == "deepcopy":
        resumed = copy.deepcopy(teacher)
    else:
        file = io.BytesIO()
        torch.save(teacher.state_dict(), file)
        file.seek(0)
        resumed = MomentumTeacher(make_student(dtype), total_iters=6, param_momentum=0.6)
        resumed.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for step in range(cut_after, cut_after + 4):
        move(student, step)
        teacher.update(student)
        resumed.update(student)
        assert same_bits(resumed(images(step, dtype)), teacher(images(step, dtype)))
    for name, value in teacher.state_dict().items():
        assert same_bits(resumed.state_dict()[name], value), name


def test_the_student_is_referenced_and_not_registered():
    student = make_student()
    teacher = MomentumTeacher(student, 10)
    theirs = {id(t) for t in [*student.parameters(), *student.buffers()]}
    assert not theirs & {id(t) for t in [*teacher.parameters(), *teacher.buffers()]}
    assert len(list(teacher.parameters())) == len(list(student.parameters()))
    assert student not in list(teacher.modules())
    assert not {t.data_ptr() for t in student.state_dict().values()} & {
        t.data_ptr() for t in teacher.state_dict().values()
    }
    memo = {}
    copied = copy.deepcopy(teacher, memo)
    assert all(memo.get(id(t), t) is t for t in [*student.parameters(), *student.buffers()]), "the student was copied"
    assert student not in list(copied.modules())
    teacher.double()
    assert next(student.parameters()).dtype == torch.float32


def test_forward_runs_under_no_grad():
    teacher = MomentumTeacher(make_student(), 10)
    y = teacher(images().requires_grad_())
    assert not y.requires_grad and torch.is_grad_enabled()
    assert y.shape == (6, 5)


def test_forward_passes_arguments_on():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x, *, scale=1.0):
            return self.norm(x) * scale

    teacher = MomentumTeacher(Scaled(), 10).eval()
    x = torch.rand(4, 3)
    assert_close(teacher(x, scale=2.0), teacher(x) * 2)


def test_teacher_forward_against_the_oracle():
    student = nn.Sequential(nn.BatchNorm2d(3)).double()
    teacher = MomentumTeacher(student, total_iters=3)
    oracle = MomentumBatchNormOracle(3, total_iters=3)
    for step in range(10):
        x = images(step, torch.float64)
        assert_close(teacher(x), oracle.train_forward(x), rtol=1e-12, atol=1e-12)
    teacher.eval()
    assert_close(teacher(x), oracle.eval_forward(x), rtol=1e-12, atol=1e-12)


def test_evaluation_changes_nothing():
    teacher = MomentumTeacher(make_student(), 10)
    teacher(images())
    with unchanged(teacher.eval()):
        teacher(images(1))


def test_plain_state_dict_of_a_teachers_model():
    student = make_student()
    teacher = MomentumTeacher(student, 10)
    teacher(images())
    names = {name.rsplit(".", 1)[-1] for name in momentum_bn.plain_state_dict(teacher)}
    assert not names & {"momentum_state", "cur_iter_state", "view_count", "view_mean_sum", "view_var_sum"}
    assert set(PLAIN_STATE) <= names


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("total_iters", 0),
        ("total_iters", -3),
        ("param_momentum", -0.1),
        ("param_momentum", 1.1),
        ("param_momentum", math.nan),
    ],
)
def test_bad_argument(name, value):
    with pytest.raises(ValueError, match=name):
        MomentumTeacher(make_student(), **{"total_iters": 10, name: value})


def test_bad_option():
    with pytest.raises(ValueError, match="variance"):
        MomentumTeacher(make_student(), 10, variance="nonsense")


@pytest.mark.parametrize("other", [
    lambda: make_student(width=5), lambda: make_student()[:-1], lambda: nn.Sequential(*make_student(), nn.Linear(5, 5)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_students_that_do_not_match_are_refused(other, dtype):
    student = make_student(dtype)
    teacher = MomentumTeacher(student, 10)
    teacher.update()
    before = {n: v.clone() for n, v in teacher.state_dict().items()}
    with pytest.raises(ValueError, match=r"parameters|shape"):
        teacher.update(other().to(dtype))
    for name, value in before.items():
        assert same_bits(teacher.state_dict()[name], value), name


def test_total_iters_has_no_default():
    with pytest.raises(TypeError, match="total_iters"):
        MomentumTeacher(make_student())
