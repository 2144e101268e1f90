"""Knowledge distillation: the loss, and healing a pruned model with it or without a teacher.

Hinton, Vinyals and Dean 2015 (Distilling the Knowledge in a Neural Network). Training itself is `training.train_`.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from labkit.training import Batch, History


def distillation_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the predictions, a scalar (Hinton et al. 2015).

    student, teacher: logits [..., classes]. mask: [...], predictions where it is 0 are left out (padding). T^2 keeps
    the size of the gradient as T rises. The teacher gets no gradient.
    """
    raise NotImplementedError


def distilling(
    teacher: nn.Module, *, alpha: float = 0.5, temperature: float = 2.0
) -> Callable[[nn.Module, Batch], Tensor]:
    """A loss_fn for `training.train_`: alpha * distillation + (1 - alpha) * task loss; alpha 1 needs no labels.

    The teacher is run in eval mode without gradients on the batch's device.
    """
    raise NotImplementedError


def heal_(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    teacher: nn.Module | None = None,
    alpha: float = 0.5,
    temperature: float = 2.0,
    max_lr: float = 5e-5,
    epochs: int = 1,
    steps: int | None = None,
    precision: str = "auto",
    seed: int = 0,
    label: str = "",
) -> History:
    """A short fine-tuning of `model` in place after pruning, with distillation from the dense `teacher` if there is one.

    batches: dicts with labels, or (inputs, labels); a decoder without labels predicts its own tokens. AdamW, one cycle
    with a tenth of warm-up (`training.train_`). seed: of dropout.
    """
    raise NotImplementedError
