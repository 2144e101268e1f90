"""Coupled channels: groups of parameter entries to be removed as a unit, found by tracing.

A layer makes a channel and the next layer reads the channel; a residual sum ties the channels of two layers; a head has
rows and columns in four matrices. `trace` runs a model without computing, and returns the groups:

>>> import torch
>>> from torch import nn
>>> from labkit.graph.groups import trace
>>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
>>> (group,) = trace(model, torch.zeros(1, 4))
>>> print(group)
0.weight: 8 units in 3 dimensions
>>> [(member.name, member.dim, member.role) for member in group.members]
[('0.weight', 0, 'makes'), ('0.bias', 0, 'makes'), ('2.weight', 1, 'reads')]

No unit is ranked or removed: `channels` chooses units, `surgery` removes the choice. `Coupling` is the full result of a
trace: the groups, the reasons for which all remaining entries stay, and the meaning of a choice of units for every
parameter. The second half of the file is a search (`fit`): a forward pass may have sizes written down as numbers, and
trials find a hypothesis under which the cut model runs.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.arguments import arguments
from labkit.errors import InputError
from labkit.graph import tracing
from labkit.graph.attributes import CONFIG, Follows, Keep, NewSize, new_attributes, new_sizes, written
from labkit.graph.fits import Mismatch, trial
from labkit.graph.labels import components
from labkit.graph.passes import collecting_later, unchanged
from labkit.graph.record import Record
from labkit.graph.units import Cluster, Group, Member, failing, group_units, place_of
from labkit.modules.batches import placed

__all__ = ["Coupling", "Group", "Member", "arguments", "failing", "trace"]

BRANCHES = 2  # numbers that are tried further at each step of the search for numbers
UNSURE = 5  # numbers of a module of which all combinations are tried


def trace(model: nn.Module, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> list[Group]:
    """Find the groups of `model(*args, **kwargs)`: entries of parameters and buffers to be removed together.

    No value is read or computed, no weight is copied, and the model is left as before: the pass runs on a copy. All
    sizes of the input and of the output are fixed, the batch among them.

    args: the example input, a tuple; a single tensor is taken as the only argument.
    kwargs: the named arguments of the example.
    Raises InputError if the model does not run on the example, if the forward pass depends on values, if the output
    holds no number to be compared (`returned.outputs`), or if no group is free.
    """
    return list(Coupling.of(model, args, kwargs).groups)


@dataclass(eq=False)
class Coupling:
    """The result of a trace, ready to tell the meaning of a choice of units for every parameter.

    record: record of the traced call.
    classes: [labels], the class of every label; labels of a class go together.
    reasons: {class: reason} of the classes to stay.
    groups: the groups of units.
    unit_classes: for each group, [units], the class of each unit.
    follows: exceptions from the rule by which numbers follow sizes (`attributes.new_attributes`).
    """

    record: Record
    classes: np.ndarray
    reasons: Mapping[int, str]
    groups: tuple[Group, ...]
    unit_classes: tuple[np.ndarray, ...]
    follows: Follows = field(default_factory=dict)

    @classmethod
    @torch.inference_mode(False)  # tensors made here outlive the caller's mode
    @collecting_later()
    def of(
        cls, model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None, **options: bool
    ) -> "Coupling":
        """Trace a model, and find a hypothesis about numbers under which the cut model runs (`fit`).

        args, kwargs: the example input, as for `trace`.
        options: within_groups, the units of a grouped convolution are the same channels of every group, not whole
        groups; whole_heads, of a dimension split as [heads, size] only whole heads go.
        Raises InputError as `trace` does.
        """
        args, kwargs = placed(model, arguments(args, kwargs))
        record = tracing.record(model, args, kwargs, **options)
        classes, reasons = record.labels.resolve()
        groups, unit_classes = group_units(record, classes, reasons)
        coupling = cls(record, classes, reasons, groups, unit_classes)
        if not groups:
            raise InputError(coupling.obstacles)
        with unchanged(model):
            return fit(coupling, Trials(model, args, kwargs))

    # --- groups -------------------------------------------------------------------------------------------------------

    def clusters(self) -> list[Cluster]:
        """Return the numbers of linked groups, in a list for each link; a group without a link is alone in a list."""
        clusters: dict[Any, Cluster] = {}
        for i, group in enumerate(self.groups):
            key = ("alone", i) if group.link is None else group.link
            clusters.setdefault(key, []).append(i)
        return list(clusters.values())

    def pinned(self, reasons: Mapping[int, str]) -> "Coupling":
        """Return the coupling without the groups in `reasons`, {number of a group: why it stays}."""
        class_reasons = dict(self.reasons)
        for i, reason in reasons.items():
            units = self.unit_classes[i].tolist()
            class_reasons |= dict.fromkeys(units, reason)
        free = [i for i in range(len(self.groups)) if i not in reasons]
        groups = tuple(self.groups[i] for i in free)
        unit_classes = tuple(self.unit_classes[i] for i in free)
        return replace(self, reasons=class_reasons, groups=groups, unit_classes=unit_classes)

    @cached_property
    def unprunable(self) -> list[tuple[str, str]]:
        """(parameter and dimension, reason) of all dimensions of parameters that stay whole."""
        free = {(member.name, member.dim) for group in self.groups for member in group.members}
        rows = []
        for axis in self.record.axes:
            if (axis.name, axis.dim) in free or axis.name in self.record.constants:
                continue
            classes = np.unique(self.classes[axis.labels]).tolist()
            is_pinned = all(c in self.reasons for c in classes)
            reasons = sorted({self.reasons.get(c, "") for c in classes} - {""})
            if reasons or not is_pinned:
                why = "; ".join(reasons) or "all of it hangs together as one unit"
                rows.append((f"{axis.name} dimension {axis.dim}", why))
        return rows + [(name, "is not used by the forward pass") for name in self.record.unused]

    @property
    def obstacles(self) -> str:
        """The message for a model without a free group."""
        reasons = [f"{part}: {reason}" for part, reason in self.unprunable[:3]]
        why = "; ".join(reasons) or "it has no parameters that its forward pass uses"
        return f"Nothing in this model can be pruned ({why})."

    # --- a choice of units --------------------------------------------------------------------------------------------

    def gone(self, removed: Mapping[int, Tensor]) -> np.ndarray:
        """Return [labels], bool, True for the labels of removed units.

        removed: {number of a group: [units], bool, True for removed units}.
        """
        gone = np.zeros(len(self.classes), dtype=bool)
        for i, units in removed.items():
            gone[self.unit_classes[i][units.cpu().numpy()]] = True
        return gone[self.classes]

    def one_step(self, groups: list[int]) -> np.ndarray:
        """Return [labels], bool, True for the labels of the last unit of each group, of linked groups the last part."""
        removed = {}
        for cluster in self.clusters():
            steps = math.gcd(*(self.groups[i].units for i in cluster))
            if steps == 1:
                continue
            for i in set(groups) & set(cluster):
                units = self.groups[i].units
                first_removed = units * (steps - 1) // steps
                removed[i] = torch.arange(units) >= first_removed
        return self.gone(removed)

    def attributes(self, model: nn.Module, keep: Keep, gone: np.ndarray) -> dict[str, dict[str, Any]]:
        """Return {module: {attribute: new value}} without the labels in `gone` (`attributes.new_attributes`)."""
        return new_attributes(model, self.record, gone, keep, self.follows)

    def macs(self, gone: np.ndarray | None = None) -> int:
        """Count the multiply-adds of the products of the traced call, without the labels in `gone`, [labels], bool."""
        if gone is None:
            return sum(cost.macs for cost in self.record.costs)
        total = 0.0
        for cost in self.record.costs:
            shares = [1 - gone[labels].mean() for labels in cost.factors]
            total += cost.macs * math.prod(shares)
        return round(total)


# --- trials -----------------------------------------------------------------------------------------------------------


class Trials:
    """Cuts a model in various ways, on the meta device, and reports obstacles.

    model, args, kwargs: the model and the example input.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self.model = model
        self._args, self._kwargs = args, kwargs
        self._results: dict[tuple[bytes, str], Mismatch | None] = {}

    def obstacle(self, coupling: Coupling, clusters: list[Cluster]) -> Mismatch | None:
        """Cut a unit of each group in `clusters`, and return the mismatch, None for a success."""
        gone = coupling.one_step([i for cluster in clusters for i in cluster])
        if not gone.any():
            return None
        keep = coupling.record.kept(gone)
        attributes = coupling.attributes(self.model, keep, gone)
        key = (gone.tobytes(), repr(attributes))  # hypotheses differ in few cuts
        if key not in self._results:
            example = (self._args, self._kwargs)
            self._results[key] = trial(self.model, coupling.record, gone, keep, attributes, *example)
        return self._results[key]

    def obstacle_together_or_apart(self, coupling: Coupling, clusters: list[Cluster]) -> Mismatch | None:
        """Cut clusters together and apart, and return the first mismatch, None for a success.

        Together: a unit of each group in `clusters`. Apart: only every second cluster, while its neighbours keep their
        sizes. The second cut is made if the coupling has exceptional numbers, or dimensions cut into pieces of several
        sizes: a model may then fit if all groups shrink, but not if some do.
        """
        may_differ = bool(coupling.follows or coupling.record.labels.pieces)
        some = clusters[::2] if may_differ else []
        return self.obstacle(coupling, clusters) or self.obstacle(coupling, some)


# --- hypotheses -------------------------------------------------------------------------------------------------------


def fit(coupling: Coupling, trials: Trials) -> Coupling:
    """Find a hypothesis about sizes under which the model's forward pass runs after a cut.

    A forward pass may contain numbers that depend on a width: the width of an input is heads x head size
    (nn.MultiheadAttention, Swin). Four hypotheses are tried, the weakest first:
      1. numbers follow sizes by the rule of `attributes.new_attributes`;
      2. every number equal to a removed width follows the width;
      3. groups of the same size in a view of the same module shrink together;
      4. 2 and 3 together.
    The first hypothesis with a successful cut of a unit of every group is taken. If all fail, three hypotheses are
    weakened: groups with a failing cut are pinned, with the reason. The three are
      - 3, for a model of which most parts need groups of equal size;
      - 1 with a search for exceptional numbers (`with_numbers_searched`), for a model in which few numbers break the
        rule;
      - 2, for a model in which most numbers break the rule.
    The weakened hypothesis with most groups wins; of several, the hypothesis with fewest links.

    coupling: the result of a trace, which is hypothesis 1.
    trials: cuts of the traced model.
    Returns the coupling of the hypothesis. Raises InputError, naming the first obstacles, if no group is free.
    """
    linked = with_linked_groups(coupling)
    numbered = with_all_numbers_following(coupling, trials.model)
    both = with_all_numbers_following(linked, trials.model)
    for hypothesis in (coupling, numbered, linked, both):
        if not trials.obstacle_together_or_apart(hypothesis, hypothesis.clusters()):
            return hypothesis
    weakened = []  # of equals `max` takes the first
    for hypothesis in (linked, with_numbers_searched(coupling, trials), numbered):
        weakened.append(pin_what_fails(hypothesis, trials.obstacle))
    best = max(weakened, key=_freedom)
    best = pin_what_fails(best, trials.obstacle_together_or_apart)
    if not best.groups or trials.obstacle(best, best.clusters()):
        raise InputError(best.obstacles)
    return best


def _freedom(coupling: Coupling) -> tuple[int, int]:
    """Return (number of groups, number of groups without a link)."""
    links = [group.link for group in coupling.groups]
    return len(links), links.count(None)


def with_all_numbers_following(coupling: Coupling, model: nn.Module) -> Coupling:
    """Let every number equal to a removed width follow the width, except numbers in configs."""
    follows = {}
    for module in model.modules():
        for attribute, _ in written(module):
            if not attribute.startswith(CONFIG):
                follows[type(module), attribute] = True
    return replace(coupling, follows=follows)


def with_linked_groups(coupling: Coupling) -> Coupling:
    """Link groups of the same size in a view of the same module."""
    group_of_class = np.full(len(coupling.classes), -1, dtype=np.int64)
    for i, units in enumerate(coupling.unit_classes):
        group_of_class[units] = i
    first_with_size: dict[tuple[str, int], int] = {}
    a, b = [], []
    for module, size, labels, _ in coupling.record.sizes:
        if labels is None or labels.ndim != 1:
            continue
        groups = np.unique(group_of_class[coupling.classes[labels]]).tolist()
        if len(groups) == 1 and groups[0] >= 0:
            a.append(groups[0])
            b.append(first_with_size.setdefault((module, size), groups[0]))
    edges = np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)
    links = components(len(coupling.groups), *edges).tolist()
    linked = []
    for group, link in zip(coupling.groups, links, strict=True):
        is_linked = links.count(link) > 1
        linked.append(replace(group, link=link if is_linked else None))
    return replace(coupling, groups=tuple(linked))


def pin_what_fails(coupling: Coupling, obstacle: Callable[[Coupling, list[Cluster]], Mismatch | None]) -> Coupling:
    """Pin the groups with a failing cut; `obstacle`, a method of `Trials`, makes the cuts."""
    failed = failing(coupling.groups, coupling.clusters(), partial(obstacle, coupling))
    reasons = {i: f"the forward pass needs this size ({mismatch.why})" for i, mismatch in failed.items()}
    return coupling.pinned(reasons)


# --- the search for numbers -------------------------------------------------------------------------------------------


def with_numbers_searched(coupling: Coupling, trials: Trials) -> Coupling:
    """Let exceptional numbers follow a size, or not follow, as far as a cut of a cluster depends on the choice.

    Of clusters at the same place of repeated blocks, only the last is searched.
    """
    failed = failing(coupling.groups, coupling.clusters(), partial(trials.obstacle, coupling))
    last_at_place = {}
    for cluster in coupling.clusters():
        if not failed.keys().isdisjoint(cluster):
            last_at_place[place_of(coupling.groups, cluster)] = cluster
    for cluster in last_at_place.values():
        coupling = _with_numbers_for(coupling, trials, cluster)
    return coupling


def _with_numbers_for(coupling: Coupling, trials: Trials, cluster: Cluster) -> Coupling:
    """Return a hypothesis with a successful cut of `cluster`; `coupling` if the search fails."""
    mismatch = trials.obstacle(coupling, [cluster])
    hypothesis = _with_number_after_number(coupling, trials, cluster, mismatch, set())
    if hypothesis is not None:
        return hypothesis
    for hypothesis in _with_several_numbers(coupling, trials.model, cluster, mismatch.module):
        if not trials.obstacle(hypothesis, [cluster]):
            return hypothesis
    return coupling


def _with_number_after_number(
    coupling: Coupling, trials: Trials, cluster: Cluster, mismatch: Mismatch | None, tried: set[frozenset]
) -> Coupling | None:
    """Change number after number, each with the effect that the forward pass runs farther, up to the end.

    A search in depth: at each step the two best numbers are followed, the number with the farthest run first. In a
    model with as many heads as positions in a head, the farthest run may belong to the wrong number of the two.

    mismatch: the place where the pass fails so far, None at the end.
    tried: choices of numbers followed so far; to be filled.
    Returns None if no choice leads to the end.
    """
    if mismatch is None:
        return coupling
    steps = []
    for hypothesis in _with_one_number(coupling, trials.model, cluster, mismatch.module):
        later = trials.obstacle(hypothesis, [cluster])
        if later is None or later.after > mismatch.after:
            steps.append((hypothesis, later))
    steps.sort(key=_distance, reverse=True)
    for hypothesis, later in steps[:BRANCHES]:
        choice = frozenset(hypothesis.follows.items())
        if choice in tried:
            continue
        tried.add(choice)
        end = _with_number_after_number(hypothesis, trials, cluster, later, tried)
        if end is not None:
            return end
    return None


def _distance(step: tuple[Coupling, Mismatch | None]) -> tuple[float, ...]:
    """Return the numbers of operators before the mismatch; infinity for a success."""
    _, mismatch = step
    return (math.inf,) if mismatch is None else mismatch.after


def _with_one_number(coupling: Coupling, model: nn.Module, cluster: Cluster, name: str) -> list[Coupling]:
    """Return hypotheses with the opposite choice for a single number of the module `name`: to follow a size, or not."""
    module = model.get_submodule(name)
    gone = coupling.one_step(cluster)
    sizes = new_sizes(coupling.record, gone)
    keep = coupling.record.kept(gone)
    changed = coupling.attributes(model, keep, gone).get(name, {})
    hypotheses = []
    for attribute, value in written(module):
        numbers = [value] if type(value) is int else value
        if any((name, number) in sizes for number in numbers):
            follows = {**coupling.follows, (type(module), attribute): attribute not in changed}
            hypotheses.append(replace(coupling, follows=follows))
    return hypotheses


def _with_several_numbers(coupling: Coupling, model: nn.Module, cluster: Cluster, name: str) -> Iterator[Coupling]:
    """Yield hypotheses in which several unsure numbers of the module `name` follow at once.

    An unsure number equals a size that shrinks and a size that stays. A single number does not help if a forward pass
    divides two unsure numbers.
    """
    module = model.get_submodule(name)
    sizes = new_sizes(coupling.record, coupling.one_step(cluster))
    unsure = []
    for attribute, value in written(module):
        if type(value) is int and not attribute.startswith(CONFIG):
            new = sizes.get((name, value), NewSize(value, certain=True))
            if not new.certain:
                unsure.append(attribute)
    unsure = unsure[:UNSURE]
    for count in range(2, len(unsure) + 1):
        for attributes in itertools.combinations(unsure, count):
            choice = {(type(module), attribute): attribute in attributes for attribute in unsure}
            yield replace(coupling, follows={**coupling.follows, **choice})
