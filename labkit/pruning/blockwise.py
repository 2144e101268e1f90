"""Pruning a whole model to a pattern, block after block, with SparseGPT, Wanda or magnitude.

SparseGPT (Frantar & Alistarh 2023), Wanda (Sun et al. 2024). Each block is pruned by the inputs that it gets from the
pruned blocks before it; `labkit.modules.blocks` runs the blocks. `nm.prune` calls this module.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

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
    """Return a copy of `model` with the weights of `weights_of` pruned to `pattern` and held at zero by masks.

    pattern: the fraction to remove, or (n, m) to keep n of every m weights along the input dimension.
    method: "magnitude": |w|, a fraction of each matrix. "wanda": |w| ||x_j||, a fraction of each row. "sparsegpt": see
        `sparsegpt.sparsegpt`, a fraction of each block of columns; the remaining weights change.
    batches: calibration input, for "wanda" and "sparsegpt"; read once, and kept in memory as input of the first block.
    ignore: names of modules or weights that stay dense.
    progress: label of a progress bar over the blocks; no bar if empty.

    Memory beyond the copy: the hidden states of the calibration batches, and the Hessians of a single block. A model
    that is no stack of blocks counts as a single block: layer inputs are those of the dense model, and all Hessians are
    in memory together.
    Raises InputError, before any work, for a bad argument or a width that is no multiple of m.
    """
    check_pattern_or_fraction(pattern)
    check_choice(method, METHODS, "method")
    if method != "magnitude":
        check_batches(batches, method)
    ignore = named_parts(model, ignore, "ignore")
    checked_targets(model, ignore)
    check_widths(weights_of(model, ignore), pattern)
    earlier_masks = masks(model)
    pruned = make_permanent(model)
    weights = weights_of(pruned, ignore)
    if method == "magnitude":
        new_masks = {}
        for name, weight in weights.items():
            new_masks[name] = _magnitude(weight, pattern) & earlier_masks.get(name, True)  # pruned stays pruned
    else:
        batches = list(not_empty(batches))
        new_masks = _prune_by_inputs_(pruned, weights, earlier_masks, batches, method, pattern, progress)
    hold_(pruned, earlier_masks | new_masks)
    return pruned


def weights_of(model: nn.Module, ignore: str | Iterable[str] = ()) -> dict[str, Weight]:
    """Return the weights to prune, {name: weight}: in the stack of blocks (`stacks.blocks_of`), or all without a stack.

    ignore: names of modules or weights to leave out. Embeddings and the head of a language model lie outside the stack
    and stay dense, as in the papers.
    """
    in_blocks = {id(module) for block in blocks_of(model) for module in block.modules()}
    weights = targets(model, ignore)
    if not in_blocks:
        return weights
    return {name: weight for name, weight in weights.items() if id(weight.module) in in_blocks}


def check_widths(weights: dict[str, Weight], pattern: Pattern) -> None:
    """Raise InputError unless the input dimension of each weight is a multiple of m in the pattern (n, m)."""
    if not isinstance(pattern, tuple):
        return
    m = pattern[1]
    misfits = []
    for name, weight in weights.items():
        width = _as_matrix(weight, weight.parameter).shape[1]
        if width % m:
            misfits.append(f"{name} ({width})")
    if misfits:
        raise InputError(
            f"The input dimension of {', '.join(misfits[:5])} is no multiple of {m}: name such weights in ignore."
        )


def _as_matrix(weight: Weight, tensor: Tensor) -> Tensor:
    """Return a tensor shaped like the weight in the shape that `pattern.mask` takes.

    [out, in], the matrices of experts below one another; of a convolution [C_out, C_in / groups, *kernel].
    """
    return tensor if isinstance(weight.module, CONVOLUTIONS) else weight.as_rows(tensor)


def _highest(weight: Weight, scores: Tensor, pattern: Pattern, by: str) -> Tensor:
    """Return a mask, True at the highest scores: n of every m, or all but a fraction of each "matrix" or each "row".

    scores, mask: in the shape of the parameter.
    """
    if isinstance(pattern, tuple):
        keep = mask(_as_matrix(weight, scores), *pattern)
        if not isinstance(weight.module, CONVOLUTIONS):
            keep = weight.from_rows(keep)
        return keep.contiguous()
    rows = weight.as_rows(scores)
    n_matrices = weight.experts or 1
    slices = rows if by == "row" else rows.reshape(n_matrices, -1)
    lowest = lowest_k(slices, count_to_prune(slices.shape[1], pattern), dim=1)
    return weight.from_rows(~lowest)


# --- the methods: each returns the mask of a weight, True where the weight remains ------------------------------------


def _magnitude(weight: Weight, pattern: Pattern) -> Tensor:
    return _highest(weight, magnitude(weight.parameter.detach()), pattern, "matrix")


def _wanda(weight: Weight, x2: Tensor, pattern: Pattern) -> Tensor:
    """Mask by `scores.wanda`. x2: ||x_j||^2, [groups, in / groups * kernel], of experts [experts, in]."""
    scores = wanda(weight.parameter.detach(), weight.spread(x2))
    return _highest(weight, scores, pattern, "row")


def _sparsegpt_(weight: Weight, hessians: Tensor, pattern: Pattern) -> Tensor:
    """Mask by `sparsegpt.sparsegpt`, which also changes the remaining weights in place.

    hessians: [groups, in, in], in = C_in / groups * kernel; experts count as groups.
    """
    rows = weight.as_rows(weight.parameter.detach())  # [out, in]
    order = _channels_together(weight, rows)
    hessians = hessians[:, order][:, :, order]
    rows_of_group = rows[:, order].chunk(len(hessians))
    new_rows, new_masks = [], []
    for group_rows, group_hessian in zip(rows_of_group, hessians, strict=True):
        pruned, keep = sparsegpt(group_rows, group_hessian, pattern)
        new_rows.append(pruned)
        new_masks.append(keep)
    original_order = order.argsort()
    weight.parameter.copy_(weight.from_rows(torch.cat(new_rows)[:, original_order]))
    return weight.from_rows(torch.cat(new_masks)[:, original_order])


def _channels_together(weight: Weight, rows: Tensor) -> Tensor:
    """Return the order of columns [in] that puts the m channels of an n:m group side by side.

    Columns of a convolution are [channel, kernel position]; a group of m takes m channels at the same position.
    """
    kernel = weight.parameter[0, 0].numel() if isinstance(weight.module, CONVOLUTIONS) else 1
    columns = torch.arange(rows.shape[1], device=rows.device)
    return columns.view(-1, kernel).t().flatten()


class MethodByInputs(NamedTuple):
    """A method that looks at the inputs of layers.

    statistic: statistic(layer, x), summed over all inputs x of the layer.
    select: select(weight, sum, pattern) returns the mask; may change the remaining weights in place.
    """

    statistic: Callable[[nn.Module, Tensor], Tensor]
    select: Callable[[Weight, Tensor, Pattern], Tensor]


_BY_INPUTS = {"wanda": MethodByInputs(squares, _wanda), "sparsegpt": MethodByInputs(hessian, _sparsegpt_)}


def _prune_by_inputs_(
    model: nn.Module,
    weights: dict[str, Weight],
    earlier_masks: Mapping[str, Tensor],
    batches: list,
    method: str,
    pattern: Pattern,
    progress: str,
) -> dict[str, Tensor]:
    """Prune the weights in place, block after block, and return {name: mask, True where a weight remains}."""
    statistic, select = _BY_INPUTS[method]
    new_masks: dict[str, Tensor] = {}
    with evaluating(model, seed=0), torch.no_grad():
        for in_block, sums in inputs_by_block(model, weights, statistic, batches, progress=progress):
            for name, weight in in_block.items():
                keep = select(weight, sums.pop(name), pattern)
                new_masks[name] = keep & earlier_masks.get(name, True)  # pruned stays pruned
                weight.parameter.masked_fill_(~new_masks[name], 0.0)
    return new_masks
