"""timm's networks: its BatchNormAct2d, and some of its models, converted and fused."""

from __future__ import annotations

import copy
import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import momentum_bn
from benchmarks import networks, timm_models
from momentum_bn import MomentumBatchNorm2d, convert_momentum_batchnorm, fuse, fused_layers, revert_momentum_batchnorm
from snapshots import snapshot, unchanged

pytestmark = pytest.mark.cpu_only

DOCS = Path(__file__).resolve().parents[2] / "docs" / "networks.md"


class BatchNormAct2d(nn.BatchNorm2d):
    """The class of this name in timm, as far as it matters here."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, channels: int, act: nn.Module | None = None, drop: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles of a reverted layer find the class where it says that it is."""
    module = types.ModuleType("timm.layers.norm_act")
    module.BatchNormAct2d = BatchNormAct2d  # type: ignore[attr-defined]
    for name in ("timm", "timm.layers"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "timm.layers.norm_act", module)


def images() -> Tensor:
    return torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


ACTIVATIONS = [nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.LeakyReLU(0.1), nn.Identity()]


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("drop", [None, nn.Dropout(0.5)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_activation_and_dropout_are_kept(act: nn.Module, drop: nn.Module | None, training: bool) -> None:
    layer = convert_momentum_batchnorm(
        BatchNormAct2d(3, copy.deepcopy(act), copy.deepcopy(drop)).double(), 10, views_per_update=1
    ).train(training)
    plain = MomentumBatchNorm2d(3, total_iters=10, views_per_update=1).double().train(training)
    assert isinstance(layer, MomentumBatchNorm2d) and layer.state_dict().keys() == plain.state_dict().keys()
    for _ in range(2):
        results = []
        for run in (layer, lambda x: layer.act(layer.drop(plain(x)))):
            torch.manual_seed(0)
            x = images().requires_grad_()
            y = run(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad))
        assert_close(*results)
    assert_close(layer.running_mean, plain.running_mean)


def test_a_relu_is_applied_in_the_layers_own_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = convert_momentum_batchnorm(BatchNormAct2d(3, nn.ReLU(inplace=True)).double(), 10)
    expected = layer(images())
    assert (expected >= 0).all() and (expected == 0).any()
    called: list[str] = []
    handle = layer.act.register_forward_hook(lambda *_: called.append("act"))
    layer(images())
    assert called == ["act"], "a hook on the activation is called"
    handle.remove()
    monkeypatch.setattr(nn.ReLU, "forward", lambda *_: pytest.fail("a pass of its own"))
    layer(images())
    layer.eval()
    assert_close(layer(images(), residual=images()), (MomentumBatchNorm2d.forward(layer, images()) + images()).relu())


def test_revert_gives_the_class_back() -> None:
    before = BatchNormAct2d(3, nn.ReLU(), nn.Dropout(0.0)).double()
    before.momentum = 0.3
    layer = revert_momentum_batchnorm(convert_momentum_batchnorm(copy.deepcopy(before), 10))
    assert type(layer) is BatchNormAct2d and layer.momentum == 0.3
    assert vars(layer).keys() == vars(before).keys()
    assert_close(layer(images()), before(images()))


@pytest.mark.parametrize("move", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(move: Any) -> None:
    layer = convert_momentum_batchnorm(BatchNormAct2d(3, nn.SiLU()).double(), 10)
    layer(images())
    moved = move(layer)
    assert type(moved) is type(layer)
    assert_close(moved(images()), layer(images()))
    assert type(revert_momentum_batchnorm(moved)) is BatchNormAct2d


def test_compiled() -> None:
    layer = convert_momentum_batchnorm(BatchNormAct2d(3, nn.ReLU()).double(), 10)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    assert_close(compiled(images()), layer(images()))


def test_fused_networks() -> None:
    torch.manual_seed(0)
    written = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        BatchNormAct2d(3, nn.ReLU(inplace=True)),
        nn.Conv2d(3, 3, 1),
        BatchNormAct2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 3, 1),
        BatchNormAct2d(3, nn.SiLU(inplace=True)),
        nn.ReLU(),
    ).double()
    convert_momentum_batchnorm(written, 10)
    fused = fuse(copy.deepcopy(written))
    assert fused_layers(fused) == {"1": "in place", "3": "relu", "6": "in place"}
    for change in ({}, {"act": nn.GELU()}, {"drop": nn.Dropout(0.0)}):
        for net in (written, fused):
            for name, module in change.items():
                setattr(net[3], name, copy.deepcopy(module))
        assert fused_layers(fused)["3"] == ("in place" if change else "relu")
        for training in (True, False):
            with torch.no_grad():
                assert_close(fused.train(training)(images()), written.train(training)(images()))


def test_other_subclasses_with_a_forward_are_refused_by_name() -> None:
    class Elsewhere(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class BatchNormAct2dOfMine(BatchNormAct2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class Renamed(BatchNormAct2d):
        """Has no forward of its own."""

    for layer in (Elsewhere(3), BatchNormAct2dOfMine(3)):
        net = nn.Sequential(BatchNormAct2d(3), layer)
        with unchanged(net), pytest.raises(ValueError, match=f"cannot replace 1: {type(layer).__name__} has a forward"):
            convert_momentum_batchnorm(net, 10)
    assert isinstance(convert_momentum_batchnorm(Renamed(3), 10), MomentumBatchNorm2d)
    assert snapshot(Renamed(3))


def test_convert_sync_batchnorm_of_timm_is_refused() -> None:
    def convert_sync_batchnorm(module: Any) -> Any:
        return nn.SyncBatchNorm(module.num_features, module.eps, module.momentum)

    layer = convert_momentum_batchnorm(BatchNormAct2d(3), 10)
    for module in (layer, MomentumBatchNorm2d(3)):
        with pytest.raises(RuntimeError, match="convert_sync_batchnorm would replace Momentum BatchNorm"):
            convert_sync_batchnorm(module)


# With timm itself.


@pytest.fixture(scope="module")
def timm() -> Any:
    try:
        return timm_models.import_timm()
    except ImportError as error:
        pytest.skip(f"timm cannot be imported here ({error})")


MODELS = ["resnet18", "regnetx_002", "mobilenetv3_small_050", "ghostnet_050", "mixnet_s", "repvgg_a0"]


@pytest.mark.parametrize("name", MODELS)
def test_models(timm: Any, name: str) -> None:  # noqa: ARG001
    difference = networks.difference(name)
    assert difference is not None and difference < 1e-9
    row = networks.examine(name.partition("_")[0], name)
    assert row.converted and row.fused == "whole"


def test_a_model_that_is_fused_in_parts(timm: Any) -> None:  # noqa: ARG001
    row = networks.examine("mobilevit", "mobilevit_s")
    assert row.fused == "parts" and "control flow" in row.reason and row.words


def test_convert_sync_batchnorm(timm: Any) -> None:
    net = convert_momentum_batchnorm(timm_models.create("regnetx_002"), 10)
    with unchanged(net), pytest.raises(RuntimeError, match="convert_sync_batchnorm would replace Momentum BatchNorm"):
        timm.layers.convert_sync_batchnorm(net)


def test_a_student_of_timm_and_its_teacher(timm: Any) -> None:  # noqa: ARG001
    student = timm_models.create("regnetx_002").eval()
    teacher = momentum_bn.MomentumTeacher(student, total_iters=10)
    assert len(teacher.fused) > 40
    teacher.update()
    x = torch.randn(2, 3, 64, 64)
    as_written = momentum_bn.MomentumTeacher(student, total_iters=10, fuse=False)
    assert as_written.fused == {}
    assert_close(teacher(x), as_written(x), rtol=1e-3, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_table_in_the_docs_tells_of_this_version(timm: Any) -> None:
    text = DOCS.read_text()
    assert f"timm {timm_models.TIMM_VERSION}" in text
    if timm.__version__ != timm_models.TIMM_VERSION:
        pytest.skip(f"the docs tell of timm {timm_models.TIMM_VERSION}, here is {timm.__version__}")
    rows = dict(re.findall(r"^\| (\w+) (\|.*\|) [^|]*\|$", text, re.MULTILINE))
    for name in ("resnet18", "mobilevit_s"):
        found = networks.table([networks.examine(name.partition("_")[0], name)]).splitlines()[-1]
        assert name in rows and f"| {name} {rows[name]}" in found
