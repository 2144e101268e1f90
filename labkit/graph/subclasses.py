"""Tell whether a subclass of a torch layer computes what its parent does, apart from padding or an activation.

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
    """Return True if `layer` is a Linear or Conv2d, or a subclass that computes what torch's class computes."""
    for kind in (nn.Linear, nn.Conv2d):
        if isinstance(layer, kind):
            return _inherits_forward(layer, kind) or _computes_as(layer, kind)
    return False


def _inherits_forward(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether the class of `layer` has the methods of `kind` that make up a forward pass."""
    methods = [name for name in ("forward", "_conv_forward") if hasattr(kind, name)]
    return all(getattr(type(layer), name) is getattr(kind, name) for name in methods)


def pads_same(layer: nn.Module) -> bool:
    """Return True if `layer` is a Conv2d that first puts `same_pads` around its input, as timm's Conv2dSame does."""
    overrides_forward = isinstance(layer, nn.Conv2d) and type(layer).forward is not nn.Conv2d.forward
    return overrides_forward and _computes_as(layer, _SamePadded)


def same_pads(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int]:
    """Return the zeros (left, right, above, below) of TensorFlow's padding "same", as `F.pad` takes them.

    size: of the image, [H, W]. kernel, stride, dilation: of the convolution, [H, W] each.

    A convolution of the padded image has ceil(size / stride) results; an odd zero is at the end.
    """
    height = _padding_needed(size[0], kernel[0], stride[0], dilation[0])
    width = _padding_needed(size[1], kernel[1], stride[1], dilation[1])
    left, above = width // 2, height // 2
    return left, width - left, above, height - above


def _padding_needed(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Return the zeros that a dimension needs for ceil(size / stride) results."""
    results = -(-size // stride)
    span = dilation * (kernel - 1) + 1  # of the kernel
    return max((results - 1) * stride + span - size, 0)


class _SamePadded(nn.Conv2d):
    """A Conv2d with `same_pads`, for `pads_same` to compare with."""

    def forward(self, input: Tensor) -> Tensor:
        pads = same_pads(input.shape[-2:], self.kernel_size, self.stride, self.dilation)
        x = F.pad(input, pads)
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


def _computes_as(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether the layer's forward pass has the same operators as the forward pass of class `kind`."""
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
    spans = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    for remainder in range(largest_stride):
        sides = [span + largest_stride + remainder for span in spans]
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
    source = node.args[0] if isinstance(node, fx.Node) and node.args else None
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
    """Tell whether a node of a graph calls an nn.Identity of `model`."""
    return node.op == "call_module" and isinstance(model.get_submodule(node.target), nn.Identity)
