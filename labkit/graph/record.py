"""The record of a trace: labelled dimensions of parameters, sizes, products, operations.

`tracing` fills a `Record`, the rules add notes operator by operator, and all later steps (groups of units, trials,
attributes, the equality check) read the notes. `Traced` is the tracer's note about a tensor of the pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from labkit.graph.labels import Labels
from labkit.graph.spans import Span, Spans, fix, span_at

# --- a tensor of the pass -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Traced:
    """The tracer's knowledge of a tensor of the pass.

    spans: the labels of the dimensions.
    origin: the number of the operation by which the tensor was made, the name of the parameter or buffer, or None for
    an input.
    is_weight: True for a parameter or a view of a parameter: a product with the tensor reads channels through the
    summed dimension.
    is_zero: True for the result of zeros(); an entry may have been written since.
    """

    spans: Spans = ()
    origin: int | str | None = None
    is_weight: bool = False
    is_zero: bool = False


def traced(x: Tensor) -> Traced:
    """Return the tracer's note about `x`; a tensor without a note gets an empty note."""
    # An attribute, which dies with its tensor: a dictionary with weak keys would compare tensors element by element.
    try:
        return x._traced
    except AttributeError:
        x._traced = Traced()
        return x._traced


# --- entries of the record ------------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """Dimension `dim` of the parameter or buffer `name`: the indices have the labels base, base + 1, ..."""

    name: str
    dim: int
    size: int
    base: int

    @property
    def labels(self) -> slice:
        return slice(self.base, self.base + self.size)


class Sized(NamedTuple):
    """A size of a tensor in the forward pass of `module`: the pass may hold the size as a number.

    labels: labels of the dimension of the given size, along `axis`; None for a size that stays.
    """

    module: str
    size: int
    labels: np.ndarray | None
    axis: int


class Restricted(NamedTuple):
    """A call of an operator that depends on how many channels there are, such as the mean in a layer norm.

    The equality check runs the dense model as the reference, and lets the call see only the remaining channels.

    name, module, number: the n-th call of an operator in a module.
    argument, dim: the operand and the dimension with `labels`.
    kind: "norm" (statistics of the remaining entries), "statistic" (the result has no such dimension), or "mask" (terms
    of a sum).
    """

    name: str
    module: str
    number: int
    argument: int
    dim: int
    labels: np.ndarray
    kind: str


class Cost(NamedTuple):
    """Multiply-adds of a product.

    macs: number of multiply-adds.
    terms: number of terms in each sum.
    factors: labels; the number shrinks with the remaining share of each array.
    """

    macs: int
    terms: int
    factors: tuple[np.ndarray, ...]


class Operation(NamedTuple):
    """An operator of the traced call, with the shape and the spans of the result.

    operands: the origin (`Traced.origin`) of each tensor among the arguments, in order.
    settings: the remaining positional arguments.
    before: for a slice, the labels of the operand in front of the part.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    spans: Spans
    operands: tuple[int | str | None, ...]
    settings: tuple[Any, ...]
    before: np.ndarray | None = None

    def shape_without(self, gone: np.ndarray) -> list[int]:
        """Return the shape of the result without the labels in `gone`, [labels], bool."""
        shape = list(self.shape)
        for span in self.spans:
            gone_here = gone[span.labels]
            if gone_here.any():
                for axis, dim in enumerate(span.dims):
                    shape[dim] = remaining(gone_here, axis)
        return shape


def remaining(gone: np.ndarray, axis: int) -> int:
    """Count the slices of `gone` along `axis` with some False entry: slices that stay after the cut."""
    other_axes = tuple(i for i in range(gone.ndim) if i != axis)
    return int((~gone).any(other_axes).sum())


# --- the record -----------------------------------------------------------------------------------------------------


@dataclass
class Record:
    """The result of a trace. Parameters and buffers with the same memory go by the first name.

    labels: ties and pins.
    axes: the labelled dimensions of parameters and buffers.
    contracted: labels of parameters over which a product sums.
    sizes, restricted, costs, operations: lists of the classes above; operations in order.
    called: names of the modules that ran.
    returned: the origin (`Traced.origin`) of each output of the model.
    aliases: {first name: further names of the same memory}.
    constants: names of the buffers.
    unmet: {id of an abstract parameter: name} of the parameters without labels so far.
    unused: names of the trainable parameters without an operator.
    names_dtype: True if the forward pass names a floating-point type.
    trained: True if a second pass, in training mode, met parameters not met before.
    within_groups: True to tie, in grouped convolutions, the same channels of every group, not all channels of a group.
    whole_heads: True if a dimension split as [heads, size] may lose entries of the first part only.
    only_couples: True in the second pass, which counts no operator again.
    """

    labels: Labels = field(default_factory=Labels)
    axes: list[Axis] = field(default_factory=list)
    contracted: list[np.ndarray] = field(default_factory=list)
    sizes: list[Sized] = field(default_factory=list)
    restricted: list[Restricted] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    returned: set[int | str | None] = field(default_factory=set)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    constants: frozenset[str] = frozenset()
    unmet: dict[int, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    names_dtype: bool = False
    trained: bool = False
    within_groups: bool = False
    whole_heads: bool = False
    only_couples: bool = False

    # --- parameters ---------------------------------------------------------------------------------------------------

    @cached_property
    def made(self) -> dict[tuple[str, tuple[int, ...]], Operation]:
        """Map (module, shape) to an operation in the module with a result of that shape."""
        return {(operation.module, operation.shape): operation for operation in self.operations}

    def names(self, first: str) -> list[str]:
        """Return all names of the parameter or buffer with the first name `first`."""
        return [first, *self.aliases.get(first, ())]

    def first(self, name: str) -> str:
        """Return the first name of the parameter or buffer `name`."""
        for first, aliases in self.aliases.items():
            if name in aliases:
                return first
        return name

    def kept(self, gone: np.ndarray) -> dict[str, dict[int, Tensor]]:
        """Return {parameter or buffer: {dimension: remaining indices}}, without dimensions that stay whole.

        gone: [labels], bool, True for removed labels.
        """
        keep: dict[str, dict[int, Tensor]] = {}
        for axis in self.axes:
            remains = ~gone[axis.labels]
            if not remains.all():
                (indices,) = remains.nonzero()
                for name in self.names(axis.name):
                    keep.setdefault(name, {})[axis.dim] = torch.from_numpy(indices)
        return keep

    # --- tensors of the pass ------------------------------------------------------------------------------------------

    def spans(self, x: Tensor) -> Spans:
        """Return the spans of `x`; a parameter or buffer gets labels when first met by an operator."""
        name = self.unmet.pop(id(x), None)
        if name is not None:
            note = traced(x)
            note.spans = self._labelled(name, x)
            note.is_weight = True
        return traced(x).spans

    def _labelled(self, name: str, x: Tensor) -> Spans:
        """Give new labels to the parameter or buffer `name`."""
        spans = []
        for dim, size in enumerate(x.shape):
            if size > 1:
                labels = self.labels.fresh(size, constant=name in self.constants)
                base = int(labels[0])
                self.axes.append(Axis(name, dim, size, base))
                spans.append(Span((dim,), labels))
        return tuple(spans)

    def free(self, x: Tensor, dims: Iterable[int]) -> Spans:
        """Give new labels to dimensions of no parameter; the sizes follow the tensors beside `x`."""
        spans = []
        for dim in dims:
            size = x.shape[dim]
            if size > 1:
                labels = self.labels.fresh(size, constant=True)
                spans.append(Span((dim,), labels))
        return tuple(spans)

    def sized(self, module: str, x: Tensor, spans: Iterable[Span], dims: Iterable[int]) -> None:
        """Note sizes of dimensions of `x`: the forward pass of `module` may hold the sizes as numbers."""
        for dim in dims:
            size, span = x.shape[dim], span_at(spans, dim)
            if span is None:
                self.sizes.append(Sized(module, size, None, 0))
            else:
                axis = span.dims.index(dim)
                self.sizes.append(Sized(module, size, span.labels, axis))

    def fix(self, x: Tensor, dims: Iterable[int], reason: str) -> None:
        """Keep the sizes of dimensions `dims` of `x`; `reason` is told to a user."""
        spans = self.spans(x)
        traced(x).spans = fix(self.labels, spans, dims, reason)
