"""The tests that torch runs over each of its modules, over these layers and with torch's own inputs for BatchNorm.

They keep the names that they have in torch's test/test_modules.py. What compares two devices there is not here.
"""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.testing._internal import common_modules
from torch.testing._internal.common_utils import noncontiguous_like

import momentum_bn
from inputs import BATCH_NORMS, LAYERS, TORCH_LAYERS, randn, randomise_parameters
from oracle import MomentumBatchNormOracle
from snapshots import assert_same, same_bits, snapshot

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
EVERY_LAYER = pytest.mark.parametrize(
    ("layers", "dim"),
    [(layers, dim) for layers in (LAYERS, BATCH_NORMS) for dim in layers],
    ids=lambda value: str(value) if isinstance(value, int) else "momentum" if value is LAYERS else "batch",
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def torchs_samples(dim, dtype=torch.float64, requires_grad=False, training=True):
    make = getattr(common_modules, f"module_inputs_torch_nn_BatchNorm{dim}d")
    return make(None, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training)


def own_options(layers):
    """What only we have."""
    if layers is LAYERS:
        return {"activation": "relu", "views_per_update": 1}, {"variance": "biased", "inplace": True}
    return {"activation": "relu"}, {"inplace": True, "bias": False}


def samples(layers, dim, training, dtype=torch.float64, requires_grad=False):
    """Layers, with the input of each and a description: torch's samples, and some of what only we have."""
    for sample in torchs_samples(dim, dtype, requires_grad, training):
        arguments = sample.constructor_input
        x = sample.forward_input.args[0]
        m = layers[dim](*arguments.args, **arguments.kwargs, dtype=dtype).train(training)
        yield randomise_parameters(m), x, sample.desc or str(arguments.args)
    for options in own_options(layers):
        x = randn(4, 3, *[3] * dim, dtype=dtype).requires_grad_(requires_grad)
        m = layers[dim](3, **options, momentum=0.6, dtype=dtype).train(training)
        yield randomise_parameters(m), x, str(options)


def pure(m):
    """The layer as a function of x and its parameters that starts from the same state in every call."""
    names = [name for name, _ in m.named_parameters()]
    state = {name: buffer.clone() for name, buffer in m.named_buffers()}

    def call(x, *parameters):
        buffers = {name: buffer.clone() for name, buffer in state.items()}
        overridden = {**buffers, **dict(zip(names, parameters, strict=True))}
        return torch.func.functional_call(m, overridden, (x * 1,))  # a copy, which an in-place layer may take

    return call


def parameters_of(m):
    return [parameter.detach().clone().requires_grad_() for parameter in m.parameters()]


def expected_output(m, x):
    """Of the layer before its first forward, in float64: the oracle's, or that of torch's own layer."""
    if not isinstance(m, momentum_bn.MomentumBatchNorm):
        theirs = nn.BatchNorm1d(m.num_features, m.eps, m.momentum, m.affine, m.track_running_stats).train(m.training)
        theirs._check_input_dim = lambda _: None  # any rank
        theirs = copy.deepcopy(theirs).double()
        theirs.weight, theirs.bias = (None if p is None else nn.Parameter(p.double()) for p in (m.weight, m.bias))
        y = theirs(x)
        return torch.relu(y) if m.activation == "relu" else y
    oracle = MomentumBatchNormOracle(
        m.num_features, eps=m.eps, momentum=m.momentum, track_running_stats=m.track_running_stats,
        variance=m.variance, activation=m.activation, views_per_update=m.views_per_update,
    )  # fmt: skip
    forward = oracle.train_forward if m.training else oracle.eval_forward
    return forward(x, *(p if p is None else p.double() for p in (m.weight, m.bias)))


@MODES
@DTYPES
@EVERY_LAYER
def test_forward(layers, dim, dtype, training):
    for m, x, description in samples(layers, dim, training, dtype):
        expected = expected_output(m, x.double()).to(dtype)
        tolerance = 1e-12 if dtype == torch.float64 else 4e-6
        y = copy.deepcopy(m)(x * 1)
        assert y.dtype == dtype
        assert_close(y, expected, rtol=tolerance, atol=tolerance, msg=lambda text, d=description: f"{d}: {text}")


@EVERY_LAYER
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factory_kwargs(layers, dim, dtype, device):
    for sample in torchs_samples(dim):
        arguments = sample.constructor_input
        m = layers[dim](*arguments.args, **arguments.kwargs, device=device, dtype=dtype)
        for name, tensor in m.state_dict().items():
            assert tensor.device.type == device, name
            if name == "momentum_state":
                assert tensor.dtype == torch.float64
            elif name in ("view_mean_sum", "view_var_sum"):
                assert tensor.dtype == torch.promote_types(dtype, torch.float32)
            elif tensor.is_floating_point():
                assert tensor.dtype == dtype, name


@MODES
@EVERY_LAYER
def test_repr(layers, dim, training):
    for m, _, _ in samples(layers, dim, training):
        assert str(m) == repr(m)
        assert f"{m.num_features}, eps={m.eps}, momentum={m.momentum}" in repr(m)


@MODES
@DTYPES
@EVERY_LAYER
def test_pickle(layers, dim, dtype, training):
    """Pickled, saved and loaded, deep-copied: the copies give the same outputs, and go on from the same state."""
    for m, x, _ in samples(layers, dim, training, dtype):
        m(x * 1)  # in training: between two views
        buffer = io.BytesIO()
        torch.save(m, buffer)
        buffer.seek(0)
        copies = [pickle.loads(pickle.dumps(m)), torch.load(buffer, weights_only=False), copy.deepcopy(m)]
        y = m(x * 1)
        for other in copies:
            assert same_bits(other(x * 1), y)
            assert_same(snapshot(other), snapshot(m))


@MODES
@DTYPES
@EVERY_LAYER
def test_check_inplace(layers, dim, dtype, training):
    """The in-place layer gives what the other gives, and takes the memory where there is no gradient."""
    for sample in torchs_samples(dim, dtype, training=training):
        arguments = sample.constructor_input
        fresh, inplace = (
            layers[dim](*arguments.args, **arguments.kwargs, inplace=inplace, dtype=dtype).train(training)
            for inplace in (False, True)
        )
        x = sample.forward_input.args[0]
        with torch.no_grad():
            taken = x.clone()
            y = inplace(taken)
            assert y is taken
            assert same_bits(y, fresh(x))
        assert_same(snapshot(inplace), snapshot(fresh))


@MODES
@EVERY_LAYER
def test_non_contiguous_tensors(layers, dim, training):
    """The same outputs and gradients from inputs and gradients with gaps between their elements."""
    for m, x, _ in samples(layers, dim, training, requires_grad=True):
        other = copy.deepcopy(m)
        g = randn(*x.shape, seed=3)
        strided_x, strided_g = noncontiguous_like(x), noncontiguous_like(g)
        if x.numel():
            assert not strided_x.is_contiguous() and not strided_g.is_contiguous()
        y, strided_y = m(x * 1), other(strided_x)
        assert_close(strided_y, y, rtol=1e-13, atol=1e-13)
        expected = torch.autograd.grad(y, [x, *m.parameters()], g)
        actual = torch.autograd.grad(strided_y, [strided_x, *other.parameters()], strided_g)
        assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=["test_grad", "test_gradgrad"])
@MODES
@EVERY_LAYER
def test_gradients(check, training, layers, dim):
    """torch's test_grad and test_gradgrad. Where statistics are detached, finite differences in x see frozen ones
    (momentum 0)."""
    check = partial(check, fast_mode=dim > 1)
    for m, x, description in samples(layers, dim, training, requires_grad=True):
        parameters = parameters_of(m)
        if layers is BATCH_NORMS:
            assert check(pure(m), (x, *parameters)), description
            continue
        if parameters and (training or not m.track_running_stats):
            # The statistics depend on x, but no gradient goes through them: x is held.
            assert check(partial(pure(m), x.detach()), parameters), description
        if m.track_running_stats:
            m.momentum = 0.0
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            assert check(pure(m), (x, *parameters)), description


@MODES
@pytest.mark.parametrize("layers", [LAYERS, BATCH_NORMS], ids=["momentum", "batch"])
@pytest.mark.parametrize("dim", [2, 3])
def test_memory_format(layers, dim, training):
    """Channels-last input gives channels-last output and gradients, whatever the format of the module."""
    channels_last = torch.channels_last if dim == 2 else torch.channels_last_3d
    for m, x, description in samples(layers, dim, training, requires_grad=True):
        if x.numel() == 0:
            continue
        expected_y = copy.deepcopy(m)(x * 1)
        for memory_format in (torch.contiguous_format, channels_last):
            other = copy.deepcopy(m).to(memory_format=memory_format)
            leaf = x.detach().contiguous(memory_format=memory_format).requires_grad_()
            y = other(leaf)
            assert y.is_contiguous(memory_format=memory_format), description
            assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
            (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
            assert gradient.is_contiguous(memory_format=memory_format), description


@EVERY_LAYER
def test_if_train_and_eval_modes_differ(layers, dim):
    for m, x, description in samples(layers, dim, training=True):
        evaluated, trained = m.eval()(x * 1), m.train()(x * 1)
        assert torch.allclose(evaluated, trained) == (x.numel() == 0 or not m.track_running_stats), description


@MODES
@EVERY_LAYER
def test_device_ctx_init(layers, dim, training):
    """Built under a device context as with the device argument."""
    for sample in torchs_samples(dim, training=training):
        arguments = sample.constructor_input
        with torch.device("meta"):
            m = layers[dim](*arguments.args, **arguments.kwargs).train(training)
        assert all(tensor.is_meta for tensor in m.state_dict().values())
        assert m.momentum == layers[dim](*arguments.args, **arguments.kwargs).momentum
        assert layers is BATCH_NORMS or m.cur_iter == 0
        x = sample.forward_input.args[0].to("meta", torch.float32)
        assert m(x).shape == x.shape and m(x).is_meta


@EVERY_LAYER
def test_errors(layers, dim):
    """torch's samples of errors. What it finds in a forward pass, these layers find when they are built."""
    info = common_modules.ModuleInfo(TORCH_LAYERS[dim], module_inputs_func=None)
    errors = common_modules.module_error_inputs_torch_nn_BatchNorm1d_2d_3d(info, "cpu", torch.float32, False, True)
    assert errors
    for error in errors:
        arguments = error.module_error_input.constructor_input
        with pytest.raises(error.error_type, match=error.error_regex):
            layers[dim](*arguments.args, **arguments.kwargs)


@MODES
@EVERY_LAYER
@pytest.mark.parametrize("swap", [False, True], ids=["data", "swap_tensors"])
def test_to(swap, layers, dim, training):
    """Moved and cast, by both of torch's ways: same parameters, schedule and counters unrounded, graph still usable."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for m, x, description in samples(layers, dim, training, torch.float32):
            m(x * 1), m(x * 1), m(x * 1)
            exact = {name: value.clone() for name, value in m.state_dict().items() if value.dim() == 0}
            parameters = list(m.parameters())
            for dtype in (torch.float64, torch.bfloat16, torch.float32):
                assert m.to("cpu", dtype) is m
                assert all(p.dtype == dtype for p in m.parameters()), description
                for name, value in exact.items():
                    assert same_bits(getattr(m, name), value), f"{description}: {name}"
                assert m(x.detach().to(dtype)).dtype == dtype
                exact = {name: value.clone() for name, value in m.state_dict().items() if value.dim() == 0}
            assert all(now is then for now, then in zip(m.parameters(), parameters, strict=True))
            m.to("meta")
            assert all(tensor.is_meta for tensor in m.state_dict().values())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@EVERY_LAYER
@pytest.mark.parametrize("source", ["cpu", "meta"])
def test_to_empty(layers, dim, source):
    """After to_empty, reset_parameters() makes a new layer and load_state_dict() the saved one, schedule included."""
    for m, x, description in samples(layers, dim, training=True, dtype=torch.float32):
        arguments = {"eps": m.eps, "momentum": m.momentum, "affine": m.affine, "bias": m.bias is not None,
                     "track_running_stats": m.track_running_stats, "activation": m.activation,
                     "inplace": m.inplace}  # fmt: skip
        if layers is LAYERS:
            arguments.update(views_per_update=m.views_per_update, variance=m.variance)
        for _ in range(3):
            m(x * 1)
        reset, loaded = (layers[dim](m.num_features, device=source, **arguments) for _ in range(2))
        kept = list(reset.state_dict(keep_vars=True))
        for empty in (reset, loaded):
            if source == "cpu":
                for _ in range(3):
                    empty(x * 1)
            empty.to_empty(device="cpu")
            assert list(empty.state_dict(keep_vars=True)) == kept
        reset.reset_parameters()
        assert_same(snapshot(reset), snapshot(layers[dim](m.num_features, **arguments)))
        loaded.load_state_dict(m.state_dict())
        assert same_bits(loaded(x * 1), m(x * 1)), description
        if m.track_running_stats:
            assert_same({n: v for n, v in snapshot(loaded).items() if "grad" not in n},
                        {n: v for n, v in snapshot(m).items() if "grad" not in n})  # fmt: skip


def test_to_empty_of_a_network_keeps_the_schedule_where_nothing_is_loaded():
    """Values are lost as torch says, but not the configuration's momentum: the layer is usable once it is reset."""
    with torch.device("meta"):
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), momentum_bn.MomentumBatchNorm2d(4, momentum=0.75))
    net.to_empty(device="cpu")
    net[1].reset_running_stats()
    assert (net[1].momentum, net[1].cur_iter, int(net[1].view_count)) == (0.75, 0, 0)
    assert torch.equal(net[1].running_mean, torch.zeros(4)) and torch.equal(net[1].running_var, torch.ones(4))


def test_every_test_of_torchs_batchnorm_entries_has_samples():
    """torch's list names BatchNorm1d to 3d with inputs of training and evaluation, errors, and no other BatchNorm."""
    entries = {info.module_cls: info for info in common_modules.module_db if "BatchNorm" in info.module_cls.__name__}
    assert set(TORCH_LAYERS.values()) <= set(entries)
    for layer in TORCH_LAYERS.values():
        assert entries[layer].train_and_eval_differ and entries[layer].module_error_inputs_func is not None
