"""Subclasses of torch's layers: is their pass the parent's, with zeros around the input or an activation behind?

Libraries derive their own layers, as timm does its Linear, Conv2dSame and BatchNormAct2d. A name says nothing about
them, and one result may be equal by chance, as that of a Linear with a low-rank branch of zeros. So their operators are
compared. Runs on the meta device, in eval mode, on a copy; no number is computed.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from labkit.errors import InputError
from labkit.graph import tracing


def is_plain(layer: nn.Module) -> bool:
    """Whether this is a Linear or Conv2d that computes what those of torch compute."""
    kind = next((kind for kind in (nn.Linear, nn.Conv2d) if isinstance(layer, kind)), None)
    if kind is None:
        return False
    methods = [name for name in ("forward", "_conv_forward") if hasattr(kind, name)]
    inherited = all(getattr(type(layer), name) is getattr(kind, name) for name in methods)
    return inherited or _computes_as(layer, kind)


def pads_same(layer: nn.Module) -> bool:
    """Whether this is a Conv2d that first puts `same_pads` around its input, as timm's Conv2dSame does."""
    overrides = isinstance(layer, nn.Conv2d) and type(layer).forward is not nn.Conv2d.forward
    return overrides and _computes_as(layer, _SamePadded)


def same_pads(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """Zeros to the left, to the right, above and below an image of `size` [H, W], after which the result of a
    convolution is ceil(size / stride): TensorFlow's padding "same", which has the odd zero at the end."""
    needed = []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        needed.append(max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0))
    high, wide = needed
    return wide // 2, wide - wide // 2, high // 2, high - high // 2


class _SamePadded(nn.Conv2d):
    """What a layer has to compute for `pads_same`."""

    def forward(self, input: Tensor) -> Tensor:
        pads = same_pads(input.shape[-2:], self.kernel_size, self.stride, self.dilation)
        x = F.pad(input, pads)
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


def _computes_as(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the layer's forward pass is made of the operators that `kind`'s would be made of."""
    other = copy.copy(layer)
    other.__class__ = kind
    return all(_operators(layer, x) == _operators(other, x) != [] for x in _examples(layer))


def _examples(layer: nn.Linear | nn.Conv2d) -> Iterator[Tensor]:
    """Inputs without values. Of images there is one size for each remainder of the stride, which padding may go by."""
    if isinstance(layer, nn.Linear):
        yield from (torch.empty(*shape, layer.in_features, device="meta") for shape in ((2,), (2, 3)))
        return
    spans = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    for more in range(max(layer.stride)):
        yield torch.empty(2, layer.in_channels, *(span + max(layer.stride) + more for span in spans), device="meta")


def _operators(layer: nn.Module, x: Tensor) -> list[tuple]:
    """Each operator of a call with its operands, settings and shape; none where the call cannot be traced."""
    try:
        record = tracing.record(layer, (x,), {})
    except InputError:
        return []
    return [(o.name, o.operands, o.settings, o.shape) for o in record.operations]


def after_norm(norm: nn.Module) -> nn.Module | None:
    """The rest of a batch norm's forward pass in eval mode, after the values are normalised.

    An Identity for those of torch, the activation for such as timm's BatchNormAct2d. None where the rest is no chain of
    operations with one input each.
    """
    if type(norm).forward.__module__.startswith("torch.nn"):
        return nn.Identity()
    try:
        nodes = fx.symbolic_trace(copy.deepcopy(norm).eval()).graph.nodes
    except Exception:  # a forward pass may do to a stand-in for a tensor whatever Python can do
        return None
    chain = _chain(next(node for node in nodes if node.op == "output").args[0])
    if chain is None:
        return None
    chain = [node for node in chain if not _is_identity(norm, node)]
    if len(chain) <= 1 and all(node.op == "call_module" for node in chain):
        return norm.get_submodule(chain[0].target) if chain else nn.Identity()
    graph = fx.Graph()
    value = graph.placeholder("input")
    for node in chain:
        before = value
        value = graph.node_copy(node, lambda _, before=before: before)
    graph.output(value)
    return fx.GraphModule(norm, graph)


def _chain(last: Any) -> list[fx.Node] | None:
    """The nodes from the batch norm of the input to `last`, each of one input; None if there is no such chain."""
    chain, node = [], last
    while isinstance(node, fx.Node) and node.target is not F.batch_norm:
        if len(node.all_input_nodes) != 1:
            return None
        chain.insert(0, node)
        (node,) = node.all_input_nodes
    source = node.args[0] if isinstance(node, fx.Node) and node.args else None
    return chain if isinstance(source, fx.Node) and source.op == "placeholder" else None


def _is_identity(model: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(model.get_submodule(node.target), nn.Identity)
