"""Structured pruning of transformers: heads, FFN neurons and the hidden width, one call for every family.

A unit is a query head (with grouped-query attention a whole KV group, or as many query heads from every group), an FFN
neuron with its gate, or a channel of the residual stream. Each cut is proved by `equality` on an example input, and the
config says what it can say. Where the parts are is `anatomy`; whole layers are `depth`; nothing is trained here.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from labkit.errors import InputError
from labkit.pruning import anatomy, channels, neurons
from labkit.pruning.anatomy import Attention, FeedForward
from labkit.pruning.channels import Pruned, Units
from labkit.pruning.coupling import Coupling
from labkit.pruning.cuts import cut, inputs_kept, outputs_kept, state_config
from labkit.pruning.heads import head_importance, lowest_heads
from labkit.pruning.pretrained import load, save

__all__ = ["head_importance", "load", "lowest_heads", "prune_ffn", "prune_heads", "prune_width", "save"]


@torch.inference_mode(False)
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
    same heads go from all self-attentions of a stack, or from all cross-attentions. At least one head stays in a layer.
    kwargs: the input that the cut is proved with; by default a small one made from the config. check: False leaves the
    proof out (`report` is None). `model` stays as it was. The new config has the new number of heads where all layers
    have the same and the architecture can be built so (Llama; not BERT, whose head size is width / heads).
    """
    parts = anatomy.attentions(model)
    chosen = _chosen(parts, heads)
    _together(model, parts, chosen)
    kept, attributes, units = {}, {}, []
    left = [(part.heads, part.kv_heads) for part in parts]
    for layer, part in enumerate(parts):
        gone = chosen.get(layer, frozenset())
        units.append(Units(part.output, part.heads, len(gone), part.size))
        if not gone:
            continue
        queries, keys = _heads_left(layer, part, gone)
        left[layer] = len(queries), len(keys)
        kept |= _head_rows(model, part, queries, keys)
        attributes[part.name] = _head_numbers(model.get_submodule(part.name), part.size, *left[layer])
    config = {}
    if len(set(left)) == 1:
        config = {"num_attention_heads": left[0][0], "num_key_value_heads": left[0][1], "head_dim": parts[0].size}
    return cut(model, kept, attributes, tuple(units), kwargs=kwargs, check=check, config=config)


def _chosen(parts: tuple[Attention, ...], heads: Mapping[int, Iterable[int]]) -> dict[int, frozenset[int]]:
    """{layer: heads} without empty ones; InputError for an index that does not exist."""
    if not isinstance(heads, Mapping):
        raise InputError(f"heads is a {type(heads).__name__}, but it must be {{layer: [head, ...]}}.")
    found = {}
    for layer, own in heads.items():
        anatomy.check_index(layer, len(parts), "layer")
        own = frozenset(own)
        for head in own:
            anatomy.check_index(head, parts[layer].heads, f"layer {layer}'s head")
        if len(own) == parts[layer].heads:
            raise InputError(
                f"Layer {layer} would lose all of its {len(own)} heads: leave at least one, or remove the layer with "
                "depth.prune_layers."
            )
        if own:
            found[layer] = own
    if not found:
        raise InputError("heads names no head: give {layer: [head, ...]}, for example of lowest_heads.")
    return found


def _together(model: nn.Module, parts: tuple[Attention, ...], chosen: Mapping[int, frozenset[int]]) -> None:
    """InputError where layers that share position biases (T5) would lose different heads."""
    shared: dict[tuple[str, ...], list[int]] = {}
    for layer, part in enumerate(parts):
        if hasattr(model.get_submodule(part.name), "has_relative_attention_bias"):
            first, *_, kind = part.name.split(".")
            shared.setdefault((first, kind), []).append(layer)
    for layers in shared.values():
        if len({chosen.get(layer, frozenset()) for layer in layers}) > 1:
            raise InputError(
                f"The attentions {layers} share their position biases, head by head: remove the same heads from all of "
                "them."
            )


def _heads_left(layer: int, part: Attention, gone: frozenset[int]) -> tuple[list[int], list[int]]:
    """(query heads, KV heads) that stay; InputError where the KV groups would have different numbers of queries."""
    groups = {
        kv: [h for h in range(kv * part.group, (kv + 1) * part.group) if h not in gone] for kv in range(part.kv_heads)
    }
    stays = {kv: own for kv, own in groups.items() if own}
    if len({len(own) for own in stays.values()}) > 1:
        raise InputError(
            f"Layer {layer} has {part.kv_heads} key-value heads with {part.group} query heads each, of which "
            f"{[len(own) for own in groups.values()]} would stay: remove whole groups (heads h with the same h // "
            f"{part.group}), or the same number of heads from every group that stays."
        )
    return [h for own in stays.values() for h in own], list(stays)


def _head_rows(model: nn.Module, part: Attention, queries: list[int], keys: list[int]) -> dict:
    """What is kept of the projections of one attention."""
    q, kv = _rows(queries, part.size), _rows(keys, part.size)
    kept = inputs_kept(model, part.output, q)
    if part.query == part.value:  # side by side in one matrix
        width = part.heads * part.size
        kept |= outputs_kept(model, part.query, torch.cat([q, width + kv, 2 * width + kv]))
    else:
        for name, rows in ((part.query, q), (part.key, kv), (part.value, kv)):
            kept |= outputs_kept(model, name, rows)
    if part.bias:
        kept[f"{part.bias}.weight"] = {1: torch.tensor(queries)}
    return kept


def _rows(heads: list[int], size: int) -> Tensor:
    """Indices of the channels of these heads, which lie side by side: [heads * size]"""
    return (torch.tensor(heads)[:, None] * size + torch.arange(size)).flatten()


def _head_numbers(module: nn.Module, size: int, heads: int, kv_heads: int) -> dict[str, int]:
    """New values of the numbers that an attention has written down, under the names that families give them."""
    numbers = {
        "num_heads": heads,
        "num_attention_heads": heads,
        "n_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_key_value_groups": heads // kv_heads,
        "all_head_size": heads * size,
        "inner_dim": heads * size,
        "split_size": heads * size,
    }
    return {name: value for name, value in numbers.items() if name in vars(module)}


@torch.inference_mode(False)
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
    parts = anatomy.feed_forwards(model)
    removed = neurons.removed(model, parts, ratio, criterion, batches, loss_fn, scope, round_to, seed)
    means = neurons.means(model, parts, batches) if fold_bias else None
    kept, units = {}, []
    for part, gone in zip(parts, removed, strict=True):
        units.append(Units(part.up, part.neurons, int(gone.sum()), 1))
        if gone.any():
            kept |= _neuron_rows(model, part, (~gone).nonzero().squeeze(1))
    widths = {row.left for row in units}
    config = {name: widths.pop()} if len(widths) == 1 and (name := _width_name(model)) else {}
    found = cut(model, kept, {}, tuple(units), kwargs=kwargs, check=check, config=config)
    if means is not None:
        neurons.fold_(found.model, model, parts, removed, means)
    return found


def _neuron_rows(model: nn.Module, part: FeedForward, left: Tensor) -> dict:
    kept = outputs_kept(model, part.up, left) | inputs_kept(model, part.down, left)
    return kept | outputs_kept(model, part.gate, left) if part.gate else kept


def _width_name(model: nn.Module) -> str | None:
    """What this model's config calls the number of neurons."""
    names = ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff")
    return next((name for name in names if hasattr(getattr(model, "config", None), name)), None)


@torch.inference_mode(False)
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
    kwargs = anatomy.example(model) if kwargs is None else dict(kwargs)
    group = _residual(model, kwargs)
    options = dict(criterion=criterion, round_to=round_to, batches=batches, loss_fn=loss_fn, seed=seed)
    plan = channels.plan(model, (), kwargs, ratio={group: ratio}, **options)
    found = channels.apply(model, plan, (), kwargs, check=check)
    width = next(row.left for row in plan.units if row.name == group)
    parts = anatomy.anatomy(model).attentions
    size = {"head_dim": parts[0].size} if parts else {}
    state_config(found.model, {"hidden_size": width, **size})
    return found


def _residual(model: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """The name of the group of channels that the first and the last layer read."""
    parts = anatomy.feed_forwards(model)
    wanted = {f"{parts[0].up}.weight", f"{parts[-1].up}.weight"}
    coupling = Coupling.of(model, (), kwargs)
    for group in coupling.groups:
        if wanted <= {member.name for member in group.members if member.role == "reads"}:
            return group.name
    why = dict(coupling.unprunable).get(f"{parts[0].up}.weight dimension 1", "it hangs together as one")
    raise InputError(
        f"The hidden width of {type(model).__name__} cannot shrink ({why}): take a model with a head on top, or prune "
        "heads, neurons or layers."
    )
