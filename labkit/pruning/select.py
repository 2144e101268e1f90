"""What can go and which of it does: prunable weights, named parts, and exactly the k lowest scores.

Thresholds are what goes wrong in hand-written pruning (`<` or `<=`, ties, `int(10 * 0.9)`), so everything in
`labkit.pruning` that ranks uses `count_to_prune` and `lowest_k`. Nothing here knows what a score means.
"""

import math
from numbers import Real

import torch
from torch import Tensor

from labkit.arguments import check_real
from labkit.errors import InputError, check_whole

# --- how many, and which ----------------------------------------------------------------------------------------------


def fraction(value: object, name: str = "sparsity") -> float:
    """`value` as a float in [0, 1]; 1 and 1.0 are the same. Anything else, True and NaN included, is an InputError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}, but it must be a number from 0 to 1: give the fraction to remove.")
    return float(value)


def count_to_prune(n: int, sparsity: float) -> int:
    """How many of `n` the fraction `sparsity` is, to the nearest whole one: 10 at 0.9 gives 9, 5 at 0.5 gives 3."""
    check_whole(n, "n", least=0)
    return math.floor(n * fraction(sparsity) + 0.5)


def lowest_k(scores: Tensor, k: int, *, dim: int | None = None) -> Tensor:
    """True at exactly the `k` lowest scores; of equal scores the one that comes first goes first.

    scores: any shape, any real dtype, no NaN. k: from 0 to the number of scores.
    dim: None ranks the whole tensor in its flattened order; a dimension ranks every slice along it by itself.
    Returns a bool tensor of the shape and device of `scores`.
    """
    check_real(scores, "scores")
    if dim is not None:
        check_whole(dim, "dim", least=-scores.dim(), most=scores.dim() - 1)
    n = scores.numel() if dim is None else scores.shape[dim]
    check_whole(k, "k", least=0, most=n)
    if scores.isnan().any():
        raise InputError("The scores hold NaN, which has no rank: look for the batch or the weight that it comes from.")
    scores = scores.detach()
    lowest = torch.zeros_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    if k == 0:
        return lowest
    if dim is not None and n < scores.numel():
        first = scores.argsort(dim=dim, stable=True).narrow(dim, 0, k)
        return lowest.scatter_(dim, first, True)
    flat = (scores.byte() if scores.dtype == torch.bool else scores).flatten()
    threshold = flat.kthvalue(k).values  # O(n), where a sort of the weights of a model takes four times as long
    lowest = (flat < threshold).view(scores.shape)
    ties = (flat == threshold).nonzero().squeeze(1)
    lowest.view(-1)[ties[: k - int(lowest.sum())]] = True
    return lowest


# --- parts of a model -------------------------------------------------------------------------------------------------
