"""Structured pruning of transformers: heads and FFN neurons, as units of `channels`, one call for every family.

A unit is a query head (with grouped-query attention a whole KV group, or as many query heads of every group), or an FFN
neuron with its gate. Each cut is proved by `equality` on an example input, and the config gets the new sizes where it
can express them. Whole layers are `depth`; nothing is trained here.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from labkit.arguments import check_mapping, check_several, seeded
from labkit.data.models import quietly
from labkit.errors import InputError, check_choice, check_whole
from labkit.graph import anatomy
from labkit.graph.anatomy import Attention, FeedForward
from labkit.graph.groups import Coupling
from labkit.graph.surgery import Plan, Pruned
from labkit.modules.batches import check_batches
from labkit.pruning import channels
from labkit.pruning.heads import head_importance, lowest_heads
from labkit.pruning.scores import input_squares, input_taylor, norms
from labkit.pruning.select import count_to_prune, fraction, lowest_k

__all__ = ["head_importance", "lowest_heads", "prune_ffn", "prune_heads"]

CRITERIA = ("magnitude", "wanda", "taylor", "random")


@torch.inference_mode(False)
def prune_heads(
    model: nn.Module,
    heads: Mapping[int, Iterable[int]],
    *,
    kwargs: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Pruned:
    """A new model without the given query heads. `model` stays as it was.

    heads: {layer: [head, ...]}, both counted from 0, as in `head_importance`. At least one head stays in a layer. With
        grouped-query attention, layer by layer: whole KV groups (all query heads h with the same h // group), which
        takes their keys, values and cache along; or the same number of query heads from every group that stays; or
        both. Layers that share position biases (T5) lose the same heads.
    kwargs: the input that the model is traced and proved with; None makes a small one from the config.
    check: False leaves the proof out (`report` is None).

    The new config has the new number of heads where all layers have the same and the architecture can be built so
    (Llama; not BERT, whose head size is width / heads). Raises InputError for heads that do not exist or cannot go, and
    EqualityError if the proof fails.
    """
    kwargs = anatomy.called_with(model, kwargs)
    try:
        coupling, parts, cuts = _cuts(model, heads, kwargs, whole_heads=True)
    except InputError as error:
        try:  # a dimension that is split in queries, keys and values first would lose all heads or none
            coupling, parts, cuts = _cuts(model, heads, kwargs, whole_heads=False)
        except InputError:
            raise error from None
    units, clusters = {}, coupling.clusters()
    for cut in cuts:  # and as many of what only goes along with heads
        cluster = next(cluster for cluster in clusters if cut.group in cluster)
        alike = [group for i in cluster if (group := coupling.groups[i]).units == len(cut.stay)]
        units |= {group.name: [u for u, row in enumerate(cut.stay) if not row] for group in alike}
    plan = _numbered(model, _narrowed(model, channels.plan_units(model, coupling, units), cuts), cuts)
    pruned = channels.apply(model, plan, (), kwargs, check=check)
    if hasattr(model, "config") and len(cuts) == len(parts) and len({(c.heads, c.units) for c in cuts}) == 1:
        new = {"num_attention_heads": cuts[0].heads, "head_dim": parts[0].size}
        if getattr(model.config, "num_key_value_heads", None) == len(cuts[0].table):
            new["num_key_value_heads"] = cuts[0].units
        _state_config(pruned.model, new)
    return pruned


@dataclass(frozen=True)
class _Cut:
    """What happens to one attention: its group in the coupling, the query heads of each unit, and those that stay."""

    part: Attention
    group: int
    table: list[list[int]]
    stay: list[list[int]]

    @property
    def heads(self) -> int:
        return sum(map(len, self.stay))

    @property
    def units(self) -> int:
        return sum(map(bool, self.stay))

    @property
    def narrows(self) -> bool:
        """Whether units that stay lose some of their query heads."""
        return self.heads < self.units * len(self.table[0])


def _cuts(
    model: nn.Module, heads: Mapping[int, Iterable[int]], kwargs: Mapping[str, Any], whole_heads: bool
) -> tuple[Coupling, tuple[Attention, ...], list[_Cut]]:
    """The trace, its attentions, and what happens to those that lose heads."""
    coupling = Coupling.of(model, (), kwargs, whole_heads=whole_heads)
    parts = anatomy.attentions(model, coupling.record)
    removed = _removed(parts, heads)
    cuts = [_cut(coupling, layer, parts[layer], gone) for layer, gone in removed.items()]
    _check_shared(coupling, parts, cuts, removed)
    return coupling, parts, cuts


def _removed(parts: Sequence[Attention], heads: Mapping[int, Iterable[int]]) -> dict[int, frozenset[int]]:
    """{layer: heads} without empty ones; InputError for an index that does not exist."""
    check_mapping(heads, "heads", "layer: [head, ...]")
    removed = {}
    for layer, gone in heads.items():
        anatomy.check_index(layer, len(parts), "layer")
        check_several(gone, f"heads[{layer}]")
        gone = list(gone)
        for head in gone:
            anatomy.check_index(head, parts[layer].heads, f"layer {layer}'s head")
        removed[int(layer)] = gone = frozenset(gone)
        if len(gone) == parts[layer].heads:
            raise InputError(
                f"Layer {layer} would lose all of its {len(gone)} heads: leave at least one, or remove the layer with "
                "depth.prune_layers."
            )
    if not any(removed.values()):
        raise InputError("heads names no head: give {layer: [head, ...]}, for example of lowest_heads.")
    return {layer: gone for layer, gone in removed.items() if gone}


def _cut(coupling: Coupling, layer: int, part: Attention, gone: frozenset[int]) -> _Cut:
    """InputError where the heads of the layer are no units, or units that stay would have different numbers of them."""
    classes = [None] * part.heads if part.labels is None else coupling.classes[part.labels].tolist()
    group = next((i for i, roots in enumerate(coupling.roots) if set(classes) <= set(roots.tolist())), None)
    if group is None:
        reason = next(filter(None, map(coupling.reasons.get, classes)), "its heads hang together as one unit")
        raise InputError(f"No head of layer {layer} ({part.name}) can be removed: {reason}.")
    table = [[h for h in range(part.heads) if classes[h] == root] for root in coupling.roots[group]]
    stay = [[head for head in row if head not in gone] for row in table]
    if len({len(row) for row in stay if row}) > 1:
        raise InputError(
            f"Layer {layer} has {len(table)} key-value heads with {len(table[0])} query heads each, of which "
            f"{[len(row) for row in stay]} would stay: remove whole groups (heads h with the same h // "
            f"{len(table[0])}), or the same number of heads from every group that stays."
        )
    return _Cut(part, group, table, stay)


def _check_shared(coupling: Coupling, parts: Sequence[Attention], cuts: Sequence[_Cut], removed: Mapping) -> None:
    """InputError where layers whose heads are one group (T5's share position biases) would lose different heads."""
    for group in {cut.group for cut in cuts}:
        roots = set(coupling.roots[group].tolist())
        layers = [i for i, p in enumerate(parts) if p.labels is not None and coupling.classes[p.labels[0]] in roots]
        if len({removed.get(layer) for layer in layers}) > 1:
            raise InputError(
                f"The attentions {layers} share their position biases, head by head: remove the same heads from all of "
                "them."
            )


def _narrowed(model: nn.Module, plan: Plan, cuts: Sequence[_Cut]) -> Plan:
    """The plan that also removes query heads of KV groups whose keys and values stay: no unit of the coupling does."""
    narrowing = [cut for cut in cuts if cut.narrows]
    if not narrowing:
        return plan
    coupling, gone = plan.coupling, plan.gone.copy()
    base = {(axis.name, axis.dim): axis.base for axis in coupling.record.axes}
    for cut in narrowing:
        n, size = len(cut.table[0]), cut.part.size
        members = coupling.groups[cut.group].members
        if not {len(member.indices(0)) for member in members} <= {size, n * size}:
            raise InputError(
                f"{cut.part.name} holds queries, keys and values in one matrix: remove whole groups of {n} query heads."
            )
        for member in (m for m in members if len(m.indices(0)) == n * size):  # queries, and what reads their results
            for unit, heads in enumerate(cut.table):
                rows = member.indices(unit).view(n, size)[[head not in cut.stay[unit] for head in heads]]
                gone[base[member.name, member.dim] + rows.numpy()] = True
    return channels.plan_labels(model, coupling, gone, plan.units)


def _numbered(model: nn.Module, plan: Plan, cuts: Sequence[_Cut]) -> Plan:
    """The plan with numbers of heads that attentions have written down, where sizes in a trace may not show them."""
    attributes = {name: dict(values) for name, values in plan.attributes.items()}
    for cut in cuts:
        values, before = vars(model.get_submodule(cut.part.name)), cut.part.heads
        new = {name: cut.heads for name in ("num_heads", "num_attention_heads") if values.get(name) == before}
        if group := values.get("num_key_value_groups"):
            kv_heads = before // group  # the units, but for a single one: then query heads are
            new["num_key_value_groups"] = cut.heads // (cut.units if kv_heads == len(cut.table) else kv_heads)
        if new := {name: value for name, value in new.items() if value != values[name]}:
            attributes[cut.part.name] = attributes.get(cut.part.name, {}) | new
    return replace(plan, attributes=attributes)


@torch.inference_mode(False)
def prune_ffn(
    model: nn.Module,
    ratio: float,
    *,
    criterion: str = "magnitude",
    batches: Iterable | None = None,
    loss_fn: Callable | None = None,
    round_to: int = 1,
    seed: int = 0,
    kwargs: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Pruned:
    """A new model without the fraction `ratio` of every layer's FFN neurons, gated or not. `model` stays as it was.

    ratio: from 0 to 1; at least one neuron stays.
    criterion: per neuron j with activation a_j (after the gate), what the down projection reads:
        "magnitude": L2 norm of all weights that make and read it, biases included.
        "wanda": sqrt(E[a_j^2]) * |W_down[:, j]| over the valid tokens of batches: what the layer loses without it (Sun
            et al. 2023, A Simple and Effective Pruning Approach for Large Language Models, for one weight).
        "taylor": (1/N) sum over examples of |sum over tokens of a_j dl/da_j| (Molchanov et al. 2019, first order), with
            the terms N and the loss of `head_importance`.
        "random": the baseline.
    batches: read once; needed for "wanda" and "taylor". loss_fn: as in `head_importance`, for "taylor".
    round_to: what stays is the nearest multiple of it (64 or 128 suit matrix hardware).
    seed: of "random". kwargs, check: as in `prune_heads`.

    Raises InputError for a bad argument or a model whose neurons cannot go, EqualityError if the proof fails.
    """
    fraction(ratio, "ratio")
    check_choice(criterion, CRITERIA, "criterion")
    check_whole(round_to, "round_to")
    if criterion in ("wanda", "taylor"):
        check_batches(batches, criterion)
    kwargs = anatomy.called_with(model, kwargs)
    coupling = Coupling.of(model, (), kwargs)
    parts = anatomy.feed_forwards(model, coupling)
    units, widths = {}, set()
    for part, scores in zip(
        parts, _neuron_scores(model, coupling, parts, criterion, batches, loss_fn, seed), strict=True
    ):
        n = count_to_prune(len(scores), ratio)
        if n == len(scores):
            raise InputError(f"A ratio of {ratio} leaves none of the {n} neurons of {part.down}: give less.")
        if n and round_to > 1:
            steps = max(math.floor((len(scores) - n) / round_to + 0.5), 1)
            n = len(scores) - min(steps * round_to, len(scores))
        units[coupling.groups[part.group].name] = lowest_k(scores, n).nonzero().flatten().tolist()
        widths.add(len(scores) - n)
    pruned = channels.apply(model, channels.plan_units(model, coupling, units), (), kwargs, check=check)
    names = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "hidden_dim", "d_ff")  # in configs
    name = next((name for name in names if hasattr(getattr(model, "config", None), name)), None)
    if name and len(widths) == 1:
        _state_config(pruned.model, {name: widths.pop()})
    return pruned


def _neuron_scores(
    model: nn.Module, coupling: Coupling, parts: Sequence[FeedForward], criterion: str, batches, loss_fn, seed: int
) -> list[Tensor]:
    """For each network [neurons] on the CPU, higher is more important; see `prune_ffn`."""
    groups, downs = [coupling.groups[part.group] for part in parts], [part.down for part in parts]
    if criterion == "random":
        generator = seeded(seed)
        return [torch.rand(group.units, generator=generator, dtype=torch.float64) for group in groups]
    weights = {name for name, _ in model.named_parameters()}
    if criterion != "magnitude" and (experts := weights & set(downs)):
        raise InputError(
            f"Criterion {criterion!r} looks at what a linear module reads, and {min(experts)} belongs to none: take "
            "magnitude or random."
        )
    members = {i: [m for m in group.members if m.name in weights] for i, group in enumerate(groups)}
    if criterion == "magnitude":
        return list(norms(model, groups, members).values())
    if criterion == "taylor":
        return input_taylor(
            model, {part.down: group.units for part, group in zip(parts, groups, strict=True)}, batches, loss_fn
        )
    reads = norms(model, groups, {i: [m for m in held if m.role == "reads"] for i, held in members.items()})
    squares = input_squares(model, downs, batches)
    return [norm * square.sqrt() for norm, square in zip(reads.values(), squares, strict=True)]


# --- the config -------------------------------------------------------------------------------------------------------


def _state_config(model: nn.Module, new: Mapping[str, Any]) -> None:
    """Puts `new` in the config of `model` if the architecture that it then describes is the model's.

    That is, it has its shapes, and the same factors where a config makes them from a size (Gemma scales embeddings by
    the root of the width, which a narrower model would do otherwise).
    """
    candidate = copy.deepcopy(model.config)
    try:
        candidate.update(new)
        with quietly(), torch.random.fork_rng(devices=[]), torch.device("meta"):
            fresh = type(model)(candidate)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError):
        return  # the architecture cannot be built so
    if _traits(fresh) == _traits(model):
        for config in anatomy.configs(model):
            config.update(new)


def _traits(model: nn.Module) -> tuple[dict[str, torch.Size], dict[str, float]]:
    """({parameter: shape}, {attribute of a module: value, where it is a float})"""
    factors = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is float and not name.startswith("_")
    }
    return {name: x.shape for name, x in model.named_parameters()}, factors
