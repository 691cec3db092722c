"""A layer's life in any order: forwards, saves, loads, copies, casts, assignments, conversions, beside the oracle."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import momentum_bn
from inputs import LAYOUTS, TOLERANCE, as_layout, randn, randomise_parameters
from oracle import MomentumBatchNormOracle

# `STATE_EXAMPLES=2000` for a long run, of other lives each time. Without it they are the same ones every time.
EXAMPLES = int(os.environ.get("STATE_EXAMPLES", "30"))
OF_A_NIGHT = EXAMPLES >= 1000
STEPS = 50
CHANNELS = 3

PLAIN = ("running_mean", "running_var", "num_batches_tracked")
VALUES = ("running_mean", "running_var", "view_mean_sum", "view_var_sum")

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}
ASSIGNMENTS = st.one_of(
    st.tuples(st.just("total_iters"), st.integers(1, 30)),
    st.tuples(st.just("cur_iter"), st.integers(0, 40)),
    st.tuples(st.just("momentum"), st.sampled_from([None, 0.0, 0.25, 1.0])),
)
CASTS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def step(**arguments: st.SearchStrategy) -> Callable[[Callable[..., None]], Any]:
    """A rule that begins with some training forwards: Hypothesis leaves most of the rules out of each life."""

    def as_rule(function: Callable[..., None]) -> Any:
        def run(life: Life, seeds: list[int], **drawn: Any) -> None:
            life.some_views(seeds)
            function(life, **drawn)

        run.__name__ = function.__name__
        return rule(seeds=st.lists(st.integers(0, 99), max_size=2), **arguments)(run)

    return as_rule


class Life(RuleBasedStateMachine):
    """What a user may do with a layer, and what the definition says that it then is."""

    layer: momentum_bn.MomentumBatchNorm2d
    oracle: MomentumBatchNormOracle
    parameters: dict[str, Tensor]
    saved: list[tuple[dict[str, Tensor], MomentumBatchNormOracle]]

    @initialize(
        momentum=st.sampled_from([1.0, 0.3, None]),
        total_iters=st.sampled_from([1, 3, 20]),
        views=st.integers(1, 3),
        schedule=st.sampled_from(["cosine", "constant"]),
        variance=st.sampled_from(["published", "unbiased", "biased"]),
        activation=st.sampled_from([None, "relu"]),
        dtype=st.sampled_from(CASTS),
    )
    def begin(
        self,
        momentum: float | None,
        total_iters: int,
        views: int,
        schedule: str,
        variance: str,
        activation: str | None,
        dtype: torch.dtype,
    ) -> None:
        options = {
            "momentum": momentum,
            "total_iters": total_iters,
            "views_per_update": views,
            "schedule": schedule,
            "variance": variance,
            "activation": activation,
        }
        self.layer = momentum_bn.MomentumBatchNorm2d(CHANNELS, dtype=dtype, **options)
        self.oracle = MomentumBatchNormOracle(CHANNELS, **options)
        self.first_momentum = momentum
        self._assign_tensors(0)
        self.saved = [(self._state(), copy.deepcopy(self.oracle))]

    @invariant()
    def is_what_the_oracle_is(self) -> None:
        """Then takes over what was rounded, so that the next step is compared by itself."""
        if not hasattr(self, "layer"):
            return
        tolerance = 2 * TOLERANCE[self.layer.running_mean.dtype]
        for name in VALUES:
            ours, theirs = getattr(self.layer, name).double(), getattr(self.oracle, name)
            torch.testing.assert_close(
                ours, theirs, rtol=tolerance, atol=4 * tolerance, msg=lambda t, n=name: f"{n}: {t}"
            )
        counters = ("num_batches_tracked", "view_count", "cur_iter")
        assert {name: int(getattr(self.layer, name)) for name in counters} == {
            name: getattr(self.oracle, name) for name in counters
        }
        ours, theirs = self.layer.momentum, self.oracle.momentum
        assert ours == theirs or abs(ours - theirs) < 1e-15
        assert self.layer.total_iters == self.oracle.total_iters
        for name, value in self.parameters.items():
            assert torch.equal(getattr(self.layer, name).detach(), value), name
        self.oracle.read_state(self.layer)

    @step(
        training=st.booleans(), grad=st.booleans(), residual=st.booleans(), batch=st.integers(0, 3),
        layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 99),
    )  # fmt: skip
    def forward(self, training: bool, grad: bool, residual: bool, batch: int, layout: str, seed: int) -> None:
        self.layer.train(training)
        self._forward(grad, residual, batch, layout, seed)

    def some_views(self, seeds: list[int]) -> None:
        self.layer.train()
        for seed in seeds:
            self._forward(False, False, 2, "contiguous", seed)
            self.is_what_the_oracle_is()

    def _forward(self, grad: bool, residual: bool, batch: int, layout: str, seed: int) -> None:
        dtype, training = self.layer.running_mean.dtype, self.layer.training
        values = randn(batch, CHANNELS, 2, 3, seed=seed, dtype=dtype, scale=2, shift=seed % 3)
        x = as_layout(values, layout) if batch else values
        added = randn(*x.shape, seed=seed + 1, dtype=dtype) if residual else None
        before = x.clone()
        run = self.oracle.train_forward if training else self.oracle.eval_forward
        expected = run(before, self.parameters["weight"], self.parameters["bias"], added)
        with torch.set_grad_enabled(grad):
            y = self.layer(x, added)
        if grad:
            y.sum().backward()
        assert torch.equal(x, before), "the input was written to"
        assert y.requires_grad == grad and y.dtype == dtype and y.shape == x.shape
        if batch:
            tolerance = 16 * TOLERANCE[dtype] * (1 if training else 4)
            torch.testing.assert_close(y.detach().double(), expected, rtol=tolerance, atol=tolerance)

    @step()
    def save(self) -> None:
        self.saved.append((self._state(), copy.deepcopy(self.oracle)))

    def _state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.layer.state_dict().items()}

    @step(which=st.integers(0, 99), plain=st.booleans(), assign=st.booleans())
    def load(self, which: int, plain: bool, assign: bool) -> None:
        """All of it, or what torch's BatchNorm has of it."""
        state, then = self.saved[which % len(self.saved)]
        names = (*PLAIN, "weight", "bias") if plain else state
        self.layer.load_state_dict({name: state[name].clone() for name in names}, strict=True, assign=assign)
        # With `assign` the layer takes over the dtype, too.
        dtype = (state["running_mean"] if assign else self.layer.running_mean).dtype
        self.parameters = {name: state[name].to(dtype) for name in self.parameters}
        for name in PLAIN[:2]:
            setattr(self.oracle, name, state[name].to(dtype).double())
        self.oracle.num_batches_tracked = then.num_batches_tracked
        if plain:
            self.oracle.forget_views()
            return
        for name in ("view_mean_sum", "view_var_sum", "view_count", "cur_iter", "momentum"):
            setattr(self.oracle, name, getattr(then, name))

    @step(way=st.sampled_from(sorted(COPIES)))
    def go_on_with_a_copy(self, way: str) -> None:
        original = self.layer
        self.layer = COPIES[way](original)
        original(randn(4, CHANNELS, 2, 2, dtype=original.running_mean.dtype))  # shares nothing with the copy

    @step(dtype=st.sampled_from(CASTS))
    def cast(self, dtype: torch.dtype) -> None:
        self.layer.to(dtype)
        for name in ("running_mean", "running_var"):
            setattr(self.oracle, name, getattr(self.oracle, name).to(dtype).double())
        self.parameters = {name: value.to(dtype) for name, value in self.parameters.items()}
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        assert self.layer.view_mean_sum.dtype == self.layer.view_var_sum.dtype == sums
        assert self.layer.momentum_state.dtype == torch.float64

    @step(assignment=ASSIGNMENTS)
    def assign(self, assignment: tuple[str, float | None]) -> None:
        setattr(self.layer, *assignment)
        setattr(self.oracle, *assignment)

    @step(seed=st.integers(0, 99))
    def assign_tensors(self, seed: int) -> None:
        self._assign_tensors(seed)

    def _assign_tensors(self, seed: int) -> None:
        """Other values of the parameters, other tensors for the running statistics."""
        randomise_parameters(self.layer, seed)
        self.parameters = {name: value.detach().clone() for name, value in self.layer.named_parameters()}
        dtype = self.layer.running_mean.dtype
        self.layer.running_mean = randn(CHANNELS, seed=seed, dtype=dtype)
        self.layer.running_var = randn(CHANNELS, seed=seed, dtype=dtype).abs() + 1
        self.oracle.running_mean = self.layer.running_mean.double()
        self.oracle.running_var = self.layer.running_var.double()

    @step()
    def decay(self) -> None:
        self.layer.momentum_cosine_decay()
        self.oracle.momentum_cosine_decay()

    @step()
    def reset(self) -> None:
        self.layer.reset_running_stats()
        self.oracle = dataclasses.replace(
            self.oracle, momentum=self.first_momentum, cur_iter=0, view_count=0, num_batches_tracked=0
        )

    @step(bad=st.sampled_from(["rank", "channels", "dtype", "one value", "residual"]))
    def be_called_wrongly(self, bad: str) -> None:
        """An error changes no state, which the invariant then sees."""
        dtype = self.layer.running_mean.dtype
        x = torch.rand(2, CHANNELS, 2, 2, dtype=dtype)
        calls = {
            "rank": lambda: self.layer(x[0]),
            "channels": lambda: self.layer(x[:, 1:]),
            "dtype": lambda: self.layer(x.long()),
            "one value": lambda: self.layer(x[:1, :, :1, :1]),
            "residual": lambda: self.layer(x, x[:1]),
        }
        self.layer.train()
        try:
            calls[bad]()
        except (ValueError, TypeError):
            return
        raise AssertionError(f"not refused: {bad}")

    @step(total_iters=st.integers(1, 30))
    def convert_again(self, total_iters: int) -> None:
        assert momentum_bn.convert_momentum_batchnorm(self.layer, total_iters) is self.layer
        self.oracle.total_iters = total_iters

    @precondition(lambda self: self.layer.activation is None)
    @step(total_iters=st.integers(1, 30))
    def become_torchs_and_come_back(self, total_iters: int) -> None:
        parameters = list(self.layer.parameters())
        options = {name: getattr(self.layer, name) for name in ("views_per_update", "schedule", "variance")}
        options["momentum"] = self.first_momentum
        plain = momentum_bn.revert_momentum_batchnorm(nn.Sequential(self.layer))
        assert type(plain[0]) is nn.BatchNorm2d
        self.layer = momentum_bn.convert_momentum_batchnorm(plain, total_iters, **options)[0]
        assert all(a is b for a, b in zip(parameters, self.layer.parameters(), strict=True))
        self.oracle.forget_views()
        self.oracle.total_iters, self.oracle.cur_iter, self.oracle.momentum = total_iters, 0, self.first_momentum

    @step(grouped=st.booleans())
    def join_or_leave_a_group_of_one(self, grouped: bool) -> None:
        self.layer.process_group = dist.group.WORLD if grouped else None


def test_a_layer_is_what_the_definition_says_whatever_was_done_with_it() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    chosen = settings(
        max_examples=EXAMPLES,
        stateful_step_count=STEPS,
        derandomize=not OF_A_NIGHT,
        database=None,
        deadline=None,
        phases=(Phase.generate,) if OF_A_NIGHT else tuple(Phase),
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(Life, settings=chosen)
    finally:
        dist.destroy_process_group()
