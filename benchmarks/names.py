"""What timed calls and phases are called in tables, results and charts."""

from __future__ import annotations

FORWARD = "forward"
TRAINING = "forward + backward"

COPY = "copy_"
RELU = "relu_"
CLONE = "clone"

OURS = "ours"
OURS_RELU = "ours + relu"
OURS_INPLACE = "ours, in place"
OURS_INPLACE_RELU = "ours, in place + relu"
OURS_INPLACE_RESIDUAL_RELU = "ours, in place + residual + relu"
OURS_FRESH = "ours, fresh output"
OURS_BACKWARD_FRESH = "ours, backward alone, fresh dx"
OURS_BACKWARD_OVER_DY = "ours, backward alone, dx over dy"

TORCH = "torch BN"
TORCH_REUSED = "torch BN, reused output"
TORCH_NATIVE = "torch BN, without cuDNN"
TORCH_RELU = "torch BN + relu_"
TORCH_COMPILED = "torch.compile(torch BN)"
COMPOSITE = "ours, torch's operations"
PUBLISHED = "published"
PUBLISHED_COMPILED = "torch.compile(published)"
IDENTITY = "Identity"
