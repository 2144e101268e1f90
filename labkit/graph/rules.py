"""One rule an operator: how labels pass through it. An operator without a rule makes all that flows into it unprunable.

A rule gets the `Call` and returns the spans of the result, a list of them where there are several results; None says
that it does not cover the case. `rule` puts it into the table RULES, which the tracer reads. Here: what a rule may do,
and the operators that work elementwise, normalise and reduce; products and shapes have modules of their own.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from labkit.graph.labels import Labels, Side, Span, Spans, combine, fix, moved, span_at, without


class Axis(NamedTuple):
    """Dimension `dim` of a parameter or buffer: its indices have the labels base, base + 1, ..."""

    name: str
    dim: int
    size: int
    base: int


class Sized(NamedTuple):
    """A size that the forward pass of `module` may have written down as a number; labels is None where it stays."""

    module: str
    size: int
    labels: np.ndarray | None
    axis: int


class Restricted(NamedTuple):
    """The n-th call of an operator in a module works over labels: a reference without them leaves them out there.

    kind: "norm" (statistics of what stays only), "statistic" (the dimension is gone afterwards), "mask" (terms of a
    sum).
    """

    name: str
    module: str
    number: int
    argument: int
    dim: int
    labels: np.ndarray
    kind: str


class Cost(NamedTuple):
    """Multiply-adds of one product, `terms` in each sum; what stays of each of `factors`, labels, scales them."""

    macs: int
    terms: int
    factors: tuple[np.ndarray, ...]


class Operation(NamedTuple):
    """One operator of the traced call: the shape that it gave, and the labels that its dimensions carry.

    before: the labels of its operand that come before the part that a slice takes.
    operands: of each tensor among its arguments, in order: the number of the operation that made it, the name of the
    parameter or buffer, or None for an input. settings: its other positional arguments.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    spans: Spans
    operands: tuple[int | str | None, ...]
    settings: tuple[Any, ...]
    before: np.ndarray | None = None


@dataclass
class Record:
    """All that one model's trace finds. Parameters and buffers that share memory go by the first of their names."""

    labels: Labels = field(default_factory=Labels)
    axes: list[Axis] = field(default_factory=list)
    contracted: list[np.ndarray] = field(default_factory=list)  # labels of parameters, where a product sums over them
    sizes: list[Sized] = field(default_factory=list)
    restricted: list[Restricted] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)  # in order
    called: set[str] = field(default_factory=set)  # modules
    returned: set[int | str | None] = field(default_factory=set)  # what made the model's outputs, as `operands`
    aliases: dict[str, list[str]] = field(default_factory=dict)  # {first name: the others}
    constants: frozenset[str] = frozenset()  # names of the buffers
    unmet: dict[int, str] = field(default_factory=dict)  # {id of an abstract parameter: name}, not labelled so far
    unused: list[str] = field(default_factory=list)
    names_dtype: bool = False
    trained: bool = False  # a second pass, in training mode, met parameters that the first did not
    within_groups: bool = False  # of grouped convolutions the same channels of every group are tied, not all of one
    whole_heads: bool = False  # of a dimension that is split, [heads, size], only the first part loses entries
    only_couples: bool = False  # in that second pass: nothing is counted twice

    @cached_property
    def made(self) -> dict[tuple[str, tuple[int, ...]], Operation]:
        """{(module, shape): an operator that gives this shape there}"""
        return {(operation.module, operation.shape): operation for operation in self.operations}

    def names(self, first: str) -> list[str]:
        """All parameters with the memory of `first`."""
        return [first, *self.aliases.get(first, ())]

    def first(self, name: str) -> str:
        return next((first for first, names in self.aliases.items() if name in names), name)

    def kept(self, gone: np.ndarray) -> dict[str, dict[int, Tensor]]:
        """{parameter or buffer: {dimension: indices whose labels are not gone}}, only where something goes."""
        keep: dict[str, dict[int, Tensor]] = {}
        for axis in self.axes:
            stays = ~gone[axis.base : axis.base + axis.size]
            for name in () if stays.all() else self.names(axis.name):
                keep.setdefault(name, {})[axis.dim] = torch.from_numpy(stays.nonzero()[0])
        return keep

    def spans(self, x: Tensor) -> Spans:
        """What x carries. A parameter is labelled where it is met first."""
        if (name := self.unmet.pop(id(x), None)) is not None:
            spans = []
            for dim, size in enumerate(x.shape):
                if size > 1:
                    labels = self.labels.fresh(size, constant=name in self.constants)
                    self.axes.append(Axis(name, dim, size, int(labels[0])))
                    spans.append(Span((dim,), labels))
            x._spans, x._is_weight = tuple(spans), True
        return getattr(x, "_spans", ())

    def free(self, x: Tensor, dims: Iterable[int]) -> Spans:
        """Spans of dimensions that no parameter has, and whose sizes follow what they meet."""
        return tuple(Span((d,), self.labels.fresh(x.shape[d], constant=True)) for d in dims if x.shape[d] > 1)

    def sized(self, module: str, x: Tensor, spans: Spans, dims: Iterable[int]) -> None:
        for dim in dims:
            span = span_at(spans, dim)
            labels, axis = (None, 0) if span is None else (span.labels, span.dims.index(dim))
            self.sizes.append(Sized(module, x.shape[dim], labels, axis))

    def fix(self, x: Tensor, dims: Iterable[int], reason: str) -> None:
        x._spans = fix(self.labels, self.spans(x), dims, reason)


@dataclass
class Call:
    """One operator on its way through its rule: args are its positional arguments as its ATen schema has them."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    module: str
    number: int  # of the calls of this operator in this module
    record: Record
    before: np.ndarray | None = None  # see `Operation`

    def because(self, what: str) -> str:
        return f"{what} ({self.name}{f' in {self.module}' if self.module else ''})"

    def spans(self, x: Tensor) -> Spans:
        return self.record.spans(x)

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        self.record.labels.tie(a, b)

    def fix(self, spans: Spans, dims: Iterable[int], why: str) -> Spans:
        return fix(self.record.labels, spans, dims, why and self.because(why))

    def combine(self, sides: list[Side]) -> Spans:
        return combine(self.record.labels, sides, self.because("meets a dimension of fixed size"))

    def alone(self, spans: Spans, dim: int) -> tuple[np.ndarray | None, Spans]:
        """(labels of dimension `dim` by itself, all spans): other dimensions of its span are fixed."""
        span = span_at(spans, dim)
        if span is None:
            return None, spans
        spans = self.fix(spans, set(span.dims) - {dim}, "shares its labels with another dimension")
        return span_at(spans, dim).labels, spans

    def follows(self, vector: Tensor | None, labels: np.ndarray | None) -> None:
        """A vector with an entry for each of `labels`, a bias or a scale; None: for each entry of a fixed dimension."""
        span = None if vector is None else span_at(self.spans(vector), 0)
        if span is not None and labels is None:
            self.record.labels.pin(span.labels, self.because("belongs to a fixed dimension"))
        elif span is not None:
            self.tie(labels, span.labels)

    def contracts(self, *sides: tuple[Tensor, int, np.ndarray]) -> None:
        """A product sums over these labels: where one side is a weight, it is what reads the channel."""
        weights = [labels for x, _, labels in sides if getattr(x, "_is_weight", False)]
        if weights:
            self.record.contracted.extend(weights)
        else:
            x, dim, labels = sides[0]
            self._restrict(next(i for i, arg in enumerate(self.args) if arg is x), dim, labels, "mask")

    def single(self, spans: Spans, dims: set[int]) -> Spans:
        """Spans of several dimensions lose those of `dims`, over which the operator works."""
        several = {dim for span in spans if len(span.dims) > 1 for dim in span.dims}
        return self.fix(spans, several & dims, "is reduced together with a dimension that stays")

    def restricts(self, spans: Spans, dims: set[int], kind: str) -> Spans:
        """The operator takes a statistic over `dims`: it is then that of what stays of them."""
        for span in spans:
            if len(span.dims) == 1 and set(span.dims) <= dims:
                self._restrict(0, span.dims[0], span.labels, kind)
        return spans

    def _restrict(self, argument: int, dim: int, labels: np.ndarray, kind: str) -> None:
        if not self.record.only_couples:
            place = Restricted(self.name, self.module, self.number, argument, dim, labels, kind)
            self.record.restricted.append(place)

    def sized(self, x: Tensor, spans: Spans, dims: Iterable[int] | None = None) -> None:
        """Sizes of x that may be numbers which the forward pass wrote down; dims: None for all."""
        self.record.sized(self.module, x, spans, range(x.dim()) if dims is None else sorted(dims))

    def costs(self, macs: int, factors: Iterable[np.ndarray | None]) -> None:
        if not self.record.only_couples:
            factors = tuple(labels for labels in factors if labels is not None)
            self.record.costs.append(Cost(macs, macs // max(self.out.numel(), 1), factors))


RULES: dict[str, Callable[[Call], Spans | list[Spans] | None]] = {}


def rule(names: str) -> Callable:
    """Puts a function into the table, for these operators."""

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def aligned(x: Tensor, out: Tensor, spans: Spans) -> Side:
    """x on the last dimensions of `out`, repeated where it has size 1."""
    shift = out.dim() - x.dim()
    present = frozenset(d + shift for d in range(x.dim()) if x.shape[d] == out.shape[d + shift] > 1)
    return Side(moved(spans, range(shift, out.dim())), present)


# --- elementwise ------------------------------------------------------------------------------------------------------


@rule(
    """add sub rsub mul div pow remainder fmod floor_divide maximum minimum fmax fmin where clamp clamp_min clamp_max
    relu relu6 sigmoid tanh gelu silu mish elu celu selu leaky_relu hardswish hardsigmoid hardtanh softplus
    log_sigmoid_forward threshold hardshrink softshrink _prelu_kernel prelu exp expm1 exp2 log log1p log2 log10 sqrt
    rsqrt reciprocal square neg abs sign erf erfc sin cos tan atan atan2 floor ceil round trunc frac isnan isinf
    isfinite eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not
    bitwise_xor masked_fill lerp addcmul addcdiv copy nan_to_num native_dropout dropout rrelu_with_noise complex polar
    angle"""
)
def elementwise(c: Call) -> Spans:
    operands = [x for x in (*c.args, *c.kwargs.values()) if isinstance(x, Tensor)]
    return c.combine([aligned(x, first(c.out), c.spans(x)) for x in operands])


@rule(
    """clone detach alias _to_copy contiguous lift_fresh lift positive fill zero bernoulli uniform normal zeros_like
    ones_like empty_like full_like rand_like randn_like conj view_as_real_copy _conj resolve_conj to_dense
    view_as_real"""
)
def like(c: Call) -> Spans:
    return c.spans(c.args[0])


@rule(
    """arange zeros ones full empty rand randn randint randperm scalar_tensor eye linspace empty_strided tril_indices
    triu_indices"""
)
def constant(c: Call) -> Spans:
    """Made in the forward pass with a size that is a number."""
    return ()


@rule("new_zeros new_ones new_full new_empty new_empty_strided")
def new(c: Call) -> Spans:
    """Filled evenly: sizes of the operand are taken to follow it, others what they meet (`Coupling` tries that)."""
    x, out = c.args[0], c.out
    same = {d for d in range(out.dim()) if x.dim() == out.dim() and x.shape[d] == out.shape[d]}
    spans = tuple(span for span in c.spans(x) if same.issuperset(span.dims))
    spans += c.record.free(out, [d for d in range(out.dim()) if d not in same])
    c.sized(out, spans)
    return spans


# --- normalisation ----------------------------------------------------------------------------------------------------


@rule(
    """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    _batch_norm_with_update _batch_norm_no_update"""
)
def batch_norm(c: Call) -> Spans:
    """Per channel (dimension 1): the channel's scale, shift and running statistics go with it.

    With statistics of the batch (of a weight that is standardised so, say) they are those of what stays of it.
    """
    labels, spans = c.alone(c.spans(c.args[0]), 1)
    for vector in (v for v in c.args[1:5] if isinstance(v, Tensor)):
        c.follows(vector, labels)
    if any(arg is True for arg in c.args):
        dims = set(range(c.args[0].dim())) - {1}
        spans = c.restricts(c.single(spans, dims), dims, "norm")
    return spans


@rule("native_layer_norm")
def layer_norm(c: Call) -> Spans:
    """Over the last dimensions, scale and shift in the same shape. The statistics then are those of what stays."""
    x, shape = c.args[:2]
    normalised = set(range(x.dim() - len(shape), x.dim()))
    vectors = [aligned(v, x, c.spans(v)) for v in c.args[2:4] if isinstance(v, Tensor)]
    spans = c.combine([aligned(x, x, c.single(c.spans(x), normalised)), *vectors])
    spans = c.restricts(spans, normalised, "norm")
    c.sized(x, spans, normalised)
    return spans


@rule("native_group_norm")
def group_norm(c: Call) -> Spans:
    """Whole groups go, and the others stay equal; with one group it is a norm over all channels, as layer_norm."""
    x, weight, bias, groups = *c.args[:3], c.args[6]
    spans = c.fix(c.spans(x), range(2, x.dim()), "has positions, not channels, in it")
    labels, spans = c.alone(spans, 1)
    c.sized(x, spans, {1})
    for vector in (weight, bias):
        c.follows(vector, labels)
    if labels is None or groups == 1:
        return c.restricts(spans, {1}, "norm")
    c.tie(labels.reshape(groups, -1)[:, :1], labels.reshape(groups, -1))
    return spans


@rule("_softmax _log_softmax _safe_softmax")
def softmax(c: Call) -> Spans:
    """Over one dimension, whose parts all depend on each other."""
    return c.fix(c.spans(c.args[0]), (c.args[1] % c.args[0].dim(),), "is normalised over by a softmax")


# --- reductions -------------------------------------------------------------------------------------------------------


@rule("mean sum var std var_mean std_mean amax amin linalg_vector_norm norm max min any all prod")
def reduction(c: Call) -> Spans:
    """Over some dimensions. A statistic over channels (mean, variance, maximum) is from then on that of the rest."""
    x = c.args[0]
    at = 2 if c.name in ("linalg_vector_norm", "norm") else 1
    dims = c.args[at] if len(c.args) > at else c.kwargs.get("dim")
    dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = {d % x.dim() for d in dims} if x.dim() else set()
    spans = c.restricts(c.single(c.spans(x), dims), dims, "statistic")
    spans = tuple(span for span in spans if not set(span.dims) & dims)
    return without(spans, dims, x.dim(), first(c.out).dim())


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _mixes(dim_at: int) -> Callable:
    """A rule for operators that mix the entries of one dimension: it keeps its size."""

    def mixing(c: Call) -> Spans:
        x = c.args[0]
        dims = c.args[dim_at] if len(c.args) > dim_at else -1
        dims = {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)}
        spans = c.fix(c.spans(x), dims, "has its entries mixed")
        return without(spans, dims, x.dim(), first(c.out).dim())

    return mixing


rule("cumsum cumprod sort argsort argmax argmin logcumsumexp logsumexp")(_mixes(1))
rule("topk kthvalue")(_mixes(2))


@rule(
    """max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_bilinear2d
    _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa upsample_linear1d upsample_trilinear3d
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    tril triu"""
)
def spatial(c: Call) -> Spans:
    """Pooling, resampling, padding: positions change, the leading dimensions (batch, channel) do not."""
    x, out = c.args[0], first(c.out)
    same = 0
    while same < x.dim() and x.shape[same] == out.shape[same]:
        same += 1
    least = 3 if "3d" in c.name else 1 if "1d" in c.name else 2
    positions = range(min(same, max(x.dim() - least, 0)), x.dim())
    return c.fix(c.spans(x), positions, "has positions, not channels, in it")


@rule("_fft_c2c _fft_r2c _fft_c2r")
def fourier(c: Call) -> Spans:
    x, dims = c.args[:2]
    return c.fix(c.spans(x), {d % x.dim() for d in dims}, "has its entries mixed")


@rule("view_as_complex")
def view_as_complex(c: Call) -> Spans:
    last = c.args[0].dim() - 1
    return without(c.fix(c.spans(c.args[0]), {last}, "has real and imaginary parts"), {last}, last + 1, last)


@rule("constant_pad_nd")
def pad(c: Call) -> Spans:
    """Constants at the ends of dimensions: fixed, so that a padded channel dimension keeps its size."""
    x, padding = c.args[:2]
    padded = {x.dim() - 1 - i // 2 for i, p in enumerate(padding) if p}
    return c.fix(c.spans(x), padded, "is padded with constants")
