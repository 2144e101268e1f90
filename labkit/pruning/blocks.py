"""What a tensor's dimensions carry while a model is traced: blocks of labels, and the moves that operators make.

A block is an array of labels with one axis for each of the dimensions that it spans. A conv's output [N, C, H, W] has
one block on dimension 1. A Linear's output [N, L, 768] viewed as [N, L, 12, 64] has one block on dimensions 2 and 3: it
is not yet decided whether heads or positions inside the heads may go. Dimensions without a block never change size.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from labkit.pruning.labels import Labels


class Block(NamedTuple):
    """Labels of the dimensions `dims` (rising), one axis each."""

    dims: tuple[int, ...]
    labels: np.ndarray


Blocks = tuple[Block, ...]


class Side(NamedTuple):
    """An operand on the dimensions of a result: its blocks, and the dimensions on which it is not just repeated."""

    blocks: Blocks
    present: frozenset[int]


def block_at(blocks: Iterable[Block], dim: int) -> Block | None:
    return next((block for block in blocks if dim in block.dims), None)


def fix(labels: Labels, blocks: Blocks, dims: Iterable[int], reason: str) -> Blocks:
    """`blocks` after `dims` may no longer shrink.

    A block that has other dimensions lives on there: its labels are tied along the fixed ones (the 64 of each head).
    """
    dims = frozenset(dims)
    kept = []
    for block in blocks:
        axes = tuple(i for i, dim in enumerate(block.dims) if dim in dims)
        if not axes:
            kept.append(block)
        elif len(axes) == len(block.dims):
            labels.pin(block.labels, reason)
        else:
            first = block.labels[tuple(slice(0, 1) if i in axes else slice(None) for i in range(block.labels.ndim))]
            labels.tie(first, block.labels)
            kept.append(Block(tuple(dim for dim in block.dims if dim not in dims), first.squeeze(axes)))
    return tuple(kept)


def alone(labels: Labels, blocks: Blocks, dim: int, reason: str) -> tuple[np.ndarray | None, Blocks]:
    """(labels of dimension `dim` by itself, all blocks): other dimensions of its block are fixed."""
    block = block_at(blocks, dim)
    if block is None:
        return None, blocks
    blocks = fix(labels, blocks, set(block.dims) - {dim}, reason)
    return block_at(blocks, dim).labels, blocks


def combine(labels: Labels, sides: Sequence[Side], reason: str) -> Blocks:
    """The blocks of an elementwise result: labels at the same place are tied, a fixed dimension fixes the others."""
    blocks = [side.blocks for side in sides]
    while conflict := _conflict(labels, blocks, sides):
        side, dim = conflict
        blocks[side] = fix(labels, blocks[side], (dim,), reason)
    result: dict[tuple[int, ...], Block] = {}
    for block in (block for side in blocks for block in side):
        other = result.setdefault(block.dims, block)
        labels.tie(other.labels, block.labels)
        if labels.constant(other.labels):
            result[block.dims] = block
    return tuple(result.values())


def _conflict(labels: Labels, blocks: Sequence[Blocks], sides: Sequence[Side]) -> tuple[int, int] | None:
    """(side, dimension) that has to be fixed before the blocks of all sides fit on each other.

    Of a block of several dimensions and one of fewer, what both have stays. A constant's block decides nothing: heads
    stay prunable though a table of rotary positions is multiplied to the positions inside them.
    """
    for i, own in enumerate(blocks):
        for block in own:
            for j, other in enumerate(sides):
                if i == j:
                    continue
                for dim in block.dims:
                    if dim not in other.present:
                        continue
                    match = block_at(blocks[j], dim)
                    if match is None:
                        return i, dim
                    if differing := set(block.dims) ^ set(match.dims):
                        if len(block.dims) > 1 and labels.constant(match.labels) > labels.constant(block.labels):
                            return i, dim
                        if len(match.dims) > 1 and labels.constant(block.labels) > labels.constant(match.labels):
                            return j, dim
                        last = max(differing)
                        return (i, last) if last in block.dims else (j, last)
    return None


def moved(blocks: Blocks, where: Sequence[int | None]) -> Blocks:
    """Blocks with dimension d renamed where[d]; None drops an axis, which must be of length 1."""
    result = []
    for block in blocks:
        axes = [i for i, dim in enumerate(block.dims) if where[dim] is not None]
        array = block.labels.squeeze(tuple(i for i in range(len(block.dims)) if i not in axes))
        dims = [where[block.dims[i]] for i in axes]
        order = np.argsort(dims)
        if len(dims):
            result.append(Block(tuple(dims[i] for i in order), array.transpose(order)))
    return tuple(result)


def without(blocks: Blocks, dims: Iterable[int], before: int, after: int) -> Blocks:
    """Blocks of a tensor of `before` dimensions after `dims`, which carry none, are dropped, if they are (`after`)."""
    if before == after:
        return blocks
    kept = [d for d in range(before) if d not in set(dims)]
    return moved(blocks, [kept.index(d) if d in kept else None for d in range(before)])


def drop_single(blocks: Blocks, shape: Sequence[int]) -> Blocks:
    """Dimensions of size 1 carry no labels."""
    result = []
    for block in blocks:
        single = tuple(i for i, d in enumerate(block.dims) if shape[d] == 1)
        if dims := tuple(d for d in block.dims if shape[d] > 1):
            result.append(Block(dims, block.labels.squeeze(single)))
    return tuple(result)


def reshaped(labels: Labels, blocks: Blocks, old: Sequence[int], new: Sequence[int]) -> Blocks:
    """Blocks of a tensor of shape `old` viewed in shape `new`; the order of the elements stays."""
    groups = _groups(old, new)
    group_of = {dim: n for n, (dims, _) in enumerate(groups) for dim in dims}

    def merged(block: Block) -> set[int]:
        return {group_of[dim] for dim in block.dims}

    result = []
    for block in blocks:
        touched = sorted(merged(block))
        if labels.constant(block.labels) and any(b is not block and merged(b) & set(touched) for b in blocks):
            labels.pin(block.labels, "")  # repeated so often for each of another block's entries
            continue
        if all(len(groups[n][0]) == len(groups[n][1]) == 1 for n in touched):
            result.append(Block(tuple(groups[n][1][0] for n in touched), block.labels))
            continue
        olds = [dim for n in touched for dim in groups[n][0]]
        news = [dim for n in touched for dim in groups[n][1]]
        array = block.labels.reshape([old[dim] if dim in block.dims else 1 for dim in olds])
        array = np.broadcast_to(array, [old[dim] for dim in olds]).reshape([new[dim] for dim in news])
        same = tuple(i for i in range(array.ndim) if (array == array.take([0], i)).all())
        array = array[tuple(slice(0, 1) if i in same else slice(None) for i in range(array.ndim))].squeeze(same)
        kept = Block(tuple(dim for i, dim in enumerate(news) if i not in same), array)
        if len(kept.dims) > 1:
            labels.keep_product(array)
        result.append(kept)
    return tuple(result)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions of `old` and of `new` that hold the same elements."""
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b, size_a, size_b = [], [], 1, 1
        if i < len(old):
            a, size_a, i = [i], old[i], i + 1
        if j < len(new):
            b, size_b, j = [j], new[j], j + 1
        while size_a != size_b:
            if size_a < size_b:
                a, size_a, i = [*a, i], size_a * old[i], i + 1
            else:
                b, size_b, j = [*b, j], size_b * new[j], j + 1
        groups.append((a, b))
    return groups
