"""convert_momentum_batchnorm, convert_batchnorm and revert_momentum_batchnorm."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.testing import assert_close

import momentum_bn
from inputs import randn
from momentum_bn import convert_batchnorm, convert_momentum_batchnorm, revert_momentum_batchnorm
from snapshots import assert_same, same_bits, snapshot, unchanged


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


def test_layers_that_are_converted_already_get_what_is_given():
    """total_iters and the options that the caller gives; one left out leaves the layer as it is, its schedule too."""
    layer = momentum_bn.MomentumBatchNorm1d(3, momentum=0.4, total_iters=9, variance="biased", activation="relu")
    layer.cur_iter = 3
    net = convert_momentum_batchnorm(nn.Sequential(layer), 70)
    assert net[0] is layer and (layer.total_iters, layer.variance, layer.momentum, layer.cur_iter) == (
        70,
        "biased",
        0.4,
        3,
    )
    given = {"momentum": 0.7, "views_per_update": 3, "schedule": "constant", "variance": "unbiased",
             "activation": None, "inplace": True}  # fmt: skip
    convert_momentum_batchnorm(net, 80, **given)
    assert {name: getattr(layer, name) for name in given} == given
    assert layer.total_iters == 80 and layer.cur_iter == 3
    layer.reset_running_stats()
    assert layer.momentum == 0.7


def test_options_without_effect_are_refused():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"inplace, views_per_update .*no BatchNorm"):
        convert_momentum_batchnorm(net, 7, inplace=True, views_per_update=3)
    assert convert_momentum_batchnorm(net, 7) is net


def test_unknown_option_is_refused():
    net = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(TypeError, match="inplcae"):
        convert_momentum_batchnorm(net, 7, inplcae=True)
    assert type(net[0]) is nn.BatchNorm1d


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


def test_every_option_is_passed_on():
    options = {"momentum": 0.5, "views_per_update": 3, "schedule": "constant", "variance": "biased",
               "activation": "relu", "inplace": True}  # fmt: skip
    m = convert_momentum_batchnorm(nn.BatchNorm2d(3), 9, **options)
    assert {name: getattr(m, name) for name in options} == options and m.total_iters == 9


@pytest.mark.parametrize(
    ("plain", "converted"),
    [(nn.BatchNorm1d, momentum_bn.MomentumBatchNorm1d), (nn.BatchNorm2d, momentum_bn.MomentumBatchNorm2d),
     (nn.BatchNorm3d, momentum_bn.MomentumBatchNorm3d), (nn.SyncBatchNorm, momentum_bn.MomentumBatchNorm)],
)  # fmt: skip
def test_class_by_class(plain, converted):
    m = convert_momentum_batchnorm(plain(3, momentum=0.3), 9)
    assert type(m) is converted
    assert type(revert_momentum_batchnorm(m)) is plain and m.momentum == 0.3


def test_converted_layer_is_a_new_layer_with_the_old_statistics():
    """Outputs and state of a run after conversion are those of a layer built as such and given the statistics."""
    plain = nn.BatchNorm1d(3)
    for step in range(3):
        plain(randn(8, 3, seed=step, dtype=torch.float32))
    built = momentum_bn.MomentumBatchNorm1d(3, total_iters=5)
    built.load_state_dict(plain.state_dict())
    converted = convert_momentum_batchnorm(plain, 5)
    for step in range(7):
        x = randn(8, 3, seed=10 + step, dtype=torch.float32)
        assert same_bits(converted(x), built(x))
    assert_same(snapshot(converted), snapshot(built))


def test_backward_hooks_and_optimizer_go_on():
    net, seen = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), []
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    handle = net[1].register_full_backward_hook(lambda *_: seen.append("backward"))
    convert_momentum_batchnorm(net, 7)
    before = net[1].weight.detach().clone()
    net(torch.rand(4, 3)).square().sum().backward()
    optimizer.step()
    assert seen == ["backward"] and not torch.equal(net[1].weight, before)
    handle.remove()
    revert_momentum_batchnorm(net)(torch.rand(4, 3)).sum().backward()
    assert seen == ["backward"]


def test_reverted_network_evaluates_as_before():
    net = nn.Sequential(nn.Linear(3, 4), momentum_bn.MomentumBatchNorm1d(4), momentum_bn.MomentumBatchNorm(4))
    for step in range(4):
        net(randn(8, 3, seed=step, dtype=torch.float32))
    x = randn(8, 3, seed=9, dtype=torch.float32)
    expected = net.eval()(x)
    revert_momentum_batchnorm(net)
    assert same_bits(net(x), expected)
    assert [type(layer) for layer in net[1:]] == [nn.BatchNorm1d, nn.SyncBatchNorm]


class OwnForward(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


class TorchsForward(nn.BatchNorm1d):
    """A subclass that a forward pass does not tell from its base."""


def test_layers_that_would_lose_something_are_refused():
    """A forward of its own, a parametrization: the class cannot be exchanged. Nothing is changed then."""
    parametrized = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    nn.utils.parametrize.register_parametrization(parametrized[1], "weight", nn.Identity())
    for net in (nn.Sequential(nn.BatchNorm1d(3), OwnForward(3)), parametrized):
        classes = [type(layer) for layer in net]
        with unchanged(net), pytest.raises(ValueError, match="cannot replace 1"):
            convert_momentum_batchnorm(net, 7)
        assert [type(layer) for layer in net] == classes


def test_subclass_gets_its_class_back():
    m = convert_momentum_batchnorm(TorchsForward(3), 7)
    assert type(m) is momentum_bn.MomentumBatchNorm1d
    assert type(revert_momentum_batchnorm(m)) is TorchsForward


# --- BatchNorm ------------------------------------------------------------------------------------


def test_convert_batchnorm_keeps_everything():
    """The same objects, parameters, buffers, momentum and numbers; names and state dict as before."""
    net, untouched = network(), network()
    untouched.load_state_dict(net.state_dict())
    net[1].eval(), untouched[1].eval()
    net[1].weight.requires_grad_(False), untouched[1].weight.requires_grad_(False)
    plain = [net[1], net[2][0], net[4], net[5]]
    kept = [(m.weight, m.bias, m.running_mean, m.num_batches_tracked, m.eps, m.momentum, m.training) for m in plain]
    names = list(net.state_dict())
    assert convert_batchnorm(net) is net
    for m, (weight, bias, mean, count, *values) in zip([net[1], net[2][0], net[4], net[5]], kept, strict=True):
        assert m.weight is weight and m.bias is bias and m.running_mean is mean and m.num_batches_tracked is count
        assert [m.eps, m.momentum, m.training] == values
        assert (m.activation, m.inplace, m.process_group) == (None, False, None)
    assert [type(m) for m in (net[1], net[4])] == [momentum_bn.BatchNorm2d, momentum_bn.BatchNorm1d]
    assert list(net.state_dict()) == names
    x = randn(4, 3, 5, 5, dtype=torch.float32)
    for training in (True, True, False):
        y, expected = net.train(training)(x), untouched.train(training)(x)
        assert_close(y, expected, rtol=1e-5, atol=1e-6)
        if training:
            y.square().sum().backward(), expected.square().sum().backward()
    for (name, ours), theirs in zip(net.named_parameters(), untouched.parameters(), strict=True):
        if ours.requires_grad:
            assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)
    untouched.load_state_dict(net.state_dict(), strict=True)
    assert revert_momentum_batchnorm(net) is net
    assert [type(m) for m in net] == [type(m) for m in untouched]
    assert (net[1].momentum, net[5].momentum) == (0.2, 0.1) and list(net.state_dict()) == names


def test_convert_batchnorm_options():
    net = convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3, momentum=None)), activation="relu", inplace=True)
    assert (net[0].activation, net[0].inplace, net[0].momentum) == ("relu", True, None)
    with pytest.raises(ValueError, match="activation"):
        revert_momentum_batchnorm(net)
    for options, error in [({"activation": "gelu"}, ValueError), ({"process_group": "nonsense"}, ValueError),
                           ({"activatoin": "relu"}, TypeError)]:  # fmt: skip
        net = nn.Sequential(nn.BatchNorm2d(3))
        with pytest.raises(error):
            convert_batchnorm(net, **options)
        assert type(net[0]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("plain", "converted"),
    [(nn.BatchNorm1d, momentum_bn.BatchNorm1d), (nn.BatchNorm2d, momentum_bn.BatchNorm2d),
     (nn.BatchNorm3d, momentum_bn.BatchNorm3d), (nn.SyncBatchNorm, momentum_bn.BatchNorm)],
)  # fmt: skip
def test_convert_batchnorm_class_by_class(plain, converted):
    m = convert_batchnorm(plain(3, momentum=0.3))
    assert type(m) is converted and m.momentum == 0.3
    m.momentum = 0.4
    assert type(revert_momentum_batchnorm(m)) is plain and m.momentum == 0.4, "what it had last"


def test_convert_batchnorm_leaves_layers_of_this_library():
    net = nn.Sequential(momentum_bn.MomentumBatchNorm1d(3), momentum_bn.BatchNorm1d(3, activation="relu"))
    with unchanged(net):
        convert_batchnorm(net)
    assert type(net[0]) is momentum_bn.MomentumBatchNorm1d and net[1].activation == "relu"


def test_convert_batchnorm_refuses_what_would_lose_something():
    for bad, words in [(OwnForward(3), "cannot replace 1"), (nn.LazyBatchNorm1d(), "LazyBatchNorm"),
                       (nn.BatchNorm1d(3, momentum=1.5), "momentum"), (nn.BatchNorm1d(3, eps=0.0), "eps")]:  # fmt: skip
        net = nn.Sequential(nn.BatchNorm1d(3), bad)
        with pytest.raises(ValueError, match=words):
            convert_batchnorm(net)
        assert [type(m) for m in net] == [nn.BatchNorm1d, type(bad)]


def test_from_batchnorm_to_momentum_and_back():
    """Momentum BatchNorm keeps what the layer does beside normalising; its origin is torch's layer all the time."""
    net = nn.Sequential(TorchsForward(3, momentum=0.3), nn.BatchNorm1d(3), momentum_bn.BatchNorm1d(3, momentum=0.6))
    convert_batchnorm(net)
    net[1].activation, net[1].inplace = "relu", True
    convert_momentum_batchnorm(net, 7)
    assert [type(m) for m in net] == [momentum_bn.MomentumBatchNorm1d] * 3
    assert [(m.activation, m.inplace, m.total_iters, m.momentum) for m in net] == [
        (None, False, 7, 1.0), ("relu", True, 7, 1.0), (None, False, 7, 1.0),
    ]  # fmt: skip
    net(torch.rand(4, 3))
    net[1].activation = None
    revert_momentum_batchnorm(net)
    assert [(type(m), m.momentum) for m in net] == [
        (TorchsForward, 0.3), (nn.BatchNorm1d, 0.1), (nn.BatchNorm1d, 0.6),
    ]  # fmt: skip
    assert not [name for m in net for name in vars(m) if name in ("activation", "_origin", "_momentum", "inplace")]
    net(torch.rand(4, 3)).sum().backward()


# --- what else converts BatchNorms ----------------------------------------------------------------


def test_convert_sync_batchnorm_is_refused():
    """It would replace the layer, its present momentum taken for torch's; what is not ours it converts."""
    net = nn.Sequential(nn.Linear(3, 4), momentum_bn.MomentumBatchNorm1d(4))
    with unchanged(net), pytest.raises(RuntimeError, match="convert_sync_batchnorm") as error:
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert "schedule" in str(error.value)
    assert type(net[1]) is momentum_bn.MomentumBatchNorm1d
    with pytest.raises(RuntimeError, match="convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(momentum_bn.MomentumBatchNorm1d(4, track_running_stats=False))
    student = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4)))
    assert type(student[0]) is nn.SyncBatchNorm


@pytest.mark.parametrize("views", [1, 2])
def test_update_bn(views):
    """The running statistics become the average over the batches of complete updates; the schedule starts anew."""
    m = momentum_bn.MomentumBatchNorm1d(3, momentum=0.75, total_iters=9, views_per_update=views, variance="unbiased")
    for step in range(4):
        m(randn(8, 3, seed=step, dtype=torch.float32))
    batches = [randn(8, 3, seed=20 + step, dtype=torch.float32, shift=step) for step in range(5)]
    m.eval()
    torch.optim.swa_utils.update_bn(batches, m)
    used = batches[: 5 // views * views]
    assert_close(m.running_mean, torch.stack([x.mean(0) for x in used]).mean(0), rtol=1e-5, atol=1e-6)
    assert_close(m.running_var, torch.stack([x.var(0) for x in used]).mean(0), rtol=1e-5, atol=1e-6)
    assert not m.training and int(m.num_batches_tracked) == 5
    assert (m.momentum, m.cur_iter, int(m.view_count)) == (0.75, 5 // views, 5 % views)


def test_averaged_model():
    """Stochastic weight averaging: parameters are averaged; buffers, and so the schedule, are the model's."""
    net = nn.Sequential(nn.Linear(3, 4), momentum_bn.MomentumBatchNorm1d(4, total_iters=9))
    averaged = torch.optim.swa_utils.AveragedModel(net)
    for step in range(3):
        net(randn(8, 3, seed=step, dtype=torch.float32))
        averaged.update_parameters(net)
    ours = averaged.module[1]
    assert (ours.momentum, ours.cur_iter, int(ours.view_count)) == (net[1].momentum, 1, 1)
    assert same_bits(ours.view_mean_sum, net[1].view_mean_sum)
    x = randn(8, 3, dtype=torch.float32)
    assert averaged(x).shape == (8, 4) and net[1].cur_iter == 1, "a state of its own"


def test_fusion_into_convolution_and_linear_layer():
    """torch.nn.utils.fusion, in evaluation. It knows no activation: the caller applies it."""
    for activation in (None, "relu"):
        conv, norm = nn.Conv2d(3, 4, 3), momentum_bn.MomentumBatchNorm2d(4, activation=activation)
        linear, norm1d = nn.Linear(3, 4), momentum_bn.MomentumBatchNorm1d(4, activation=activation)
        images, rows = randn(8, 3, 6, 6, dtype=torch.float32), randn(8, 3, dtype=torch.float32)
        after = torch.relu if activation else nn.Identity()
        cases = [(conv, norm, images, fuse_conv_bn_eval), (linear, norm1d, rows, fuse_linear_bn_eval)]
        for first, layer, x, fuse in cases:
            for _ in range(4):
                layer(first(x))
            with pytest.raises(AssertionError, match="eval"):
                fuse(first, layer)
            first.eval(), layer.eval()
            assert_close(after(fuse(first, layer)(x)), layer(first(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantization_fusion():
    """torch.ao's fuse_modules knows classes by name and says so; a reverted network is what it takes."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), momentum_bn.MomentumBatchNorm2d(4)).eval()
    with pytest.raises(AssertionError, match="did not find fuser method"):
        torch.ao.quantization.fuse_modules(net, ["0", "1"])
    x = randn(2, 3, 6, 6, dtype=torch.float32)
    expected = net(x)
    fused = torch.ao.quantization.fuse_modules(revert_momentum_batchnorm(net), ["0", "1"])
    assert_close(fused(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "net", [nn.Linear(2, 2), momentum_bn.BatchNorm1d(2), nn.Sequential(momentum_bn.BatchNorm1d(2))]
)
def test_options_without_a_batchnorm_to_convert_are_refused(net: nn.Module) -> None:
    name = type(net).__name__
    with (
        unchanged(net),
        pytest.raises(ValueError, match=f"activation, inplace would have no effect: {name} has no Batch"),
    ):
        convert_batchnorm(net, activation="relu", inplace=True)
    assert convert_batchnorm(net) is net
