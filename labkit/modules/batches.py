"""Batches: what one holds, its loss, which of its tokens are no padding, and a model that is afterwards as it was.

A DataLoader of (inputs, labels), a list of tensors and a tokenizer's dicts mean the same to everything that looks at
data. Moves nothing between devices, and trains nothing (see `training`).
"""

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.arguments import check_module, check_tensor
from labkit.errors import InputError, check_whole

IGNORED = -100  # the label that cross-entropy leaves out


@contextmanager
def evaluating(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Inside, every submodule is in eval mode; afterwards modes and random states are as before, errors or not.

    Random states are those of torch, numpy and Python.
    seed: for torch's generators inside; None leaves them where they are.
    """
    check_module(model)
    modes = [(module, module.training) for module in model.modules()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)
            for module, training in modes:
                module.training = training


# --- what a batch holds -----------------------------------------------------------------------------------------------


@contextmanager
def watching(model: nn.Module, names: Iterable[str], look: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, each call of a module of these names, which takes one tensor, ends in look(name, input, result).

    InputError for a name that is none of the model's modules.
    """
    names, modules = list(names), dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in modules:
            raise InputError(
                f"{type(model).__name__} has no module {name!r}: take a name from model.named_modules(), such as "
                f"{', '.join(map(repr, list(modules)[1:4]))}."
            )

    def hook(name: str):
        return lambda _, args, kwargs, result: look(name, next(iter((*args, *kwargs.values()))), result)

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(modules[name].register_forward_hook(hook(name), with_kwargs=True).remove)
        yield


def split(model: nn.Module, batch: Any) -> tuple[tuple, dict, Any]:
    """(args, kwargs, target) of one batch; target is None where the batch has no label.

    A tensor is the one argument. A dict holds keyword arguments, `labels` among them. A tuple holds the arguments in
    the order of `forward` and, when it is longer than what `forward` needs, the target as its last item.
    Where `forward` takes `labels`, as that of a transformers model does, the target is bound to that name: it is what
    stands at their place or has one dimension, [B]. Zeros and ones at the place of a mask are the mask, an argument.
    InputError for another last item of two or more dimensions, which may be labels or what stands at its place.
    """
    parameters = inspect.signature(model.forward).parameters
    if isinstance(batch, Mapping):
        takes = _takes_labels(model, batch)
        kwargs = {name: value for name, value in batch.items() if takes or name != "labels"}
        return (), kwargs, batch.get("labels")
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}, None
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty and p.name != "labels" for p in positional)
    if len(batch) <= max(needed, 1):
        return tuple(batch), {}, None
    *args, target = batch
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    if len(args) > len(positional) and not takes_any:
        raise InputError(
            f"A batch has {len(args)} inputs and its labels, more than {type(model).__name__} takes: give what it is "
            "called with, and the labels as the last item."
        )
    if "labels" not in parameters:
        return tuple(args), {}, target
    place = positional[len(args)].name if len(args) < len(positional) else None
    if place is not None and "mask" in place and _is_mask(target):
        return tuple(batch), {}, None
    if place not in ("labels", None) and not (isinstance(target, Tensor) and target.dim() == 1):
        raise InputError(
            f"The last of {len(batch)} items of a batch may be the labels or the {place} of {type(model).__name__}: "
            "give a dict that names each item, such as {'input_ids': ids, 'labels': labels}."
        )
    return tuple(args), {"labels": target}, target


def _is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 1 and bool(((x == 0) | (x == 1)).all())


def inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """What `forward` gets for this batch by name, without labels: `model(**inputs(model, batch))`."""
    args, kwargs, _ = split(model, batch)
    bound = inspect.signature(model.forward).bind_partial(*args).arguments
    return {name: value for name, value in {**bound, **kwargs}.items() if name != "labels"}


def labelled(model: nn.Module, batch: Any) -> Any:
    """The batch as a dict with labels that leave padding out; a decoder's own tokens are its labels where it has none.

    A batch without labels, and that of a model that takes none, comes back as it is.
    """
    if not _takes_labels(model, batch):
        return batch
    named, (_, _, labels) = inputs(model, batch), split(model, batch)
    if labels is None and predicts_next(model):
        labels = named.get("input_ids")
    if labels is None:
        return batch
    mask = named.get("attention_mask")
    if mask is not None and labels.shape == mask.shape and not _is_encoder_decoder(model):
        labels = labels.masked_fill(mask == 0, IGNORED)
    return {**named, "labels": labels}


def _takes_labels(model: nn.Module, batch: Any) -> bool:
    """Whether `forward` has a parameter for labels, or takes whatever a dict names."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return "labels" in parameters or (takes_any and isinstance(batch, Mapping))


def _is_encoder_decoder(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def valid_tokens(model: nn.Module, named: Mapping[str, Any], part: str, x: Tensor) -> Tensor:
    """Which of the tokens of `x` are no padding: [B, T] bool.

    named: `inputs` of the batch.
    part: the module that x belongs to; in an encoder-decoder it says whose mask counts.
    x: [B, T, width] or [B * T, width].
    """
    prefix = "decoder_" if _is_encoder_decoder(model) and "decoder" in part.split(".") else ""
    mask, ids = named.get(f"{prefix}attention_mask"), named.get(f"{prefix}input_ids")
    tokens = x.numel() // x.shape[-1]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == tokens:
        return mask.to(x.device) != 0
    if x.dim() > 2:
        return torch.ones(x.shape[0], tokens // x.shape[0], dtype=torch.bool, device=x.device)
    shape = ids.shape if isinstance(ids, Tensor) and ids.numel() == tokens else (tokens, 1)
    return torch.ones(shape, dtype=torch.bool, device=x.device)


# --- losses -----------------------------------------------------------------------------------------------------------


def batch_loss(model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None = None) -> Tensor:
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
        loss = cross_entropy(getattr(output, "logits", output), target)
    else:
        raise InputError(
            "This needs a loss, but the batches have no labels: give (inputs, labels), dicts with 'labels', or a "
            "loss_fn of your own."
        )
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise InputError("loss_fn must return one number for a batch: reduce it, for example with .mean().")
    return loss


def cross_entropy(scores: Any, labels: Any) -> Tensor:
    """F.cross_entropy; InputError where labels do not belong to such scores."""
    try:
        return F.cross_entropy(scores, labels)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"Cross-entropy takes scores [B, classes] and a label [B] for each, not {_described(scores)} and "
            f"{_described(labels)} ({str(error).splitlines()[0].rstrip('.')}): give these, or a loss_fn of your own."
        ) from error


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"a {type(value).__name__}"


def summed_loss(model: nn.Module, batch: Any, loss_fn: Callable | None = None) -> tuple[Tensor, int]:
    """(sum of the loss over the batch's terms, how many they are): what adds up whatever the batches are.

    Terms: predicted tokens where the labels are token ids, else examples; padding is no term. A `loss_fn(output,
    target)` of the caller is taken to be a mean over the examples. A decoder's loss is computed here, in float32 or
    wider: models themselves go down to float32.
    """
    batch = labelled(model, batch) if loss_fn is None else batch
    named = inputs(model, batch)
    _, _, labels = split(model, batch)
    if loss_fn is None and predicts_next(model) and isinstance(labels, Tensor):
        logits, targets = model(**named).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()  # [B * (T - 1), ...]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        return loss, int((targets != IGNORED).sum())
    terms = len(next(iter(named.values())))  # examples
    if loss_fn is None and isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point():
        terms = int((labels != IGNORED).sum())
    return batch_loss(model, batch, loss_fn) * terms, terms


def predicts_next(model: nn.Module) -> bool:
    """Whether position t of the output is scored against token t + 1: a decoder with a language model head."""
    able = getattr(model, "can_generate", lambda: False)()
    return able and not _is_encoder_decoder(model)


# --- many batches -----------------------------------------------------------------------------------------------------


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
    check_whole(n, "n")
    check_whole(length, "length")
    check_whole(seed, "seed", 0)
    check_tensor(tokens, "tokens")
    if tokens.dim() != 1 or len(tokens) < length:
        raise InputError(
            f"{n} pieces of {length} tokens cannot be cut from tokens of shape {list(tokens.shape)}: give a 1-D tensor "
            "of at least that many."
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - length + 1, (n,), generator=generator).tolist()
    return [tokens[start : start + length][None] for start in starts]
