"""torch.library.opcheck for every operator. No operator may be without a sample."""

from __future__ import annotations

import pytest
import torch

import momentum_bn
from inputs import randn
from oracle import cosine_schedule, teacher_momentum

# eps, momentum, total_iters, views_per_update, schedule, variance, detach_statistics
WORDS = (1e-5, None, 10, 2, "cosine", "published", True)
THROUGH = (1e-5, None, 10, 2, "cosine", "published", False)
BATCH_NORM = (1e-5, 0.1, 1, 1, "constant", "biased", False)


def state(dtype=torch.float32, c=3):
    return list(momentum_bn.MomentumBatchNorm2d(c, dtype=dtype).buffers())


def test_state_order_of_the_operators_is_that_of_the_buffers():
    names = [name for name, _ in momentum_bn.MomentumBatchNorm2d(3).named_buffers()]
    assert names == [
        "running_mean", "running_var", "num_batches_tracked", "view_mean_sum", "view_var_sum", "view_count",
        "cur_iter_state", "momentum_state",
    ]  # fmt: skip


IMAGES = (2, 3, 4, 5)


def values(*shape, seed=0, dtype=torch.float32):
    return randn(*shape, seed=seed, dtype=dtype)


def leaf(*shape, seed=0, dtype=torch.float32):
    return values(*shape, seed=seed, dtype=dtype).requires_grad_()


def channels_last():
    return values(*IMAGES).contiguous(memory_format=torch.channels_last)


def saved(dtype=torch.float32, rows=3):
    """What backward needs of the statistics: mean, what the mean lost in rounding, 1 / std.

    Where they take gradients, also the mean less the batch's, and the batch's shares.
    """
    shares = [randn(3, seed=7) * 0.1, torch.full((3,), 0.02), torch.full((3,), 0.03)]
    return torch.stack([randn(3, seed=8), torch.zeros(3), randn(3, seed=9).abs() + 0.5, *shares])[:rows].to(dtype)


def sums():
    return torch.stack([randn(3, seed=5), randn(3, seed=6)]).double()


def double(*shape):
    return leaf(*shape, dtype=torch.float64)


SAMPLES = {
    "_batch_statistics": lambda: [
        (leaf(*IMAGES),),
        (channels_last(),),
        (values(4, 3, dtype=torch.bfloat16),),
        (torch.empty(0, 3, 4),),
    ],
    "_check_input": lambda: [
        (leaf(*IMAGES), None, 3),
        (leaf(4, 3), leaf(4, 3), 3),
    ],
    "_check_parameters": lambda: [
        (leaf(*IMAGES), leaf(3), leaf(3), torch.zeros(3), torch.ones(3)),
        (leaf(4, 3), None, None, None, None),
    ],
    "_forward_train": lambda: [
        (leaf(*IMAGES), None, leaf(3), leaf(3), state(), *WORDS, None),
        (leaf(*IMAGES), leaf(*IMAGES), leaf(3), leaf(3), state(), *WORDS, "relu"),
        (values(4, 3), None, None, None, state(), *WORDS, None),
        (leaf(4, 3, 2), None, leaf(3), None, [], *WORDS, "relu"),
        (channels_last(), None, leaf(3), leaf(3), state(), *WORDS, None),
        (leaf(*IMAGES, dtype=torch.bfloat16), None, leaf(3), leaf(3), state(), *WORDS, None),
        (double(2, 3, 2, 2, 2), None, double(3), None, state(torch.float64), *WORDS, None),
        (torch.empty(0, 3, 4, 5), None, leaf(3), leaf(3), state(), *WORDS, None),
        (leaf(*IMAGES), None, leaf(3), leaf(3), state(), *THROUGH, "relu"),
        (leaf(*IMAGES), leaf(*IMAGES), leaf(3), leaf(3), state()[:3], *BATCH_NORM, "relu"),
        (leaf(4, 3, dtype=torch.bfloat16), None, leaf(3), None, [], *BATCH_NORM, None),
    ],
    "_forward_train_": lambda: [
        (values(*IMAGES), None, None, None, state(), *WORDS, None),
        (values(*IMAGES), values(*IMAGES, seed=1), values(3), values(3), state(), *WORDS, "relu"),
        (values(4, 3, dtype=torch.float16), None, None, None, [], *WORDS, None),
        (channels_last(), None, values(3), values(3), state(), *WORDS, None),
    ],
    "_forward_eval_": lambda: [
        (values(*IMAGES), None, None, None, torch.zeros(3), torch.ones(3), 1e-5, None),
        (channels_last(), values(*IMAGES, seed=1), values(3), values(3), torch.zeros(3), torch.ones(3), 1e-5, "relu"),
    ],
    "_forward_functional": lambda: [
        (leaf(*IMAGES), leaf(3), leaf(3), torch.zeros(3), torch.ones(3), 0.5, 1e-5, "published"),
        (leaf(4, 3), None, None, None, None, 1.0, 1e-5, "biased"),
        (leaf(4, 3, dtype=torch.bfloat16), leaf(3), None, torch.zeros(3), torch.ones(3), 0.5, 1e-5, "unbiased"),
        (double(2, 3, 2, 2, 2), double(3), None, None, None, 1.0, 1e-5, "published"),
        (channels_last(), values(3), values(3), torch.zeros(3), torch.ones(3), 0.5, 1e-5, "published"),
        (torch.empty(0, 3, 4), values(3), None, torch.zeros(3), torch.ones(3), 0.5, 1e-5, "published"),
    ],
    "_backward_": lambda: [
        (values(*IMAGES), values(*IMAGES, seed=1), None, values(3), None, saved(), None, [True, True, True, False]),
        (channels_last(), channels_last(), values(*IMAGES, seed=2), values(3), None, saved(), "relu", [True] * 4),
        (values(4, 3).t().contiguous().t(), None, None, None, None, saved(), None, [True, False, False, False]),
    ],
    "_backward": lambda: [
        (leaf(*IMAGES), leaf(*IMAGES, seed=1), None, leaf(3), None, saved(), None, [True, True, True, False]),
        (leaf(*IMAGES), None, None, leaf(3), None, saved(), None, [True, False, True, False]),
        (leaf(*IMAGES), leaf(*IMAGES, seed=1), values(*IMAGES, seed=2), leaf(3), None, saved(), "relu", [True] * 4),
        (leaf(4, 3), leaf(4, 3, seed=1), None, None, None, saved(), None, [True, False, False, False]),
        (channels_last(), channels_last(), None, values(3), None, saved(), None, [True, True, True, False]),
        (
            values(4, 3, dtype=torch.bfloat16),
            values(4, 3, seed=1, dtype=torch.bfloat16),
            None,
            values(3),
            None,
            saved(),
            None,
            [True, True, True, False],
        ),
        (double(4, 3), double(4, 3), None, double(3), None, saved(torch.float64), None, [True, True, True, False]),
        (leaf(*IMAGES), leaf(*IMAGES, seed=1), None, leaf(3), None, saved(rows=6), None, [True, True, True, False]),
        (
            leaf(*IMAGES),
            leaf(*IMAGES, seed=1),
            None,
            leaf(3),
            leaf(3),
            saved(rows=6),
            "relu",
            [True, True, True, False],
        ),
        (channels_last(), channels_last(), channels_last(), values(3), None, saved(rows=6), "relu", [True] * 4),
    ],
    "_gradient_sums": lambda: [
        (
            values(*IMAGES),
            values(*IMAGES, seed=1),
            None,
            values(3),
            None,
            saved(rows=6),
            None,
            [False, True, True, False],
        ),
        (
            channels_last(),
            channels_last(),
            channels_last(),
            values(3),
            None,
            saved(rows=6),
            "relu",
            [False] + [True] * 3,
        ),
        (
            torch.empty(0, 3, 4),
            torch.empty(0, 3, 4),
            None,
            values(3),
            None,
            saved(rows=6),
            None,
            [False, True, True, False],
        ),
    ],
    "_gradient_of_input": lambda: [
        (values(*IMAGES), values(*IMAGES, seed=1), None, values(3), None, saved(rows=6), sums(), None),
        (values(*IMAGES), values(*IMAGES, seed=1), None, values(3), values(3), saved(rows=6), sums(), "relu"),
        (torch.empty(0, 3, 4), torch.empty(0, 3, 4), None, None, None, saved(rows=6), sums(), None),
    ],
    "_advance_schedule_": lambda: [
        (torch.tensor(3), torch.tensor(0.5, dtype=torch.float64), 10, "cosine"),
        (torch.tensor(3), torch.tensor(0.5, dtype=torch.float64), 10, "constant"),
        (torch.tensor(3), torch.tensor(-1.0, dtype=torch.float64), 10, "cosine"),
    ],
    "_teacher_update_": lambda: [
        (
            [values(3), values(2, 2, dtype=torch.bfloat16)],
            [torch.empty(0), values(2, 2)],  # a float32 master where the parameter has 16 bits
            [values(3, seed=1), values(2, 2, seed=2, dtype=torch.bfloat16)],
            torch.tensor(0),
            10,
            0.9,
        ),
    ],
}

# Needs several processes: test_process_group.py.
IN_A_GROUP = {"_group_statistics"}

# Of numbers and words alone: nothing for opcheck to look at.
# Where the library has CUDA kernels; about no tensor, either.
OF_CUDA = {"_cuda_path_counts", "_use_cuda_paths"}
WITHOUT_TENSORS = {
    "_check_options",
    "_check_process_group",
    "_kept_memory",
    "_kept_memory_limit",
    "_release_kept_memory",
    "_scheduled_momentum",
    "_set_kept_memory_limit",
    "_show_config",
    "_teacher_param_momentum",
}


def test_every_operator_has_a_sample_and_is_private():
    names = {
        n.removeprefix("momentum_bn::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("momentum_bn::")
    }
    assert names - OF_CUDA == SAMPLES.keys() | IN_A_GROUP | WITHOUT_TENSORS
    assert all(name.startswith("_") for name in names)


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    operator = getattr(torch.ops.momentum_bn, name).default
    for number, arguments in enumerate(SAMPLES[name]()):
        try:
            torch.library.opcheck(operator, arguments)
        except Exception as error:
            raise AssertionError(f"sample {number} of {name}: {error}") from error


def test_tags():
    for name in SAMPLES:
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.momentum_bn, name).default.tags


@pytest.mark.parametrize("total_iters", [1, 2, 7, 100, 10**6])
def test_scheduled_momentum(total_iters):
    for t in {0, 1, 2, total_iters // 2, total_iters - 1, total_iters, total_iters + 1, 3 * total_iters}:
        assert torch.ops.momentum_bn._scheduled_momentum(t, total_iters) == pytest.approx(
            cosine_schedule(t, total_iters), abs=1e-15
        )
        actual = torch.ops.momentum_bn._teacher_param_momentum(t, total_iters, 0.97)
        assert actual == pytest.approx(teacher_momentum(t, total_iters, 0.97), abs=1e-15)


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (4, 3), (0, 3, 4, 5)], ids=str)
def test_meta_tensors_keep_shape_dtype_and_memory_format(shape, options):
    cls = momentum_bn.MomentumBatchNorm1d if len(shape) == 2 else momentum_bn.MomentumBatchNorm2d
    m = cls(3, device="meta", **options)
    y = m(torch.empty(shape, device="meta", dtype=torch.bfloat16))
    assert y.shape == shape and y.dtype == torch.bfloat16 and y.device.type == "meta"
    if len(shape) == 4 and shape[0]:
        x = torch.empty(shape, device="meta").contiguous(memory_format=torch.channels_last)
        assert m(x).is_contiguous(memory_format=torch.channels_last)


def test_show_config():
    minor = ".".join(torch.__version__.split(".")[:2])  # a library serves all of its patches
    assert f"built with torch {minor}." in torch.ops.momentum_bn._show_config()
