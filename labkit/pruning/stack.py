"""A model as a stack of blocks: which modules they are, what each is called with, and one block's run at a time.

For language models and other transformers, whose blocks pass one tensor of hidden states on. What a block gets besides
(masks, positions) is recorded from one run of the model and taken as it was. Knows nothing of pruning.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass

from torch import Tensor, nn

from labkit.batches import split


@dataclass
class Run:
    """One batch on its way: the hidden states that the next block gets, and each block's other arguments."""

    hidden: Tensor
    calls: list[Callable[[Tensor], tuple[tuple, dict]]]  # hidden states -> arguments of the block


class _Last(Exception):
    """The last block has run: the head of the model need not."""


def blocks(model: nn.Module, share: Callable[[nn.Module], int]) -> list[nn.Module]:
    """The modules of the one nn.ModuleList, all of one class, that holds more than a quarter of `share`; else empty.

    share(module): a size, such as the number of weights in it. Empty for encoder-decoders, which have two such lists.
    """
    found, inner = [], set()
    for module in model.modules():
        if id(module) in inner or not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        alike = len({type(block) for block in module}) == 1 and len({id(block) for block in module}) == len(module)
        if alike and 4 * share(module) > share(model):
            found.append(list(module))
            inner |= {id(part) for part in module.modules()}
    return found[0] if len(found) == 1 else []


def record(model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence) -> list[Run] | None:
    """A Run before the first block for each batch; None if the blocks do not pass one tensor on, each to the next.

    That is seen on the first batch. Of the others only the arguments besides the hidden states are needed, so there the
    blocks do not compute.
    """
    runs, output = [], None
    with _without_cache(model):
        for batch in batches:
            with _passing_on(blocks, output) if runs else nullcontext():
                run, output = _record(model, blocks, batch)
            if run is None:
                return None
            runs.append(run)
    return runs


def forward(block: nn.Module, number: int, run: Run) -> Tensor:
    """The hidden states after `block`, which is the blocks' `number`-th."""
    args, kwargs = run.calls[number](run.hidden)
    return _first(block(*args, **kwargs))


def _record(model: nn.Module, blocks: Sequence[nn.Module], batch: object) -> tuple[Run | None, object]:
    """The run of one batch, and the last block's output."""
    calls, first, last = [], [], [None]  # first: the hidden states before the blocks; last: the last output
    place = {id(block): number for number, block in enumerate(blocks)}

    def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
        slot, hidden = _hidden(args, kwargs)
        if place[id(block)] != len(calls) or hidden is None or (calls and hidden is not _first(last[0])):
            raise _Last
        first[:] = first or [hidden]
        calls.append(_arguments(args, kwargs, slot))

    def after(block: nn.Module, args: tuple, output: object) -> None:
        last[0] = output
        if len(calls) == len(blocks):
            raise _Last

    with ExitStack() as hooks:
        for block in blocks:
            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(after).remove)
        args, kwargs, _ = split(model, batch)
        with suppress(_Last):
            model(*args, **kwargs)
    return (Run(first[0], calls) if len(calls) == len(blocks) else None), last[0]


@contextmanager
def _passing_on(blocks: Sequence[nn.Module], output: object) -> Iterator[None]:
    """Inside, a block returns the hidden states that it gets, in the form of `output`."""

    def forward(*args: object, **kwargs: object) -> object:
        hidden = _hidden(args, kwargs)[1]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own


def _hidden(args: tuple, kwargs: Mapping) -> tuple[int | str, Tensor | None]:
    """The first tensor among a block's arguments, and where it stands."""
    found = ((slot, value) for slot, value in (*enumerate(args), *kwargs.items()) if isinstance(value, Tensor))
    return next(found, (0, None))


def _arguments(args: tuple, kwargs: Mapping, slot: int | str) -> Callable[[Tensor], tuple[tuple, dict]]:
    """What rebuilds a call with other hidden states; it does not keep the ones that were recorded."""
    args = tuple(None if k == slot else v for k, v in enumerate(args))
    kwargs = {k: None if k == slot else v for k, v in kwargs.items()}

    def rebuilt(hidden: Tensor) -> tuple[tuple, dict]:
        if isinstance(slot, int):
            return (*args[:slot], hidden, *args[slot + 1 :]), dict(kwargs)
        return args, {**kwargs, slot: hidden}

    return rebuilt


def _first(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """transformers would hand every block a KV cache, which a second run of the block would find full."""
    config = getattr(model, "config", None)
    if not hasattr(config, "use_cache"):
        yield
        return
    before, config.use_cache = config.use_cache, False
    try:
        yield
    finally:
        config.use_cache = before
