"""Random networks as programs of small steps, on images and on tokens, for the property tests of structured pruning."""

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

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


TOKENS = 5
CHOOSING = ("weight_norm", "old_weight_norm", "standardised", "computed", "twins", "state", "gru")  # their width
TOKEN_KINDS = (
    *CHOOSING,
    *("mlp", "gated", "spectral_norm", "mixing", "mixing_convolution", "local", "packed", "multihead", "tied"),
    *("shared", "layer_norm", "rms_norm", "heads", "halves"),
)


def token_programs():
    """(width of the stem, steps)"""
    steps = st.lists(st.tuples(st.sampled_from(TOKEN_KINDS), st.integers(1, 4), st.integers(0, 3)), max_size=5)
    return st.tuples(st.sampled_from([4, 6, 8, 12]), steps)


class TokenStep(nn.Module):
    """[N, TOKENS, c] -> [N, TOKENS, width]"""

    def __init__(self, kind: str, c: int, a: int, b: int):
        super().__init__()
        self.kind, self.act = kind, (F.relu, torch.tanh, F.silu, F.gelu)[b]
        out, self.size = 2 * a + b, a + 1  # size: of a head
        self.width = out if kind in CHOOSING else c
        if kind in ("mlp", "gated"):
            self.up, self.down = nn.Linear(c, out * (1 + (kind == "gated"))), nn.Linear(out, c)
        elif kind == "weight_norm":
            self.layer = parametrizations.weight_norm(nn.Linear(c, out), dim=b % 2)
        elif kind == "old_weight_norm":
            self.layer = weight_norm(nn.Linear(c, out), dim=b % 2)
        elif kind == "spectral_norm":
            self.layer = parametrizations.spectral_norm(nn.Linear(c, c))
        elif kind in ("standardised", "twins"):
            self.layer, self.other = nn.Linear(c, out), nn.Linear(c, out)
            if kind == "twins":
                self.other.weight = self.layer.weight
        elif kind == "computed":
            self.code, self.maker = nn.Parameter(torch.randn(3)), nn.Linear(3, c * out)
        elif kind == "mixing":
            self.layer = nn.Linear(TOKENS, TOKENS)
        elif kind == "mixing_convolution":
            self.layer = nn.Conv1d(TOKENS, TOKENS, 1)
        elif kind == "local":
            self.layer = nn.Conv1d(c, c, 3, padding=1, groups=c)
        elif kind in ("packed", "heads"):
            heads = a * self.size
            self.makes, self.reads = nn.Linear(c, 3 * heads), nn.Linear(heads, c)
            self.weight, self.back = nn.Parameter(torch.randn(c, a, 3)), nn.Parameter(torch.randn(a, 3, c))
        elif kind == "multihead":
            self.layer = nn.MultiheadAttention(c, 2, batch_first=True)
        elif kind in ("tied", "shared"):
            self.layer = nn.Linear(c, out if kind == "tied" else c)
        elif kind == "state":
            self.into, self.hidden = nn.Linear(c, out), nn.Linear(out, out)
        elif kind == "gru":
            self.layer = nn.GRU(c, out, batch_first=True)
        elif kind == "layer_norm":
            self.layer = nn.LayerNorm(c)
        elif kind == "rms_norm":
            self.gain = nn.Parameter(torch.randn(c))
        elif kind == "halves":
            self.splits, self.layer = [c // 2, c - c // 2], nn.Linear(c - c // 2, c - c // 2)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, c = x.shape
        match self.kind:
            case "mlp":
                return x + self.down(self.act(self.up(x)))
            case "gated":
                gate, y = self.up(x).chunk(2, -1)
                return x + self.down(self.act(gate) * y)
            case "weight_norm" | "old_weight_norm" | "spectral_norm":
                return self.act(self.layer(x))
            case "standardised":
                weight = self.layer.weight
                deviation = weight - weight.mean(1, keepdim=True)
                return self.act(
                    F.linear(x, deviation / (weight.std(1, correction=0, keepdim=True) + 1), self.layer.bias)
                )
            case "computed":
                return self.act(F.linear(x, self.maker(self.code).view(-1, c)))
            case "mixing":
                return x + self.act(self.layer(x.mT).mT)
            case "mixing_convolution":
                return x + self.act(self.layer(x))
            case "local":
                return self.act(self.layer(x.mT).mT)
            case "packed":
                q, k, v = self.makes(x).view(n, tokens, 3, -1, self.size).permute(2, 0, 3, 1, 4)
                y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
                return x + self.reads(y.flatten(2))
            case "heads":
                y = self.act(torch.einsum("ntc,chk->nthk", x, self.weight))
                return x + torch.einsum("nthk,hkc->ntc", y, self.back)
            case "multihead":
                return x + self.layer(x, x, x, need_weights=False)[0]
            case "tied":
                return x + F.linear(self.act(self.layer(x)), self.layer.weight.t())
            case "shared":
                return self.layer(self.act(self.layer(x)))
            case "twins":
                return self.act(self.layer(x)) * self.other(x)
            case "state":
                h, states = torch.zeros(n, self.hidden.in_features, dtype=x.dtype), []
                for t in range(tokens):
                    h = torch.tanh(self.into(x[:, t]) + self.hidden(h))
                    states.append(h)
                return torch.stack(states, 1)
            case "gru":
                return self.layer(x)[0]
            case "layer_norm":
                return self.layer(x)
            case "rms_norm":
                return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.gain
            case "halves":
                left, right = x.split(self.splits, -1)
                return torch.cat([left, self.act(self.layer(right))], -1)
        raise AssertionError(self.kind)


class TokenNetwork(nn.Module):
    def __init__(self, program):
        super().__init__()
        torch.manual_seed(0)
        width, steps = program
        self.stem, self.steps = nn.Linear(6, width), nn.ModuleList()
        for kind, a, b in steps:
            self.steps.append(TokenStep(kind, width, a, b))
            width = self.steps[-1].width
        self.hidden, self.out = nn.Linear(width, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:  # [N, TOKENS, 6]
        x = self.stem(x)
        for step in self.steps:
            x = step(x)
        return self.out(torch.tanh(self.hidden(x.mean(1))))


HABITS = ("counts", "table", "fused", "features", "last", "twice", "root", "branches")


class Stateful(Network):
    """A random network whose forward pass writes things down; with "root" and "branches" it is hard to prune.

    table: a cache that is made on the first call (rotary angles). fused: one that is made of weights. twice: a module
    that is registered under two names. root: scales by the root of a width, which no cut keeps.
    """

    def __init__(self, program, habits):
        super().__init__(program)
        self.habits, self.calls, self.table, self.cache, self.features, self.last = set(habits), 0, None, {}, [], None
        self.register_buffer("seen", torch.zeros(2))
        self.inner = nn.Linear(6, 6)
        if "twice" in habits:
            self.again, self.chain = self.inner, nn.ModuleList([self.inner] * 3)

    def forward(self, x: Tensor) -> Tensor:
        if "counts" in self.habits:
            self.calls += 1
            self.seen.add_(1)
        if "table" in self.habits:
            if self.table is None:
                self.table = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device).cos()
            x = x + self.table
        if "fused" in self.habits and "gain" not in self.cache:
            self.cache["gain"] = self.stem.weight.sum((0, 2, 3)).detach() * 2
        if "fused" in self.habits:
            x = x * self.cache["gain"][:, None, None]
        y = F.relu(self.stem(x))
        for step in self.steps:
            y = step(y)
        if "root" in self.habits:
            y = y * y.shape[1] ** -0.5
        if "features" in self.habits:
            self.features.append(y)
        if "branches" in self.habits and float(y.detach().sum()) < -1e9:
            y = -y
        y = F.relu(self.hidden(y.flatten(1) if self.end == "flatten" else y.mean((2, 3))))
        if "twice" in self.habits:
            for layer in (self.inner, self.again, *self.chain):
                y = F.relu(layer(y)) + y
        if "last" in self.habits:
            self.last = y
        return self.fc(y)


def digest(model: nn.Module) -> dict[str, Any]:
    """All that a model is and holds, by module name: identities, modes, attributes, and tensors with their values."""

    def state(value: Any) -> Any:
        if isinstance(value, Tensor):
            here = "meta" if value.device.type == "meta" else value.detach().flatten().tolist()
            return id(value), str(value.device), value.dtype, tuple(value.shape), value.requires_grad, here
        if isinstance(value, dict):
            return {key: state(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [state(item) for item in value]
        return value if isinstance(value, (int, float, str, set, type(None))) else id(value)

    modules = model.named_modules(remove_duplicate=False)
    return {name: (id(module), type(module), state(vars(module))) for name, module in modules}
