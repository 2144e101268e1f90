"""Follow channels from the layer or norm that makes them to the layers that read them.

`Dataflow` reads the trace of a model on the meta device (`tracing.record`). No value is looked at, so the answers hold
for every input. `Dataflow.folds` lists the batch norms to be folded into a layer; `Dataflow.route` tells whether all
operations on the way let a scale of each channel pass. `quantization.fold` changes the model.
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
from labkit.graph.operators import ROWS
from labkit.graph.record import Operation
from labkit.graph.subclasses import after_norm

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMED = ("weight", "bias", "running_mean", "running_var")  # tensors that a batch norm holds and reads
VECTORS = {"native_layer_norm": (1, 2), "mul": (1,)}  # allowed numbers of parameters of sources that are no layers


@dataclass(frozen=True)
class Source:
    """An operation whose result is, channel by channel, linear in the first dimension of its parameters.

    number: number of the operation in the trace.
    module: the layer's or norm's name.
    names: names of the parameters, the weight first.
    dim: the dimension of the result that runs over channels.
    is_layer: True for a layer, False for a norm.
    """

    number: int
    module: str
    names: tuple[str, ...]
    dim: int
    is_layer: bool


@dataclass
class Route:
    """The layers reached by a source's channels.

    readers: {layer: number of input columns for each channel}.
    blocked: the first place at which a scale of the channels would not pass; "" on a free route.
    clip: the first blocked place at which the channels are clipped from above; "" on a route without clipping.
    """

    readers: dict[str, int]
    blocked: str = ""
    clip: str = ""


class Channels(NamedTuple):
    """The channels of a source in the result of an operation.

    dim: the dimension that runs over channels.
    repeats: entries of the dimension for each channel, side by side.
    """

    dim: int
    repeats: int


# --- operators that let a scale of each channel pass ------------------------------------------------------------------

# A rule finds the channels in the result of an operator f with a single scaled operand x: rule(operation, channels of
# x, shape of x) -> channels of the result; None unless f(s x) = s f(x) for a scale s of each channel.


def _unchanged(operation: Operation, channels: Channels, before: Sequence[int]) -> Channels | None:
    return channels


def _of_same_size(operation: Operation, channels: Channels, before: Sequence[int]) -> Channels | None:
    """Return the channels if their dimension has the same place and size in the result."""
    after = operation.shape
    if len(before) != len(after):
        return None
    return channels if before[channels.dim] == after[channels.dim] else None


def _over_positions(operation: Operation, channels: Channels, before: Sequence[int]) -> Channels | None:
    """Return the channels if the operator works on dimensions behind: the last one, two or three."""
    positions = 2
    for digit in (1, 3):
        if f"{digit}d" in operation.name:
            positions = digit
    first_position = len(operation.shape) - positions
    return _of_same_size(operation, channels, before) if channels.dim < first_position else None


def _padded(operation: Operation, channels: Channels, before: Sequence[int]) -> Channels | None:
    """Return the channels if the padding is of zeros, and in dimensions behind the channels' only."""
    padding, value = (*operation.settings, 0)[:2]  # the value is optional
    first_padded = len(operation.shape) - len(padding) // 2
    return channels if value == 0 and channels.dim < first_padded else None


def _reduced(operation: Operation, channels: Channels, before: Sequence[int]) -> Channels | None:
    """Return the channels if the reduction runs over other dimensions."""
    setting = operation.settings[0] if operation.settings else None  # a dimension, a list of dimensions, or neither
    if not isinstance(setting, (int, list)):
        return None
    dims = [setting] if isinstance(setting, int) else setting
    reduced = {dim % len(before) for dim in dims}
    if not reduced or channels.dim in reduced:  # an empty list stands for all dimensions
        return None
    if len(operation.shape) == len(before):  # keepdim
        return channels
    removed_before = sum(dim < channels.dim for dim in reduced)
    return Channels(channels.dim - removed_before, channels.repeats)


def _viewed(operation: Operation, channels: Channels, before: Sequence[int]) -> Channels | None:
    """Return the channels in the dimension that starts at the same entry as the channels' dimension before the view.

    The dimension may take in dimensions behind, as in flatten: each channel then has several entries.
    """
    after = operation.shape
    size_before = before[channels.dim]
    entries = math.prod(before[channels.dim :])
    for dim, size in enumerate(after):
        starts_there = math.prod(after[dim:]) == entries
        if starts_there and size % size_before == 0:
            repeats = channels.repeats * (size // size_before)
            return Channels(dim, repeats)
    return None


PASSING = {"same": _unchanged, "spatial": _over_positions, "pads": _padded, "reduces": _reduced, "view": _viewed}


def _way_of_scale(operation: Operation) -> str:
    """Return how a scale passes the operator: the column `scale` of the table of `operators`."""
    row = ROWS.get(operation.name)
    return "" if row is None else row.scale


class Dataflow:
    """The operations of a trace, the layers among them, and the readers of each result.

    model, args, kwargs: the model and its example input.

    operations: operations of the trace, in order; the number of an operation is its index.
    returned: numbers of the operations whose results the model returns.
    readers: {number of an operation, or name of a parameter or buffer: numbers of the operations that read the value}.
    sources: the operations whose channels a parameter scales.
    layers: {number of an operation: the source}, for layers whose parameters no other operation reads.
    example: (args, kwargs).
    """

    @torch.inference_mode(False)  # in that mode composite operators arrive whole, and no layer is known by its product
    def __init__(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self.example = (args, kwargs)
        self.record = record = tracing.record(model, args, kwargs)
        self.operations = record.operations
        self.returned = record.returned
        self.readers: dict[int | str, list[int]] = defaultdict(list)
        for number, operation in enumerate(self.operations):
            for operand in operation.operands:
                if operand is not None:
                    self.readers[operand].append(number)
        self._shared: set[str] = set()  # parameters that share memory
        for first, aliases in record.aliases.items():
            self._shared |= {first, *aliases}
        self._shapes = {name: x.shape for name, x in model.named_parameters()}
        self.sources: list[Source] = []
        for number in range(len(self.operations)):
            source = self._layer_of(number, model) or self._vector_of(number)
            if source is not None:
                self.sources.append(source)
        self.layers = {source.number: source for source in self.sources if source.is_layer}

    def check_compared(self) -> None:
        """Raise InputError unless the output has a number computed from the input, for the proof of a copy."""
        computed = [self.operations[number] for number in self.returned if isinstance(number, int)]
        if not any(math.prod(operation.shape) for operation in computed):
            raise InputError(
                "The model's output holds no tensor with a number in it that its input decides, so that no copy can be "
                "proved to be equal: give an example input that is not empty, and a model that returns tensors."
            )

    # --- layers and sources -------------------------------------------------------------------------------------------

    def _is_private(self, name: int | str | None) -> bool:
        """Return True if `name` is a parameter read by a single operation and sharing no memory."""
        is_parameter = name in self._shapes
        return is_parameter and name not in self._shared and len(self.readers[name]) == 1

    def _layer_of(self, number: int, model: nn.Module) -> Source | None:
        """Return the convolution or Linear with this operation as product; None for other operations."""
        operation = self.operations[number]
        is_transposed = any(setting is True for setting in operation.settings)
        if operation.name not in ("convolution", "mm", "addmm") or is_transposed:
            return None
        operands = operation.operands
        at = _input_position(operation)
        weight = self._untransposed(operands[at + 1])
        bias = [*operands[:at], *operands[at + 2 :]]
        has_own_weight = _is_own(operation, weight, ("weight",))
        has_own_bias = all(_is_own(operation, operand, ("bias",)) for operand in bias)
        if not has_own_weight or not has_own_bias:
            return None
        names = (weight, *bias)
        are_private = all(self._is_private(name) for name in names)
        if not are_private or not isinstance(model.get_submodule(operation.module), LAYERS):
            return None
        positions = len(self._shapes[weight]) - 2  # behind the channels: none for a Linear
        dim = len(operation.shape) - 1 - positions
        return Source(number, operation.module, names, dim, is_layer=True)

    def _untransposed(self, operand: int | str | None) -> int | str | None:
        """Return x if `operand` is the transpose of x and has a single reader; else return `operand`."""
        if not isinstance(operand, int):
            return operand
        operation = self.operations[operand]
        is_read_once = len(self.readers[operand]) == 1
        return operation.operands[0] if operation.name == "t" and is_read_once else operand

    def _vector_of(self, number: int) -> Source | None:
        """Return the layer norm or product with a vector that the operation is; None for other operations."""
        operation = self.operations[number]
        names = tuple(x for x in operation.operands if isinstance(x, str))
        if len(names) not in VECTORS.get(operation.name, ()):
            return None
        for name in names:
            if not self._is_private(name) or tuple(self._shapes[name]) != operation.shape[-1:]:
                return None
        last = len(operation.shape) - 1
        return Source(number, operation.module, names, last, is_layer=False)

    # --- batch norms --------------------------------------------------------------------------------------------------

    def folds(self, model: nn.Module) -> list[tuple[str, str]]:
        """Return (layer, batch norm) for each batch norm that can be folded into the layer before.

        The norm is the only reader of the layer's result and of its own tensors.
        """
        pairs = []
        for number, operation in enumerate(self.operations):
            norm = model.get_submodule(operation.module)
            if "batch_norm" not in operation.name or not _is_usual_norm(norm, operation):
                continue
            before = operation.operands[0]
            is_only_reader = all(self.readers[operand] == [number] for operand in operation.operands)
            if is_only_reader and before not in self.returned and before in self.layers:
                pairs.append((self.layers[before].module, operation.module))
        return pairs

    # --- routes -------------------------------------------------------------------------------------------------------

    def route(self, source: Source) -> Route:
        """Follow the channels of a source through all operations that let a scale pass, to the reading layers.

        The operations are visited in the order of the trace, so all operands of an operation are known by then.
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
                name = self.layers[number].module
                route.readers[name] = channels[at].repeats
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
        """Return True if the channels come in at a layer's input channels only.

        channels: channels of each operand of the layer's product.
        """
        at = _input_position(self.operations[number])
        carriers = [i for i, x in enumerate(channels) if x is not None]
        if carriers != [at]:
            return False
        last = len(self._operand_shape(number, at)) - 1
        positions = len(self.operations[number].shape) - 1 - self.layers[number].dim
        are_input_channels = channels[at].dim == last - positions
        fits = channels[at].repeats == 1 or not positions  # a convolution's kernel has no columns side by side
        return are_input_channels and fits

    def _operand_shape(self, number: int, at: int) -> tuple[int, ...]:
        """Return the shape of an operand, the result of an earlier operation."""
        maker = self.operations[number].operands[at]
        return self.operations[maker].shape

    def _after(self, number: int, channels: Sequence[Channels | None]) -> Channels | None:
        """Return the channels in an operation's result; None unless a scale of every channel passes unchanged.

        channels: channels of each operand.
        """
        operation = self.operations[number]
        carriers = [i for i, x in enumerate(channels) if x is not None]
        shapes = [self._operand_shape(number, i) for i in carriers]
        first = channels[carriers[0]]
        if operation.name in ("add", "sub"):  # both operands must be scaled alike, without broadcasting
            are_alike = carriers == [0, 1] and channels[0] == channels[1]
            has_equal_shapes = {operation.shape, *shapes} == {operation.shape}
            return first if are_alike and has_equal_shapes else None
        if operation.name == "mul":  # only a single factor may be scaled
            is_single = len(carriers) == 1
            return _of_same_size(operation, first, shapes[0]) if is_single else None
        rule = PASSING.get(_way_of_scale(operation))
        if rule is None or carriers != [0]:
            return None
        return rule(operation, first, shapes[0])


def _input_position(product: Operation) -> int:
    """Return which operand of a layer's product is the layer's input: addmm has the bias first."""
    return 1 if product.name == "addmm" else 0


def _is_own(operation: Operation, operand: int | str | None, attributes: Sequence[str]) -> bool:
    """Return True if `operand` is a parameter or buffer of the operation's module, among the named attributes."""
    if not isinstance(operand, str):
        return False
    module, _, attribute = operand.rpartition(".")
    return module == operation.module and attribute in attributes


def _is_usual_norm(norm: nn.Module, operation: Operation) -> bool:
    """Return True if an operation is the normalisation by a batch norm of torch or of a subclass.

    The norm has running statistics, the operation reads its tensors and eps, and `after_norm` knows the
    rest of the forward pass.
    """
    is_batch_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if not is_batch_norm or norm.running_mean is None:
        return False
    reads_own_tensors = all(_is_own(operation, operand, NORMED) for operand in operation.operands[1:])
    reads_own_eps = operation.settings[-1:] == (norm.eps,)
    return reads_own_tensors and reads_own_eps and after_norm(norm) is not None


def _clips(operation: Operation) -> bool:
    """Return True if an operation limits its input from above."""
    if operation.name == "clamp":
        upper = operation.settings[1:2]
        return upper not in ((), (None,))
    return _way_of_scale(operation) == "clips"
