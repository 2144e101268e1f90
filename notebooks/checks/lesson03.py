"""Checks of lesson 03: cutting channels, what is coupled, statistics estimated anew.

Each tests what has to hold (the masked model's outputs, labkit's own trace, the statistics of the batches) on awkward
inputs.
"""

import copy
from collections.abc import Callable
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import training
from labkit.lesson.failures import Failures, alike, has_parts
from labkit.pruning import coupling

# how the first convolution is built, how the second, the norm's settings, the mode, what stays of 6 channels
CHAINS = (
    ({}, {}, {}, "eval", [0, 2, 3, 5]),
    ({"bias": False, "stride": 2}, {"bias": False}, {"eps": 0.1}, "eval", [4, 1]),
    ({"dilation": 2, "padding": 2}, {"padding_mode": "circular", "padding": 1}, {"momentum": 0.01}, "eval", [5]),
    ({"padding_mode": "reflect", "padding": 1}, {"dilation": 2}, {"affine": False}, "eval", [0, 1, 2, 3, 4, 5]),
    ({}, {}, {}, "train", [3, 0, 4]),
)


def surgery(fn: Callable, failures: Failures) -> None:
    """cut(conv, norm, consumer, keep) -> the three modules with only the channels `keep` between them."""
    for first, second, settings, mode, keep in CHAINS:
        before = _chain(first, second, settings, mode)
        index = torch.tensor(keep)
        with failures.given(conv=first, norm=settings, consumer=second, mode=mode, keep=keep):
            changed = "the modules that were given have changed; copy them before you cut"
            after = failures.call(fn, *before, index, changed=changed)
            failures.need(has_parts(after, 3), "return three modules: conv, norm, consumer")
            types = {vector.dtype for module in after for vector in module.parameters()}
            failures.need(types == {torch.float64}, "new parameters have another dtype; cut copies of the old modules")
            _is_smaller(after, before, len(keep), failures)
            _settings_stay(after, before, failures)
            _computes_the_same(after, before, index, failures)


def _chain(first: dict, second: dict, settings: dict, mode: str) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]:
    """float64 modules in this mode with a norm that has seen data: channel by channel other statistics."""
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(3)
    conv = nn.Conv2d(3, 6, 3, **first)
    norm = nn.BatchNorm2d(6, **settings)
    consumer = nn.Conv2d(6, 4, 3, **second)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -1, 1)
    torch.random.set_rng_state(torch_state)
    for frozen in (conv.weight, norm.bias, consumer.weight):
        if frozen is not None:
            frozen.requires_grad_(False)
    return tuple(module.double().train(mode == "train") for module in (conv, norm, consumer))


def _run(conv: nn.Module, norm: nn.Module, consumer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return consumer(F.relu(norm(conv(x))))


def _computes_the_same(after, before, keep: Tensor, failures: Failures) -> None:
    conv, norm, consumer = copy.deepcopy(before)
    removed = torch.ones(6, dtype=torch.bool)
    removed[keep] = False
    consumer.weight.data[:, removed] = 0  # the reference: the consumer does not look at what was removed
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    failures.close(
        _run(*after, x),
        _run(conv, norm, consumer, x),
        "the outputs are not those of the dense chain whose consumer ignores the removed channels; look at rows and "
        "columns, at every tensor of the norm, at biases and at the settings of the convolutions",
        atol=1e-9,
    )


def _is_smaller(after, before, width: int, failures: Failures) -> None:
    conv, norm, consumer = after
    sizes = (conv.out_channels, norm.num_features, consumer.in_channels)
    failures.expect(sizes == (width,) * 3, "out_channels, num_features and in_channels have to say the new width")
    most = sum(p.numel() for module in before for p in module.parameters())
    numel = sum(p.numel() for module in after for p in module.parameters())
    per_channel = (most - before[2].out_channels * (before[2].bias is not None)) // 6
    failures.expect(
        numel == most - per_channel * (6 - width),
        "the parameters that are left are too many or too few; a channel is a row, an entry of each vector, a column",
    )


def _settings_stay(after, before, failures: Failures) -> None:
    for new, old in zip(after, before, strict=True):
        failures.expect(new.training == old.training, "a module has changed between train and eval mode")
        flags = [[p.requires_grad for p in module.parameters()] for module in (new, old)]
        failures.expect(flags[0] == flags[1], "requires_grad has not been kept")
    failures.expect(
        after[1].eps == before[1].eps and after[1].momentum == before[1].momentum,
        "the norm's eps or momentum went back to its default",
    )


# ------------------------------------------------------------------------------------------------ what is coupled


class Wired(nn.Module):
    """Layers by name, and how an image goes through them: `wiring(self, image)`."""

    def __init__(self, layers: dict[str, nn.Module], wiring: Callable) -> None:
        super().__init__()
        self.wiring = wiring
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, image: Tensor) -> Tensor:
        return self.wiring(self, image)


def _conv(into: int, out: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, padding=1, bias=bias)


def _residual(net: nn.Module, image: Tensor) -> Tensor:
    x = F.relu(net.norm(net.stem(image)))
    y = F.relu(net.norm1(net.conv1(x)))
    y = net.norm2(net.conv2(y))
    return net.head(F.relu(x + y))


def _shortcut(net: nn.Module, image: Tensor) -> Tensor:
    x = F.relu(net.stem(image))
    y = net.block(F.relu(net.conv(x)))
    return net.head(F.relu(y + net.norm(net.beside(x))))


def _block(block: nn.Module, x: Tensor) -> Tensor:
    return block.norm(block.conv(x))


def _stream(net: nn.Module, image: Tensor) -> Tensor:
    x = net.stem(image)
    x = x + net.out1(F.relu(net.in1(x)))
    return net.head(x + net.out2(F.relu(net.in2(x))))


def _chain_of_linear(net: nn.Module, image: Tensor) -> Tensor:
    x = net.pool(net.relu(net.norm(net.conv(image))))
    return net.head(F.relu(net.hidden(torch.flatten(x, 1))))


def _on_the_image(net: nn.Module, image: Tensor) -> Tensor:
    x = image + net.back(F.relu(net.away(image)))
    return net.last(F.relu(net.head(x)))


def _to_the_output(net: nn.Module, image: Tensor) -> Tensor:
    x = net.stem(image)
    return net.a(x) + net.b(F.relu(x))


NETS = {
    "a residual block": lambda: Wired(
        dict(stem=_conv(3, 4, True), norm=nn.BatchNorm2d(4), conv1=_conv(4, 5), norm1=nn.BatchNorm2d(5, affine=False),
             conv2=_conv(5, 4, True), norm2=nn.BatchNorm2d(4), head=_conv(4, 2, True)), _residual),
    "a block with modules of its own, and a convolution in the shortcut": lambda: Wired(
        dict(stem=_conv(2, 3, True), conv=_conv(3, 5),
             block=Wired(dict(conv=_conv(5, 4), norm=nn.BatchNorm2d(4)), _block), beside=_conv(3, 4, True),
             norm=nn.BatchNorm2d(4), head=_conv(4, 2)), _shortcut),
    "two residual blocks on one stream": lambda: Wired(
        dict(stem=_conv(1, 4), in1=_conv(4, 3), out1=_conv(3, 4), in2=_conv(4, 4, True), out2=_conv(4, 4),
             head=_conv(4, 2)), _stream),
    "a convolution, a pooling and two linear layers": lambda: Wired(
        dict(conv=_conv(2, 4, True), norm=nn.BatchNorm2d(4), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1),
             hidden=nn.Linear(4, 6, bias=False), head=nn.Linear(6, 3)), _chain_of_linear),
    "a block around the image": lambda: Wired(
        dict(away=_conv(2, 3), back=_conv(3, 2, True), head=_conv(2, 4, True), last=_conv(4, 2)), _on_the_image),
    "an addition at the output": lambda: Wired(
        dict(stem=_conv(2, 3, True), a=_conv(3, 2), b=_conv(3, 2, True)), _to_the_output),
}  # fmt: skip


def coupled_dimensions(fn: Callable, failures: Failures) -> None:
    """couple(net) -> sets of (tensor, dimension) that lose the same channels."""
    for name, build in NETS.items():
        net = build().eval()
        with failures.given(net=name):
            answer = failures.call(fn, net, changed="the network that was given has changed; only look at it")
            shaped = isinstance(answer, list | tuple | set) and all(map(_is_labels, answer))
            failures.need(shaped, "return a list with a set of (tensor, dimension) for each group of dimensions")
            _are_coupled([frozenset(labels) for labels in answer], net, failures)


def _is_labels(value: object) -> bool:
    return isinstance(value, set | frozenset) and all(
        has_parts(label, 2) and isinstance(label[0], str) and isinstance(label[1], Integral) for label in value
    )


def _are_coupled(answer: list[frozenset], net: nn.Module, failures: Failures) -> None:
    image = torch.zeros(1, next(net.parameters()).shape[1], 6, 6)
    expected = [frozenset((m.name, m.dim) for m in group.members) for group in coupling.trace(net, image)]
    free, listed = frozenset().union(*expected), frozenset().union(*answer)
    unknown = sorted(label for label in listed if not _exists(net, *label))
    failures.need(
        not unknown,
        "dimensions are listed that the network does not have; does each convolution have a bias?",
        detail=_first(unknown),
    )
    bound = sorted(listed - free)
    failures.expect(
        not bound,
        "dimensions that have to stay are listed; a set that reaches the image or the output is left out as a whole, "
        "and so are the labels of the image and of the output themselves",
        detail=_first(bound),
    )
    missing = sorted(free - listed)
    for kind, belongs in KINDS.items():
        missing_kind = [label for label in missing if belongs(net, *label)]
        failures.expect(not missing_kind, f"{kind} are missing", detail=_first(missing_kind))
    failures.expect(sum(map(len, answer)) == len(listed), "a dimension is in more than one set")
    if free != listed:
        return
    merged = any(a < b for a in expected for b in answer)
    spread = any(b < a for a in expected for b in answer)
    failures.expect(not merged, "dimensions that could be cut one without the other are in one set")
    failures.expect(
        not spread,
        "one group is spread over several sets; an addition, a norm or a consumer ties its dimensions together",
    )
    failures.expect(merged or spread or set(answer) == set(expected), "dimensions of different groups are in one set")


def _exists(net: nn.Module, name: str, dim: int) -> bool:
    """Return True for a dimension of the network's own tensors, and for the channels of the image or of the output."""
    if name in ("image", "output"):
        return True
    tensors = net.state_dict()
    return name in tensors and dim < tensors[name].dim()


def _first(labels: list[tuple[str, int]]) -> str:
    return f"the first is {labels[0]}" if labels else ""


# what a (tensor, dimension) is, for messages
KINDS: dict[str, Callable[..., bool]] = {
    "rows, dimension 0 of a weight,": lambda net, name, dim: (
        dim == 0 and name.endswith(".weight") and net.get_parameter(name).dim() > 1
    ),
    "columns, dimension 1 of a consumer's weight,": lambda net, name, dim: dim == 1,
    "entries of a bias": lambda net, name, dim: name.endswith(".bias") and "norm" not in name,
    "entries of a norm's vectors, its running statistics among them,": lambda net, name, dim: "norm" in name,
}


# ---------------------------------------------------------------------------------------- statistics estimated anew

# what a network is, how to build it, the sizes of the batches
ESTIMATED = {
    "a convolution and a norm": (lambda: [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)], (8, 8, 8)),
    "two norms, one behind the other": (
        lambda: [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)],
        (5, 5),
    ),
    "a norm in a block, without scale and shift": (
        lambda: [nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sequential(nn.BatchNorm2d(4, affine=False)), nn.ReLU())],
        (4, 4, 4),
    ),
    "a dropout between two norms": (
        lambda: [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)],
        (6, 6),
    ),
    "batches of 6, 3 and 2 images": (lambda: [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=None)], (6, 3, 2)),
    "one batch": (lambda: [nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)], (7,)),
}


def estimation(fn: Callable, failures: Failures) -> None:
    """reestimate(model, batches) gives the norms of the model the statistics of the batches, in place."""
    for name, (build, sizes) in ESTIMATED.items():
        model, batches = _after_a_cut(build), _images(sizes)
        expected, before = copy.deepcopy(model), copy.deepcopy(model)
        training.reestimate_norms_(expected, batches)
        with failures.given(net=name):
            images = copy.deepcopy(batches)
            fn(model, images)
            failures.expect(alike(images, batches), "the images that were given have changed; only read them")
            _has_the_statistics(model, expected, failures)
            _is_otherwise_as_before(model, before, failures)


def _after_a_cut(build: Callable[[], list[nn.Module]]) -> nn.Module:
    """A float64 network in eval mode whose norms remember statistics that do not fit."""
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(6)
    model = nn.Sequential(*build()).double().eval()
    for norm in _norms(model).values():
        norm.running_mean.uniform_(5, 9)
        norm.running_var.uniform_(20, 30)
        norm.num_batches_tracked.fill_(9)  # they come from training
    torch.random.set_rng_state(torch_state)
    return model


def _images(sizes: tuple[int, ...]) -> list[Tensor]:
    """Images of [n, 2, 7, 7], each batch about a mean of its own."""
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(n, 2, 7, 7, dtype=torch.float64, generator=generator) for n in sizes]
    return [(1 + number) * images + number for number, images in enumerate(drawn)]


def _norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}


def _has_the_statistics(model: nn.Module, expected: nn.Module, failures: Failures) -> None:
    norms = _norms(model)
    for name, norm in _norms(expected).items():
        mean, variance = norms[name].running_mean, norms[name].running_var
        failures.close(
            mean,
            norm.running_mean,
            "a running mean is not the mean over the batches of each batch's mean; are the old statistics gone, does "
            "each batch count alike, and do the norms before this one use the batch's own statistics, with any dropout "
            "off?",
            rtol=1e-6,
            atol=1e-8,
        )
        failures.close(
            variance,
            norm.running_var,
            "a running variance is not the mean over the batches of each batch's variance (divided by n - 1)",
            rtol=1e-6,
            atol=1e-8,
        )


def _is_otherwise_as_before(model: nn.Module, before: nn.Module, failures: Failures) -> None:
    modes = [module.training for module in model.modules()]
    failures.expect(not any(modes), "the model, or a part of it, is left in train mode")
    momenta = [[norm.momentum for norm in _norms(net).values()] for net in (model, before)]
    failures.expect(momenta[0] == momenta[1], "a norm's momentum is another than before")
    parameters = [dict(net.named_parameters()) for net in (model, before)]
    failures.expect(alike(*parameters), "a weight has changed; only statistics are estimated")


CHECKS = {"03.1": surgery, "03.2": coupled_dimensions, "03.3": estimation}

TRIES = {
    "03.1": f"{len(CHAINS)} chains with other strides, biases and norms, in eval and in train mode",
    "03.2": f"{len(NETS)} networks, among them residual blocks, linear layers and a block around the image",
    "03.3": f"{len(ESTIMATED)} networks with statistics that do not fit, among them one with a dropout",
}
