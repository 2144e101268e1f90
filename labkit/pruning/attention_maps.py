"""Attention probabilities as they really are, whatever implementation the model runs, and what they look like a head.

Fused kernels (sdpa, flash) have no probabilities to give, and `output_attentions=True` then returns nothing at all. So
the model is switched to the eager implementation for the call and back. Entropy and confidence leave out padding, and
queries that have a single key to attend to, which say nothing about the head.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from labkit.batches import check_batches, evaluating, inputs, not_empty, valid_tokens
from labkit.errors import InputError
from labkit.pruning import anatomy
from labkit.pruning.anatomy import Attention
from labkit.pruning.cuts import configs
from labkit.pruning.gates import rows


@torch.no_grad()
def attention_maps(model: nn.Module, batch: Any) -> list[Tensor]:
    """Probabilities of every attention for one batch: layers x [B, heads, queries, keys]; rows sum to 1."""
    found: dict[int, Tensor] = {}
    with evaluating(model, seed=0), observing(model, anatomy.attentions(model), found.__setitem__):
        model(**inputs(model, batch))
    return [found[i] for i in sorted(found)]


def entropy(model: nn.Module, batches: Iterable, *, normalised: bool = False, label: str = "") -> Tensor:
    """Mean entropy of each head's attention in nats, [layers, heads] float64; low is focused.

    H = -sum_k a_k log a_k for a query, averaged over the valid queries that can choose. normalised: H / log n with n
    the keys that the query may attend to, in [0, 1], so that long and short texts can be compared (H grows as log n).
    """

    def measure(a: Tensor, n: Tensor) -> Tensor:
        h = torch.special.entr(a).sum(-1)
        return h / n.log() if normalised else h

    return _mean(model, batches, measure, label)


def confidence(model: nn.Module, batches: Iterable, *, label: str = "") -> Tensor:
    """Mean of the largest attention probability over the valid queries that can choose, [layers, heads] float64."""
    return _mean(model, batches, lambda a, n: a.amax(-1), label)


@contextlib.contextmanager
def observing(model: nn.Module, parts: Sequence[Attention], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside, every attention is computed eagerly, and see(i, a) gets the probabilities [B, heads, queries, keys]."""

    def hook(i: int) -> Callable:
        def after(module, args, output):
            maps = [x for x in output[1:] if isinstance(x, Tensor) and x.dim() == 4]
            if not maps or not _are_probabilities(maps[-1]):  # T5 has its position biases before them
                raise InputError(
                    f"{parts[i].name} gives no attention probabilities, not even computed eagerly; "
                    "methods that need none: taylor, gate, ablation."
                )
            see(i, maps[-1])

        return after

    handles = [model.get_submodule(part.name).register_forward_hook(hook(i)) for i, part in enumerate(parts)]
    before = [(c, c._attn_implementation) for c in configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        for handle in handles:
            handle.remove()


def _are_probabilities(a: Tensor) -> bool:
    """Whether no entry is negative and no row [.., keys] sums to more than 1 (less with sinks), to bf16."""
    return bool((a >= 0).all() and (a.float().sum(-1) < 1.02).all())


@torch.no_grad()
def _mean(model: nn.Module, batches: Iterable, measure: Callable[[Tensor, Tensor], Tensor], label: str) -> Tensor:
    """Mean of measure(a [.., keys], n [..]) over valid queries with two keys or more to attend to: [layers, heads]"""
    parts = anatomy.attentions(model)
    sums = [torch.zeros(part.heads, dtype=torch.float64) for part in parts]
    counts = [torch.zeros(part.heads, dtype=torch.float64) for part in parts]
    given: dict[str, Any] = {}

    def see(i: int, a: Tensor) -> None:
        a = a.double()  # [B, heads, queries, keys]
        n = (a > 0).sum(-1).double()  # masked keys have a probability of exactly 0
        queries = valid_tokens(model, given, parts[i].name, a[:, 0, :, :1])  # [B, queries]
        chosen = queries[:, None] & (n > 1)
        sums[i] += torch.where(chosen, measure(a, n), 0.0).sum((0, 2)).cpu()
        counts[i] += chosen.sum((0, 2)).cpu()

    with evaluating(model, seed=0), observing(model, parts, see):
        for batch in tqdm(not_empty(check_batches(batches, "attention")), desc=label, disable=not label, mininterval=2):
            given.clear()
            given.update(inputs(model, batch))
            model(**given)
    return rows([total / count for total, count in zip(sums, counts, strict=True)])
