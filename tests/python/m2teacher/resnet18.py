"""ResNet-18 (arXiv 1512.03385, table 1) in plain torch, under the names that torchvision gives its modules."""

import torch
from torch import nn

_BLOCK = ["conv1", "bn1", "conv2", "bn2"]
# Of torchvision's resnet18().state_dict(), in its order: modules with a weight, without the classifier "fc".
MODULES = [
    "conv1",
    "bn1",
    *(f"layer1.0.{name}" for name in _BLOCK),
    *(f"layer1.1.{name}" for name in _BLOCK),
    *(f"layer2.0.{name}" for name in [*_BLOCK, "downsample.0", "downsample.1"]),
    *(f"layer2.1.{name}" for name in _BLOCK),
    *(f"layer3.0.{name}" for name in [*_BLOCK, "downsample.0", "downsample.1"]),
    *(f"layer3.1.{name}" for name in _BLOCK),
    *(f"layer4.0.{name}" for name in [*_BLOCK, "downsample.0", "downsample.1"]),
    *(f"layer4.1.{name}" for name in _BLOCK),
]
NORM_KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def _is_norm(module: str) -> bool:
    return module.split(".")[-1] in ("bn1", "bn2") or module.endswith("downsample.1")


STATE_DICT_NAMES = [f"{module}.{key}" for module in MODULES for key in (NORM_KEYS if _is_norm(module) else ["weight"])]


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet18(nn.Module):
    """Without the classifier: images (N, C, H, W) to features (N, 512)."""

    def __init__(self, channels: int, *, small_stem: bool) -> None:
        super().__init__()
        self.conv1 = (
            nn.Conv2d(channels, 64, 3, 1, 1, bias=False) if small_stem else nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        )
        self.bn1 = nn.BatchNorm2d(64)
        self.pool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))
