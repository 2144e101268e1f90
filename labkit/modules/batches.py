"""Read batches of any form: the model's arguments, the labels, and the tokens without padding.

A batch is a tensor, a tuple (inputs, labels) of a DataLoader, or the dict of a tokenizer. An argument `batches`, in all
of labkit, is an iterable of batches of any form:

>>> import torch
>>> from labkit import batches
>>> model = torch.nn.Linear(4, 3)
>>> images, labels = torch.randn(8, 4), torch.randint(3, (8,))
>>> args, kwargs, target = batches.split(model, (images, labels))
>>> len(args), kwargs, target is labels
(1, {}, True)
>>> list(batches.inputs(model, (images, labels)))
['input']
>>> with batches.evaluating(model):
...     model(*args, **kwargs).shape
torch.Size([8, 3])

A batch may lie on any device: what is given to a model is placed on the model's device first (`placed`). The loss of a
batch is in `losses`; training is in `labkit.training`.
"""

import copy
import inspect
import itertools
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from labkit.arguments import check_module, check_tensor
from labkit.errors import InputError, check_whole
from labkit.modules.evaluating import evaluating
from labkit.modules.hooks import watching

__all__ = [
    "IGNORED",
    "check_batches",
    "device_of",
    "evaluating",  # for whoever reads batches needs it beside them
    "inputs",
    "is_encoder_decoder",
    "labelled",
    "not_empty",
    "placed",
    "predicts_next",
    "segments",
    "split",
    "valid_tokens",
    "watching",  # `labkit.batches.watching` in lessons
]

IGNORED = -100  # the label that cross-entropy leaves out

# --- a single batch ---------------------------------------------------------------------------------------------------


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the first parameter or buffer; None for a model without either."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    first = next(tensors, None)
    return None if first is None else first.device


def placed(model: nn.Module, value: Any) -> Any:
    """Return `value` with its tensors on the model's device, in containers of the same classes; the caller's stay.

    value: a tensor or a container of values, such as a batch. Objects of other classes are returned as they are.

    A model on several devices moves its inputs by itself, and a model on `meta` has no numbers to compute with: the
    value is returned as it is.

    Raises InputError if `model` is no module, and for a tensor on `meta` that a model with numbers would need.
    """
    check_module(model)
    devices = {x.device for x in (list(model.parameters()) or list(model.buffers()))}
    if len(devices) != 1 or devices == {torch.device("meta")}:
        return value
    return _on(devices.pop(), value)


def _on(device: torch.device, value: Any) -> Any:
    """Move the tensors inside `value`; a tensor that stands at two places stays a single tensor."""
    moved: dict[int, Tensor] = {}
    return tree_map(partial(_item_on, device, moved), value)


def _item_on(device: torch.device, moved: dict[int, Tensor], item: Any) -> Any:
    """Move what is no container of `tree_map`. moved: the tensors moved so far, by the id of the caller's tensor."""
    if isinstance(item, Tensor):
        if item.is_meta and device.type != "meta":
            raise InputError("A batch holds a tensor on meta, which has no numbers: give a batch with numbers.")
        if id(item) not in moved:
            moved[id(item)] = item.to(device)
        return moved[id(item)]
    if isinstance(item, PackedSequence):
        return item.to(device)
    if isinstance(item, UserDict):  # a tokenizer's batch, which has attributes
        batch = copy.copy(item)
        batch.data = tree_map(partial(_item_on, device, moved), item.data)
        return batch
    return item


def split(model: nn.Module, batch: Any) -> tuple[tuple, dict[str, Any], Any]:
    """Split a batch into (args, kwargs, target) on the model's device, so that model(*args, **kwargs) runs on it.

    target: the labels; None if the batch has no labels.
    batch: a tensor is the only argument.
        A dict holds keyword arguments, `labels` among them.
        A tuple or list holds the arguments in the order of `forward`; if longer than `forward` needs, the last item is
        the target.

    If `forward` has a parameter `labels`, as in transformers models, the target is passed as `labels` too. The last
    item of a tuple is then the target if `labels` stand at its position, or if it has one dimension, [B].
    Zeros and ones at the position of a mask are the mask.

    Raises InputError for any other last item of two or more dimensions, which could be labels or an argument.
    """
    if isinstance(batch, Mapping):
        parts = (), _keyword_arguments(model, batch), batch.get("labels")
    elif isinstance(batch, (tuple, list)):
        parts = _split_sequence(model, batch)
    else:
        parts = (batch,), {}, None
    return placed(model, parts)


def _keyword_arguments(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the items of a dict; `labels` only if `forward` has such a parameter."""
    takes_labels = _takes_labels(model, batch)
    return {name: value for name, value in batch.items() if takes_labels or name != "labels"}


def _split_sequence(model: nn.Module, batch: Sequence[Any]) -> tuple[tuple, dict[str, Any], Any]:
    """Split a tuple or list of arguments, possibly followed by a target: see `split`."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any_number = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    takes_labels = any(p.name == "labels" for p in parameters)
    required = sum(p.default is p.empty and p.name != "labels" for p in positional)
    if len(batch) <= max(required, 1):
        return tuple(batch), {}, None

    *args, target = batch
    if len(args) > len(positional) and not takes_any_number:
        raise InputError(
            f"A batch has {len(args)} inputs and its labels, more than {type(model).__name__} takes: give what it is "
            "called with, and the labels as the last item."
        )
    if not takes_labels:
        return tuple(args), {}, target

    last_name = positional[len(args)].name if len(args) < len(positional) else None
    if last_name is not None and "mask" in last_name and _is_mask(target):
        return tuple(batch), {}, None
    is_one_label_an_example = isinstance(target, Tensor) and target.dim() == 1
    if last_name not in ("labels", None) and not is_one_label_an_example:
        raise InputError(
            f"The last of {len(batch)} items of a batch may be the labels or the {last_name} of "
            f"{type(model).__name__}: give a dict that names each item, such as {{'input_ids': ids, 'labels': labels}}."
        )
    return tuple(args), {"labels": target}, target


def _is_mask(x: Any) -> bool:
    """Return True if `x` is a tensor of two or more dimensions that holds only zeros and ones."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        return False
    zeros_and_ones = (x == 0) | (x == 1)
    return bool(zeros_and_ones.all())


def inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Return the arguments of `forward` for a batch by name, without labels: model(**inputs(model, batch)) runs.

    batch: a batch in any of the forms of `split`.
    """
    args, kwargs, _ = split(model, batch)
    named = inspect.signature(model.forward).bind_partial(*args).arguments
    return {name: value for name, value in {**named, **kwargs}.items() if name != "labels"}


def labelled(model: nn.Module, batch: Any) -> Any:
    """Return the batch as a dict of arguments with `labels` in which padding is IGNORED.

    A batch of a decoder without labels is labelled with its input tokens. Any other batch without labels, and
    a batch of a model that takes no labels, is returned unchanged.
    """
    if not _takes_labels(model, batch):
        return batch
    named = inputs(model, batch)
    _, _, labels = split(model, batch)
    if labels is None and predicts_next(model):
        labels = named.get("input_ids")
    if labels is None:
        return batch
    mask = named.get("attention_mask")
    if mask is not None and labels.shape == mask.shape and not is_encoder_decoder(model):
        labels = labels.masked_fill(mask == 0, IGNORED)
    return {**named, "labels": labels}


def _takes_labels(model: nn.Module, batch: Any) -> bool:
    """Return True if `forward` has a parameter `labels`, or takes any keyword argument and the batch is a dict."""
    parameters = inspect.signature(model.forward).parameters
    if "labels" in parameters:
        return True
    takes_any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return takes_any_keyword and isinstance(batch, Mapping)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return True if the config of a transformers model describes an encoder-decoder, like T5."""
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def predicts_next(model: nn.Module) -> bool:
    """Return True if the output at position t is scored against token t + 1: a decoder with a language model head."""
    can_generate = getattr(model, "can_generate", lambda: False)()
    return can_generate and not is_encoder_decoder(model)


def valid_tokens(model: nn.Module, named: Mapping[str, Any], part: str, x: Tensor) -> Tensor:
    """Tell for each token of `x` if it is real or padding: [B, T] bool, True for real tokens.

    named: the arguments of the forward pass by name (`inputs` of the batch); `attention_mask` marks the padding.
    part: name of the module that reads or gives `x`; in the decoder of an encoder-decoder its own mask counts.
    x: [B, T, width] or [B * T, width].

    Without a mask of fitting size every token is real.
    """
    in_decoder = is_encoder_decoder(model) and "decoder" in part.split(".")
    prefix = "decoder_" if in_decoder else ""
    mask = named.get(f"{prefix}attention_mask")
    ids = named.get(f"{prefix}input_ids")
    tokens = x.numel() // x.shape[-1]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == tokens:
        return mask.to(x.device) != 0
    if x.dim() > 2:
        shape = (x.shape[0], tokens // x.shape[0])
    elif isinstance(ids, Tensor) and ids.numel() == tokens:
        shape = ids.shape
    else:
        shape = (tokens, 1)
    return torch.ones(shape, dtype=torch.bool, device=x.device)


# --- many batches -----------------------------------------------------------------------------------------------------


def check_batches(batches: Iterable | None, criterion: str) -> Iterable:
    """Return `batches`, an iterable of batches.

    criterion: the name of a criterion in need of data, for the error.

    Raises InputError for None, a single batch, or an object without iteration.
    """
    if batches is None:
        raise InputError(
            f"Criterion {criterion!r} looks at data: give batches, an iterable of what the model is called with."
        )
    is_single = isinstance(batches, (Tensor, Mapping, str))
    if is_single or not isinstance(batches, Iterable):
        raise InputError(
            f"batches is one {type(batches).__name__}, but it must be an iterable of batches: put it in a list."
        )
    return batches


def not_empty(batches: Iterable) -> Iterator:
    """Yield the batches without keeping a batch in memory; raise InputError at the end of an empty iterable."""
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise InputError(
            "batches is empty: give at least one batch, and a list or DataLoader if it is to be read twice."
        )


def segments(tokens: Tensor, n: int, length: int, *, seed: int = 0) -> list[Tensor]:
    """Cut `n` segments [1, length] out of a text at random positions: calibration data as SparseGPT and Wanda use it.

    tokens: [N] token ids of the text.
    seed: seed of the positions; with the same seed a larger n begins with the segments of a smaller n.

    Raises InputError if the text is shorter than a segment.
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
