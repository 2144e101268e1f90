"""Knowledge distillation: training a student on the answers of a teacher, and healing a pruned model.

Hinton, Vinyals and Dean 2015 (Distilling the Knowledge in a Neural Network), and later losses, each with its source. A
loss is a function of two tensors; `distilling` makes a loss_fn for `training.train_` from a teacher:

    >>> import torch
    >>> from labkit import distillation
    >>> _ = torch.manual_seed(0)
    >>> teacher, student = torch.nn.Linear(4, 3).eval(), torch.nn.Linear(4, 3)
    >>> images, labels = torch.randn(8, 4), torch.randint(3, (8,))
    >>> loss_fn = distillation.distilling(teacher, alpha=0.9, temperature=4.0)
    >>> loss = loss_fn(student, (images, labels))  # 0.9 * distillation + 0.1 * cross-entropy, a scalar
    >>> loss.backward()
    >>> student.weight.grad.shape, teacher.weight.grad is None
    (torch.Size([3, 4]), True)
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.arguments import check_floats, check_module, check_tensor
from labkit.data.training import Batch, History, task_loss, train_
from labkit.errors import InputError, check_number, check_whole
from labkit.modules.batches import IGNORED, evaluating, labelled, placed, predicts_next, split
from labkit.modules.losses import cross_entropy
from labkit.modules.stacks import layers_of
from labkit.pruning import depth

LossFn = Callable[[nn.Module, Batch], Tensor]
STORED = "teacher_logits"  # the name of a teacher's stored answers in a batch that is a dict

# --- answers ----------------------------------------------------------------------------------------------------------


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 2.0,
    beta: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """T^2 D(p, q), mean over the predictions, a scalar, with p and q the softmax of teacher / T and student / T.

    student, teacher: logits [..., classes]. The teacher's logits get no gradient.
    temperature: T. The factor T^2 keeps the size of the gradient as T rises.
    beta: 0 is the forward divergence KL(p || q) (Hinton et al. 2015), 1 the reverse divergence KL(q || p); in between,
        the generalised Jensen-Shannon divergence (Agarwal et al. 2024, GKD, equation 1):
        beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. Near 0 and 1 that divergence falls to 0.
    mask: [...], 0 at predictions to leave out (padding).

    A class without probability on both sides (both logits are -inf) adds 0. The loss is infinite where the right value
    is infinite, for example for a class that the teacher takes and the student excludes.
    """
    check_floats(student, "student")
    check_floats(teacher, "teacher")
    if student.shape != teacher.shape or not student.dim():
        raise InputError(
            f"student has logits of shape {list(student.shape)}, teacher {list(teacher.shape)}: both need the same "
            "vocabulary or set of classes, and the same batch."
        )
    check_number(temperature, "temperature", above=0)
    check_number(beta, "beta", 0, 1)
    _check_mask(mask, student.shape[:-1])
    log_q = F.log_softmax(_precise(student) / temperature, -1)  # [..., classes]
    log_p = F.log_softmax(_precise(teacher.detach()) / temperature, -1)
    if beta == 0:
        divergence = _kl(log_p, log_q)
    elif beta == 1:
        divergence = _kl(log_q, log_p)
    else:
        log_m = _log_mixture(log_p, log_q, beta)
        from_p, from_q = _kl(log_p, log_m), _kl(log_q, log_m)
        divergence = beta * from_p + (1 - beta) * from_q
    return temperature**2 * _mean(divergence, mask)


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Return log(beta p + (1 - beta) q), [..., classes]."""
    nowhere = log_p.isneginf() & log_q.isneginf()  # where the sum of two -inf has no gradient
    log_p, log_q = log_p.masked_fill(nowhere, 0), log_q.masked_fill(nowhere, 0)
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [..., classes]: [...], in nats; a class with p = 0 adds 0, as in the limit."""
    excluded = log_p.isneginf()
    log_p, log_q = log_p.masked_fill(excluded, 0), log_q.masked_fill(excluded, 0)  # before the gradient sees -inf
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(excluded, 0).sum(-1)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average values [...] weighted by mask [...]; 0 for a mask of zeros."""
    if mask is None:
        return values.mean()
    mask = mask.to(values)
    total = torch.where(mask != 0, values * mask, 0).sum()
    return total / mask.sum().clamp_min(1)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_mask(mask: Tensor | None, shape: torch.Size) -> None:
    if mask is None:
        return
    check_tensor(mask, "mask")
    if mask.shape != shape:
        raise InputError(f"mask has shape {list(mask.shape)}, but it must have {list(shape)}: a number a prediction.")


# --- relations --------------------------------------------------------------------------------------------------------


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber's loss of the distances between examples, mean over the pairs, a scalar (Park et al. 2019, RKD, eq. 4-6).

    student, teacher: a feature for each example, [N, ...] with N from 2 up; the widths may differ. Distances are
    divided by their mean over the pairs of different examples. The teacher's features get no gradient.
    """
    check_floats(student, "student")
    check_floats(teacher, "teacher")
    have_examples = student.dim() > 0 and teacher.dim() > 0
    if not have_examples or len(student) != len(teacher) or len(student) < 2:
        raise InputError(
            f"Distances between examples need the same two or more on both sides, not {list(student.shape)} and "
            f"{list(teacher.shape)}: use batches of at least two."
        )
    return F.smooth_l1_loss(_scaled_distances(student), _scaled_distances(teacher.detach()))


def _scaled_distances(features: Tensor) -> Tensor:
    """Return the distance of each pair of examples divided by the mean distance, [N (N - 1) / 2]."""
    distances = F.pdist(_precise(features).flatten(1))
    tiny = torch.finfo(distances.dtype).tiny
    return distances / distances.mean().clamp_min(tiny)


# --- a loss_fn for training -------------------------------------------------------------------------------------------


def distilling(
    teacher: nn.Module | None,
    *,
    alpha: float,
    temperature: float,
) -> LossFn:
    """Return a loss_fn for `training.train_`: alpha * distillation + (1 - alpha) * task loss.

    teacher: model in eval mode; runs without gradients on the batch's device. None: the batches hold the teacher's
        logits, as the last entry of (inputs, labels, logits) or under "teacher_logits".
    alpha: share of the distillation, from 0 to 1; at 1 no labels are needed.
    temperature: as in `distillation_loss`. Tokens without a label (padding, a prompt) are not distilled either.
    """
    check_number(alpha, "alpha", 0, 1)
    check_number(temperature, "temperature", above=0)
    _check_eval(teacher)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        _check_apart(teacher, model)
        batch, stored = _without_stored(batch, is_last=teacher is None)
        targets = placed(model, stored if teacher is None else _answers(teacher, batch))
        args, kwargs, labels = split(model, labelled(model, batch))
        if alpha == 1:
            kwargs.pop("labels", None)
        output = model(*args, **kwargs)
        logits = getattr(output, "logits", output)
        mask = _counted(model, logits, labels, kwargs.get("attention_mask"))
        soft = distillation_loss(logits, targets, temperature=temperature, mask=mask)
        if alpha == 1:
            return soft
        return alpha * soft + (1 - alpha) * _hard_loss(output, logits, labels)

    return loss_fn


def _hard_loss(output: Any, logits: Tensor, labels: Tensor | None) -> Tensor:
    """Return the task loss: the model's own `.loss`, or the cross-entropy of the labels."""
    loss = getattr(output, "loss", None)
    if loss is None and labels is not None:
        loss = cross_entropy(logits, labels)
    if loss is None:
        raise InputError("The task loss needs labels, and the batch has none: give labels, or alpha=1 without it.")
    return loss


def _without_stored(batch: Batch, *, is_last: bool) -> tuple[Batch, Tensor | None]:
    """Split a batch into the batch without a teacher's stored answers, and the answers.

    is_last: True if the answers are needed, and are the last entry of a tuple of three; else a tuple is kept whole.
    """
    stored, rest = None, batch
    if isinstance(batch, Mapping):
        stored = batch.get(STORED)
        rest = {name: x for name, x in batch.items() if name != STORED}
    elif is_last and isinstance(batch, tuple) and len(batch) > 2:
        stored, rest = batch[-1], batch[:-1]
    if is_last and stored is None:
        raise InputError(
            f"Without a teacher each batch needs its logits: give (inputs, labels, logits), or a dict with {STORED!r}."
        )
    return rest, stored


def _answers(teacher: nn.Module, batch: Batch) -> Tensor:
    """Return the teacher's logits for a batch; the labels are left out."""
    args, kwargs, _ = split(teacher, batch)
    kwargs.pop("labels", None)
    with torch.no_grad(), evaluating(teacher):
        output = teacher(*args, **kwargs)
    return getattr(output, "logits", output)


def _counted(
    model: nn.Module,
    logits: Tensor,
    labels: Tensor | None,
    padding: Tensor | None,
) -> Tensor | None:
    """Return a mask [B, T] of the predictions to count, None for all.

    Predictions with a label count; position t of a decoder predicts token t + 1. Without labels `padding` is the mask.
    """
    if not isinstance(logits, Tensor) or logits.ndim < 3:
        return None
    if labels is None:
        return padding
    has_label = labels != IGNORED
    if predicts_next(model):
        return F.pad(has_label[:, 1:], (0, 1))
    return has_label


def _check_eval(teacher: nn.Module | None) -> None:
    if teacher is None:
        return
    check_module(teacher, "teacher")
    if teacher.training:
        raise InputError(
            "The teacher is in train mode, where dropout and the batch's statistics change its answers: call "
            "teacher.eval() first."
        )


def _check_apart(teacher: nn.Module | None, model: nn.Module) -> None:
    """Raise InputError if the model trains parameters of the teacher."""
    if teacher is None:
        return
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if any(id(parameter) in trained for parameter in teacher.parameters()):
        raise InputError("The student trains parameters of its teacher: make the student from a copy of the teacher.")


# --- students ---------------------------------------------------------------------------------------------------------


def shallow(teacher: nn.Module, layers: int) -> nn.Module:
    """Return a student of `layers` of the teacher's own layers, evenly spaced, the first and the last among them.

    DistilBERT starts from every second layer (Sanh et al. 2019, section 3). `teacher` is not changed.
    """
    total = len(layers_of(teacher))
    check_whole(layers, "layers", most=total - 1)
    gaps = max(layers - 1, 1)
    remaining = {round(i * (total - 1) / gaps) for i in range(layers)}
    removed = [i for i in range(total) if i not in remaining]
    return depth.prune_layers(teacher, removed, check=False).model


def heal_(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    teacher: nn.Module | None = None,
    max_lr: float,
    steps: int,
    seed: int = 0,
) -> History:
    """Fine-tune `model` in place for `steps` batches after pruning: AdamW, one cycle with a tenth of warm-up.

    batches: dicts with labels, or (inputs, labels); a decoder without labels predicts the input tokens. The last entry
        of a tuple for a transformers model is bound to `labels` if the meaning is certain: a label for each example
        [B], or the argument of `forward` at the same place, as in (pixel_values, labels). Labels of tokens [B, T] need
        a dict, because the second entry of (input_ids, x) stands at the place of the mask: InputError, unless x is a
        mask of zeros and ones. See `batches.split`.
    teacher: the dense model; half of the loss is then the distance to the teacher's answers at temperature 2
        (`distilling`).
    max_lr: highest learning rate of the cycle.
    seed: seed of dropout; torch's random state is restored afterwards.

    Raises InputError as `training.train_` does; see there for the state of the model after an error.
    """
    check_module(model)
    check_whole(steps, "steps")
    check_whole(seed, "seed", 0)

    def task(model: nn.Module, batch: Batch) -> Tensor:
        return task_loss(model, labelled(model, batch))

    loss_fn = task if teacher is None else distilling(teacher, alpha=0.5, temperature=2.0)
    passes = {"epochs": steps, "steps": steps}  # as many over the batches as the steps need
    recipe = {"max_lr": max_lr, "optimizer": "adamw", "weight_decay": 0.01, "warmup": 0.1}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return train_(model, batches, **passes, **recipe, loss_fn=loss_fn)
