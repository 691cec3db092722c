"""inplace=True: where memory is taken, where not, and that the flag never changes a result."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from torch.testing import assert_close

import momentum_bn
from inputs import as_layout, layer_for, randn, randomise_parameters
from snapshots import assert_same, same_bits, snapshot, unchanged

LEAF = "a leaf Variable that requires grad is being used in an in-place operation"
OVERLAP = "more than one element of the written-to tensor refers to a single memory location"


def layer(training=True, frozen=(), **options):
    m = randomise_parameters(momentum_bn.MomentumBatchNorm2d(3, inplace=True, momentum=0.5, **options))
    m(randn(2, 3, 4, 4, seed=40, dtype=torch.float32, scale=2))
    m.train(training)
    for name in frozen:
        getattr(m, name).requires_grad_(False)
    return m


def takes_memory(m, x) -> bool:
    address, version = x.data_ptr(), x._version
    y = m(x)
    taken = y.data_ptr() == address
    assert (x._version > version) == taken, "the version counter tells what happened"
    return taken


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_memory_is_taken_exactly_where_no_gradient_needs_the_input(training, activation):
    def fresh():
        return torch.rand(2, 3, 4, 5)

    with torch.no_grad():
        assert takes_memory(layer(training, activation=activation), fresh())
        assert takes_memory(layer(training, activation=activation), fresh().requires_grad_())
    assert not takes_memory(layer(training, activation=activation), fresh())
    assert not takes_memory(layer(training, activation=activation), fresh().requires_grad_() * 1)
    assert not takes_memory(layer(training, activation=activation), fresh().requires_grad_())
    assert not takes_memory(layer(training, ("bias",), activation=activation), fresh())
    assert takes_memory(layer(training, ("weight",), activation=activation), fresh())
    assert takes_memory(layer(training, ("weight",), activation=activation), fresh().requires_grad_() * 1)
    assert takes_memory(layer(training, ("weight", "bias"), activation=activation), fresh())
    affine_free = momentum_bn.MomentumBatchNorm2d(3, affine=False, inplace=True, activation=activation).train(training)
    assert takes_memory(affine_free, fresh().requires_grad_() * 1)
    untracked = layer(training, track_running_stats=False, activation=activation)
    assert not takes_memory(untracked, fresh())
    with torch.no_grad():
        assert takes_memory(untracked, fresh())
    with torch.inference_mode():
        assert layer(training)(x := fresh()).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced", "sliced_channels", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_layout_and_dtype_in_place(layout, dtype):
    for shape, activation, with_residual in itertools.product(
        [(4, 5), (4, 5, 3), (2, 5, 3, 4), (2, 5, 3, 2, 4)], [None, "relu"], [False, True]
    ):
        parameters = dtype if dtype == torch.float64 else torch.float32
        layers = [
            randomise_parameters(
                layer_for(torch.empty(shape))(5, inplace=flag, activation=activation, dtype=parameters)
            )
            for flag in (True, False)
        ]
        residual = [randn(*shape, seed=1, dtype=dtype)] if with_residual else []
        base = as_layout(randn(*shape, dtype=dtype), layout)
        other = base.clone()
        with torch.no_grad():
            address, strides = base.data_ptr(), base.stride()
            y, expected = layers[0](base, *residual), layers[1](other, *residual)
        assert y.data_ptr() == address and base.stride() == strides
        assert same_bits(y, expected) and same_bits(base, expected)
        assert_same(snapshot(layers[0]), snapshot(layers[1]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_flag_never_changes_a_result(training, activation, frozen, with_residual):
    results = []
    for flag in (True, False):
        m = layer(training, frozen, activation=activation)
        m.inplace = flag
        leaf = randn(2, 3, 4, 5, dtype=torch.float32).requires_grad_()
        residual = randn(2, 3, 4, 5, seed=1, dtype=torch.float32).requires_grad_() if with_residual else None
        hidden = leaf * 1.5
        y = m(hidden, residual)
        y.backward(randn(2, 3, 4, 5, seed=2, dtype=torch.float32))
        gradients = [leaf.grad, m.weight.grad, m.bias.grad, getattr(residual, "grad", None)]
        results.append(([y, *m.state_dict().values()], gradients))
    (values, gradients), (fresh_values, fresh_gradients) = results
    assert all(same_bits(taken, fresh) for taken, fresh in zip(values, fresh_values, strict=True))
    for taken, fresh in zip(gradients, fresh_gradients, strict=True):
        assert (taken is None) == (fresh is None)
        if training and taken is not None:
            assert same_bits(taken, fresh)
        elif taken is not None:  # in evaluation the fresh gradient is torch's own, which multiplies in another order
            assert_close(taken, fresh, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reads_again", [False, True])
def test_the_promise_is_the_callers(reads_again):
    """Where nobody reads the input afterwards, no result changes; where the network does, nothing notices it."""

    class Block(torch.nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.norm = momentum_bn.MomentumBatchNorm2d(3, inplace=inplace)

        def forward(self, x):
            y = torch.relu(self.norm(x))
            return x + y if reads_again else y

    x = randn(4, 3, 5, 5, dtype=torch.float32)
    with torch.no_grad():
        results = [Block(inplace)(x.clone()) for inplace in (False, True)]
    assert same_bits(*results) != reads_again


def test_double_backward_in_place():
    results = []
    for flag in (True, False):
        m = momentum_bn.MomentumBatchNorm1d(3, inplace=flag, activation="relu", dtype=torch.float64)
        m.weight.requires_grad_(False)
        leaf, g = randn(4, 3).requires_grad_(), randn(4, 3, seed=1).requires_grad_()
        (first,) = torch.autograd.grad(m(leaf.square()), leaf, g, create_graph=True)
        results.append((first, *torch.autograd.grad(first.sum(), [leaf, g])))
    assert_close(results[0], results[1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"affine": False}], ids=str)
def test_leaf_that_requires_grad_is_refused(training, options):
    m = momentum_bn.MomentumBatchNorm2d(3, inplace=True, **options).train(training)
    if m.affine:
        m.weight.requires_grad_(False)
    x = torch.rand(2, 3, 4, 5, requires_grad=True)
    with unchanged(m, x), pytest.raises(RuntimeError, match=LEAF):
        m(x)
    assert x._version == 0


def expanded(memory):
    return memory[:60].view(1, 3, 4, 5).expand(2, 3, 4, 5)


def overlapping_rows(memory):
    return memory.as_strided((2, 3, 4, 5), (7, 5, 3, 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("view", [expanded, overlapping_rows])
def test_input_that_overlaps_itself_is_refused(view, training):
    m = momentum_bn.MomentumBatchNorm2d(3, inplace=True).train(training)
    x = view(torch.rand(60))
    with torch.no_grad(), unchanged(m, x), pytest.raises(RuntimeError, match=OVERLAP):
        m(x)


def test_autograd_notices_that_a_saved_input_was_overwritten():
    m = layer(frozen=("weight",))
    leaf = torch.rand(2, 3, 4, 5, requires_grad=True)
    hidden = leaf * 1
    square = hidden.square()
    y = m(hidden)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square.sum() + y.sum()).backward()


def test_view_of_a_larger_tensor():
    m = layer(frozen=("weight",))
    expected = layer(frozen=("weight",))
    expected.inplace = False
    leaf = randn(2, 6, 4, 5, dtype=torch.float32).requires_grad_()
    other = leaf.detach().clone().requires_grad_()
    hidden = leaf * 1
    y = m(hidden[:, 3:])
    assert y.data_ptr() == hidden[:, 3:].data_ptr()
    assert same_bits(hidden[:, 3:], y)
    y_expected = expected((other * 1)[:, 3:])
    hidden.square().sum().backward()
    ((other[:, :3]).square().sum() + y_expected.square().sum()).backward()
    assert_close(leaf.grad, other.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_a_view_that_was_overwritten_goes_with_its_graph(training):
    m = layer(training, ("weight",), activation="relu")
    leaf = torch.rand(2, 6, 4, 5, requires_grad=True)
    y = m((leaf * 1)[:, 3:], torch.rand(2, 3, 4, 5))
    assert y._is_view()
    graph_is_there = weakref.ref(leaf)
    del leaf, y
    assert graph_is_there() is None


def with_negative_bit(*shape):
    view = torch.view_as_complex(randn(*shape, 2, dtype=torch.float32)).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [momentum_bn.MomentumBatchNorm2d, momentum_bn.BatchNorm2d])
def test_view_with_the_negative_bit(make, training):
    expected, m = make(3).train(training), make(3, inplace=True).train(training)
    for _ in range(20):  # what a wrong write to the heap does is seen later
        x = with_negative_bit(2, 3, 4, 5)
        with torch.no_grad():
            y_expected = expected(x.clone())
            y = m(x)
        assert y.data_ptr() == x.data_ptr()
        assert same_bits(y.resolve_neg(), y_expected)
        assert same_bits(x.resolve_neg(), y_expected)
    assert_same(snapshot(m), snapshot(expected))


@pytest.mark.parametrize("key", ["Conjugate", "Negative"])
def test_every_operator_that_changes_an_argument_takes_such_views(key):
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("momentum_bn::")]
    writing = [s.name for s in schemas if any(a.alias_info and a.alias_info.is_write for a in s.arguments)]
    assert "momentum_bn::_teacher_update_" in writing
    for name in writing:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), name


def test_operators_with_arguments_of_the_negative_bit():
    momentum = torch.zeros((), dtype=torch.complex128).conj().imag
    cur_iter = torch.zeros((), dtype=torch.int64)
    torch.ops.momentum_bn._advance_schedule_(cur_iter, momentum, 100, "cosine")
    assert cur_iter == 1
    assert_close(momentum.resolve_neg().item(), torch.ops.momentum_bn._scheduled_momentum(1, 100))
    x = randn(2, 3, 4, 5, dtype=torch.float32)
    weight, saved = torch.ones(3), torch.ones(3, 3)
    arguments = (x, None, weight, None, saved, None, [True, True, True, False])
    dy = with_negative_bit(2, 3, 4, 5)
    dx, *expected = torch.ops.momentum_bn._backward(dy.clone(), *arguments)
    results = torch.ops.momentum_bn._backward_(dy, *arguments)
    assert same_bits(dy.resolve_neg(), dx)
    assert_close(results[:2], tuple(expected[:2]))


def test_input_as_its_own_residual():
    x = randn(2, 3, 4, 5, dtype=torch.float32)
    with torch.no_grad():
        expected = momentum_bn.MomentumBatchNorm2d(3)(x, x)
        taken = x.clone()
        y = momentum_bn.MomentumBatchNorm2d(3, inplace=True)(taken, taken)
    assert same_bits(y, expected)


def overlapping_in_part(memory):
    return memory[:300].view(4, 3, 5, 5), memory[7:].view(4, 3, 5, 5)


def transposed(memory):
    x = memory[:300].view(4, 3, 5, 5)
    return x, x.mT


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("views", [overlapping_in_part, lambda memory: overlapping_in_part(memory)[::-1], transposed])
def test_residual_that_overlaps_the_input(views, training):
    """The right result, or torch's refusal as for its own in-place operations; never a wrong result."""
    memory = randn(307, dtype=torch.float32)
    m = momentum_bn.MomentumBatchNorm2d(3, inplace=True).train(training)
    before = snapshot(m)
    with torch.no_grad():
        expected = momentum_bn.MomentumBatchNorm2d(3).train(training)(*views(memory.clone()))
        try:
            y = m(*views(memory))
        except RuntimeError as error:
            if "single memory location" not in str(error):
                raise
            assert_same(snapshot(m), before)
        else:
            assert same_bits(y, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty_input_in_place(shape, training):
    m = layer(training, ("weight",))
    with torch.no_grad():
        assert takes_memory(m, torch.empty(shape))
    leaf = torch.empty(shape, requires_grad=True)
    y = m(leaf * 1)
    y.sum().backward()
    assert y.shape == leaf.grad.shape == shape
    assert torch.equal(m.bias.grad, torch.zeros(3))
