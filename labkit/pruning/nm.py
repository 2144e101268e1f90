"""N:M sparsity: n of every m weights kept along the input dimension, as hardware multiplies them; models so pruned.

N counts the weights KEPT in each group of M. Elsewhere: how the mask is made (`pattern`), masks that move in training
(`sr_ste`), channels in a better order (`permutation`), 2:4 on a GPU (`semi_structured`).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from labkit.arguments import check_real
from labkit.errors import InputError
from labkit.pruning import blockwise
from labkit.pruning.pattern import check_pattern, is_nm, mask
from labkit.storage.formats import FORMATS

__all__ = ["compress", "decompress", "is_nm", "kept_energy", "mask", "prune"]


def kept_energy(weight: Tensor, keep: Tensor) -> float:
    """sum(w^2 where keep) / sum(w^2), summed in float64: 1 if nothing that matters goes, and for a weight of zeros."""
    check_real(weight, "weight")
    check_real(keep, "keep")
    if keep.dtype != torch.bool or keep.shape != weight.shape:
        raise InputError(
            f"keep is {keep.dtype} {list(keep.shape)}, but it must be torch.bool of the weight's shape "
            f"{list(weight.shape)}: take mask(weight, n, m)."
        )
    squares = weight.detach().double().square()
    total = float(squares.sum())
    return float(squares.masked_fill(~keep, 0.0).sum()) / total if total else 1.0


class Compressed(NamedTuple):
    """A 2:4 weight as stored: values [groups, 2] and metadata uint8, their places, as in `storage.FORMATS["nm"]`."""

    values: Tensor
    metadata: Tensor
    shape: tuple[int, ...]


def compress(weight: Tensor) -> Compressed:
    """`weight` ([out, in], [C_out, C_in, *kernel] or one row [in]) as values and metadata; `is_nm` must hold for it.

    Value for value what comes back from `decompress`, NaN included; a -0.0 that is not kept comes back as 0.0.
    """
    check_real(weight, "weight")
    parts = FORMATS["nm"].pack(weight)
    if parts is None:
        raise InputError(
            f"The weight {list(weight.shape)} is not 2:4 along its input dimension: multiply it with mask(weight) "
            "first, or store it dense."
        )
    return Compressed(**parts, shape=tuple(weight.shape))


def decompress(compressed: Compressed) -> Tensor:
    """The dense weight that was compressed, contiguous, on the device of its values."""
    if not isinstance(compressed, Compressed):
        raise InputError(f"What is decompressed is a {type(compressed).__name__}, but compress makes a Compressed.")
    return FORMATS["nm"].unpack(compressed._asdict(), compressed.shape)


def prune(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    *,
    method: str = "magnitude",
    batches: Iterable | None = None,
    ignore: str | Iterable[str] = (),
) -> nn.Module:
    """A copy of `model` whose weights keep n of every m along the input dimension; masks hold them through training.

    method: "magnitude"; with batches, an iterable of what the model is called with, also "wanda" (Sun et al. 2024) and
        "sparsegpt" (Frantar & Alistarh 2023: what stays moves). `blockwise.prune` does the work, and takes a fraction
        as well.
    ignore: names of modules and weights that stay dense. The others: those of `blockwise.weights_of`, each expert of a
        mixture by itself. An InputError names those whose input dimension is no multiple of m.

    The masks are held as those of `unstructured.prune` are: `unstructured.masks` reads them, `make_permanent` takes
    them off.
    """
    check_pattern(n, m)
    return blockwise.prune(model, (n, m), method=method, batches=batches, ignore=ignore)
