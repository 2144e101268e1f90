"""Rules of `rules`: products. A sum over channels ties what it multiplies; the weight's columns there read them."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from labkit.pruning.blocks import Block, Blocks, Side, block_at, combine, moved

if TYPE_CHECKING:
    from labkit.pruning.tracing import Call, Tracer


def _contract(t: "Tracer", c: "Call", a: Tensor, dim_a: int, b: Tensor, dim_b: int) -> tuple[Blocks, Blocks]:
    """Sum over one dimension of each: the two are tied; (remaining blocks of a, of b)."""
    reason = c.because("is summed over with a dimension of fixed size")
    sides = []
    for x, dim in ((a, dim_a), (b, dim_b)):
        block = block_at(t.blocks(x), dim)
        # heads and positions inside a head share a block: the sum runs over the positions, so the heads keep the labels
        sides.append(t.fix(t.blocks(x), (dim,), reason) if block and len(block.dims) > 1 else t.blocks(x))
    block_a, block_b = block_at(sides[0], dim_a), block_at(sides[1], dim_b)
    if block_a and block_b:
        t.labels.tie(block_a.labels, block_b.labels)
        t.contracts(c, (a, dim_a, block_a.labels), (b, dim_b, block_b.labels))
    rest = []
    for blocks, dim, own in ((sides[0], dim_a, block_a), (sides[1], dim_b, block_b)):
        if own and not (block_a and block_b):
            blocks = t.fix(blocks, (dim,), reason)
        rest.append(tuple(block for block in blocks if dim not in block.dims))
    return rest[0], rest[1]


def mm(t: "Tracer", c: "Call") -> Blocks:
    """[n, k] x [k, m]"""
    a, b = c.args[-2:]
    left, right = _contract(t, c, a, 1, b, 0)
    t.counts(c, math.prod(a.shape) * b.shape[1], [(a, 0), (a, 1), (b, 1)])
    return _product(t, c, left, right, [0], [0, 1])


def addmm(t: "Tracer", c: "Call") -> Blocks:
    """bias + [n, k] x [k, m]"""
    bias, a, b = c.args[:3]
    left, right = _contract(t, c, a, 1, b, 0)
    t.counts(c, math.prod(a.shape) * b.shape[1], [(a, 0), (a, 1), (b, 1)])
    result = _product(t, c, left, right, [0], [0, 1])
    return _plus(t, c, result, bias)


def bmm(t: "Tracer", c: "Call") -> Blocks:
    """[batch, n, k] x [batch, k, m]"""
    a, b = c.args[-2:]
    left, right = _contract(t, c, a, 2, b, 1)
    t.counts(c, math.prod(a.shape) * b.shape[2], [(a, 0), (a, 1), (a, 2), (b, 2)])
    return _product(t, c, left, right, [0, 1], [0, None, 2])


def baddbmm(t: "Tracer", c: "Call") -> Blocks:
    bias, a, b = c.args[:3]
    left, right = _contract(t, c, a, 2, b, 1)
    t.counts(c, math.prod(a.shape) * b.shape[2], [(a, 0), (a, 1), (a, 2), (b, 2)])
    return _plus(t, c, _product(t, c, left, right, [0, 1], [0, None, 2]), bias)


def mv(t: "Tracer", c: "Call") -> Blocks:
    """[n, k] x [k]"""
    a, b = c.args[:2]
    left, _ = _contract(t, c, a, 1, b, 0)
    t.counts(c, math.prod(a.shape), [(a, 0), (a, 1)])
    return left


def dot(t: "Tracer", c: "Call") -> Blocks:
    _contract(t, c, c.args[0], 0, c.args[1], 0)
    return ()


def _product(t: "Tracer", c: "Call", left: Blocks, right: Blocks, where_left, where_right) -> Blocks:
    """Dimension i of an operand is dimension where[i] of the result; those of one result dimension are tied."""
    reason = c.because("meets a dimension of fixed size")
    present = [
        frozenset(d for d in where if d is not None and c.out.shape[d] > 1) for where in (where_left, where_right)
    ]
    if len(where_left) == 1:  # mm: the left rows only
        sides = [Side(moved(left, [0, None]), frozenset({0})), Side(moved(right, [None, 1]), frozenset({1}))]
    else:
        sides = [Side(moved(left, [*where_left, None]), present[0]), Side(moved(right, where_right), present[1])]
    return combine(t.labels, sides, reason)


def _plus(t: "Tracer", c: "Call", result: Blocks, bias: Tensor) -> Blocks:
    n = c.out.dim()
    shift = n - bias.dim()
    everywhere = frozenset(d for d in range(n) if c.out.shape[d] > 1)
    present = frozenset(d + shift for d in range(bias.dim()) if bias.shape[d] == c.out.shape[d + shift] > 1)
    sides = [Side(result, everywhere), Side(moved(t.blocks(bias), range(shift, n)), present)]
    return combine(t.labels, sides, c.because("meets a dimension of fixed size"))


def convolution(t: "Tracer", c: "Call") -> Blocks:
    """Weight [out, in / groups, *kernel], transposed [in, out / groups, *kernel]; of a grouped one whole groups go."""
    x, weight, bias, _, _, _, transposed, _, groups = c.args[:9]
    spatial = weight.dim() - 2
    channel = x.dim() - spatial - 1
    blocks = t.fix(t.blocks(x), range(channel + 1, x.dim()), c.because("has positions, not channels, in it"))
    t.note(x, blocks)
    t.labels.pin(_all_but(t, weight, (0, 1)), "")
    into, blocks = t.alone(x, channel, c.because("shares its labels with another dimension"))
    rest = tuple(block for block in blocks if channel not in block.dims)
    out_channels = weight.shape[1] * groups if transposed else weight.shape[0]
    if groups == 1:
        _, kept = _contract(t, c, x, channel, weight, 0 if transposed else 1)
        own = block_at(kept, 1 if transposed else 0)
        result = None if own is None else own.labels
    else:
        result = _grouped(t, c, into, weight, transposed, groups)
    if bias is not None and (own := block_at(t.blocks(bias), 0)):
        if result is None:
            t.labels.pin(own.labels, c.because("belongs to a fixed dimension"))
        else:
            t.labels.tie(result, own.labels)
    positions = math.prod(c.out.shape[-spatial:]) if not transposed else math.prod(x.shape[-spatial:])
    batch = x.shape[0] if channel else 1
    macs = batch * positions * weight.numel()
    factors = [into, result] if groups == 1 else [result]
    t.macs(c, macs, [labels for labels in factors if labels is not None])
    return rest if result is None or out_channels == 1 else (*rest, Block((channel,), result))


def _grouped(
    t: "Tracer", c: "Call", into: np.ndarray | None, weight: Tensor, transposed: bool, groups: int
) -> np.ndarray | None:
    """Labels of the output of a grouped convolution: all channels of a group, in and out, are tied."""
    t.labels.pin(_all_but(t, weight, (0,)), "")
    own = block_at(t.blocks(weight), 0).labels
    if into is None:
        t.labels.pin(own, c.because("reads a dimension of fixed size"))
        return None
    out = np.repeat(into.reshape(groups, -1)[:, 0], weight.shape[1]) if transposed else own
    t.labels.tie(into.reshape(groups, -1)[:, :1], into.reshape(groups, -1))
    t.labels.tie(into.reshape(groups, -1)[:, :1], own.reshape(groups, -1))
    return out


def _all_but(t: "Tracer", x: Tensor, dims: Sequence[int]) -> np.ndarray:
    parts = [block.labels.ravel() for block in t.blocks(x) if not set(block.dims) & set(dims)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def embedding(t: "Tracer", c: "Call") -> Blocks:
    """Rows [V, D] picked by indices [...]: [..., D]"""
    weight, indices = c.args[:2]
    blocks = t.fix(t.blocks(weight), (0,), "")
    t.fix(t.blocks(indices), range(indices.dim()), "")
    return moved(blocks, [None, indices.dim()])


# --- attention --------------------------------------------------------------------------------------------------------


def attention(t: "Tracer", c: "Call") -> Blocks:
    """softmax(q k^T scale) v, q [batch, heads, L, E], v [batch, heads, S, Ev]: heads carry the labels; E stays."""
    q, k, v = c.args[:3]
    n = q.dim()
    reason = c.because("is the width of a head, which the scale depends on")
    sides = []
    for x in (q, k, v):
        blocks = t.fix(t.blocks(x), (n - 2, n - 1), reason)
        sides.append(Side(blocks, frozenset(d for d in range(n - 2) if x.shape[d] > 1)))
    for x in (x for x in c.args[3:] if isinstance(x, Tensor)):
        shift = n - x.dim()
        blocks = moved(t.fix(t.blocks(x), (x.dim() - 1, x.dim() - 2), reason), range(shift, n))
        sides.append(Side(blocks, frozenset(d + shift for d in range(x.dim() - 2) if x.shape[d] > 1)))
    return combine(t.labels, sides, c.because("meets a dimension of fixed size"))
