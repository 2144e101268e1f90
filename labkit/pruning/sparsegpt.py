"""SparseGPT: prune a layer and let the kept weights make up for the loss, column by column, in blocks of columns.

Frantar & Alistarh 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Algorithm 1). This
file holds the algorithm for a single weight and the Hessian of its inputs; `modules.hessians` and `modules.blocks`
collect Hessians and go through a model.
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
    """Prune `weight` to `pattern`, and move the kept weights to keep x W^T where it was.

    weight: [out, in].
    hessian: [in, in], X^T X of the layer's inputs X [N, in]; a positive multiple gives the same result. Damped as in
        `hessians.inverse_factor`.
    pattern: the fraction to remove, of each block of BLOCK columns (all rows together); or (n, m) to keep n of every m.
    Returns the new weight [out, in] like `weight`, zero where pruned, and the bool mask [out, in], True where kept.

    With U the upper Cholesky factor of H^-1 (H^-1 = U^T U), for the columns j in order:
        mask_j by w^2 / U_jj^2, chosen where a block (of n:m: a group) begins    e = w_j / U_jj where pruned, else 0
        W_:,j: -= e U_j,j:     within the block at once, for the columns after it once a block (the lazy update)
    where e_j U_j,j: is w_j (U_j,j: / U_jj), as the code has it. For n:m a block has BLOCK columns rounded up to a
    multiple of m. An input that is always zero is removed and takes no part. Time O(in^3 + out in^2), memory O(in^2) in
    float64.
    """
    check_pattern_or_fraction(pattern)
    check_real(weight, "weight")
    check_real(hessian, "hessian")
    check_layer(weight, hessian)
    if isinstance(pattern, tuple) and weight.shape[1] % pattern[1]:
        raise InputError(f"The width {weight.shape[1]} is no multiple of m = {pattern[1]}: pad it with zero columns.")
    alive = hessian.diagonal() > 0  # [in]
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    w = w.masked_fill(~alive, 0.0).t().contiguous()  # [in, out]: a column of the weight is one piece of memory
    u = inverse_factor(hessian).to(w.dtype)  # [in, in]
    diagonal = u.diagonal()[:, None]  # [in, 1]
    effect = u / diagonal  # [in, in]: what removing a weight of 1 takes from those after it
    mask = torch.empty_like(w, dtype=torch.bool)
    block = _block_size(pattern)
    for start in range(0, len(w), block):
        end = min(start + block, len(w))
        effect_in_block = effect[start:end, start:end]
        _prune_block_(w[start:end], mask[start:end], diagonal[start:end], effect_in_block, pattern)
        _update_columns_after_(w, mask, effect, start, end)
    w = w.masked_fill_(~mask, 0.0)
    return w.t().to(weight.dtype).contiguous(), mask.t().contiguous()


def _block_size(pattern: Pattern) -> int:
    if not isinstance(pattern, tuple):
        return BLOCK
    m = pattern[1]
    groups = -(-BLOCK // m)  # rounded up
    return groups * m


def _prune_block_(
    w: Tensor,
    mask: Tensor,
    diagonal: Tensor,
    effect: Tensor,
    pattern: Pattern,
) -> None:
    """Fill `mask` and move `w`, both [columns, out], for a block: diagonal [columns, 1], effect [columns, columns].

    A step of m columns (STEP without n:m) first changes columns inside the step, then the rest of the block in a single
    product.
    """
    is_nm = isinstance(pattern, tuple)
    step = pattern[1] if is_nm else STEP
    if not is_nm:
        scores = (w / diagonal).square()
        mask.copy_(~lowest_k(scores, count_to_prune(w.numel(), pattern)))
    for start in range(0, len(w), step):
        end = min(start + step, len(w))
        if is_nm:
            scores = w[start:end] / diagonal[start:end]
            mask[start:end] = _largest(scores, pattern[0])
        for j in range(start, end - 1):
            removed = w[j].masked_fill(mask[j], 0.0)  # [out]
            after = slice(j + 1, end)
            w[after].addr_(effect[j, after], removed, alpha=-1)
        _update_columns_after_(w, mask, effect, start, end)


def _update_columns_after_(
    w: Tensor,
    mask: Tensor,
    effect: Tensor,
    start: int,
    end: int,
) -> None:
    """Subtract from the columns after `end` the effect of removing the pruned weights of columns start to end."""
    removed = w[start:end].masked_fill(mask[start:end], 0.0)
    w[end:].addmm_(effect[start:end, end:].t(), removed, alpha=-1)


def _largest(scores: Tensor, n: int) -> Tensor:
    """Return a mask, True at the n largest magnitudes of each column of [m, out]; of ties the lower row is taken.

    `pattern.mask` does the same for whole weights; here the overhead of its calls would take half of the time.
    """
    scores = scores.abs()
    threshold = scores.kthvalue(len(scores) - n + 1, dim=0).values
    mask = scores >= threshold
    if mask.count_nonzero() > n * scores.shape[1]:  # ties
        order = scores.sort(dim=0, descending=True, stable=True).indices
        mask = torch.zeros_like(mask).scatter_(0, order[:n], True)
    return mask


def check_pattern_or_fraction(pattern: Pattern) -> None:
    """Raise InputError unless `pattern` is a fraction to remove or a pair (n, m)."""
    if isinstance(pattern, tuple) and len(pattern) == 2:
        check_pattern(*pattern)
    else:
        fraction(pattern, "pattern")
