"""Attention probabilities as they really are, whatever implementation the model runs, and what they look like a head.

Fused kernels (sdpa, flash) have no probabilities to give, and `output_attentions=True` then returns nothing at all. So
the model is switched to the eager implementation for the call and back. Entropy and confidence leave out padding, and
queries that have a single key to attend to, which say nothing about the head.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def attention_maps(model: nn.Module, batch: Any) -> list[Tensor]:
    """Probabilities of every attention for one batch: layers x [B, heads, queries, keys]; rows sum to 1."""
    raise NotImplementedError


def entropy(model: nn.Module, batches: Iterable, *, normalised: bool = False, label: str = "") -> Tensor:
    """Mean entropy of each head's attention in nats, [layers, heads] float64; low is focused.

    H = -sum_k a_k log a_k for a query, averaged over the valid queries. normalised: H / log n with n the keys that the
    query may attend to, in [0, 1], so that long and short texts can be compared (H grows as log n).
    """
    raise NotImplementedError


def confidence(model: nn.Module, batches: Iterable, *, label: str = "") -> Tensor:
    """Mean of the largest attention probability over the valid queries, [layers, heads] float64 (Voita et al. 2019)."""
    raise NotImplementedError
