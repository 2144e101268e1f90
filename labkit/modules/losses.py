"""The loss of a batch: the model's own, the caller's, or cross-entropy; as a mean, or as a sum with its terms."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.errors import InputError
from labkit.modules.batches import IGNORED, inputs, labelled, placed, predicts_next, split


def batch_loss(model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None = None) -> Tensor:
    """Return the scalar loss of a batch: loss_fn(output, target), else the output's `.loss`, else cross-entropy.

    batch: a batch in any of the forms of `batches.split`.
    loss_fn: gets the model's output and the labels, or, for a batch without labels, the output and the batch.

    Raises InputError if there is no loss to compute, or if loss_fn does not return a single number.
    """
    args, kwargs, target = split(model, batch)
    output = model(*args, **kwargs)
    if loss_fn is not None:
        loss = loss_fn(output, placed(model, batch) if target is None else target)
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
    """Return F.cross_entropy(scores, labels), the mean over the batch; raise InputError if the two do not fit.

    scores: [B, classes].
    labels: [B] class numbers.
    """
    try:
        return F.cross_entropy(scores, labels)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        cause = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"Cross-entropy takes scores [B, classes] and a label [B] for each, not {_description(scores)} and "
            f"{_description(labels)} ({cause}): give these, or a loss_fn of your own."
        ) from error


def _description(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def summed_loss(model: nn.Module, batch: Any, loss_fn: Callable | None = None) -> tuple[Tensor, int]:
    """Return (loss summed over the terms of a batch, number of terms), to be added up over batches of any size.

    A term is a predicted token if the labels are token ids, else an example; padding is no term.

    loss_fn: loss_fn(output, target), taken to be a mean over the examples; None takes the labels of the batch, and a
        decoder without labels predicts the input tokens.

    The loss of a decoder is computed in float32 or wider; the model's own loss would be in float32 at most.
    """
    if loss_fn is None:
        batch = labelled(model, batch)
    named = inputs(model, batch)
    _, _, labels = split(model, batch)
    if loss_fn is None and isinstance(labels, Tensor) and predicts_next(model):
        return _next_token_loss(model, named, labels)
    terms = _count_terms(named, labels if loss_fn is None else None)
    return batch_loss(model, batch, loss_fn) * terms, terms


def _next_token_loss(model: nn.Module, named: Mapping[str, Any], labels: Tensor) -> tuple[Tensor, int]:
    """Return (summed cross-entropy of the tokens that a decoder predicts, number of tokens); labels [B, T]."""
    logits = model(**named).logits[:, :-1].flatten(0, 1)  # [B * (T - 1), vocabulary]
    targets = labels[:, 1:].flatten()  # [B * (T - 1)]
    wide_logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide_logits, targets, ignore_index=IGNORED, reduction="sum")
    return loss, int((targets != IGNORED).sum())


def _count_terms(named: Mapping[str, Any], labels: Any) -> int:
    """Count the labels other than IGNORED if the labels are token ids, else the examples."""
    if isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point():
        return int((labels != IGNORED).sum())
    first_argument = next(iter(named.values()))
    return len(first_argument)
