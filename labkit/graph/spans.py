"""Spans: the labels along a tensor's dimensions, and the way of labels when it changes shape.

A span holds the labels of some dimensions of a tensor. The functions tie and move spans for steps common to many
operators: an elementwise result, a reordering of dimensions, a view. Operators themselves are known to `rules` only.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from labkit.graph.labels import Labels


class Span(NamedTuple):
    """Labels along some dimensions of a tensor; a dimension without a span never changes in size.

    A convolution's output [N, C, H, W] has a span on dimension 1. A Linear's output [N, L, 768] viewed as
    [N, L, 12, 64] has a span on dimensions 2 and 3: heads may go, or positions inside the heads; later operators
    decide.

    dims: the dimensions, rising.
    labels: an array with an axis for each of `dims`, of the same sizes.
    """

    dims: tuple[int, ...]
    labels: np.ndarray


Spans = tuple[Span, ...]


class Side(NamedTuple):
    """An operand of an elementwise operator, aligned with the dimensions of the result.

    spans: the operand's spans.
    present: the dimensions in which the operand is not broadcast.
    """

    spans: Spans
    present: frozenset[int]


def span_at(spans: Iterable[Span], dim: int) -> Span | None:
    """Return the span on dimension `dim`, None if the dimension has no labels."""
    for span in spans:
        if dim in span.dims:
            return span
    return None


def spans_off(spans: Iterable[Span], dim: int) -> Spans:
    """Return the spans without the span on dimension `dim`."""
    return tuple(span for span in spans if dim not in span.dims)


def fix(labels: Labels, spans: Spans, dims: Iterable[int], reason: str) -> Spans:
    """Keep the sizes of some dimensions from now on.

    A span with all dimensions in `dims` ends: the labels are pinned. A span with further dimensions lives on without
    `dims`: the labels are tied along the fixed dimensions (the 64 positions of each head).

    labels: receives the ties and pins.
    spans: spans of the tensor.
    dims: the dimensions to keep.
    reason: told to a user as the reason why the entries stay.
    Returns the spans of the dimensions free to shrink.
    """
    dims = frozenset(dims)
    result = []
    for span in spans:
        fixed_axes = tuple(axis for axis, dim in enumerate(span.dims) if dim in dims)
        if not fixed_axes:
            result.append(span)
        elif len(fixed_axes) == len(span.dims):
            labels.pin(span.labels, reason)
        else:
            first = _first_along(span.labels, fixed_axes)
            labels.tie(first, span.labels)
            free_dims = tuple(dim for dim in span.dims if dim not in dims)
            result.append(Span(free_dims, first.squeeze(fixed_axes)))
    return tuple(result)


def _first_along(array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """Return the first slice along each of `axes`; the axes stay, with length 1."""
    index = [slice(None)] * array.ndim
    for axis in axes:
        index[axis] = slice(0, 1)
    return array[tuple(index)]


# --- elementwise operators ------------------------------------------------------------------------------------------


def combine(labels: Labels, sides: Sequence[Side], reason: str) -> Spans:
    """Tie the operands of an elementwise operator: labels at the same place go together.

    labels: receives the ties and pins.
    sides: the operands.
    reason: why a dimension stays beside an operand of fixed size.
    Returns the spans of the result.
    """
    spans = [side.spans for side in sides]
    while conflict := _conflict(labels, spans, sides):
        side, dim = conflict
        spans[side] = fix(labels, spans[side], (dim,), reason)
    result: dict[tuple[int, ...], Span] = {}
    for side_spans in spans:
        for span in side_spans:
            earlier = result.setdefault(span.dims, span)
            labels.tie(earlier.labels, span.labels)
            if labels.constant(earlier.labels):
                result[span.dims] = span
    return tuple(result.values())


class _SideSpan(NamedTuple):
    """A side, by its number, and a span of the side."""

    side: int
    span: Span


def _conflict(labels: Labels, spans: Sequence[Spans], sides: Sequence[Side]) -> tuple[int, int] | None:
    """Return the first (side, dimension) to be fixed before the spans of all sides agree, None if all agree."""
    for i, side_spans in enumerate(spans):
        for span in side_spans:
            for j, other in enumerate(sides):
                if i == j:
                    continue
                for dim in span.dims:
                    if dim not in other.present:
                        continue
                    match = span_at(spans[j], dim)
                    if match is None:
                        return i, dim
                    if span.dims != match.dims:
                        return _to_fix(labels, _SideSpan(i, span), _SideSpan(j, match), dim)
    return None


def _to_fix(labels: Labels, first: _SideSpan, second: _SideSpan, dim: int) -> tuple[int, int]:
    """Return the (side, dimension) to be fixed if two spans meet on `dim` and differ in further dimensions.

    Of a span of several dimensions and a span of fewer, the shared dimensions stay prunable. A constant's span does not
    decide: heads stay prunable though a table of rotary positions is multiplied to the positions inside the heads.
    """
    (i, span), (j, match) = first, second
    if len(span.dims) > 1 and _only_first_is_constant(labels, match, span):
        return i, dim
    if len(match.dims) > 1 and _only_first_is_constant(labels, span, match):
        return j, dim
    last = max(set(span.dims) ^ set(match.dims))
    return (i, last) if last in span.dims else (j, last)


def _only_first_is_constant(labels: Labels, first: Span, second: Span) -> bool:
    return labels.constant(first.labels) and not labels.constant(second.labels)


# --- dimensions that move or go -------------------------------------------------------------------------------------


def moved(spans: Spans, new_dims: Sequence[int | None]) -> Spans:
    """Rename dimensions: `new_dims[d]` is the new number of dimension d, None to drop a dimension of size 1."""
    result = []
    for span in spans:
        renamed = [new_dims[dim] for dim in span.dims]
        dropped = tuple(axis for axis, dim in enumerate(renamed) if dim is None)
        dims = [dim for dim in renamed if dim is not None]
        if dims:
            order = np.argsort(dims)
            array = span.labels.squeeze(dropped).transpose(order)
            result.append(Span(tuple(sorted(dims)), array))
    return tuple(result)


def without(spans: Spans, dims: Iterable[int], before: int, after: int) -> Spans:
    """Renumber the dimensions after a reduction over `dims`; the reduced dimensions carry no labels.

    before, after: the number of dimensions of operand and result, equal for a reduction that keeps dimensions of
    size 1.
    """
    if before == after:
        return spans
    removed_dims = set(dims)
    new_dims: list[int | None] = []
    position = 0
    for dim in range(before):
        if dim in removed_dims:
            new_dims.append(None)
        else:
            new_dims.append(position)
            position += 1
    return moved(spans, new_dims)


def shown(spans: Spans, shape: Sequence[int]) -> Spans:
    """Return the spans of a part of a tensor, of shape `shape`.

    A dimension of size 1 carries no labels, and an empty part has no spans at all.
    """
    result = []
    for span in spans:
        dims = tuple(dim for dim in span.dims if shape[dim] > 1)
        if dims and span.labels.size:
            sizes = [shape[dim] for dim in dims]
            result.append(Span(dims, span.labels.reshape(sizes)))
    return tuple(result)


# --- views ----------------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Neighbouring dimensions of an old and of a new shape with the same elements."""

    old: list[int]
    new: list[int]

    @property
    def is_one_dimension(self) -> bool:
        return len(self.old) == len(self.new) == 1


def reshaped(labels: Labels, spans: Spans, old: Sequence[int], new: Sequence[int]) -> Spans:
    """Return the spans of a tensor of shape `old` viewed in shape `new`; the order of the elements stays.

    labels: receives a constraint for a dimension split in several: only whole slices along a new dimension go.
    """
    runs = _runs(old, new)
    run_of_dim = {dim: number for number, run in enumerate(runs) for dim in run.old}
    result = []
    taken: set[int] = set()  # runs that carry an earlier span
    for span in sorted(spans, key=lambda span: (labels.constant(span.labels), span.dims)):
        touched = sorted({run_of_dim[dim] for dim in span.dims})
        span_runs = [runs[number] for number in touched]
        if not taken.isdisjoint(touched):  # repeated for each of the earlier span's entries
            is_constant = labels.constant(span.labels)
            labels.pin(span.labels, "" if is_constant else "is joined with another dimension")
        elif all(run.is_one_dimension for run in span_runs):
            dims = tuple(run.new[0] for run in span_runs)
            result.append(Span(dims, span.labels))
        else:
            result.append(_reshaped_span(labels, span, span_runs, old, new))
        taken.update(touched)
    return tuple(result)


def _reshaped_span(labels: Labels, span: Span, runs: list[_Run], old: Sequence[int], new: Sequence[int]) -> Span:
    """Return a span viewed in shape `new`, without the new dimensions along which all labels are equal."""
    old_dims = [dim for run in runs for dim in run.old]
    new_dims = [dim for run in runs for dim in run.new]
    shape_of_labels = [old[dim] if dim in span.dims else 1 for dim in old_dims]
    old_shape = [old[dim] for dim in old_dims]
    new_shape = [new[dim] for dim in new_dims]
    array = np.broadcast_to(span.labels.reshape(shape_of_labels), old_shape).reshape(new_shape)
    constant_axes = tuple(axis for axis in range(array.ndim) if _is_constant_along(array, axis))
    array = _first_along(array, constant_axes).squeeze(constant_axes)
    if array.ndim > 1:
        labels.keep_product(array)
    dims = tuple(dim for axis, dim in enumerate(new_dims) if axis not in constant_axes)
    return Span(dims, array)


def _is_constant_along(array: np.ndarray, axis: int) -> bool:
    return bool((array == array.take([0], axis)).all())


def _runs(old: Sequence[int], new: Sequence[int]) -> list[_Run]:
    """Pair the smallest runs of dimensions of `old` and of `new` with the same elements."""
    runs = []
    i = j = 0
    while i < len(old) or j < len(new):
        run = _Run([], [])
        old_size = new_size = 1
        if i < len(old):
            run.old.append(i)
            old_size = old[i]
            i += 1
        if j < len(new):
            run.new.append(j)
            new_size = new[j]
            j += 1
        while old_size != new_size:
            if old_size < new_size:
                run.old.append(i)
                old_size *= old[i]
                i += 1
            else:
                run.new.append(j)
                new_size *= new[j]
                j += 1
        runs.append(run)
    return runs
