"""SparseGPT: prune one layer and let the kept weights make up for it, column by column, in blocks of columns.

Frantar & Alistarh 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Algorithm 1). One
weight and the Hessian of its inputs here; `hessians` and `blocks` collect Hessians and go through a model.
"""

import torch
from torch import Tensor

from labkit.arguments import check_real
from labkit.errors import InputError
from labkit.modules.hessians import check_layer, inverse_factor
from labkit.pruning.pattern import check_pattern
from labkit.pruning.select import count_to_prune, fraction, lowest_k

Pattern = float | tuple[int, int]
BLOCK = 128  # columns whose updates wait for each other, as in the paper
STEP = 8  # columns of an unstructured block that are updated one by one before the rest of the block follows


def sparsegpt(weight: Tensor, hessian: Tensor, pattern: Pattern = (2, 4)) -> tuple[Tensor, Tensor]:
    """(new weight, mask): `weight` [out, in] pruned to `pattern`, its kept weights moved to keep x W^T where it was.

    hessian: [in, in], X^T X of the layer's inputs X [N, in]; any positive multiple of it gives the same result.
    pattern: the fraction to remove, of each block of BLOCK columns (all rows together), or (n, m): n of every m.
    Returns the new weight [out, in] like `weight`, zero where pruned, and the bool mask of what stays.

    The Hessian is damped as `hessians.inverse_factor` says. For n:m a block has BLOCK columns rounded up to a multiple
    of m.

    With U the upper Cholesky factor of H^-1 (H^-1 = U^T U), for the columns j in order:
        mask_j by w^2 / U_jj^2, chosen where a block (of n:m: a group) begins    e = w_j / U_jj where pruned, else 0
        W_:,j: -= e U_j,j:     within the block at once, for the columns after it once a block (the lazy update)
    where e_j U_j,j: is w_j (U_j,j: / U_jj), as the code has it.
    An input that is always zero is removed and takes no part. Time O(in^3 + out in^2), memory O(in^2) in float64.
    """
    check_pattern_or_fraction(pattern)
    check_real(weight, "weight")
    check_real(hessian, "hessian")
    check_layer(weight, hessian)
    if isinstance(pattern, tuple) and weight.shape[1] % pattern[1]:
        raise InputError(f"The width {weight.shape[1]} is no multiple of m = {pattern[1]}: pad it with zero columns.")
    alive = hessian.diagonal() > 0  # [in]
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).masked_fill(~alive, 0.0)
    w = w.t().contiguous()  # [in, out]: a column of the weight is one piece of memory
    u = inverse_factor(hessian).to(w.dtype)  # [in, in]
    diagonal = u.diagonal()[:, None]  # [in, 1]
    effect = u / diagonal  # [in, in]: what removing a weight of 1 takes from those after it
    mask = torch.empty_like(w, dtype=torch.bool)
    block = -(-BLOCK // pattern[1]) * pattern[1] if isinstance(pattern, tuple) else BLOCK
    for start in range(0, len(w), block):
        end = min(start + block, len(w))
        _prune_(w[start:end], mask[start:end], diagonal[start:end], effect[start:end, start:end], pattern)
        _pass_on_(w, mask, effect, start, end)
    return w.masked_fill_(~mask, 0.0).t().to(weight.dtype).contiguous(), mask.t().contiguous()


def _prune_(w: Tensor, mask: Tensor, scale: Tensor, effect: Tensor, pattern: Pattern) -> None:
    """Fills `mask` and moves `w`, both [columns, out], for one block: scale [columns, 1], effect [columns, columns].

    A step of m columns at a time (or 8) changes itself first and then, in one product, the rest of the block.
    """
    step = pattern[1] if isinstance(pattern, tuple) else STEP
    if not isinstance(pattern, tuple):
        mask.copy_(~lowest_k((w / scale).square(), count_to_prune(w.numel(), pattern)))
    for start in range(0, len(w), step):
        end = min(start + step, len(w))
        if isinstance(pattern, tuple):
            mask[start:end] = _largest(w[start:end] / scale[start:end], pattern[0])
        for j in range(start, end - 1):
            removed = w[j].masked_fill(mask[j], 0.0)  # [out]
            w[j + 1 : end].addr_(effect[j, j + 1 : end], removed, alpha=-1)
        _pass_on_(w, mask, effect, start, end)


def _pass_on_(w: Tensor, mask: Tensor, effect: Tensor, start: int, end: int) -> None:
    """Takes from the columns after `end` what removing the weights of start:end takes from them."""
    w[end:].addmm_(effect[start:end, end:].t(), w[start:end].masked_fill(mask[start:end], 0.0), alpha=-1)


def _largest(scores: Tensor, n: int) -> Tensor:
    """True at the n largest magnitudes of each column of [m, out], lower rows first: `pattern.mask` of few weights.

    That one is made for whole weights, and its calls alone would take half of the time here.
    """
    scores = scores.abs()
    mask = scores >= scores.kthvalue(len(scores) - n + 1, dim=0).values
    if mask.count_nonzero() > n * scores.shape[1]:  # ties
        order = scores.sort(dim=0, descending=True, stable=True).indices
        mask = torch.zeros_like(mask).scatter_(0, order[:n], True)
    return mask


def check_pattern_or_fraction(pattern: Pattern) -> None:
    """Raises InputError unless `pattern` is a fraction to remove or a pair (n, m)."""
    if isinstance(pattern, tuple) and len(pattern) == 2:
        check_pattern(*pattern)
    else:
        fraction(pattern, "pattern")
