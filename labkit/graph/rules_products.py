"""Rules of `rules`: products. A sum over channels ties what it multiplies; the weight's columns there read them."""

import math

import numpy as np
from torch import Tensor

from labkit.graph.labels import Side, Span, Spans, moved, span_at
from labkit.graph.rules import Call, aligned, rule


def _contract(c: Call, a: Tensor, dim_a: int, b: Tensor, dim_b: int) -> tuple[Spans, Spans]:
    """Sum over one dimension of each: the two are tied; (remaining spans of a, of b)."""
    reason = "is summed over with a dimension of fixed size"
    operands = []
    for x, dim in ((a, dim_a), (b, dim_b)):
        span = span_at(c.spans(x), dim)
        # heads and positions inside a head share a span: the sum runs over the positions, so the heads keep the labels
        operands.append(c.fix(c.spans(x), (dim,), reason) if span and len(span.dims) > 1 else c.spans(x))
    sides = [(spans, dim, span_at(spans, dim)) for spans, dim in zip(operands, (dim_a, dim_b), strict=True)]
    (_, _, span_a), (_, _, span_b) = sides
    if span_a and span_b:
        c.tie(span_a.labels, span_b.labels)
        c.contracts((a, dim_a, span_a.labels), (b, dim_b, span_b.labels))
    rest = []
    for spans, dim, span in sides:
        if span and not (span_a and span_b):
            spans = c.fix(spans, (dim,), reason)
        rest.append(tuple(span for span in spans if dim not in span.dims))
    return rest[0], rest[1]


def _counts(c: Call, macs: int, dims: list[tuple[Tensor, int]]) -> None:
    """The product's cost, in proportion to what stays of these dimensions."""
    factors = []
    for x, dim in dims:
        if (span := span_at(c.spans(x), dim)) is not None:
            factors.append(np.moveaxis(span.labels, span.dims.index(dim), 0).reshape(x.shape[dim], -1)[:, 0])
    c.costs(macs, factors)


def _matrices(c: Call, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Spans:
    """bias + [*batch, n, k] x [*batch, k, m], with one batch dimension or none."""
    rows, batch = a.dim() - 2, range(a.dim() - 2)
    rest_a, rest_b = _contract(c, a, rows + 1, b, rows)
    dims = [(a, d) for d in range(a.dim())] + [(b, rows + 1)]
    _counts(c, math.prod(a.shape) * b.shape[-1], dims)
    present = {d for d in range(a.dim()) if c.out.shape[d] > 1}
    sides = [
        Side(moved(rest_a, [*batch, rows, None]), frozenset(present - {rows + 1})),
        Side(moved(rest_b, [*batch, None, rows + 1]), frozenset(present - {rows})),
    ]
    spans = c.combine(sides)
    return spans if bias is None else c.combine([aligned(c.out, c.out, spans), aligned(bias, c.out, c.spans(bias))])


@rule("mm bmm")
def matrix_product(c: Call) -> Spans:
    return _matrices(c, *c.args[-2:])


@rule("addmm baddbmm _sparse_addmm")
def matrix_product_and_bias(c: Call) -> Spans:
    bias, a, b = c.args[:3]
    return _matrices(c, a, b, bias)


@rule("mv dot vdot")
def vector_product(c: Call) -> Spans:
    """[n, k] x [k], or [k] x [k]"""
    a, b = c.args[:2]
    rest, _ = _contract(c, a, a.dim() - 1, b, 0)
    _counts(c, math.prod(a.shape), [(a, d) for d in range(a.dim())])
    return rest


@rule("convolution")
def convolution(c: Call) -> Spans:
    """Weight [out, in / groups, *kernel], transposed [in, out / groups, *kernel]."""
    x, weight, bias, stride, padding, _, transposed, _, groups = c.args[:9]
    channel = x.dim() - (weight.dim() - 1)  # 0 where there is no batch
    makes, reads = (1, 0) if transposed else (0, 1)
    if max(*weight.shape[2:], *stride, *(n + 1 for n in padding)) > 1:  # else each position is by itself
        x._spans = c.fix(c.spans(x), range(channel + 1, x.dim()), "has positions, not channels, in it")
    weight._spans = c.fix(c.spans(weight), range(2, weight.dim()), "")
    into, x._spans = c.alone(c.spans(x), channel)
    _, weight._spans = c.alone(c.spans(weight), 0)  # a kernel that is computed may have both in one span
    if groups == 1:
        _, spans = _contract(c, x, channel, weight, reads)
        made = span_at(spans, makes)
        out = None if made is None else made.labels
    else:
        out = _grouped(c, into, weight, transposed, groups)
    c.follows(bias, out)
    positions = math.prod((x if transposed else c.out).shape[channel + 1 :])
    batch = x.shape[0] if channel else 1
    factors = [into, out] if groups == 1 else [span.labels for span in c.spans(weight)]
    rest = tuple(span for span in c.spans(x) if channel not in span.dims)
    c.costs(batch * positions * weight.numel(), [*factors, *(span.labels for span in rest)])
    return rest if out is None or c.out.shape[channel] == 1 else (*rest, Span((channel,), out))


def _grouped(c: Call, into: np.ndarray | None, weight: Tensor, transposed: bool, groups: int) -> np.ndarray | None:
    """Labels of the output of a grouped convolution: all channels of a group, in and out, are tied, or else, within
    the groups, those at the same place of every group."""
    reason = "is convolved in groups with a part of fixed size"
    made, inner = (span_at(c.spans(weight), d) for d in (0, 1))
    if c.record.within_groups and into is not None and made is not None and inner is not None:
        rows = made.labels.reshape(groups, -1)
        c.tie(rows[:1], rows)
        inputs = rows if transposed else np.tile(inner.labels, (groups, 1))
        c.tie(into.reshape(groups, -1), inputs)
        c.contracts((weight, 0 if transposed else 1, made.labels if transposed else inner.labels))
        return np.tile(inner.labels, groups) if transposed else made.labels
    weight._spans = c.fix(c.spans(weight), range(1, weight.dim()), "")
    if into is None or made is None:
        weight._spans = c.fix(c.spans(weight), (0,), reason)
        if into is not None:
            c.record.labels.pin(into, c.because(reason))
        return None
    inputs = into.reshape(groups, -1)
    c.tie(inputs[:, :1], inputs)
    c.tie(inputs[:, :1], made.labels.reshape(groups, -1))
    return np.repeat(inputs[:, 0], weight.shape[1]) if transposed else made.labels


@rule("_weight_norm_interface")
def weight_norm(c: Call) -> list[Spans]:
    """v scaled to the norms g, taken over all dimensions but one: the norm of what stays of the other dimensions."""
    v, g = c.args[:2]
    dim = c.args[2] if len(c.args) > 2 else 0
    spans = c.combine([aligned(v, v, c.spans(v)), aligned(g, v, c.spans(g))])
    c.out[0]._is_weight = True
    return [c.restricts(spans, set(range(v.dim())) - {dim}, "norm"), ()]


@rule("embedding")
def embedding(c: Call) -> Spans:
    """Rows [V, D] picked by indices [...]: [..., D]"""
    weight, indices = c.args[:2]
    c.fix(c.spans(indices), range(indices.dim()), "")
    return moved(c.fix(c.spans(weight), (0,), ""), [None, indices.dim()])


@rule(
    """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_attention_math
    _scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention"""
)
def attention(c: Call) -> Spans:
    """softmax(q k^T scale) v, q [batch, heads, L, E], v [batch, heads, S, Ev]: heads carry the labels; E stays."""
    sides = []
    for x in (x for x in c.args if isinstance(x, Tensor)):  # q, k, v and a mask
        spans = c.fix(c.spans(x), (x.dim() - 2, x.dim() - 1), "is the width of a head, which the scale depends on")
        side = aligned(x, c.args[0], spans)
        sides.append(Side(side.spans, side.present - {c.args[0].dim() - 2, c.args[0].dim() - 1}))
    return c.combine(sides)
