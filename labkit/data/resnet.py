"""ResNets of 6n + 2 layers for small grey images, top to bottom: He et al. 2016, "Deep Residual Learning", section 4.2.

Three stages of n blocks each; a stage has twice the channels of the one before. At a change of shape the shortcut
is a 1x1 convolution, the paper's option B. ResNet-20 is the course's CNN, ResNet-8 the student in distillation, and
ResNet-8 of twice the width a teacher of middle size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1:
            projection = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:  # [N, channels, H, W]
        y = F.relu(self.bn1(self.conv1(x)))  # [N, out, H/stride, W/stride]
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class _ResNet(nn.Module):
    """Three stages of `blocks` blocks; the first has `channels` channels."""

    def __init__(self, blocks: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.stage1 = _stage(blocks, channels, channels, 1)
        self.stage2 = _stage(blocks, channels, 2 * channels, 2)
        self.stage3 = _stage(blocks, 2 * channels, 4 * channels, 2)
        self.fc = nn.Linear(4 * channels, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, 28, 28]
        x = F.relu(self.bn(self.conv(x)))  # [N, C, 28, 28]
        x = self.stage3(self.stage2(self.stage1(x)))  # [N, 4C, 7, 7]
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)  # [N, 4C]
        return self.fc(x)  # [N, 10]


def _stage(blocks: int, channels: int, out: int, stride: int) -> nn.Sequential:
    first = BasicBlock(channels, out, stride)
    rest = [BasicBlock(out, out, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


class ResNet20(_ResNet):
    """Logits [N, 10] of images [N, 1, H, W]; n = 3, stages of 16, 32 and 64 channels; 272,186 parameters."""

    def __init__(self) -> None:
        super().__init__(blocks=3, channels=16)


class ResNet8(_ResNet):
    """Logits [N, 10] of images [N, 1, H, W]; n = 1, stages of 8, 16 and 32 channels; 19,810 parameters."""

    def __init__(self) -> None:
        super().__init__(blocks=1, channels=8)


class WideResNet8(_ResNet):
    """ResNet8 with twice the channels, stages of 16, 32 and 64: a teacher of middle size; 77,754 parameters."""

    def __init__(self) -> None:
        super().__init__(blocks=1, channels=16)
