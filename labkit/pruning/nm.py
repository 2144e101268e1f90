"""N:M sparsity: n of every m weights kept along the input dimension, as hardware multiplies them; models so pruned.

N counts the weights KEPT in each group of M (Mishra et al. 2021, Accelerating Sparse Deep Neural Networks). Elsewhere:
masks that move in training (`sr_ste`), channels in a better order (`permutation`), 2:4 on a GPU (`semi_structured`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import storage
from labkit.errors import InputError
from labkit.pruning import native

LARGEST_M = 16
COMPILED = 2**20  # weights from which on a kernel is looked for: fewer take a millisecond, compiling it a second
CHUNK = 2**19  # weights looked at in one go on a CPU: fewer, and calls cost more than cache misses save

# --- the pattern ------------------------------------------------------------------------------------------------------


def mask(weight: Tensor, n: int = 2, m: int = 4, *, pad: bool = False) -> Tensor:
    """True at the n largest magnitudes of every m neighbours along the input dimension; exactly n, whatever the ties.

    weight: [out, in], a convolution's [C_out, C_in / groups, *kernel] (grouped along C_in, each kernel position by
        itself), or one row [in]; any strides, any real dtype, no NaN. Scores that are not negative rank as they are.
    pad: without it the dimension must be a multiple of m (InputError); with it the last group may have r < m members,
        of which min(n, r) stay, as if zeros filled it up.
    Of equal magnitudes the one with the lower index stays. Returns a contiguous bool tensor of the weight's shape and
    device; 0 < n <= m <= 16.

    Every weight is compared with the m - 1 others of its group and stays if fewer than n beat it: m (m - 1) / 2
    comparisons of whole slices, no sort, on slices that fit a cache. On a CPU the same is compiled for large float32,
    float16 and bfloat16 weights where m is a power of two (csrc/nm_mask.cpp).
    """
    check_pattern(n, m)
    groups = _groups(weight, m, pad)  # [out, *kernel, in / m, m]
    largest = torch.empty(groups.shape, dtype=torch.bool, device=weight.device)
    if groups.numel() >= COMPILED and native.nm_takes(groups):
        native.nm_largest(groups, n, largest)
    else:
        rows = len(groups) if weight.is_cuda else max(1, CHUNK * len(groups) // max(1, groups.numel()))
        for part, out in zip(groups.split(rows), largest.split(rows), strict=True):
            _largest(part, n, out)
    rows = largest.flatten(-2)[..., : _input_width(weight)]  # without what was padded
    return (rows[0] if weight.dim() == 1 else rows.movedim(-1, 1)).contiguous()


def is_nm(weight: Tensor, n: int = 2, m: int = 4, *, pad: bool = False) -> bool:
    """Whether no group of m along the input dimension holds more than n weights that are not zero; see `mask`.

    False where the dimension is no multiple of m, unless pad allows a short last group. NaN is not zero.
    """
    check_pattern(n, m)
    if not pad and _input_width(weight) % m:
        return False
    return not bool(((_groups(weight, m, pad) != 0).sum(-1) > n).any())


def kept_energy(weight: Tensor, kept: Tensor) -> float:
    """sum(w^2 where kept) / sum(w^2), summed in float64: 1 if nothing that matters goes, and for a weight of zeros."""
    if kept.dtype != torch.bool or kept.shape != weight.shape:
        raise InputError(
            f"kept is {kept.dtype} {list(kept.shape)}, but it must be torch.bool of the weight's shape "
            f"{list(weight.shape)}: take mask(weight, n, m)."
        )
    squares = weight.detach().double().square()
    total = float(squares.sum())
    return float(squares.masked_fill(~kept, 0.0).sum()) / total if total else 1.0


def check_pattern(n: int, m: int) -> None:
    """Raises InputError unless 0 < n <= m <= 16, both whole numbers."""
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (n, m))
    if not whole or not 0 < n <= m <= LARGEST_M:
        raise InputError(
            f"The pattern {n!r}:{m!r} is none: n of every m weights are kept, whole numbers with "
            f"0 < n <= m <= {LARGEST_M}, for example n=2, m=4."
        )


def _input_width(weight: Tensor) -> int:
    if weight.dim() < 1 or weight.is_complex() or weight.dtype == torch.bool:
        raise InputError(
            f"A weight of {weight.dim()} dimensions and {weight.dtype} has no N:M pattern: give real numbers as "
            "[out, in], [C_out, C_in, *kernel] or one row [in]."
        )
    return weight.shape[min(1, weight.dim() - 1)]


def _groups(weight: Tensor, m: int, pad: bool) -> Tensor:
    """[out, *kernel, in / m, m], a view unless it is padded."""
    width = _input_width(weight)
    if width % m and not pad:
        raise InputError(
            f"The input dimension of a weight {list(weight.shape)} is {width}, no multiple of m = {m}: give pad=True "
            "to allow a shorter last group, or leave this weight dense."
        )
    rows = weight.detach().reshape(1, -1) if weight.dim() == 1 else weight.detach().movedim(1, -1)
    if width % m:
        rows = F.pad(rows, (0, -width % m))
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


# --- storing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Compressed:
    """A weight of n:m as stored: values [groups, n], metadata uint8 (their places), as in `storage.pack_nm`."""

    values: Tensor
    metadata: Tensor
    shape: tuple[int, ...]
    n: int
    m: int

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata: of 2:4 in fp16 56.25 % of the dense weight, in int8 62.5 %, in fp32 53.1 %."""
        return self.values.nbytes + self.metadata.nbytes


def compress(weight: Tensor, n: int = 2, m: int = 4) -> Compressed:
    """`weight` ([out, in], [C_out, C_in, *kernel] or one row [in]) as values and metadata; `is_nm` must hold for it.

    Value for value what comes back from `decompress`, NaN included; a -0.0 that is not kept comes back as 0.0.
    """
    check_pattern(n, m)
    parts = storage.pack_nm(weight, n, m)
    if parts is None:
        raise InputError(
            f"The weight {list(weight.shape)} is not {n}:{m} along its input dimension: multiply it with "
            f"mask(weight, {n}, {m}) first, or store it dense."
        )
    return Compressed(parts["values"], parts["metadata"], tuple(weight.shape), n, m)


def decompress(compressed: Compressed) -> Tensor:
    """The dense weight that was compressed, contiguous, on the device of its values."""
    parts = {"values": compressed.values, "metadata": compressed.metadata}
    return storage.unpack_nm(parts, compressed.shape, compressed.n, compressed.m)


# --- pruning ----------------------------------------------------------------------------------------------------------


def prune(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    *,
    method: str = "magnitude",
    batches: Iterable | None = None,
    exclude: str | Iterable[str] = (),
    pad: bool = False,
) -> nn.Module:
    """A copy of `model` whose weights keep n of every m along the input dimension; masks hold them through training.

    method: "magnitude" (no data), "wanda" (Sun et al. 2024) or "sparsegpt" (Frantar & Alistarh 2023, the kept weights
        move). The last two look at data: batches, an iterable of what the model is called with, run through it layer
        by layer; the inputs of a layer are those that the layers pruned before it give. See `blockwise.prune`, which
        does the work and takes a fraction as well.
    exclude: names of modules and weights that stay dense. The others: `blockwise.weights_of`: in a stack of blocks, as
        language models are, those of the blocks, else all of `select.prunable`.
    pad: without it a weight whose input dimension is no multiple of m is an InputError that names it; see `mask`.

    The masks are held as those of `unstructured.prune` are (`unstructured.masks` reads them, `make_permanent` takes
    them off): stored zeros that stay zero through optimizer steps, deepcopy and `load_state_dict`. For masks that move
    during training see `sr_ste`.
    """
    from labkit.pruning import blockwise  # here, since it takes its masks from above

    check_pattern(n, m)
    return blockwise.prune(model, (n, m), method=method, batches=batches, exclude=exclude, pad=pad)
