"""Selection of what to prune: how many items a fraction is, and exactly the k lowest scores.

Thresholds are a common error of hand-written pruning (`<` or `<=`, ties, `int(10 * 0.9)`), so every ranking in
`labkit.pruning` uses `count_to_prune` and `lowest_k`. The meaning of the scores does not matter here.
"""

import math
from numbers import Real

import torch
from torch import Tensor

from labkit.arguments import check_real
from labkit.errors import InputError, check_whole


def fraction(value: object, name: str = "sparsity") -> float:
    """Return `value` as a float from 0 to 1; raise InputError, naming the argument `name`, for anything else.

    1 and 1.0 are the same. Refused are True, NaN and text.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}, but it must be a number from 0 to 1: give the fraction to remove.")
    return float(value)


def count_to_prune(n: int, sparsity: float) -> int:
    """Return the fraction `sparsity` of `n` as the nearest whole number: 10 at 0.9 gives 9, 5 at 0.5 gives 3."""
    check_whole(n, "n", least=0)
    return math.floor(n * fraction(sparsity) + 0.5)


def lowest_k(scores: Tensor, k: int, *, dim: int | None = None) -> Tensor:
    """Return a bool tensor, shaped like `scores`, that is True at exactly the `k` lowest scores.

    scores: any shape, any real dtype, no NaN. Of equal scores the first is taken first.
    k: number of scores to take, from 0 to the number of scores.
    dim: None ranks all scores together; a dimension ranks every slice along it by itself, k in each.
    """
    check_real(scores, "scores")
    if dim is not None:
        check_whole(dim, "dim", least=-scores.dim(), most=scores.dim() - 1)
    n = scores.numel() if dim is None else scores.shape[dim]
    check_whole(k, "k", least=0, most=n)
    if scores.isnan().any():
        raise InputError("The scores hold NaN, which has no rank: look for the batch or the weight that it comes from.")
    scores = scores.detach()
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    if dim is not None and n < scores.numel():
        return _lowest_in_slices(scores, k, dim)
    return _lowest_of_all(scores, k)


def _lowest_in_slices(scores: Tensor, k: int, dim: int) -> Tensor:
    lowest = torch.zeros_like(scores, dtype=torch.bool, memory_format=torch.contiguous_format)
    first_k = scores.argsort(dim=dim, stable=True).narrow(dim, 0, k)
    return lowest.scatter_(dim, first_k, True)


def _lowest_of_all(scores: Tensor, k: int) -> Tensor:
    flat = scores.flatten()
    if flat.dtype == torch.bool:
        flat = flat.byte()
    threshold = flat.kthvalue(k).values  # O(n), where a sort of the weights of a model takes four times as long
    lowest = flat < threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    n_ties = k - int(lowest.sum())
    lowest[ties[:n_ties]] = True
    return lowest.view(scores.shape)
