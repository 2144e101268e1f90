"""The compiled N:M mask for large CPU weights: which it takes, and its call; csrc/nm_mask.cpp says how it works."""

import ctypes
import functools

import torch
from torch import Tensor

from labkit.errors import InputError
from labkit.pruning import compiling
from labkit.pruning.compiling import ISAS

NAN = "The weight holds NaN, which has no rank: look for the step that it comes from."
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library, or None where there is none (compiling.load says why)."""
    library = compiling.load("nm_mask")
    if library:
        library.nm_mask.argtypes = [ctypes.c_int] * 5 + [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    return library


def isas() -> tuple[str, ...]:
    """The instruction sets that this machine can use, the best one last; empty without a compiler."""
    library = load()
    return ISAS[: library.nm_mask_best_isa() + 1] if library else ()


def _number(isa: str | None) -> int:
    """The instruction set's number in the C++; None is the best one."""
    return ISAS.index(isa or isas()[-1])


def takes(groups: Tensor, isa: str | None = None) -> bool:
    """Whether there is compiled code for groups [..., m] as they lie in memory."""
    if groups.device.type != "cpu" or groups.dtype not in DTYPES or not groups.is_contiguous() or not load():
        return False
    return bool(load().nm_mask_takes(_number(isa), groups.element_size(), groups.shape[-1]))


def choose(groups: Tensor, n: int, chosen: Tensor, isa: str | None = None) -> None:
    """Writes into chosen [..., m], bool, which n of each group [..., m] are largest; of equal ones the first.

    Only what `takes` allows, chosen contiguous. Uses torch.get_num_threads() threads. InputError if there is a NaN.
    """
    library, most = load(), torch.tensor(torch.inf, dtype=groups.dtype)
    largest = library.nm_mask(
        _number(isa),
        torch.get_num_threads(),
        groups.element_size(),
        n,
        groups.shape[-1],
        groups.numel(),
        groups.data_ptr(),
        chosen.data_ptr(),
    )
    if largest > int(most.view(torch.int16 if groups.element_size() == 2 else torch.int32)):
        raise InputError(NAN)
