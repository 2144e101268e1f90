"""A model block by block: its stack of blocks, each run by itself, passed over or resumed after, its inputs summed up.

The course of SparseGPT (Frantar & Alistarh 2023) and GPTQ (Frantar et al. 2022): change a block by what its inputs are
after the blocks before it were changed, then run the changed block to get the next one's. Nothing is changed here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from labkit.errors import InputError
from labkit.modules.batches import evaluating, not_empty, split, summed_loss
from labkit.modules.hessians import watched
from labkit.modules.stacks import blocks_of
from labkit.modules.weights import Weight


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


def inputs_by_block(
    model: nn.Module,
    weights: Mapping[str, Weight],
    statistic: Callable[[nn.Module, Tensor], Tensor],
    batches: Sequence,
    *,
    progress: str = "",
) -> Iterator[tuple[dict[str, Weight], dict[str, Tensor]]]:
    """For each block that holds some of `weights`: ({name: weight}, {name: `statistic` summed over the inputs}).

    The caller changes these weights before it asks for the next block, whose inputs are then what the changed ones
    give. In memory: the statistics of one block and the hidden states of all batches. To be called without gradients
    and in eval mode. InputError for a layer that the batches do not reach. progress: a label for a progress bar.
    """
    blocks, pending = blocks_of(model), set(weights)
    for block, run in tqdm(walk(model, blocks, batches), total=len(blocks), desc=progress, disable=not progress):
        inner = {id(module) for module in block.modules()}
        inside = {name: weight for name, weight in weights.items() if id(weight.module) in inner}
        if not inside:
            continue
        with watched(inside.values(), statistic) as sums:
            run()
        if unseen := [name for name in inside if name not in sums]:
            raise InputError(
                f"The batches did not reach {', '.join(unseen[:5])} as a layer's weight: name them in ignore, or take "
                "a method that looks at no data."
            )
        yield inside, {name: sums.pop(name)[0] for name in inside}
        pending -= inside.keys()
        if not pending:
            return


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


@torch.no_grad()
def loss_increases(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    changes: Sequence[tuple[int, Callable[[], AbstractContextManager]]],
    batches: Iterable,
    loss_fn: Callable | None,
) -> Tensor:
    """How much the mean loss per term (`batches.summed_loss`) grows inside each change: [changes] float64, on the CPU.

    changes: (how many of the first blocks it leaves as they are, the change): for each and each batch the model runs
    from there on. batches: read once.
    """
    sums = torch.zeros(len(changes), dtype=torch.float64)
    terms = 0
    with evaluating(model, seed=0):
        for batch in not_empty(batches):
            with remembering(blocks) as outputs:
                dense, count = summed_loss(model, batch, loss_fn)
            for i, (unchanged, change) in enumerate(changes):
                with resuming(blocks, outputs[:unchanged]), change():
                    loss, _ = summed_loss(model, batch, loss_fn)
                sums[i] += float(loss.double() - dense.double())
            terms += count
    return sums / max(terms, 1)
