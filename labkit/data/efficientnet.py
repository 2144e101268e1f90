"""EfficientNet-lite0 in plain modules: Tan & Le 2019 (arXiv:1905.11946) without squeeze-and-excite, with ReLU6.

Only Conv2d, BatchNorm2d, ReLU6, ZeroPad2d and a Linear, so that counting, pruning and quantising see ordinary layers.
The weights were trained with TensorFlow's "same" padding, with an extra pixel right and below at stride 2. For even
sizes the padding is a fixed ZeroPad2d, so image sides must be multiples of 32.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class EfficientNetStage(NamedTuple):
    """A row of table 1 of the paper: blocks of a kernel size, of which the first changes the channels."""

    kernel: int
    stride: int
    expansion: int
    channels: int
    out: int
    repeats: int


STAGES = (
    EfficientNetStage(3, 1, 1, 32, 16, 1),
    EfficientNetStage(3, 2, 6, 16, 24, 2),
    EfficientNetStage(5, 2, 6, 24, 40, 2),
    EfficientNetStage(3, 2, 6, 40, 80, 3),
    EfficientNetStage(5, 1, 6, 80, 112, 3),
    EfficientNetStage(5, 2, 6, 112, 192, 4),
    EfficientNetStage(3, 1, 6, 192, 320, 1),
)


def conv(channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution and a batch norm; with stride 2, the padding of TensorFlow's "same" in front.

    channels, out: numbers of the convolution's channels.
    kernel, stride, groups: as for torch.nn.Conv2d.
    """
    norm = nn.BatchNorm2d(out, eps=1e-3)
    if stride == 2:
        before, after = (kernel - 2) // 2, (kernel - 1) // 2  # kernel - 2 pixels in all
        padding = nn.ZeroPad2d((before, after, before, after))
        return [padding, nn.Conv2d(channels, out, kernel, stride, groups=groups, bias=False), norm]
    return [nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=False), norm]


class InvertedResidual(nn.Module):
    """Inverted residual (Sandler et al. 2018): widen, filter each channel, narrow; add the input if shapes agree."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = nn.Sequential()
        if expansion > 1:
            self.expand = nn.Sequential(*conv(channels, wide), nn.ReLU6())
        self.depthwise = nn.Sequential(*conv(wide, wide, kernel, stride, groups=wide), nn.ReLU6())
        self.project = nn.Sequential(*conv(wide, out))
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:  # [N, channels, H, W]
        y = self.project(self.depthwise(self.expand(x)))  # [N, out, H/stride, W/stride]
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Network with logits [N, 1000] for normalised RGB images [N, 3, 224, 224]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, 32, 3, stride=2), nn.ReLU6())
        blocks = []
        for stage in STAGES:
            blocks.append(InvertedResidual(stage.channels, stage.out, stage.kernel, stage.stride, stage.expansion))
            for _ in range(stage.repeats - 1):
                blocks.append(InvertedResidual(stage.out, stage.out, stage.kernel, 1, stage.expansion))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*conv(320, 1280), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 224, 224]
        x = self.stem(x)  # [N, 32, 112, 112]
        x = self.head(self.blocks(x))  # [N, 1280, 7, 7]
        x = torch.flatten(self.pool(x), 1)  # [N, 1280]
        return self.fc(self.dropout(x))  # [N, 1000]


def load_reference_(model: EfficientNetLite0, weights: dict[str, Tensor]) -> None:
    """Fill `model` from the published weights by name: the names differ from ours, the order and the shapes agree."""
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
