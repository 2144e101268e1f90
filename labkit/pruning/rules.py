"""One rule an operator: how labels pass through it. An operator without a rule makes all that flows into it unprunable.

Every rule gets the tracer `t` and the call `c` and returns the blocks of the result. c.args are the operator's
positional arguments as its ATen schema has them; t.blocks(x) are the labels that x carries (see `blocks`). None says
that the rule does not cover the case. The table RULES at the end is the whole list.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from labkit.pruning.blocks import Block, Blocks, Side, block_at, combine, moved, reshaped


def _vector(labels: np.ndarray, dim: int) -> Blocks:
    return (Block((dim,), labels),)


def _at(t, x: Tensor, dim: int, reason: str) -> tuple[np.ndarray | None, Blocks]:
    """(labels of dimension `dim` alone, all blocks of x); other dimensions that share its block are fixed first."""
    blocks = t.blocks(x)
    block = block_at(blocks, dim)
    if block is None:
        return None, blocks
    blocks = t.fix(blocks, set(block.dims) - {dim}, reason)
    return block_at(blocks, dim).labels, blocks


def _tensors(args: Sequence) -> list[Tensor]:
    return [x for x in args if isinstance(x, Tensor)]


# --- elementwise ------------------------------------------------------------------------------------------------------


def elementwise(t, c) -> Blocks:
    """Every operand is aligned at its last dimension and repeated where it has size 1."""
    shape = c.out.shape
    sides = []
    for x in _tensors([*c.args, *c.kwargs.values()]):
        shift = len(shape) - x.dim()
        present = frozenset(d + shift for d in range(x.dim()) if x.shape[d] == shape[d + shift] > 1)
        blocks = moved(t.blocks(x), range(shift, len(shape)))
        sides.append(Side(blocks, present))
    return combine(t.labels, sides, c.because("meets a dimension of fixed size"))


def like(t, c) -> Blocks:
    return t.blocks(c.args[0])


def constant(t, c) -> Blocks:
    """Made in the forward pass with a size that is a number."""
    return ()


# --- products ---------------------------------------------------------------------------------------------------------


def _contract(t, c, a: Tensor, dim_a: int, b: Tensor, dim_b: int) -> tuple[Blocks, Blocks]:
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


def mm(t, c) -> Blocks:
    """[n, k] x [k, m]"""
    a, b = c.args[-2:]
    left, right = _contract(t, c, a, 1, b, 0)
    t.counts(c, math.prod(a.shape) * b.shape[1], [(a, 0), (a, 1), (b, 1)])
    return _product(t, c, left, right, [0], [0, 1])


def addmm(t, c) -> Blocks:
    """bias + [n, k] x [k, m]"""
    bias, a, b = c.args[:3]
    left, right = _contract(t, c, a, 1, b, 0)
    t.counts(c, math.prod(a.shape) * b.shape[1], [(a, 0), (a, 1), (b, 1)])
    result = _product(t, c, left, right, [0], [0, 1])
    return _plus(t, c, result, bias)


def bmm(t, c) -> Blocks:
    """[batch, n, k] x [batch, k, m]"""
    a, b = c.args[-2:]
    left, right = _contract(t, c, a, 2, b, 1)
    t.counts(c, math.prod(a.shape) * b.shape[2], [(a, 0), (a, 1), (a, 2), (b, 2)])
    return _product(t, c, left, right, [0, 1], [0, None, 2])


def baddbmm(t, c) -> Blocks:
    bias, a, b = c.args[:3]
    left, right = _contract(t, c, a, 2, b, 1)
    t.counts(c, math.prod(a.shape) * b.shape[2], [(a, 0), (a, 1), (a, 2), (b, 2)])
    return _plus(t, c, _product(t, c, left, right, [0, 1], [0, None, 2]), bias)


def mv(t, c) -> Blocks:
    """[n, k] x [k]"""
    a, b = c.args[:2]
    left, _ = _contract(t, c, a, 1, b, 0)
    t.counts(c, math.prod(a.shape), [(a, 0), (a, 1)])
    return left


def dot(t, c) -> Blocks:
    _contract(t, c, c.args[0], 0, c.args[1], 0)
    return ()


def _product(t, c, left: Blocks, right: Blocks, where_left, where_right) -> Blocks:
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


def _plus(t, c, result: Blocks, bias: Tensor) -> Blocks:
    n = c.out.dim()
    shift = n - bias.dim()
    everywhere = frozenset(d for d in range(n) if c.out.shape[d] > 1)
    present = frozenset(d + shift for d in range(bias.dim()) if bias.shape[d] == c.out.shape[d + shift] > 1)
    sides = [Side(result, everywhere), Side(moved(t.blocks(bias), range(shift, n)), present)]
    return combine(t.labels, sides, c.because("meets a dimension of fixed size"))


def convolution(t, c) -> Blocks:
    """Weight [out, in / groups, *kernel], transposed [in, out / groups, *kernel]; of a grouped one whole groups go."""
    x, weight, bias, _, _, _, transposed, _, groups = c.args[:9]
    spatial = weight.dim() - 2
    channel = x.dim() - spatial - 1
    blocks = t.fix(t.blocks(x), range(channel + 1, x.dim()), c.because("has positions, not channels, in it"))
    t.note(x, blocks)
    t.labels.pin(_all_but(t, weight, (0, 1)), "")
    into, blocks = _at(t, x, channel, c.because("shares its labels with another dimension"))
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


def _grouped(t, c, into: np.ndarray | None, weight: Tensor, transposed: bool, groups: int) -> np.ndarray | None:
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


def _all_but(t, x: Tensor, dims: Sequence[int]) -> np.ndarray:
    parts = [block.labels.ravel() for block in t.blocks(x) if not set(block.dims) & set(dims)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def embedding(t, c) -> Blocks:
    """Rows [V, D] picked by indices [...]: [..., D]"""
    weight, indices = c.args[:2]
    blocks = t.fix(t.blocks(weight), (0,), "")
    t.fix(t.blocks(indices), range(indices.dim()), "")
    return moved(blocks, [None, indices.dim()])


# --- normalisation ----------------------------------------------------------------------------------------------------


def batch_norm(t, c) -> Blocks:
    """Per channel (dimension 1): the channel's scale, shift and running statistics go with it."""
    x = c.args[0]
    labels, blocks = _at(t, x, 1, c.because("shares its labels with another dimension"))
    for vector in (v for v in c.args[1:5] if isinstance(v, Tensor)):
        own = block_at(t.blocks(vector), 0)
        if own is None:
            continue
        if labels is None:
            t.labels.pin(own.labels, c.because("belongs to a fixed dimension"))
        else:
            t.labels.tie(labels, own.labels)
            t.scaled(own.labels) if vector is c.args[1] else None
    return blocks


def layer_norm(t, c) -> Blocks:
    """Over the last dimensions, scale and shift in the same shape. The statistics then are those of what is kept."""
    x, shape = c.args[:2]
    n = x.dim()
    normalised = range(n - len(shape), n)
    blocks = t.blocks(x)
    reason = c.because("is normalised over together with a dimension that is kept")
    for block in blocks:
        inside = set(block.dims) & set(normalised)
        if inside and len(block.dims) > 1:
            blocks = t.fix(blocks, inside, reason)
    everywhere = frozenset(d for d in range(n) if x.shape[d] > 1)
    sides = [Side(blocks, everywhere)]
    for vector in (v for v in c.args[2:4] if isinstance(v, Tensor)):
        shift = n - vector.dim()
        present = frozenset(d + shift for d in range(vector.dim()) if vector.shape[d] > 1)
        sides.append(Side(moved(t.blocks(vector), range(shift, n)), present))
    blocks = combine(t.labels, sides, c.because("meets a dimension of fixed size"))
    for block in blocks:
        if set(block.dims) & set(normalised):
            t.restricts(c, block.dims[0], block.labels)
    return blocks


def group_norm(t, c) -> Blocks:
    """Whole groups go, and the others stay equal; with one group it is a norm over all channels, as layer_norm."""
    x, weight, bias, groups = *c.args[:3], c.args[6]
    labels, blocks = _at(t, x, 1, c.because("shares its labels with another dimension"))
    for vector in (v for v in (weight, bias) if isinstance(v, Tensor)):
        own = block_at(t.blocks(vector), 0)
        if own and labels is None:
            t.labels.pin(own.labels, c.because("belongs to a fixed dimension"))
        elif own:
            t.labels.tie(labels, own.labels)
    if labels is not None and groups > 1:
        t.labels.tie(labels.reshape(groups, -1)[:, :1], labels.reshape(groups, -1))
    elif labels is not None:
        return t.fix(blocks, (1,), c.because("is normalised over with all other channels and positions"))
    return blocks


def softmax(t, c) -> Blocks:
    """Over one dimension, whose parts all depend on each other."""
    return t.fix(t.blocks(c.args[0]), (c.args[1] % c.args[0].dim(),), c.because("is normalised over by a softmax"))


# --- reductions -------------------------------------------------------------------------------------------------------


def reduction(t, c) -> Blocks:
    """Over some dimensions. A statistic over channels (mean, variance, maximum) is from then on that of the kept."""
    x = c.args[0]
    dims = c.args[1] if len(c.args) > 1 else c.kwargs.get("dim")
    if c.name in ("linalg_vector_norm", "norm"):
        dims = c.args[2] if len(c.args) > 2 else None
    dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = {d % x.dim() for d in dims} if x.dim() else set()
    blocks = t.blocks(x)
    for block in blocks:
        inside = set(block.dims) & dims
        if inside and len(block.dims) > 1:
            blocks = t.fix(blocks, inside, c.because("is reduced"))
    for block in blocks:
        if set(block.dims) <= dims:
            t.restricts(c, block.dims[0], block.labels)
    blocks = tuple(block for block in blocks if not set(block.dims) & dims)
    return _without(blocks, dims, x.dim(), _first(c.out).dim())


def _without(blocks: Blocks, dims: set[int], before: int, after: int) -> Blocks:
    if before == after:
        return blocks
    kept = [d for d in range(before) if d not in dims]
    return moved(blocks, [kept.index(d) if d in kept else None for d in range(before)])


def _first(out) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def along(dim_at: int, default: int = -1) -> Callable:
    """A rule for operators that mix the entries of one dimension (cumsum, sort, topk): it keeps its size."""

    def rule(t, c) -> Blocks:
        x = c.args[0]
        dim = c.args[dim_at] if len(c.args) > dim_at else default
        blocks = t.fix(t.blocks(x), (dim % x.dim(),), c.because("has its entries mixed"))
        return _without(blocks, {dim % x.dim()}, x.dim(), _first(c.out).dim())

    return rule


def spatial(t, c) -> Blocks:
    """Pooling, resampling, padding: positions change, the leading dimensions (batch, channel) do not."""
    x, out = c.args[0], _first(c.out)
    changing = 0
    while changing < x.dim() and x.shape[changing] == out.shape[changing]:
        changing += 1
    least = {"max_pool1d": 1, "avg_pool1d": 1}.get(c.name, 3 if "3d" in c.name else 1 if "1d" in c.name else 2)
    first = min(changing, max(x.dim() - least, 0))
    return t.fix(t.blocks(x), range(first, x.dim()), c.because("has positions, not channels, in it"))


def pad(t, c) -> Blocks:
    """Constants at the ends of dimensions: fixed, so that a padded channel dimension keeps its size."""
    x, padding = c.args[:2]
    padded = {x.dim() - 1 - i // 2 for i, p in enumerate(padding) if p}
    return t.fix(t.blocks(x), padded, c.because("is padded with constants"))


# --- shape ------------------------------------------------------------------------------------------------------------


def view(t, c) -> Blocks:
    blocks = reshaped(t.labels, t.blocks(c.args[0]), c.args[0].shape, c.out.shape)
    t.sized(c, c.out, blocks)
    return blocks


def as_strided(t, c) -> Blocks | None:
    """Only where it changes nothing but strides of dimensions of size 1 (pooling does so for channels-last inputs)."""
    x, out = c.args[0], c.out
    layouts = ([(n, s) for n, s in zip(y.shape, y.stride(), strict=True) if n > 1] for y in (x, out))
    return t.blocks(x) if x.shape == out.shape and next(layouts) == next(layouts) else None


def permute(t, c) -> Blocks:
    order = [d % len(c.args[1]) for d in c.args[1]]
    return moved(t.blocks(c.args[0]), [order.index(d) for d in range(len(order))])


def transpose(t, c) -> Blocks:
    n = c.args[0].dim()
    if n < 2:
        return t.blocks(c.args[0])
    a, b = (c.args[1] % n, c.args[2] % n) if len(c.args) > 2 else (0, 1)  # aten.t has no dimensions
    return moved(t.blocks(c.args[0]), [b if d == a else a if d == b else d for d in range(n)])


def unsqueeze(t, c) -> Blocks:
    dim = c.args[1] % c.out.dim()
    return moved(t.blocks(c.args[0]), [d + (d >= dim) for d in range(c.args[0].dim())])


def squeeze(t, c) -> Blocks:
    x = c.args[0]
    dims = range(x.dim()) if len(c.args) < 2 else [c.args[1]] if isinstance(c.args[1], int) else c.args[1]
    gone = {d % x.dim() for d in dims if x.shape[d] == 1} if x.dim() else set()
    return _without(t.blocks(x), gone, x.dim(), c.out.dim())


def expand(t, c) -> Blocks:
    """Repeated dimensions have a fixed size; the others keep their labels."""
    shift = c.out.dim() - c.args[0].dim()
    blocks = moved(t.blocks(c.args[0]), range(shift, c.out.dim()))
    t.sized(c, c.out, blocks)
    return blocks


def repeat(t, c) -> Blocks:
    """Labels repeated as the entries are."""
    x, times = c.args[:2]
    shift = len(times) - x.dim()
    result = []
    for block in t.blocks(x):
        dims = tuple(d + shift for d in block.dims)
        result.append(Block(dims, np.tile(block.labels, [times[d] for d in dims])))
    return tuple(result)


def cat(t, c) -> Blocks:
    """Labels one after the other along the dimension; the other dimensions are tied, as in a sum."""
    parts = [x for x in c.args[0] if x.dim() == c.out.dim()]
    dim = (c.args[1] if len(c.args) > 1 else 0) % c.out.dim()
    reason = c.because("is joined with a part of fixed size")
    everywhere = frozenset(d for d in range(c.out.dim()) if c.out.shape[d] > 1 and d != dim)
    blocks = [t.blocks(x) for x in parts]
    spans = {tuple(block.dims) for own in blocks if (block := block_at(own, dim))}
    if len(spans) > 1:  # heads in one part and positions inside them in another
        shared = set.intersection(*map(set, spans))
        blocks = [t.fix(own, {d for span in spans for d in span} - shared, reason) for own in blocks]
    along_ = [block_at(own, dim) for own in blocks]
    rest = [tuple(block for block in own if dim not in block.dims) for own in blocks]
    if any(block and len(block.dims) > 1 for block in along_) and not all(along_):
        rest = [r + (t.fix((b,), (dim,), reason) if b else ()) for r, b in zip(rest, along_, strict=True)]
        along_ = [None] * len(parts)
    sides = [Side(own, everywhere) for own in rest]
    result = combine(t.labels, sides, c.because("meets a dimension of fixed size"))
    if not any(along_):
        return result
    dims = next(block.dims for block in along_ if block)
    pieces = [b.labels if b else t.fixed(x.shape[dim], reason) for b, x in zip(along_, parts, strict=True)]
    return (*result, Block(dims, np.concatenate(pieces, axis=dims.index(dim))))


def stack(t, c) -> Blocks:
    everywhere = frozenset(d for d in range(c.args[0][0].dim()) if c.args[0][0].shape[d] > 1)
    sides = [Side(t.blocks(x), everywhere) for x in c.args[0]]
    blocks = combine(t.labels, sides, c.because("meets a dimension of fixed size"))
    dim = (c.args[1] if len(c.args) > 1 else 0) % c.out.dim()
    return moved(blocks, [d + (d >= dim) for d in range(c.out.dim() - 1)])


def _cut(t, c, x: Tensor, dim: int, start: int, length: int, step: int = 1) -> Blocks:
    """x.narrow(dim, start, length): of a block of several dimensions the cut one is fixed, its labels are the part's.

    A dimension that has labels by itself stays prunable where the cut is one of its equal pieces, evenly over them.
    """
    size = x.shape[dim]
    blocks = t.blocks(x)
    block = block_at(blocks, dim)
    if block is None or (start == 0 and length == size and step == 1):
        return blocks
    rest = tuple(b for b in blocks if dim not in b.dims)
    if len(block.dims) > 1:
        axis = block.dims.index(dim)
        t.labels.tie(block.labels.take([0], axis), block.labels)
        part = block.labels.take(range(start, start + length * step, step), axis)
        return (*rest, Block(block.dims, part)) if length > 1 else (*rest, Block(block.dims, part))
    if step > 1 or size % length or start % length:
        return t.fix(blocks, (dim,), c.because("is cut at a fixed position"))
    t.labels.keep_even(list(block.labels.reshape(-1, length)), c.because("is cut into pieces of one size"))
    return (*rest, Block((dim,), block.labels[start : start + length]))


def slice_(t, c) -> Blocks:
    x = c.args[0]
    dim = (c.args[1] if len(c.args) > 1 else 0) % x.dim()
    start, end, step = (*c.args[2:5], *[None, None, 1][len(c.args[2:5]) :])
    start, end, step = slice(start, end, step).indices(x.shape[dim])
    blocks = _cut(t, c, x, dim, start, c.out.shape[dim], step)
    t.sized(c, c.out, blocks)
    return _drop_single(c.out, blocks)


def select(t, c) -> Blocks:
    x, dim, index = c.args[0], c.args[1] % c.args[0].dim(), c.args[2]
    blocks = _cut_one(t, c, x, dim, index % x.shape[dim])
    return moved(blocks, [None if d == dim else d - (d > dim) for d in range(x.dim())])


def _cut_one(t, c, x: Tensor, dim: int, index: int) -> Blocks:
    """One entry of a dimension, which therefore keeps its size; an axis of length 1 stays."""
    blocks = t.blocks(x)
    block = block_at(blocks, dim)
    if block is None:
        return blocks
    rest = tuple(b for b in blocks if b is not block)
    if len(block.dims) == 1:
        return (*rest, *t.fix((block,), (dim,), c.because("is indexed at a fixed position")))
    axis = block.dims.index(dim)
    t.labels.tie(block.labels.take([0], axis), block.labels)
    return (*rest, Block(block.dims, block.labels.take([index], axis)))


def unbind(t, c) -> list[Blocks]:
    x = c.args[0]
    dim = (c.args[1] if len(c.args) > 1 else 0) % x.dim()
    where = [None if d == dim else d - (d > dim) for d in range(x.dim())]
    return [moved(_cut_one(t, c, x, dim, i), where) for i in range(x.shape[dim])]


def split(t, c) -> list[Blocks]:
    x = c.args[0]
    dim = (c.args[2] if len(c.args) > 2 else 0) % x.dim()
    starts = np.cumsum([0, *(part.shape[dim] for part in c.out)])
    results = []
    for part, start in zip(c.out, starts, strict=False):
        blocks = _cut(t, c, x, dim, int(start), part.shape[dim])
        t.sized(c, part, blocks)
        results.append(_drop_single(part, blocks))
    return results


def _drop_single(x: Tensor, blocks: Blocks) -> Blocks:
    """Dimensions of size 1 carry no labels."""
    result = []
    for block in blocks:
        single = tuple(i for i, d in enumerate(block.dims) if x.shape[d] == 1)
        dims = tuple(d for d in block.dims if x.shape[d] > 1)
        if dims:
            result.append(Block(dims, block.labels.squeeze(single)))
    return tuple(result)


def index(t, c) -> Blocks:
    """x[i, j, :]: the indexed dimensions keep their size; the results' dimensions stand where the first of them was."""
    x, indices = c.args[:2]
    indexed = [d for d, i in enumerate(indices) if i is not None]
    reason = c.because("is indexed by a tensor")
    blocks = t.fix(t.blocks(x), indexed, reason)
    for i in (i for i in indices if i is not None):
        t.fix(t.blocks(i), range(i.dim()), "")
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
    return moved(blocks, where)


def index_select(t, c) -> Blocks:
    x, dim = c.args[0], c.args[1] % c.args[0].dim()
    return t.fix(t.blocks(x), (dim,), c.because("is indexed by a tensor"))


def flip(t, c) -> Blocks:
    """Reversed dimensions keep labels where they belong; rolled ones wrap, so they are fixed."""
    n = c.args[0].dim()
    if c.name == "flip":
        dims = {d % n for d in c.args[1]}
        return tuple(
            Block(b.dims, np.flip(b.labels, [i for i, d in enumerate(b.dims) if d in dims]))
            for b in t.blocks(c.args[0])
        )
    dims = c.args[2] if len(c.args) > 2 and c.args[2] else range(n)
    return t.fix(t.blocks(c.args[0]), {d % n for d in dims}, c.because("is rolled"))


def pixel_shuffle(t, c) -> Blocks:
    """[.., C r r, H, W] -> [.., C, H r, W r]: the r r channels of one output channel go together."""
    x, r = c.args[:2]
    dim = x.dim() - 3
    labels, blocks = _at(t, x, dim, c.because("shares its labels with another dimension"))
    if labels is None:
        return blocks
    rows = labels.reshape(-1, r * r)
    t.labels.tie(rows[:, :1], rows)
    return (*(b for b in blocks if dim not in b.dims), *(_vector(rows[:, 0], dim) if len(rows) > 1 else ()))


# --- attention --------------------------------------------------------------------------------------------------------


def attention(t, c) -> Blocks:
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


# --- the table --------------------------------------------------------------------------------------------------------

_TABLE: list[tuple[Callable, str]] = [
    (
        elementwise,
        """add sub rsub mul div pow remainder fmod floor_divide maximum minimum fmax fmin where clamp clamp_min clamp_max
        relu relu6 sigmoid tanh gelu silu mish elu celu selu leaky_relu hardswish hardsigmoid hardtanh softplus
        log_sigmoid_forward threshold hardshrink softshrink _prelu_kernel prelu exp expm1 exp2 log log1p log2 log10
        sqrt rsqrt reciprocal square neg abs sign erf erfc sin cos tan atan atan2 floor ceil round trunc frac
        isnan isinf isfinite eq ne lt le gt ge logical_and logical_or logical_not logical_xor
        bitwise_and bitwise_or bitwise_not bitwise_xor masked_fill lerp addcmul addcdiv copy nan_to_num
        native_dropout dropout rrelu_with_noise complex""",
    ),
    (
        like,
        """clone detach alias _to_copy contiguous lift_fresh lift positive fill zero bernoulli uniform normal
        zeros_like ones_like empty_like full_like rand_like randn_like conj view_as_real_copy _conj resolve_conj
        to_dense""",
    ),
    (
        constant,
        """arange zeros ones full empty rand randn randint randperm scalar_tensor eye linspace empty_strided
        new_zeros new_ones new_full new_empty new_empty_strided tril_indices triu_indices""",
    ),
    (mm, "mm"),
    (addmm, "addmm"),
    (bmm, "bmm"),
    (baddbmm, "baddbmm"),
    (mv, "mv"),
    (dot, "dot"),
    (convolution, "convolution"),
    (embedding, "embedding"),
    (
        batch_norm,
        """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
        _batch_norm_with_update _batch_norm_no_update""",
    ),
    (layer_norm, "native_layer_norm"),
    (group_norm, "native_group_norm"),
    (softmax, "_softmax _log_softmax _safe_softmax"),
    (reduction, "mean sum var std var_mean std_mean amax amin linalg_vector_norm norm max min any all prod"),
    (along(1), "cumsum cumprod sort argsort argmax argmin logcumsumexp logsumexp tril_ triu_"),
    (along(2), "topk kthvalue"),
    (
        spatial,
        """max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d
        _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d
        upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_bilinear2d
        _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa upsample_linear1d upsample_trilinear3d
        reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
        tril triu""",
    ),
    (pad, "constant_pad_nd"),
    (view, "view _unsafe_view reshape _reshape_alias"),
    (as_strided, "as_strided"),
    (permute, "permute"),
    (transpose, "transpose t"),
    (unsqueeze, "unsqueeze"),
    (squeeze, "squeeze"),
    (expand, "expand"),
    (repeat, "repeat"),
    (cat, "cat"),
    (stack, "stack"),
    (slice_, "slice"),
    (select, "select"),
    (unbind, "unbind"),
    (split, "split split_with_sizes"),
    (index, "index"),
    (index_select, "index_select"),
    (flip, "flip roll"),
    (pixel_shuffle, "pixel_shuffle"),
    (
        attention,
        """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_attention_math
        _scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention""",
    ),
]
RULES: dict[str, Callable] = {name: rule for rule, names in _TABLE for name in names.split()}
