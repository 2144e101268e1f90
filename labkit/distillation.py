"""Knowledge distillation: the loss, and healing a pruned model with it or without a teacher.

Hinton, Vinyals and Dean 2015 (Distilling the Knowledge in a Neural Network). Training itself is `training.train_`.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.batches import evaluating, labelled
from labkit.errors import InputError
from labkit.training import Batch, History, task_loss, train_


def distillation_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the predictions, a scalar (Hinton et al. 2015).

    student, teacher: logits [..., classes]. mask: [...], predictions where it is 0 are left out (padding). T^2 keeps
    the size of the gradient as T rises. The teacher gets no gradient.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"student has logits of shape {list(student.shape)}, teacher {list(teacher.shape)}: both need the same "
            "vocabulary or set of classes, and the same batch."
        )
    if not temperature > 0:
        raise InputError(f"temperature must be a number above 0; it is {temperature!r}.")
    log_q = F.log_softmax(student.float() / temperature, -1)  # [..., classes]
    log_p = F.log_softmax(teacher.detach().float() / temperature, -1)
    each = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)  # [...]
    if mask is None:
        return each.mean()
    mask = mask.to(each)
    return (each * mask).sum() / mask.sum().clamp_min(1)


def distilling(teacher: nn.Module, *, alpha: float, temperature: float) -> Callable[[nn.Module, Batch], Tensor]:
    """A loss_fn for `training.train_`: alpha * distillation + (1 - alpha) * task loss; alpha 1 needs no labels.

    The teacher is run in eval mode without gradients on the batch's device.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be a number from 0 to 1, the share of the distillation loss; it is {alpha!r}.")

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        if not isinstance(batch, dict):
            inputs, labels = batch
            logits = model(inputs)
            with torch.no_grad(), evaluating(teacher):
                targets = teacher(inputs)
            soft = distillation_loss(logits, targets, temperature=temperature)
            return _mixed(soft, F.cross_entropy(logits, labels))
        output = model(**labelled(model, batch))
        with torch.no_grad(), evaluating(teacher):
            targets = teacher(**{name: x for name, x in batch.items() if name != "labels"}).logits
        mask = batch.get("attention_mask") if output.logits.ndim == 3 else None
        return _mixed(distillation_loss(output.logits, targets, temperature=temperature, mask=mask), output.loss)

    def _mixed(soft: Tensor, hard: Tensor | None) -> Tensor:
        if alpha == 1:
            return soft
        if hard is None:
            raise InputError("The task loss needs labels, and the batch has none: give labels, or alpha=1 without it.")
        return alpha * soft + (1 - alpha) * hard

    return loss_fn


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

    batches: dicts with labels, or (inputs, labels); a decoder without labels predicts its own tokens.
    teacher: the dense model; half of the loss is then the distance to its answers at temperature 2 (`distilling`).
    seed: of dropout.
    """

    def task(model: nn.Module, batch: Batch) -> Tensor:
        return task_loss(model, labelled(model, batch))

    passes = {"epochs": steps, "steps": steps}  # as many over the batches as the steps need
    recipe = {"max_lr": max_lr, "optimizer": "adamw", "weight_decay": 0.01, "warmup": 0.1}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        loss_fn = distilling(teacher, alpha=0.5, temperature=2.0) if teacher else task
        return train_(model, batches, **passes, **recipe, loss_fn=loss_fn)
