"""Bad input: the type of the error, its words, and that nothing was changed by it."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import momentum_bn
from inputs import LAYERS
from momentum_bn.functional import momentum_batch_norm
from snapshots import unchanged

DIMENSIONS = [1, 2, 3]


def mid_pair_layer(dim=2, **options):
    """A layer in the middle of a half-done update, with gradients: as much state as there can be."""
    m = LAYERS[dim](3, momentum=0.5, **options)
    for _ in range(3):
        m(torch.rand([4, 3, 2, 2, 2][: dim + 2])).sum().backward()
    return m


# --- the input ------------------------------------------------------------------------------------

GOOD_RANKS = {1: "2D or 3D", 2: "4D", 3: "5D"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rank", range(7))
@pytest.mark.parametrize("dim", DIMENSIONS)
def test_wrong_rank(dim, rank, training):
    if f"{rank}D" in GOOD_RANKS[dim]:
        return
    m = mid_pair_layer(dim).train(training)
    x = torch.rand([4, 3, 2, 2, 2, 2][:rank])
    with unchanged(m, x), pytest.raises(ValueError, match=rf"expected {GOOD_RANKS[dim]} input \(got {rank}D input\)"):
        m(x)


@pytest.mark.parametrize("training", [True, False])
def test_wrong_rank_of_an_empty_input(training):
    m = mid_pair_layer().train(training)
    with unchanged(m), pytest.raises(ValueError, match=r"expected 4D input \(got 2D input\)"):
        m(torch.empty(0, 3))


ONE_VALUE = [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)]


@pytest.mark.parametrize("shape", ONE_VALUE, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"inplace": True, "affine": False}, {"activation": "relu"}, {"momentum": None}], ids=str
)
def test_one_value_per_channel(shape, options):
    m = LAYERS[max(1, len(shape) - 2)](3, **options)
    m(torch.rand(2, *shape[1:]))
    x = torch.rand(shape)
    with (
        unchanged(m, x),
        pytest.raises(ValueError, match="Expected more than 1 value per channel when training, got input size") as e,
    ):
        m(x)
    assert ", ".join(map(str, shape)) in str(e.value)
    m.eval()(x)


@pytest.mark.parametrize("training", [True, False])
def test_one_value_per_channel_without_tracking(training):
    """Batch statistics are used in evaluation too."""
    m = momentum_bn.MomentumBatchNorm2d(3, track_running_stats=False).train(training)
    with unchanged(m), pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        m(torch.rand(1, 3, 1, 1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"affine": False}], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_wrong_number_of_channels(channels, options, training):
    m = (
        mid_pair_layer(**options).train(training)
        if options.get("affine", True)
        else momentum_bn.MomentumBatchNorm2d(3, **options)
    )
    m.train(training)
    x = torch.rand(4, channels, 5, 5)
    with unchanged(m, x), pytest.raises(ValueError) as e:
        m(x)
    assert "3" in str(e.value) and str(channels) in str(e.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128], ids=str
)
def test_dtype_of_the_input(dtype, training):
    m = mid_pair_layer().train(training)
    x = torch.ones(4, 3, 2, 2, dtype=dtype)
    with unchanged(m, x), pytest.raises(TypeError) as e:
        m(x)
    assert any(name in str(e.value) for name in (str(dtype), str(dtype).removeprefix("torch."), type_name(dtype)))
    with unchanged(m), pytest.raises(TypeError):
        m(torch.ones(0, 3, 2, 2, dtype=dtype))


KERNEL_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
ALL_DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_exactly_four_dtypes_pass(dtype, inplace, training):
    """torch has floating-point dtypes of one byte a value, too: no kernel reads them."""
    m = momentum_bn.MomentumBatchNorm2d(4, affine=False, inplace=inplace).train(training)
    try:
        x = torch.empty(2, 4, 8, 8, dtype=dtype)
    except (RuntimeError, TypeError):
        pytest.skip(f"torch cannot make a tensor of {dtype}")
    if dtype in KERNEL_DTYPES:
        m.to(dtype)(x)
        return
    with unchanged(m), pytest.raises((TypeError, RuntimeError)), torch.no_grad():
        m(x)


SCALARS = ["num_batches_tracked", "view_count", "cur_iter_state", "momentum_state"]
ARRAYS = ["running_mean", "running_var", "view_mean_sum", "view_var_sum"]


@pytest.mark.parametrize("name", SCALARS + ARRAYS)
@pytest.mark.parametrize(
    "replaced",
    {
        "without elements": lambda t: t.new_empty(0),
        "longer": lambda t: t.new_zeros(5),
        "on meta": lambda t: t.to("meta"),
        "of bytes": lambda t: t.to(torch.int8),
        "complex": lambda t: t.to(torch.complex64),
    }.items(),
    ids=lambda r: r[0],
)
def test_buffers_replaced_between_calls(name, replaced):
    m = mid_pair_layer()
    m._buffers[name] = replaced[1](m._buffers[name])
    x = torch.rand(4, 3, 2, 2)
    before = {n: b.clone() for n, b in m.named_buffers()}
    with pytest.raises((ValueError, TypeError, RuntimeError)) as e:
        m(x)
    # The number of channels is read off the running mean.
    assert name in str(e.value) or (name == "running_mean" and "channels" in str(e.value))
    for n, b in m.named_buffers():
        assert b.is_meta or torch.equal(b, before[n])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_the_state_share_no_memory(name, inplace):
    m = mid_pair_layer()
    m.inplace = inplace
    x = torch.rand(4, 3, 2, 2)
    for shared in (torch.ones(1).expand(3), x.view(-1)[2:5], x[0, :, 1, 1]):
        m._buffers[name] = shared
        with torch.no_grad(), unchanged(m, x), pytest.raises(RuntimeError, match=f"{name}.*memory"):
            m(x)


@pytest.mark.parametrize("make", [momentum_bn.MomentumBatchNorm2d, momentum_bn.BatchNorm2d])
@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"activation": "relu"}])
def test_inference_tensors_cannot_be_kept_for_a_gradient(make, options):
    m = make(3, **options)
    with torch.inference_mode():
        x, weight = torch.rand(4, 3, 2, 2), torch.ones(3)
    with unchanged(m, x), pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward: x"):
        m(x)
    with torch.no_grad():
        m(x.clone())
    frozen = make(3, **options).requires_grad_(False)
    frozen.weight = torch.nn.Parameter(weight, requires_grad=False)
    leaf = torch.rand(4, 3, 2, 2, requires_grad=True)
    with unchanged(frozen), pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward: weight"):
        frozen(leaf * 1)


def test_copy_on_write_clones_of_the_state_keep_their_values():
    m = mid_pair_layer()
    clones = {n: (torch._lazy_clone(b), b.clone()) for n, b in m.named_buffers()}
    for _ in range(2):
        m(torch.rand(4, 3, 2, 2) + 5)
    for name, (clone, before) in clones.items():
        assert torch.equal(clone, before), name


def type_name(dtype):
    """What C++ calls the dtype."""
    return {
        torch.int64: "Long", torch.int32: "Int", torch.uint8: "Byte", torch.bool: "Bool",
        torch.complex64: "ComplexFloat", torch.complex128: "ComplexDouble",
    }[dtype]  # fmt: skip


@pytest.mark.parametrize("x", [None, 3.0, [[1.0, 2.0]], "x"], ids=str)
def test_input_that_is_no_tensor(x):
    m = mid_pair_layer()
    with unchanged(m), pytest.raises((TypeError, AttributeError)):
        m(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize(
    "residual",
    [
        torch.rand(4, 3, 2, 1), torch.rand(3, 2, 2), torch.rand(1, 3, 2, 2), torch.rand(4, 3, 2, 2, 1), torch.rand(()),
        torch.rand(4, 3, 2, 2).double(), torch.rand(4, 3, 2, 2).half(), torch.ones(4, 3, 2, 2, dtype=torch.int64),
    ],
    ids=lambda r: f"{tuple(r.shape)} {r.dtype}",
)  # fmt: skip
def test_residual(residual, inplace, training):
    m = mid_pair_layer(inplace=inplace).train(training)
    x = torch.rand(4, 3, 2, 2)
    with torch.no_grad(), unchanged(m, x, residual), pytest.raises(ValueError, match="residual"):
        m(x, residual)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [1.0, False, [[1.0]], "x"], ids=str)
@pytest.mark.parametrize("make", [momentum_bn.BatchNorm2d, momentum_bn.MomentumBatchNorm2d])
def test_residual_that_is_no_tensor(make, residual, training):
    m = make(3).train(training)
    words = rf"residual must be a tensor or None \(got {type(residual).__name__}\)"
    with unchanged(m), pytest.raises(TypeError, match=words):
        m(torch.rand(4, 3, 2, 2), residual)


# --- options --------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ("total_iters", 0), ("total_iters", -5), ("momentum", -0.1), ("momentum", 1.5), ("momentum", float("nan")),
    ("eps", 0.0), ("eps", -1e-5), ("eps", float("nan")), ("eps", float("inf")),
    ("schedule", "linear"), ("schedule", ""), ("variance", "torch"),
    ("activation", "gelu"), ("activation", "ReLU"), ("views_per_update", 0), ("views_per_update", -1),
]  # fmt: skip


@pytest.mark.parametrize("dim", DIMENSIONS)
@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_bad_option(dim, name, value):
    with pytest.raises(ValueError) as e:
        LAYERS[dim](3, **{name: value})
    assert name in str(e.value), "the argument is named"
    spelled = (
        "nan" if value != value else str(value).rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    )
    assert spelled in str(e.value) or repr(value) in str(e.value), "what came is named"


@pytest.mark.parametrize("value", ["no", "", None, 2, 0.0, []], ids=repr)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make, name)
        for make in (momentum_bn.BatchNorm2d, momentum_bn.MomentumBatchNorm2d)
        for name in ("affine", "bias", "track_running_stats", "inplace", "detach_statistics")
        if make is momentum_bn.MomentumBatchNorm2d or name != "detach_statistics"
    ],
)
def test_flags_are_true_or_false(make, name, value):
    with pytest.raises(TypeError, match=re.escape(f"{name} must be True or False (got {value!r})")):
        make(3, **{name: value})
    for flag in (0, 1):  # torch's layers take them
        assert repr(make(3, **{name: flag})) == repr(make(3, **{name: bool(flag)}))


def test_flags_of_functions_are_true_or_false():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = repr(net)
    statistics = torch.zeros(3), torch.ones(3)
    calls = {
        "fuse": lambda: momentum_bn.MomentumTeacher(net, 10, fuse="no"),
        "inplace": lambda: momentum_bn.convert_batchnorm(net, inplace="no"),
        "detach_statistics": lambda: momentum_bn.convert_momentum_batchnorm(net, 10, detach_statistics="no"),
        "training": lambda: momentum_batch_norm(torch.rand(4, 3), *statistics, training="no"),
    }
    for name, call in calls.items():
        with unchanged(net), pytest.raises(TypeError, match=rf"{name} must be True or False \(got 'no'\)"):
            call()
    assert repr(net) == before


@pytest.mark.parametrize(("name", "word"), [("schedule", "constant"), ("variance", "unbiased"), ("activation", "relu")])
def test_bad_word_error_names_what_is_allowed(name, word):
    with pytest.raises(ValueError, match=word):
        momentum_bn.MomentumBatchNorm2d(3, **{name: "nonsense"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("momentum", -0.1), ("momentum", 1.5), ("momentum", float("nan")), ("momentum", float("inf")),
        ("total_iters", 0), ("total_iters", -1), ("cur_iter", -1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tracking", [True, False])
def test_bad_assignment(name, value, tracking):
    m = mid_pair_layer(track_running_stats=tracking)
    with unchanged(m), pytest.raises(ValueError, match=name):
        setattr(m, name, value)


def test_bad_set_total_iters_changes_no_layer():
    net = nn.Sequential(mid_pair_layer(), mid_pair_layer())
    with unchanged(net), pytest.raises(ValueError, match="total_iters"):
        momentum_bn.set_total_iters(net, 0)


def test_negative_number_of_channels():
    with pytest.raises((ValueError, RuntimeError)):
        momentum_bn.MomentumBatchNorm2d(-1)


# --- the function ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("momentum", 1.5), ("momentum", -0.5), ("eps", 0.0), ("eps", -1.0), ("eps", float("inf")), ("variance", "torch")],
)
def test_bad_option_of_the_function(name, value):
    with pytest.raises(ValueError, match=name):
        momentum_batch_norm(torch.rand(4, 3), torch.zeros(3), torch.ones(3), training=True, **{name: value})


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_wrong_number_of_channels_of_the_function(name, training):
    arguments = {n: torch.ones(3) for n in ("running_mean", "running_var", "weight", "bias")}
    arguments[name] = torch.ones(4)
    with pytest.raises(ValueError) as e:
        momentum_batch_norm(torch.rand(4, 3), training=training, **arguments)
    assert name in str(e.value) and "3" in str(e.value) and "4" in str(e.value)


@pytest.mark.parametrize("training", [True, False])
def test_function_takes_both_running_statistics_or_none(training):
    for mean, var in [(torch.zeros(3), None), (None, torch.ones(3))]:
        with pytest.raises(ValueError, match=r"running_(mean|var)"):
            momentum_batch_norm(torch.rand(4, 3), mean, var, training=training)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_dtype_of_the_functions_input(dtype, training):
    with pytest.raises(TypeError):
        momentum_batch_norm(torch.ones(4, 3, dtype=dtype), torch.zeros(3), torch.ones(3), training=training)


@pytest.mark.parametrize("shape", ONE_VALUE, ids=str)
def test_one_value_per_channel_in_the_function(shape):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        momentum_batch_norm(torch.rand(shape), torch.zeros(3), torch.ones(3), training=True)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        momentum_batch_norm(torch.rand(shape), None, None)
    momentum_batch_norm(torch.rand(shape), torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_rank_of_the_functions_input(rank, training):
    with pytest.raises(ValueError, match="2D"):
        momentum_batch_norm(torch.rand([3][:rank]), torch.zeros(3), torch.ones(3), training=training)


@pytest.mark.parametrize("make", [momentum_bn.BatchNorm2d, momentum_bn.MomentumBatchNorm2d])
@pytest.mark.parametrize("training", [True, False])
def test_an_assigned_activation_is_checked(make: type[momentum_bn.BatchNorm], training: bool) -> None:
    layer = make(4).train(training)
    layer.activation = "gelu"
    with pytest.raises(ValueError, match=r"activation must be None or 'relu' \(got 'gelu'\)"):
        layer(torch.randn(2, 4, 3, 3))
