"""The dense tensors in which sparse and wrapped tensors hold their data."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from labkit.errors import InputError


def dense_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The dense tensors that hold the data: each itself, a sparse tensor's components, a wrapper's inner tensors."""
    held: list[Tensor] = []
    for t in tensors:
        if is_traceable_wrapper_subclass(t):
            inner = [getattr(t, name) for name in t.__tensor_flatten__()[0]]
            held += dense_parts(part for part in inner if part is not None)
        else:
            held += [t] if t.layout is torch.strided else components(t)
    return held


def components(t: Tensor) -> list[Tensor]:
    """The dense tensors that a sparse tensor stores, its values last."""
    if t.layout is torch.sparse_coo:
        return [t._indices(), t._values()]
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [t.crow_indices(), t.col_indices(), t.values()]
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [t.ccol_indices(), t.row_indices(), t.values()]
    raise InputError(f"memory of a tensor with layout {t.layout} can't be looked into: use a dense or a sparse tensor.")
