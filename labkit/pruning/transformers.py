"""Structured pruning of transformers: heads, FFN neurons and the hidden width, one call for every family.

A unit is a query head (with grouped-query attention a whole KV group, or as many query heads from every group), an FFN
neuron with its gate, or a channel of the residual stream. Each cut is proved by `equality` on an example input, and the
config says what it can say. Where the parts are is `anatomy`; whole layers are `depth`; nothing is trained here.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from labkit.pruning.channels import Pruned
from labkit.pruning.heads import head_importance, lowest_heads
from labkit.pruning.pretrained import load, save

__all__ = ["head_importance", "load", "lowest_heads", "prune_ffn", "prune_heads", "prune_width", "save"]

CRITERIA = ("magnitude", "taylor", "wanda", "random")


def prune_heads(
    model: nn.Module,
    heads: Mapping[int, Iterable[int]],
    *,
    kwargs: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Pruned:
    """A new model without the given query heads: {layer: [head, ...]}, both counted from 0, as in `head_importance`.

    With grouped-query attention, layer by layer: whole KV groups (all query heads h with the same h // group), which
    takes their keys, values and cache along; or the same number of query heads from every group that stays; or both.
    Anything else is an InputError that says what is possible. In T5, whose layers share position biases a head, the
    same heads go from every attention of a stack. At least one head stays in a layer.
    kwargs: the input that the cut is proved with; by default a small one made from the config. check: False leaves the
    proof out (`report` is None). `model` stays as it was. The new config has the new number of heads where all layers
    have the same and the architecture can be built so (Llama; not BERT, whose head size is width / heads).
    """
    raise NotImplementedError


def prune_ffn(
    model: nn.Module,
    ratio: float | Mapping[int, float],
    *,
    criterion: str = "magnitude",
    batches: Iterable | None = None,
    loss_fn: Callable | None = None,
    scope: str = "layer",
    round_to: int = 1,
    fold_bias: bool = False,
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Pruned:
    """A new model without the fraction `ratio` of the neurons of its feed-forward networks, gated ones or not.

    ratio: of every layer's neurons, or {layer: ratio} for some. scope: "layer" removes it from each layer; "global"
    from all layers together, whose scores are divided by their layer's mean first.
    criterion, per neuron j with activation a_j (after the gate), what `down` reads:
    "magnitude": L2 norm of all weights that make and read it, biases included.
    "wanda": sqrt(E[a_j^2]) * |W_down[:, j]| over the valid tokens of batches: what the layer loses without it (after
        Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models, for one weight).
    "taylor": (1/N) sum over examples of |sum over tokens of a_j dl/da_j| (Molchanov et al. 2019, first order), with the
        terms N and the loss of `head_importance`.
    "random": the baseline, by seed.
    round_to: what stays is the nearest multiple of it (64 or 128 suit matrix hardware). fold_bias: adds the mean output
    of the removed neurons over batches, E[a_j] W_down[:, j], to the bias of `down`, after the cut is proved; needs
    batches and a bias. kwargs, check: as in `prune_heads`. InputError for a ratio outside 0 to 1 or one that empties a
    layer. `model` stays as it was.
    """
    raise NotImplementedError


def prune_width(
    model: nn.Module,
    ratio: float,
    *,
    criterion: str = "l2",
    batches: Iterable | None = None,
    loss_fn: Callable | None = None,
    round_to: int = 1,
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Pruned:
    """A new model without the fraction `ratio` of the channels of its residual stream, in every layer the same.

    criterion: of `channels.prune`. Norms then run over fewer channels, which no weight can undo: the proof takes their
    statistics over the kept channels, and `report` says so. InputError where the width is the model's output (a bare
    encoder) or hangs together with what cannot shrink.
    """
    raise NotImplementedError
