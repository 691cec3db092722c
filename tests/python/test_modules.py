"""The layers' interface, and their training and evaluation against the oracle."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import momentum_bn
from inputs import LAYERS, TORCH_LAYERS, layer_for, randn, randomise_parameters
from oracle import MomentumBatchNormOracle, PublishedFormulas, cosine_schedule
from snapshots import OWN_STATE, PLAIN_STATE, same_bits, unchanged

DIMENSIONS = [1, 2, 3]
SHAPES = {"1d_2d": (4, 5), "1d_3d": (4, 5, 3), "2d": (3, 5, 4, 2), "3d": (2, 5, 3, 2, 4)}


def torch_module_inputs(dim: int, training: bool):
    """The inputs that torch tests its own BatchNorm with."""
    pytest.importorskip("expecttest", reason="torch's own tests import expecttest")
    from torch.testing._internal import common_modules

    make = getattr(common_modules, f"module_inputs_torch_nn_BatchNorm{dim}d")
    return make(None, device=torch.get_default_device(), dtype=torch.float64, requires_grad=True, training=training)


# --- the interface --------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_is_a_torch_batchnorm(dim):
    assert issubclass(LAYERS[dim], TORCH_LAYERS[dim])
    assert LAYERS[dim].__name__ == f"MomentumBatchNorm{dim}d"


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_constructor_signature(dim):
    parameters = inspect.signature(LAYERS[dim]).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    assert defaults == {
        "num_features": inspect.Parameter.empty, "eps": 1e-05, "momentum": 1.0, "affine": True,
        "track_running_stats": True, "total_iters": 100, "views_per_update": 2, "schedule": "cosine",
        "variance": "published", "activation": None, "inplace": False, "process_group": None,
        "detach_statistics": True, "bias": True, "device": None, "dtype": None,
    }  # fmt: skip
    positional = [n for n, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == ["num_features", "eps", "momentum", "affine", "track_running_stats", "total_iters"]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for n, p in parameters.items() if n not in positional)


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_new_layer(dim):
    m = LAYERS[dim](3)
    assert list(m.state_dict())[: len(PLAIN_STATE)] == PLAIN_STATE
    assert set(m.state_dict()) == {*PLAIN_STATE, *OWN_STATE}
    assert dict(m.named_parameters()).keys() == {"weight", "bias"}
    assert torch.equal(m.weight, torch.ones(3)) and torch.equal(m.bias, torch.zeros(3))
    assert torch.equal(m.running_mean, torch.zeros(3)) and torch.equal(m.running_var, torch.ones(3))
    assert m.num_batches_tracked.dtype == torch.int64 and int(m.num_batches_tracked) == 0
    assert isinstance(m.momentum, float) and m.momentum == 1.0
    assert isinstance(m.cur_iter, int) and m.cur_iter == 0
    assert isinstance(m.total_iters, int) and m.total_iters == 100
    assert m.eps == 1e-5 and m.num_features == 3 and m.affine and m.track_running_stats and m.training


def test_without_affine_bias_or_tracking():
    m = momentum_bn.MomentumBatchNorm2d(3, affine=False)
    assert m.weight is None and m.bias is None and not list(m.parameters())
    m = momentum_bn.MomentumBatchNorm2d(3, bias=False)
    assert m.weight is not None and m.bias is None
    m = momentum_bn.MomentumBatchNorm2d(3, track_running_stats=False, momentum=0.25)
    assert m.running_mean is None and m.running_var is None and m.num_batches_tracked is None
    assert not list(m.buffers()) and set(m.state_dict()) == {"weight", "bias"}
    assert m.momentum == 0.25 and m.cur_iter == 0
    m.momentum, m.cur_iter = 0.5, 7
    assert m.momentum == 0.5 and m.cur_iter == 7
    assert not list(m.buffers())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dim", DIMENSIONS)
def test_factory_kwargs(dim, dtype):
    m = LAYERS[dim](3, device="meta", dtype=dtype)
    assert all(t.device.type == "meta" for t in itertools.chain(m.parameters(), m.buffers()))
    m = LAYERS[dim](3, device="cpu", dtype=dtype)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert getattr(m, name).dtype == dtype
    for name in ("view_mean_sum", "view_var_sum"):
        assert getattr(m, name).dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    for name in ("num_batches_tracked", "view_count", "cur_iter_state"):
        assert getattr(m, name).dtype == torch.int64
    assert m.momentum_state.dtype == torch.float64


def test_device_ctx_init():
    with torch.device("meta"):
        m = momentum_bn.MomentumBatchNorm2d(3)
    assert all(t.device.type == "meta" for t in itertools.chain(m.parameters(), m.buffers()))


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_input_may_be_passed_by_torchs_name(dim):
    x, residual = (randn(*[4, 5, 3, 2, 2][: dim + 2], seed=seed, dtype=torch.float32) for seed in (0, 1))
    for training in (True, False):
        for options in ({}, {"inplace": True, "activation": "relu"}, {"track_running_stats": False}):
            by_position, by_name = (LAYERS[dim](5, **options).train(training) for _ in range(2))
            with torch.no_grad():
                assert same_bits(by_name(input=x.clone()), by_position(x.clone()))
                assert same_bits(by_name(residual=residual, input=x.clone()), by_position(x.clone(), residual))


def test_meta_layer_becomes_new_when_given_memory_and_reset():
    m = momentum_bn.MomentumBatchNorm2d(3, momentum=0.75, device="meta").to_empty(device=torch.get_default_device())
    m.reset_parameters()
    fresh = momentum_bn.MomentumBatchNorm2d(3, momentum=0.75)
    for name, value in fresh.state_dict().items():
        assert same_bits(m.state_dict()[name], value), name


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_repr_names_the_options(dim):
    text = repr(LAYERS[dim](7, total_iters=123, views_per_update=3, variance="biased", activation="relu"))
    assert text.startswith(f"MomentumBatchNorm{dim}d(7, eps=1e-05, momentum=1.0")
    for word in ("total_iters=123", "views_per_update=3", "biased", "relu"):
        assert word in text
    assert "momentum=None" in repr(LAYERS[dim](7, momentum=None))
    repr(LAYERS[dim](7, track_running_stats=False, affine=False))


def test_momentum_total_iters_and_cur_iter_may_be_assigned_at_any_time():
    m = momentum_bn.MomentumBatchNorm1d(3, views_per_update=1)
    m.cur_iter = 30
    assert m.cur_iter == 30 and m.momentum == 1.0, "assigning cur_iter leaves the momentum"
    m.total_iters = 1000
    assert m.total_iters == 1000 and m.momentum == 1.0
    m(randn(4, 3, dtype=torch.float32))
    assert m.cur_iter == 31
    assert m.momentum == pytest.approx(cosine_schedule(31, 1000), abs=1e-15)
    m.momentum = 0.125
    assert m.momentum == 0.125 and m.cur_iter == 31
    m.momentum = None
    assert m.momentum is None
    m.momentum = 1
    assert m.momentum == 1.0 and isinstance(m.momentum, float)


def test_momentum_cosine_decay():
    m = momentum_bn.MomentumBatchNorm2d(3, momentum=0.5, total_iters=10)
    for t in range(1, 25):
        m.momentum_cosine_decay()
        assert m.cur_iter == t
        assert m.momentum == pytest.approx(cosine_schedule(t, 10), abs=1e-15)
    assert m.momentum == 0.0, "stays 0 past total_iters"
    assert int(m.num_batches_tracked) == 0


def test_momentum_cosine_decay_constant_and_cumulative():
    m = momentum_bn.MomentumBatchNorm2d(3, momentum=0.5, schedule="constant")
    m.momentum_cosine_decay()
    assert (m.cur_iter, m.momentum) == (1, 0.5)
    m = momentum_bn.MomentumBatchNorm2d(3, momentum=None)
    m.momentum_cosine_decay()
    assert (m.cur_iter, m.momentum) == (1, None)


def test_momentum_cosine_decay_without_tracking():
    m = momentum_bn.MomentumBatchNorm2d(3, track_running_stats=False, total_iters=4)
    m.momentum_cosine_decay()
    assert m.cur_iter == 1 and m.momentum == pytest.approx(cosine_schedule(1, 4), abs=1e-15)


def test_set_total_iters_reaches_every_layer():
    net = nn.Sequential(
        momentum_bn.MomentumBatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3), momentum_bn.MomentumBatchNorm2d(3))
    )
    momentum_bn.set_total_iters(net, 77)
    assert net[0].total_iters == 77 and net[1][1].total_iters == 77
    assert not hasattr(net[1][0], "total_iters")
    momentum_bn.set_total_iters(net[0], 5)
    assert net[0].total_iters == 5


# --- training against the oracle ------------------------------------------------------------------


@pytest.mark.parametrize("sample", ["1d_2d", "1d_3d", "2d", "3d"])
def test_two_hundred_forwards_equal_the_published_arithmetic(sample):
    """Mixed batch sizes; the published layers take (N, C) and (N, C, H, W) only, their formulas all shapes."""
    shape = SHAPES[sample]
    x = randn(*shape)
    ours = layer_for(x)(5, total_iters=150, dtype=torch.float64)
    theirs = PublishedFormulas(5, total_iters=150)
    randomise_parameters(ours)
    theirs.weight, theirs.bias = ours.weight.detach(), ours.bias.detach()
    for step in range(200):
        batch = (2, 3, 8, 17, 32)[step * 7 % 5]
        x = randn(batch, *shape[1:], seed=step, scale=1 + step % 3, shift=step % 4 - 1.5)
        assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
        assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=1e-12)
        assert_close(ours.running_var, theirs.running_var, rtol=1e-12, atol=1e-12)
        assert ours.momentum == pytest.approx(theirs.momentum, abs=1e-15)
        assert ours.cur_iter == theirs.cur_iter


@pytest.mark.parametrize("sample", ["1d_2d", "1d_3d", "2d", "3d"])
@pytest.mark.parametrize(
    "options",
    [
        {"variance": "unbiased"},
        {"variance": "biased"},
        {"views_per_update": 1},
        {"views_per_update": 3, "activation": "relu"},
        {"views_per_update": 5, "variance": "biased", "total_iters": 7},
        {"schedule": "constant", "momentum": 0.3},
        {"momentum": None},
        {"momentum": None, "views_per_update": 1, "variance": "biased"},
        {"momentum": 0.0},
        {"track_running_stats": False},
        {"track_running_stats": False, "variance": "unbiased", "activation": "relu"},
        {"eps": 0.3, "total_iters": 1},
    ],
    ids=str,
)
def test_two_hundred_forwards_equal_the_oracle(sample, options):
    shape = SHAPES[sample]
    ours = randomise_parameters(layer_for(randn(*shape))(5, dtype=torch.float64, **options))
    oracle = MomentumBatchNormOracle(5, **options)
    for step in range(200):
        batch = (2, 3, 8, 17, 32)[step * 7 % 5]
        x = randn(batch, *shape[1:], seed=step, scale=1 + step % 3, shift=step % 4 - 1.5)
        residual = randn(*x.shape, seed=1000 + step) if step % 2 else None
        with torch.set_grad_enabled(step % 3 > 0):
            y = ours(x, residual) if residual is not None else ours(x)
        assert_close(
            y.detach(), oracle.train_forward(x, ours.weight, ours.bias, residual).detach(), rtol=1e-12, atol=1e-12
        )
        if not oracle.track_running_stats:
            continue
        for name in ("running_mean", "running_var", "view_mean_sum", "view_var_sum"):
            assert_close(getattr(ours, name), getattr(oracle, name), rtol=1e-12, atol=1e-12, msg=name)
        assert int(ours.num_batches_tracked) == step + 1
        assert int(ours.view_count) == oracle.view_count
        assert ours.cur_iter == oracle.cur_iter
        assert (ours.momentum is None) == (oracle.momentum is None)
        assert oracle.momentum is None or ours.momentum == pytest.approx(oracle.momentum, abs=1e-15)


@pytest.mark.parametrize("dim", DIMENSIONS)
@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_module_inputs(dim, training):
    for sample in torch_module_inputs(dim, training):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        x = sample.forward_input.args[0]
        m = LAYERS[dim](*args, **kwargs, dtype=torch.float64).train(training)
        if m.weight is not None:
            randomise_parameters(m)
        oracle = MomentumBatchNormOracle(
            m.num_features, eps=m.eps, momentum=m.momentum, track_running_stats=m.track_running_stats
        )
        y = m(x)
        expected = (oracle.train_forward if training else oracle.eval_forward)(x, m.weight, m.bias)
        assert_close(y, expected, rtol=1e-12, atol=1e-12, msg=lambda text, sample=sample: f"{sample.desc}: {text}")
        assert y.requires_grad


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_if_train_and_eval_modes_differ(dim):
    m = LAYERS[dim](5, momentum=0.5)
    x = randn(*[4, 5, 3, 2, 2][: dim + 2], dtype=torch.float32, shift=3)
    trained = m(x)
    assert not torch.allclose(trained, m.eval()(x))


@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_batchnorm_eval(shape, affine, activation):
    """Equals F.batch_norm with the running statistics, and changes nothing."""
    m = layer_for(randn(*shape))(5, affine=affine, activation=activation, momentum=0.7)
    if affine:
        randomise_parameters(m)
    for step in range(3):
        m(randn(*shape, seed=step, dtype=torch.float32, scale=2, shift=1))
    m.eval()
    x = randn(*shape, seed=9, dtype=torch.float32)
    with unchanged(m, x):
        y = m(x)
    expected = nn.functional.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, training=False, eps=m.eps)
    expected = torch.relu(expected) if activation else expected
    assert same_bits(y, expected)
    residual = randn(*shape, seed=10, dtype=torch.float32)
    with unchanged(m, x, residual):
        y = m(x, residual)
    expected = (
        nn.functional.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps) + residual
    )
    assert_close(y, torch.relu(expected) if activation else expected, rtol=1e-6, atol=1e-6)


def test_eval_without_tracking_uses_the_batch():
    m = momentum_bn.MomentumBatchNorm2d(5, track_running_stats=False, variance="biased").eval()
    x = randn(3, 5, 4, 2, dtype=torch.float32)
    assert_close(m(x), nn.functional.batch_norm(x, None, None, m.weight, m.bias, training=True), rtol=1e-5, atol=2e-6)


def test_biased_variance_with_one_view_and_constant_momentum_one_is_torchs_batchnorm():
    ours = momentum_bn.MomentumBatchNorm2d(
        5, momentum=1.0, schedule="constant", variance="biased", views_per_update=1, dtype=torch.float64
    )
    theirs = nn.BatchNorm2d(5, momentum=1.0, dtype=torch.float64)
    for step in range(3):
        x = randn(6, 5, 4, 2, seed=step, shift=2)
        assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
        assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=1e-12)
        assert_close(ours.running_var, theirs.running_var, rtol=1e-12, atol=1e-12)
        assert torch.equal(ours.num_batches_tracked, theirs.num_batches_tracked)


# --- what torch's test_nn.py asks of BatchNorm, under its names -----------------------------------


def test_batchnorm_update_stats():
    m = momentum_bn.MomentumBatchNorm1d(4)
    x = randn(32, 4, dtype=torch.float32)
    m(x)
    assert torch.equal(m.running_mean, torch.zeros(4)), "the first of two views is only remembered"
    m(x)
    assert not torch.equal(m.running_mean, torch.zeros(4)) and not torch.equal(m.running_var, torch.ones(4))
    m.eval()
    with unchanged(m, x):
        m(x)


@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batchnorm_affine(shape, dtype):
    """A weight of 2 and a bias of 1 do to the output what they say; `_mixed` where the input has 16 bits."""
    x = randn(*shape, dtype=dtype)
    plain, affine = layer_for(x)(5, affine=False), layer_for(x)(5)
    nn.init.constant_(affine.weight, 2)
    nn.init.constant_(affine.bias, 1)
    y = plain(x)
    assert y.dtype == dtype
    atol = 1e-5 if dtype == torch.float32 else 0.04
    assert_close(affine(x).float(), y.float() * 2 + 1, rtol=1e-5 if dtype == torch.float32 else 0.02, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("views", [1, 2])
def test_batchnorm_simple_average(dtype, views):
    """momentum=None: after u updates the running mean is the mean of all the batches' means."""
    m = momentum_bn.MomentumBatchNorm1d(4, momentum=None, views_per_update=views)
    means = []
    for step in range(6):
        x = randn(16, 4, seed=step, shift=step).to(dtype)
        m(x)
        means.append(x.double().mean(0))
    assert m.cur_iter == 6 // views
    assert_close(m.running_mean.double(), torch.stack(means).mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(4, 8, 1, 1), (4, 1, 5, 7), (4, 8, 5, 7), (1, 8, 3, 3)], ids=["NC11", "N1HW", "NCHW", "1CHW"]
)
def test_batchnorm_nhwc_cpu(shape):
    x = randn(*shape, dtype=torch.float32, shift=1).contiguous(memory_format=torch.channels_last)
    a, b = momentum_bn.MomentumBatchNorm2d(shape[1]), momentum_bn.MomentumBatchNorm2d(shape[1])
    x_last, x_plain = x.clone().requires_grad_(), x.contiguous().requires_grad_()
    y_last, y_plain = a(x_last), b(x_plain)
    assert y_last.is_contiguous(memory_format=torch.channels_last)
    assert_close(y_last, y_plain, rtol=1e-6, atol=1e-6)
    g = randn(*shape, seed=1, dtype=torch.float32)
    y_last.backward(g.contiguous(memory_format=torch.channels_last))
    y_plain.backward(g)
    assert_close(x_last.grad, x_plain.grad, rtol=1e-6, atol=1e-6)
    assert x_last.grad.is_contiguous(memory_format=torch.channels_last)
    assert_close(a.weight.grad, b.weight.grad, rtol=1e-5, atol=1e-5)
    assert_close(a.bias.grad, b.bias.grad, rtol=1e-5, atol=1e-5)


def test_batchnorm_nhwc_cpu_3d():
    x = randn(2, 8, 3, 4, 5, dtype=torch.float32, shift=1).contiguous(memory_format=torch.channels_last_3d)
    y = momentum_bn.MomentumBatchNorm3d(8)(x)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert_close(y, momentum_bn.MomentumBatchNorm3d(8)(x.contiguous()), rtol=1e-6, atol=1e-6)


def test_batchnorm_non_contig_cpu():
    """Gradients that come in strides other than the input's."""
    x = randn(3, 4, 5, 6, dtype=torch.float64)
    g = randn(6, 5, 4, 3, seed=1).permute(3, 2, 1, 0)
    results = []
    for grad in (g, g.contiguous(), g.contiguous(memory_format=torch.channels_last)):
        m, leaf = momentum_bn.MomentumBatchNorm2d(4, dtype=torch.float64), x.clone().requires_grad_()
        m(leaf).backward(grad)
        results.append((leaf.grad, m.weight.grad, m.bias.grad))
    for other in results[1:]:
        assert_close(other, results[0], rtol=1e-13, atol=1e-13)


def test_batchnorm_large_batch():
    m = momentum_bn.MomentumBatchNorm2d(1)
    x = torch.rand(880801, 1, 1, 1, requires_grad=True)
    y = m(x)
    y.backward(torch.ones_like(y))
    assert_close(y.double().mean().item(), 0.0, rtol=0, atol=1e-6)
    assert_close(m.bias.grad.item(), 880801.0, rtol=1e-6, atol=0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_batchnorm_half_overflow(channels_last):
    """Sums far beyond float16's 65504."""
    x = randn(16, 4, 32, 32, dtype=torch.float16, scale=100, shift=2000)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    m = momentum_bn.MomentumBatchNorm2d(4)
    y = m(x)
    assert torch.isfinite(y).all()
    assert_close(y.double(), MomentumBatchNormOracle(4).train_forward(x), rtol=2**-10, atol=2**-10)
    assert_close(m.view_mean_sum.double(), x.double().mean([0, 2, 3]), rtol=1e-6, atol=0)


def test_batchnorm_buffer_update_when_stats_are_not_tracked():
    m = momentum_bn.MomentumBatchNorm1d(4)
    m.track_running_stats = False
    x = torch.rand(32, 4)
    with unchanged(m, x):
        m(x)


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 9), (0, 5, 2, 2), (3, 5, 0, 2), (0, 5, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"inplace": True, "activation": "relu"}, {"track_running_stats": False}], ids=str
)
def test_empty_input_is_not_counted(shape, training, options):
    m = layer_for(torch.empty(shape))(5, **options).train(training)
    m(torch.rand([2, *[max(s, 1) for s in shape[1:]]]) + torch.arange(2).view([2] + [1] * (len(shape) - 1)))
    with unchanged(m):
        x = torch.empty(shape)
        y = m(x)
        assert y.shape == x.shape and y.dtype == x.dtype
        leaf = torch.empty(shape, requires_grad=True)
        y = m(leaf * 1)
        if y.requires_grad:
            (grad,) = torch.autograd.grad(y.sum(), leaf)
            assert grad.shape == leaf.shape


def test_no_channels():
    m = momentum_bn.MomentumBatchNorm2d(0)
    with unchanged(m):
        assert m(torch.empty(2, 0, 3, 3)).shape == (2, 0, 3, 3)


def test_one_value_per_channel_is_fine_in_evaluation():
    m = momentum_bn.MomentumBatchNorm1d(3).eval()
    assert_close(m(torch.ones(1, 3)), torch.ones(1, 3), rtol=1e-4, atol=1e-4)


def test_hooks_and_sequential():
    seen = []
    net = nn.Sequential(nn.Conv2d(3, 4, 3), momentum_bn.MomentumBatchNorm2d(4), nn.ReLU())
    net[1].register_forward_hook(lambda _module, _args, output: seen.append(output.shape))
    net(torch.rand(2, 3, 8, 8)).sum().backward()
    assert seen == [(2, 4, 6, 6)] and net[0].weight.grad is not None and net[1].weight.grad is not None
