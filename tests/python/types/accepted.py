"""What `mypy --strict` takes: the code of users, whose own types are not lost."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from momentum_bn import (
    MomentumBatchNorm1d,
    MomentumBatchNorm2d,
    MomentumTeacher,
    convert_momentum_batchnorm,
    functional,
    plain_state_dict,
    revert_momentum_batchnorm,
    set_total_iters,
    show_config,
)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())

    def features(self, x: Tensor) -> Tensor:
        y: Tensor = self.backbone(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class OtherEncoder(Encoder):
    pass


student = Encoder()
teacher = MomentumTeacher(
    student, 10, param_momentum=0.996, momentum=None, views_per_update=4, schedule="constant", variance="biased",
    inplace=True, process_group=None,
)  # fmt: skip
assert_type(teacher, MomentumTeacher[Encoder])
assert_type(teacher.module, Encoder)
assert_type(teacher.module.features(torch.rand(2, 3, 8, 8)), Tensor)
assert_type(teacher.student, Encoder | None)
assert_type(MomentumTeacher(student, 10, teacher=OtherEncoder()).module.features(torch.rand(2, 3, 8, 8)), Tensor)
k: Tensor = teacher(torch.rand(2, 3, 8, 8))
teacher.update()
teacher.update(nn.Linear(2, 2))
teacher.total_iters = 20
teacher.param_momentum = 0.99
assert_type(teacher.total_iters, int)
assert_type(teacher.param_momentum, float)
teacher.reset()
assert_type(teacher.half(), MomentumTeacher[Encoder])


def train(with_teacher: MomentumTeacher[Encoder], of_anything: MomentumTeacher[nn.Module]) -> None:
    with_teacher.module.features(torch.rand(2, 3, 8, 8))
    of_anything.module(torch.rand(2, 3, 8, 8))


train(teacher, MomentumTeacher(nn.Linear(2, 2), 10))

assert_type(convert_momentum_batchnorm(Encoder(), total_iters=10), Encoder)
assert_type(convert_momentum_batchnorm(Encoder(), 10, activation="relu", momentum=0.5), Encoder)
assert_type(revert_momentum_batchnorm(student), Encoder)
assert_type(revert_momentum_batchnorm(MomentumBatchNorm1d(8)), MomentumBatchNorm1d)

layer = MomentumBatchNorm2d(
    8, 1e-3, None, total_iters=10, schedule="cosine", variance="published", activation=None, process_group="name"
)
y: Tensor = layer(torch.rand(2, 8, 4, 4), residual=None)
assert_type(layer.forward(input=torch.rand(2, 8, 4, 4)), Tensor)
layer.momentum = 0.5
assert_type(MomentumBatchNorm2d(8).momentum, float | None)
layer.cur_iter = 3
layer.schedule = "constant"
layer.activation = "relu"
set_total_iters(teacher, 100)
state: dict[str, Tensor] = plain_state_dict(teacher)
functional.momentum_batch_norm(k, None, None, variance="unbiased")
assert_type(show_config(), str)
