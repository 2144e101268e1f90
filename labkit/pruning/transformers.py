"""Structured pruning of transformers: attention heads and FFN neurons, with the same call for every family of models.

A unit is an attention head or an FFN neuron with its gate. With grouped-query attention (GQA) a unit is a KV head with
its query heads; single query heads can go too, the same number from every group. Each cut is proved by `equality` on an
example input, and the config gets the new sizes if it can express them. `depth` removes whole layers. Training is left
to the caller.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.arguments import check_mapping, check_several, seeded
from labkit.data.models import quietly
from labkit.errors import InputError, check_choice, check_index, check_whole
from labkit.graph import anatomy
from labkit.graph.anatomy import Attention, FeedForward
from labkit.graph.groups import Coupling
from labkit.graph.surgery import Plan, Pruned
from labkit.modules.batches import check_batches
from labkit.pruning import channels
from labkit.pruning.heads import head_importance, lowest_heads
from labkit.pruning.scores import LossFn, input_squares, input_taylor, norms
from labkit.pruning.select import count_to_prune, fraction, lowest_k

__all__ = ["head_importance", "lowest_heads", "prune_ffn", "prune_heads"]

CRITERIA = ("magnitude", "wanda", "taylor", "random")
WIDTHS = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff")  # in configs

# --- heads ------------------------------------------------------------------------------------------------------------


@torch.inference_mode(False)
def prune_heads(
    model: nn.Module,
    heads: Mapping[int, Iterable[int]],
    *,
    kwargs: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Pruned:
    """Return a copy of `model` without the query heads in `heads`.

    heads: {layer: [head, ...]}, layers and heads counted from 0, as in `head_importance`. At least a single head stays
        in a layer. With grouped-query attention remove whole KV groups (all query heads h with the same h // group
        size) with keys, values and cache, or the same number of query heads from every remaining group, or whole
        groups and heads. Layers with shared position biases (T5) lose the same heads.
    kwargs: input for the trace and the proof; by default a small input made from the config.
    check: False leaves the proof out (`report` is empty).

    The new config has the new number of heads if all layers have the same number and the architecture can be built so
    (Llama can; BERT cannot, because the head size is width / heads). Raises InputError for unknown heads and for heads
    tied to layers outside the attention, and EqualityError if the proof fails.
    """
    kwargs = anatomy.called_with(model, kwargs)
    coupling, attentions, cuts = _trace_heads(model, heads, kwargs)
    units = _units_to_remove(coupling, cuts)
    query_heads = _labels_of_query_heads(coupling, cuts)
    plan = channels.plan_units(model, coupling, units, query_heads)
    plan = _with_head_counts(model, plan, cuts)
    pruned = channels.apply(model, plan, (), kwargs, check=check)
    _update_head_config(model, pruned.model, attentions, cuts)
    return pruned


@dataclass(frozen=True)
class _HeadCut:
    """Removed and remaining heads of an attention.

    group: number of the coupling's group; the units of the group are the attention's heads, or KV heads.
    table: the query heads of each unit.
    remaining: the remaining query heads of each unit.
    """

    attention: Attention
    group: int
    table: list[list[int]]
    remaining: list[list[int]]

    @property
    def heads(self) -> int:
        """Count the remaining query heads."""
        return sum(len(heads) for heads in self.remaining)

    @property
    def units(self) -> int:
        """Count the units with remaining query heads."""
        return sum(len(heads) > 0 for heads in self.remaining)

    @property
    def narrows(self) -> bool:
        """Return True if a remaining unit loses query heads."""
        return self.heads < self.units * len(self.table[0])


HeadTrace = tuple[Coupling, tuple[Attention, ...], list[_HeadCut]]


def _trace_heads(
    model: nn.Module,
    heads: Mapping[int, Iterable[int]],
    kwargs: Mapping[str, Any],
) -> HeadTrace:
    """Trace the model, and return the coupling, all attentions, and a cut for each attention that loses heads."""
    try:
        return _trace_cuts(model, heads, kwargs, whole_heads=True)
    except InputError as error:
        # With whole_heads, a dimension that is first split in queries, keys and values would lose all heads or none.
        try:
            return _trace_cuts(model, heads, kwargs, whole_heads=False)
        except InputError:
            raise error from None


def _trace_cuts(
    model: nn.Module,
    heads: Mapping[int, Iterable[int]],
    kwargs: Mapping[str, Any],
    whole_heads: bool,
) -> HeadTrace:
    coupling = Coupling.of(model, (), kwargs, whole_heads=whole_heads)
    attentions = anatomy.attentions_in(model, coupling.record)
    removed = _checked_heads(attentions, heads)
    cuts = [_head_cut(coupling, layer, attentions[layer], removed_heads) for layer, removed_heads in removed.items()]
    _check_shared_biases(coupling, attentions, cuts, removed)
    return coupling, attentions, cuts


def _checked_heads(attentions: Sequence[Attention], heads: Mapping[int, Iterable[int]]) -> dict[int, frozenset[int]]:
    """Return {layer: heads to remove} without empty entries; raise InputError for an unknown layer or head."""
    check_mapping(heads, "heads", "layer: [head, ...]")
    removed = {}
    for layer, numbers in heads.items():
        check_index(layer, len(attentions), "layer")
        check_several(numbers, f"heads[{layer}]")
        numbers = list(numbers)
        for head in numbers:
            check_index(head, attentions[layer].heads, f"layer {layer}'s head")
        removed_heads = frozenset(numbers)
        if len(removed_heads) == attentions[layer].heads:
            raise InputError(
                f"Layer {layer} would lose all of its {len(removed_heads)} heads: leave at least one, or remove the "
                "layer with depth.prune_layers."
            )
        removed[int(layer)] = removed_heads
    if not any(removed.values()):
        raise InputError("heads names no head: give {layer: [head, ...]}, for example of lowest_heads.")
    return {layer: layer_heads for layer, layer_heads in removed.items() if layer_heads}


def _head_cut(
    coupling: Coupling,
    layer: int,
    attention: Attention,
    removed_heads: frozenset[int],
) -> _HeadCut:
    """Return the cut of an attention without `removed_heads`.

    Raises InputError if heads of the layer are no units, or remaining units would keep different numbers of heads.
    """
    classes = _classes_of_heads(coupling, attention)
    group = _group_of_classes(coupling, classes)
    if group is None:
        reasons = [coupling.reasons[c] for c in classes if coupling.reasons.get(c)]
        reason = reasons[0] if reasons else "its heads hang together as one unit"
        raise InputError(f"No head of layer {layer} ({attention.name}) can be removed: {reason}.")
    table = []
    for unit_class in coupling.unit_classes[group]:
        table.append([head for head in range(attention.heads) if classes[head] == unit_class])
    remaining = [[head for head in heads if head not in removed_heads] for heads in table]
    counts = [len(heads) for heads in remaining]
    if len({count for count in counts if count}) > 1:
        group_size = len(table[0])
        raise InputError(
            f"Layer {layer} has {len(table)} key-value heads with {group_size} query heads each, of which "
            f"{counts} would stay: remove whole groups (heads h with the same h // "
            f"{group_size}), or the same number of heads from every group that stays."
        )
    return _HeadCut(attention, group, table, remaining)


def _classes_of_heads(coupling: Coupling, attention: Attention) -> list[int | None]:
    """Return the coupling's class of each query head, None for all heads if the trace has no labels for heads."""
    if attention.labels is None:
        return [None] * attention.heads
    return coupling.classes[attention.labels].tolist()


def _group_of_classes(coupling: Coupling, classes: Sequence[int | None]) -> int | None:
    """Return the number of the group with all `classes` among its units, None without a fitting group."""
    for number, unit_classes in enumerate(coupling.unit_classes):
        if set(classes) <= set(unit_classes.tolist()):
            return number
    return None


def _check_shared_biases(
    coupling: Coupling,
    attentions: Sequence[Attention],
    cuts: Sequence[_HeadCut],
    removed: Mapping[int, frozenset[int]],
) -> None:
    """Raise InputError if layers with shared position biases (T5), so heads of the same group, lose different heads."""
    for group in {cut.group for cut in cuts}:
        unit_classes = set(coupling.unit_classes[group].tolist())
        sharing = []
        for layer, attention in enumerate(attentions):
            if _classes_of_heads(coupling, attention)[0] in unit_classes:
                sharing.append(layer)
        if len({removed.get(layer) for layer in sharing}) > 1:
            raise InputError(
                f"The attentions {sharing} share their position biases, head by head: remove the same heads from all "
                "of them."
            )


def _units_to_remove(coupling: Coupling, cuts: Sequence[_HeadCut]) -> dict[str, list[int]]:
    """Return {name of the group: units without remaining heads}, also for linked groups with as many units."""
    clusters = coupling.clusters()
    units = {}
    for cut in cuts:
        removed = [unit for unit, heads in enumerate(cut.remaining) if not heads]
        (cluster,) = [cluster for cluster in clusters if cut.group in cluster]
        for number in cluster:
            group = coupling.groups[number]
            if group.units == len(cut.table):
                units[group.name] = removed
    return units


def _labels_of_query_heads(coupling: Coupling, cuts: Sequence[_HeadCut]) -> np.ndarray:
    """Return [labels], bool, True for query heads that go from remaining KV heads.

    A unit of the coupling is a KV head with all query heads of the group. Single query heads are therefore removed by
    label: the rows of the query projection, and the columns of the output projection.
    """
    gone = np.zeros(len(coupling.classes), dtype=bool)
    first_label = {(axis.name, axis.dim): axis.base for axis in coupling.record.axes}
    for cut in cuts:
        if not cut.narrows:
            continue
        n_heads, size = len(cut.table[0]), cut.attention.size  # query heads of a unit, channels of a head
        members = coupling.groups[cut.group].members
        if not {len(member.indices(0)) for member in members} <= {size, n_heads * size}:
            raise InputError(
                f"{cut.attention.name} holds queries, keys and values in one matrix: remove whole groups of "
                f"{n_heads} query heads."
            )
        of_queries = [member for member in members if len(member.indices(0)) == n_heads * size]
        for member in of_queries:
            for unit, heads in enumerate(cut.table):
                head_goes = [head not in cut.remaining[unit] for head in heads]
                indices = member.indices(unit).view(n_heads, size)[head_goes]
                gone[first_label[member.name, member.dim] + indices.numpy()] = True
    return gone


def _with_head_counts(model: nn.Module, plan: Plan, cuts: Sequence[_HeadCut]) -> Plan:
    """Extend the plan to update the attributes in which attentions count heads.

    The trace finds most of the attributes, but not a count never used as a size in the forward pass.
    """
    attributes = {name: dict(values) for name, values in plan.attributes.items()}
    for cut in cuts:
        name, heads_before = cut.attention.name, cut.attention.heads
        current = vars(model.get_submodule(name))
        new = {}
        for attribute in ("num_heads", "num_attention_heads"):
            if current.get(attribute) == heads_before:
                new[attribute] = cut.heads
        group_size = current.get("num_key_value_groups")
        if group_size:
            kv_heads = heads_before // group_size
            units_are_kv_heads = kv_heads == len(cut.table)  # with a single KV head the units are query heads
            new["num_key_value_groups"] = cut.heads // (cut.units if units_are_kv_heads else kv_heads)
        for attribute, value in new.items():
            if value != current[attribute]:
                attributes.setdefault(name, {})[attribute] = value
    return replace(plan, attributes=attributes)


def _update_head_config(
    model: nn.Module,
    pruned_model: nn.Module,
    attentions: Sequence[Attention],
    cuts: Sequence[_HeadCut],
) -> None:
    """Put the new number of heads in the config of `pruned_model` if all attentions have the same number of heads."""
    counts = {(cut.heads, cut.units) for cut in cuts}
    if not hasattr(model, "config") or len(cuts) < len(attentions) or len(counts) > 1:
        return
    ((heads, units),) = counts
    sizes = {"num_attention_heads": heads, "head_dim": attentions[0].size}
    if getattr(model.config, "num_key_value_heads", None) == len(cuts[0].table):
        sizes["num_key_value_heads"] = units
    _update_config(pruned_model, sizes)


# --- FFN neurons ------------------------------------------------------------------------------------------------------


@torch.inference_mode(False)
def prune_ffn(
    model: nn.Module,
    ratio: float,
    *,
    criterion: str = "magnitude",
    batches: Iterable | None = None,
    loss_fn: LossFn | None = None,
    round_to: int = 1,
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Pruned:
    """Return a copy of `model` without the fraction `ratio` of every layer's FFN neurons, gated or not.

    ratio: fraction of the neurons to remove, from 0 to 1; at least a single neuron stays in each layer.
    criterion: for neuron j with activation a_j (after the gate), the input of the down projection:
        "magnitude": L2 norm of all weights that make and read the neuron, biases included.
        "wanda": sqrt(E[a_j^2]) * |W_down[:, j]| over the valid tokens of batches: the change of the layer's output
            without the neuron (Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models, for
            a single weight).
        "taylor": (1/N) sum over examples of |sum over tokens of a_j dl/da_j| (Molchanov et al. 2019, first order), with
            the terms N and the loss of `head_importance`.
        "random": the baseline.
    batches: input of `model`, read once; needed for "wanda" and "taylor".
    loss_fn: as in `head_importance`, for "taylor".
    seed: seed of "random".
    round_to: the remaining neurons are rounded to the nearest multiple (64 or 128 suit matrix hardware).
    kwargs, check: as in `prune_heads`.

    Raises InputError for a bad argument or a model whose neurons cannot go, EqualityError if the proof fails.
    """
    fraction(ratio, "ratio")
    check_choice(criterion, CRITERIA, "criterion")
    check_whole(round_to, "round_to")
    if criterion in ("wanda", "taylor"):
        check_batches(batches, criterion)
    kwargs = anatomy.called_with(model, kwargs)
    coupling = Coupling.of(model, (), kwargs)
    networks = anatomy.feed_forwards(model, coupling)
    neuron_scores = _neuron_scores(model, coupling, networks, criterion, batches, loss_fn, seed)
    units, widths = {}, set()
    for network, scores in zip(networks, neuron_scores, strict=True):
        n_removed = _neurons_to_remove(len(scores), ratio, round_to, network.down)
        group = coupling.groups[network.group]
        units[group.name] = lowest_k(scores, n_removed).nonzero().flatten().tolist()
        widths.add(len(scores) - n_removed)
    plan = channels.plan_units(model, coupling, units)
    pruned = channels.apply(model, plan, (), kwargs, check=check)
    if len(widths) == 1:
        _update_width_config(model, pruned.model, widths.pop())
    return pruned


def _neurons_to_remove(
    neurons: int,
    ratio: float,
    round_to: int,
    down: str,
) -> int:
    """Return how many of `neurons` go; raise InputError, naming the down projection `down`, if no neuron would stay."""
    removed = count_to_prune(neurons, ratio)
    if removed == neurons:
        raise InputError(f"A ratio of {ratio} leaves none of the {neurons} neurons of {down}: give less.")
    if removed and round_to > 1:
        multiples = max(math.floor((neurons - removed) / round_to + 0.5), 1)
        removed = neurons - min(multiples * round_to, neurons)
    return removed


def _neuron_scores(
    model: nn.Module,
    coupling: Coupling,
    networks: Sequence[FeedForward],
    criterion: str,
    batches: Iterable | None,
    loss_fn: LossFn | None,
    seed: int,
) -> list[Tensor]:
    """Score the neurons of each feed-forward network by a criterion of `prune_ffn`: [neurons] each, on the CPU."""
    groups = [coupling.groups[network.group] for network in networks]
    downs = [network.down for network in networks]
    if criterion == "random":
        generator = seeded(seed)
        return [torch.rand(group.units, generator=generator, dtype=torch.float64) for group in groups]
    weights = {name for name, _ in model.named_parameters()}
    experts = weights & set(downs)
    if criterion != "magnitude" and experts:
        raise InputError(
            f"Criterion {criterion!r} looks at what a linear module reads, and {min(experts)} belongs to none: take "
            "magnitude or random."
        )
    if criterion == "taylor":
        neurons = {down: group.units for down, group in zip(downs, groups, strict=True)}
        return input_taylor(model, neurons, batches, loss_fn)
    makers_and_readers, readers = {}, {}
    for number, group in enumerate(groups):
        members = [member for member in group.members if member.name in weights]
        makers_and_readers[number] = members
        readers[number] = [member for member in members if member.role == "reads"]
    if criterion == "magnitude":
        return list(norms(model, groups, makers_and_readers).values())
    column_norms = norms(model, groups, readers).values()
    squares = input_squares(model, downs, batches)
    return [norm * square.sqrt() for norm, square in zip(column_norms, squares, strict=True)]


def _update_width_config(model: nn.Module, pruned_model: nn.Module, width: int) -> None:
    """Put the new FFN width in the config of `pruned_model`, under the first name of WIDTHS in the config."""
    config = getattr(model, "config", None)
    names = [name for name in WIDTHS if hasattr(config, name)]
    if names:
        _update_config(pruned_model, {names[0]: width})


# --- the config -------------------------------------------------------------------------------------------------------


def _update_config(model: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Put `sizes` in the config of `model` if a model built from the new config has the architecture of `model`.

    Shapes are compared, and float attributes that a config derives from a size: Gemma scales embeddings by the root of
    the width, which a narrower model would do otherwise.
    """
    config = copy.deepcopy(model.config)
    try:
        config.update(sizes)
        with quietly(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            fresh = type(model)(config)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError):
        return  # the architecture cannot be built so
    if _shapes(fresh) == _shapes(model) and _factors(fresh) == _factors(model):
        for config in anatomy.configs(model):
            config.update(sizes)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _factors(model: nn.Module) -> dict[str, float]:
    """Return {attribute of a module: value} for all float attributes that are not private."""
    factors = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) is float and not name.startswith("_"):
                factors[f"{path}.{name}"] = value
    return factors
