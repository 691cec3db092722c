"""torch.func's transforms and forward-mode differentiation, against plain autograd through the oracle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.testing import assert_close

import momentum_bn
from inputs import layer_for, randn, randomise_parameters
from momentum_bn.functional import momentum_batch_norm
from oracle import MomentumBatchNormOracle, functional_oracle
from snapshots import assert_same, same_bits, snapshot, unchanged

SHAPES = [(4, 3), (3, 3, 2), (2, 3, 2, 2)]
EXACT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.fixture
def _no_vmap_fallback() -> Iterator[None]:
    """An operator without a rule of its own for vmap is an error, not a slow loop."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def arguments(shape, running=True):
    """x, weight, bias, and the running statistics or None."""
    x, weight, bias = randn(*shape, shift=1), randn(3, seed=1), randn(3, seed=2)
    return (x, weight, bias), ((randn(3, seed=3), randn(3, seed=4).abs() + 0.5) if running else (None, None))


# --- the function ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("running", [True, False], ids=["running", "batch alone"])
def test_derivatives_of_the_function(shape, running):
    """grad, vjp, jvp, jacrev, jacfwd, linearize and hessian, with statistics that pass no gradient."""
    inputs, statistics = arguments(shape, running)
    g = randn(*shape, seed=9)
    tangents = tuple(randn(*t.shape, seed=10 + i) for i, t in enumerate(inputs))

    def ours(x, weight, bias):
        return momentum_batch_norm(x, *statistics, weight, bias, True, 0.3)[0]

    def theirs(x, weight, bias):
        return functional_oracle(x, *statistics, weight, bias, momentum=0.3)[0]

    def loss(layer):
        return lambda *inputs: (layer(*inputs) * g).sin().sum()

    jacobians = torch.autograd.functional.jacobian(theirs, inputs)
    expected_tangent = sum(torch.tensordot(j, t, t.dim()) for j, t in zip(jacobians, tangents, strict=True))
    y, pull_back = func.vjp(ours, *inputs)
    assert_close(y, theirs(*inputs), **EXACT)
    assert_close(pull_back(g), torch.autograd.functional.vjp(theirs, inputs, g)[1], **EXACT)
    for tangent in (func.jvp(ours, inputs, tangents)[1], func.linearize(ours, *inputs)[1](*tangents)):
        assert_close(tangent, expected_tangent, **EXACT)
    for transform in (func.jacrev, func.jacfwd):
        assert_close(transform(ours, argnums=(0, 1, 2))(*inputs), jacobians, **EXACT)
    gradients = func.grad(loss(ours), argnums=(0, 1, 2))(*inputs)
    assert_close(gradients, torch.autograd.functional.jacobian(loss(theirs), inputs), **EXACT)
    assert_close(
        func.hessian(loss(ours), argnums=(0, 1, 2))(*inputs),
        torch.autograd.functional.hessian(loss(theirs), inputs),
        **EXACT,
    )


@pytest.mark.parametrize("transform", [func.grad, lambda f, **kw: func.jacfwd(f, **kw)], ids=["grad", "jacfwd"])
def test_statistics_pass_no_gradient(transform):
    inputs, running = arguments((4, 3))

    def statistics(x):
        _, b_mean, b_var = momentum_batch_norm(x, *running, training=True)
        return (b_mean.square() + b_var).sum()

    assert torch.equal(transform(statistics)(inputs[0]), torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("with_running", [False, True], ids=["batch alone", "running"])
def test_empty_input_has_no_statistics_under_a_transform(with_running):
    x = torch.empty(0, 3, 2)
    running = (torch.zeros(3), torch.ones(3)) if with_running else (None, None)
    expected = momentum_batch_norm(x, *running, training=True)

    def statistics(x):
        y, b_mean, b_var = momentum_batch_norm(x, *running, training=True)
        return y.sum(), (y, b_mean, b_var)

    gradient, actual = func.grad(statistics, has_aux=True)(x)
    assert gradient.shape == x.shape
    assert_close(actual, expected, rtol=0, atol=0)
    _, _, actual = func.jvp(statistics, (x,), (x,), has_aux=True)
    assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [*SHAPES, "channels last"], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("_no_vmap_fallback")
def test_vmap_of_the_function(shape, training):
    """Over all that it is given and over x alone, from another dimension, against one call per example."""
    channels_last = shape == "channels last"
    shape = (2, 3, 2, 2) if channels_last else shape
    xs = randn(5, *shape, shift=1)
    xs = xs.movedim(2, -1).contiguous().movedim(-1, 2) if channels_last else xs
    stacked = [randn(5, 3, seed=1), randn(5, 3, seed=2).abs() + 0.5, randn(5, 3, seed=3), randn(5, 3, seed=4)]

    def layer(x, *rest):
        return momentum_batch_norm(x, *rest, training=training, momentum=0.3)

    def one_by_one(calls):
        return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True))

    expected = one_by_one(layer(*example) for example in zip(xs, *stacked, strict=True))
    assert_close(func.vmap(layer)(xs, *stacked), expected, **EXACT)
    first = [values[0] for values in stacked]
    expected = one_by_one(layer(x, *first) for x in xs)
    assert_close(func.vmap(layer, in_dims=(0, *[None] * 4))(xs, *first), expected, **EXACT)
    actual = func.vmap(layer, in_dims=(1, *[None] * 4), out_dims=0)(xs.movedim(0, 1), *first)
    assert_close(actual, expected, **EXACT)


@pytest.mark.usefixtures("_no_vmap_fallback")
def test_gradient_per_example():
    (_, weight, bias), running = arguments((4, 3))
    xs = randn(5, 4, 3, shift=1)

    def loss(forward):
        return lambda weight, x: forward(x, *running, weight, bias).sin().sum()

    actual = func.vmap(func.grad(loss(lambda *a: momentum_batch_norm(*a, True, 0.3)[0])), (None, 0))(weight, xs)
    theirs = loss(lambda *a: functional_oracle(*a, momentum=0.3)[0])
    expected = [torch.autograd.functional.jacobian(lambda w, x=x: theirs(w, x), weight) for x in xs]
    assert_close(actual, torch.stack(expected), **EXACT)


@pytest.mark.usefixtures("_no_vmap_fallback")
def test_vmap_under_autograd():
    """A gradient through the mapped function."""
    (_, weight, bias), running = arguments((4, 3))
    xs = randn(5, 4, 3).requires_grad_()
    weight.requires_grad_()

    def both(forward):
        y = forward(xs)
        return torch.autograd.grad((y * randn(5, 4, 3, seed=8)).sum(), [xs, weight])

    actual = both(func.vmap(lambda x: momentum_batch_norm(x, *running, weight, bias, True, 0.3)[0]))
    expected = both(lambda xs: torch.stack([functional_oracle(x, *running, weight, bias, momentum=0.3)[0] for x in xs]))
    assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.usefixtures("_no_vmap_fallback")
def test_batched_gradients(activation):
    """torch.autograd.grad(is_grads_batched=True) maps the layer's backward."""
    m = randomise_parameters(momentum_bn.MomentumBatchNorm2d(3, activation=activation, dtype=torch.float64))
    x, residual = (randn(2, 3, 4, 5, seed=s).requires_grad_() for s in range(2))
    leaves = [x, residual, m.weight, m.bias]
    y = m(x, residual)
    gs = randn(6, *x.shape, seed=7)
    actual = torch.autograd.grad(y, leaves, gs, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in gs]
    assert_close(actual, tuple(torch.stack(parts) for parts in zip(*expected, strict=True)), **EXACT)


# --- the layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_layer_under_a_transform_is_the_layer(shape, options, training):
    """Same gradients and, in training, the same state as in plain autograd: updated once."""
    plain, transformed = (
        randomise_parameters(layer_for(torch.empty(shape))(3, total_iters=4, dtype=torch.float64, **options))
        for _ in range(2)
    )
    plain.train(training), transformed.train(training)
    for step in range(5):
        x, g = randn(*shape, seed=step).requires_grad_(), randn(*shape, seed=50 + step)
        expected = torch.autograd.grad((plain(x) * g).sum(), [x, *plain.parameters()])
        parameters = dict(transformed.named_parameters())

        def loss(parameters, x, g=g):
            return (func.functional_call(transformed, parameters, (x,)) * g).sum()

        by_name, by_x = func.grad(loss, argnums=(0, 1))({n: p.detach() for n, p in parameters.items()}, x.detach())
        assert_close((by_x, *by_name.values()), expected, **EXACT)
        for name, value in plain.state_dict().items():
            assert_close(transformed.state_dict()[name], value, **EXACT, msg=name)


def test_functional_call_changes_only_the_buffers_that_it_is_given():
    m = momentum_bn.MomentumBatchNorm1d(3, views_per_update=1)
    reference = momentum_bn.MomentumBatchNorm1d(3, views_per_update=1)
    x = randn(4, 3, dtype=torch.float32)
    buffers = {name: buffer.clone() for name, buffer in m.named_buffers()}
    with unchanged(m):
        y = func.functional_call(m, (dict(m.named_parameters()), buffers), (x,))
    assert same_bits(y, reference(x))
    assert all(same_bits(buffers[name], buffer) for name, buffer in reference.named_buffers())


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=str)
def test_forward_mode(options):
    """Dual numbers through the layer: tangents of the oracle's Jacobian, and a state without tangents."""
    m = randomise_parameters(momentum_bn.MomentumBatchNorm1d(3, dtype=torch.float64, **options))
    reference = MomentumBatchNormOracle(3, **options)
    x, tangent, residual = randn(4, 3), randn(4, 3, seed=1), randn(4, 3, seed=2)
    weight, bias = m.weight.detach().clone(), m.bias.detach().clone()
    with forward_ad.dual_level():
        y = m(forward_ad.make_dual(x, tangent), residual)
        actual = forward_ad.unpack_dual(y)
        assert all(forward_ad.unpack_dual(buffer).tangent is None for buffer in m.buffers())
    primal, expected = torch.autograd.functional.jvp(
        lambda x: reference.train_forward(x, weight, bias, residual), x, tangent
    )
    assert_close((actual.primal, actual.tangent), (primal, expected), **EXACT)
    assert int(m.view_count) == 1


@pytest.mark.usefixtures("_no_vmap_fallback")
def test_vmap_over_layers_with_a_state_each():
    """Model ensembling: torch.func.stack_module_state, a schedule and views per layer."""
    layers = [momentum_bn.MomentumBatchNorm1d(3, total_iters=9, dtype=torch.float64) for _ in range(4)]
    for i, m in enumerate(layers):
        m.cur_iter, m.momentum = i, 1 - i / 4
    parameters, buffers = func.stack_module_state(layers)
    base = momentum_bn.MomentumBatchNorm1d(3, total_iters=9, device="meta", dtype=torch.float64)

    def one(parameters, buffers, x):
        return func.functional_call(base, (parameters, buffers), (x,))

    for step in range(3):
        xs = randn(4, 5, 3, seed=step)
        expected = torch.stack([m(x) for m, x in zip(layers, xs, strict=True)])
        assert_close(func.vmap(one)(parameters, buffers, xs), expected, **EXACT)
        for name, stacked in buffers.items():
            assert_close(stacked, torch.stack([getattr(m, name) for m in layers]), **EXACT, msg=name)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.usefixtures("_no_vmap_fallback")
def test_vmap_over_examples_of_one_training_layer_is_refused(inplace):
    m = momentum_bn.MomentumBatchNorm1d(3, inplace=inplace).requires_grad_(False)
    xs = randn(5, 4, 3, dtype=torch.float32)
    with unchanged(m, xs), pytest.raises(ValueError, match=r"torch\.func\.vmap") as error:
        func.vmap(m)(xs)
    for way_out in ("momentum_batch_norm", "stack_module_state", "replace_all_batch_norm_modules_"):
        assert way_out in str(error.value)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.usefixtures("_no_vmap_fallback")
def test_vmap_over_examples_in_evaluation(inplace):
    m = momentum_bn.MomentumBatchNorm1d(3, inplace=inplace, activation="relu").requires_grad_(False)
    m(randn(4, 3, dtype=torch.float32)), m(randn(4, 3, dtype=torch.float32))
    m.eval()
    xs = randn(5, 4, 3, dtype=torch.float32)
    expected = torch.stack([m(x.clone()) for x in xs])
    with unchanged(m), torch.no_grad():
        assert_close(func.vmap(m)(xs.clone()), expected)


@pytest.mark.usefixtures("_no_vmap_fallback")
def test_replace_all_batch_norm_modules():
    """The layers go without running statistics, by the batch alone, and so may be mapped over examples."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), momentum_bn.MomentumBatchNorm1d(4, activation="relu"))
    net(torch.rand(5, 3))
    assert func.replace_all_batch_norm_modules_(net) is net
    assert net[1].running_mean is None and not net[1].track_running_stats
    reference = momentum_bn.MomentumBatchNorm1d(4, track_running_stats=False, activation="relu")
    xs = randn(6, 5, 3, dtype=torch.float32)
    with unchanged(net):
        actual = func.vmap(net)(xs)
        assert_close(actual, torch.stack([reference(net[0](x)) for x in xs]), rtol=1e-5, atol=1e-6)
        assert_close(net.eval()(xs[0]), actual[0], rtol=1e-5, atol=1e-6)  # as without tracking: no evaluation
        net.train()
    assert net.double()(xs[0].double()).dtype == torch.float64
    net.to("meta")
    assert all(tensor.is_meta for tensor in net.state_dict().values())


def test_functionalize_is_refused_by_torch():
    """torch.func.functionalize takes no custom operators that change a list of tensors. torch.compile does."""
    m = momentum_bn.MomentumBatchNorm1d(3)
    with unchanged(m), pytest.raises(RuntimeError, match=r"custom .* operator"):
        func.functionalize(m)(torch.rand(4, 3))
    assert_same(snapshot(m), snapshot(momentum_bn.MomentumBatchNorm1d(3)))
