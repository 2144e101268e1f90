"""Structured pruning in three steps: plan which units go, cut a copy of the model, and prove it equal.

`prune` does all three steps. `plan` does the first: a table of groups, with the parameters, multiply-adds and bytes
before and after, and nothing cut yet. `apply` does the second and the third.

A unit is the smallest set of channels that can be removed by itself: mostly a single channel, but a whole attention
head or a whole group of a grouped convolution where the operators of the model require so. `labkit.graph.groups` finds
the units by tracing, `scores` ranks them, and `allocation` says how many go of each group.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.arguments import arguments, check_loaded, check_mapping, check_several
from labkit.errors import EqualityError, InputError, check_choice, check_whole, is_whole
from labkit.graph import equality, surgery
from labkit.graph.groups import Coupling, Group, Member, failing
from labkit.graph.surgery import Plan, Pruned, Units
from labkit.modules.batches import placed
from labkit.modules.weights import inside, named_parts
from labkit.pruning.allocation import Cluster, global_steps, make_cluster
from labkit.pruning.scores import UNIT_CRITERIA, check_criterion, unit_scores
from labkit.pruning.select import count_to_prune, fraction

Part = str | nn.Module  # a group, a parameter or a module: its name, or the module itself
Criterion = str | Mapping[str, Tensor] | Callable[[Group], Tensor | None]
Ratio = float | Mapping[Part, float]
NamedRatio = float | dict[str, float]
SCOPES = ("global", "layer")
BISECTIONS = 20  # of the ratio, on the way to a number of multiply-adds
_GROUPS = "labkit.pruning.coupling.trace(model, args, kwargs) lists what can."
_REMEDY = "name the modules that you suspect in ignore, or look at it with apply(..., check=False)."


@dataclass(frozen=True)
class Choice:
    """Options of a plan: the criterion that ranks units, and limits on how many channels remain.

    criterion: a name in `scores.UNIT_CRITERIA`, {parameter: scores of the output channels}, or a function of a group.
        batches, loss_fn, seed: input of the criterion, see `scores.unit_scores`.
    scope: "global" ranks the units of all groups together, each score divided by the mean |score| of its group, so that
        small weights do not cost a layer all of its channels; "layer" removes the same fraction of each group.
    min_channels: number of channels that remain in every group at least.
    round_to: the remaining channels are rounded to the nearest multiple of this number, if a group's units allow.
    within_groups: True to remove the same channels of every group of a grouped convolution with several channels in a
        group, not whole groups.
    ignore: modules or parameters (names or modules) whose output channels all remain.
    """

    criterion: Criterion = "l1"
    scope: str = "global"
    min_channels: int = 1
    round_to: int = 1
    within_groups: bool = False
    ignore: Part | Iterable[Part] = ()
    batches: Iterable | None = None
    loss_fn: Callable | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.scope, SCOPES, "scope")
        check_whole(self.min_channels, "min_channels")
        check_whole(self.round_to, "round_to")
        if isinstance(self.criterion, str):
            check_criterion(self.criterion, self.batches, UNIT_CRITERIA)


# --- the three functions to call --------------------------------------------------------------------------------------


def prune(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ratio: Ratio | None = None,
    remove: Mapping[Part, Iterable[int]] | None = None,
    check: Any = True,
    **options: Any,
) -> Pruned:
    """Return a smaller copy of `model` without the fraction `ratio` of its channels, proved equal to the masked model.

    args, kwargs: the example input for tracing `model`.
    ratio, remove: how many or which channels go, see `plan`.
    check: input of the proof, see `apply`.
    options: fields of `Choice` (criterion, scope, min_channels, round_to, within_groups, ignore, batches, loss_fn,
        seed).

    `model` is not changed. Make the optimizer after the cut, for the new model. Groups without which the proof fails
    are kept whole, with the reason in the rows of the plan.
    Raises InputError if no channel can be pruned or the output holds no number to compare. Raises EqualityError if the
    pruned model still differs from the dense model without the weights that read the removed channels; a model is never
    returned after a failed proof.
    """
    if remove is not None:
        exact_plan = plan(model, args, kwargs, ratio=ratio, remove=remove, **options)
        return apply(model, exact_plan, args, kwargs, check=check)
    ratio = _named_ratio(model, ratio)
    planner = Planner(model, args, kwargs, **options)
    try:
        return apply(model, planner.plan(ratio), args, kwargs, check=check)
    except EqualityError:
        some_remain = planner.exclude_failing(ratio, args, kwargs, check)
        if not some_remain:
            raise
    return apply(model, planner.plan(ratio), args, kwargs, check=check)


def plan(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ratio: Ratio | None = None,
    macs: float | None = None,
    remove: Mapping[Part, Iterable[int]] | None = None,
    **options: Any,
) -> Plan:
    """Choose the channels to remove and cut nothing yet. Exactly one of ratio, macs and remove is needed.

    args, kwargs: the example input for tracing `model`.
    ratio: the fraction of all prunable channels to remove; or {part: fraction} to prune only some parts. A part is a
        group, a parameter, or a module with all layers inside it. Of nested parts the innermost decides.
    macs: the fraction of multiply-adds to remove.
    remove: {layer or parameter: numbers of output channels}, counted from 0. Channels in the same unit (the rest of a
        head or of a group) go along.
    options: fields of `Choice`; with `remove` only within_groups.
    """
    targets = [target for target in (ratio, macs, remove) if target is not None]
    if len(targets) != 1:
        raise InputError("Give exactly one of ratio, macs and remove: the one that the plan is to follow.")
    if remove is not None:
        return _plan_of_removal(model, args, kwargs, remove, options)
    if macs is not None:
        macs = fraction(macs, "macs")
        planner = Planner(model, args, kwargs, **options)
        return planner.plan(_ratio_for_macs(planner, macs))
    planner = Planner(model, args, kwargs, **options)
    return planner.plan(_named_ratio(model, ratio))


def apply(
    model: nn.Module,
    plan: Plan,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    check: Any = True,
) -> Pruned:
    """Cut a copy of `model` by `plan` and prove it equal to the masked `model` on an example input.

    args, kwargs: the example input.
    check: True proves on the example input; False skips the proof (`report` is empty). A mapping (taken as kwargs) or a
        tensor or tuple (taken as args) is a separate input for the proof, for example a smaller batch.

    Raises EqualityError if the proof fails: the plan was changed by hand, the forward pass is not deterministic, or a
    rule of `labkit.graph` is wrong for the model.
    """
    if not isinstance(check, bool):
        args, kwargs = ((), check) if isinstance(check, Mapping) else (check, None)
    if not isinstance(plan, Plan):
        raise InputError(f"plan is a {type(plan).__name__}, but it must be a Plan: plan(model, ...) makes one.")
    args, kwargs = placed(model, arguments(args, kwargs))
    pruned_model = surgery.cut(model, plan.kept, plan.attributes)
    if check is False:
        return Pruned(pruned_model, plan, None)
    report = _prove(model, pruned_model, plan, args, kwargs)
    return Pruned(pruned_model, plan, report)


def _prove(
    model: nn.Module,
    pruned_model: nn.Module,
    plan: Plan,
    args: tuple,
    kwargs: dict[str, Any],
) -> equality.Report:
    """Return the report of the equality check; raise EqualityError if the models differ or cannot be compared."""
    try:
        report = equality.check(model, pruned_model, plan.coupling.record, plan.gone, args, kwargs)
    except EqualityError:  # there was nothing to compare
        raise
    except Exception as error:  # a forward pass can fail in any way
        raise EqualityError(f"The pruned model does not run ({error}), so it is not returned: {_REMEDY}") from error
    if not report.equal:
        raise EqualityError(f"The pruned model is {report} It is not returned: {_REMEDY}")
    return report


# --- plans that follow a ratio or a number of multiply-adds ---------------------------------------------------------


class Planner:
    """Trace a model and score its units once, then make the plan for any ratio.

    model, args, kwargs, options: as in `plan`.
    Raises InputError for a model without weights, and if every group has to stay whole.
    """

    @torch.inference_mode(False)  # scores may need gradients
    def __init__(
        self,
        model: nn.Module,
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.choice = Choice(**options)
        self.model = model
        self.coupling = Coupling.of(model, args, kwargs, within_groups=self.choice.within_groups)
        check_loaded(model)
        ignored = named_parts(model, self.choice.ignore, "ignore")
        scores = self._scores()
        self.reasons = self._reasons_to_stay(scores, ignored)  # {number of the group: why it stays whole}
        self.clusters = self._clusters(scores)
        if not self.clusters:
            why = "; ".join(sorted(set(self.reasons.values())))
            raise InputError(f"No group is left to prune ({why}): take another criterion, or ignore less.")

    def _scores(self) -> dict[int, Tensor]:
        choice = self.choice
        return unit_scores(
            self.model,
            self.coupling.groups,
            choice.criterion,
            choice.batches,
            loss_fn=choice.loss_fn,
            seed=choice.seed,
        )

    def _reasons_to_stay(self, scores: Mapping[int, Tensor], ignored: Sequence[str]) -> dict[int, str]:
        """Return {number of the group: reason} for groups without a score, for ignored groups and for linked groups."""
        reasons = {}
        criterion = self.choice.criterion
        criterion_name = criterion if isinstance(criterion, str) else "criterion"
        for number in range(len(self.coupling.groups)):
            if number not in scores:
                reasons[number] = f"{criterion_name} has no score for it"
        for number in _groups_made_in(self.model, self.coupling, ignored):
            reasons[number] = "ignored"
        for linked in self.coupling.clusters():
            staying = [number for number in linked if number in reasons]
            if staying:
                reasons |= dict.fromkeys(linked, reasons[staying[0]])
        return reasons

    def _clusters(self, scores: Mapping[int, Tensor]) -> list[Cluster]:
        choice, groups = self.choice, self.coupling.groups
        return [
            make_cluster(groups, linked, scores, choice.min_channels, choice.round_to)
            for linked in self.coupling.clusters()
            if linked[0] not in self.reasons
        ]

    def names(self) -> list[str]:
        """Return the names of the prunable groups; of linked groups only the first."""
        first_groups = [cluster.groups[0] for cluster in self.clusters]
        return [self.coupling.groups[number].name for number in first_groups]

    @torch.inference_mode(False)
    def plan(self, ratio: NamedRatio) -> Plan:
        """Make the plan for removing the fraction `ratio` of the channels.

        ratio: the fraction, or {name of a group, parameter or module: fraction}.
        """
        return _plan(self.model, self.coupling, self._removed_units(ratio), self.reasons)

    def macs(self, ratio: float) -> int:
        """Return the multiply-adds of the example call after pruning by `ratio`."""
        removed_labels = self.coupling.gone(self._removed_units(ratio))
        return self.coupling.macs(removed_labels)

    def _removed_units(self, ratio: NamedRatio) -> dict[int, Tensor]:
        """Return {number of the group: bool [units], True where a unit goes}."""
        removed: dict[int, Tensor] = {}
        for cluster, steps in zip(self.clusters, self._steps(ratio), strict=True):
            removed |= cluster.removed_units(cluster.rounded(steps))
        return removed

    def _steps(self, ratio: NamedRatio) -> list[int]:
        """Return the number of steps to remove of each cluster, before rounding."""
        if isinstance(ratio, Mapping):
            ratios = self._ratio_by_cluster(ratio)
        elif self.choice.scope == "layer":
            ratios = [ratio] * len(self.clusters)
        else:
            return global_steps(self.clusters, ratio)
        return [count_to_prune(cluster.steps, value) for cluster, value in zip(self.clusters, ratios, strict=True)]

    def _ratio_by_cluster(self, ratios: Mapping[str, float]) -> list[float]:
        """Return the ratio of each cluster, 0 for a cluster named by no part of `ratios`."""
        decided: dict[int, tuple[float, str]] = {}  # {number of the cluster: (its ratio, the part that says so)}
        innermost_last = sorted(ratios, key=len)
        for part in innermost_last:
            ratio = ratios[part]
            for cluster in self._clusters_of(part):
                earlier, earlier_part = decided.get(cluster, (ratio, part))
                if earlier != ratio and not inside(part, earlier_part):
                    raise InputError(
                        f"{part!r} hangs together with {earlier_part!r}, which has another ratio: give one."
                    )
                decided[cluster] = (ratio, part)
        undecided = (0.0, "")
        return [decided.get(cluster, undecided)[0] for cluster in range(len(self.clusters))]

    def _clusters_of(self, part: str) -> list[int]:
        """Return the numbers of the clusters with a group named by `part`; raise InputError if `part` stays whole."""
        groups = set(_groups_named(self.model, self.coupling, part, "ratio"))
        numbers = [n for n, cluster in enumerate(self.clusters) if groups.intersection(cluster.groups)]
        if not numbers:
            reason = self.reasons[min(groups)]
            raise InputError(f"ratio names {part!r}, which stays whole ({reason}).")
        return numbers

    def exclude_failing(
        self,
        ratio: NamedRatio,
        args: Any,
        kwargs: Any,
        check: Any,
    ) -> bool:
        """Find the groups responsible for a failed proof and keep them whole in later plans; False if no group remains.

        ratio: the ratio at which the proof failed.
        args, kwargs, check: as in `apply`.
        """
        removed = self._removed_units(ratio)

        def failure(clusters: list[list[int]]) -> str:
            """Prune the groups of `clusters` only, and return why the proof fails, "" if not."""
            numbers = [number for cluster in clusters for number in cluster]
            removed_here = {number: removed[number] for number in numbers}
            partial_plan = _plan(self.model, self.coupling, removed_here, {})
            try:
                apply(self.model, partial_plan, args, kwargs, check=check)
            except EqualityError:
                return "the proof fails without some of it"
            return ""

        shrinking = [
            cluster.groups for cluster in self.clusters if any(removed[number].any() for number in cluster.groups)
        ]
        reasons = failing(self.coupling.groups, shrinking, failure)
        self.reasons |= reasons
        self.clusters = [cluster for cluster in self.clusters if not reasons.keys() & set(cluster.groups)]
        return bool(self.clusters)


def _ratio_for_macs(planner: Planner, target: float) -> float:
    """Return the ratio at which the plan removes a fraction of multiply-adds as near to `target` as bisection comes."""
    dense_macs = planner.coupling.macs()
    low, high = 0.0, 1.0
    best = (math.inf, 0.0)  # (distance from the target, ratio)
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        removed = 1 - planner.macs(ratio) / dense_macs
        best = min(best, (abs(removed - target), ratio))
        if removed < target:
            low = ratio
        else:
            high = ratio
    return best[1]


def _named_ratio(model: nn.Module, ratio: Ratio | None) -> NamedRatio:
    """Check every ratio to be from 0 to 1, and replace modules by names."""
    if not isinstance(ratio, Mapping):
        return fraction(ratio, "ratio")
    named = {}
    for part, value in ratio.items():
        name = part if isinstance(part, str) else named_parts(model, part, "ratio")[0]
        named[name] = fraction(value, f"the ratio of {name!r}")
    return named


# --- plans that remove exactly the named channels or units -----------------------------------------------------------


def _plan_of_removal(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    remove: Mapping[Part, Iterable[int]],
    options: Mapping[str, Any],
) -> Plan:
    check_mapping(remove, "remove", "layer or parameter: channels")
    unused = set(options) - {"within_groups"}
    if unused:
        raise InputError(f"remove says which channels go, so that {min(unused)} has no meaning: leave it out.")
    coupling = Coupling.of(model, args, kwargs, **options)
    return plan_units(model, coupling, _units_of_channels(model, coupling, remove))


def _units_of_channels(
    model: nn.Module,
    coupling: Coupling,
    remove: Mapping[Part, Iterable[int]],
) -> dict[str, list[int]]:
    """Turn {layer or parameter: output channels} into {name of the group: units that hold the channels}."""
    units: dict[str, set[int]] = defaultdict(set)
    for part, channels in remove.items():
        (name,) = named_parts(model, part, "remove")
        makers = _makers(coupling, name)
        if not makers:
            why = _reason_to_stay(coupling, name)
            raise InputError(f"remove names {name!r}, which makes no channels that can go{why}: {_GROUPS}")
        check_several(channels, f"remove[{name!r}]")
        n_channels = len(makers[0][1].units)
        for channel in channels:
            check_whole(channel, f"a channel of {name!r}", least=0, most=n_channels - 1)
            group, unit = _unit_of_channel(makers, channel, name)
            units[group].add(unit)
    return {group: sorted(numbers) for group, numbers in units.items()}


def _makers(coupling: Coupling, name: str) -> list[tuple[Group, Member]]:
    """Return the groups with channels made by the parameter or layer `name`, each with the member for `name`."""
    return [
        (group, member)
        for group in coupling.groups
        for member in group.members
        if member.role == "makes" and member.name in (name, f"{name}.weight")
    ]


def _reason_to_stay(coupling: Coupling, name: str) -> str:
    """Return in brackets why no channel of the part `name` can go, "" if the trace has no reason."""
    for dimension, reason in coupling.unprunable:
        parameter = dimension.split()[0]
        if inside(parameter, name):
            return f" ({reason})"
    return ""


def _unit_of_channel(makers: Sequence[tuple[Group, Member]], channel: int, name: str) -> tuple[str, int]:
    """Return the group and the unit of output channel `channel` of the layer `name`."""
    for group, member in makers:
        unit = int(member.units[channel])
        if unit >= 0:
            return group.name, unit
    raise InputError(f"Channel {channel} of {name!r} cannot go, as others of it can: {_GROUPS}")


@torch.inference_mode(False)
def plan_units(
    model: nn.Module,
    coupling: Coupling,
    units: Mapping[str, Sequence[int]],
    labels: np.ndarray | None = None,
) -> Plan:
    """Make the plan for removing exactly the named units, without ranking.

    coupling: the trace of `model`; its groups show if a unit is a channel, a head or a neuron.
    units: {name of a group or parameter: numbers of the units to remove}, counted from 0.
    labels: bool [labels of the trace], True for entries to remove besides, which are less than a unit.

    Raises InputError for an unknown group or unit, for all units of a group, and for different fractions of linked
    groups.
    """
    check_mapping(units, "units", "group or parameter: numbers")
    removed: dict[int, Tensor] = {}
    for name, numbers in units.items():
        check_several(numbers, f"units[{name!r}]")
        for number in _groups_named(model, coupling, name, "units"):
            group = coupling.groups[number]
            goes = _mask_of_units(group, numbers, name)
            earlier = removed.setdefault(number, goes)
            if not torch.equal(earlier, goes):
                raise InputError(f"units names {group.name!r} twice, with other units: name it once.")
    _check_linked_groups(coupling, removed)
    return _plan(model, coupling, removed, {}, labels)


def _mask_of_units(group: Group, numbers: Iterable[int], name: str) -> Tensor:
    """Return a bool mask [units], True at `numbers`; `name` is the caller's name of the group, for errors."""
    n_units = group.units
    mask = torch.zeros(n_units, dtype=torch.bool)
    for unit in numbers:
        if not is_whole(unit) or not 0 <= unit < n_units:
            raise InputError(f"units has {unit!r} for {name!r}, whose units are numbered 0 to {n_units - 1}.")
        mask[unit] = True
    if mask.all():
        raise InputError(f"units has all {n_units} units of {name!r}, but one has to stay.")
    return mask


def _check_linked_groups(coupling: Coupling, removed: Mapping[int, Tensor]) -> None:
    """Raise InputError if linked groups would lose different fractions of units."""
    for linked in coupling.clusters():
        masks = [removed.get(number, torch.zeros(1)) for number in linked]
        fractions = {float(mask.float().mean()) for mask in masks}
        if len(fractions) > 1:
            names = ", ".join(repr(coupling.groups[number].name) for number in linked)
            raise InputError(f"The groups {names} have to lose the same fraction of their units: name units of each.")


# --- from units to a plan ---------------------------------------------------------------------------------------------


@torch.inference_mode(False)
def _plan(
    model: nn.Module,
    coupling: Coupling,
    removed: Mapping[int, Tensor],
    reasons: Mapping[int, str],
    labels: np.ndarray | None = None,
) -> Plan:
    """Make the plan for removing the units of group i where removed[i] (bool [units]) is True.

    reasons: {number of the group: why all of its units stay}, for the table of the plan.
    labels: as in `plan_units`.
    """
    rows = []
    for number, group in enumerate(coupling.groups):
        n_removed = int(removed[number].sum()) if number in removed else 0
        rows.append(Units(group.name, group.units, n_removed, group.width, reasons.get(number, "")))
    gone = coupling.gone(removed)
    if labels is not None:
        gone |= labels
    keep = coupling.record.kept(gone)
    parameters_before, bytes_before = surgery.parameters(model)
    parameters_after, bytes_after = surgery.parameters(model, keep)
    return Plan(
        kept=keep,
        units=tuple(rows),
        unprunable=tuple(coupling.unprunable),
        parameters=(parameters_before, parameters_after),
        macs=(coupling.macs(), coupling.macs(gone)),
        bytes=(bytes_before, bytes_after),
        attributes=coupling.attributes(model, keep, gone),
        coupling=coupling,
        gone=gone,
    )


# --- groups by name ---------------------------------------------------------------------------------------------------


def _groups_named(
    model: nn.Module,
    coupling: Coupling,
    name: str,
    argument: str,
) -> list[int]:
    """Return the numbers of the groups called `name`, or else of the groups with channels made in the part `name`.

    argument: the caller's argument with `name`, for the InputError if no group fits.
    """
    numbers = [number for number, group in enumerate(coupling.groups) if group.name == name]
    if not numbers:
        numbers = sorted(_groups_made_in(model, coupling, [name]))
    if not numbers:
        names = ", ".join(repr(group.name) for group in coupling.groups[:3])
        raise InputError(f"{argument} names {name!r}, which is no prunable group: use names such as {names}.")
    return numbers


def _groups_made_in(model: nn.Module, coupling: Coupling, parts: Sequence[str]) -> set[int]:
    """Return the numbers of the groups with channels made by a parameter inside any of the named parts."""
    makers = set()
    for name, _ in model.named_parameters(remove_duplicate=False):
        if any(inside(name, part) for part in parts):
            makers.add(coupling.record.first(name))
    return {
        number
        for number, group in enumerate(coupling.groups)
        if any(member.role == "makes" and member.name in makers for member in group.members)
    }
