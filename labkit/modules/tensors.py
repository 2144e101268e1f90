"""Find the dense tensors that hold the data of sparse and wrapped tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from labkit.errors import InputError


def dense_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the dense tensors that hold the data of `tensors`.

    A dense tensor is returned as is, a sparse tensor as several `components`, and a wrapper subclass as the dense parts
    of the inner tensors, sparse or wrapped in turn.
    """
    parts: list[Tensor] = []
    for t in tensors:
        if is_traceable_wrapper_subclass(t):
            names, _ = t.__tensor_flatten__()
            inner = [getattr(t, name) for name in names]
            parts += dense_parts(part for part in inner if part is not None)
        elif t.layout is torch.strided:
            parts.append(t)
        else:
            parts += components(t)
    return parts


def components(t: Tensor) -> list[Tensor]:
    """Return the dense tensors stored by a sparse tensor, the values last; raise InputError for dense layouts."""
    if t.layout is torch.sparse_coo:
        return [t._indices(), t._values()]
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [t.crow_indices(), t.col_indices(), t.values()]
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [t.ccol_indices(), t.row_indices(), t.values()]
    raise InputError(f"memory of a tensor with layout {t.layout} can't be looked into: use a dense or a sparse tensor.")
