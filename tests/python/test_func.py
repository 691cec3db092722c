"""torch.func's transforms and forward-mode differentiation, against autograd through the oracle."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from inputs import randn
from momentum_bn.functional import momentum_batch_norm


@pytest.mark.parametrize("running", [(None, None), (torch.zeros(3), torch.ones(3))], ids=["batch alone", "running"])
def test_empty_input_has_no_statistics_under_a_transform(running):
    x = torch.empty(0, 3, 2)
    expected = momentum_batch_norm(x, *running, training=True)

    def statistics(x):
        y, b_mean, b_var = momentum_batch_norm(x, *running, training=True)
        return y.sum(), (y, b_mean, b_var)

    gradient, actual = torch.func.grad(statistics, has_aux=True)(x)
    assert gradient.shape == x.shape
    assert_close(actual, expected, rtol=0, atol=0)
    _, _, actual = torch.func.jvp(statistics, (x,), (x,), has_aux=True)
    assert_close(actual, expected, rtol=0, atol=0)
