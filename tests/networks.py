"""Small networks with one difficulty each, and the oracle of structured pruning: a dense model with blind readers."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMED = ("original0", "original1", "weight_g", "weight_v")


def randomise_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Running statistics, scales and shifts that differ from channel to channel, so that a mistaken slice shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, x in [*module._parameters.items(), *module._buffers.items()]:
                if x is None or not x.is_floating_point() or x.numel() < 2:
                    continue
                if name == "running_var" or (name == "weight" and x.dim() == 1):
                    x.copy_(torch.rand(x.shape, generator=generator) + 0.5)
                elif x.dim() == 1 or (x == x.flatten()[0]).all():
                    x.copy_(torch.randn(x.shape, generator=generator) * 0.3)
    return model.eval()


def blind(model: nn.Module, kept) -> nn.Module:
    """A dense copy in which no weight column reads a removed channel, by the layers' types: no help from the tracer."""
    masked = copy.deepcopy(model)
    modules = dict(masked.named_modules())
    for name, dims in kept.items():
        owner, _, attribute = name.rpartition(".")
        module, reads = modules[owner], None
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            reads = 1
        elif isinstance(module, TRANSPOSED) or type(module).__name__ == "Conv1D":
            reads = 0
        if attribute == "weight" and reads in dims:
            parameter = module._parameters[attribute]
            gone = torch.ones(parameter.shape[reads], dtype=torch.bool)
            gone[dims[reads]] = False
            with torch.no_grad():
                parameter.index_fill_(reads, gone.nonzero().squeeze(1), 0)
    return masked


def zeroed(model: nn.Module, kept) -> nn.Module:
    """A dense copy in which all that is removed is zero, but for weight norm's vectors: zero has no direction."""
    masked = copy.deepcopy(model)
    tensors = {**dict(masked.named_parameters(remove_duplicate=False)), **dict(masked.named_buffers())}
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, indices in () if name.endswith(NORMED) else dims.items():
                gone = torch.ones(tensors[name].shape[dim], dtype=torch.bool)
                gone[indices] = False
                tensors[name].index_fill_(dim, gone.nonzero().squeeze(1), 0)
    return masked


def difference(pruned, model: nn.Module, x: Tensor, oracle: Callable = blind) -> float:
    """Largest difference to the oracle relative to the largest output, in float64."""
    with torch.no_grad():
        expected = oracle(model, pruned.plan.kept).double()(x.double())
        found = copy.deepcopy(pruned.model).double()(x.double())
    return float((expected - found).abs().max() / expected.abs().max())


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, padding=2, dilation=2, padding_mode="circular"), nn.BatchNorm2d(12)
        self.fc1, self.fc2 = nn.Linear(12 * 16, 20), nn.Linear(20, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.fc2(torch.tanh(self.fc1(torch.flatten(x, 1))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3, padding=1), nn.Conv2d(10, 8, 1)
        self.bn, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.bn(self.conv2(F.relu(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class Dense(nn.Module):
    """Concatenation, and branches that read parts of it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(10, 4, 1)
        self.bn, self.fc = nn.BatchNorm2d(14), nn.Linear(14, 5)

    def forward(self, x):
        a = self.a(x)
        ab = torch.cat([a, F.relu(self.b(a))], 1)
        x = self.bn(torch.cat([ab, self.c(ab)], 1))
        return self.fc(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))


class Depthwise(nn.Module):
    """A depthwise and a grouped convolution, and squeeze-and-excite."""

    def __init__(self):
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.grouped, self.fc = nn.Conv2d(12, 18, 3, groups=6), nn.Linear(18, 5)

    def forward(self, x):
        x = F.silu(self.depthwise(F.relu(self.expand(x))))
        scale = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        x = x * torch.sigmoid(scale)
        return self.fc(F.relu(self.grouped(x)).mean((2, 3)))


class Shuffle(nn.Module):
    """A channel shuffle and a chunk, as in ShuffleNet V2."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.cat([self.a(x), self.b(x)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = x.chunk(2, 1)
        x = torch.cat([left, F.relu(self.c(right))], 1)
        return self.fc(x.mean((2, 3)))


class UpDown(nn.Module):
    """Transposed and three-dimensional relatives, group norm, PReLU, padding and resampling."""

    def __init__(self):
        super().__init__()
        self.down, self.norm, self.act = nn.Conv2d(3, 8, 2, stride=2), nn.GroupNorm(4, 8), nn.PReLU(8)
        self.up, self.out = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        y = F.pad(self.act(self.norm(self.down(x))), (1, 1, 0, 0))[..., 1:-1]
        y = F.interpolate(self.up(y), scale_factor=2, mode="bilinear")
        return self.out(F.avg_pool2d(y, 2))


def chain(dims: int) -> nn.Module:
    """Convolutions of every kind over `dims` positions: plain, grouped, depthwise, and all transposed."""
    conv, transposed = CONVOLUTIONS[dims - 1], TRANSPOSED[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    pools = ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d))
    return nn.Sequential(
        *(conv(3, 8, 3, padding=1), norm(8), nn.ReLU(), pools[0][dims - 1](2), conv(8, 12, 3, padding=1, groups=4)),
        *(transposed(12, 8, 2, stride=2, groups=2), nn.SiLU(), transposed(8, 8, 3, groups=8), transposed(8, 6, 3)),
        *(nn.ReLU(), pools[1][dims - 1](4), conv(6, 10, 1), nn.ReLU(), conv(10, 4, 1)),
    )


class Attention(nn.Module):
    """Self-attention by hand: heads are the units, whatever is written inside them."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Linear(6, width), nn.Linear(width, 48), nn.Linear(16, width)
        self.head_size, self.out = 4, nn.Linear(width, 5)

    def forward(self, x):  # [N, L, 6]
        x = self.embed(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (y.view(*y.shape[:2], -1, self.head_size).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(x + self.proj(y))


class Tied(nn.Module):
    """One layer used twice, and a weight that two modules share."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(8, 12)
        self.b.weight = self.a.weight
        self.out = nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.twice(F.relu(self.twice(self.stem(x)))))
        return self.out(F.relu(self.a(x)) * self.b(x))


class Bare(nn.Module):
    """Parameters that belong to no layer: a token, positions, a scale, a matrix."""

    def __init__(self):
        super().__init__()
        self.embed, self.token = nn.Linear(6, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.positions, self.gamma = nn.Parameter(torch.randn(1, 4, 8)), nn.Parameter(torch.randn(8))
        self.matrix, self.out = nn.Parameter(torch.randn(8, 10)), nn.Linear(10, 5)

    def forward(self, x):  # [N, 3, 6]
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.positions
        return self.out(torch.relu((x * self.gamma) @ self.matrix))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


class Statics(nn.Module):
    """Writes its sizes down: heads and width."""

    def __init__(self):
        super().__init__()
        self.width, self.heads = 16, 4
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        n, length, _ = x.shape
        x = self.a(x)
        y = self.b(x).view(n, length, self.heads, self.width // self.heads).transpose(1, 2)
        y = (y @ y.transpose(-2, -1)).softmax(-1) @ y
        return self.c(y.transpose(1, 2).reshape(n, length, self.width) + x)


class Around(nn.Module):
    """`fn` on a width of 8; `parts` are modules that it is called with."""

    def __init__(self, fn, **parts):
        super().__init__()
        self.fn, self.first, self.last = fn, nn.Linear(6, 8), nn.Linear(8, 5)
        self.parts = nn.ModuleDict(parts)

    def forward(self, x):  # [N, 6]
        return self.last(self.fn(self.first(x), **self.parts))


class Splits(nn.Module):
    """Sizes written down in a list and in a tuple."""

    def __init__(self):
        super().__init__()
        self.splits, self.shape = [4, 4], (-1, 2, 4)

    def forward(self, x):
        a, b = x.split(self.splits, 1)
        return torch.cat([a, b.relu()], 1).view(self.shape).flatten(1)


class Uneven(nn.Module):
    """Pieces of other sizes than each other, the last with a layer of its own."""

    def __init__(self):
        super().__init__()
        self.splits, self.layer = [2, 6], nn.Linear(6, 6)

    def forward(self, x):
        a, b = x.split(self.splits, 1)
        return torch.cat([a, self.layer(b).relu()], 1)


class Sliced(nn.Module):
    """The same, with one number and slices."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = 2, nn.Linear(6, 6)

    def forward(self, x):
        return torch.cat([x[:, : self.first], self.layer(x[:, self.first :]).relu()], 1)


class Heads(nn.Module):
    """Weights [width, heads, positions], as a product over two dimensions reads them."""

    def __init__(self):
        super().__init__()
        self.makes, self.reads = nn.Parameter(torch.randn(8, 4, 3)), nn.Parameter(torch.randn(4, 3, 8))

    def forward(self, x):
        return torch.einsum("nhk,hkc->nc", torch.einsum("nc,chk->nhk", x, self.makes).relu(), self.reads)


def recurrent(x, into, hidden):
    """Two steps from states of zeros, made in two ways."""
    h, c = torch.zeros(len(x), hidden.in_features), x[:, None].new_zeros(len(x), hidden.in_features)
    for _ in range(2):
        h = torch.tanh(into(x) + hidden(h) + c)
    return h


def gated(x, layer):
    """A recurrent layer of torch.nn with the state given."""
    h = torch.zeros(1, len(x), layer.hidden_size)
    return layer(x[:, None], (h, h))[0][:, 0]


def averaged(x):
    """A moving average of each channel by itself, its kernel made and repeated in the pass."""
    kernel = (torch.ones(1, 1, 3) / 3).repeat(x.shape[1], 1, 1)
    return F.conv1d(x[..., None].expand(-1, -1, 5), kernel, groups=x.shape[1]).mean(-1)


def filtered(x):
    """A global filter: Fourier over positions."""
    spectrum = torch.fft.rfft(x[..., None].expand(-1, -1, 6), dim=-1)
    return torch.fft.irfft(torch.view_as_complex(torch.view_as_real(spectrum) * 2), n=6, dim=-1).mean(-1)


def blurred(x, k):
    kernel = k.running_mean.view(1, 1, 1).expand(x.shape[1], 1, 1)
    return F.conv1d(x[..., None], kernel, groups=x.shape[1]).squeeze(-1)


def standardised(x, layer):
    weight = F.batch_norm(layer.weight[None], None, None, training=True)[0]
    return F.linear(x, weight, layer.bias)


def one_head(x, q, k, v):
    x = x[:, None].expand(-1, 3, -1)
    return F.scaled_dot_product_attention(*(layer(x)[:, None] for layer in (q, k, v)))[:, 0, 0]


def restrided(x, norm, layer):
    """A norm over a dimension that is not the last in memory, then a product without a weight."""
    y = layer(norm(x[:, None].expand(-1, 3, -1).transpose(1, 2).contiguous().transpose(1, 2)))
    return x + (y @ y.mT).sum((1, 2))[:, None]


def masked(x):
    mask = torch.ones(len(x), device=x.device)  # masks that the pass makes for itself, and looks at
    return x if mask.all() and not torch.zeros(len(x), device=x.device).bool().any() else -x


ODD = {  # what a pruner meets in the wild: (function on a width, its modules)
    "an empty slice": (lambda x: torch.cat([x[..., :8] * 2, x[..., 8:]], -1), {}),
    "a blur": (blurred, {"k": lambda: nn.BatchNorm1d(1)}),
    "one group norm": (lambda x, norm: norm(x), {"norm": lambda: nn.GroupNorm(1, 8)}),
    "weights standardised by batch norm": (standardised, {"layer": lambda: nn.Linear(8, 8)}),
    "weight norm": (lambda x, n: n(x), {"n": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))}),
    "weight norm over outputs": (lambda x, n: n(x), {"n": lambda: nn.utils.weight_norm(nn.Linear(8, 8), dim=1)}),
    "spectral norm": (lambda x, n: n(x), {"n": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))}),
    "one head": (one_head, {name: lambda: nn.Linear(8, 8) for name in "qkv"}),
    "sizes in a list": (lambda x, s: s(x), {"s": Splits}),
    "pieces of unequal sizes": (lambda x, s: s(x), {"s": Uneven}),
    "slices of unequal sizes": (lambda x, s: s(x), {"s": Sliced}),
    "heads in a product over two dimensions": (lambda x, s: s(x), {"s": Heads}),
    "a state of zeros": (recurrent, {name: lambda: nn.Linear(8, 8) for name in ("into", "hidden")}),
    "a kernel made in the pass": (averaged, {}),
    "a Fourier filter": (filtered, {}),
    "other strides": (restrided, {"norm": lambda: nn.LayerNorm(8), "layer": lambda: nn.Linear(8, 8)}),
    "a mask of ones": (masked, {}),
    "a recurrent layer": (lambda x, r: r(torch.stack([x, -x]))[0][-1], {"r": lambda: nn.RNN(8, 8)}),
    "a recurrent layer with its state": (gated, {"layer": lambda: nn.LSTM(8, 8, batch_first=True)}),
    "a recurrent cell": (lambda x, r: r(x, torch.zeros(len(x), r.hidden_size)) + r(x), {"r": lambda: nn.GRUCell(8, 8)}),
}


def odd(name: str) -> nn.Module:
    torch.manual_seed(0)
    fn, parts = ODD[name]
    return randomise_(Around(fn, **{key: make() for key, make in parts.items()}))


IMAGE, ROWS, SEQUENCE = (2, 3, 8, 8), (2, 6), (2, 3, 6)
NETWORKS = {
    Plain: IMAGE,
    Residual: IMAGE,
    Dense: IMAGE,
    Depthwise: IMAGE,
    Shuffle: IMAGE,
    UpDown: IMAGE,
    Attention: SEQUENCE,
    Tied: ROWS,
    Bare: SEQUENCE,
}


def example(kind: type) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomise_(kind()), torch.randn(NETWORKS[kind])


# --- met by measures, quantizers and proofs ---------------------------------------------------------------------------


class EqualOdds(nn.Module):
    """A language model that finds every one of 7 tokens equally likely."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.weight.expand(*input_ids.shape, 7))


class TiedEmbedding(nn.Module):
    """A head that shares the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.inner = nn.Linear(8, 8)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(ids)))


class GroupedStrided(nn.Module):
    """A grouped, dilated, strided convolution and two Linear layers, dropout and batch norm among them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2)
        self.norm, self.drop = nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.hidden, self.out = nn.Linear(6 * 3 * 3, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 4, 8, 8]
        x = self.drop(self.norm(self.conv(x)).relu()).flatten(1)
        return self.out(self.hidden(x).tanh())


class Shortcuts(nn.Module):
    """An identity shortcut, a shortcut with a convolution, and a sum of which no convolution is a term."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.shortcut = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, 1, height, width]
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.b(F.relu(self.a(x))) + x)
        x = F.relu(self.c(x) + self.shortcut(x))
        x = x + F.relu(x)
        return self.head(x.mean((2, 3)))


def shortcuts() -> Shortcuts:
    """The same at every call, with running statistics that are not those of a new norm."""
    torch.manual_seed(0)
    model = Shortcuts().eval()
    model.norm.running_mean.uniform_(-0.3, 0.3)
    model.norm.running_var.uniform_(0.5, 2)
    return model


class Returning(nn.Module):
    """Five classes in whatever `form` makes of them."""

    def __init__(self, form: Callable[[Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.out, self.form = nn.Linear(8, 16), nn.Linear(16, 5), form

    def forward(self, x: Tensor) -> object:
        return self.form(self.out(torch.relu(self.a(x))))


# --- of what engines export, and with a forward pass that a test writes --------------------------------------------


class WithForward(nn.Module):
    """A forward pass given as a function of the module and its inputs, over layers and parameters given by name."""

    def __init__(self, forward: Callable, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x, *more):
        return self.run(self, x, *more)


def by_sign(x: Tensor) -> Tensor:
    """x or -x, by the values of x: no trace, export or compiler can follow such a pass."""
    return x if float(x.sum()) > 0 else -x


class UnevenlyPadded(nn.Module):
    """Uneven padding before a stride, an identity shortcut, depthwise, a convolution before a mean, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8))
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu6(self.b(F.relu(self.a(x))) + x)
        return self.head(F.relu(self.c(x)).mean((2, 3)))


class WithOptions(nn.Module):
    """Token ids with a mask and with a number beside them, and two outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(50, 16), nn.Linear(16, 16)

    def forward(self, ids, mask=None, scale=1.0):
        x = F.gelu(self.layer(self.embedding(ids))) * scale
        x = x * mask[..., None]
        return {"tokens": x, "text": x.sum(1)}


class Perceptron(nn.Module):
    """Two hidden layers, around which `before` and `after` do what is hard about the model."""

    def __init__(self, before=lambda x: x, after=lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 5)
        self.before, self.after = before, after

    def forward(self, x):
        return self.after(self.out(F.relu(self.b(F.relu(self.a(self.before(x)))))))


class Mobile(nn.Module):
    """Uneven padding, depthwise, ReLU6, a sum that is read twice, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.wide = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(16, 16, 5, groups=16), nn.ReLU())
        self.project = nn.Conv2d(16, 8, 1)
        self.twice = nn.Conv2d(8, 8, 3, padding="same")
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        y = x + F.pad(self.project(self.depthwise(self.wide(x))), (1, 0, 1, 0))  # no kernel can do this sum
        z = self.project(self.depthwise(self.wide(y)))
        y = F.pad(y[..., 1:, 1:], (0, 0)) + z
        y = y + self.twice(self.twice(y))
        return self.head(F.relu(y).mean((2, 3)))


def untraceable() -> nn.Module:
    """Convolution, ReLU, mean and Linear, with a choice by the values between the last two."""
    layers = {"a": nn.Conv2d(1, 4, 3, padding=1), "b": nn.Linear(4, 3)}
    return WithForward(lambda m, x: m.b(by_sign(m.a(x).relu().mean((2, 3)))), **layers)


class Terms(nn.Module):
    """Sums whose term the layer itself reads, and whose term a second sum reads; names that are those of functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.add, self.relu = (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1))
        self.again, self.rows, self.head = nn.Conv2d(4, 4, 1), nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, relu):
        x = F.relu(self.stem(relu))
        x = F.relu(self.add(x) + x)
        y = F.relu(self.relu(F.relu(x)) + x)
        y = F.relu(self.again(y) + x).mean(2).transpose(1, 2)
        state = torch.zeros_like(y[:, 0, :1].expand(-1, 6))[None]
        return self.head(self.rows(y, (state, state))[0])
