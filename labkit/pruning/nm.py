"""N:M sparsity: n of every m weights kept along the input dimension, the pattern that hardware multiplies.

N counts the weights KEPT in each group of M. Related files: `pattern` makes masks, `sr_ste` moves masks in training,
`permutation` finds a better order of channels, `semi_structured` multiplies 2:4 weights on a GPU.
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
    """sum(w^2 where keep) / sum(w^2), summed in float64; 1 for a weight of zeros.

    weight: any shape.
    keep: bool, same shape, True at kept weights.
    """
    check_real(weight, "weight")
    check_real(keep, "keep")
    if keep.dtype != torch.bool or keep.shape != weight.shape:
        raise InputError(
            f"keep is {keep.dtype} {list(keep.shape)}, but it must be torch.bool of the weight's shape "
            f"{list(weight.shape)}: take mask(weight, n, m)."
        )
    squares = weight.detach().double().square()
    total = float(squares.sum())
    if total == 0:
        return 1.0
    return float(squares.masked_fill(~keep, 0.0).sum()) / total


class Compressed(NamedTuple):
    """A 2:4 weight as stored: values [groups, 2] and places in the groups (metadata, uint8): `FORMATS["nm"]`."""

    values: Tensor
    metadata: Tensor
    shape: tuple[int, ...]


def compress(weight: Tensor) -> Compressed:
    """Store a 2:4 weight as values and metadata.

    weight: [out, in], [C_out, C_in, *kernel] or a single row [in].
    Raises InputError unless `is_nm` holds for `weight`. `decompress` returns the same values, NaN included, but 0.0 for
    a -0.0 outside the kept weights.
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
    """Return the dense weight, contiguous, on the device of the compressed values."""
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
    """Return a copy of `model` with n of every m weights kept along the input dimension, held by masks in training.

    method: "magnitude", "wanda" (Sun et al. 2024) or "sparsegpt" (Frantar & Alistarh 2023; kept weights change).
        `blockwise.prune` does the work, and takes a fraction as well.
    batches: calibration input of `model`, for "wanda" and "sparsegpt".
    ignore: names of modules and weights that stay dense. All weights of `blockwise.weights_of` besides are pruned, each
        expert of a mixture by itself.

    `unstructured.masks` reads the masks, `unstructured.make_permanent` removes them. Raises InputError for weights with
    an input dimension that is no multiple of m.
    """
    check_pattern(n, m)
    return blockwise.prune(model, (n, m), method=method, batches=batches, ignore=ignore)
