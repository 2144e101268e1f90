"""Gates on heads: a number for each head that multiplies its context vector, given or learned.

A gate of 0 is a removed head, 1 leaves it. Learned gates follow Voita et al. 2019 (Analyzing Multi-Head Self-Attention)
with the hard concrete distribution of Louizos et al. 2018 (Learning Sparse Neural Networks through L0 Regularization),
or a plain L1 penalty. The model's weights are frozen here.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from labkit.batches import check_batches, evaluating, not_empty, summed_loss
from labkit.errors import InputError
from labkit.pruning import anatomy
from labkit.pruning.anatomy import Attention
from labkit.pruning.scores import reading

PENALTIES = ("hard_concrete", "l1")
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # beta, gamma and zeta of Louizos et al. 2018


@contextlib.contextmanager
def gated(model: nn.Module, gates: Tensor) -> Iterator[None]:
    """Inside, the context of head h of layer l is multiplied by gates[l, h]; gates: [layers, heads]. Exact at 0."""
    parts = anatomy.attentions(model)
    with scaling(model, parts, lambda i, context: gates[i, : parts[i].heads].to(context)[:, None]):
        yield


@contextlib.contextmanager
def scaling(
    model: nn.Module, parts: Sequence[Attention], factor: Callable[[int, Tensor], Tensor | None]
) -> Iterator[None]:
    """Inside, the contexts [B, T, heads, size] of attention i are multiplied by factor(i, contexts), None for not."""

    def scaled(i: int, x: Tensor) -> Tensor | None:
        contexts = x.unflatten(-1, (parts[i].heads, parts[i].size))  # [B, T, heads, size]
        scale = factor(i, contexts)
        return None if scale is None else (contexts * scale).flatten(-2)

    with reading(model, [part.output for part in parts], scaled):
        yield


@torch.inference_mode(False)
def learn_gates(
    model: nn.Module,
    batches: Iterable,
    *,
    penalty: str = "hard_concrete",
    strength: float = 0.02,
    epochs: int = 1,
    lr: float = 0.1,
    loss_fn: Callable | None = None,
    seed: int = 0,
    label: str = "",
) -> Tensor:
    """Gates in [0, 1] that keep the task loss low while few are open, [layers, heads] float64; the model is frozen.

    Minimises mean loss + strength * sum of gates by Adam with the rate `lr`. penalty: "hard_concrete" samples each gate
    as clip(sigmoid((log u - log(1 - u) + a) / b) (r - l) + l, 0, 1), u uniform, and penalises the chance that it is
    open (Louizos et al. 2018); what is returned is the gate without noise. "l1" trains the numbers z themselves,
    penalises |z| and returns it, at most 1. batches: read `epochs` times. The same seed gives the same gates. NaN
    where a layer has fewer heads than another.
    """
    if penalty not in PENALTIES:
        raise InputError(f"There is no penalty {penalty!r}: choose one of {', '.join(PENALTIES)}.")
    parts = anatomy.attentions(model)
    check_batches(batches, "gate")
    device = next(model.parameters()).device
    start = 2.0 if penalty == "hard_concrete" else 1.0  # open: the chance of an exact 0 is then 3 %
    own = [torch.full((part.heads,), start, device=device, requires_grad=True) for part in parts]
    descent = torch.optim.Adam(own, lr)
    with evaluating(model, seed), _frozen(model), torch.enable_grad():
        for _ in range(epochs):
            for batch in tqdm(not_empty(batches), desc=label, disable=not label, mininterval=2):
                gates = [_sampled(a) for a in own] if penalty == "hard_concrete" else own
                with scaling(model, parts, lambda i, contexts, gates=gates: gates[i].to(contexts)[:, None]):
                    loss, terms = summed_loss(model, batch, loss_fn)
                cost = _open(own) if penalty == "hard_concrete" else sum(z.abs().sum() for z in own)
                descent.zero_grad()
                (loss / max(terms, 1) + strength * cost).backward()
                descent.step()
    found = [_stretched(a.detach().sigmoid()) if penalty == "hard_concrete" else a.detach().abs() for a in own]
    return rows([z.clamp(0, 1) for z in found])


def rows(values: Sequence[Tensor]) -> Tensor:
    """One row an attention: [layers, most heads] float64 on the CPU, NaN where a layer has fewer."""
    table = torch.full((len(values), max(len(own) for own in values)), torch.nan, dtype=torch.float64)
    for row, own in zip(table, values, strict=True):
        row[: len(own)] = own.detach().double().cpu()
    return table


def _sampled(a: Tensor) -> Tensor:
    u = torch.rand_like(a).clamp(1e-6, 1 - 1e-6)
    return _stretched(((u.log() - (-u).log1p() + a) / TEMPERATURE).sigmoid()).clamp(0, 1)


def _stretched(s: Tensor) -> Tensor:
    return s * (HIGH - LOW) + LOW


def _open(own: Sequence[Tensor]) -> Tensor:
    """Expected number of gates that are not zero."""
    return sum((a - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid().sum() for a in own)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient inside; afterwards those do that did."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)
