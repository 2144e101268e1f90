"""Rules of `rules`: shapes. Views, cuts and joins move labels about, and say which sizes may be written down."""

import numpy as np
from torch import Tensor

from labkit.graph.labels import Span, Spans, moved, reshaped, shown, span_at, without
from labkit.graph.rules import Call, Sized, aligned, rule


def _dim(c: Call, position: int, n: int, default: int = 0) -> int:
    """The dimension that is argument number `position`, of n."""
    return (c.args[position] if len(c.args) > position else default) % n


@rule("view _unsafe_view reshape _reshape_alias")
def view(c: Call) -> Spans:
    x = c.args[0]
    spans = reshaped(c.record.labels, c.spans(x), x.shape, c.out.shape) if x.numel() else ()
    if c.record.whole_heads:
        spans = c.fix(spans, {span.dims[-1] for span in spans if len(span.dims) > 1}, "")
    c.sized(c.out, spans)
    return spans


@rule("as_strided")
def as_strided(c: Call) -> Spans | None:
    """Only where it changes nothing but strides of dimensions of size 1 (pooling does so for channels-last inputs)."""
    x, out = c.args[0], c.out
    layouts = ([(n, s) for n, s in zip(y.shape, y.stride(), strict=True) if n > 1] for y in (x, out))
    return c.spans(x) if x.shape == out.shape and next(layouts) == next(layouts) else None


@rule("permute")
def permute(c: Call) -> Spans:
    order = [d % len(c.args[1]) for d in c.args[1]]
    return moved(c.spans(c.args[0]), [order.index(d) for d in range(len(order))])


@rule("transpose t")
def transpose(c: Call) -> Spans:
    n = c.args[0].dim()
    if n < 2:
        return c.spans(c.args[0])
    a, b = (c.args[1] % n, c.args[2] % n) if len(c.args) > 2 else (0, 1)  # aten.t has no dimensions
    return moved(c.spans(c.args[0]), [b if d == a else a if d == b else d for d in range(n)])


@rule("unsqueeze")
def unsqueeze(c: Call) -> Spans:
    dim = c.args[1] % c.out.dim()
    return moved(c.spans(c.args[0]), [d + (d >= dim) for d in range(c.args[0].dim())])


@rule("squeeze")
def squeeze(c: Call) -> Spans:
    x = c.args[0]
    dims = range(x.dim()) if len(c.args) < 2 else [c.args[1]] if isinstance(c.args[1], int) else c.args[1]
    gone = {d % x.dim() for d in dims if x.shape[d] == 1} if x.dim() else set()
    return without(c.spans(x), gone, x.dim(), c.out.dim())


@rule("expand")
def expand(c: Call) -> Spans:
    """Repeated dimensions follow what they meet; the others keep their labels."""
    x, shift = c.args[0], c.out.dim() - c.args[0].dim()
    repeated = [d for d in range(c.out.dim()) if d < shift or x.shape[d - shift] != c.out.shape[d]]
    spans = (*aligned(x, c.out, c.spans(x)).spans, *c.record.free(c.out, repeated))
    c.sized(c.out, spans)
    return spans


@rule("repeat")
def repeat(c: Call) -> Spans:
    """Labels repeated as the entries are; what is repeated of size 1 follows what it meets."""
    x, times = c.args[:2]
    side = aligned(x, c.out, c.spans(x))
    spans = tuple(Span(span.dims, np.tile(span.labels, [times[d] for d in span.dims])) for span in side.spans)
    spans += c.record.free(c.out, [d for d, n in enumerate(c.out.shape) if n == times[d]])
    c.sized(c.out, spans)
    return spans


@rule("cat")
def cat(c: Call) -> Spans:
    """Labels one after the other along the dimension; the other dimensions are tied, as in a sum."""
    dim = _dim(c, 1, c.out.dim())
    parts = [x for x in c.args[0] if x.dim() == c.out.dim() and x.numel()]
    reason = "is joined with a part of fixed size"
    spans = [c.spans(x) for x in parts]
    dims = [set(span.dims) for part in spans if (span := span_at(part, dim))]
    fixed: set[int] = set()
    if dims and len(dims) == len(parts):  # heads in one part and positions inside them in another: what both have
        fixed = set.union(*dims) - set.intersection(*dims)
    elif any(len(several) > 1 for several in dims):
        fixed = {dim}
    spans = [c.fix(part, fixed, reason) for part in spans]
    along = [span_at(part, dim) for part in spans]
    rest = [tuple(span for span in part if dim not in span.dims) for part in spans]
    sides = [aligned(x, c.out, part) for x, part in zip(parts, rest, strict=True)]
    result = c.combine(sides)
    if not any(along):
        return result
    joined = next(span.dims for span in along if span)
    pieces = []
    for x, span in zip(parts, along, strict=True):
        if span is None:
            span = Span((dim,), c.record.labels.fresh(x.shape[dim]))
            c.fix((span,), (dim,), reason)
        pieces.append(span.labels)
    return (*result, Span(joined, np.concatenate(pieces, axis=joined.index(dim))))


@rule("stack")
def stack(c: Call) -> Spans:
    spans = c.combine([aligned(x, c.args[0][0], c.spans(x)) for x in c.args[0]])
    dim = _dim(c, 1, c.out.dim())
    return moved(spans, [d + (d >= dim) for d in range(c.out.dim() - 1)])


def _cut(c: Call, x: Tensor, dim: int, start: int, length: int, step: int = 1) -> Spans:
    """x.narrow(dim, start, length): of a span of several dimensions the cut one is fixed, its labels are the part's.

    A dimension that has labels by itself stays prunable where the pass finds its places by numbers that can follow
    (`Coupling` tries whether they do), evenly over pieces of one size. Of interleaved parts, x[::2] and x[1::2], the
    neighbours go together.
    """
    spans = c.spans(x)
    span = span_at(spans, dim)
    if span is None or (start == 0 and length == x.shape[dim] and step == 1):
        return spans
    rest = tuple(other for other in spans if other is not span)
    if len(span.dims) > 1:
        axis = span.dims.index(dim)
        c.tie(span.labels.take([0], axis), span.labels)
        return (*rest, Span(span.dims, span.labels.take(range(start, start + length * step, step), axis)))
    if not length:
        return rest
    if step > 1:
        if start >= step or length * step != x.shape[dim]:
            return c.fix(spans, (dim,), "is cut at fixed positions")
        rows = span.labels.reshape(-1, step)
        c.tie(rows[:, :1], rows)
        return (*rest, Span((dim,), rows[:, start]))
    c.record.labels.keep_cut(span.labels, start, start + length, c.because("is cut into pieces of a fixed size"))
    return (*rest, Span((dim,), span.labels[start : start + length]))


@rule("slice")
def slice_(c: Call) -> Spans:
    x, dim = c.args[0], _dim(c, 1, c.args[0].dim())
    start, end, step = (*c.args[2:5], *[None, None, 1][len(c.args[2:5]) :])
    start, end, step = slice(start, end, step).indices(x.shape[dim])
    c.sized(x, c.spans(x), {dim})
    if (span := span_at(c.spans(x), dim)) is not None and len(span.dims) == 1 and step == 1:
        c.before = span.labels[:start]
        c.record.sizes += [Sized(c.module, n, span.labels[:n], 0) for n in (start, end) if 0 < n < x.shape[dim]]
    spans = _cut(c, x, dim, start, c.out.shape[dim], step)
    c.sized(c.out, spans)
    return shown(spans, c.out.shape)


@rule("split split_with_sizes unsafe_split unsafe_split_with_sizes")
def split(c: Call) -> list[Spans]:
    x, dim = c.args[0], _dim(c, 2, c.args[0].dim())
    c.sized(x, c.spans(x), {dim})  # half of a width, say
    results, start = [], 0
    for part in c.out:
        spans = _cut(c, x, dim, start, part.shape[dim])
        c.sized(part, spans)
        results.append(shown(spans, part.shape))
        start += part.shape[dim]
    return results


def _entry(c: Call, x: Tensor, dim: int, index: int) -> Spans:
    """x without dimension `dim`, of which one entry is taken: it keeps its size."""
    spans = c.spans(x)
    span = span_at(spans, dim)
    if span is not None and len(span.dims) == 1:
        spans = c.fix(spans, (dim,), "is indexed at a fixed position")
    elif span is not None:
        axis = span.dims.index(dim)
        c.tie(span.labels.take([0], axis), span.labels)
        taken = Span(span.dims, span.labels.take([index], axis))
        spans = tuple(taken if other is span else other for other in spans)
    return moved(spans, [None if d == dim else d - (d > dim) for d in range(x.dim())])


@rule("select")
def select(c: Call) -> Spans:
    x, dim = c.args[0], _dim(c, 1, c.args[0].dim())
    return _entry(c, x, dim, c.args[2] % x.shape[dim])


@rule("unbind")
def unbind(c: Call) -> list[Spans]:
    x, dim = c.args[0], _dim(c, 1, c.args[0].dim())
    return [_entry(c, x, dim, i) for i in range(x.shape[dim])]


@rule("index")
def index(c: Call) -> Spans:
    """x[i, j, :]: the indexed dimensions keep their size; the results' dimensions stand where the first of them was."""
    x, indices = c.args[:2]
    indexed = [d for d, i in enumerate(indices) if i is not None]
    for i in (i for i in indices if i is not None):
        c.fix(c.spans(i), range(i.dim()), "")
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    grown = c.out.dim() - (x.dim() - len(indexed))
    where, position = [], 0 if adjacent else grown
    for d in range(x.dim()):
        if d in indexed:
            where.append(None)
            position += grown if adjacent and d == indexed[0] else 0
        else:
            where.append(position)
            position += 1
    return moved(c.fix(c.spans(x), indexed, "is indexed by a tensor"), where)


@rule("index_select")
def index_select(c: Call) -> Spans:
    x, dim = c.args[0], _dim(c, 1, c.args[0].dim())
    return c.fix(c.spans(x), (dim,), "is indexed by a tensor")


def _indexed(c: Call, *operands: Tensor) -> Spans | None:
    """Tensors whose dimension c.args[1] is indexed entry by entry: it keeps its size, the passed meet one by one.

    An index of real integers has no labels, but a size: where a pass expands it to its channels, it follows. None
    where the index covers a part only.
    """
    dim, index = c.args[1] % c.out.dim(), c.args[2]
    passed = [d for d in range(c.out.dim()) if d != dim]
    shapes = [index, *operands] if index.dim() == c.out.dim() else operands
    if any(x.shape[d] != c.out.shape[d] for x in shapes for d in passed):
        return None
    reason = "is indexed by a tensor"
    labelled = [index] if index.dim() == c.out.dim() and any(span_at(c.spans(index), d) for d in passed) else []
    return c.combine([aligned(x, c.out, c.fix(c.spans(x), (dim,), reason)) for x in (*operands, *labelled)])


@rule("scatter scatter_add scatter_reduce index_add index_reduce index_copy")
def scatter(c: Call) -> Spans | None:
    """What graph networks sum over edges, channel by channel."""
    return _indexed(c, *(x for x in (c.args[0], *c.args[3:4]) if isinstance(x, Tensor)))


@rule("gather")
def gather(c: Call) -> Spans | None:
    return _indexed(c, c.args[0])


@rule("flip")
def flip(c: Call) -> Spans:
    """Reversed dimensions keep labels where they belong."""
    x = c.args[0]
    dims = {d % x.dim() for d in c.args[1]}
    return tuple(
        Span(span.dims, np.flip(span.labels, [i for i, d in enumerate(span.dims) if d in dims])) for span in c.spans(x)
    )


@rule("roll")
def roll(c: Call) -> Spans:
    """Rolled dimensions wrap, so they are fixed."""
    x = c.args[0]
    dims = c.args[2] if len(c.args) > 2 and c.args[2] else range(x.dim())
    return c.fix(c.spans(x), {d % x.dim() for d in dims}, "is rolled")


@rule("pixel_shuffle col2im")
def gathered(c: Call) -> Spans:
    """[.., C k, ...] -> [.., C, ...], k = r r in pixel_shuffle(r): the k channels of one output channel go together."""
    x = c.args[0]
    dim = x.dim() - (3 if c.name == "pixel_shuffle" else 2)
    labels, spans = c.alone(c.spans(x), dim)
    if labels is None:
        return spans
    rows = labels.reshape(c.out.shape[dim], -1)
    c.tie(rows[:, :1], rows)
    rest = tuple(span for span in spans if dim not in span.dims)
    return (*rest, Span((dim,), rows[:, 0])) if len(rows) > 1 else rest


@rule("im2col")
def im2col(c: Call) -> Spans:
    """[.., C, H, W] -> [.., C k, L]: k rows of each channel."""
    x = c.args[0]
    dim = x.dim() - 3
    spans = c.fix(c.spans(x), (dim + 1, dim + 2), "has positions, not channels, in it")
    labels, spans = c.alone(spans, dim)
    rest = tuple(span for span in spans if dim not in span.dims)
    return rest if labels is None else (*rest, Span((dim,), np.repeat(labels, c.out.shape[dim] // len(labels))))
