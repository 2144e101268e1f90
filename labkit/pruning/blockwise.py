"""A model block by block: each block run by itself, passed over or resumed after, and weights pruned on the way.

The course of SparseGPT (Frantar & Alistarh 2023) and Wanda (Sun et al. 2024): prune a block by what its inputs are
after the blocks before it were pruned, then run the pruned block to get the next one's. `nm` prunes through this.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from labkit.batches import check_batches, evaluating, not_empty, split
from labkit.errors import InputError, check_choice
from labkit.pruning import anatomy
from labkit.pruning.pattern import mask
from labkit.pruning.scores import hessian, magnitude, squares, wanda, watched
from labkit.pruning.select import Weight, count_to_prune, lowest_k, named_parts, prunable
from labkit.pruning.sparsegpt import Pattern, check_pattern_or_fraction, sparsegpt
from labkit.pruning.unstructured import checked_targets, hold_, make_permanent, masks, targets

METHODS = ("magnitude", "wanda", "sparsegpt")


def prune(
    model: nn.Module,
    pattern: Pattern,
    *,
    method: str,
    batches: Iterable | None = None,
    exclude: str | Iterable[str] = (),
    progress: str = "",
) -> nn.Module:
    """A copy of `model` whose weights (`weights_of`) are pruned to `pattern` by `method`, with masks that hold.

    pattern: the fraction to remove, or (n, m) to keep n of every m along the input dimension.
    method: "magnitude": |w|, a fraction of each layer. "wanda": |w| ||x_j||, a fraction of each row. "sparsegpt": see
        `sparsegpt.sparsegpt`, a fraction of each block of columns, and the kept weights move.
    batches: for the last two; read once, kept in memory as what the first block is called with.
    exclude: names of modules or weights that stay dense.
    progress: a label for a progress bar over the blocks; none without.

    Memory beyond the copy: the calibration batches' hidden states, and the Hessians of one block. A model that is no
    stack of blocks is one block: every layer's inputs are then those in the dense model, all Hessians in memory.
    InputError, before any work, for a bad argument or a width that m does not divide.
    """
    check_pattern_or_fraction(pattern)
    check_choice(method, METHODS, "method")
    if method != "magnitude":
        check_batches(batches, method)
    exclude = named_parts(model, exclude, "exclude")
    checked_targets(model, exclude)
    check_widths(weights_of(model, exclude), pattern)
    earlier = masks(model)  # what is gone does not come back
    pruned = make_permanent(model)
    weights = weights_of(pruned, exclude)
    if method == "magnitude":
        keep = {
            name: _highest(weight, magnitude(weight.parameter.detach()), pattern, None) & earlier.get(name, True)
            for name, weight in weights.items()
        }
    else:
        keep = _prune_by_inputs_(pruned, weights, earlier, list(not_empty(batches)), method, pattern, progress)
    hold_(pruned, earlier | keep)
    return pruned


def weights_of(model: nn.Module, exclude: str | Iterable[str] = ()) -> dict[str, Weight]:
    """The weights that `prune` prunes: those of the blocks of a stack of blocks, else all; less those in exclude.

    A stack of blocks is the one nn.ModuleList of modules of one class that holds more than a quarter of the prunable
    weights. Embeddings and the head of a language model are outside it and stay dense, as in the papers.
    """
    inner = {id(module) for block in blocks_of(model) for module in block.modules()}
    weights = targets(model, exclude)
    return {name: weight for name, weight in weights.items() if not inner or id(weight.module) in inner}


def check_widths(weights: dict[str, Weight], pattern: Pattern) -> None:
    """Raises InputError if m does not divide the input dimension of each weight."""
    if not isinstance(pattern, tuple):
        return
    m = pattern[1]
    widths = {name: _as_matrix(weight, weight.parameter).shape[1] for name, weight in weights.items()}
    if short := [f"{name} ({width})" for name, width in widths.items() if width % m]:
        raise InputError(
            f"The input dimension of {', '.join(short[:5])} is no multiple of {m}: name such weights in exclude."
        )


def _prune_by_inputs_(
    model: nn.Module, weights: dict[str, Weight], earlier: dict, batches: list, method: str, pattern, progress
) -> dict[str, Tensor]:
    """What is kept of each weight, after all of them were pruned in place, block after block."""
    statistic, select = (squares, _wanda) if method == "wanda" else (hessian, _sparsegpt_)
    blocks = blocks_of(model)
    keep: dict[str, Tensor] = {}
    with evaluating(model, seed=0), torch.no_grad():
        for block, run in tqdm(walk(model, blocks, batches), total=len(blocks), desc=progress, disable=not progress):
            inner = {id(module) for module in block.modules()}
            inside = {name: weight for name, weight in weights.items() if id(weight.module) in inner}
            if inside:
                with watched(inside.values(), statistic) as sums:
                    run()
            if unseen := [name for name in inside if name not in sums]:
                raise InputError(
                    f"The batches did not reach {', '.join(unseen[:5])} as a layer's weight: name them in exclude, or "
                    "take the method magnitude."
                )
            for name, weight in inside.items():
                keep[name] = select(weight, sums.pop(name)[0], pattern) & earlier.get(name, True)
                weight.parameter.masked_fill_(~keep[name], 0.0)
            if len(keep) == len(weights):
                break
    return keep


# --- one weight -------------------------------------------------------------------------------------------------------


def _as_matrix(weight: Weight, tensor: Tensor) -> Tensor:
    """[out, in] or [C_out, C_in / groups, *kernel]: what a mask is made for."""
    return tensor.t() if weight.transposed else tensor


def _highest(weight: Weight, scores: Tensor, pattern: Pattern, dim: int | None) -> Tensor:
    """True at the highest scores: n of every m, or all but a fraction of the layer (dim None) or of each row (1)."""
    if isinstance(pattern, tuple):
        return _as_matrix(weight, mask(_as_matrix(weight, scores), *pattern)).contiguous()
    rows = weight.as_rows(scores)
    count = count_to_prune(rows.numel() if dim is None else rows.shape[1], pattern)
    return weight.from_rows(~lowest_k(rows, count, dim=dim))


def _wanda(weight: Weight, x2: Tensor, pattern: Pattern) -> Tensor:
    """x2 [groups, in / groups * kernel]: ||x_j||^2."""
    return _highest(weight, wanda(weight.parameter.detach(), weight.spread(x2)), pattern, dim=1)


def _sparsegpt_(weight: Weight, hessians: Tensor, pattern: Pattern) -> Tensor:
    """Moves the weights too. hessians [groups, in, in], in = C_in / groups * kernel; a group of m comes together."""
    rows = weight.as_rows(weight.parameter.detach())  # [out, in]
    kernel = weight.parameter[0, 0].numel()
    order = torch.arange(rows.shape[1], device=rows.device).view(-1, kernel).t().flatten()  # channels side by side
    h = hessians[:, order][:, :, order]
    parts = [sparsegpt(w, x, pattern) for w, x in zip(rows[:, order].chunk(len(h)), h, strict=True)]
    new, keep = (torch.cat(each)[:, order.argsort()] for each in zip(*parts, strict=True))
    weight.parameter.copy_(weight.from_rows(new))
    return weight.from_rows(keep)


# --- a stack of blocks ------------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a stack as `weights_of` says; empty where there is none, or two as in an encoder-decoder."""
    stacks, inner = [], set()
    for module in model.modules():
        if id(module) in inner or not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        alike = len({type(block) for block in module}) == 1 and len({id(block) for block in module}) == len(module)
        if alike and 4 * _size(module) > _size(model):
            stacks.append(list(module))
            inner |= {id(part) for part in module.modules()}
    return stacks[0] if len(stacks) == 1 else []


def _size(module: nn.Module) -> int:
    return sum(weight.parameter.numel() for weight in prunable(module).values())


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(qualified name, layer) of a transformer, in order; InputError if it has no or several lists of layers."""
    name = anatomy.stack(model)
    return [(f"{name}.{key}", layer) for key, layer in model.get_submodule(name)._modules.items()]


def walk(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence
) -> Iterator[tuple[nn.Module, Callable[[], list]]]:
    """(block, run) for each block in order: run() gives its outputs, one a batch, from what the blocks before now give.

    A run is one of the whole model in which earlier blocks compute nothing and which ends after the block, so masks and
    positions are the model's own. Where the blocks do not pass one tensor on, each to the next, or there are none, the
    model is the one block.
    """
    if not blocks or not _is_chain(model, blocks, batches[0]):
        yield model, lambda: [_call(model, batch) for batch in batches]
        return
    outputs: list = [None] * len(batches)
    for number, block in enumerate(blocks):
        pairs = list(zip(batches, outputs, strict=True))
        run = partial(_run_block, model, blocks[:number], block, pairs)
        yield block, run
        outputs = run()


class _Last(Exception):
    """What was asked of the run is there: the rest of the model need not compute."""


def _run_block(model: nn.Module, earlier: Sequence[nn.Module], block: nn.Module, pairs: Iterable[tuple]) -> list:
    """What the block gives for each (batch, what the block before it gives)."""
    outputs = []

    def after(block: nn.Module, args: tuple, output: Any) -> None:
        outputs.append(output)
        raise _Last

    with ExitStack() as hooks:
        hooks.callback(block.register_forward_hook(after).remove)
        for batch, output in pairs:
            with resuming(earlier, [output] * len(earlier)), suppress(_Last):
                _call(model, batch)
    return outputs


def _is_chain(model: nn.Module, blocks: Sequence[nn.Module], batch: Any) -> bool:
    """Whether the blocks run once each and in order, and each reads what the one before it gives."""
    order: list[nn.Module] = []
    last: list[Any] = []

    def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
        expected = blocks[len(order)] if len(order) < len(blocks) else None
        if block is not expected or (last and hidden(args, kwargs) is not last[0]):
            order.append(model)  # which is none of the blocks
            raise _Last
        order.append(block)

    def after(block: nn.Module, args: tuple, output: Any) -> None:
        last[:] = [output if isinstance(output, Tensor) else output[0]]

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(after).remove)
        with suppress(_Last):
            _call(model, batch)
    return len(order) == len(blocks) and order[-1] is blocks[-1]


def _call(model: nn.Module, batch: Any) -> Any:
    args, kwargs, _ = split(model, batch)
    return model(*args, **kwargs)


def hidden(args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden states that a block which is called so reads, [B, T, width]: the first tensor among its arguments."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


@contextmanager
def skipping(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, these blocks pass their input on."""

    def after(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        states = hidden(args, kwargs)
        return states if isinstance(output, Tensor) else (states, *output[1:])

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_hook(after, with_kwargs=True).remove)
        yield


@contextmanager
def remembering(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Inside, what each block gives is put into the list, for `resuming`."""
    outputs: list[Any] = []
    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_hook(lambda _, __, output: outputs.append(output)).remove)
        yield outputs


@contextmanager
def resuming(blocks: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Inside, the first len(outputs) blocks give these outputs and compute nothing."""
    before = [(block, vars(block).get("forward")) for block, _ in zip(blocks, outputs, strict=False)]
    for (block, _), output in zip(before, outputs, strict=True):
        block.forward = lambda *args, output=output, **kwargs: output
    try:
        yield
    finally:
        for block, forward in before:
            del block.forward
            if forward is not None:
                block.forward = forward
