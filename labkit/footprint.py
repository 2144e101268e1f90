"""Which bytes of memory tensors occupy: shared, permuted, expanded, sparse or quantised, each byte once.

The counting of memory traffic stands on this. It looks at shapes, strides and storages only: it never reads a value,
and it does not know what a cache holds.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from labkit.errors import InputError


class Touch(NamedTuple):
    """`nbytes` of the bytes `lo` to `hi` of a storage; equal keys are the same bytes."""

    storage: int
    key: Any
    nbytes: int
    lo: int
    hi: int


def components(t: Tensor) -> list[Tensor]:
    """The dense tensors that a sparse tensor stores, its values last."""
    if t.layout is torch.sparse_coo:
        return [t._indices(), t._values()]
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [t.crow_indices(), t.col_indices(), t.values()]
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [t.ccol_indices(), t.row_indices(), t.values()]
    raise InputError(f"memory of a tensor with layout {t.layout} can't be looked into: use a dense or a sparse tensor.")


def dense(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The dense tensors that hold the data: each itself, a sparse tensor's components, a wrapper's inner tensors."""
    held: list[Tensor] = []
    for t in tensors:
        if is_traceable_wrapper_subclass(t):
            inner = [getattr(t, name) for name in t.__tensor_flatten__()[0]]
            held += dense(part for part in inner if part is not None)
        else:
            held += [t] if t.layout is torch.strided else components(t)
    return held


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in dense(tensors))


def touch(t: Tensor) -> Touch:
    """The memory behind a dense tensor: each element once, however it is permuted, reshaped or expanded."""
    merged: list[tuple[int, int]] = []  # (stride, size), outermost first; dimensions that lie end to end are joined
    for stride, size in sorted(
        ((st, n) for st, n in zip(t.stride(), t.shape, strict=True) if n > 1 and st), reverse=True
    ):
        if merged and merged[-1][0] == stride * size:
            merged[-1] = (stride, merged[-1][1] * size)
        else:
            merged.append((stride, size))
    item = t.element_size()
    span = (1 + sum(stride * (size - 1) for stride, size in merged)) * item if t.numel() else 0
    elements = math.prod(size for _, size in merged) * item  # windows that overlap touch no more than their span
    lo = t.storage_offset() * item
    return Touch(t.untyped_storage()._cdata, (lo, item, *merged), min(elements, span), lo, lo + span)


def touches(tensors: Iterable[Tensor]) -> list[Touch]:
    return [touch(part) for part in dense(tensors)]


def covered(pieces: Iterable[Touch]) -> int:
    """Distinct bytes: the sum over distinct pieces, but no more than their ranges cover together."""
    storages: dict[int, dict[Any, Touch]] = defaultdict(dict)
    for piece in pieces:
        storages[piece.storage][piece.key] = piece
    total = 0
    for distinct in storages.values():
        span, end = 0, 0
        for piece in sorted(distinct.values(), key=lambda p: p.lo):
            span += max(0, piece.hi - max(piece.lo, end))
            end = max(end, piece.hi)
        total += min(span, sum(piece.nbytes for piece in distinct.values()))
    return total
