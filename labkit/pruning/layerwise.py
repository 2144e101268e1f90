"""Pruning a model layer by layer with calibration data, the inputs of one block of layers in memory at a time.

The course of SparseGPT (Frantar & Alistarh 2023) and Wanda (Sun et al. 2024): prune a block with what its inputs are
after the blocks before it were pruned, then run the pruned block to get the next one's. `nm` prunes through this.
"""

from collections.abc import Iterable

from torch import nn

from labkit.pruning.criteria import Weight
from labkit.pruning.sparsegpt import Pattern

METHODS = ("magnitude", "wanda", "sparsegpt")


def prune(
    model: nn.Module,
    pattern: Pattern,
    *,
    method: str,
    batches: Iterable | None = None,
    exclude: str | Iterable[str] = (),
    pad: bool = False,
    damp: float = 0.01,
    block: int = 128,
    progress: str = "",
) -> nn.Module:
    """A copy of `model` whose weights (`weights_of`) are pruned to `pattern` by `method`, with masks that hold.

    pattern: the fraction to remove, or (n, m) to keep n of every m along the input dimension.
    method: "magnitude": |w|, a fraction of each layer. "wanda": |w| ||x_j||, a fraction of each row. "sparsegpt": see
        `sparsegpt.sparsegpt`, a fraction of each `block` columns, and the kept weights move.
    batches: for the last two; read once, kept in memory as what the first block is called with.
    exclude: names of modules or weights that stay dense. pad: see `nm_pattern.mask`. damp, block: of SparseGPT.
    progress: a label for a progress bar over the blocks; none without.

    Memory beyond the copy: the calibration batches' hidden states, and the Hessians of one block. A model that is no
    stack of blocks is one block: every layer's inputs are then those in the dense model, all Hessians in memory.
    InputError, before any work, for a bad argument or a width that m does not divide.
    """
    raise NotImplementedError


def weights_of(model: nn.Module, exclude: str | Iterable[str] = ()) -> dict[str, Weight]:
    """The weights that `prune` prunes: those of the blocks of a stack of blocks, else all; less those in exclude.

    A stack of blocks is an nn.ModuleList of modules of one class that holds more than half of the prunable weights.
    Embeddings and the head of a language model are outside it and stay dense, as in the papers.
    """
    raise NotImplementedError
