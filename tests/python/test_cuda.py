"""What only a GPU has: graphs, streams, several devices, asynchronous launches. The rest runs with `--device cuda`."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import momentum_bn
from inputs import randn, randomise_parameters
from ranks import run_ranks
from snapshots import assert_same, same_bits, snapshot

if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU here", allow_module_level=True)
several_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than two GPUs here")

SHAPE = (8, 24, 14, 14)
# Every kind of forward that has launches of its own.
KINDS = {
    "NCHW": {},
    "NHWC": {"channels_last": True},
    "bf16": {"dtype": torch.bfloat16},
    "double": {"dtype": torch.float64},
}


class Block(nn.Module):
    """Layers in a row, the last one with a residual and in place."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cuda") -> None:
        super().__init__()
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        options = {"total_iters": 1000, "device": device, "dtype": kept}
        self.first = momentum_bn.MomentumBatchNorm2d(SHAPE[1], activation="relu", **options)
        self.second = momentum_bn.MomentumBatchNorm2d(SHAPE[1], variance="biased", **options)
        self.third = momentum_bn.MomentumBatchNorm2d(SHAPE[1], activation="relu", inplace=True, **options)
        for layer in self.children():
            randomise_parameters(layer)
            layer.momentum = 0.75

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x)), x)


def images(
    seed: int, *, dtype: torch.dtype = torch.float32, channels_last: bool = False, device: str = "cuda"
) -> torch.Tensor:
    x = randn(*SHAPE, seed=seed, dtype=dtype, shift=seed % 3).to(device)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def step(net: nn.Module, views: list[torch.Tensor]) -> list[torch.Tensor]:
    """A training step of two views; gradients are left in the parameters."""
    outputs = [net(view) for view in views]
    sum(y.float().square().mean() for y in outputs).backward()
    return outputs


def check_equal(net: nn.Module, other: nn.Module) -> None:
    assert_same(snapshot(net), snapshot(other))


@contextmanager
def no_wait_for_the_device() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_are_built_for_this_gpu():
    """On a GPU the composite path would pass all other tests, too."""
    config = momentum_bn.show_config()
    assert "CUDA kernels: built for" in config, config
    assert torch._C._dispatch_has_kernel_for_dispatch_key("momentum_bn::_forward_train", "CUDA")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_results_are_those_of_the_cpu(kind):
    dtype = kind.get("dtype", torch.float32)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-6}[dtype]
    nets = [Block(dtype, device) for device in ("cuda", "cpu")]
    for seed in range(3):
        outputs = [step(net, [images(s, device=d, **kind) for s in (seed, seed + 10)])
                   for net, d in zip(nets, ("cuda", "cpu"), strict=True)]  # fmt: skip
        for ours, theirs in zip(*outputs, strict=True):
            assert ours.stride() == theirs.stride()
            assert_close(ours.cpu(), theirs, rtol=tolerance, atol=tolerance)
    for (name, ours), theirs in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        assert_close(ours.cpu(), theirs, rtol=max(tolerance, 1e-5), atol=max(tolerance, 1e-5), msg=name)
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert_close(ours.grad.cpu(), theirs.grad, rtol=20 * tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_values_than_fit_on_chip_against_float64(dtype, channels_last):
    """Every shape of the CPU's tests fits in a cluster's shared memory on a large device."""
    shape = (64, 64, 128, 128)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    ours, theirs = momentum_bn.BatchNorm2d(64).cuda(), nn.BatchNorm2d(64).cuda().double()
    x, dy = (
        torch.randn(shape, device="cuda").add(shift).to(dtype).contiguous(memory_format=memory_format)
        for shift in (3, 0)
    )
    exact = x.double().requires_grad_()
    x.requires_grad_()
    before = torch.ops.momentum_bn._cuda_path_counts()
    y = ours(x)
    y.backward(dy)
    after = torch.ops.momentum_bn._cuda_path_counts()
    assert [a - b for a, b in zip(after, before, strict=True)] == [0, 2]
    expected = theirs(exact)
    expected.backward(dy.double())
    tolerance = 2e-6 if dtype == torch.float32 else 2**-6
    assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert_close(x.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)
    assert_close(ours.weight.grad.double(), theirs.weight.grad, rtol=1e-3, atol=1e-2)
    assert_close(ours.running_var.double(), theirs.running_var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_step_in_a_graph_replayed_a_hundred_times_equals_eager(kind):
    net = Block(kind.get("dtype", torch.float32))
    views = [images(seed, **kind) for seed in (0, 1)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            net.zero_grad()
            step(net, views)
    torch.cuda.current_stream().wait_stream(side)
    net.zero_grad()
    eager = copy.deepcopy(net)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(net, views)
    assert_same(dict(net.named_buffers()), dict(eager.named_buffers()))
    for replay in range(100):
        fresh = [images(2 * replay + i, **kind) for i in (0, 1)]
        for view, values in zip(views, fresh, strict=True):
            view.copy_(values)
        graph.replay()
        eager.zero_grad()
        expected = step(eager, fresh)
        assert all(same_bits(y, e) for y, e in zip(outputs, expected, strict=True)), replay
    check_equal(net, eager)
    assert net.first.cur_iter == 103


def test_graphs_replayed_at_the_same_time():
    """Each captured call has counters of its own."""
    nets = [Block() for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in nets]
    x = images(0)
    graphs, outputs = [], []
    with torch.no_grad():
        for net in nets:
            net(x)
        eager = copy.deepcopy(nets[0])
        for net in nets:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs.append(net(x))
            graphs.append(graph)
        torch.cuda.synchronize()
        for _ in range(50):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for _ in range(50):
            expected = eager(x)
    for net, y in zip(nets, outputs, strict=True):
        assert same_bits(y, expected)
        check_equal(net, eager)


@pytest.mark.parametrize("own_threads", [False, True])
def test_streams_at_the_same_time(own_threads):
    nets = [Block() for _ in range(4)]
    eager = copy.deepcopy(nets[0])
    views = [images(seed) for seed in (0, 1)]
    torch.cuda.synchronize()

    def run(net: nn.Module) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                net.zero_grad()
                step(net, views)

    if own_threads:
        threads = [threading.Thread(target=run, args=(net,)) for net in nets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        for net in nets:
            run(net)
    torch.cuda.synchronize()
    for _ in range(20):
        eager.zero_grad()
        step(eager, views)
    for net in nets:
        check_equal(net, eager)


def test_more_streams_than_torch_has_in_its_pool():
    net = momentum_bn.MomentumBatchNorm1d(3, affine=False, track_running_stats=False, device="cuda")
    x = randn(64, 3, dtype=torch.float32).cuda()
    expected = net(x)
    for priority in (0, -1):
        for _ in range(64):
            with torch.cuda.stream(torch.cuda.Stream(priority=priority)):
                assert same_bits(net(x), expected)


def test_no_launch_waits_for_the_device():
    net = Block()
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).cuda()
    teacher = momentum_bn.MomentumTeacher(student, total_iters=100)
    views = [images(seed) for seed in (0, 1)]
    small = randn(4, 3, 9, 9, dtype=torch.float32).cuda()
    step(net, views), teacher.update(), teacher(small)
    with no_wait_for_the_device():
        step(net, views)
        net.first.momentum_cosine_decay()
        teacher.update()
        teacher(small)
        with torch.no_grad():
            net(views[0])
    assert net.first.cur_iter == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("param_momentum", [0.99, 0.3, 0.0])
def test_teacher_update_is_that_of_the_cpu(dtype, param_momentum):
    students, teachers = [], []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        student = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).to(device, dtype)
        teacher = momentum_bn.MomentumTeacher(student, total_iters=6, param_momentum=param_momentum)
        with torch.no_grad():
            for index, parameter in enumerate(student.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=index))
        students.append(student), teachers.append(teacher)
    for _ in range(8):
        for teacher in teachers:
            teacher.update()
        for (name, a), b in zip(teachers[0].state_dict().items(), teachers[1].state_dict().values(), strict=True):
            assert_close(b.cpu(), a, rtol=2**-7 if b.dtype == torch.bfloat16 else 1e-6, atol=1e-6, msg=name)


def test_compiled_with_graphs():
    pytest.importorskip("triton", reason="torch.compile for a GPU needs triton")
    net = Block()
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    for replay in range(8):
        views = [images(2 * replay + i) for i in (0, 1)]
        torch.compiler.cudagraph_mark_step_begin()
        net.zero_grad(), eager.zero_grad()
        outputs = [compiled(view).clone() for view in views]
        sum(y.square().mean() for y in outputs).backward()
        for y, expected in zip(outputs, step(eager, views), strict=True):
            assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert net.first.cur_iter == eager.first.cur_iter == 8
    for (name, ours), theirs in zip(net.state_dict().items(), eager.state_dict().values(), strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    net = nn.Sequential(nn.Conv2d(24, 24, 3), momentum_bn.MomentumBatchNorm2d(24), nn.ReLU()).cuda()
    with torch.autocast("cuda", dtype):
        y = net(images(0))
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in net.parameters())
    assert net[1].view_mean_sum.dtype == torch.float32 and net[1].momentum_state.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_deterministic_mode_has_the_same_bits(kind):
    nets = [Block(kind.get("dtype", torch.float32)) for _ in range(3)]
    views = [images(seed, **kind) for seed in (0, 1)]
    step(nets[0], views)
    torch.use_deterministic_algorithms(True)
    try:
        for net in nets[1:]:
            step(net, views)
    finally:
        torch.use_deterministic_algorithms(False)
    check_equal(nets[1], nets[0])
    check_equal(nets[2], nets[0])


@several_gpus
def test_tensors_on_a_device_that_is_not_the_current_one():
    nets = [Block(device="cuda:0"), Block(device="cuda:1")]
    assert torch.cuda.current_device() == 0
    outputs = [step(net, [images(s, device=f"cuda:{i}") for s in (0, 1)]) for i, net in enumerate(nets)]
    assert torch.cuda.current_device() == 0
    for a, b in zip(*outputs, strict=True):
        assert b.device.index == 1 and same_bits(a.cpu(), b.cpu())


@several_gpus
def test_a_thread_per_device():
    nets = [Block(device=f"cuda:{i}") for i in range(torch.cuda.device_count())]

    def run(index: int) -> None:
        for _ in range(20):
            step(nets[index], [images(s, device=f"cuda:{index}") for s in (0, 1)])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(nets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for net in nets[1:]:
        for a, b in zip(net.state_dict().values(), nets[0].state_dict().values(), strict=True):
            assert same_bits(a.cpu(), b.cpu())


def steps_in_a_group(shards: list[int]) -> dict[str, torch.Tensor]:
    rank = torch.distributed.get_rank()
    torch.cuda.set_device(rank)
    group = torch.distributed.new_group(backend="nccl")
    layer = momentum_bn.MomentumBatchNorm2d(
        SHAPE[1], total_iters=4, process_group=group, device="cuda", dtype=torch.float64
    )
    for seed in range(4):
        layer(images(seed, dtype=torch.float64).split(shards)[rank])
    return {name: buffer.cpu() for name, buffer in layer.named_buffers()}


@several_gpus
def test_nccl_group_equals_one_process():
    if not torch.distributed.is_nccl_available():
        pytest.skip("this build of torch has no NCCL")
    layer = momentum_bn.MomentumBatchNorm2d(SHAPE[1], total_iters=4, device="cuda", dtype=torch.float64)
    for seed in range(4):
        layer(images(seed, dtype=torch.float64))
    for state in run_ranks(2, steps_in_a_group, [5, 3], seconds=180.0):
        for name, buffer in state.items():
            assert_close(buffer, getattr(layer, name).cpu(), rtol=1e-10, atol=1e-10, msg=name)
