"""torch.export, AOTInductor and ONNX."""

from __future__ import annotations

import copy
import io

import numpy
import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import momentum_bn
from inputs import randn


def network(**options):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), momentum_bn.MomentumBatchNorm2d(4, total_iters=6, **options),
        nn.Flatten(), nn.Linear(100, 5), momentum_bn.MomentumBatchNorm1d(5, total_iters=6, **options),
    )  # fmt: skip
    for step in range(3):  # a state that is not new, between two views
        net(images(4, step))
    return net


def images(batch, seed=0):
    return randn(batch, 3, 7, 7, seed=seed, dtype=torch.float32)


def exported(net, strict=False, dynamic=True):
    shapes = ({0: Dim("batch", min=2, max=512)},) if dynamic else None
    return export(net, (images(4),), strict=strict, dynamic_shapes=shapes)


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def assert_runs_as(module, net, batches=(4, 2, 9)):
    """Same outputs; in training, the same state after each."""
    for step, batch in enumerate(batches):
        x = images(batch, 10 + step)
        assert_close(module(x), net(x), rtol=1e-6, atol=1e-6)
        theirs = net.state_dict()
        for name, value in module.state_dict().items():
            assert_close(value, theirs[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"activation": "relu", "inplace": True}], ids=str)
def test_export(options, training, strict):
    """Any batch size, the schedule in the program's buffers; in evaluation torch's operators alone."""
    net = network(**options).train(training)
    program = exported(net, strict)
    ours = {name for name in operators(program) if "momentum_bn" in name}
    assert ours == ({"momentum_bn._forward_train.default"} if training else set())
    assert "aten.batch_norm.default" in operators(program) or training
    assert_runs_as(program.module(), copy.deepcopy(net))


def test_exported_under_no_grad_in_place():
    """The teacher's case: the operator that overwrites its input."""
    net = network(inplace=True)
    with torch.no_grad():
        program = exported(net)
        assert "momentum_bn._forward_train_.default" in operators(program)
        assert_runs_as(program.module(), copy.deepcopy(net))


def test_exported_without_tracking():
    net = nn.Sequential(momentum_bn.MomentumBatchNorm2d(3, track_running_stats=False)).eval()
    assert_runs_as(exported(net).module(), net)


def test_exported_program_is_saved_and_decomposed():
    net = network()
    file = io.BytesIO()
    torch.export.save(exported(net), file)
    file.seek(0)
    assert_runs_as(torch.export.load(file).module(), copy.deepcopy(net))
    assert_runs_as(exported(net).run_decompositions().module(), copy.deepcopy(net))
    evaluation = exported(net.eval()).run_decompositions()
    assert "aten._native_batch_norm_legit_no_training.default" in operators(evaluation)
    assert_runs_as(evaluation.module(), net)


def test_aot_inductor(tmp_path):
    """A training network, compiled, packaged, loaded and run without the Python module: the package's state moves."""
    net = nn.Sequential(nn.Linear(3, 4), momentum_bn.MomentumBatchNorm1d(4, total_iters=3)).requires_grad_(False)
    reference = copy.deepcopy(net)
    with torch.no_grad():
        program = export(net, (torch.rand(4, 3),), dynamic_shapes=({0: Dim("batch", min=2, max=512)},))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for step, batch in enumerate((4, 2, 9, 4, 5, 6, 7)):  # over the whole schedule, and past it
            x = randn(batch, 3, seed=step, dtype=torch.float32)
            assert_close(loaded(x), reference(x), rtol=1e-5, atol=1e-5)
    assert reference[1].momentum == 0.0 and net[1].cur_iter == 0


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("after_convolution", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_onnx(options, after_convolution, tmp_path):
    """An evaluation network in onnxruntime: BatchNormalization, or nothing where it folds into the convolution."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = network(**options)
    net = (net if after_convolution else net[1:2]).eval()
    x = images(4) if after_convolution else torch.rand(4, 4, 5, 5)
    path = tmp_path / "net.onnx"
    program = torch.onnx.export(
        net, (x,), dynamo=True, verbose=False, input_names=["x"],
        dynamic_shapes=({0: Dim("batch", min=2, max=512)},),
    )  # fmt: skip
    program.save(path)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert ("BatchNormalization" in kinds) == (not after_convolution)
    assert ("Relu" in kinds) == bool(options) and all(node.domain == "" for node in onnx.load(path).graph.node)
    session = onnxruntime.InferenceSession(path)
    for batch in (4, 7):
        x = torch.rand(batch, *x.shape[1:])
        (actual,) = session.run(None, {"x": x.numpy()})
        numpy.testing.assert_allclose(actual, net(x).detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_training_network_is_refused():
    """ONNX has no operator for it; torch names the one that is missing."""
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="_forward_train"):
        torch.onnx.export(network(), (images(4),), dynamo=True, verbose=False)


def test_evaluation_in_a_traced_graph_is_torchs():
    """What converters match: a graph of the evaluation holds torch's batch_norm alone."""
    graph = make_fx(network().eval())(images(4)).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert any("batch_norm" in target for target in targets)
    assert not any("momentum_bn" in target for target in targets)


def test_symbolic_trace_takes_the_layer_as_a_leaf():
    """torch.fx.symbolic_trace looks into every module that is not torch's own, and fails there."""

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, momentum_bn.MomentumBatchNorm) or super().is_leaf_module(m, name)

    net = network()
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(net)
    assert_runs_as(torch.fx.GraphModule(net, Tracer().trace(net)), copy.deepcopy(net))
