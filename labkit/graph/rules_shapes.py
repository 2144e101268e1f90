"""Rules of shapes: views, cuts and joins move labels, and note sizes that a forward pass may hold as numbers."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from labkit.graph.record import Sized
from labkit.graph.rules import POSITIONS, Call, aligned, positive_dims, rule
from labkit.graph.spans import Span, Spans, moved, reshaped, shown, span_at, spans_off, without

INDEXED = "is indexed by a tensor"


def _dim(call: Call, position: int, x: Tensor) -> int:
    """Return the dimension of `x` in argument number `position`, by default the first."""
    return call.argument(position, 0) % x.dim()


# --- views ------------------------------------------------------------------------------------------------------------


@rule("view")
def view(call: Call) -> Spans:
    """View the operand in a new shape, with the same order of elements."""
    x, out = call.args[0], call.out
    spans: Spans = ()
    if x.numel():
        spans = reshaped(call.record.labels, call.spans(x), x.shape, out.shape)
    if call.record.whole_heads:
        inside_heads = {span.dims[-1] for span in spans if len(span.dims) > 1}
        spans = call.fix(spans, inside_heads, "")
    call.record_sizes(out, spans)
    return spans


@rule("as_strided")
def as_strided(call: Call) -> Spans | None:
    """Pass the labels on where only strides of dimensions of size 1 change (pooling of channels-last inputs)."""
    x, out = call.args[0], call.out
    same = x.shape == out.shape and _layout(x) == _layout(out)
    return call.spans(x) if same else None


def _layout(x: Tensor) -> list[tuple[int, int]]:
    """Return (size, stride) of each dimension with several entries."""
    layout = zip(x.shape, x.stride(), strict=True)
    return [(size, stride) for size, stride in layout if size > 1]


@rule("permute")
def permute(call: Call) -> Spans:
    """Reorder the dimensions."""
    x, order = call.args[:2]
    order = [dim % x.dim() for dim in order]
    new_dims = [order.index(dim) for dim in range(x.dim())]
    return moved(call.spans(x), new_dims)


@rule("transpose")
def transpose(call: Call) -> Spans:
    """Exchange two dimensions, by default the first two (aten.t)."""
    x = call.args[0]
    if x.dim() < 2:
        return call.spans(x)
    a = call.argument(1, 0) % x.dim()
    b = call.argument(2, 1) % x.dim()
    new_dims = list(range(x.dim()))
    new_dims[a], new_dims[b] = b, a
    return moved(call.spans(x), new_dims)


@rule("unsqueeze")
def unsqueeze(call: Call) -> Spans:
    """Insert a dimension of size 1."""
    x, dim = call.args[:2]
    new_dims = _dims_around(dim % call.out.dim(), x.dim())
    return moved(call.spans(x), new_dims)


def _dims_around(inserted: int, n: int) -> list[int]:
    """Return the new number of each of `n` dimensions after the insertion of dimension `inserted`."""
    return [dim + 1 if dim >= inserted else dim for dim in range(n)]


@rule("squeeze")
def squeeze(call: Call) -> Spans:
    """Drop the named dimensions of size 1, by default all of size 1."""
    x = call.args[0]
    if not x.dim():
        return call.spans(x)
    named = positive_dims(call.argument(1, range(x.dim())), x)
    gone = {dim for dim in named if x.shape[dim] == 1}
    return without(call.spans(x), gone, x.dim(), call.out.dim())


@rule("expand")
def expand(call: Call) -> Spans:
    """Repeat dimensions of size 1: they follow the tensors beside the result. All else keeps the labels."""
    x, out = call.args[0], call.out
    shift = out.dim() - x.dim()
    repeated = list(range(shift))  # the new dimensions in front
    for dim, size in enumerate(x.shape, start=shift):
        if size != out.shape[dim]:
            repeated.append(dim)
    spans = [*call.side(x).spans]
    spans += call.record.free(out, repeated)
    call.record_sizes(out, spans)
    return tuple(spans)


@rule("repeat")
def repeat(call: Call) -> Spans:
    """Repeat labels as the entries; a repeated dimension of size 1 follows the tensors beside the result."""
    x, times = call.args[:2]
    spans = []
    for span in call.side(x).spans:
        span_times = [times[dim] for dim in span.dims]
        spans.append(Span(span.dims, np.tile(span.labels, span_times)))
    of_size_one = [dim for dim, size in enumerate(call.out.shape) if size == times[dim]]
    spans += call.record.free(call.out, of_size_one)
    call.record_sizes(call.out, spans)
    return tuple(spans)


@rule("flip")
def flip(call: Call) -> Spans:
    """Reverse dimensions, labels included."""
    x, dims = call.args[:2]
    reversed_dims = positive_dims(dims, x)
    spans = []
    for span in call.spans(x):
        axes = [axis for axis, dim in enumerate(span.dims) if dim in reversed_dims]
        spans.append(Span(span.dims, np.flip(span.labels, axes)))
    return tuple(spans)


@rule("roll")
def roll(call: Call) -> Spans:
    """Fix rolled dimensions, by default all: entries wrap around."""
    x = call.args[0]
    dims = call.argument(2, None) or range(x.dim())
    return call.fixed(x, positive_dims(dims, x), "is rolled")


@rule("gathered")
def gathered(call: Call) -> Spans:
    """Turn [.., C k, ...] into [.., C, ...]: the k channels of one output channel go together.

    k is r r in pixel_shuffle(r), and the size of the kernel in col2im.
    """
    x = call.args[0]
    dim = x.dim() - (3 if call.name == "pixel_shuffle" else 2)
    labels, spans = call.isolate(call.spans(x), dim)
    if labels is None:
        return spans
    channels = call.out.shape[dim]
    rows = labels.reshape(channels, -1)
    call.tie_rows(rows)
    rest = spans_off(spans, dim)
    if channels == 1:
        return rest
    return (*rest, Span((dim,), rows[:, 0]))


@rule("im2col")
def im2col(call: Call) -> Spans:
    """Turn [.., C, H, W] into [.., C k, L]: k rows of each channel."""
    x = call.args[0]
    dim = x.dim() - 3
    spans = call.fixed(x, (dim + 1, dim + 2), POSITIONS)
    labels, spans = call.isolate(spans, dim)
    rest = spans_off(spans, dim)
    if labels is None:
        return rest
    rows_per_channel = call.out.shape[dim] // len(labels)
    return (*rest, Span((dim,), np.repeat(labels, rows_per_channel)))


# --- joins ------------------------------------------------------------------------------------------------------------


@rule("cat")
def cat(call: Call) -> Spans:
    """Join the labels of the parts along the dimension; the remaining dimensions are tied, as in a sum."""
    out = call.out
    dim = _dim(call, 1, out)
    parts = [x for x in call.args[0] if x.numel() and x.dim() == out.dim()]  # torch skips empty parts
    reason = "is joined with a part of fixed size"
    spans_of_parts = [call.spans(x) for x in parts]
    fixed = _not_shared(spans_of_parts, dim)
    spans_of_parts = [call.fix(spans, fixed, reason) for spans in spans_of_parts]
    sides = []
    for x, spans in zip(parts, spans_of_parts, strict=True):
        sides.append(aligned(x, out, spans_off(spans, dim)))
    result = call.combine(sides)
    along = [span_at(spans, dim) for spans in spans_of_parts]
    labelled = [span for span in along if span is not None]
    if not labelled:
        return result
    pieces = []
    for x, span in zip(parts, along, strict=True):
        if span is not None:
            pieces.append(span.labels)
        else:
            labels = call.record.labels.fresh(x.shape[dim])
            call.record.labels.pin(labels, call.because(reason))
            pieces.append(labels)
    joined_dims = labelled[0].dims
    joined = np.concatenate(pieces, axis=joined_dims.index(dim))
    return (*result, Span(joined_dims, joined))


def _not_shared(spans: Sequence[Spans], dim: int) -> set[int]:
    """Return the dimensions to be fixed before parts with `spans` can be joined along `dim`.

    If the parts have labels for different dimensions (heads, and positions inside heads), the common dimensions stay
    free.
    """
    along = []
    for part in spans:
        span = span_at(part, dim)
        if span is not None:
            along.append(set(span.dims))
    if along and len(along) == len(spans):
        return set.union(*along) - set.intersection(*along)
    return {dim} if any(len(dims) > 1 for dims in along) else set()


@rule("stack")
def stack(call: Call) -> Spans:
    """Tie the operands, and insert a dimension."""
    operands = call.args[0]
    sides = [aligned(x, x, call.spans(x)) for x in operands]
    dim = _dim(call, 1, call.out)
    new_dims = _dims_around(dim, operands[0].dim())
    return moved(call.combine(sides), new_dims)


# --- parts ------------------------------------------------------------------------------------------------------------


def _cut(call: Call, x: Tensor, dim: int, start: int, length: int, step: int = 1) -> Spans:
    """Return the spans of `x[start : start + length * step : step]` along dimension `dim`.

    In a span of several dimensions the cut dimension is fixed, with the labels of the part. A dimension with a span
    for itself stays prunable, evenly over pieces of a size, if the places of the cuts are numbers that can follow
    (trials in `groups` show this). Of interleaved parts, x[::2] and x[1::2], neighbours go together.
    """
    spans = call.spans(x)
    span = span_at(spans, dim)
    if span is None or length == x.shape[dim]:
        return spans
    rest = tuple(other for other in spans if other is not span)
    if len(span.dims) > 1:
        axis = span.dims.index(dim)
        call.tie(span.labels.take([0], axis), span.labels)
        positions = range(start, start + length * step, step)
        return (*rest, Span(span.dims, span.labels.take(positions, axis)))
    if not length:
        return rest
    if step > 1:
        if start >= step or length * step != x.shape[dim]:
            return call.fix(spans, (dim,), "is cut at fixed positions")
        neighbours = span.labels.reshape(-1, step)
        call.tie_rows(neighbours)
        return (*rest, Span((dim,), neighbours[:, start]))
    stop = start + length
    reason = call.because("is cut into pieces of a fixed size")
    call.record.labels.keep_cut(span.labels, start, stop, reason)
    return (*rest, Span((dim,), span.labels[start:stop]))


@rule("slice")
def slice_(call: Call) -> Spans:
    """Take a part of a dimension; the forward pass may hold the ends of the part as numbers."""
    x, out = call.args[0], call.out
    dim = _dim(call, 1, x)
    size = x.shape[dim]
    bounds = slice(call.argument(2, None), call.argument(3, None), call.argument(4, None))
    start, end, step = bounds.indices(size)
    call.record_sizes(x, call.spans(x), {dim})
    span = span_at(call.spans(x), dim)
    if span is not None and len(span.dims) == 1 and step == 1:
        call.before = span.labels[:start]
        for position in (start, end):
            if 0 < position < size:
                sized = Sized(call.module, position, span.labels[:position], 0)
                call.record.sizes.append(sized)
    spans = _cut(call, x, dim, start, out.shape[dim], step)
    call.record_sizes(out, spans)
    return shown(spans, out.shape)


@rule("split")
def split(call: Call) -> list[Spans]:
    """Cut a dimension into pieces, of equal sizes or of a list of sizes."""
    x = call.args[0]
    dim = _dim(call, 2, x)
    call.record_sizes(x, call.spans(x), {dim})  # half of a width, say
    results, start = [], 0
    for part in call.out:
        length = part.shape[dim]
        spans = _cut(call, x, dim, start, length)
        call.record_sizes(part, spans)
        results.append(shown(spans, part.shape))
        start += length
    return results


def _entry(call: Call, x: Tensor, dim: int, index: int) -> Spans:
    """Return the spans of entry `index` of dimension `dim`; the dimension keeps its size and is dropped."""
    spans = call.spans(x)
    span = span_at(spans, dim)
    if span is not None and len(span.dims) == 1:
        spans = call.fix(spans, (dim,), "is indexed at a fixed position")
    elif span is not None:
        axis = span.dims.index(dim)
        call.tie(span.labels.take([0], axis), span.labels)
        entry = Span(span.dims, span.labels.take([index], axis))
        spans = tuple(entry if other is span else other for other in spans)
    new_dims: list[int | None] = list(range(x.dim() - 1))
    new_dims.insert(dim, None)
    return moved(spans, new_dims)


@rule("select")
def select(call: Call) -> Spans:
    """Take a single entry of a dimension."""
    x = call.args[0]
    dim = _dim(call, 1, x)
    index = call.args[2] % x.shape[dim]
    return _entry(call, x, dim, index)


@rule("unbind")
def unbind(call: Call) -> list[Spans]:
    """Take the entries of a dimension apart."""
    x = call.args[0]
    dim = _dim(call, 1, x)
    return [_entry(call, x, dim, index) for index in range(len(call.out))]


# --- entries picked by tensors ----------------------------------------------------------------------------------------


@rule("index")
def index(call: Call) -> Spans:
    """Index by tensors, x[i, j, :]: the indexed dimensions keep their sizes."""
    x, indices = call.args[:2]
    for tensor in indices:
        if tensor is not None:
            call.fixed(tensor, range(tensor.dim()), "")
    indexed = [dim for dim, tensor in enumerate(indices) if tensor is not None]
    spans = call.fixed(x, indexed, INDEXED)
    return moved(spans, _dims_after_index(indexed, x.dim(), call.out.dim()))


def _dims_after_index(indexed: list[int], before: int, after: int) -> list[int | None]:
    """Return the new number of each dimension after an index by tensors, None for indexed dimensions.

    The dimensions of the index stand in the place of the first indexed dimension, or in front of all if the indexed
    dimensions are not adjacent.

    before, after: the number of dimensions of the operand and of the result.
    """
    of_index = after - (before - len(indexed))
    first, last = indexed[0], indexed[-1]
    adjacent = len(indexed) == last - first + 1
    new_dims: list[int | None] = []
    position = 0 if adjacent else of_index
    for dim in range(before):
        if dim not in indexed:
            new_dims.append(position)
            position += 1
            continue
        new_dims.append(None)
        if adjacent and dim == first:
            position += of_index
    return new_dims


@rule("index_select")
def index_select(call: Call) -> Spans:
    """Pick entries of a dimension by a tensor: the dimension keeps its size."""
    x = call.args[0]
    dim = _dim(call, 1, x)
    return call.fixed(x, (dim,), INDEXED)


def _indexed(call: Call, *operands: Tensor) -> Spans | None:
    """Tie tensors with dimension `args[1]` indexed entry by entry; the indexed dimension keeps its size.

    An index of real integers has no labels, but a size: if a forward pass expands the index to the channels, it
    follows them. Returns None for an index over a part of the remaining dimensions only.
    """
    out, index = call.out, call.args[2]
    dim = _dim(call, 1, out)
    passed = [d for d in range(out.dim()) if d != dim]
    index_has_all_dims = index.dim() == out.dim()
    tensors = [index, *operands] if index_has_all_dims else operands
    for x in tensors:
        if any(x.shape[d] != out.shape[d] for d in passed):
            return None
    labelled = list(operands)
    if index_has_all_dims and any(span_at(call.spans(index), d) for d in passed):
        labelled.append(index)
    sides = []
    for x in labelled:
        spans = call.fixed(x, (dim,), INDEXED)
        sides.append(aligned(x, out, spans))
    return call.combine(sides)


@rule("scatter")
def scatter(call: Call) -> Spans | None:
    """Sum or write entries at the places of an index, as graph networks do over edges, channel by channel."""
    x, source = call.args[0], call.argument(3, None)
    return _indexed(call, x, source) if isinstance(source, Tensor) else _indexed(call, x)


@rule("gather")
def gather(call: Call) -> Spans | None:
    """Pick entries of a dimension, with an index of as many dimensions as the operand."""
    return _indexed(call, call.args[0])
