"""SparseGPT: prune one layer and let the kept weights make up for it, column by column, in blocks of columns.

Frantar & Alistarh 2023, SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Algorithm 1). One
weight and the Hessian of its inputs here; `layerwise` collects Hessians and goes through a model.
"""

from torch import Tensor

Pattern = float | tuple[int, int]


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
    An input that is always zero is removed and takes no part. Time O(in^3 + out in^2), memory O(in^2) in float64.
    """
    raise NotImplementedError
