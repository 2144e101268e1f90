"""Training and scoring: batches of tensors, the training loop of the course, accuracy and perplexity.

Open this file first; datasets.py and models.py bring data and models to train and to score:

>>> from labkit.data import datasets, models, training
>>> train = datasets.fashion_mnist("train", n=64)
>>> test = datasets.fashion_mnist("test", n=64)
>>> model = models.resnet20()
>>> batches = training.Batches((train.images, train.labels), batch_size=32, seed=0)
>>> history = training.train_(model, batches, max_lr=1e-4)
>>> len(history.losses)
2
>>> training.accuracy(model, training.Batches((test.images, test.labels), 32)) > 0.8
True

The loop has a one-cycle learning rate (Smith & Topin 2018, arXiv:1708.07120, in torch's form), bf16 on processors with
bf16, and seeded batches. It trains a model in place on the model's device, without checkpoints, callbacks or loggers:
runs of the course take minutes.
"""

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from labkit.arguments import check_loaded, check_module, check_tensor
from labkit.errors import InputError, check_choice, check_number, check_whole
from labkit.modules.batches import check_batches, device_of, evaluating, not_empty, split
from labkit.modules.losses import batch_loss

Batch = tuple[Tensor, Tensor] | dict[str, Tensor]
CHECKED = 20  # steps between two looks at the losses on a device that has to be waited for
THIN = 16  # channels: a strided 1x1 convolution that reads fewer must not be trained in channels-last order on a CPU
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("auto", "bf16", "fp32")


@dataclass(frozen=True)
class Batches:
    """Tensors cut into batches; a pass over the object is an epoch.

    data: a tuple (inputs, labels) or a dict of a transformers model's arguments; all tensors have N rows.
    batch_size: number of rows in a batch; the last batch may be smaller.
    seed: gives each epoch a different order, and a new object the same orders again; None keeps the data's order.
    collate: function that changes each batch, for example cuts padding.
    """

    data: Batch
    batch_size: int
    seed: int | None = None
    collate: Callable[[Batch], Batch] | None = None

    def __post_init__(self) -> None:
        check_whole(self.batch_size, "batch_size")
        if self.seed is not None:
            check_whole(self.seed, "seed", 0)
        if not isinstance(self.data, tuple | list | Mapping) or not self._tensors():
            raise InputError("data must be a tuple (inputs, labels) or a dict of tensors: put the tensors into it.")
        for i, tensor in enumerate(self._tensors()):
            check_tensor(tensor, f"tensor {i} of data")
            if not tensor.dim() or not len(tensor):
                raise InputError(f"tensor {i} of data has shape {list(tensor.shape)}: give one row an example.")
        lengths = [len(tensor) for tensor in self._tensors()]
        if len(set(lengths)) != 1:
            raise InputError(f"all tensors need one length; they have {lengths}.")
        generator = None
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
        object.__setattr__(self, "_generator", generator)

    def _tensors(self) -> list[Tensor]:
        return list(self.data.values() if isinstance(self.data, Mapping) else self.data)

    def __len__(self) -> int:
        return math.ceil(len(self._tensors()[0]) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        size = len(self._tensors()[0])
        order = torch.arange(size)
        if self._generator is not None:
            order = torch.randperm(size, generator=self._generator)
        for indices in order.split(self.batch_size):
            batch = _each(self.data, lambda tensor, indices=indices: tensor[indices])
            yield self.collate(batch) if self.collate else batch


@dataclass(frozen=True)
class History:
    """A training run: the loss of each step, the duration in seconds, and the arithmetic, "bf16" or "fp32"."""

    losses: list[float]
    seconds: float
    precision: str


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a transformers model, or the cross-entropy of a model's scores [B, classes] and labels [B].

    batch: (inputs, labels), or a dict with "labels"; `batches.split` tells how a tuple is bound.
    """
    return batch_loss(model, batch)


def train_(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    epochs: int = 1,
    max_lr: float,
    optimizer: str = "sgd",
    weight_decay: float = 5e-4,
    warmup: float = 0.3,
    steps: int | None = None,
    loss_fn: Callable[[nn.Module, Batch], Tensor] = task_loss,
    precision: str = "auto",
    label: str = "",
) -> History:
    """Train `model` in place on the model's device for `epochs` passes over `batches`, or fewer if `steps` ends first.

    batches: arguments of `loss_fn`; `task_loss` takes (inputs, labels), or dicts with "labels".
    max_lr: the highest learning rate of the cycle.
    optimizer: "sgd" (Nesterov, momentum from .95 to .85 and back as the rate rises and falls) or "adamw".
    weight_decay: weight decay of the optimizer.
    warmup: share of the steps in which the rate rises to `max_lr`.
    loss_fn: loss_fn(model, batch) returns the loss to minimise, a number.
    precision: "bf16" (autocast), "fp32", or "auto" for bf16 if the device computes in bf16.
    label: label of a progress bar; without a label there is no bar.
    The model stays in train or eval mode as before. Random layers (dropout) draw from torch's global generator: seed
    the generator for a run that repeats. No further state of torch changes; training inside torch.no_grad() works too.

    Raises InputError before any work for unusable arguments, and for a loss or a weight that is not finite. After such
    an error, and after any exception, weights and buffers are as before the call, of which a copy is held (an
    interrupted run keeps the progress). On a GPU losses are looked at every 20 steps: a look waits for the device.
    """
    total = _total_steps(batches, epochs, steps)
    _check_recipe(max_lr, optimizer, weight_decay, warmup, precision, loss_fn)
    parameters = _trainable(model)
    device = parameters[0].device
    layout = _layout(model, device)
    uses_bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))
    descent = _descent(optimizer, parameters, max_lr, weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        descent,
        max_lr,
        total_steps=total,
        pct_start=warmup if warmup * total != 1 else 0.0,  # torch divides by the length of the rise but one step
        cycle_momentum=optimizer == "sgd",
    )
    losses = _Losses(device, max_lr)
    start = time.perf_counter()
    with (
        _restored_on_error(model),
        _training(model, layout),
        torch.enable_grad(),
        tqdm(total=total, desc=label, disable=not label, mininterval=2) as bar,
    ):
        for batch in _endless(batches, total):
            with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16):
                loss = loss_fn(model, place(batch, device, layout))
            losses.add(loss)
            descent.zero_grad(set_to_none=True)
            loss.backward()
            descent.step()
            schedule.step()
            bar.update()
        losses.check()
        _check_weights(parameters, max_lr)
    return History(losses.values(), time.perf_counter() - start, "bf16" if uses_bf16 else "fp32")


class _Losses:
    """The loss of each step, checked before the step on a CPU, and every CHECKED steps on a device to wait for.

    max_lr: learning rate named in the error's advice.
    """

    def __init__(self, device: torch.device, max_lr: float) -> None:
        self.every = 1 if device.type == "cpu" else CHECKED
        self.max_lr = max_lr
        self.losses: list[Tensor] = []
        self.checked = 0

    def add(self, loss: Tensor) -> None:
        """Add a step's loss; InputError unless `loss` is a number with a gradient."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise InputError("loss_fn must return one number for a batch, a tensor: reduce it, as with .mean().")
        if not loss.requires_grad:
            raise InputError(
                "The loss does not depend on the parameters that are to learn: compute it from model(...) without "
                "detach, item or no_grad."
            )
        self.losses.append(loss.detach().reshape(()))
        if len(self.losses) - self.checked >= self.every:
            self.check()

    def check(self) -> None:
        """Raise InputError for the first unchecked loss that is not finite."""
        unchecked = self.losses[self.checked :]
        first_step = self.checked + 1
        self.checked = len(self.losses)
        if not unchecked:
            return
        finite = torch.stack(unchecked).isfinite()
        if not finite.all():
            i = finite.tolist().index(False)
            raise InputError(
                f"The loss of step {first_step + i} is {float(unchecked[i])}, so training stopped and the model is as "
                f"it was before: lower max_lr ({self.max_lr:g}), and look for NaN or infinity in the inputs and the "
                "loss."
            )

    def values(self) -> list[float]:
        return torch.stack(self.losses).float().tolist()


@contextlib.contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """After an exception inside, put trainable parameters and all buffers back and drop the gradients; holds a copy."""
    buffers = []
    for module in model.modules():
        buffers += [(module, name, buffer) for name, buffer in module._buffers.items() if buffer is not None]
    tensors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors += [buffer for _, _, buffer in buffers]
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except Exception:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer  # the forward pass may have put a new tensor there
        with torch.no_grad():
            for tensor, numbers in zip(tensors, copies, strict=True):
                tensor.copy_(numbers)
        model.zero_grad(set_to_none=True)
        raise


@torch.no_grad()
def reestimate_norms_(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Estimate the running mean and variance of all batch norms anew, in place, as needed after a cut.

    batches: batches of inputs, as in labkit.batches; labels are ignored.
    The new statistics are the mean over all batches of each batch's mean and variance, as in
    torch.optim.swa_utils.update_bn; dropout stays off. A norm that no batch reaches keeps its numbers. Modes, momenta,
    weights and random states are as before.
    Raises InputError for a model without running statistics, for zero batches, and for statistics that are not finite;
    after any error the statistics are as before.
    """
    check_loaded(model)
    norms = [module for module in model.modules() if _has_running_statistics(module)]
    if not norms:
        raise InputError(
            f"{type(model).__name__} has no batch norm with running statistics, so there is nothing to estimate anew: "
            "call it only on a model with batch norms."
        )
    copies = [_statistics(norm) for norm in norms]
    momenta = [norm.momentum for norm in norms]
    device = _device(model)
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.training = True
            for batch in not_empty(check_batches(batches, "batch norm statistics")):
                args, kwargs, _ = split(model, place(batch, device))
                model(*args, **{name: value for name, value in kwargs.items() if name != "labels"})
        _check_statistics(norms)
    except BaseException:
        for norm, copy in zip(norms, copies, strict=True):
            _set_statistics(norm, copy)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    for norm, copy in zip(norms, copies, strict=True):
        if norm.num_batches_tracked == 0:
            _set_statistics(norm, copy)


def _has_running_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    return norm.running_mean.clone(), norm.running_var.clone(), norm.num_batches_tracked.clone()


def _set_statistics(norm: nn.Module, statistics: tuple[Tensor, Tensor, Tensor]) -> None:
    mean, variance, number = statistics
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.num_batches_tracked.copy_(number)


def _check_statistics(norms: list[nn.Module]) -> None:
    for norm in norms:
        statistics = torch.stack([norm.running_mean, norm.running_var])
        if not statistics.isfinite().all():
            raise InputError(
                "The batches give batch norm statistics that are not finite, so the model is as it was before: look "
                "for NaN or infinity in the inputs and the weights."
            )


@torch.inference_mode()
def correct(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Mark the right answers of a classifier: bool [N] on the CPU, in eval mode and the model's own precision.

    batches: (inputs, labels), or dicts with "labels"; a label [B] is the index of a class.
    Two models' answers to the same batches compare pair by pair.
    Raises InputError for zero batches, and for a batch without a label for each row of scores [B, C].
    """
    check_module(model)
    device = _device(model)
    right = []
    with evaluating(model):
        for batch in check_batches(batches, "accuracy"):
            args, kwargs, labels = split(model, place(batch, device))
            inputs = {name: value for name, value in kwargs.items() if name != "labels"}
            output = model(*args, **inputs)
            scores = getattr(output, "logits", output)
            right.append(_matches(scores, labels).cpu())
    if not right:
        raise InputError("there is no batch to measure accuracy on; pass at least one.")
    return torch.cat(right)


def _matches(scores: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise InputError("The batches have no labels to compare with: give (inputs, labels), or dicts with 'labels'.")
    are_tensors = isinstance(scores, Tensor) and isinstance(labels, Tensor)
    if not are_tensors or scores.shape[:-1] != labels.shape:
        raise InputError(
            f"Scores are {_shape(scores)} and labels {_shape(labels)}: give one label, a class, for each [..., C]."
        )
    return scores.argmax(-1) == labels


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the share of right answers, 0..1: the mean of `correct`, with the same arguments and errors."""
    return float(correct(model, batches).double().mean())


@torch.inference_mode()
def perplexity(model: nn.Module, tokens: Tensor, *, window: int = 512) -> float:
    """Return exp of the mean loss per predicted token over `tokens` [N], in windows that each start without context.

    window: number of tokens in a window. A window predicts all tokens but the first; tokens that do not fill the last
        window are left out.
    Returns infinity for a perplexity beyond float64. Raises InputError for a model that is not called with input_ids,
    and for tokens outside the model's vocabulary.
    """
    check_module(model)
    rows = windows(tokens, window).to(_device(model))
    if not _takes_input_ids(model):
        raise InputError(
            f"Perplexity needs a language model, which is called with input_ids, and {type(model).__name__} is none."
        )
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", math.inf)
    lowest, highest = int(rows.min()), int(rows.max())
    if not 0 <= lowest <= highest < vocabulary:
        raise InputError(
            f"tokens go from {lowest} to {highest}, but the model knows 0 to {vocabulary - 1}: take the tokens of its "
            "own tokenizer."
        )
    total = 0.0
    with evaluating(model):
        for ids in rows:
            logits = model(input_ids=ids[None]).logits[0, :-1].float()  # [window-1, vocabulary]
            total += F.cross_entropy(logits, ids[1:]).item()
    return float(torch.tensor(total / len(rows), dtype=torch.float64).exp())


def _takes_input_ids(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(parameter.name == "input_ids" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def windows(tokens: Tensor, window: int) -> Tensor:
    """Cut tokens [N] into [windows, window], without the rest; InputError unless a window can be filled."""
    check_whole(window, "window", 2)
    check_tensor(tokens, "tokens")
    is_whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if not is_whole or tokens.ndim != 1 or len(tokens) < window:
        raise InputError(
            f"tokens must be whole numbers, 1-D, with at least one window of {window}; they are {tokens.dtype} of "
            f"shape {tuple(tokens.shape)}."
        )
    number = len(tokens) // window
    return tokens[: number * window].view(number, window)


def has_bf16(device: torch.device | str) -> bool:
    """Return True for a device with bf16 products in hardware.

    On a CPU AVX512-BF16 or AMX, on CUDA compute capability 8.0.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if kind != "cpu":
        return False
    # torch has no public name for this that is as old as 2.9
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def place(batch: Batch, device: torch.device, layout: torch.memory_format = torch.channels_last) -> Batch:
    """Move a batch to `device`, images [B, C, H, W] in the memory order `layout`: convolutions want channels last."""

    def move(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device, non_blocking=True)
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            tensor = tensor.clone()  # what inference mode made, such as stored answers, takes part in no gradient
        return tensor.contiguous(memory_format=layout) if tensor.ndim == 4 else tensor

    return _each(batch, move)


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Change all tensors of a batch; further items (None, a flag) stay."""

    def changed(item: object) -> object:
        return change(item) if isinstance(item, Tensor) else item

    if isinstance(batch, Mapping):
        return {name: changed(item) for name, item in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(changed(item) for item in batch)
    check_tensor(batch, "A batch")
    return change(batch)


def _device(model: nn.Module) -> torch.device:
    """Return the model's device; the CPU for a model without tensors."""
    return device_of(model) or torch.device("cpu")


def _total_steps(batches: Iterable[Batch], epochs: int, steps: int | None) -> int:
    has_length = isinstance(batches, Sized) and not isinstance(batches, Tensor | Mapping | str)
    if not has_length or len(batches) == 0:
        raise InputError("batches must have a length and at least one batch; a list or labkit.training.Batches has.")
    check_whole(epochs, "epochs")
    if steps is not None:
        check_whole(steps, "steps")
    return min(epochs * len(batches), steps or math.inf)


def _check_recipe(
    max_lr: float, optimizer: str, weight_decay: float, warmup: float, precision: str, loss_fn: object
) -> None:
    check_number(max_lr, "max_lr", above=0)
    check_choice(optimizer, OPTIMIZERS, "optimizer")
    check_number(weight_decay, "weight_decay", 0)
    check_number(warmup, "warmup", 0, below=1)
    check_choice(precision, PRECISIONS, "precision")
    if not callable(loss_fn):
        raise InputError(f"loss_fn is {loss_fn!r}, but it must be a function of (model, batch) that returns the loss.")


def _descent(
    optimizer: str, parameters: list[nn.Parameter], max_lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    if optimizer == "sgd":
        return torch.optim.SGD(parameters, max_lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    return torch.optim.AdamW(parameters, max_lr, weight_decay=weight_decay)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that learn; InputError for a model without any, and for parameters that no step changes."""
    check_module(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError(
            "the model has no parameter that requires a gradient; set requires_grad_() on what shall learn."
        )
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in parameters):
        raise InputError(
            "Inside torch.inference_mode(), and of what was made there, nothing has a gradient: make and train the "
            "model outside of it."
        )
    check_loaded(model)
    return parameters


def _check_weights(parameters: list[nn.Parameter], max_lr: float) -> None:
    """Raise InputError for a weight made NaN or infinite by the last step; after an earlier step the loss tells."""
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise InputError(
            "The last step left a weight that is not finite, so the model is as it was before training: lower max_lr "
            f"({max_lr:g}), and look for infinite gradients, as of sqrt or log at 0."
        )


def _endless(batches: Iterable[Batch], total: int) -> Iterator[Batch]:
    """Yield `total` batches, pass after pass; InputError for a pass without a batch."""
    done = 0
    while True:
        done_before = done
        for batch in batches:
            if done == total:
                return
            yield batch
            done += 1
        if done == done_before:
            raise InputError(f"batches gave no batch after {done} of {total} steps: they must be readable again.")


def _layout(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Return channels last, except for models that oneDNN trains wrong in channels-last order.

    oneDNN writes out of bounds for the weight gradient of a strided 1x1 convolution that reads fewer channels than a
    vector holds (oneDNN's issue 6035): wrong gradients, or a crash. A pruned shortcut is a convolution of the kind.
    """
    if device.type == "cpu" and any(_is_thin_shortcut(module) for module in model.modules()):
        return torch.contiguous_format
    return torch.channels_last


def _is_thin_shortcut(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or module.in_channels >= THIN:
        return False
    return module.kernel_size == (1, 1) and module.stride != (1, 1)


@contextlib.contextmanager
def _training(model: nn.Module, layout: torch.memory_format) -> Iterator[None]:
    """Put the model into training mode with weights in the order `layout`; afterwards modes are as before.

    Weights come back contiguous.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.to(memory_format=layout).train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        model.to(memory_format=torch.contiguous_format)
