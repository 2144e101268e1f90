"""Pruning a model layer by layer with calibration data, the inputs of one block of layers in memory at a time.

The course of SparseGPT (Frantar & Alistarh 2023) and Wanda (Sun et al. 2024): prune a block with what its inputs are
after the blocks before it were pruned, then run the pruned block to get the next one's. `nm` prunes through this.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from labkit.batches import check_batches, evaluating, not_empty, split
from labkit.errors import InputError
from labkit.pruning import stack
from labkit.pruning.nm import mask
from labkit.pruning.scores import hessian, squares, wanda, watched
from labkit.pruning.select import Weight, count_to_prune, lowest_k, named_parts, prunable
from labkit.pruning.sparsegpt import Pattern, check_settings, sparsegpt
from labkit.pruning.unstructured import hold_, masks, refuse_foreign, targets

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
    exclude: names of modules or weights that stay dense. pad: see `nm.mask`. damp, block: of SparseGPT.
    progress: a label for a progress bar over the blocks; none without.

    Memory beyond the copy: the calibration batches' hidden states, and the Hessians of one block. A model that is no
    stack of blocks is one block: every layer's inputs are then those in the dense model, all Hessians in memory.
    InputError, before any work, for a bad argument or a width that m does not divide.
    """
    check_settings(pattern, damp, block)
    if method not in METHODS:
        raise InputError(f"There is no method {method!r}: choose one of {', '.join(METHODS)}.")
    if method != "magnitude":
        check_batches(batches, method)
    refuse_foreign(model)
    exclude = named_parts(model, exclude, "exclude")
    check_widths(weights_of(model, exclude), pattern, pad)
    pruned = copy.deepcopy(model)
    weights = weights_of(pruned, exclude)
    earlier = masks(pruned)  # what is gone does not come back
    if method == "magnitude":
        bar = tqdm(weights.items(), desc=progress, disable=not progress)
        kept = {name: _select(weight, weight.parameter.detach().abs(), pattern, pad, None) for name, weight in bar}
    else:
        by_wanda = _Method(squares, partial(_wanda_, pattern=pattern, pad=pad))
        by_obs = _Method(hessian, partial(_sparsegpt_, pattern=pattern, damp=damp, block=block))
        kept = _through(pruned, weights, batches, by_wanda if method == "wanda" else by_obs, progress)
    hold_(pruned, {name: k & earlier[name] if name in earlier else k for name, k in kept.items()})
    return pruned


def weights_of(model: nn.Module, exclude: str | Iterable[str] = ()) -> dict[str, Weight]:
    """The weights that `prune` prunes: those of the blocks of a stack of blocks, else all; less those in exclude.

    A stack of blocks is the one nn.ModuleList of modules of one class that holds more than a quarter of the prunable
    weights. Embeddings and the head of a language model are outside it and stay dense, as in the papers.
    """
    inner = {id(module) for block in _blocks(model) for module in block.modules()}
    found = targets(model, exclude)
    return {name: weight for name, weight in found.items() if not inner or id(weight.module) in inner}


def _blocks(model: nn.Module) -> list[nn.Module]:
    return stack.blocks(model, lambda part: sum(weight.parameter.numel() for weight in prunable(part).values()))


def check_widths(weights: dict[str, Weight], pattern: Pattern, pad: bool) -> None:
    """Raises InputError if m does not divide the input dimension of each weight, unless pad allows it."""
    if not isinstance(pattern, tuple) or pad:
        return
    m = pattern[1]
    widths = {name: _as_matrix(weight, weight.parameter).shape[1] for name, weight in weights.items()}
    if short := [f"{name} ({width})" for name, width in widths.items() if width % m]:
        raise InputError(
            f"The input dimension of {', '.join(short[:5])} is no multiple of {m}: name such weights in exclude, or "
            "give pad=True to allow a shorter last group."
        )


# --- the course -------------------------------------------------------------------------------------------------------


class _Method(NamedTuple):
    """statistic(layer, x): what is summed over a layer's inputs; prune_(weight, sum) -> what of the weight is kept."""

    statistic: Callable[[nn.Module, Tensor], Tensor]
    prune_: Callable[[Weight, Tensor], Tensor]


def _through(
    model: nn.Module, weights: dict[str, Weight], batches: Iterable, method: _Method, progress: str
) -> dict[str, Tensor]:
    """What is kept of each weight, after all of them were pruned in place, block after block."""
    batches = list(not_empty(batches))
    blocks = _blocks(model)
    with evaluating(model, seed=0), torch.no_grad():
        runs = stack.record(model, blocks, batches) if blocks else None
        if runs is None:
            return _stage(weights, method, lambda: _whole(model, batches))
        kept: dict[str, Tensor] = {}
        for number, block in enumerate(tqdm(blocks, desc=progress, disable=not progress)):
            inner = {id(module) for module in block.modules()}
            own = {name: weight for name, weight in weights.items() if id(weight.module) in inner}
            if own:
                kept |= _stage(own, method, partial(_advance, block, number, runs))
            if len(kept) == len(weights):
                break
            for run, hidden in zip(runs, _advance(block, number, runs), strict=True):
                run.hidden = hidden
    return kept


def _stage(weights: dict[str, Weight], method: _Method, forward: Callable[[], object]) -> dict[str, Tensor]:
    """Collects the inputs of the weights' layers while `forward` runs, then prunes these weights."""
    with watched(weights.values(), method.statistic) as sums:
        forward()
    if unseen := [name for name in weights if name not in sums]:
        raise InputError(
            f"The batches did not reach {', '.join(unseen[:5])} as a layer's weight: name them in exclude, or take "
            "the method magnitude."
        )
    return {name: method.prune_(weight, sums.pop(name)[0]) for name, weight in weights.items()}


def _advance(block: nn.Module, number: int, runs: Sequence[stack.Run]) -> list[Tensor]:
    return [stack.forward(block, number, run) for run in runs]


def _whole(model: nn.Module, batches: list) -> None:
    for batch in batches:
        args, kwargs, _ = split(model, batch)
        model(*args, **kwargs)


# --- one weight -------------------------------------------------------------------------------------------------------


def _as_matrix(weight: Weight, tensor: Tensor) -> Tensor:
    """[out, in] or [C_out, C_in / groups, *kernel]: what a mask is made for."""
    return tensor.t() if weight.transposed else tensor


def _select(weight: Weight, scores: Tensor, pattern: Pattern, pad: bool, dim: int | None) -> Tensor:
    """True at the highest scores: n of every m, or all but a fraction of the layer (dim None) or of each row (1)."""
    if isinstance(pattern, tuple):
        return _as_matrix(weight, mask(_as_matrix(weight, scores), *pattern, pad=pad)).contiguous()
    rows = weight.as_rows(scores)
    count = count_to_prune(rows.numel() if dim is None else rows.shape[1], pattern)
    return weight.from_rows(~lowest_k(rows, count, dim=dim))


def _wanda_(weight: Weight, x2: Tensor, pattern: Pattern, pad: bool) -> Tensor:
    """x2 [groups, in / groups * kernel]: ||x_j||^2."""
    scores = wanda(weight.parameter.detach(), weight.spread(x2))
    kept = _select(weight, scores, pattern, pad, dim=1)
    weight.parameter.masked_fill_(~kept, 0.0)
    return kept


def _sparsegpt_(weight: Weight, hessians: Tensor, pattern: Pattern, damp: float, block: int) -> Tensor:
    """hessians [groups, in, in], in = C_in / groups * kernel; columns of a group of m come together."""
    rows = weight.as_rows(weight.parameter.detach())  # [out, in]
    order = _columns(weight, pattern)  # positions in a row that has one zero column more
    real = order < rows.shape[1]
    padded, h = F.pad(rows, (0, 1))[:, order], F.pad(hessians, (0, 1, 0, 1))[:, order][:, :, order]
    parts = [sparsegpt(w, x, pattern, damp=damp, block=block) for w, x in zip(padded.chunk(len(h)), h, strict=True)]
    new, kept = (torch.cat(each)[:, real][:, order[real].argsort()] for each in zip(*parts, strict=True))
    weight.parameter.copy_(weight.from_rows(new))
    return weight.from_rows(kept)


def _columns(weight: Weight, pattern: Pattern) -> Tensor:
    """[kernel * C_in rounded up to m]: columns of a row in the order of groups; `in` stands for a column of zeros."""
    m = pattern[1] if isinstance(pattern, tuple) else 1
    matrix = _as_matrix(weight, weight.parameter)
    positions = torch.arange(matrix[0].numel(), device=matrix.device).view(matrix.shape[1], -1)  # [C_in, kernel]
    padded = F.pad(positions.t(), (0, -len(positions) % m), value=matrix[0].numel())
    return padded.flatten()
