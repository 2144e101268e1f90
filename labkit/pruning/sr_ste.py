"""N:M masks that move during training: SR-STE, a straight-through gradient that also pulls pruned weights to zero.

Zhou et al. 2021, Learning N:M Fine-grained Structured Sparse Neural Networks from Scratch. For masks that stay as they
are, train what `nm.prune` returns.
"""

from collections.abc import Iterable

from torch import nn


def prepare(
    model: nn.Module,
    n: int = 2,
    m: int = 4,
    *,
    decay: float = 2e-4,
    exclude: str | Iterable[str] = (),
    pad: bool = False,
) -> nn.Module:
    """A copy of `model` to train: every forward pass uses n of every m weights, by magnitude at that moment.

    The parameters stay dense and all get the gradient of the pruned weights (straight through), plus decay * w where w
    is pruned (the sparse-refined term; 0 gives plain STE). Which weights: as in `nm.prune`.
    `finish` makes the trained model plain. `unstructured.sparsity` and `artifact.size` see what the forward pass sees.
    """
    raise NotImplementedError


def finish(model: nn.Module) -> nn.Module:
    """A copy of a `prepare`d model whose weights are exactly n:m, held by fixed masks as in what `nm.prune` returns."""
    raise NotImplementedError
