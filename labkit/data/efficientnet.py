"""EfficientNet-lite0 in plain modules: Tan & Le 2019 (arXiv:1905.11946) without squeeze-and-excite, with ReLU6.

Only Conv2d, BatchNorm2d, ReLU6, ZeroPad2d and one Linear, so that counting, pruning and quantising see ordinary
layers. The weights were trained with TensorFlow's "same" padding, which pads one more pixel right and below at stride
2. For even sizes that is a fixed ZeroPad2d, so image sides must be multiples of 32. No other members of the family.
"""

import torch
from torch import Tensor, nn

# (kernel, stride, expansion, channels in, channels out, repeats), table 1 of the paper
STAGES = (
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)


def conv(channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution and batch norm; with stride 2, the padding of TensorFlow's "same" in front."""
    if stride == 2:
        pad = ((kernel - 2) // 2, (kernel - 1) // 2) * 2  # left, right, top, bottom: kernel - 2 pixels in all
        layers = [nn.ZeroPad2d(pad), nn.Conv2d(channels, out, kernel, 2, groups=groups, bias=False)]
    else:
        layers = [nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=False)]
    return [*layers, nn.BatchNorm2d(out, eps=1e-3)]


class InvertedResidual(nn.Module):
    """Inverted residual (Sandler et al. 2018): widen, filter each channel, narrow; add the input if shapes agree."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = nn.Sequential(*conv(channels, wide), nn.ReLU6()) if expansion > 1 else nn.Sequential()
        self.depthwise = nn.Sequential(*conv(wide, wide, kernel, stride, groups=wide), nn.ReLU6())
        self.project = nn.Sequential(*conv(wide, out))
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:  # [N, channels, H, W]
        y = self.project(self.depthwise(self.expand(x)))  # [N, out, H/stride, W/stride]
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Logits [N, 1000] for normalised RGB images [N, 3, 224, 224]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv(3, 32, 3, stride=2), nn.ReLU6())
        blocks = []
        for kernel, stride, expansion, channels, out, repeats in STAGES:
            blocks.append(InvertedResidual(channels, out, kernel, stride, expansion))
            blocks += [InvertedResidual(out, out, kernel, 1, expansion) for _ in range(repeats - 1)]
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
    """Fill `model` from the published weights, whose names differ and whose order and shapes are the same."""
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
