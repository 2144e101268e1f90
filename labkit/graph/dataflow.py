"""Follow channels from the layer or norm that makes them to the layers that read them.

`Dataflow` reads the trace of a model on the meta device (`tracing.record`): no value is looked at, so that the answers
hold for every input. `Dataflow.folds` lists the batch norms that can be folded into a layer; `Dataflow.route` tells
whether all operations on the way let a scale of each channel pass. `quantization.fold` changes the model.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from labkit.errors import InputError
from labkit.graph import tracing
from labkit.graph.rules import Operation
from labkit.graph.subclasses import after_norm

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMED = ("weight", "bias", "running_mean", "running_var")  # tensors that a batch norm holds and reads

# Operators with f(s x) = s f(x), each channel by itself: those that keep the shape, those that work on the last
# dimensions, those that reduce the dimensions they are told, and views.
SAME = {"relu", "leaky_relu", "_prelu_kernel", "clone", "detach", "alias", "contiguous", "neg", "abs"}
_NAMES = """max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d
_adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_linear1d
upsample_bilinear2d upsample_bicubic2d reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"""
SPATIAL = frozenset(_NAMES.split())
REDUCING = {"mean", "sum", "amax", "amin"}
VIEWS = {"view", "_unsafe_view", "reshape"}
CLIPS = {"hardtanh", "relu6", "clamp_max"}


@dataclass(frozen=True)
class Source:
    """An operation whose result is, channel by channel, linear in the first dimension of its parameters.

    number: of the operation in the trace. module: the layer's or norm's name. names: of the parameters, the weight
    first. dim: the dimension of the result that runs over channels. is_layer: True for a layer, False for a norm.
    """

    number: int
    module: str
    names: tuple[str, ...]
    dim: int
    is_layer: bool


@dataclass
class Route:
    """The layers that a source's channels reach.

    readers: {layer: number of its input columns for each channel}.
    blocked: the first place at which a scale of the channels would not pass, "" if there is none.
    clip: the first such place that clips the channels to a range, "" if there is none.
    """

    readers: dict[str, int]
    blocked: str = ""
    clip: str = ""


class Channels(NamedTuple):
    """The channels of a source in the result of an operation.

    dim: the dimension that runs over channels. repeats: entries of the dimension for each channel, side by side.
    """

    dim: int
    repeats: int


class Dataflow:
    """The operations of a trace, the layers among them, and the readers of each result.

    model, args, kwargs: the model and its example input.

    operations: of the trace, in order; an operation's number is its index.
    returned: numbers of the operations that the model returns.
    readers: {operation's number, or name of a parameter or buffer: numbers of the operations that read its value}.
    layers: {operation's number: name of the layer}, for layers whose parameters no other operation uses.
    sources: the operations whose channels can be scaled by their parameters.
    """

    @torch.inference_mode(False)  # in that mode composite operators arrive whole, and no layer is known by its product
    def __init__(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self.record = record = tracing.record(model, args, kwargs)
        self.operations = record.operations
        self.returned = record.returned
        self.readers: dict[int | str, list[int]] = defaultdict(list)
        for number, operation in enumerate(self.operations):
            for operand in operation.operands:
                if operand is not None:
                    self.readers[operand].append(number)
        self._shared = {name for first, names in record.aliases.items() for name in (first, *names)}
        self._shapes = {name: x.shape for name, x in model.named_parameters()}
        self.layers: dict[int, str] = {}
        for number in range(len(self.operations)):
            layer = self._layer_of(number, model)
            if layer is not None:
                self.layers[number] = layer
        sources = [self._source_of(number) for number in range(len(self.operations))]
        self.sources = [source for source in sources if source is not None]

    def check_compared(self) -> None:
        """Raise InputError unless the output has a number that depends on the input, so that a copy can be proved."""
        made = [self.operations[number].shape for number in self.returned if isinstance(number, int)]
        if not any(math.prod(shape) for shape in made):
            raise InputError(
                "The model's output holds no tensor with a number in it that its input decides, so that no copy can be "
                "proved to be equal: give an example input that is not empty, and a model that returns tensors."
            )

    # --- layers and sources -------------------------------------------------------------------------------------------

    def _is_private(self, name: int | str | None) -> bool:
        """Tell whether `name` is a parameter that is read by a single operation and shares no memory."""
        return name in self._shapes and name not in self._shared and len(self.readers[name]) == 1

    def _layer_of(self, number: int, model: nn.Module) -> str | None:
        """Return the name of the convolution or Linear whose product an operation is; None for other operations."""
        operation = self.operations[number]
        is_transposed = any(setting is True for setting in operation.settings)
        if operation.name not in ("convolution", "mm", "addmm") or is_transposed:
            return None
        at = _input_position(operation)
        weight = self._untransposed(operation.operands[at + 1])
        bias = [operand for i, operand in enumerate(operation.operands) if i not in (at, at + 1)]
        has_own_weight = weight == _parameter(operation.module, "weight")
        has_own_bias = bias in ([], [_parameter(operation.module, "bias")])
        if not has_own_weight or not has_own_bias or not all(map(self._is_private, [weight, *bias])):
            return None
        is_layer = isinstance(model.get_submodule(operation.module), LAYERS)
        return operation.module if is_layer else None

    def _untransposed(self, operand: int | str | None) -> int | str | None:
        """Return the operand whose transpose `operand` is, if nothing else reads the transpose; else `operand`."""
        if not isinstance(operand, int):
            return operand
        is_transpose = self.operations[operand].name == "t"
        return self.operations[operand].operands[0] if is_transpose and len(self.readers[operand]) == 1 else operand

    def _source_of(self, number: int) -> Source | None:
        """Return the operation as a source: a layer's product, a layer norm, or a product with a vector."""
        operation = self.operations[number]
        last = len(operation.shape) - 1
        if number in self.layers:
            weight = _parameter(operation.module, "weight")
            bias = [x for x in operation.operands if x == _parameter(operation.module, "bias")]
            positions = len(self._shapes[weight]) - 2 if operation.name == "convolution" else 0
            return Source(number, operation.module, (weight, *bias), last - positions, True)
        parameters_allowed = {"native_layer_norm": (1, 2), "mul": (1,)}.get(operation.name, ())
        names = tuple(x for x in operation.operands if isinstance(x, str))
        if len(names) not in parameters_allowed:
            return None
        for name in names:
            is_vector = self._is_private(name) and tuple(self._shapes[name]) == operation.shape[-1:]
            if not is_vector:
                return None
        return Source(number, operation.module, names, last, False)

    # --- batch norms --------------------------------------------------------------------------------------------------

    def folds(self, model: nn.Module) -> list[tuple[str, str]]:
        """Return (layer, batch norm) for each batch norm that alone reads a layer, and whose tensors only it reads."""
        pairs = []
        for number, operation in enumerate(self.operations):
            norm = model.get_submodule(operation.module)
            if "batch_norm" not in operation.name or not _is_usual_norm(norm, operation):
                continue
            before = operation.operands[0]
            is_only_reader = all(self.readers[operand] == [number] for operand in operation.operands)
            if is_only_reader and before not in self.returned and before in self.layers:
                pairs.append((self.layers[before], operation.module))
        return pairs

    # --- routes -------------------------------------------------------------------------------------------------------

    def route(self, source: Source) -> Route:
        """Follow the channels of a source through all operations that let a scale pass, to the layers that read them.

        The operations are visited in the order of the trace, so that all operands of an operation are known.
        """
        route = Route({})
        if source.number in self.returned:
            route.blocked = "an output of the model"
        carried = {source.number: Channels(source.dim, 1)}  # by the number of the operation that gives them
        pending = set(self.readers[source.number])
        while pending:
            number = min(pending)
            pending.remove(number)
            operation = self.operations[number]
            channels = [carried.get(operand) for operand in operation.operands]
            if number in self.layers and self._reads_channels(number, channels):
                at = _input_position(operation)
                route.readers[self.layers[number]] = channels[at].repeats
                continue
            after = self._after(number, channels)
            if after is None or number in self.returned:
                place = f"{operation.name} in {operation.module or 'the model'}"
                route.blocked = route.blocked or place
                if _clips(operation):
                    route.clip = route.clip or place
                continue
            carried[number] = after
            pending.update(self.readers[number])
        return route

    def _reads_channels(self, number: int, channels: Sequence[Channels | None]) -> bool:
        """Tell whether the channels come in at a layer's input channels, and nowhere else.

        channels: of each operand of the layer's product.
        """
        at = _input_position(self.operations[number])
        carriers = [i for i, x in enumerate(channels) if x is not None]
        if carriers != [at]:
            return False
        positions = 0
        if self.operations[number].name == "convolution":
            weight = _parameter(self.layers[number], "weight")
            positions = len(self._shapes[weight]) - 2
        last = len(self._operand_shape(number, at)) - 1
        fits = channels[at].repeats == 1 or not positions  # a convolution's kernel has no columns side by side
        return channels[at].dim == last - positions and fits

    def _operand_shape(self, number: int, at: int) -> tuple[int, ...]:
        """Return the shape of an operand that an operation made."""
        return self.operations[self.operations[number].operands[at]].shape

    def _after(self, number: int, channels: Sequence[Channels | None]) -> Channels | None:
        """Return the channels in an operation's result; None unless a scale of every channel passes unchanged.

        channels: of each operand.
        """
        operation = self.operations[number]
        carriers = [i for i, x in enumerate(channels) if x is not None]
        first = channels[carriers[0]]
        before = self._operand_shape(number, carriers[0])
        after = operation.shape
        keeps_dim = len(before) == len(after) and before[first.dim] == after[first.dim]

        if operation.name in ("add", "sub"):  # both operands are scaled alike, and none is broadcast
            shapes = {after, *(self._operand_shape(number, i) for i in carriers)}
            are_alike = carriers == [0, 1] and channels[0] == channels[1]
            return first if are_alike and len(shapes) == 1 else None
        if operation.name == "mul":  # only one factor is scaled
            return first if len(carriers) == 1 and keeps_dim else None
        if carriers != [0]:
            return None
        if operation.name in SAME:
            return first
        if operation.name in SPATIAL:
            first_position = len(after) - _spatial_dims(operation.name)
            return first if keeps_dim and first.dim < first_position else None
        if operation.name == "constant_pad_nd":
            return first if _pads_zeros_behind(operation, first.dim) else None
        if operation.name in REDUCING:
            return _after_reduction(operation, first, before)
        if operation.name in VIEWS:
            return _after_view(first, before, after)
        return None


def _parameter(module: str, attribute: str) -> str:
    """Return the qualified name of a module's parameter; the module "" is the model."""
    return f"{module}.{attribute}" if module else attribute


def _input_position(product: Operation) -> int:
    """Return which operand of a layer's product is the layer's input: addmm has the bias first."""
    return 1 if product.name == "addmm" else 0


def _is_usual_norm(norm: nn.Module, operation: Operation) -> bool:
    """Tell whether an operation is that of a batch norm of torch, or of a subclass that ends with more operations.

    The norm has running statistics, and the operation reads the norm's own tensors and eps.
    """
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
        return False
    held = {_parameter(operation.module, name) for name in NORMED}
    reads_its_own = held.issuperset(operation.operands[1:]) and operation.settings[-1:] == (norm.eps,)
    return reads_its_own and after_norm(norm) is not None


def _clips(operation: Operation) -> bool:
    """Tell whether an operation limits its input from above."""
    if operation.name == "clamp":
        upper = operation.settings[1:2]
        return upper not in ((), (None,))
    return operation.name in CLIPS


def _spatial_dims(name: str) -> int:
    """Return how many of the last dimensions an operator of SPATIAL works on."""
    if "1d" in name:
        return 1
    return 3 if "3d" in name else 2


def _pads_zeros_behind(operation: Operation, dim: int) -> bool:
    """Tell whether a constant_pad_nd pads zeros to dimensions behind `dim` only."""
    padding, value = (*operation.settings, 0)[:2]
    padded_dims = len(padding) // 2
    return value == 0 and dim < len(operation.shape) - padded_dims


def _after_reduction(operation: Operation, channels: Channels, before: Sequence[int]) -> Channels | None:
    """Return the channels after a reduction over other dimensions; None if it runs over the channels' dimension.

    before: shape of the operand.
    """
    reduced = operation.settings[0] if operation.settings else None
    if not isinstance(reduced, (int, list)):
        return None
    dims = {dim % len(before) for dim in ([reduced] if isinstance(reduced, int) else reduced)}
    if not dims or channels.dim in dims:  # no dimensions mean all of them
        return None
    if len(operation.shape) == len(before):  # keepdim
        return channels
    removed_before = sum(dim < channels.dim for dim in dims)
    return Channels(channels.dim - removed_before, channels.repeats)


def _after_view(channels: Channels, before: Sequence[int], after: Sequence[int]) -> Channels | None:
    """Return the channels after a view: the dimension that starts where the channels' did, and has all of them.

    The dimension may take in dimensions behind, as flatten does: each channel then has several entries.
    """
    size_before = before[channels.dim]
    entries = math.prod(before[channels.dim :])
    for dim, size in enumerate(after):
        if size % size_before == 0 and math.prod(after[dim:]) == entries:
            return Channels(dim, channels.repeats * (size // size_before))
    return None
