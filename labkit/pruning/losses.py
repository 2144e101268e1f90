"""The task loss as a sum over its terms, so that a score over many batches does not depend on how they are cut.

A model returns the mean over a batch's terms: its examples, or for a language model the tokens that it predicts. What
is averaged over batches has to be weighted by their number. Padding is no term.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.pruning.calibration import batch_loss, split

IGNORED = -100  # the label that cross-entropy leaves out


def predicts_next(model: nn.Module) -> bool:
    """Whether position t of the output is scored against token t + 1: a decoder with a language model head."""
    able = getattr(model, "can_generate", lambda: False)()
    return able and not getattr(model.config, "is_encoder_decoder", False)


def labelled(model: nn.Module, batch: Any) -> Any:
    """The batch with labels that leave padding out; a decoder's own tokens are its labels where it has none."""
    named = inputs(model, batch)
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if labels is None and predicts_next(model) and "input_ids" in named:
        labels = named["input_ids"]
    if labels is None:
        return batch
    mask = named.get("attention_mask")
    if mask is not None and labels.shape == mask.shape and not getattr(model.config, "is_encoder_decoder", False):
        labels = labels.masked_fill(mask == 0, IGNORED)
    return {**named, "labels": labels}


def summed(model: nn.Module, batch: Any, loss_fn: Callable | None = None) -> tuple[Tensor, int]:
    """(sum of the loss over the batch's terms, how many they are).

    Terms: predicted tokens where the labels are token ids, else examples. A `loss_fn(output, target)` of the caller is
    taken to be a mean over the examples. A decoder's loss is computed here, in float32 or wider: models themselves go
    down to float32.
    """
    batch = labelled(model, batch) if loss_fn is None else batch
    given = inputs(model, batch)
    _, _, labels = split(model, batch)
    if loss_fn is None and predicts_next(model) and isinstance(labels, Tensor):
        return _next_token(model(**given).logits, labels)
    terms = len(next(iter(given.values())))  # examples
    if loss_fn is None and isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point():
        terms = int((labels != IGNORED).sum())
    return batch_loss(model, batch, loss_fn) * terms, terms


def _next_token(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of logits [B, T, vocabulary] at t for the label at t + 1, and how many there are."""
    targets = labels[:, 1:].flatten()
    scores = logits[:, :-1].flatten(0, 1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    loss = F.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="sum")
    return loss, int((targets != IGNORED).sum())


def inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """What `forward` gets for this batch by name, without labels: `model(**inputs(model, batch))`."""
    args, kwargs, _ = split(model, batch)
    bound = inspect.signature(model.forward).bind_partial(*args).arguments
    return {name: value for name, value in {**bound, **kwargs}.items() if name != "labels"}


def valid(model: nn.Module, given: Mapping[str, Any], part: str, x: Tensor) -> Tensor:
    """Which of the tokens of `x` [B, T, width] or [B * T, width] are no padding: [B, T] bool.

    given: `inputs` of the batch. part: the module that x belongs to, which in an encoder-decoder says whose mask it is.
    """
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    prefix = "decoder_" if two and "decoder" in part.split(".") else ""
    mask, ids = given.get(f"{prefix}attention_mask"), given.get(f"{prefix}input_ids")
    tokens = x.numel() // x.shape[-1]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == tokens:
        return mask.to(x.device) != 0
    if x.dim() > 2:
        return torch.ones(x.shape[0], tokens // x.shape[0], dtype=torch.bool, device=x.device)
    shape = ids.shape if isinstance(ids, Tensor) and ids.numel() == tokens else (tokens, 1)
    return torch.ones(shape, dtype=torch.bool, device=x.device)
