"""Rules of `rules`: shapes. Views, cuts and joins move labels about, and say which sizes may be written down."""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from labkit.pruning.blocks import Block, Blocks, Side, block_at, combine, drop_single, moved, reshaped, without

if TYPE_CHECKING:
    from labkit.pruning.tracing import Call, Tracer


def view(t: "Tracer", c: "Call") -> Blocks:
    blocks = reshaped(t.labels, t.blocks(c.args[0]), c.args[0].shape, c.out.shape)
    t.sized(c, c.out, blocks)
    return blocks


def as_strided(t: "Tracer", c: "Call") -> Blocks | None:
    """Only where it changes nothing but strides of dimensions of size 1 (pooling does so for channels-last inputs)."""
    x, out = c.args[0], c.out
    layouts = ([(n, s) for n, s in zip(y.shape, y.stride(), strict=True) if n > 1] for y in (x, out))
    return t.blocks(x) if x.shape == out.shape and next(layouts) == next(layouts) else None


def permute(t: "Tracer", c: "Call") -> Blocks:
    order = [d % len(c.args[1]) for d in c.args[1]]
    return moved(t.blocks(c.args[0]), [order.index(d) for d in range(len(order))])


def transpose(t: "Tracer", c: "Call") -> Blocks:
    n = c.args[0].dim()
    if n < 2:
        return t.blocks(c.args[0])
    a, b = (c.args[1] % n, c.args[2] % n) if len(c.args) > 2 else (0, 1)  # aten.t has no dimensions
    return moved(t.blocks(c.args[0]), [b if d == a else a if d == b else d for d in range(n)])


def unsqueeze(t: "Tracer", c: "Call") -> Blocks:
    dim = c.args[1] % c.out.dim()
    return moved(t.blocks(c.args[0]), [d + (d >= dim) for d in range(c.args[0].dim())])


def squeeze(t: "Tracer", c: "Call") -> Blocks:
    x = c.args[0]
    dims = range(x.dim()) if len(c.args) < 2 else [c.args[1]] if isinstance(c.args[1], int) else c.args[1]
    gone = {d % x.dim() for d in dims if x.shape[d] == 1} if x.dim() else set()
    return without(t.blocks(x), gone, x.dim(), c.out.dim())


def expand(t: "Tracer", c: "Call") -> Blocks:
    """Repeated dimensions follow what they meet; the others keep their labels."""
    x = c.args[0]
    shift = c.out.dim() - x.dim()
    blocks = moved(t.blocks(x), range(shift, c.out.dim()))
    repeated = [d for d in range(c.out.dim()) if d < shift or x.shape[d - shift] != c.out.shape[d]]
    blocks = (*blocks, *t.free(c.out, repeated))
    t.sized(c, c.out, blocks)
    return blocks


def repeat(t: "Tracer", c: "Call") -> Blocks:
    """Labels repeated as the entries are."""
    x, times = c.args[:2]
    shift = len(times) - x.dim()
    result = []
    for block in t.blocks(x):
        dims = tuple(d + shift for d in block.dims)
        result.append(Block(dims, np.tile(block.labels, [times[d] for d in dims])))
    return tuple(result)


def cat(t: "Tracer", c: "Call") -> Blocks:
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


def stack(t: "Tracer", c: "Call") -> Blocks:
    everywhere = frozenset(d for d in range(c.args[0][0].dim()) if c.args[0][0].shape[d] > 1)
    sides = [Side(t.blocks(x), everywhere) for x in c.args[0]]
    blocks = combine(t.labels, sides, c.because("meets a dimension of fixed size"))
    dim = (c.args[1] if len(c.args) > 1 else 0) % c.out.dim()
    return moved(blocks, [d + (d >= dim) for d in range(c.out.dim() - 1)])


def _cut(t: "Tracer", c: "Call", x: Tensor, dim: int, start: int, length: int, step: int = 1) -> Blocks:
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
        return (*rest, Block(block.dims, part))
    if step > 1 or size % length or start % length:
        return t.fix(blocks, (dim,), c.because("is cut at a fixed position"))
    t.labels.keep_even(list(block.labels.reshape(-1, length)), c.because("is cut into pieces of one size"))
    return (*rest, Block((dim,), block.labels[start : start + length]))


def slice_(t: "Tracer", c: "Call") -> Blocks:
    x = c.args[0]
    dim = (c.args[1] if len(c.args) > 1 else 0) % x.dim()
    start, end, step = (*c.args[2:5], *[None, None, 1][len(c.args[2:5]) :])
    start, end, step = slice(start, end, step).indices(x.shape[dim])
    blocks = _cut(t, c, x, dim, start, c.out.shape[dim], step)
    t.sized(c, c.out, blocks)
    return drop_single(blocks, c.out.shape)


def select(t: "Tracer", c: "Call") -> Blocks:
    x, dim, index = c.args[0], c.args[1] % c.args[0].dim(), c.args[2]
    blocks = _cut_one(t, c, x, dim, index % x.shape[dim])
    return moved(blocks, [None if d == dim else d - (d > dim) for d in range(x.dim())])


def _cut_one(t: "Tracer", c: "Call", x: Tensor, dim: int, index: int) -> Blocks:
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


def unbind(t: "Tracer", c: "Call") -> list[Blocks]:
    x = c.args[0]
    dim = (c.args[1] if len(c.args) > 1 else 0) % x.dim()
    where = [None if d == dim else d - (d > dim) for d in range(x.dim())]
    return [moved(_cut_one(t, c, x, dim, i), where) for i in range(x.shape[dim])]


def split(t: "Tracer", c: "Call") -> list[Blocks]:
    x = c.args[0]
    dim = (c.args[2] if len(c.args) > 2 else 0) % x.dim()
    starts = np.cumsum([0, *(part.shape[dim] for part in c.out)])
    results = []
    for part, start in zip(c.out, starts, strict=False):
        blocks = _cut(t, c, x, dim, int(start), part.shape[dim])
        t.sized(c, part, blocks)
        results.append(drop_single(blocks, part.shape))
    return results


def index(t: "Tracer", c: "Call") -> Blocks:
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


def index_select(t: "Tracer", c: "Call") -> Blocks:
    x, dim = c.args[0], c.args[1] % c.args[0].dim()
    return t.fix(t.blocks(x), (dim,), c.because("is indexed by a tensor"))


def flip(t: "Tracer", c: "Call") -> Blocks:
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


def pixel_shuffle(t: "Tracer", c: "Call") -> Blocks:
    """[.., C r r, H, W] -> [.., C, H r, W r]: the r r channels of one output channel go together."""
    x, r = c.args[:2]
    dim = x.dim() - 3
    labels, blocks = t.alone(x, dim, c.because("shares its labels with another dimension"))
    if labels is None:
        return blocks
    rows = labels.reshape(-1, r * r)
    t.labels.tie(rows[:, :1], rows)
    return (*(b for b in blocks if dim not in b.dims), *((Block((dim,), rows[:, 0]),) if len(rows) > 1 else ()))
