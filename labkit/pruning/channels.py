"""Structured pruning in three steps that can be looked at: plan which units go, cut them, and prove the cut.

`prune` does all three; `plan` only the first, and `apply` the other two. A plan is made before anything is cut: a table
of groups, and the parameters, multiply-adds and bytes that are left.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.arguments import check_mapping, check_module, check_several
from labkit.errors import EqualityError, InputError, check_choice, check_whole
from labkit.graph import equality, surgery
from labkit.graph.groups import Coupling, Group, arguments, failing
from labkit.graph.surgery import Plan, Pruned, Units
from labkit.modules.weights import inside, named_parts
from labkit.pruning.scores import UNIT_CRITERIA, check_criterion, unit_scores
from labkit.pruning.select import count_to_prune, fraction, lowest_k

Part = str | nn.Module  # a group, a parameter or a module, by name or itself
Criterion = str | Mapping[str, Tensor] | Callable[[Group], Tensor | None]
SCOPES = ("global", "layer")
_REMEDY = "name the modules that you suspect in ignore, or look at it with apply(..., check=False)."


@dataclass(frozen=True)
class Choice:
    """Which units go first, and how few may stay: the options of a plan, the same in all functions that make one.

    criterion: a name, or scores of one's own; with batches, loss_fn and seed, see `scores.unit_scores`.
    scope: "global" ranks all units together, each score divided by the mean of its group, so that a layer is not wiped
        out for the size of its weights; "layer" removes the same fraction of each group.
    within_groups: from grouped convolutions take the same channels of every group where it has several, not whole ones.
    min_channels: as many stay in every group at least. round_to: what stays is a multiple of it, the nearest one, where
        a group's units allow it. ignore: modules or parameters, or names of them, whose channels stay.
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


def prune(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ratio: float | Mapping[Part, float] | None = None,
    remove: Mapping[Part, Iterable[int]] | None = None,
    check: Any = True,
    **options: Any,
) -> Pruned:
    """A new, smaller model without the fraction `ratio` of the channels, shown equal to the masked `model`.

    args, kwargs: the example input that the model is traced with. ratio, remove: see `plan`. check: see `apply`.
    options: of `Choice` (criterion, scope, min_channels, round_to, within_groups, ignore, batches, loss_fn, seed).

    Groups without which the proof fails stay whole, and the plan's rows say so. Raises InputError where nothing can be
    pruned or no number of the output can be compared, and EqualityError if the pruned model is still not equal to the
    dense one whose weights do not read the removed channels: a model that fails is never returned. `model` stays as it
    was: make the optimizer after the cut, for the new model.
    """
    if remove is not None:
        return apply(model, plan(model, args, kwargs, ratio=ratio, remove=remove, **options), args, kwargs, check=check)
    ratio = _fractions(model, ratio)
    planner = Planner(model, args, kwargs, **options)
    try:
        return apply(model, planner.plan(ratio), args, kwargs, check=check)
    except EqualityError:
        if not planner.pin_failing(ratio, args, kwargs, check):
            raise
    return apply(model, planner.plan(ratio), args, kwargs, check=check)


def apply(
    model: nn.Module, plan: Plan, args: Any = (), kwargs: Mapping[str, Any] | None = None, *, check: Any = True
) -> Pruned:
    """Cuts a copy of `model` by `plan`, and proves it on the example input.

    check: another input for the proof, smaller say: arguments as `args`, or a mapping as `kwargs`; False leaves it out.

    Raises EqualityError where the proof fails: the plan was changed by hand, the forward pass gives something else each
    time, or a rule of `coupling` is wrong for this model.
    """
    if not isinstance(check, bool):
        args, kwargs = ((), check) if isinstance(check, Mapping) else (check, None)
    args, kwargs = arguments(args, kwargs)
    check_module(model)
    if not isinstance(plan, Plan):
        raise InputError(f"plan is a {type(plan).__name__}, but it must be a Plan: plan(model, ...) makes one.")
    cut = surgery.cut(model, plan.kept, plan.attributes)
    if check is False:
        return Pruned(cut, plan, None)
    try:
        report = equality.check(model, cut, plan.coupling.record, plan.gone, args, kwargs)
    except EqualityError:  # there was nothing to compare
        raise
    except Exception as error:  # a forward pass can fail in any way
        raise EqualityError(f"The pruned model does not run ({error}), so it is not returned: {_REMEDY}") from error
    if not report.equal:
        raise EqualityError(f"The pruned model is {report} It is not returned: {_REMEDY}")
    return Pruned(cut, plan, report)


def plan(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    ratio: float | Mapping[Part, float] | None = None,
    macs: float | None = None,
    remove: Mapping[Part, Iterable[int]] | None = None,
    **options: Any,
) -> Plan:
    """Which channels would go; nothing is cut. Exactly one of ratio, macs and remove says how many.

    ratio: the fraction of all prunable channels, or {part: fraction} for some, the others whole. A part is a group, a
        parameter, or a module with all that is made in it, by name or the module itself; of nested ones the innermost
        decides.
    macs: the fraction of multiply-adds to remove.
    remove: {layer or parameter: channels}, exactly these of its outputs, counted from 0, and with each all that hangs
        together with it (a head, a whole group).
    options: of `Choice`; with remove only within_groups.
    """
    if sum(x is not None for x in (ratio, macs, remove)) != 1:
        raise InputError("Give exactly one of ratio, macs and remove: the one that the plan is to follow.")
    if remove is not None:
        check_mapping(remove, "remove", "layer or parameter: channels")
        if unused := set(options) - {"within_groups"}:
            raise InputError(f"remove says which channels go, so that {min(unused)} has no meaning: leave it out.")
        coupling = Coupling.of(model, args, kwargs, **options)
        return plan_units(model, coupling, _units(model, coupling, remove))
    if macs is None:
        return Planner(model, args, kwargs, **options).plan(_fractions(model, ratio))
    target = fraction(macs, "macs")
    planner = Planner(model, args, kwargs, **options)
    total, low, high, best = planner.coupling.macs(), 0.0, 1.0, (math.inf, 0.0)
    for _ in range(20):
        middle = (low + high) / 2
        reached = 1 - planner.macs(middle) / total
        best = min(best, (abs(reached - target), middle))
        low, high = (middle, high) if reached < target else (low, middle)
    return planner.plan(best[1])


def _fractions(model: nn.Module, ratio: float | Mapping[Part, float] | None) -> float | dict[str, float]:
    if not isinstance(ratio, Mapping):
        return fraction(ratio, "ratio")
    named = {part if isinstance(part, str) else named_parts(model, part, "ratio")[0]: x for part, x in ratio.items()}
    return {name: fraction(value, f"the ratio of {name!r}") for name, value in named.items()}


def _units(model: nn.Module, coupling: Coupling, remove: Mapping[Part, Iterable[int]]) -> dict[str, list[int]]:
    """{group: units} that hold these channels: {layer or parameter: channels of its outputs}."""
    units: dict[str, set[int]] = {}
    for part, channels in remove.items():
        (name,) = named_parts(model, part, "remove")
        makers = [
            (group, m)
            for group in coupling.groups
            for m in group.members
            if m.role == "makes" and m.name in (name, f"{name}.weight")
        ]
        if not makers:
            why = next((f" ({why})" for what, why in coupling.unprunable if inside(what.split()[0], name)), "")
            raise InputError(f"remove names {name!r}, which makes no channels that can go{why}: see coupling.trace.")
        check_several(channels, f"remove[{name!r}]")
        for channel in channels:
            check_whole(channel, f"a channel of {name!r}", least=0, most=len(makers[0][1].units) - 1)
            unit = [(group.name, int(m.units[channel])) for group, m in makers if m.units[channel] >= 0]
            if not unit:
                raise InputError(f"Channel {channel} of {name!r} cannot go, as others of it can: see coupling.trace.")
            units.setdefault(unit[0][0], set()).add(unit[0][1])
    return {name: sorted(numbers) for name, numbers in units.items()}


@torch.inference_mode(False)
def plan_units(model: nn.Module, coupling: Coupling, units: Mapping[str, Sequence[int]]) -> Plan:
    """The plan that removes exactly these units of `coupling`, the trace of `model`, whatever they are worth.

    units: {group or parameter: numbers of the units that go}; what a unit is (a channel, a head, a neuron) says
        `coupling.trace`.

    Raises InputError for a group or a unit that does not exist, for all units of a group, and for linked groups that
    do not lose the same fraction.
    """
    check_mapping(units, "units", "group or parameter: numbers")
    groups, removed = coupling.groups, {}
    for name, numbers in units.items():
        check_several(numbers, f"units[{name!r}]")
        for i in _named(model, coupling, name, "units"):
            n = groups[i].units
            goes = torch.zeros(n, dtype=torch.bool)
            for unit in numbers:
                if isinstance(unit, bool) or not isinstance(unit, Integral) or not 0 <= unit < n:
                    raise InputError(f"units has {unit!r} for {name!r}, whose units are numbered 0 to {n - 1}.")
                goes[unit] = True
            if goes.all():
                raise InputError(f"units has all {n} units of {name!r}, but one has to stay.")
            if not torch.equal(removed.setdefault(i, goes), goes):
                raise InputError(f"units names {groups[i].name!r} twice, with other units: name it once.")
    for cluster in coupling.clusters():
        shares = {float(removed[i].float().mean()) if i in removed else 0.0 for i in cluster}
        if len(shares) > 1:
            names = ", ".join(repr(groups[i].name) for i in cluster)
            raise InputError(f"The groups {names} have to lose the same fraction of their units: name units of each.")
    return _plan(model, coupling, removed, {})


def _plan(model: nn.Module, coupling: Coupling, removed: Mapping[int, Tensor], reasons: Mapping[int, str]) -> Plan:
    """The plan without the units of group i where removed[i] ([units], bool) is true; reasons: why groups stay."""
    rows = tuple(
        Units(g.name, g.units, int(removed[i].sum()) if i in removed else 0, g.width, reasons.get(i, ""))
        for i, g in enumerate(coupling.groups)
    )
    return plan_labels(model, coupling, coupling.gone(removed), rows)


@torch.inference_mode(False)
def plan_labels(model: nn.Module, coupling: Coupling, gone: np.ndarray, units: tuple[Units, ...]) -> Plan:
    """The plan without the labels of the trace that are true in `gone` ([labels], bool); units: its table."""
    keep = coupling.record.kept(gone)
    (n, size), (n_after, size_after) = surgery.parameters(model), surgery.parameters(model, keep)
    return Plan(
        kept=keep,
        attributes=coupling.attributes(model, keep, gone),
        units=units,
        unprunable=tuple(coupling.unprunable),
        parameters=(n, n_after),
        macs=(coupling.macs(), coupling.macs(gone)),
        bytes=(size, size_after),
        coupling=coupling,
        gone=gone,
    )


def _named(model: nn.Module, coupling: Coupling, name: str, argument: str) -> list[int]:
    """Numbers of the groups with this name, or else of those whose channels the part `name` makes."""
    numbers = [i for i, g in enumerate(coupling.groups) if g.name == name] or sorted(_made(model, coupling, [name]))
    if not numbers:
        names = ", ".join(repr(g.name) for g in coupling.groups[:3])
        raise InputError(f"{argument} names {name!r}, which is no prunable group: use names such as {names}.")
    return numbers


@dataclass(eq=False)
class _Cluster:
    """Groups that keep the same fraction of their units, one by itself as a rule, in `steps` that go one by one.

    scores: [steps], rising. order: per group its units, least important first.
    """

    groups: list[int]
    steps: int
    scores: Tensor
    order: list[Tensor]
    channels: int  # in a step, of all groups
    floor: int  # steps that stay
    grain: int  # steps that keep round_to


class Planner:
    """Traces and scores once, then makes the plan for any ratio. The arguments are those of `plan`."""

    @torch.inference_mode(False)  # scores may need gradients
    def __init__(
        self, model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        choice = Choice(**options)
        self._model, self._scope = model, choice.scope
        self.coupling = coupling = Coupling.of(model, args, kwargs, within_groups=choice.within_groups)
        if any(x.is_meta for x in model.parameters()):
            raise InputError("The model is on the meta device and has no weights to rank: load them first.")
        parts = named_parts(model, choice.ignore, "ignore")
        scores = unit_scores(
            model, coupling.groups, choice.criterion, choice.batches, loss_fn=choice.loss_fn, seed=choice.seed
        )
        who = choice.criterion if isinstance(choice.criterion, str) else "criterion"
        unscored = [i for i in range(len(coupling.groups)) if i not in scores]
        self._reasons = dict.fromkeys(unscored, f"{who} has no score for it")
        self._reasons |= dict.fromkeys(_made(model, coupling, parts), "ignored")
        self.clusters: list[_Cluster] = []
        for members in coupling.clusters():
            if stuck := [i for i in members if i in self._reasons]:
                self._reasons |= dict.fromkeys(members, self._reasons[stuck[0]])
            else:
                self.clusters.append(_cluster(coupling.groups, members, scores, choice))
        if not self.clusters:
            why = "; ".join(sorted(set(self._reasons.values())))
            raise InputError(f"No group is left to prune ({why}): take another criterion, or ignore less.")

    def names(self) -> list[str]:
        """The groups that can be pruned; of linked ones the first."""
        return [self.coupling.groups[cluster.groups[0]].name for cluster in self.clusters]

    def macs(self, ratio: float) -> int:
        return self.coupling.macs(self.coupling.gone(self._removed(ratio)))

    @torch.inference_mode(False)
    def plan(self, ratio: float | Mapping[str, float]) -> Plan:
        return _plan(self._model, self.coupling, self._removed(ratio), self._reasons)

    def pin_failing(self, ratio: float | Mapping[str, float], args: Any, kwargs: Any, check: Any) -> bool:
        """Leaves the groups whole from now on without which the proof fails, by halving; false if all do."""
        removed = self._removed(ratio)

        def failure(clusters: list[list[int]]) -> str:
            part = {i: removed[i] for cluster in clusters for i in cluster}
            try:
                apply(self._model, _plan(self._model, self.coupling, part, {}), args, kwargs, check=check)
            except EqualityError:
                return "the proof fails without some of it"
            return ""

        touched = [c.groups for c in self.clusters if any(removed[i].any() for i in c.groups)]
        reasons = failing(self.coupling.groups, touched, failure)
        self._reasons |= reasons
        self.clusters = [cluster for cluster in self.clusters if not set(cluster.groups) & set(reasons)]
        return bool(self.clusters)

    def _removed(self, ratio: float | Mapping[str, float]) -> dict[int, Tensor]:
        """{group: [units], true where a unit goes}"""
        removed = {}
        for cluster, n in zip(self.clusters, self._steps(ratio), strict=True):
            n = _rounded(cluster, n)
            for i, order in zip(cluster.groups, cluster.order, strict=True):
                removed[i] = torch.zeros(len(order), dtype=torch.bool)
                removed[i][order[: n * len(order) // cluster.steps]] = True
        return removed

    def _steps(self, ratio: float | Mapping[str, float]) -> list[int]:
        """How many steps of each cluster go."""
        if isinstance(ratio, Mapping):
            ratios = self._by_cluster(ratio)
            return [count_to_prune(c.steps, ratios.get(n, 0.0)) for n, c in enumerate(self.clusters)]
        if self._scope == "layer":
            return [count_to_prune(c.steps, ratio) for c in self.clusters]
        free = [c.scores[: max(c.steps - c.floor, 0)] for c in self.clusters]
        lengths = [len(part) for part in free]
        scores = torch.cat(free)
        weights = torch.cat([torch.full((n,), c.channels) for n, c in zip(lengths, self.clusters, strict=True)])
        # Of equal scores those go first that are lowest in their group: ties are spread over the groups.
        spread = torch.cat([(torch.arange(n) + 0.5) / max(n, 1) for n in lengths]).argsort(stable=True)
        sums = weights[spread][scores[spread].argsort(stable=True)].cumsum(0)
        channels = sum(c.channels * c.steps for c in self.clusters)
        k = int((sums <= count_to_prune(channels, ratio)).sum())
        lowest = torch.zeros_like(scores, dtype=torch.bool)
        lowest[spread] = lowest_k(scores[spread], k)
        return [int(part.sum()) for part in lowest.split(lengths)]

    def _by_cluster(self, ratios: Mapping[str, float]) -> dict[int, float]:
        """{cluster: ratio} of {part: ratio}"""
        result: dict[int, tuple[float, str]] = {}
        for name, value in sorted(ratios.items(), key=lambda row: len(row[0])):  # the innermost comes last
            numbers = set(_named(self._model, self.coupling, name, "ratio"))
            clusters = [n for n, cluster in enumerate(self.clusters) if numbers & set(cluster.groups)]
            if not clusters:
                raise InputError(f"ratio names {name!r}, which stays whole ({self._reasons[min(numbers)]}).")
            for n in clusters:
                other, by = result.get(n, (value, name))
                if other != value and not inside(name, by):
                    raise InputError(f"{name!r} hangs together with {by!r}, which has another ratio: give one.")
                result[n] = (value, name)
        return {n: value for n, (value, _) in result.items()}


def _made(model: nn.Module, coupling: Coupling, parts: Sequence[str]) -> set[int]:
    """Groups whose channels are made, by any parameter, inside one of the named parts."""
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    makers = {coupling.record.first(name) for name in names if any(inside(name, part) for part in parts)}
    return {
        i
        for i, group in enumerate(coupling.groups)
        if any(m.role == "makes" and m.name in makers for m in group.members)
    }


def _cluster(groups: Sequence[Group], members: list[int], scores: Mapping[int, Tensor], choice: Choice) -> _Cluster:
    steps = math.gcd(*(groups[i].units for i in members))
    order, parts, floor, grain = [], [], 1, 1
    for i in members:
        values = scores[i] / mean if (mean := scores[i].mean()) > 0 else scores[i]
        order.append(values.argsort(stable=True))
        parts.append(values[order[-1]].view(steps, -1).mean(1))
        channels = groups[i].units * groups[i].width // steps  # of this group in a step
        floor = max(floor, math.ceil(choice.min_channels / channels))
        grain = math.lcm(grain, choice.round_to // math.gcd(choice.round_to, channels))
    channels = sum(groups[i].units * groups[i].width for i in members) // steps
    return _Cluster(members, steps, torch.stack(parts).mean(0), order, channels, min(floor, steps), grain)


def _rounded(cluster: _Cluster, n: int) -> int:
    """Steps that go, after min_channels and round_to, which change how many stay."""
    stay = cluster.steps - n
    if n and cluster.grain > 1:
        stay = max(math.floor(stay / cluster.grain + 0.5), 1) * cluster.grain
    return cluster.steps - min(max(stay, cluster.floor), cluster.steps)
