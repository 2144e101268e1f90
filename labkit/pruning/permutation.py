"""Channels in an order that loses less to n:m: groups of m neighbours are a choice, and the network does not mind.

Pool & Yu 2021, Channel Permutations for N:M Sparsity: swap input channels between groups as long as the kept energy
grows. A reader's input channels are its producers' output channels, so whole coupled groups are reordered.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def search(scores: Tensor, n: int = 2, m: int = 4, *, rounds: int = 100) -> Tensor:
    """The order [in] of the columns of `scores` [rows, in] (such as w^2) that greedy swaps end in.

    Scores kept by n:m in scores[:, order] are at least those in the given order; it ends where no swap of two columns
    gains, or after `rounds` rounds of swaps. Deterministic.
    """
    raise NotImplementedError


def permute(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    n: int = 2,
    m: int = 4,
    rounds: int = 100,
) -> nn.Module:
    """A copy of `model` that computes the same function with its channels in an order that n:m keeps more of.

    args, kwargs: an example input, as for `coupling.trace`, which finds what has to be reordered together. Prune the
    result with `nm.prune`. What cannot be reordered (inputs, outputs, attention heads) stays where it is.
    """
    raise NotImplementedError
