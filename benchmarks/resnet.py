"""ResNet-50 (He et al., https://arxiv.org/abs/1512.03385; stride in the 3x3 convolution) with a pluggable norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

# Makes what follows a convolution: (channels, relu) -> a module called as norm(x) or norm(x, residual), which adds the
# residual after the normalisation and before the ReLU, and may overwrite x.
NormFactory = Callable[[int, bool], nn.Module]

_EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: (N, C, H, W) -> (N, 4 width, H / stride, W / stride)."""

    def __init__(self, channels_in: int, width: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        channels_out = _EXPANSION * width
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.norm1 = norm(width, True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = norm(width, True)
        self.conv3 = nn.Conv2d(width, channels_out, 1, bias=False)
        self.norm3 = norm(channels_out, True)
        self.projects = stride != 1 or channels_in != channels_out
        if self.projects:
            self.projection = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.projection_norm = norm(channels_out, False)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.projection_norm(self.projection(x)) if self.projects else x
        y = self.norm1(self.conv1(x))
        y = self.norm2(self.conv2(y))
        return self.norm3(self.conv3(y), shortcut)


class ResNet(nn.Module):
    """(N, 3, H, W) -> (N, classes). The defaults are ResNet-50."""

    def __init__(
        self, norm: NormFactory, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, classes: int = 1000
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.norm = norm(width, True)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        layers: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(channels, width << stage, stride, norm))
                channels = _EXPANSION * (width << stage)
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.pool(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


def share_weights(models: Iterable[ResNet]) -> None:
    """Gives all networks the convolutions and the head of the first one."""
    first, *others = ([m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)] for model in models)
    for other in others:
        for source, target in zip(first, other, strict=True):
            target.weight, target.bias = source.weight, source.bias
