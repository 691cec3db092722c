"""What `mypy --strict` refuses: each line that ends with `# refused:` and the kind of its error, and no other."""

from __future__ import annotations

from torch import nn

from momentum_bn import (
    MomentumBatchNorm2d,
    MomentumTeacher,
    convert_momentum_batchnorm,
    functional,
    revert_momentum_batchnorm,
)


class Encoder(nn.Module):
    pass


class Decoder(nn.Module):
    pass


MomentumTeacher(Encoder(), 10, inplcae=True)  # refused: call-arg
MomentumTeacher(Encoder(), 10, views_per_update="two")  # refused: arg-type
MomentumTeacher(Encoder(), 10, variance="biassed")  # refused: arg-type
MomentumTeacher(Encoder(), 10, activation="relu")  # refused: call-arg
MomentumTeacher(Encoder())  # refused: call-arg
MomentumTeacher(Encoder(), 10, teacher="resnet")  # refused: arg-type
MomentumTeacher(Encoder(), 10).update(10)  # refused: arg-type
MomentumTeacher(Encoder(), 10).total_iters = "ten"  # refused: assignment
decoder_teacher: MomentumTeacher[Decoder] = MomentumTeacher(Encoder(), 10)  # refused: arg-type

convert_momentum_batchnorm(Encoder())  # refused: call-arg
convert_momentum_batchnorm(Encoder(), 10, schedule="cosin")  # refused: arg-type
convert_momentum_batchnorm(Encoder(), 10, view_per_update=1)  # refused: call-arg
converted: Decoder = convert_momentum_batchnorm(Encoder(), 10)  # refused: assignment
reverted: Decoder = revert_momentum_batchnorm(Encoder())  # refused: assignment

layer = MomentumBatchNorm2d(8, schedule="cosin")  # refused: arg-type
MomentumBatchNorm2d(8, variance="foo")  # refused: arg-type
MomentumBatchNorm2d(8, activation="gelu")  # refused: arg-type
MomentumBatchNorm2d(8, process_group=3)  # refused: arg-type
layer.schedule = "linear"  # refused: assignment
layer.momentum = "half"  # refused: assignment
layer.forward("image")  # refused: arg-type
functional.momentum_batch_norm(layer.weight, None, None, variance="foo")  # refused: arg-type
