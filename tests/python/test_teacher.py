"""MomentumTeacher: what it averages, what it keeps, and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import momentum_bn
from inputs import randn
from momentum_bn import MomentumTeacher
from oracle import MomentumBatchNormOracle, teacher_momentum
from snapshots import PLAIN_STATE, assert_same, same_bits, snapshot, unchanged


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


# --- what it starts with --------------------------------------------------------------------------


def test_a_student_in_evaluation_has_a_teacher_in_training():
    student = make_student().eval()
    teacher = MomentumTeacher(student, 10)
    assert all(part.training for part in teacher.modules())
    assert not any(part.training for part in student.modules())
    for step in range(4):
        teacher(images(step))
    assert [layer.cur_iter for layer in layers_of(teacher)] == [2, 2]


def test_running_statistics_start_as_the_students():
    student = make_student()
    student(images())
    layer = layers_of(MomentumTeacher(student, 10))[0]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert same_bits(getattr(layer, name), getattr(student[1], name))


def test_schedules_start_anew_also_of_momentum_batchnorms():
    """With the options that are given; what is not given stays as the student's layers have it."""
    student = momentum_bn.convert_momentum_batchnorm(make_student(), 20, momentum=0.8, variance="biased")
    student[1].activation = "relu"
    for step in range(5):
        student(images(step))
    before = snapshot(student)
    teacher = MomentumTeacher(student, total_iters=50, views_per_update=3)
    for layer, theirs in zip(layers_of(teacher), (student[1], student[5]), strict=True):
        assert (layer.cur_iter, layer.momentum, int(layer.view_count)) == (0, 0.8, 0)
        assert (layer.total_iters, layer.views_per_update, layer.variance) == (50, 3, "biased")
        assert not layer.view_mean_sum.any() and not layer.view_var_sum.any()
        assert same_bits(layer.running_mean, theirs.running_mean)
    assert layers_of(teacher)[0].activation == "relu"
    assert_same(snapshot(student), before)


def test_a_network_of_ones_own():
    """teacher=: taken as it is, with other names, parameters and statistics of its own; converted."""

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
            self.linear, self.last = nn.Linear(36, 5), momentum_bn.MomentumBatchNorm1d(5, variance="biased")

        def forward(self, x):
            return self.last(self.linear(torch.relu(self.norm(self.conv(x))).flatten(1)))

    student, own = make_student().double(), Other().double().eval()
    own.last.cur_iter = 7
    values = [p.detach().clone() for p in own.parameters()]
    teacher = MomentumTeacher(student, 10, 0.5, teacher=own, views_per_update=3)
    assert teacher.module is own and own.training and teacher.student is student
    assert type(own.norm) is momentum_bn.MomentumBatchNorm2d and own.norm.views_per_update == 3
    assert (own.last.variance, own.last.total_iters, own.last.cur_iter) == ("biased", 10, 0)
    assert not any(p.requires_grad for p in own.parameters())
    assert all(same_bits(p, value) for p, value in zip(own.parameters(), values, strict=True))
    teacher.update()
    for p, value, theirs in zip(own.parameters(), values, student.parameters(), strict=True):
        assert_close(p.detach(), 0.5 * value + 0.5 * theirs.detach(), rtol=1e-12, atol=1e-12)
    assert teacher(images(dtype=torch.float64)).shape == (6, 5)


def test_networks_of_ones_own_that_do_not_fit_are_refused():
    student = make_student()
    shares_a_layer = make_student()
    shares_a_layer[4] = student[4]
    cases = [(make_student()[:-1], ValueError, "parameters"), (make_student(width=5), ValueError, "shape"),
             (student, ValueError, "of its own"), (shares_a_layer, ValueError, "4.weight"),
             ("resnet", TypeError, "teacher")]  # fmt: skip
    for network, kind, words in cases:
        with pytest.raises(kind, match=words):
            MomentumTeacher(student, 10, teacher=network)
        if isinstance(network, nn.Module):
            assert all(p.requires_grad for p in network.parameters()) and type(network[1]) is nn.BatchNorm2d
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("wrap", [
    torch.compile, nn.DataParallel, lambda net: torch.compile(nn.DataParallel(net)),
    lambda net: nn.Sequential(*net[:4], torch.compile(net[4]), nn.DataParallel(net[5])),
])  # fmt: skip
def test_wrappers_are_taken_off(wrap):
    """Keys of a checkpoint do not depend on how the student runs."""
    student = make_student()
    wrapped = wrap(student)
    teacher, plain = MomentumTeacher(wrapped, 10, 0.5), MomentumTeacher(student, 10, 0.5)
    assert list(teacher.state_dict()) == list(plain.state_dict())
    assert type(teacher.module) is nn.Sequential and teacher.student is wrapped
    move(student, 1)
    teacher.update(), plain.update()
    plain.load_state_dict(teacher.state_dict(), strict=True)
    assert same_bits(teacher(images()), plain(images()))


def test_activation_is_no_option():
    student = make_student()
    with pytest.raises(TypeError, match=r"activation.*every layer.*teacher="):
        MomentumTeacher(student, 10, activation="relu")
    with pytest.raises(TypeError, match="inplcae"):
        MomentumTeacher(student, 10, inplcae=True)


def test_options_without_effect_are_refused():
    student = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with pytest.raises(ValueError, match=r"views_per_update .*no BatchNorm"):
        MomentumTeacher(student, 10, views_per_update=7)
    MomentumTeacher(student, 10).update()


# --- its schedules --------------------------------------------------------------------------------


def test_total_iters_may_be_assigned():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = make_student()
            self.teacher = MomentumTeacher(self.student, 10)

    for set_to in (
        lambda whole: momentum_bn.set_total_iters(whole, 1000),
        lambda whole: momentum_bn.set_total_iters(whole.teacher, 1000),
        lambda whole: setattr(whole.teacher, "total_iters", 1000),
    ):
        whole = Whole()
        set_to(whole)
        assert whole.teacher.total_iters == 1000
        assert [layer.total_iters for layer in layers_of(whole.teacher)] == [1000, 1000]
        for _ in range(10):
            whole.teacher.update()
        assert whole.teacher.param_momentum == pytest.approx(teacher_momentum(10, 1000, 0.99), abs=1e-15)
        for wrong, kind in ((0, ValueError), (1.5, TypeError)):
            with pytest.raises(kind, match="total_iters"):
                whole.teacher.total_iters = wrong
            with pytest.raises(kind, match="total_iters"):
                momentum_bn.set_total_iters(whole, wrong)
            assert whole.teacher.total_iters == layers_of(whole.teacher)[0].total_iters == 1000


def test_start_of_param_momentum_may_be_assigned():
    student = make_student(torch.float64)
    teacher = MomentumTeacher(student, 10)
    teacher.param_momentum = 0.5
    assert teacher.param_momentum == 0.5
    old = [p.detach().clone() for p in teacher.parameters()]
    move(student, 0)
    teacher.update()
    for ours, before, theirs in zip(teacher.parameters(), old, student.parameters(), strict=True):
        assert_close(ours.detach(), 0.5 * before + 0.5 * theirs.detach(), rtol=1e-12, atol=1e-13)
    assert teacher.param_momentum == pytest.approx(teacher_momentum(1, 10, 0.5), abs=1e-15)
    for wrong, kind in ((1.1, ValueError), (math.nan, ValueError), ("0.9", TypeError)):
        with pytest.raises(kind, match="param_momentum"):
            teacher.param_momentum = wrong
    assert teacher.param_momentum == pytest.approx(teacher_momentum(1, 10, 0.5), abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reset_starts_both_schedules_anew(dtype):
    student = make_student(dtype)
    teacher = MomentumTeacher(student, 10, 0.9, momentum=0.75)
    for step in range(5):
        move(student, step)
        teacher.update()
        for view in range(3):
            teacher(images(view, dtype))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.reset()
    assert int(teacher.updates) == 0 and teacher.param_momentum == 0.9
    for layer in layers_of(teacher):
        assert (layer.momentum, layer.cur_iter, int(layer.view_count)) == (0.75, 0, 0)
    restarted = ("updates", "cur_iter_state", "momentum_state", "view_count", "view_mean_sum", "view_var_sum")
    for name, value in teacher.state_dict().items():
        assert name.rsplit(".", 1)[-1] in restarted or same_bits(value, before[name]), name


def paces_of(teacher, forwards, updates=4, run=None):
    """Runs a teacher at so many forwards between updates. Returns its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(updates):
            teacher.update()
            for view in range(forwards):
                (run or teacher)(images(view))
    return [warning for warning in caught if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize(
    ("views", "forwards", "words"),
    [
        (2, 8, r"ran 8 training forwards.*views_per_update=2.*4 times as fast.*after 10 of 40.*views_per_update=8"),
        (2, 4, r"2 times as fast.*views_per_update=4"),
        (2, 1, r"0\.5 times as fast.*after 20.*views_per_update=1"),
        (1, 2, r"views_per_update=1.*2 times as fast.*views_per_update=2"),
    ],
)
def test_schedule_at_another_pace_is_told_once(views, forwards, words):
    teacher = MomentumTeacher(make_student(), total_iters=40, views_per_update=views)
    (warning,) = paces_of(teacher, forwards)
    assert re.search(words, str(warning.message)), warning.message
    assert warning.filename == __file__, "it points to the caller of update()"
    assert not paces_of(copy.deepcopy(teacher), forwards) and not paces_of(teacher, forwards + 1)


@pytest.mark.parametrize(("views", "forwards"), [(2, 2), (8, 8), (1, 1), (2, 0), (5, 0)])
def test_schedule_in_pace_needs_no_words(views, forwards):
    assert not paces_of(MomentumTeacher(make_student(), 40, views_per_update=views), forwards)


def test_what_is_no_training_forward_between_updates_does_not_count():
    teacher = MomentumTeacher(make_student(), 40)
    for _ in range(5):
        teacher(images())  # before the first update

    def with_evaluation(x):
        teacher(x)
        teacher.eval()(x)
        teacher.train()

    assert not paces_of(teacher, 2, run=with_evaluation)
    assert not paces_of(MomentumTeacher(make_student(), 40, schedule="constant", momentum=0.1), 7)
    assert not paces_of(MomentumTeacher(make_student(), 40, momentum=None), 7)
    assert not paces_of(MomentumTeacher(nn.Flatten(), 40), 7)


def test_warning_as_an_error_changes_no_state():
    teacher = MomentumTeacher(make_student(), 40)
    teacher.update()
    teacher(images())
    with unchanged(teacher), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="views_per_update"):
            teacher.update()
    teacher.update()
    assert int(teacher.updates) == 2


# --- masters --------------------------------------------------------------------------------------


def masters_of(teacher):
    return {name: value for name, value in teacher.named_buffers() if name.startswith("master/")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["load_state_dict", "assign", "data", "copy_", "wide state dict"])
@pytest.mark.parametrize("then", ["update", "cast", "cast to float32"])
def test_a_master_is_not_older_than_its_parameter(dtype, way, then):
    """Weights that are loaded or assigned stay: the master is made anew from them."""
    student, other = make_student(dtype), make_student(dtype)
    move(other, 7)
    teacher = MomentumTeacher(student, 1000)
    move(student, 1)
    teacher.update()
    loaded = copy.deepcopy(other.state_dict())
    if way == "wide state dict":
        wide = MomentumTeacher(copy.deepcopy(other).float(), 1000).state_dict()
        with pytest.raises(RuntimeError, match="master/"):
            teacher.load_state_dict(wide, strict=True)
        teacher.load_state_dict(wide, strict=False)
    elif way in ("load_state_dict", "assign"):
        teacher.module.load_state_dict(loaded, assign=way == "assign")
        teacher.module.requires_grad_(False)
    else:
        for ours, theirs in zip(teacher.parameters(), other.parameters(), strict=True):
            if way == "data":
                ours.data = theirs.detach().clone()
            else:
                ours.copy_(theirs.detach())
    if then == "update":
        teacher.update(other)  # from a student of the same weights: nothing moves
    elif then == "cast":
        teacher.to(dtype)
    else:
        teacher.float().to(dtype)
    for ours, theirs in zip(teacher.parameters(), other.parameters(), strict=True):
        assert same_bits(ours, theirs)
    for master, parameter in zip(masters_of(teacher).values(), teacher.parameters(), strict=True):
        assert same_bits(master, parameter.detach().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casts_keep_and_make_masters(dtype):
    """A cast teacher averages as the one never cast, up to the rounding of what it shows."""
    wide, student = MomentumTeacher(make_student(), 10_000, 0.999), make_student()
    cast = copy.deepcopy(wide).to(dtype)
    assert {m.dtype for m in masters_of(cast).values()} == {torch.float32}
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.5)
    for step in range(200):
        wide.update(student), cast.update(student)
        if step == 50:
            cast.to(dtype)
        if step == 100:
            cast.to(torch.float16).to(torch.bfloat16).to(dtype)
        if step == 150:
            assert not masters_of(cast.float())
            cast.to(dtype)
    for master, ours, expected in zip(masters_of(cast).values(), cast.parameters(), wide.parameters(), strict=True):
        assert same_bits(master, expected) and same_bits(ours, expected.to(dtype))
    assert cast.updates.dtype == torch.int64 and int(cast.updates) == 200


def test_a_double_teacher_made_narrow_is_the_rounding_of_its_masters():
    teacher = MomentumTeacher(make_student(torch.float64), 10).to(torch.bfloat16)
    for master, parameter in zip(masters_of(teacher).values(), teacher.parameters(), strict=True):
        assert same_bits(parameter, master.bfloat16())


@pytest.mark.parametrize("loads", [False, True])
def test_a_network_cast_by_itself(loads):
    """Past the teacher: its masters are made at the next update, and dissolved into what is still their rounding."""
    student = make_student(torch.bfloat16)
    teacher = MomentumTeacher(student, 100, 0.9)
    move(student, 1)
    teacher.update()
    precise = [m.clone() for m in masters_of(teacher).values()]
    teacher.module.float()
    if loads:
        teacher.module.load_state_dict(make_student().state_dict())
        precise = [p.detach().clone() for p in make_student().parameters()]
    teacher.update(copy.deepcopy(teacher.module))
    assert not masters_of(teacher)
    expected = precise if loads else [0.9 * m + 0.1 * m.bfloat16().float() for m in precise]
    for ours, value in zip(teacher.parameters(), expected, strict=True):
        assert_close(ours.detach(), value, rtol=1e-2 if not loads else 0, atol=1e-3 if not loads else 0)
    teacher.module.half()
    teacher.update(student)
    assert len(masters_of(teacher)) == len(list(teacher.parameters()))


# --- copies of a whole ----------------------------------------------------------------------------


class Both(nn.Module):
    """Student and teacher side by side, in either order; the student whole or in parts, as it is or in a wrapper."""

    def __init__(self, teacher_first, parts, wrap=lambda net: net):
        super().__init__()
        torch.manual_seed(3)
        backbone, projector = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Linear(8, 4)
        student = nn.Sequential(backbone, projector)
        teacher = MomentumTeacher(wrap(student), total_iters=10, param_momentum=0.0)
        if teacher_first:
            self.teacher = teacher
        if parts:
            self.backbone, self.projector = backbone, projector
        else:
            self.student = student
        if not teacher_first:
            self.teacher = teacher

    @property
    def last(self):
        return self.projector if hasattr(self, "projector") else self.student[1]


COPIES = {
    "deepcopy": copy.deepcopy,
    "twice": lambda whole: copy.deepcopy(copy.deepcopy(whole)),
    "pickle": lambda whole: pickle.loads(pickle.dumps(whole)),
    "pickle of a copy": lambda whole: pickle.loads(pickle.dumps(copy.deepcopy(whole))),
    "in a list": lambda whole: copy.deepcopy([whole, whole])[1],
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("teacher_first", [False, True])
@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel], ids=["plain", "wrapped"])
def test_in_a_copy_of_the_whole_the_teacher_follows_the_copied_student(make_copy, parts, teacher_first, wrap):
    whole = Both(teacher_first, parts, wrap)
    copied = make_copy(whole)
    before = whole.last.weight.detach().clone()
    with torch.no_grad():
        copied.last.weight.fill_(7)
    copied.teacher.update()
    assert torch.equal(copied.teacher.module[1].weight, copied.last.weight)
    assert torch.equal(whole.last.weight, before)
    whole.teacher.update()
    assert torch.equal(whole.teacher.module[1].weight, before), "the original follows the original"
    theirs = {id(p) for p in whole.parameters()}
    assert not theirs & {id(p) for p in copied.teacher.student.parameters()}


def test_a_part_that_is_not_copied_is_followed_as_it_is():
    backbone, projector = nn.Linear(8, 8), nn.Linear(8, 4)
    teacher = MomentumTeacher(nn.Sequential(backbone, nn.Sequential(projector, nn.ReLU())), 10)
    copied_teacher, copied_backbone = copy.deepcopy((teacher, backbone))
    assert copied_teacher.student[0] is copied_backbone and copied_teacher.student[1][0] is projector
    assert teacher.student[0] is backbone


def test_a_teacher_copied_alone_follows_the_same_student():
    student = make_student()
    teacher = MomentumTeacher(student, 10)
    copied = copy.deepcopy(teacher)
    assert copied.student is student and copy.deepcopy(copied).student is student
    assert copied._copied_with is None, "what it was copied from is let go"
    pickled = pickle.loads(pickle.dumps(teacher))
    assert pickled.student is not student
    move(pickled.student, 1)
    pickled.update()
    teacher.update(pickled.student)
    assert same_bits(pickled(images()), teacher(images()))


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
