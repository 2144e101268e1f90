"""Batches through a model: what a batch means, the loss of one, and a model that is afterwards as it was.

Every criterion that looks at data goes through here, so that a DataLoader of (inputs, labels), a list of tensors and a
tokenizer's dicts mean the same everywhere. Moves nothing between devices.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.errors import InputError


def split(model: nn.Module, batch: object) -> tuple[tuple, dict, object]:
    """(args, kwargs, target) of one batch; target is None where the batch has no label.

    A tensor is the one argument. A dict holds keyword arguments, `labels` among them. A tuple holds the arguments and,
    when it is longer than what `forward` needs and `forward` takes no `labels`, the target as its last item.
    """
    parameters = inspect.signature(model.forward).parameters
    if isinstance(batch, Mapping):
        takes_labels = "labels" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        kwargs = {name: value for name, value in batch.items() if takes_labels or name != "labels"}
        return (), kwargs, batch.get("labels")
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}, None
    positional = (p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    needed = sum(p.default is p.empty for p in positional)
    if "labels" in parameters or len(batch) <= max(needed, 1):
        return tuple(batch), {}, None
    return tuple(batch[:-1]), {}, batch[-1]


def batch_loss(model: nn.Module, batch: object, loss_fn: Callable[[object, object], Tensor] | None = None) -> Tensor:
    """The scalar loss of one batch: loss_fn(output, target), else the model's own `.loss`, else cross-entropy.

    Where the batch has no label, `loss_fn` gets the batch itself as the target.
    """
    args, kwargs, target = split(model, batch)
    output = model(*args, **kwargs)
    if loss_fn is not None:
        loss = loss_fn(output, batch if target is None else target)
    elif isinstance(getattr(output, "loss", None), Tensor):
        loss = output.loss
    elif target is not None:
        loss = F.cross_entropy(getattr(output, "logits", output), target)
    else:
        raise InputError(
            "This criterion needs a loss, but the batches have no labels: give (inputs, labels), "
            "dicts with 'labels', or loss_fn(output, batch)."
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError("loss_fn must return one number for a batch: reduce it, for example with .mean().")
    return loss


def check_batches(batches: Iterable | None, criterion: str) -> Iterable:
    """`batches` if it can be an iterable of batches, else an InputError."""
    if batches is None:
        raise InputError(
            f"Criterion {criterion!r} looks at data: give batches, an iterable of what the model is called with."
        )
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise InputError(
            f"batches is one {type(batches).__name__}, but it must be an iterable of batches: put it in a list."
        )
    return batches


@contextmanager
def calibrating(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Inside, the model is in eval mode and torch's generators are seeded; after, both are as before, errors or not."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def not_empty(batches: Iterable) -> Iterator:
    """The batches one by one, none kept; an InputError if there is none."""
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise InputError(
            "batches is empty: give at least one batch, and a list or DataLoader if it is to be read twice."
        )


def segments(tokens: Tensor, n: int, length: int, *, seed: int = 0) -> list[Tensor]:
    """n batches [1, length]: pieces of `tokens` [N] from random places, as SparseGPT and Wanda calibrate.

    A larger n starts with the pieces of a smaller one. Raises InputError where the text is shorter than a piece.
    """
    if tokens.dim() != 1 or len(tokens) < length or min(n, length) < 1:
        raise InputError(
            f"{n} pieces of {length} tokens cannot be cut from tokens of shape {list(tokens.shape)}: give a 1-D tensor "
            "of at least that many, and n and length from 1 up."
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length + 1, (n,), generator=generator).tolist()
    return [tokens[start : start + length][None] for start in starts]
