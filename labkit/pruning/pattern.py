"""The N:M pattern of a weight: a mask of the n largest of every m neighbours along the input dimension.

N counts the weights KEPT in each group of M (Mishra et al. 2021, Accelerating Sparse Deep Neural Networks). `nm` offers
the same functions and prunes whole models.
"""

import torch
from torch import Tensor

from labkit.arguments import check_tensor
from labkit.errors import InputError
from labkit.storage import native

LARGEST_M = 16
COMPILED = 2**20  # weights from which on a kernel is looked for: fewer take a millisecond, compiling it a second
CHUNK = 2**19  # weights looked at in one go on a CPU: fewer, and calls cost more than cache misses save


def mask(weight: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Return a mask, True at the n largest magnitudes of every m neighbours along the input dimension.

    weight: [out, in], a convolution's [C_out, C_in / groups, *kernel] (grouped along C_in at each kernel position), or
        a single row [in]; in is a multiple of m. Any strides, any real dtype, no NaN. Non-negative scores can be given
        instead of a weight.
    n, m: 0 < n <= m <= 16. Exactly n stay; of equal magnitudes the lower index stays.
    Returns a contiguous bool tensor of the weight's shape and device.

    Every weight is compared with the m - 1 neighbours in the group and stays if fewer than n are larger: m (m - 1) / 2
    comparisons of whole slices, no sort, on slices that fit a cache. On a CPU a compiled kernel (csrc/nm_mask.cpp)
    takes large float32, float16 and bfloat16 weights where m is a power of two.
    """
    check_pattern(n, m)
    groups = _groups(weight, m)  # [out, *kernel, in / m, m]
    largest = torch.empty(groups.shape, dtype=torch.bool, device=weight.device)
    if groups.numel() >= COMPILED and native.nm_takes(groups):
        native.nm_largest(groups, n, largest)
    else:
        chunk = _rows_in_chunk(groups)
        for part, out in zip(groups.split(chunk), largest.split(chunk), strict=True):
            _largest(part, n, out)
    rows = largest.flatten(-2)
    in_place = rows[0] if weight.dim() == 1 else rows.movedim(-1, 1)
    return in_place.contiguous()


def _rows_in_chunk(groups: Tensor) -> int:
    """Return how many rows of groups [out, ..., m] to compare at a time: all on a GPU, about CHUNK weights on a CPU."""
    if groups.is_cuda:
        return len(groups)
    weights = max(1, groups.numel())
    return max(1, CHUNK * len(groups) // weights)


def is_nm(weight: Tensor, n: int = 2, m: int = 4) -> bool:
    """Return True if no group of m weights along the input dimension holds more than n nonzeros.

    weight: as in `mask`. False if the input dimension is no multiple of m. NaN counts as nonzero.
    """
    check_pattern(n, m)
    if _input_width(weight) % m:
        return False
    nonzeros = (_groups(weight, m) != 0).sum(-1)
    return not bool((nonzeros > n).any())


def check_pattern(n: int, m: int) -> None:
    """Raise InputError unless n and m are whole numbers with 0 < n <= m <= 16."""
    are_whole = type(n) is int and type(m) is int
    if not are_whole or not 0 < n <= m <= LARGEST_M:
        raise InputError(
            f"The pattern {n!r}:{m!r} is none: n of every m weights are kept, whole numbers with "
            f"0 < n <= m <= {LARGEST_M}, for example n=2, m=4."
        )


def _input_width(weight: Tensor) -> int:
    check_tensor(weight, "weight")
    if weight.dim() < 1 or weight.is_complex() or weight.dtype == torch.bool:
        raise InputError(
            f"A weight of {weight.dim()} dimensions and {weight.dtype} has no N:M pattern: give real numbers as "
            "[out, in], [C_out, C_in, *kernel] or one row [in]."
        )
    return weight.shape[min(1, weight.dim() - 1)]


def _groups(weight: Tensor, m: int) -> Tensor:
    """Return the weight as [out, *kernel, in / m, m], a view."""
    width = _input_width(weight)
    if width % m:
        raise InputError(
            f"The input dimension of a weight {list(weight.shape)} is {width}, no multiple of m = {m}: leave it dense."
        )
    weight = weight.detach()
    rows = weight.reshape(1, -1) if weight.dim() == 1 else weight.movedim(1, -1)
    return rows.unflatten(-1, (-1, m))


def _largest(groups: Tensor, n: int, out: Tensor) -> None:
    """Write True into `out` [..., m] at the n largest magnitudes of each group [..., m]."""
    members = _keys(groups).unbind(-1)
    m = len(members)
    n_larger = []  # of each member, as if all members after it were larger
    for i, x in enumerate(members):
        n_larger.append(torch.full_like(x, m - 1 - i, dtype=torch.uint8))
    for i in range(m):
        for j in range(i + 1, m):
            i_wins = (members[i] >= members[j]).view(torch.uint8)  # an equal pair: the lower index wins
            n_larger[j] += i_wins
            n_larger[i] -= i_wins
    for i in range(m):
        torch.lt(n_larger[i], n, out=out[..., i])


BITS = {  # bytes of a float: integer type of the same size, all bits but the sign
    1: (torch.uint8, 0x7F),
    2: (torch.int16, 0x7FFF),
    4: (torch.int32, 0x7FFFFFFF),
    8: (torch.int64, 2**63 - 1),
}


def _keys(x: Tensor) -> Tensor:
    """Return integers in the order of |x|: the bits of a float without the sign. NaN is above all, and refused."""
    if not x.is_floating_point():
        return x.long().abs()
    integer, all_but_sign = BITS[x.element_size()]
    keys = x.view(integer) & all_but_sign  # the order holds in every floating-point format
    if keys.numel() and keys.amax().view(x.dtype).isnan():
        raise InputError(native.NAN)
    return keys
