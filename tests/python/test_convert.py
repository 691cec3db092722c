"""convert_momentum_batchnorm and revert_momentum_batchnorm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import momentum_bn
from momentum_bn import convert_momentum_batchnorm, revert_momentum_batchnorm
from snapshots import same_bits


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2),
        nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.Flatten()), nn.Linear(36, 5),
        nn.BatchNorm1d(5, track_running_stats=False), nn.BatchNorm1d(5, bias=False),
    )  # fmt: skip


def test_everything_is_kept():
    net = network()
    net(torch.rand(4, 3, 5, 5))
    net[1].eval()
    net[1].weight.requires_grad_(False)
    plain = [net[1], net[2][0], net[4], net[5]]
    kept = [(m.weight, m.bias, m.running_mean, m.running_var, m.num_batches_tracked, m.eps, m.training) for m in plain]
    assert convert_momentum_batchnorm(net, 50, views_per_update=1, variance="unbiased") is net
    for m, (weight, bias, mean, var, count, eps, training) in zip(
        [net[1], net[2][0], net[4], net[5]], kept, strict=True
    ):
        assert m.weight is weight and m.bias is bias, "the same parameter objects"
        for ours, theirs in [(m.running_mean, mean), (m.running_var, var), (m.num_batches_tracked, count)]:
            assert (ours is None and theirs is None) or same_bits(ours, theirs)
        assert (m.eps, m.training, m.total_iters, m.views_per_update, m.variance) == (eps, training, 50, 1, "unbiased")
        assert m.momentum == 1.0, "the old momentum is not taken over"
    assert isinstance(net[1], momentum_bn.MomentumBatchNorm2d) and isinstance(net[4], momentum_bn.MomentumBatchNorm1d)
    assert not net[1].weight.requires_grad
    net(torch.rand(4, 3, 5, 5)).sum().backward()


def test_total_iters_has_no_default():
    with pytest.raises(TypeError, match="total_iters"):
        convert_momentum_batchnorm(network())


def test_root_that_is_a_layer():
    root = convert_momentum_batchnorm(nn.BatchNorm3d(3), 7)
    assert isinstance(root, momentum_bn.MomentumBatchNorm3d) and root.total_iters == 7


def test_device_and_dtype_are_kept():
    m = convert_momentum_batchnorm(nn.BatchNorm2d(3).double(), 7)
    assert m.weight.dtype == m.running_mean.dtype == m.view_mean_sum.dtype == torch.float64
    m = convert_momentum_batchnorm(nn.BatchNorm2d(3, device="meta"), 7)
    assert all(t.device.type == "meta" for t in m.state_dict().values())


def test_hooks_are_kept():
    net, seen = nn.Sequential(nn.BatchNorm1d(3)), []
    net[0].register_forward_hook(lambda *_: seen.append("forward"))
    net[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    convert_momentum_batchnorm(net, 7)(torch.rand(4, 3))
    assert seen == ["before", "forward"]


def test_shared_modules_stay_shared():
    shared = nn.BatchNorm1d(3)
    net = nn.ModuleList([shared, nn.Sequential(shared), shared])
    convert_momentum_batchnorm(net, 7)
    assert net[0] is net[1][0] is net[2] and isinstance(net[0], momentum_bn.MomentumBatchNorm1d)


def test_layers_that_are_converted_already_only_get_total_iters():
    layer = momentum_bn.MomentumBatchNorm1d(3, momentum=0.4, total_iters=9, variance="biased")
    layer.cur_iter = 3
    net = convert_momentum_batchnorm(nn.Sequential(layer), 70, variance="unbiased")
    assert net[0] is layer and (layer.total_iters, layer.variance, layer.momentum, layer.cur_iter) == (
        70,
        "biased",
        0.4,
        3,
    )


def test_sync_batchnorm_becomes_a_layer_of_any_rank():
    m = convert_momentum_batchnorm(nn.Sequential(nn.SyncBatchNorm(3)), 7)[0]
    for shape in [(4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2)]:
        assert m(torch.rand(shape)).shape == shape
    assert m.cur_iter == 2


def test_uninitialised_lazy_batchnorm_is_refused():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="LazyBatchNorm"):
        convert_momentum_batchnorm(net, 7)
    assert type(net[0]) is nn.BatchNorm2d, "an error changes nothing"
    net(torch.rand(4, 3, 2, 2))
    assert isinstance(convert_momentum_batchnorm(net, 7)[1], momentum_bn.MomentumBatchNorm2d)


@pytest.mark.parametrize(("name", "value"), [("total_iters", 0), ("variance", "nonsense"), ("views_per_update", 0)])
def test_bad_argument_changes_nothing(name, value):
    net = nn.Sequential(nn.BatchNorm2d(3), momentum_bn.MomentumBatchNorm2d(3, total_iters=5))
    with pytest.raises(ValueError, match=name):
        convert_momentum_batchnorm(net, **{"total_iters": 7, name: value})
    assert type(net[0]) is nn.BatchNorm2d and net[1].total_iters == 5


def test_revert():
    net = network()
    net(torch.rand(4, 3, 5, 5))
    names, state = list(net.state_dict()), {n: v.clone() for n, v in net.state_dict().items()}
    weight = net[1].weight
    reverted = revert_momentum_batchnorm(convert_momentum_batchnorm(net, 7))
    assert reverted is net and type(net[1]) is nn.BatchNorm2d and type(net[5]) is nn.BatchNorm1d
    assert net[1].weight is weight and net[1].eps == 1e-3
    assert net[1].momentum == 0.2 and net[5].momentum == 0.1, "what they had before"
    assert list(net.state_dict()) == names
    assert all(same_bits(net.state_dict()[n], v) for n, v in state.items())
    assert revert_momentum_batchnorm(momentum_bn.MomentumBatchNorm2d(3)).momentum == 0.1
    assert type(revert_momentum_batchnorm(convert_momentum_batchnorm(nn.SyncBatchNorm(3), 7))) is nn.SyncBatchNorm


def test_revert_refuses_a_fused_activation():
    net = nn.Sequential(momentum_bn.MomentumBatchNorm2d(3), momentum_bn.MomentumBatchNorm2d(3, activation="relu"))
    with pytest.raises(ValueError, match="activation"):
        revert_momentum_batchnorm(net)
    assert isinstance(net[0], momentum_bn.MomentumBatchNorm2d)
