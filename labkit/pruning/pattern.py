"""The N:M pattern: which n of every m neighbours along the input dimension of a weight are the largest.

N counts the weights KEPT in each group of M (Mishra et al. 2021, Accelerating Sparse Deep Neural Networks). One weight
at a time; `nm` has the same names for its users and prunes models.
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
    """True at the n largest magnitudes of every m neighbours along the input dimension; exactly n, whatever the ties.

    weight: [out, in], a convolution's [C_out, C_in / groups, *kernel] (grouped along C_in, each kernel position by
        itself), or one row [in], that dimension a multiple of m; any strides, any real dtype, no NaN. Scores that are
        not negative rank as they are.
    Of equal magnitudes the one with the lower index stays. Returns a contiguous bool tensor of the weight's shape and
    device; 0 < n <= m <= 16.

    Every weight is compared with the m - 1 others of its group and stays if fewer than n beat it: m (m - 1) / 2
    comparisons of whole slices, no sort, on slices that fit a cache. On a CPU the same is compiled for large float32,
    float16 and bfloat16 weights where m is a power of two (csrc/nm_mask.cpp).
    """
    check_pattern(n, m)
    groups = _groups(weight, m)  # [out, *kernel, in / m, m]
    largest = torch.empty(groups.shape, dtype=torch.bool, device=weight.device)
    if groups.numel() >= COMPILED and native.nm_takes(groups):
        native.nm_largest(groups, n, largest)
    else:
        rows = len(groups) if weight.is_cuda else max(1, CHUNK * len(groups) // max(1, groups.numel()))
        for part, out in zip(groups.split(rows), largest.split(rows), strict=True):
            _largest(part, n, out)
    rows = largest.flatten(-2)
    return (rows[0] if weight.dim() == 1 else rows.movedim(-1, 1)).contiguous()


def is_nm(weight: Tensor, n: int = 2, m: int = 4) -> bool:
    """Whether no group of m along the input dimension holds more than n weights that are not zero; see `mask`.

    False where the dimension is no multiple of m. NaN is not zero.
    """
    check_pattern(n, m)
    if _input_width(weight) % m:
        return False
    return not bool(((_groups(weight, m) != 0).sum(-1) > n).any())


def check_pattern(n: int, m: int) -> None:
    """Raises InputError unless 0 < n <= m <= 16, both whole numbers."""
    if not (type(n) is type(m) is int and 0 < n <= m <= LARGEST_M):
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
    """[out, *kernel, in / m, m], a view."""
    width = _input_width(weight)
    if width % m:
        raise InputError(
            f"The input dimension of a weight {list(weight.shape)} is {width}, no multiple of m = {m}: leave it dense."
        )
    rows = weight.detach().reshape(1, -1) if weight.dim() == 1 else weight.detach().movedim(1, -1)
    return rows.unflatten(-1, (-1, m))


def _largest(groups: Tensor, n: int, out: Tensor) -> None:
    """Writes into `out` [..., m] which n of each group [..., m] are largest."""
    members = _keys(groups).unbind(-1)
    m = len(members)
    beaten = [torch.full_like(x, m - 1 - i, dtype=torch.uint8) for i, x in enumerate(members)]  # by all that come after
    for i in range(m):
        for j in range(i + 1, m):
            first = (members[i] >= members[j]).view(torch.uint8)  # an equal pair: the lower index wins
            beaten[j] += first
            beaten[i] -= first
    for i in range(m):
        torch.lt(beaten[i], n, out=out[..., i])


BITS = {1: (torch.uint8, 0x7F), 2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF), 8: (torch.int64, 2**63 - 1)}


def _keys(x: Tensor) -> Tensor:
    """Integers that rank as |x| does. A float's bits without the sign do, in every format, and NaN's are above all."""
    if not x.is_floating_point():
        return x.long().abs()
    integer, all_but_sign = BITS[x.element_size()]
    keys = x.view(integer) & all_but_sign
    if keys.numel() and keys.amax().view(x.dtype).isnan():
        raise InputError(native.NAN)
    return keys
