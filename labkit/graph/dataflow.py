"""Who feeds whom: which layers read what a layer or norm makes, and does all between let the scale of a channel pass?

Reads the operations of a trace of `pruning.coupling`, on the meta device: no value is looked at, so what is found holds
for every input. Changes nothing; `fold` does.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from labkit.errors import InputError
from labkit.graph import tracing
from labkit.graph.subclasses import after_norm

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMED = ("weight", "bias", "running_mean", "running_var")  # what a batch norm holds and reads

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
    """An operation whose result is, channel by channel, linear in some parameters: their first dimensions.

    number: of the operation. names: of the parameters, the weight first. dim: the channels' dimension of the result.
    """

    number: int
    module: str
    names: tuple[str, ...]
    dim: int
    is_layer: bool


@dataclass
class Route:
    """Where a source's channels go. readers: {layer: its columns for each channel}. blocked, clip: what else reads
    them, and what clips them; "" for nothing."""

    readers: dict[str, int]
    blocked: str = ""
    clip: str = ""


class Dataflow:
    """The operations of a trace, and which of them are layers whose parameters nothing else uses."""

    @torch.inference_mode(False)  # in that mode composite operators arrive whole, and no layer is known by its product
    def __init__(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self.record = record = tracing.record(model, args, kwargs)
        self.operations, self.returned = record.operations, record.returned
        self.readers: dict[int | str, list[int]] = defaultdict(list)
        for number, operation in enumerate(self.operations):
            for operand in operation.operands:
                if operand is not None:
                    self.readers[operand].append(number)
        self._shared = {name for first, names in record.aliases.items() for name in (first, *names)}
        self._shapes = {name: x.shape for name, x in model.named_parameters()}
        self.layers = {n: name for n in range(len(self.operations)) if (name := self._layer(n, model)) is not None}
        self.sources = [source for n in range(len(self.operations)) if (source := self._source(n))]

    def check_compared(self) -> None:
        """InputError unless the model's output has a number that depends on its input, by which a copy is proved."""
        made = [self.operations[number].shape for number in self.returned if isinstance(number, int)]
        if not any(math.prod(shape) for shape in made):
            raise InputError(
                "The model's output holds no tensor with a number in it that its input decides, so that no copy can be "
                "proved to be equal: give an example input that is not empty, and a model that returns tensors."
            )

    def _private(self, name: int | str | None) -> bool:
        """Whether it is a parameter that is met by one operation only."""
        return name in self._shapes and name not in self._shared and len(self.readers[name]) == 1

    def _input(self, number: int) -> int:
        """Which operand of a product is what the layer is called with."""
        return 1 if self.operations[number].name == "addmm" else 0

    def _layer(self, number: int, model: nn.Module) -> str | None:
        """The name of the convolution or Linear that this operation is the product of."""
        operation = self.operations[number]
        transposed = any(x is True for x in operation.settings)
        if operation.name not in ("convolution", "mm", "addmm") or transposed:
            return None
        at = self._input(number)
        weight = operation.operands[at + 1]
        if isinstance(weight, int) and self.operations[weight].name == "t" and len(self.readers[weight]) == 1:
            weight = self.operations[weight].operands[0]
        bias = [x for i, x in enumerate(operation.operands) if i not in (at, at + 1)]
        names = [f"{operation.module}.{kind}".lstrip(".") for kind in ("weight", "bias")]
        fits = weight == names[0] and bias in ([], [names[1]]) and all(map(self._private, [weight, *bias]))
        return operation.module if fits and isinstance(model.get_submodule(operation.module), LAYERS) else None

    def _source(self, number: int) -> Source | None:
        operation = self.operations[number]
        module, last = operation.module, len(operation.shape) - 1
        if number in self.layers:
            weight = f"{module}.weight".lstrip(".")
            names = (weight, *(x for x in operation.operands if x == f"{module}.bias".lstrip(".")))
            dim = last if operation.name != "convolution" else last + 2 - len(self._shapes[weight])
            return Source(number, module, names, dim, True)
        if operation.name not in ("native_layer_norm", "mul"):
            return None
        names = tuple(x for x in operation.operands if isinstance(x, str))
        vectors = all(self._private(x) and tuple(self._shapes[x]) == operation.shape[-1:] for x in names)
        fits = vectors and len(names) in ((1, 2) if operation.name == "native_layer_norm" else (1,))
        return Source(number, module, names, last, False) if fits else None

    def folds(self, model: nn.Module) -> list[tuple[str, str]]:
        """(layer, batch norm) where only the norm reads the layer, and nothing else reads what the norm holds."""
        pairs = []
        for number, operation in enumerate(self.operations):
            norm, before = model.get_submodule(operation.module), operation.operands[:1]
            if "batch_norm" not in operation.name or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            held = {f"{operation.module}.{name}".lstrip(".") for name in NORMED}
            usual = held.issuperset(operation.operands[1:]) and operation.settings[-1:] == (norm.eps,)
            if not usual or norm.running_mean is None or after_norm(norm) is None:
                continue
            alone = all(self.readers[x] == [number] for x in operation.operands) and self.returned.isdisjoint(before)
            if alone and before[0] in self.layers:
                pairs.append((self.layers[before[0]], operation.module))
        return pairs

    def route(self, source: Source) -> Route:
        """Follows the channels through whatever lets a scale pass, up to the layers that read them."""
        route = Route({})
        carried = {source.number: (source.dim, 1)}  # {operation: (channels' dimension, its entries for each channel)}
        pending = set(self.readers[source.number])
        route.blocked = "an output of the model" if source.number in self.returned else ""
        while pending:
            number = min(pending)
            pending.remove(number)
            operation = self.operations[number]
            along = [carried.get(operand) for operand in operation.operands]
            if number in self.layers and self._reads(number, along):
                route.readers[self.layers[number]] = along[self._input(number)][1]
                continue
            after = self._passed(number, along)
            if after is None or number in self.returned:
                place = f"{operation.name} in {operation.module or 'the model'}"
                route.blocked = route.blocked or place
                upper = operation.settings[1:2] if operation.name == "clamp" else ()
                clips = operation.name in CLIPS or upper not in ((), (None,))
                route.clip = route.clip or (place if clips else "")
                continue
            carried[number] = after
            pending.update(self.readers[number])
        return route

    def _reads(self, number: int, along: Sequence[tuple[int, int] | None]) -> bool:
        """Whether the channels come in where this layer takes its channels, and only there."""
        at = self._input(number)
        if [i for i, x in enumerate(along) if x] != [at]:
            return False
        (dim, repeats), positions = along[at], 0
        if self.operations[number].name == "convolution":
            positions = len(self._shapes[f"{self.layers[number]}.weight".lstrip(".")]) - 2
        last = len(self._shape(number, at)) - 1
        return dim == last - positions and (repeats == 1 or not positions)

    def _shape(self, number: int, at: int) -> tuple[int, ...]:
        """Of an operand that an operation made."""
        return self.operations[self.operations[number].operands[at]].shape

    def _passed(self, number: int, along: Sequence[tuple[int, int] | None]) -> tuple[int, int] | None:
        """`along`'s entry after this operation, if the scale of every channel comes out as it went in."""
        operation, carriers = self.operations[number], [i for i, x in enumerate(along) if x]
        dim, repeats = along[carriers[0]]
        before, shape, name = self._shape(number, carriers[0]), operation.shape, operation.name
        same = len(before) == len(shape) and before[dim] == shape[dim]
        if name in ("add", "sub"):  # of what is scaled alike
            shapes = {self._shape(number, i) for i in carriers} | {shape}
            return (dim, repeats) if carriers == [0, 1] and along[0] == along[1] and len(shapes) == 1 else None
        if name == "mul":  # by what is not scaled
            return (dim, repeats) if len(carriers) == 1 and same else None
        if carriers != [0]:
            return None
        if name in SAME:
            return dim, repeats
        if name in SPATIAL:
            positions = 3 if "3d" in name else 1 if "1d" in name else 2
            return (dim, repeats) if same and dim < len(shape) - positions else None
        if name == "constant_pad_nd":
            padding, value = (*operation.settings, 0)[:2]
            return (dim, repeats) if value == 0 and dim < len(shape) - len(padding) // 2 else None
        if name in REDUCING and operation.settings and isinstance(operation.settings[0], (int, list)):
            dims = operation.settings[0]
            dims = {d % len(before) for d in ([dims] if isinstance(dims, int) else dims)} or {dim}
            fewer = sum(d < dim for d in dims) if len(shape) < len(before) else 0
            return None if dim in dims else (dim - fewer, repeats)
        if name in VIEWS:
            entries = math.prod(before[dim:])
            for d, size in enumerate(shape):
                if size % before[dim] == 0 and math.prod(shape[d:]) == entries:
                    return d, repeats * (size // before[dim])
        return None
