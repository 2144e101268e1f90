"""Random convolutional networks as programs of small steps, for the property test of structured pruning."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

# (kind, a, b): what a step does with the width c that it meets; a and b choose sizes.
KINDS = (
    "conv",
    "grouped",
    "depthwise",
    "residual",
    "bottleneck",
    "dense",
    "branches",
    "shuffle",
    "chunk",
    "split",
    "excite",
    "group_norm",
    "layer_norm",
    "twice",
    "transposed",
    "scale",
    "pool",
)


def programs():
    """(width of the stem, steps, "flatten" or "pool")"""
    steps = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=6)
    return st.tuples(st.sampled_from([4, 6, 8, 12]), steps, st.sampled_from(["flatten", "pool"]))


class Step(nn.Module):
    def __init__(self, kind: str, c: int, a: int, b: int):
        super().__init__()
        self.kind, self.groups, out = kind, 2 if c % 2 == 0 else 1, 2 * a + b
        self.width = c
        self.act = (F.relu, torch.tanh, F.silu, F.leaky_relu)[b]
        if kind == "conv":
            self.conv, self.norm, self.width = nn.Conv2d(c, out, 3, padding=1), nn.BatchNorm2d(out), out
        elif kind == "grouped":
            self.conv, self.width = nn.Conv2d(c, self.groups * a, 3, padding=1, groups=self.groups), self.groups * a
        elif kind == "depthwise":
            self.conv = nn.Conv2d(c, c, 3, padding=1, groups=c, bias=b > 1)
        elif kind == "residual":
            self.conv, self.norm = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
        elif kind == "bottleneck":
            self.down, self.up = nn.Conv2d(c, out, 1), nn.Conv2d(out, c, 1, bias=False)
        elif kind == "dense":
            self.conv, self.norm, self.width = nn.Conv2d(c, out, 1), nn.BatchNorm2d(c + out), c + out
        elif kind == "branches":
            self.one, self.two, self.width = nn.Conv2d(c, a, 1), nn.Conv2d(c, out, 3, padding=1), a + out
        elif kind == "chunk" and c % 2 == 0:
            self.conv = nn.Conv2d(c // 2, c // 2, 1)
        elif kind == "split" and c > 2:
            self.conv = nn.Conv2d(c - c // 2, c - c // 2, 1)
        elif kind == "excite":
            self.down, self.up = nn.Linear(c, a + 1), nn.Linear(a + 1, c)
        elif kind == "group_norm":
            self.norm = nn.GroupNorm(self.groups, c)
        elif kind == "layer_norm":
            self.norm = nn.LayerNorm(c)
        elif kind == "twice":
            self.conv = nn.Conv2d(c, c, 1)
        elif kind == "transposed":
            self.conv, self.width = nn.ConvTranspose2d(c, out, 3, padding=1), out
        elif kind == "scale":
            self.gamma = nn.Parameter(torch.randn(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        match self.kind:
            case "conv":
                return self.act(self.norm(self.conv(x)))
            case "grouped" | "depthwise" | "transposed":
                return self.act(self.conv(x))
            case "residual":
                return F.relu(self.norm(self.conv(x)) + x, inplace=True)
            case "bottleneck":
                return x + self.up(self.act(self.down(x)))
            case "dense":
                return self.norm(torch.cat([x, self.act(self.conv(x))], 1))
            case "branches":
                return torch.cat([self.two(x), self.act(self.one(x))], 1)
            case "shuffle":
                return x.view(n, self.groups, -1, h, w).transpose(1, 2).reshape(n, c, h, w)
            case "chunk" if hasattr(self, "conv"):
                left, right = x.chunk(2, 1)
                return torch.cat([self.conv(right), left], 1)
            case "split" if hasattr(self, "conv"):
                left, right = x.split([c // 2, c - c // 2], 1)
                return torch.cat([left, self.act(self.conv(right))], 1)
            case "excite":
                return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]
            case "group_norm":
                return self.norm(x)
            case "layer_norm":
                return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            case "twice":
                return self.conv(self.act(self.conv(x)))
            case "scale":
                return x.mul_(self.gamma) if self.act is torch.tanh else x * self.gamma
            case "pool" if h > 2:
                return F.max_pool2d(x, 2) if self.act is F.relu else F.avg_pool2d(x, 2)
        return x


class Network(nn.Module):
    def __init__(self, program):
        super().__init__()
        torch.manual_seed(0)
        width, steps, self.end = program
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        size, self.steps = 8, nn.ModuleList()
        for kind, a, b in steps:
            self.steps.append(Step(kind, width, a, b))
            width = self.steps[-1].width
            size //= 2 if kind == "pool" and size > 2 else 1
        self.hidden = nn.Linear(width * (size * size if self.end == "flatten" else 1), 6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 8, 8]
        x = F.relu(self.stem(x))
        for step in self.steps:
            x = step(x)
        x = x.flatten(1) if self.end == "flatten" else x.mean((2, 3))
        return self.fc(F.relu(self.hidden(x)))
