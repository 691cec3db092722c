"""State: what is saved is enough to go on bit for bit, and what a plain BatchNorm knows is understood."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import momentum_bn
from inputs import LAYERS, TORCH_LAYERS, randn, randomise_parameters
from momentum_bn import convert_momentum_batchnorm
from oracle import cosine_schedule
from snapshots import OWN_STATE, PLAIN_STATE, assert_same, same_bits, snapshot, unchanged

OPTIONS = [
    {},
    {"views_per_update": 3, "variance": "biased"},
    {"views_per_update": 1, "momentum": 0.7},
    {"momentum": None},
    {"schedule": "constant", "momentum": 0.4},
    {"total_iters": 2, "activation": "relu"},
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16},
]


def build(options):
    return randomise_parameters(momentum_bn.MomentumBatchNorm2d(3, **{"total_iters": 6, **options}))


def through_state_dict(m, options):
    fresh = build(options)
    # In place, so that later forwards of the original would show in a fresh layer that shares its tensors.
    assert not fresh.load_state_dict(m.state_dict(), strict=True).missing_keys
    return fresh


def through_torch_save(m, options):
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    fresh = build(options)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return fresh


def through_safetensors(m, options):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    fresh = build(options)
    fresh.load_state_dict(safetensors.load(safetensors.save(m.state_dict())), strict=True)
    return fresh


def through_whole_module_save(m, _options):
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_assigned_state_dict(m, options):
    fresh = build(options)
    fresh.load_state_dict(copy.deepcopy(m.state_dict()), strict=True, assign=True)
    return fresh


CUTS = {
    "state_dict": through_state_dict,
    "state_dict_assign": through_assigned_state_dict,
    "deepcopy": lambda m, _: copy.deepcopy(m),
    "pickle": lambda m, _: pickle.loads(pickle.dumps(m)),
    "torch_save_weights_only": through_torch_save,
    "torch_save_module": through_whole_module_save,
    "safetensors": through_safetensors,
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("forwards", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("cut", CUTS)
def test_cut_run_goes_on_bit_for_bit(cut, forwards, options):
    dtype = options.get("dtype", torch.float32)
    inputs = [randn(4, 3, 5, 5, seed=s, dtype=dtype, shift=s % 3) for s in range(forwards + 8)]
    uncut = build(options)
    for x in inputs[:forwards]:
        uncut(x)
    resumed = CUTS[cut](uncut, options)
    assert resumed is not uncut and type(resumed) is type(uncut)
    assert_same(snapshot(resumed), snapshot(uncut))
    before = snapshot(uncut)
    resumed_outputs = [resumed(x) for x in inputs[forwards:]]
    assert_same(snapshot(uncut), before)  # they share nothing
    for x, resumed_output in zip(inputs[forwards:], resumed_outputs, strict=True):
        assert same_bits(uncut(x), resumed_output)
    assert_same(snapshot(resumed), snapshot(uncut))


def test_configuration_is_kept_by_copies_and_not_in_the_state_dict():
    options = {
        "eps": 1e-3,
        "views_per_update": 3,
        "schedule": "constant",
        "variance": "biased",
        "activation": "relu",
        "inplace": True,
    }
    m = momentum_bn.MomentumBatchNorm2d(3, total_iters=17, **options)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert repr(other) == repr(m) and other.total_iters == 17
        assert all(getattr(other, name) == value for name, value in options.items())
    assert set(m.state_dict()) == {*PLAIN_STATE, *OWN_STATE}


def test_total_iters_is_not_state():
    saved = momentum_bn.MomentumBatchNorm2d(3, total_iters=7).state_dict()
    m = momentum_bn.MomentumBatchNorm2d(3, total_iters=9)
    m.load_state_dict(saved)
    assert m.total_iters == 9


@pytest.mark.parametrize("cast", [
    lambda m: m.half().float(), lambda m: m.to(torch.bfloat16).to(torch.float32), lambda m: m.bfloat16().float(),
    lambda m: m.to(torch.get_default_device(), torch.float16).float(), lambda m: m.double().half().float(),
    lambda m: m.type(torch.float16).float(),
    lambda m: nn.Sequential(m).half().float()[0],
])  # fmt: skip
@pytest.mark.parametrize("forwards", [1, 2, 3, 7])
def test_casts_never_round_schedule_or_counters(cast, forwards):
    uncut, cut = (momentum_bn.MomentumBatchNorm2d(3, total_iters=1001) for _ in range(2))
    for m in (uncut, cut):
        m.cur_iter = 54321  # not a number of float16 or bfloat16
        m.momentum = 0.1
    for step in range(forwards):
        x = randn(4, 3, 5, 5, seed=step, dtype=torch.float32)
        uncut(x), cut(x)
    before = {
        n: getattr(cut, n).clone() for n in ("num_batches_tracked", "view_count", "cur_iter_state", "momentum_state")
    }
    cut = cast(cut)
    assert cut.running_mean.dtype == torch.float32 and cut.weight.dtype == torch.float32
    for name, value in before.items():
        assert same_bits(getattr(cut, name), value), name
    for step in range(4):
        x = randn(4, 3, 5, 5, seed=100 + step, dtype=torch.float32)
        uncut(x), cut(x)
        assert (cut.momentum, cut.cur_iter) == (uncut.momentum, uncut.cur_iter)
        assert int(cut.num_batches_tracked) == int(uncut.num_batches_tracked)
        assert int(cut.view_count) == int(uncut.view_count)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_schedule_in_a_cast_layer_is_that_of_float32(dtype):
    plain, cast = (
        momentum_bn.MomentumBatchNorm2d(3, total_iters=7),
        momentum_bn.MomentumBatchNorm2d(3, total_iters=7).to(dtype),
    )
    assert cast.running_mean.dtype == dtype
    assert cast.view_mean_sum.dtype == torch.promote_types(dtype, torch.float32)
    for step in range(16):
        x = randn(4, 3, 5, 5, seed=step, dtype=torch.float32)
        plain(x), cast(x.to(dtype))
        assert plain.momentum == cast.momentum and plain.cur_iter == cast.cur_iter
    assert cast.momentum == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype, n: momentum_bn.MomentumBatchNorm1d(2, views_per_update=n).to(dtype),
        lambda dtype, n: momentum_bn.MomentumBatchNorm1d(2, views_per_update=n, dtype=dtype),
        lambda dtype, n: convert_momentum_batchnorm(nn.BatchNorm1d(2).to(dtype), 9, views_per_update=n),
    ],
    ids=["cast", "constructed", "converted"],
)
def test_sums_of_the_views_have_float32_at_least(make, dtype):
    """A sum of variances may overflow float16 where their mean fits, and would be rounded view by view."""
    views = [randn(64, 2, seed=seed, dtype=dtype, scale=100) for seed in range(8)]
    m = make(dtype, len(views))
    for x in views[:-1]:
        m(x)
    assert m.view_mean_sum.dtype == m.view_var_sum.dtype == torch.float32
    copies = [copy.deepcopy(m), pickle.loads(pickle.dumps(m)), make(dtype, len(views)), make(dtype, len(views))]
    copies[2].load_state_dict(m.state_dict())
    copies[3].load_state_dict(m.state_dict(), assign=True)
    expected = torch.stack([x.double().var(0) for x in views]).mean(0) * 64 / 63
    for layer in (m, *copies):
        layer(views[-1])
        assert layer.running_var.dtype == dtype and torch.isfinite(layer.running_var).all()
        torch.testing.assert_close(layer.running_var.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)
        assert same_bits(layer.running_mean, m.running_mean)


def test_casts_keep_sums_of_the_views():
    """Between two views: to 16 bits and back leaves their sums as they were; sums saved in 16 bits are widened."""
    m = momentum_bn.MomentumBatchNorm1d(3, views_per_update=4)
    m(randn(8, 3, dtype=torch.float32))
    sums = m.view_mean_sum.clone(), m.view_var_sum.clone()
    m.half().bfloat16().float()
    assert same_bits(m.view_mean_sum, sums[0]) and same_bits(m.view_var_sum, sums[1])
    assert m.double().view_mean_sum.dtype == torch.float64 and m.half().view_mean_sum.dtype == torch.float32
    saved = {name: value.half() if value.dim() else value for name, value in m.state_dict().items()}
    for assign in (False, True):
        loaded = momentum_bn.MomentumBatchNorm1d(3, views_per_update=4).half()
        loaded.load_state_dict(copy.deepcopy(saved), assign=assign)
        assert loaded.view_mean_sum.dtype == torch.float32 and loaded.running_mean.dtype == torch.float16


def test_cast_keeps_the_buffers_registered_and_shared_structures():
    m = momentum_bn.MomentumBatchNorm2d(3)
    m(torch.rand(4, 3, 5, 5))
    names = [name for name, _ in m.named_buffers()]
    assert [name for name, _ in m.half().named_buffers()] == names
    copied = copy.deepcopy(m)
    assert_same(snapshot(copied), snapshot(m))


# --- a plain BatchNorm's state --------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_plain_state_dict_of_torch_loads_strictly(dim):
    """The schedule stays where it is, remembered views are dropped."""
    shape = [4, 3, 2, 3, 2][: dim + 2]
    theirs = randomise_parameters(TORCH_LAYERS[dim](3))
    theirs(torch.rand(shape))
    ours = LAYERS[dim](3, total_iters=10)
    for _ in range(3):
        ours(torch.rand(shape))
    schedule = ours.momentum, ours.cur_iter
    assert schedule == (pytest.approx(cosine_schedule(1, 10)), 1) and int(ours.view_count) == 1
    result = ours.load_state_dict(theirs.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    for name, value in theirs.state_dict().items():
        assert same_bits(ours.state_dict()[name], value), name
    assert (ours.momentum, ours.cur_iter) == schedule
    assert int(ours.view_count) == 0
    assert torch.equal(ours.view_mean_sum, torch.zeros(3)) and torch.equal(ours.view_var_sum, torch.zeros(3))


def test_plain_state_dict_without_num_batches_tracked_loads_as_in_torch():
    """Checkpoints from before torch 0.4.1 have no num_batches_tracked and no version."""
    old = {name: value for name, value in nn.BatchNorm2d(3).state_dict().items() if name != "num_batches_tracked"}
    nn.BatchNorm2d(3).load_state_dict(dict(old), strict=True)
    momentum_bn.MomentumBatchNorm2d(3).load_state_dict(dict(old), strict=True)


def test_plain_state_dict_of_a_network_loads_strictly():
    def network(norm):
        return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Sequential(nn.Conv2d(4, 5, 3), norm(5)))

    theirs, ours = network(nn.BatchNorm2d), network(momentum_bn.MomentumBatchNorm2d)
    theirs(torch.rand(2, 3, 9, 9))
    saved = theirs.state_dict()
    keys = list(saved)
    ours.load_state_dict(saved, strict=True)
    assert list(saved) == keys, "what was loaded is left as it was"
    x = torch.rand(2, 3, 9, 9)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    "missing", [["momentum_state"], ["view_count"], ["cur_iter_state", "momentum_state"], OWN_STATE[:-1]], ids=str
)
def test_some_but_not_all_of_our_keys_is_a_strict_error(missing):
    saved = momentum_bn.MomentumBatchNorm2d(3).state_dict()
    for name in missing:
        del saved[name]
    with pytest.raises(RuntimeError, match="Missing key") as e:
        momentum_bn.MomentumBatchNorm2d(3).load_state_dict(saved, strict=True)
    assert all(name in str(e.value) for name in missing)
    assert sorted(momentum_bn.MomentumBatchNorm2d(3).load_state_dict(saved, strict=False).missing_keys) == sorted(
        missing
    )


@pytest.mark.parametrize("missing", PLAIN_STATE[:4])
def test_missing_plain_key_is_a_strict_error(missing):
    saved = momentum_bn.MomentumBatchNorm2d(3).state_dict()
    del saved[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        momentum_bn.MomentumBatchNorm2d(3).load_state_dict(saved, strict=True)


def test_unexpected_key_is_a_strict_error():
    saved = momentum_bn.MomentumBatchNorm2d(3).state_dict()
    saved["other"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        momentum_bn.MomentumBatchNorm2d(3).load_state_dict(saved, strict=True)


def test_wrong_shape_is_an_error():
    with pytest.raises(RuntimeError, match="size mismatch"):
        momentum_bn.MomentumBatchNorm2d(4).load_state_dict(momentum_bn.MomentumBatchNorm2d(3).state_dict())


def test_batchnorm_load_state_dict_with_meta_device():
    with torch.device("meta"):
        m = momentum_bn.MomentumBatchNorm2d(3)
    saved = momentum_bn.MomentumBatchNorm2d(3, momentum=0.5)
    saved(torch.rand(4, 3, 5, 5))
    m.load_state_dict(copy.deepcopy(saved.state_dict()), assign=True, strict=True)
    assert_same(snapshot(m), snapshot(saved))
    x = torch.rand(4, 3, 5, 5)
    assert same_bits(m(x), saved(x))


def test_plain_state_dict_assigned_to_a_layer_on_meta_gives_it_a_new_schedule():
    with torch.device("meta"):
        m = momentum_bn.MomentumBatchNorm2d(3, momentum=0.5)
    plain = nn.BatchNorm2d(3)
    plain(torch.rand(4, 3, 5, 5))
    m.load_state_dict(copy.deepcopy(plain.state_dict()), assign=True, strict=True)
    expected = momentum_bn.MomentumBatchNorm2d(3, momentum=0.5)
    expected.load_state_dict(plain.state_dict(), strict=True)
    assert_same(snapshot(m), snapshot(expected))
    x = torch.rand(4, 3, 5, 5)
    assert same_bits(m(x), expected(x))


def test_loaded_bf16_state_keeps_the_schedule_in_float64():
    saved = momentum_bn.MomentumBatchNorm2d(3, momentum=0.1).state_dict()
    m = momentum_bn.MomentumBatchNorm2d(3).bfloat16()
    m.load_state_dict(saved)
    assert m.momentum == 0.1 and m.momentum_state.dtype == torch.float64


# --- plain_state_dict -----------------------------------------------------------------------------


def test_plain_state_dict_loads_strictly_into_torchs_network():
    def network(norm1, norm2):
        body = nn.Sequential(
            nn.Conv2d(3, 4, 3), norm2(4), nn.ReLU(), norm2(4, affine=False), nn.Flatten(), nn.LazyLinear(5)
        )
        return nn.Sequential(body, norm1(5), norm1(5, track_running_stats=False), nn.BatchNorm1d(5))

    ours = network(momentum_bn.MomentumBatchNorm1d, momentum_bn.MomentumBatchNorm2d)
    theirs = network(nn.BatchNorm1d, nn.BatchNorm2d)
    x = torch.rand(6, 3, 7, 7)
    ours(x), theirs(x)
    plain = momentum_bn.plain_state_dict(ours)
    assert list(plain) == list(theirs.state_dict())
    assert theirs.load_state_dict(plain, strict=True).missing_keys == []
    for name, value in theirs.state_dict().items():
        assert same_bits(value, ours.state_dict()[name]), name
    assert torch.allclose(ours.eval()[0](x), theirs.eval()[0](x))
    assert list(momentum_bn.plain_state_dict(ours[1])) == PLAIN_STATE


def test_plain_state_dict_leaves_other_modules_keys_alone():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("momentum_state", torch.zeros(2))
            self.register_buffer("view_count", torch.zeros(2))
            self.norm = momentum_bn.MomentumBatchNorm1d(3)

    plain = momentum_bn.plain_state_dict(Other())
    assert set(plain) == {"momentum_state", "view_count", *(f"norm.{name}" for name in PLAIN_STATE)}


# --- resetting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [1.0, 0.3, None])
def test_reset_running_stats_makes_all_state_new(momentum):
    m = randomise_parameters(momentum_bn.MomentumBatchNorm2d(3, momentum=momentum, total_iters=5))
    for step in range(5):
        m(randn(4, 3, 5, 5, seed=step, dtype=torch.float32))
    m.momentum = 0.9
    weight = m.weight.detach().clone()
    m.reset_running_stats()
    fresh = momentum_bn.MomentumBatchNorm2d(3, momentum=momentum, total_iters=5)
    for name, value in fresh.named_buffers():
        assert same_bits(getattr(m, name), value), name
    assert m.momentum == momentum and m.cur_iter == 0
    assert torch.equal(m.weight, weight)
    m.reset_parameters()
    assert torch.equal(m.weight, torch.ones(3)) and torch.equal(m.bias, torch.zeros(3))


def test_reset_without_tracking():
    m = momentum_bn.MomentumBatchNorm2d(3, track_running_stats=False, momentum=0.5)
    m.momentum, m.cur_iter = 0.1, 4
    m.reset_running_stats()
    assert m.momentum == 0.5 and m.cur_iter == 0


def test_state_is_written_in_place():
    """Fixed-size buffers keep their memory, through updates, assignments, resets and loads."""
    m = momentum_bn.MomentumBatchNorm2d(3)
    addresses = {name: buffer.data_ptr() for name, buffer in m.named_buffers()}
    for _ in range(4):
        m(torch.rand(4, 3, 5, 5))
    m.momentum, m.cur_iter = 0.5, 3
    m.momentum_cosine_decay()
    m.reset_running_stats()
    m.load_state_dict(momentum_bn.MomentumBatchNorm2d(3).state_dict())
    m.load_state_dict(nn.BatchNorm2d(3).state_dict())
    assert {name: buffer.data_ptr() for name, buffer in m.named_buffers()} == addresses


def test_versions_of_state_are_bumped():
    """Autograd must see that the state was written."""
    m = momentum_bn.MomentumBatchNorm2d(3, views_per_update=1)
    versions = {name: buffer._version for name, buffer in m.named_buffers()}
    m(torch.rand(4, 3, 5, 5))
    for name in ("running_mean", "running_var", "num_batches_tracked", "cur_iter_state", "momentum_state"):
        assert getattr(m, name)._version > versions[name], name


def test_schedule_stays_at_zero_past_total_iters():
    m = momentum_bn.MomentumBatchNorm1d(3, total_iters=4, views_per_update=1)
    for step in range(12):
        if step == 4:
            frozen = m.running_mean.clone(), m.running_var.clone()
        m(randn(4, 3, seed=step, dtype=torch.float32))
        assert m.cur_iter == step + 1
        assert m.momentum == pytest.approx(cosine_schedule(step + 1, 4), abs=1e-15)
    assert m.momentum == 0.0
    assert torch.equal(m.running_mean, frozen[0]) and torch.equal(m.running_var, frozen[1])
    with unchanged(m.eval()):
        m(torch.rand(4, 3))


# --- infinity and NaN: what docs/state.md says ------------------------------------------------------


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_batch_of_infinity_or_nan_stays_in_the_running_statistics_until_they_are_new(bad):
    ours = momentum_bn.MomentumBatchNorm1d(3, total_iters=20, views_per_update=1)
    torchs = nn.BatchNorm1d(3)
    batches = [randn(16, 3, seed=seed, dtype=torch.float32) for seed in range(12)]
    for step, x in enumerate(batches):
        x = x.clone()
        if step == 5:
            x[3, 1] = bad
        y, theirs = ours(x), torchs(x)
        assert torch.isfinite(y[:, [0, 2]]).all(), "the other channels are as they were"
    assert torch.isfinite(theirs).all(), "torch's output recovers"
    assert not torch.isfinite(ours.running_mean[1]) and not torch.isfinite(y[:, 1]).any(), "ours does not"

    cur_iter = ours.cur_iter
    ours.reset_running_stats()
    ours.cur_iter = cur_iter
    assert ours.momentum == 1.0
    ours(batches[0])
    torch.testing.assert_close(ours.running_mean, batches[0].mean(0))
    assert ours.momentum == pytest.approx(cosine_schedule(13, 20), abs=1e-15), "the schedule goes on"
    assert torch.isfinite(ours(batches[1])).all()
