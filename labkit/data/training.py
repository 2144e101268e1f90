"""The one training loop of the course: one-cycle learning rate, bf16 where the processor has it, seeded batches.

The schedule is Smith & Topin's one-cycle policy (2018, arXiv:1708.07120) as torch has it. It trains in place the model
that it is given, on that model's device; it has no checkpoints, callbacks or loggers: runs here take minutes.
"""

import contextlib
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from labkit.arguments import check_module, check_tensor
from labkit.errors import InputError, check_choice, check_number, check_whole
from labkit.modules.batches import check_batches, evaluating, split
from labkit.modules.losses import batch_loss

Batch = tuple[Tensor, Tensor] | dict[str, Tensor]
CHECKED = 20  # steps between two looks at the losses on a device that has to be waited for


@dataclass(frozen=True)
class Batches:
    """Tensors cut into batches: a tuple (inputs, labels) or a dict of what a transformers model takes, all of length N.

    Each pass over it is one epoch. With a `seed` each epoch has its own order, and a new object starts again at the
    first. `collate` is applied to each batch. The last batch may be smaller.
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
        if len({len(tensor) for tensor in self._tensors()}) != 1:
            raise InputError(f"all tensors need one length; they have {[len(tensor) for tensor in self._tensors()]}.")
        generator = torch.Generator().manual_seed(self.seed) if self.seed is not None else None
        object.__setattr__(self, "_generator", generator)

    def _tensors(self) -> list[Tensor]:
        return list(self.data.values() if isinstance(self.data, Mapping) else self.data)

    def __len__(self) -> int:
        return math.ceil(len(self._tensors()[0]) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        size = len(self._tensors()[0])
        order = torch.arange(size) if self._generator is None else torch.randperm(size, generator=self._generator)
        for indices in order.split(self.batch_size):
            batch = _each(self.data, lambda tensor, indices=indices: tensor[indices])
            yield self.collate(batch) if self.collate else batch


@dataclass(frozen=True)
class History:
    """What a training run was: the loss of each step, its seconds, and its arithmetic, "bf16" or "fp32"."""

    losses: list[float]
    seconds: float
    precision: str


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model computes, or the cross-entropy of its scores [B, classes] and labels [B].

    batch: (inputs, labels), or a dict with "labels"; how a tuple is bound: `batches.split`.
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
    """Train `model` in place on its own device for `epochs` passes over `batches`, or fewer if `steps` ends first.

    batches: of what `loss_fn` takes; `task_loss` takes (inputs, labels), or dicts with "labels".
    optimizer: "sgd" (Nesterov, momentum from .95 to .85 and back as the rate rises and falls) or "adamw". warmup:
    share of the steps in which the rate rises to `max_lr`. precision: "bf16" (autocast), "fp32", or "auto" for bf16
    where the device computes in it. label: shown on a progress bar, which appears only with a label. `model` is left
    in the mode, train or eval, that it came in. Random layers (dropout) draw from torch's global generator: seed it
    for a run that repeats. No other state of torch changes, and it trains inside torch.no_grad() too.
    Raises InputError before any work for arguments that cannot be used, and for a loss or a weight that is not finite:
    no step follows, and weights and buffers are those from before the call, as after every error (an interrupted run
    keeps what it has learnt), for which it holds a copy of them. On a GPU losses are looked at every 20 steps: a look
    has to wait for the device.
    """
    total = _total_steps(batches, epochs, steps)
    _check_recipe(max_lr, optimizer, weight_decay, warmup, precision, loss_fn)
    parameters = _trainable(model)
    device = parameters[0].device
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16(device))
    if optimizer == "sgd":
        descent = torch.optim.SGD(parameters, max_lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    else:
        descent = torch.optim.AdamW(parameters, max_lr, weight_decay=weight_decay)
    warmup = warmup if warmup * total != 1 else 0.0  # torch divides by the length of the rise but one step
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        descent, max_lr, total_steps=total, pct_start=warmup, cycle_momentum=optimizer == "sgd"
    )
    losses, start, layout = _Losses(device, max_lr), time.perf_counter(), _layout(model, device)
    with (
        restored_on_error(model),
        _training(model, layout),
        torch.enable_grad(),
        tqdm(total=total, desc=label, disable=not label, mininterval=2) as bar,
    ):
        for batch in _endless(batches, total):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = loss_fn(model, place(batch, device, layout))
            losses.add(loss)
            descent.zero_grad(set_to_none=True)
            loss.backward()
            descent.step()
            schedule.step()
            bar.update()
        losses.check()
        _check_weights(parameters, max_lr)
    return History(losses.values(), time.perf_counter() - start, "bf16" if bf16 else "fp32")


class _Losses:
    """The loss of each step, looked at before its step on a CPU, and every CHECKED steps on other devices."""

    def __init__(self, device: torch.device, max_lr: float) -> None:
        self.every, self.max_lr = 1 if device.type == "cpu" else CHECKED, max_lr
        self.losses: list[Tensor] = []
        self.checked = 0

    def add(self, loss: Tensor) -> None:
        """InputError unless `loss` is a number that a gradient can be had of."""
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
        """InputError for the first loss since the last look that is not finite."""
        new, first = self.losses[self.checked :], self.checked + 1
        self.checked = len(self.losses)
        if not new:
            return
        finite = torch.stack(new).isfinite()
        if not finite.all():
            i = finite.tolist().index(False)
            raise InputError(
                f"The loss of step {first + i} is {float(new[i])}, so training stopped and the model is as it was "
                f"before: lower max_lr ({self.max_lr:g}), and look for NaN or infinity in the inputs and the loss."
            )

    def values(self) -> list[float]:
        return torch.stack(self.losses).float().tolist()


@contextlib.contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """After an exception inside, what learns and all buffers are as before, and no gradient is left; costs a copy."""
    buffers = [(module, name, x) for module in model.modules() for name, x in module._buffers.items() if x is not None]
    tensors = [*(x for x in model.parameters() if x.requires_grad), *(x for _, _, x in buffers)]
    before = [x.detach().clone() for x in tensors]
    try:
        yield
    except Exception:
        for module, name, x in buffers:
            module._buffers[name] = x
        with torch.no_grad():
            for x, numbers in zip(tensors, before, strict=True):
                x.copy_(numbers)
        model.zero_grad(set_to_none=True)
        raise


@torch.inference_mode()
def correct(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Whether each answer is right, bool [N] on the CPU, in eval mode and the model's own precision.

    batches: (inputs, labels), or dicts whose labels are under "labels"; a label [B] is the index of a class. Two
    models' answers to the same batches compare pair by pair. InputError without a batch, and for a batch without labels
    or with labels that are not one for each row of scores [B, C].
    """
    check_module(model)
    right, device = [], _device(model)
    with evaluating(model):
        for batch in check_batches(batches, "accuracy"):
            args, kwargs, labels = split(model, place(batch, device))
            output = model(*args, **{name: value for name, value in kwargs.items() if name != "labels"})
            right.append(_matches(getattr(output, "logits", output), labels).cpu())
    if not right:
        raise InputError("there is no batch to measure accuracy on; pass at least one.")
    return torch.cat(right)


def _matches(scores: Tensor, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise InputError("The batches have no labels to compare with: give (inputs, labels), or dicts with 'labels'.")
    if not all(isinstance(x, Tensor) for x in (scores, labels)) or scores.shape[:-1] != labels.shape:
        shapes = [list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in (scores, labels)]
        raise InputError(f"Scores are {shapes[0]} and labels {shapes[1]}: give one label, a class, for each [..., C].")
    return scores.argmax(-1) == labels


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Share of right answers, 0..1: the mean of `correct`."""
    return float(correct(model, batches).double().mean())


@torch.inference_mode()
def perplexity(model: nn.Module, tokens: Tensor, *, window: int = 512) -> float:
    """exp of the mean loss per predicted token over `tokens` [N], in separate windows: each starts without context.

    Every window predicts all its tokens but the first. Tokens that do not fill the last window are left out. Infinity
    where float64 cannot hold it.
    """
    check_module(model)
    rows = windows(tokens, window).to(_device(model))
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(p.name == "input_ids" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise InputError(
            f"Perplexity needs a language model, which is called with input_ids, and {type(model).__name__} is none."
        )
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", math.inf)
    if not 0 <= int(rows.min()) <= int(rows.max()) < vocabulary:
        raise InputError(
            f"tokens go from {int(rows.min())} to {int(rows.max())}, but the model knows 0 to {vocabulary - 1}: take "
            "the tokens of its own tokenizer."
        )
    total = 0.0
    with evaluating(model):
        for ids in rows:
            logits = model(input_ids=ids[None]).logits[0, :-1].float()  # [window-1, vocabulary]
            total += F.cross_entropy(logits, ids[1:]).item()
    return float(torch.tensor(total / len(rows), dtype=torch.float64).exp())


def windows(tokens: Tensor, window: int) -> Tensor:
    """Tokens [N] as [windows, window]; those that do not fill the last one are left out. InputError without any."""
    check_whole(window, "window", 2)
    check_tensor(tokens, "tokens")
    whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if not whole or tokens.ndim != 1 or len(tokens) < window:
        raise InputError(
            f"tokens must be whole numbers, 1-D, with at least one window of {window}; they are {tokens.dtype} of "
            f"shape {tuple(tokens.shape)}."
        )
    return tokens[: len(tokens) // window * window].view(-1, window)


def has_bf16(device: torch.device | str) -> bool:
    """Whether the device multiplies bf16 in hardware: AVX512-BF16 or AMX on a CPU, compute capability 8.0 on CUDA."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if torch.device(device).type != "cpu":
        return False
    # torch has no public name for this that is as old as 2.9
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def place(batch: Batch, device: torch.device, layout: torch.memory_format = torch.channels_last) -> Batch:
    """The batch on `device`; images [B, C, H, W] in channels-last order, which convolutions want, or in another."""

    def move(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device, non_blocking=True)
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            tensor = tensor.clone()  # what inference mode made, such as stored answers, takes part in no gradient
        return tensor.contiguous(memory_format=layout) if tensor.ndim == 4 else tensor

    return _each(batch, move)


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with its tensors changed; what else it holds (None, a flag) as it is."""

    def of_item(item: object) -> object:
        return change(item) if isinstance(item, Tensor) else item

    if isinstance(batch, Mapping):
        return {name: of_item(item) for name, item in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(map(of_item, batch))
    check_tensor(batch, "A batch")
    return change(batch)


def _device(model: nn.Module) -> torch.device:
    """Of the first tensor: a model of integers has buffers alone, and some have none."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _total_steps(batches: Iterable[Batch], epochs: int, steps: int | None) -> int:
    many = isinstance(batches, Sized) and not isinstance(batches, Tensor | Mapping | str)
    if not many or len(batches) == 0:
        raise InputError("batches must have a length and at least one batch; a list or labkit.training.Batches has.")
    check_whole(epochs, "epochs")
    if steps is not None:
        check_whole(steps, "steps")
    return min(epochs * len(batches), steps or math.inf)


def _check_recipe(
    max_lr: float, optimizer: str, weight_decay: float, warmup: float, precision: str, loss_fn: object
) -> None:
    check_number(max_lr, "max_lr", above=0)
    check_choice(optimizer, ("sgd", "adamw"), "optimizer")
    check_number(weight_decay, "weight_decay", 0)
    check_number(warmup, "warmup", 0, below=1)
    check_choice(precision, ("auto", "bf16", "fp32"), "precision")
    if not callable(loss_fn):
        raise InputError(f"loss_fn is {loss_fn!r}, but it must be a function of (model, batch) that returns the loss.")


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn; InputError without any, and for those that no step can change."""
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
    if any(parameter.is_meta for parameter in parameters):
        raise InputError("The model is on the meta device, where weights have no numbers: load it on a real device.")
    return parameters


def _check_weights(parameters: list[nn.Parameter], max_lr: float) -> None:
    """InputError for a weight that the last step made NaN or infinite; an earlier one shows in the next loss."""
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise InputError(
            "The last step left a weight that is not finite, so the model is as it was before training: lower max_lr "
            f"({max_lr:g}), and look for infinite gradients, as of sqrt or log at 0."
        )


def _endless(batches: Iterable[Batch], total: int) -> Iterator[Batch]:
    """`total` batches, pass after pass."""
    done = 0
    while True:
        before = done
        for batch in batches:
            if done == total:
                return
            yield batch
            done += 1
        if done == before:
            raise InputError(f"batches gave no batch after {done} of {total} steps: they must be readable again.")


def _layout(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last, except where oneDNN writes out of bounds in that order.

    It does for the weight gradient of a strided 1x1 convolution that reads fewer channels than a vector holds
    (oneDNN's issue 6035): wrong gradients, or a crash. A pruned shortcut is such a convolution.
    """
    thin = any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < 16
        for m in model.modules()
    )
    return torch.contiguous_format if thin and device.type == "cpu" else torch.channels_last


@contextlib.contextmanager
def _training(model: nn.Module, layout: torch.memory_format) -> Iterator[None]:
    """Training mode, with convolution weights in this order; afterwards they are contiguous."""
    modes = [(module, module.training) for module in model.modules()]
    model.to(memory_format=layout).train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        model.to(memory_format=torch.contiguous_format)
