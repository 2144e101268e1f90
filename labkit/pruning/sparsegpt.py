"""SparseGPT: prune one layer and let the kept weights make up for it, column by column, in blocks of columns.

Frantar & Alistarh 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Algorithm 1). One
weight and the Hessian of its inputs here; `layerwise` collects Hessians and goes through a model.
"""

import math
import warnings

import torch
from torch import Tensor

from labkit.errors import InputError
from labkit.pruning.nm_pattern import check_pattern, mask
from labkit.pruning.selection import count_to_prune, fraction, lowest_k

Pattern = float | tuple[int, int]
TRIES = 6  # of a damping ten times the one before


def sparsegpt(
    weight: Tensor, hessian: Tensor, pattern: Pattern = (2, 4), *, damp: float = 0.01, block: int = 128
) -> tuple[Tensor, Tensor]:
    """(new weight, kept): `weight` [out, in] pruned to `pattern`, its kept weights moved to keep x W^T where it was.

    hessian: [in, in], X^T X of the layer's inputs X [N, in]; any positive multiple of it gives the same result.
    pattern: the fraction to remove, of each block of `block` columns (all rows together), or (n, m): n of every m.
    damp: added to the diagonal as a fraction of its mean; multiplied by 10, with a warning, as often as the Cholesky
        decomposition fails. block: columns whose updates wait for each other; for n:m rounded up to a multiple of m.
    Returns the new weight [out, in] like `weight`, zero where pruned, and the bool mask of what was kept.

    With U the upper Cholesky factor of H^-1 (H^-1 = U^T U), for the columns j in order:
        kept_j by w^2 / U_jj^2, chosen where a block (of n:m: a group) begins    e = w_j / U_jj where pruned, else 0
        W_:,j: -= e U_j,j:     within the block at once, for the columns after it once a block (the lazy update)
    where e_j U_j,j: is w_j (U_j,j: / U_jj), as the code has it.
    An input that is always zero is removed and takes no part. Time O(in^3 + out in^2), memory O(in^2) in float64.
    """
    n_of_m = pattern if isinstance(pattern, tuple) else None
    check_settings(pattern, damp, block)
    _check(weight, hessian, pattern)
    alive = hessian.diagonal() > 0  # [in]
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).masked_fill(~alive, 0.0)
    w = w.t().contiguous()  # [in, out]: a column of the weight is one piece of memory
    u = _factor(hessian, alive, damp).to(w.dtype)  # [in, in]
    diagonal = u.diagonal()[:, None]  # [in, 1]
    per_weight = u / diagonal  # [in, in]: what removing a weight of 1 takes from those after it
    kept = torch.empty_like(w, dtype=torch.bool)
    if n_of_m is not None:
        block = -(-block // n_of_m[1]) * n_of_m[1]
    for start in range(0, len(w), block):
        end = min(start + block, len(w))
        own, chosen = w[start:end], kept[start:end]  # [columns, out]
        scale, effect = diagonal[start:end], per_weight[start:end, start:end]
        if n_of_m is None:
            chosen.copy_(~lowest_k((own / scale).square(), count_to_prune(own.numel(), pattern)))
        for j in range(end - start):
            if n_of_m is not None and j % n_of_m[1] == 0:
                group = slice(j, j + n_of_m[1])
                chosen[group] = mask((own[group] / scale[group]).t(), *n_of_m).t()
            removed = own[j].masked_fill(chosen[j], 0.0)  # [out]
            own[j + 1 :].addr_(effect[j, j + 1 :], removed, alpha=-1)
        w[end:].addmm_(per_weight[start:end, end:].t(), own.masked_fill(chosen, 0.0), alpha=-1)
    return w.masked_fill_(~kept, 0.0).t().to(weight.dtype).contiguous(), kept.t().contiguous()


def _factor(hessian: Tensor, alive: Tensor, damp: float) -> Tensor:
    """U [in, in], upper, with (H + damping)^-1 = U^T U, in float64; the damping grows until it can be had.

    U is the inverse of the upper R with H + damping = R R^T, which is the Cholesky factor of the flipped matrix.
    """
    h = hessian.double()
    mean = h.diagonal()[alive].mean() if alive.any() else h.new_ones(())
    h = h + torch.diag(mean * ~alive)
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    for tenfold in range(TRIES):
        damping = damp * 10**tenfold
        lower, failed = torch.linalg.cholesky_ex((h + damping * mean * eye).flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
        warnings.warn(
            f"The Hessian is not positive definite in float64 with a damping of {damping:g}, so {10 * damping:g} is "
            "tried: give more calibration data, or a larger damp.",
            stacklevel=3,
        )
    raise InputError(
        f"The Hessian has no Cholesky factor even with a damping of {damping:g}: it is not X^T X of inputs."
    )


def _check(weight: Tensor, hessian: Tensor, pattern: Pattern) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise InputError(
            f"weight is {list(weight.shape)} and hessian {list(hessian.shape)}, but they must be [out, in] and "
            "[in, in]: X^T X of the layer's inputs X [N, in]."
        )
    if not hessian.isfinite().all() or not weight.isfinite().all():
        raise InputError("The weight or the Hessian holds NaN or infinity: look for the batch that it comes from.")
    if isinstance(pattern, tuple) and weight.shape[1] % pattern[1]:
        raise InputError(f"The width {weight.shape[1]} is no multiple of m = {pattern[1]}: pad it with zero columns.")


def check_settings(pattern: Pattern, damp: float, block: int) -> None:
    """Raises InputError unless `pattern` is a fraction to remove or a pair (n, m), and the others are positive."""
    if isinstance(pattern, tuple) and len(pattern) == 2:
        check_pattern(*pattern)
    else:
        fraction(pattern, "pattern")
    if isinstance(damp, bool) or not isinstance(damp, (int, float)) or not 0 < damp < math.inf:
        raise InputError(f"damp is {damp!r}, but it must be a positive number, a fraction of the mean diagonal.")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise InputError(f"block is {block!r}, but it must be a whole number of columns from 1 up.")
