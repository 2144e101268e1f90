"""Weights pruned to a pattern on the way through a model, each block by what the pruned blocks before it give.

SparseGPT (Frantar & Alistarh 2023), Wanda (Sun et al. 2024) and magnitude. The way itself: `labkit.blocks`. `nm` prunes
through this.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from labkit.errors import InputError, check_choice
from labkit.modules.batches import check_batches, evaluating, not_empty
from labkit.modules.blocks import inputs_by_block
from labkit.modules.hessians import hessian, squares
from labkit.modules.masks import hold_, make_permanent, masks
from labkit.modules.stacks import blocks_of
from labkit.modules.weights import CONVOLUTIONS, Weight, named_parts
from labkit.pruning.pattern import mask
from labkit.pruning.scores import magnitude, wanda
from labkit.pruning.select import count_to_prune, lowest_k
from labkit.pruning.sparsegpt import Pattern, check_pattern_or_fraction, sparsegpt
from labkit.pruning.unstructured import checked_targets, targets

METHODS = ("magnitude", "wanda", "sparsegpt")


def prune(
    model: nn.Module,
    pattern: Pattern,
    *,
    method: str,
    batches: Iterable | None = None,
    ignore: str | Iterable[str] = (),
    progress: str = "",
) -> nn.Module:
    """A copy of `model` whose weights (`weights_of`) are pruned to `pattern` by `method`, with masks that hold.

    pattern: the fraction to remove, or (n, m) to keep n of every m along the input dimension.
    method: "magnitude": |w|, a fraction of each matrix. "wanda": |w| ||x_j||, a fraction of each row. "sparsegpt": see
        `sparsegpt.sparsegpt`, a fraction of each block of columns, and the kept weights move.
    batches: for the last two; read once, kept in memory as what the first block is called with.
    ignore: names of modules or weights that stay dense.
    progress: a label for a progress bar over the blocks; none without.

    Memory beyond the copy: the calibration batches' hidden states, and the Hessians of one block. A model that is no
    stack of blocks is one block: every layer's inputs are then those in the dense model, all Hessians in memory.
    InputError, before any work, for a bad argument or a width that m does not divide.
    """
    check_pattern_or_fraction(pattern)
    check_choice(method, METHODS, "method")
    if method != "magnitude":
        check_batches(batches, method)
    ignore = named_parts(model, ignore, "ignore")
    checked_targets(model, ignore)
    check_widths(weights_of(model, ignore), pattern)
    earlier = masks(model)  # what is gone does not come back
    pruned = make_permanent(model)
    weights = weights_of(pruned, ignore)
    if method == "magnitude":
        keep = {
            name: _highest(weight, magnitude(weight.parameter.detach()), pattern, "matrix") & earlier.get(name, True)
            for name, weight in weights.items()
        }
    else:
        keep = _prune_by_inputs_(pruned, weights, earlier, list(not_empty(batches)), method, pattern, progress)
    hold_(pruned, earlier | keep)
    return pruned


def weights_of(model: nn.Module, ignore: str | Iterable[str] = ()) -> dict[str, Weight]:
    """The weights that `prune` prunes: those of the stack of blocks (`stacks.blocks_of`), else all; less ignore's.

    Embeddings and the head of a language model are outside it and stay dense, as in the papers.
    """
    inner = {id(module) for block in blocks_of(model) for module in block.modules()}
    weights = targets(model, ignore)
    return {name: weight for name, weight in weights.items() if not inner or id(weight.module) in inner}


def check_widths(weights: dict[str, Weight], pattern: Pattern) -> None:
    """Raises InputError if m does not divide the input dimension of each weight."""
    if not isinstance(pattern, tuple):
        return
    m = pattern[1]
    widths = {name: _as_matrix(weight, weight.parameter).shape[1] for name, weight in weights.items()}
    if short := [f"{name} ({width})" for name, width in widths.items() if width % m]:
        raise InputError(
            f"The input dimension of {', '.join(short[:5])} is no multiple of {m}: name such weights in ignore."
        )


def _prune_by_inputs_(
    model: nn.Module, weights: dict[str, Weight], earlier: dict, batches: list, method: str, pattern, progress
) -> dict[str, Tensor]:
    """What is kept of each weight, after all of them were pruned in place, block after block."""
    statistic, select = (squares, _wanda) if method == "wanda" else (hessian, _sparsegpt_)
    keep: dict[str, Tensor] = {}
    with evaluating(model, seed=0), torch.no_grad():
        for inside, sums in inputs_by_block(model, weights, statistic, batches, progress=progress):
            for name, weight in inside.items():
                keep[name] = select(weight, sums.pop(name), pattern) & earlier.get(name, True)
                weight.parameter.masked_fill_(~keep[name], 0.0)
    return keep


def _as_matrix(weight: Weight, tensor: Tensor) -> Tensor:
    """[out, in], of experts one below the other, or [C_out, C_in / groups, *kernel]: what a mask is made for."""
    return tensor if isinstance(weight.module, CONVOLUTIONS) else weight.as_rows(tensor)


def _highest(weight: Weight, scores: Tensor, pattern: Pattern, by: str) -> Tensor:
    """True at the highest scores: n of every m, or all but a fraction of each "matrix" or of each "row"."""
    if isinstance(pattern, tuple):
        keep = mask(_as_matrix(weight, scores), *pattern)
        return (keep if isinstance(weight.module, CONVOLUTIONS) else weight.from_rows(keep)).contiguous()
    rows = weight.as_rows(scores)
    slices = rows if by == "row" else rows.reshape(weight.experts or 1, -1)
    return weight.from_rows(~lowest_k(slices, count_to_prune(slices.shape[1], pattern), dim=1))


def _wanda(weight: Weight, x2: Tensor, pattern: Pattern) -> Tensor:
    """x2 [groups, in / groups * kernel]: ||x_j||^2; of experts [experts, in]."""
    return _highest(weight, wanda(weight.parameter.detach(), weight.spread(x2)), pattern, "row")


def _sparsegpt_(weight: Weight, hessians: Tensor, pattern: Pattern) -> Tensor:
    """Moves the weights too. hessians [groups, in, in], in = C_in / groups * kernel; a group of m comes together.

    Experts are groups.
    """
    rows = weight.as_rows(weight.parameter.detach())  # [out, in]
    kernel = weight.parameter[0, 0].numel() if isinstance(weight.module, CONVOLUTIONS) else 1
    order = torch.arange(rows.shape[1], device=rows.device).view(-1, kernel).t().flatten()  # channels side by side
    h = hessians[:, order][:, :, order]
    parts = [sparsegpt(w, x, pattern) for w, x in zip(rows[:, order].chunk(len(h)), h, strict=True)]
    new, keep = (torch.cat(each)[:, order.argsort()] for each in zip(*parts, strict=True))
    weight.parameter.copy_(weight.from_rows(new))
    return weight.from_rows(keep)
