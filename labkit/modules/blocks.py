"""Walk through a model block by block: run a single block, skip blocks, and sum over the inputs of a block's layers.

SparseGPT (Frantar & Alistarh 2023) and GPTQ (Frantar et al. 2022) change a block, run it, and change the next block
by the inputs from it. The walk changes no weight.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from labkit.errors import InputError
from labkit.modules.batches import evaluating, not_empty, split
from labkit.modules.hessians import watched
from labkit.modules.hooks import first_tensor, forward_hooks
from labkit.modules.losses import summed_loss
from labkit.modules.stacks import blocks_of
from labkit.modules.weights import Weight


def walk(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence
) -> Iterator[tuple[nn.Module, Callable[[], list]]]:
    """Yield (block, run) for each block in order; run() returns the outputs of the block, an output for each batch.

    blocks: blocks in running order (`stacks.blocks_of`). The whole model is taken as the only block if `blocks` is
        empty, or if a block does not read the output of its predecessor.
    batches: batches in any of the forms of `batches.split`.

    A run calls the whole model, with its own masks and positions. Earlier blocks return the outputs of the last
    run without computing, and the call ends after the block. Change a block before asking for the next block, and the
    next block reads the changed outputs.
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
    """Yield ({name: weight}, {name: statistic}) for each block with some of the weights, in order.

    weights: {name: weight} to be visited.
    statistic: statistic(layer, input) of a call, summed over all calls of the layer, for example `hessians.hessian`.
    batches: batches in any of the forms of `batches.split`.
    progress: a label for a progress bar; "" shows no bar.

    The caller changes the weights of a block before asking for the next block; then the inputs of the next block come
    from the changed weights. The statistics of a single block and the hidden states of all batches are in memory. To be
    called without gradients and in eval mode. Raises InputError for a weight in a layer not reached by the batches.
    """
    blocks = blocks_of(model)
    pending = set(weights)
    steps = tqdm(walk(model, blocks, batches), total=len(blocks), desc=progress, disable=not progress)
    for block, run in steps:
        modules = {id(module) for module in block.modules()}
        weights_inside = {name: weight for name, weight in weights.items() if id(weight.module) in modules}
        if not weights_inside:
            continue
        with watched(weights_inside.values(), statistic) as sums:
            run()
        unseen = [name for name in weights_inside if name not in sums]
        if unseen:
            raise InputError(
                f"The batches did not reach {', '.join(unseen[:5])} as a layer's weight: name them in ignore, or take "
                "a method that looks at no data."
            )
        yield weights_inside, {name: sums.pop(name)[0] for name in weights_inside}
        pending -= weights_inside.keys()
        if not pending:
            return


class _Stop(Exception):
    """Ends a forward pass, as the rest of the model need not be computed."""


def _run_block(
    model: nn.Module, earlier: Sequence[nn.Module], block: nn.Module, pairs: Iterable[tuple[Any, Any]]
) -> list:
    """Return the block's output for each (batch, output of the block before)."""
    outputs = []

    def stop(number: int, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        outputs.append(output)
        raise _Stop

    with forward_hooks([block], stop):
        for batch, previous in pairs:
            with resuming(earlier, [previous] * len(earlier)), suppress(_Stop):
                _call(model, batch)
    return outputs


def _is_chain(model: nn.Module, blocks: Sequence[nn.Module], batch: Any) -> bool:
    """Return True if the blocks run once each and in order, and each reads the output of the block before."""
    started = 0
    in_a_chain = True
    previous: Tensor | None = None  # output of the block before

    def check(number: int, args: tuple, kwargs: Mapping[str, Any]) -> None:
        nonlocal started, in_a_chain
        reads_previous = previous is None or first_tensor(args, kwargs) is previous
        if number != started or not reads_previous:
            in_a_chain = False
            raise _Stop
        started += 1

    def remember(number: int, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        nonlocal previous
        previous = output if isinstance(output, Tensor) else output[0]

    with forward_hooks(blocks, check, before=True), forward_hooks(blocks, remember), suppress(_Stop):
        _call(model, batch)
    return in_a_chain and started == len(blocks)


def _call(model: nn.Module, batch: Any) -> Any:
    args, kwargs, _ = split(model, batch)
    return model(*args, **kwargs)


@contextmanager
def skipping(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let the blocks return the input unchanged, as long as the `with` block runs."""

    def pass_on(number: int, args: tuple, kwargs: Mapping[str, Any], output: Any) -> Any:
        states = first_tensor(args, kwargs)
        return states if isinstance(output, Tensor) else (states, *output[1:])

    with forward_hooks(blocks, pass_on):
        yield


@contextmanager
def resuming(blocks: Sequence[nn.Module], outputs: Sequence[Any]) -> Iterator[None]:
    """Let the first len(outputs) blocks return `outputs` without computing, as long as the `with` block runs."""
    resumed = blocks[: len(outputs)]
    overridden = [vars(block).get("forward") for block in resumed]  # None for the method of the class
    for block, output in zip(resumed, outputs, strict=True):
        block.forward = _returning(output)
    try:
        yield
    finally:
        for block, forward in zip(resumed, overridden, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _returning(output: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return output

    return forward


@torch.no_grad()
def loss_increases(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    changes: Sequence[tuple[int, Callable[[], AbstractContextManager]]],
    batches: Iterable,
    loss_fn: Callable | None,
) -> Tensor:
    """Measure how much the mean loss per term (`losses.summed_loss`) grows inside each change.

    blocks: the model's blocks, in running order.
    changes: (number of first blocks without a change, the change as a context manager); for each batch the unchanged
        first blocks are not run again.
    batches: read once, a batch at a time.
    loss_fn: loss_fn(output, target), or None: see `losses.summed_loss`.

    Returns [changes] float64 on the CPU.
    """
    sums = torch.zeros(len(changes), dtype=torch.float64)
    terms = 0
    with evaluating(model, seed=0):
        for batch in not_empty(batches):
            dense, outputs, count = _dense_loss(model, blocks, batch, loss_fn)
            for i, (unchanged, change) in enumerate(changes):
                with resuming(blocks, outputs[:unchanged]), change():
                    loss, _ = summed_loss(model, batch, loss_fn)
                sums[i] += float(loss.double() - dense.double())
            terms += count
    return sums / max(terms, 1)


def _dense_loss(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Any, loss_fn: Callable | None
) -> tuple[Tensor, list[Any], int]:
    """Return (summed loss, output of each block, number of terms) of the unchanged model."""
    outputs: list[Any] = []

    def remember(number: int, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        outputs.append(output)

    with forward_hooks(blocks, remember):
        loss, terms = summed_loss(model, batch, loss_fn)
    return loss, outputs, terms
