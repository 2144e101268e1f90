"""ResNet-20 for small grey images, top to bottom: He et al. 2016, "Deep Residual Learning", section 4.2 (n = 3).

Stages of 16, 32 and 64 channels, three blocks each. Where the shape changes the shortcut is a 1x1 convolution, the
paper's option B. No other depths, widths or heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:  # [N, channels, H, W]
        y = F.relu(self.bn1(self.conv1(x)))  # [N, out, H/stride, W/stride]
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet20(nn.Module):
    """Logits [N, 10] for images [N, 1, H, W]; 272,186 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.stage1 = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 16, 1), BasicBlock(16, 16, 1))
        self.stage2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        self.stage3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.fc = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, 28, 28]
        x = F.relu(self.bn(self.conv(x)))  # [N, 16, 28, 28]
        x = self.stage3(self.stage2(self.stage1(x)))  # [N, 64, 7, 7]
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)  # [N, 64]
        return self.fc(x)  # [N, 10]
