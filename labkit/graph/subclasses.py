"""Tell whether a subclass of a torch layer computes the same as torch's class, apart from padding or an activation.

Libraries derive layers from torch's: timm its Linear, Conv2dSame and BatchNormAct2d, for example. The name of a class
proves nothing, and a single equal result may be chance (a Linear with a low-rank branch of zeros), so the operators of
both forward passes are compared. The passes run on the meta device, in eval mode, on a copy; no number is computed.
"""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from labkit.errors import InputError
from labkit.graph import tracing


def is_plain(layer: nn.Module) -> bool:
    """Return True if `layer` is a Linear or Conv2d, or a subclass with the operators of torch's class."""
    for kind in (nn.Linear, nn.Conv2d):
        if isinstance(layer, kind):
            return _inherits_forward(layer, kind) or _computes_as(layer, kind)
    return False


def _inherits_forward(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return True if the class of `layer` has the forward pass of `kind`, convolution included."""
    for name in ("forward", "_conv_forward"):
        method = getattr(kind, name, None)
        if method is not None and getattr(type(layer), name) is not method:
            return False
    return True


def pads_same(layer: nn.Module) -> bool:
    """Return True if `layer` is a Conv2d of an input padded with `same_pads`, like timm's Conv2dSame."""
    if not isinstance(layer, nn.Conv2d):
        return False
    overrides_forward = type(layer).forward is not nn.Conv2d.forward
    return overrides_forward and _computes_as(layer, _SamePadded)


def same_pads(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """Return the zeros (left, right, above, below) of TensorFlow's padding "same", as `F.pad` takes them.

    size: size of the image, [H, W].
    kernel, stride, dilation: sizes of the convolution, [H, W] each.

    A convolution of the padded image has ceil(size / stride) results; an odd zero is at the end.
    """
    dimensions = zip(size, kernel, stride, dilation, strict=True)
    height, width = (_padding_needed(*dimension) for dimension in dimensions)
    on_the_left = width // 2
    above = height // 2
    return on_the_left, width - on_the_left, above, height - above


def _padding_needed(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Return the zeros needed in a dimension for ceil(size / stride) results."""
    results = -(-size // stride)
    span = dilation * (kernel - 1) + 1  # of the kernel
    read = (results - 1) * stride + span
    return max(read - size, 0)


class _SamePadded(nn.Conv2d):
    """A Conv2d with `same_pads`, for `pads_same` to compare with."""

    def forward(self, input: Tensor) -> Tensor:
        pads = same_pads(input.shape[-2:], self.kernel_size, self.stride, self.dilation)
        x = F.pad(input, pads)
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


def _computes_as(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return True if the layer's forward pass has the same operators as that of class `kind`."""
    recast = copy.copy(layer)
    recast.__class__ = kind
    for x in _examples(layer):
        operators = _operators(layer, x)
        if not operators or operators != _operators(recast, x):
            return False
    return True


def _examples(layer: nn.Linear | nn.Conv2d) -> Iterator[Tensor]:
    """Yield inputs without values; images in a size for each remainder of the stride, on which padding may depend."""
    if isinstance(layer, nn.Linear):
        for shape in ((2,), (2, 3)):
            yield torch.empty(*shape, layer.in_features, device="meta")
        return
    largest_stride = max(layer.stride)
    smallest_sides = []
    for kernel, dilation in zip(layer.kernel_size, layer.dilation, strict=True):
        span = dilation * (kernel - 1) + 1
        smallest_sides.append(span + largest_stride)
    for remainder in range(largest_stride):
        sides = [side + remainder for side in smallest_sides]
        yield torch.empty(2, layer.in_channels, *sides, device="meta")


def _operators(layer: nn.Module, x: Tensor) -> list[tuple]:
    """Return (name, operands, settings, shape) of each operator of a call; an empty list if a trace is refused."""
    try:
        record = tracing.record(layer, (x,), {})
    except InputError:
        return []
    return [(o.name, o.operands, o.settings, o.shape) for o in record.operations]


# --- batch norms ------------------------------------------------------------------------------------------------------


def after_norm(norm: nn.Module) -> nn.Module | None:
    """Return the rest of a batch norm's forward pass in eval mode, after the values are normalised.

    norm: a batch norm of torch, or of a subclass.

    The rest is an Identity for torch's batch norms, and the activation for subclasses such as timm's BatchNormAct2d.
    Returns None if the rest is no chain of operations with a single input each.
    """
    if type(norm).forward.__module__.startswith("torch.nn"):
        return nn.Identity()
    try:
        graph = fx.symbolic_trace(copy.deepcopy(norm).eval()).graph
    except Exception:  # a forward pass may do to a stand-in for a tensor whatever Python can do
        return None
    chain = _chain_after_norm(graph)
    if chain is None:
        return None
    steps = [node for node in chain if not _is_identity(norm, node)]
    if not steps:
        return nn.Identity()
    if len(steps) == 1 and steps[0].op == "call_module":
        return norm.get_submodule(steps[0].target)
    return _module_of(norm, steps)


def _chain_after_norm(graph: fx.Graph) -> list[fx.Node] | None:
    """Return the nodes between the batch norm of the graph's input and its output; None unless they are a chain."""
    (output,) = [node for node in graph.nodes if node.op == "output"]
    chain: list[fx.Node] = []
    node = output.args[0]
    while isinstance(node, fx.Node) and node.target is not F.batch_norm:
        if len(node.all_input_nodes) != 1:
            return None
        chain.insert(0, node)
        node = node.all_input_nodes[0]
    if not isinstance(node, fx.Node) or not node.args:
        return None
    source = node.args[0]
    normalises_the_input = isinstance(source, fx.Node) and source.op == "placeholder"
    return chain if normalises_the_input else None


def _module_of(norm: nn.Module, steps: Sequence[fx.Node]) -> nn.Module:
    """Return a module that runs the steps of a norm's forward pass in order, each on the result of the step before."""
    graph = fx.Graph()
    value = graph.placeholder("input")
    for node in steps:
        value = graph.node_copy(node, _replacing_operand_by(value))
    graph.output(value)
    return fx.GraphModule(norm, graph)


def _replacing_operand_by(value: fx.Node) -> Callable[[fx.Node], fx.Node]:
    """Return a function that maps any operand of a copied node to `value`."""

    def replace(_: fx.Node) -> fx.Node:
        return value

    return replace


def _is_identity(model: nn.Module, node: fx.Node) -> bool:
    """Return True if a node of a graph calls an nn.Identity of `model`."""
    if node.op != "call_module":
        return False
    return isinstance(model.get_submodule(node.target), nn.Identity)
