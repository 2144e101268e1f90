"""Rules of products: a sum over channels ties the two operands; the columns of a weight there read the channels."""

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from labkit.graph.record import traced
from labkit.graph.rules import POSITIONS, Call, Summed, aligned, rule
from labkit.graph.spans import Side, Span, Spans, moved, span_at, spans_off

# --- matrices ---------------------------------------------------------------------------------------------------------


def _contract(call: Call, a: Tensor, dim_a: int, b: Tensor, dim_b: int) -> tuple[Spans, Spans]:
    """Tie dimension `dim_a` of `a` and `dim_b` of `b`, the summed dimensions of a product.

    Returns the spans of a and of b without the summed dimensions.
    """
    reason = "is summed over with a dimension of fixed size"
    spans_a = _summable(call, a, dim_a, reason)
    spans_b = _summable(call, b, dim_b, reason)
    span_a, span_b = span_at(spans_a, dim_a), span_at(spans_b, dim_b)
    if span_a and span_b:
        call.tie(span_a.labels, span_b.labels)
        summed_a = Summed(a, dim_a, span_a.labels)
        summed_b = Summed(b, dim_b, span_b.labels)
        call.record_contraction(summed_a, summed_b)
    elif span_a:
        spans_a = call.fix(spans_a, (dim_a,), reason)
    elif span_b:
        spans_b = call.fix(spans_b, (dim_b,), reason)
    return spans_off(spans_a, dim_a), spans_off(spans_b, dim_b)


def _summable(call: Call, x: Tensor, dim: int, reason: str) -> Spans:
    """Fix the summed dimension where it shares a span.

    Heads and positions inside a head share a span: the sum runs over the positions, and the heads keep the labels.
    """
    spans = call.spans(x)
    span = span_at(spans, dim)
    shares = span is not None and len(span.dims) > 1
    return call.fix(spans, (dim,), reason) if shares else spans


def _all_dims(x: Tensor) -> list[tuple[Tensor, int]]:
    return [(x, dim) for dim in range(x.dim())]


def _record_cost(call: Call, macs: int, dims: list[tuple[Tensor, int]]) -> None:
    """Note the multiply-adds of a product; a cut reduces them in proportion to the size of each (tensor, dimension)."""
    factors = []
    for x, dim in dims:
        span = span_at(call.spans(x), dim)
        if span is not None:
            axis = span.dims.index(dim)
            slices = np.moveaxis(span.labels, axis, 0)
            first_in_slice = slices.reshape(len(slices), -1)[:, 0]
            factors.append(first_in_slice)
    call.record_cost(macs, factors)


def _matrices(call: Call, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Spans:
    """Return the spans of bias + a b, of shapes [*batch, n, k] and [*batch, k, m], at most a single batch dimension."""
    row = a.dim() - 2
    column = row + 1
    batch = range(row)
    rest_a, rest_b = _contract(call, a, column, b, row)
    macs = math.prod(a.shape) * b.shape[-1]
    _record_cost(call, macs, [*_all_dims(a), (b, column)])
    present = frozenset(dim for dim, size in enumerate(call.out.shape) if size > 1)
    rows = Side(moved(rest_a, [*batch, row, None]), present - {column})
    columns = Side(moved(rest_b, [*batch, None, column]), present - {row})
    spans = call.combine([rows, columns])
    if bias is None:
        return spans
    product = aligned(call.out, call.out, spans)
    return call.combine([product, call.side(bias)])


@rule("matrix_product")
def matrix_product(call: Call) -> Spans:
    """Multiply [*batch, n, k] by [*batch, k, m]."""
    a, b = call.args[-2:]
    return _matrices(call, a, b)


@rule("matrix_product_and_bias")
def matrix_product_and_bias(call: Call) -> Spans:
    """Multiply two matrices and add a bias, the first argument."""
    bias, a, b = call.args[:3]
    return _matrices(call, a, b, bias)


@rule("vector_product")
def vector_product(call: Call) -> Spans:
    """Multiply [n, k] by [k], or [k] by [k]."""
    a, b = call.args[:2]
    last = a.dim() - 1
    rest, _ = _contract(call, a, last, b, 0)
    _record_cost(call, math.prod(a.shape), _all_dims(a))
    return rest


# --- convolutions -----------------------------------------------------------------------------------------------------


class _Convolution(NamedTuple):
    """The arguments of a convolution: weight [out, in / groups, *kernel], or [in, out / groups, *kernel] transposed."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    @property
    def channel(self) -> int:
        """The dimension of x with the channels: 0 without a batch, else 1."""
        return self.x.dim() - (self.weight.dim() - 1)

    @property
    def makes(self) -> int:
        """The dimension of the weight with the output's channels."""
        return 1 if self.transposed else 0

    @property
    def reads(self) -> int:
        """The dimension of the weight with the input's channels."""
        return 0 if self.transposed else 1

    @property
    def mixes_positions(self) -> bool:
        """True unless each position of the output comes from a single position of the input, in the same order."""
        kernel = self.weight.shape[2:]
        return max(*kernel, *self.stride) > 1 or max(self.padding) > 0


@rule("convolution")
def convolution(call: Call) -> Spans:
    """Tie the input's channels to the weight's columns, and give the output the labels of its rows."""
    conv = _Convolution(*call.args[:9])
    x, weight, channel = conv.x, conv.weight, conv.channel
    if conv.mixes_positions:
        call.fix_operand(x, range(channel + 1, x.dim()), POSITIONS)
    call.fix_operand(weight, range(2, weight.dim()), "")
    inputs = call.isolate_operand(x, channel)
    call.isolate_operand(weight, 0)  # a computed kernel may have both dimensions in one span
    if conv.groups == 1:
        _, weight_spans = _contract(call, x, channel, weight, conv.reads)
        made = span_at(weight_spans, conv.makes)
        outputs = None if made is None else made.labels
    else:
        outputs = _grouped(call, conv, inputs)
    call.tie_vector(conv.bias, outputs)
    rest = spans_off(call.spans(x), channel)
    _record_convolution_cost(call, conv, inputs, outputs, rest)
    if outputs is None or call.out.shape[channel] == 1:
        return rest
    return (*rest, Span((channel,), outputs))


def _record_convolution_cost(
    call: Call, conv: _Convolution, inputs: np.ndarray | None, outputs: np.ndarray | None, rest: Spans
) -> None:
    """Note the multiply-adds of a convolution.

    The kernel is applied at every position of the output, transposed at every position of the input.

    inputs, outputs: labels of the channels.
    rest: spans of the input without channels.
    """
    image = conv.x if conv.transposed else call.out
    positions = math.prod(image.shape[conv.channel + 1 :])
    batch = conv.x.shape[0] if conv.channel else 1
    if conv.groups == 1:
        factors = [inputs, outputs]
    else:
        factors = [span.labels for span in call.spans(conv.weight)]
    factors += [span.labels for span in rest]
    call.record_cost(batch * positions * conv.weight.numel(), factors)


def _grouped(call: Call, conv: _Convolution, inputs: np.ndarray | None) -> np.ndarray | None:
    """Tie the channels of a grouped convolution, and return the labels of the output, None for a fixed size.

    All channels of a group, of input and output, are tied; with `Record.within_groups`, the channels at the same place
    of every group.

    inputs: the labels of the input's channels.
    """
    made = span_at(call.spans(conv.weight), 0)
    inner = span_at(call.spans(conv.weight), 1)
    if call.record.within_groups and inputs is not None and made is not None and inner is not None:
        return _tied_across_groups(call, conv, inputs, made.labels, inner.labels)
    return _tied_inside_groups(call, conv, inputs, made)


def _tied_across_groups(
    call: Call, conv: _Convolution, inputs: np.ndarray, made: np.ndarray, inner: np.ndarray
) -> np.ndarray:
    """Tie the channels at the same place of every group.

    inputs: labels of the input's channels.
    made, inner: labels of the first and of the second dimension of the weight.
    """
    rows = made.reshape(conv.groups, -1)
    call.tie(rows[:1], rows)
    readers = rows if conv.transposed else np.tile(inner, (conv.groups, 1))
    call.tie(inputs.reshape(conv.groups, -1), readers)
    if conv.transposed:
        call.record_contraction(Summed(conv.weight, 0, made))
        return np.tile(inner, conv.groups)
    call.record_contraction(Summed(conv.weight, 1, inner))
    return made


def _tied_inside_groups(
    call: Call, conv: _Convolution, inputs: np.ndarray | None, made: Span | None
) -> np.ndarray | None:
    """Tie all channels of each group; `made` is the span of the weight's first dimension."""
    reason = "is convolved in groups with a part of fixed size"
    weight = conv.weight
    call.fix_operand(weight, range(1, weight.dim()), "")
    if inputs is None or made is None:
        call.fix_operand(weight, (0,), reason)
        if inputs is not None:
            call.record.labels.pin(inputs, call.because(reason))
        return None
    input_rows = inputs.reshape(conv.groups, -1)
    output_rows = made.labels.reshape(conv.groups, -1)
    call.tie_rows(input_rows)
    call.tie(input_rows[:, :1], output_rows)
    if not conv.transposed:
        return made.labels
    outputs_per_group = weight.shape[1]
    return np.repeat(input_rows[:, 0], outputs_per_group)


@rule("weight_norm")
def weight_norm(call: Call) -> list[Spans]:
    """Scale v to the norms g, over all dimensions but `dim`: after a cut, over the remaining entries."""
    v, g = call.args[:2]
    dim = call.argument(2, 0)
    spans = call.combine([call.side(v), call.side(g)])
    traced(call.out[0]).is_weight = True
    other_dims = set(range(v.dim())) - {dim}
    call.record_statistic(spans, other_dims, "norm")
    return [spans, ()]


# --- tables and attention ---------------------------------------------------------------------------------------------


@rule("embedding")
def embedding(call: Call) -> Spans:
    """Pick rows of a table [V, D] by indices [...]: the result [..., D] has the labels of the columns."""
    weight, indices = call.args[:2]
    call.fixed(indices, range(indices.dim()), "")
    columns = call.fixed(weight, (0,), "")
    return moved(columns, [None, indices.dim()])


@rule("attention")
def attention(call: Call) -> Spans:
    """Tie the heads of softmax(q k^T scale) v, q [batch, heads, L, E], v [batch, heads, S, Ev]; E stays."""
    q = call.args[0]
    sides = []
    for x in call.args:
        if isinstance(x, Tensor):  # q, k, v and a mask
            dims = (x.dim() - 2, x.dim() - 1)
            spans = call.fixed(x, dims, "is the width of a head, which the scale depends on")
            sides.append(aligned(x, q, spans))
    return call.combine(sides)
