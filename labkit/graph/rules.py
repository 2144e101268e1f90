"""Rules: how labels pass through an operator. An operator without a rule makes all operands unprunable.

A rule gets a `Call` and returns the spans of the result: a list of spans for an operator with several results, None for
a case not covered by the rule. `rule` enters a function for all operators of a kind in the table of `operators`. `Call`
holds the steps available to a rule. Rules of elementwise operators, norms, reductions and pooling follow;
`rules_products` and `rules_shapes` hold the remaining rules.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from labkit.graph import operators
from labkit.graph.record import Cost, Record, Restricted, traced
from labkit.graph.spans import Side, Span, Spans, combine, fix, moved, span_at, without


class Summed(NamedTuple):
    """An operand of a product: the product sums over dimension `dim` of `x`, with `labels`."""

    x: Tensor
    dim: int
    labels: np.ndarray


@dataclass
class Call:
    """A call of an operator, on the way through its rule.

    name: name of the operator.
    args, kwargs, out: the arguments, positional as in the ATen schema, and the result.
    module: the name of the running module.
    number: number of the call among the operator's calls in the module.
    record: receives the notes of the rule.
    before: for a slice, the labels in front of the part (`Operation.before`); set by the rule.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    module: str
    number: int
    record: Record
    before: np.ndarray | None = None

    def because(self, reason: str) -> str:
        """Add the operator and the module to a reason."""
        place = f" in {self.module}" if self.module else ""
        return f"{reason} ({self.name}{place})"

    # --- labels -------------------------------------------------------------------------------------------------------

    def argument(self, position: int, default: Any) -> Any:
        """Return a positional argument, `default` if the call has fewer arguments."""
        return self.args[position] if len(self.args) > position else default

    def spans(self, x: Tensor) -> Spans:
        """Return the spans of an operand (`Record.spans`)."""
        return self.record.spans(x)

    def side(self, x: Tensor) -> Side:
        """Align an operand with the (first) result."""
        return aligned(x, first(self.out), self.spans(x))

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Let the labels a[i] and b[i] go together."""
        self.record.labels.tie(a, b)

    def fix(self, spans: Spans, dims: Iterable[int], reason: str) -> Spans:
        """Keep the sizes of `dims` (`spans.fix`); an empty reason is not told to a user."""
        return fix(self.record.labels, spans, dims, self.because(reason) if reason else "")

    def fixed(self, x: Tensor, dims: Iterable[int], reason: str) -> Spans:
        """Return the spans of an operand, with the sizes of `dims` kept in the result."""
        return self.fix(self.spans(x), dims, reason)

    def fix_operand(self, x: Tensor, dims: Iterable[int], reason: str) -> None:
        """Keep the sizes of dimensions `dims` of an operand, from the present operator on."""
        traced(x).spans = self.fixed(x, dims, reason)

    def tie_rows(self, rows: np.ndarray) -> None:
        """Let the labels of each row of `rows`, [rows, columns], go together."""
        self.tie(rows[:, :1], rows)

    def combine(self, sides: list[Side]) -> Spans:
        """Tie the operands of an elementwise operator, and return the spans of the result (`spans.combine`)."""
        return combine(self.record.labels, sides, self.because("meets a dimension of fixed size"))

    def isolate(self, spans: Spans, dim: int) -> tuple[np.ndarray | None, Spans]:
        """Fix all dimensions of the span on `dim` but `dim`.

        Returns the labels of `dim`, None for a dimension without labels, and all spans.
        """
        span = span_at(spans, dim)
        if span is None:
            return None, spans
        spans = self.fix(spans, set(span.dims) - {dim}, "shares its labels with another dimension")
        return span_at(spans, dim).labels, spans

    def isolate_operand(self, x: Tensor, dim: int) -> np.ndarray | None:
        """Isolate dimension `dim` of an operand, from the present operator on, and return the labels."""
        labels, traced(x).spans = self.isolate(self.spans(x), dim)
        return labels

    def tie_vector(self, vector: Tensor | None, labels: np.ndarray | None) -> None:
        """Tie the entries of a bias or a scale to channels.

        vector: the bias or scale, None for a layer without.
        labels: labels of the channels, as many as entries; None for a dimension of fixed size.
        """
        span = None if vector is None else span_at(self.spans(vector), 0)
        if span is None:
            return
        if labels is None:
            self.record.labels.pin(span.labels, self.because("belongs to a fixed dimension"))
        else:
            self.tie(labels, span.labels)

    def fix_shared(self, spans: Spans, dims: set[int]) -> Spans:
        """Fix each dimension of `dims` with further dimensions in the same span: the operator works over `dims`."""
        shared = {dim for span in spans if len(span.dims) > 1 for dim in span.dims}
        return self.fix(spans, shared & dims, "is reduced together with a dimension that stays")

    # --- notes for later steps ----------------------------------------------------------------------------------------

    def record_contraction(self, *sides: Summed) -> None:
        """Note that a matrix product or convolution sums over the labels of `sides`.

        If a side is a weight, its columns read the channels: removing a channel removes a column. If
        no side is a weight (attention's scores), the product runs over fewer terms after a cut.
        """
        weights = [side.labels for side in sides if traced(side.x).is_weight]
        if weights:
            self.record.contracted.extend(weights)
        else:
            x, dim, labels = sides[0]
            is_operand = [argument is x for argument in self.args]
            self._record_restricted(is_operand.index(True), dim, labels, "mask")

    def record_statistic(self, spans: Spans, dims: set[int], kind: str) -> None:
        """Note a statistic of the first operand over `dims`: a cut changes the statistic.

        kind: "norm" or "statistic" (`Restricted`).
        """
        for span in spans:
            if len(span.dims) == 1 and dims.issuperset(span.dims):
                (dim,) = span.dims
                self._record_restricted(0, dim, span.labels, kind)

    def _record_restricted(self, argument: int, dim: int, labels: np.ndarray, kind: str) -> None:
        if not self.record.only_couples:
            call = (self.name, self.module, self.number)
            self.record.restricted.append(Restricted(*call, argument, dim, labels, kind))

    def record_sizes(self, x: Tensor, spans: Iterable[Span], dims: Iterable[int] | None = None) -> None:
        """Note sizes of `x` that the forward pass may hold as numbers, by default of all dimensions."""
        dims = range(x.dim()) if dims is None else sorted(dims)
        self.record.sized(self.module, x, spans, dims)

    def record_cost(self, macs: int, factors: Iterable[np.ndarray | None]) -> None:
        """Note the multiply-adds of a product, and the labels with which the number shrinks (`Cost`)."""
        if not self.record.only_couples:
            labelled = tuple(labels for labels in factors if labels is not None)
            terms = macs // max(self.out.numel(), 1)
            self.record.costs.append(Cost(macs, terms, labelled))


Rule = Callable[[Call], Spans | list[Spans] | None]
RULES: dict[str, Rule] = {}
POSITIONS = "has positions, not channels, in it"  # why a dimension stays


def rule(kind: str) -> Callable[[Rule], Rule]:
    """Enter a function into RULES, for the operators of the given kind in the table of `operators`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators.with_rule(kind), function))
        return function

    return register


def aligned(x: Tensor, out: Tensor, spans: Spans) -> Side:
    """Align `x`, with `spans`, with the last dimensions of `out`, as broadcasting does."""
    shift = out.dim() - x.dim()
    present = set()
    for dim, size in enumerate(x.shape):
        if size == out.shape[dim + shift] > 1:
            present.add(dim + shift)
    return Side(moved(spans, range(shift, out.dim())), frozenset(present))


def first(out: Any) -> Tensor:
    """Return the first result of an operator."""
    return out if isinstance(out, Tensor) else out[0]


def positive_dims(dims: int | Sequence[int], x: Tensor) -> set[int]:
    """Return dimensions of `x` as numbers from 0; arguments may count from the end."""
    dims = [dims] if isinstance(dims, int) else dims
    return {dim % x.dim() for dim in dims}


# --- elementwise ------------------------------------------------------------------------------------------------------


@rule("elementwise")
def elementwise(call: Call) -> Spans:
    """Tie the channels of all operands."""
    values = [*call.args, *call.kwargs.values()]
    return call.combine([call.side(x) for x in values if isinstance(x, Tensor)])


@rule("like")
def like(call: Call) -> Spans:
    """Pass the labels on: the result is the operand, or a tensor of the same shape."""
    return call.spans(call.args[0])


@rule("constant")
def constant(call: Call) -> Spans:
    """Give no labels: the tensor is made in the forward pass, with numbers as sizes."""
    return ()


@rule("new")
def new(call: Call) -> Spans:
    """Pass on labels of dimensions of the operand's sizes; new sizes follow the tensors beside the result.

    The result is filled evenly. A trial in `groups` shows if the sizes do follow.
    """
    x, out = call.args[0], call.out
    same: set[int] = set()
    if x.dim() == out.dim():
        sizes = zip(x.shape, out.shape, strict=True)
        same = {dim for dim, (before, after) in enumerate(sizes) if before == after}
    spans = [span for span in call.spans(x) if same.issuperset(span.dims)]
    new_dims = sorted(set(range(out.dim())) - same)
    spans += call.record.free(out, new_dims)
    call.record_sizes(out, spans)
    return tuple(spans)


# --- normalisation ----------------------------------------------------------------------------------------------------


@rule("batch_norm")
def batch_norm(call: Call) -> Spans:
    """Tie scale, shift and running statistics to the channels, dimension 1.

    Statistics of the batch (of a weight standardised by a batch norm, say) are taken over the remaining entries after
    a cut.
    """
    x = call.args[0]
    labels, spans = call.isolate(call.spans(x), 1)
    for vector in call.args[1:5]:
        if isinstance(vector, Tensor):
            call.tie_vector(vector, labels)
    takes_statistics = any(arg is True for arg in call.args)
    if takes_statistics:
        dims = set(range(x.dim())) - {1}
        spans = call.fix_shared(spans, dims)
        call.record_statistic(spans, dims, "norm")
    return spans


@rule("layer_norm")
def layer_norm(call: Call) -> Spans:
    """Tie scale and shift to the last dimensions; statistics are taken over the remaining entries after a cut."""
    x, shape = call.args[:2]
    normalised = set(range(x.dim() - len(shape), x.dim()))
    vectors = [vector for vector in call.args[2:4] if vector is not None]
    sides = [aligned(vector, x, call.spans(vector)) for vector in vectors]
    spans = call.fix_shared(call.spans(x), normalised)
    spans = call.combine([aligned(x, x, spans), *sides])
    call.record_statistic(spans, normalised, "norm")
    call.record_sizes(x, spans, normalised)
    return spans


@rule("group_norm")
def group_norm(call: Call) -> Spans:
    """Tie the channels of a group: whole groups go. A single group is a norm over all channels, as in `layer_norm`."""
    x, weight, bias = call.args[:3]
    groups = call.args[6]
    spans = call.fixed(x, range(2, x.dim()), POSITIONS)
    labels, spans = call.isolate(spans, 1)
    call.record_sizes(x, spans, {1})
    for vector in (weight, bias):
        call.tie_vector(vector, labels)
    if labels is None or groups == 1:
        call.record_statistic(spans, {1}, "norm")
    else:
        call.tie_rows(labels.reshape(groups, -1))
    return spans


@rule("softmax")
def softmax(call: Call) -> Spans:
    """Fix the dimension of a softmax: each entry depends on all."""
    x, dim = call.args[:2]
    return call.fixed(x, positive_dims(dim, x), "is normalised over by a softmax")


# --- reductions -------------------------------------------------------------------------------------------------------


@rule("reduction")
def reduction(call: Call) -> Spans:
    """Drop the reduced dimensions; a statistic over channels is taken over the remaining channels after a cut."""
    x = call.args[0]
    dims = _reduced(call)
    spans = call.fix_shared(call.spans(x), dims)
    call.record_statistic(spans, dims, "statistic")
    spans = tuple(span for span in spans if dims.isdisjoint(span.dims))
    return without(spans, dims, x.dim(), first(call.out).dim())


def _reduced(call: Call) -> set[int]:
    """Return the dimensions named by a reduction, by default all."""
    x = call.args[0]
    position = 2 if call.name in ("linalg_vector_norm", "norm") else 1
    dims = call.argument(position, call.kwargs.get("dim"))
    if dims is None or dims == []:
        return set(range(x.dim()))
    return positive_dims(dims, x) if x.dim() else set()


@rule("mixing")
def mixing(call: Call) -> Spans:
    """Fix the dimension of a running sum, an order or a largest entry."""
    return _mixed(call, position=1)


@rule("ranking")
def ranking(call: Call) -> Spans:
    """Fix the dimension of a ranking; the argument comes after the number of entries."""
    return _mixed(call, position=2)


def _mixed(call: Call, position: int) -> Spans:
    """Fix the dimensions in argument number `position`, the last dimension by default."""
    x = call.args[0]
    dims = positive_dims(call.argument(position, -1), x)
    spans = call.fixed(x, dims, "has its entries mixed")
    return without(spans, dims, x.dim(), first(call.out).dim())


@rule("fourier")
def fourier(call: Call) -> Spans:
    """Fix the transformed dimensions."""
    x, dims = call.args[:2]
    return call.fixed(x, positive_dims(dims, x), "has its entries mixed")


@rule("view_as_complex")
def view_as_complex(call: Call) -> Spans:
    """Fix and drop the last dimension, [real part, imaginary part]."""
    x = call.args[0]
    last = x.dim() - 1
    spans = call.fixed(x, {last}, "has real and imaginary parts")
    return without(spans, {last}, last + 1, last)


# --- positions --------------------------------------------------------------------------------------------------------


@rule("spatial")
def spatial(call: Call) -> Spans:
    """Fix positions: pooling, resampling and padding change the sizes; leading dimensions (batch, channel) pass."""
    x, out = call.args[0], first(call.out)
    most = max(x.dim() - _positions(call.name), 0)
    leading = 0
    while leading < most and x.shape[leading] == out.shape[leading]:
        leading += 1
    return call.fixed(x, range(leading, x.dim()), POSITIONS)


def _positions(name: str) -> int:
    """Return the number of dimensions with positions, by the operator's name; two for a name without a number."""
    if "3d" in name:
        return 3
    return 1 if "1d" in name else 2


@rule("pad")
def pad(call: Call) -> Spans:
    """Fix padded dimensions, a padded channel dimension among them."""
    x, padding = call.args[:2]
    last = x.dim() - 1
    padded = {last - i // 2 for i, width in enumerate(padding) if width}  # two widths a dimension, from the last one
    return call.fixed(x, padded, "is padded with constants")
