"""The one training loop of the course: one-cycle learning rate, bf16 where the processor has it, seeded batches.

The schedule is Smith & Topin's one-cycle policy (2018, arXiv:1708.07120) as torch has it. It trains in place the model
that it is given, on that model's device; it has no checkpoints, callbacks or loggers: runs here take minutes.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from labkit.batches import evaluating
from labkit.errors import InputError, check_choice, check_whole

Batch = tuple[Tensor, Tensor] | dict[str, Tensor]


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
        if len({len(tensor) for tensor in self._tensors()}) != 1:
            raise InputError(f"all tensors need one length; they have {[len(tensor) for tensor in self._tensors()]}.")
        generator = torch.Generator().manual_seed(self.seed) if self.seed is not None else None
        object.__setattr__(self, "_generator", generator)

    def _tensors(self) -> list[Tensor]:
        return list(self.data.values() if isinstance(self.data, dict) else self.data)

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
    """Cross-entropy of (inputs, labels), or the loss that a transformers model computes for a dict with labels."""
    if isinstance(batch, dict):
        return model(**batch).loss
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


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

    optimizer: "sgd" (Nesterov, momentum from .95 to .85 and back as the rate rises and falls) or "adamw". warmup:
    share of the steps in which the rate rises to `max_lr`. precision: "bf16" (autocast), "fp32", or "auto" for bf16
    where the device computes in it. label: shown on a progress bar, which appears only with a label. `model` is left
    in the mode, train or eval, that it came in. Random layers (dropout) draw from torch's global generator: seed it
    for a run that repeats. Raises InputError before any work.
    """
    total = _total_steps(batches, epochs, steps)
    _check_recipe(max_lr, optimizer, warmup, precision)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InputError(
            "the model has no parameter that requires a gradient; set requires_grad_() on what shall learn."
        )
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
    losses, start, layout = [], time.perf_counter(), _layout(model, device)
    with _training(model, layout), tqdm(total=total, desc=label, disable=not label, mininterval=2) as bar:
        for batch in _endless(batches, total):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = loss_fn(model, place(batch, device, layout))
            descent.zero_grad(set_to_none=True)
            loss.backward()
            descent.step()
            schedule.step()
            losses.append(loss.detach())
            bar.update()
    return History(torch.stack(losses).float().tolist(), time.perf_counter() - start, "bf16" if bf16 else "fp32")


@torch.inference_mode()
def correct(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Whether each answer is right, bool [N] on the CPU, in eval mode and the model's own precision.

    A dict's labels are under "labels". Two models' answers to the same batches compare pair by pair.
    """
    device = next(itertools.chain(model.parameters(), model.buffers())).device  # a model of integers has buffers alone
    right = []
    with evaluating(model):
        for batch in batches:
            batch = place(batch, device)
            if isinstance(batch, dict):
                labels = batch["labels"]
                scores = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits  # [B, C]
            else:
                scores, labels = model(batch[0]), batch[1]  # [B, C], [B]
            right.append((scores.argmax(-1) == labels).cpu())
    if not right:
        raise InputError("there is no batch to measure accuracy on; pass at least one.")
    return torch.cat(right)


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Share of right answers, 0..1: the mean of `correct`."""
    return float(correct(model, batches).double().mean())


@torch.inference_mode()
def perplexity(model: nn.Module, tokens: Tensor, *, window: int = 512) -> float:
    """exp of the mean loss per predicted token over `tokens` [N], in separate windows: each starts without context.

    Every window predicts all its tokens but the first. Tokens that do not fill the last window are left out.
    """
    rows = windows(tokens, window).to(next(model.parameters()).device)
    total = 0.0
    with evaluating(model):
        for ids in rows:
            logits = model(input_ids=ids[None]).logits[0, :-1].float()  # [window-1, vocabulary]
            total += F.cross_entropy(logits, ids[1:]).item()
    return math.exp(total / len(rows))


def windows(tokens: Tensor, window: int) -> Tensor:
    """Tokens [N] as [windows, window]; those that do not fill the last one are left out. InputError without any."""
    if window < 2 or tokens.ndim != 1 or len(tokens) < window:
        raise InputError(
            f"tokens must be 1-D with at least one window of {window} (2 or more); shape {tuple(tokens.shape)}."
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
        return tensor.contiguous(memory_format=layout) if tensor.ndim == 4 else tensor

    return _each(batch, move)


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    if isinstance(batch, dict):
        return {name: change(tensor) for name, tensor in batch.items()}
    return tuple(change(tensor) for tensor in batch)


def _total_steps(batches: Iterable[Batch], epochs: int, steps: int | None) -> int:
    if not hasattr(batches, "__len__") or len(batches) == 0:
        raise InputError("batches must have a length and at least one batch; a list or labkit.training.Batches has.")
    check_whole(epochs, "epochs")
    if steps is not None:
        check_whole(steps, "steps")
    return min(epochs * len(batches), steps or math.inf)


def _check_recipe(max_lr: float, optimizer: str, warmup: float, precision: str) -> None:
    if not 0 < max_lr < math.inf:
        raise InputError(f"max_lr must be a positive number; it is {max_lr!r}.")
    check_choice(optimizer, ("sgd", "adamw"), "optimizer")
    if not 0 <= warmup < 1:
        raise InputError(f"warmup is a share of the steps from 0 to below 1; it is {warmup!r}.")
    check_choice(precision, ("auto", "bf16", "fp32"), "precision")


def _endless(batches: Iterable[Batch], total: int) -> Iterator[Batch]:
    """`total` batches, pass after pass."""
    done = 0
    while True:
        for batch in batches:
            if done == total:
                return
            yield batch
            done += 1


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
