"""Which channels hang together: groups of parameter entries that can only be removed as one unit, found by tracing.

What a unit is follows from the operators: a channel of a residual stage, a whole group of a grouped convolution, an
attention head with its rows and columns. What cannot shrink is listed with the reason. Nothing is ranked or removed.
"""

import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.arguments import check_mapping
from labkit.errors import InputError
from labkit.graph import fits, tracing
from labkit.graph.labels import components
from labkit.graph.rules import Axis, Record

UNSURE = 5  # numbers of a module of which all combinations are tried


@dataclass(frozen=True, eq=False)
class Member:
    """Dimension `dim` of a parameter or buffer. units: [size of dim], the unit of each index, -1 where it has none.

    role: "reads" if a product sums over the dimension (the columns that read a channel), else "makes".
    """

    name: str
    dim: int
    units: Tensor
    role: str

    def indices(self, unit: int) -> Tensor:
        return (self.units == unit).nonzero().squeeze(1)


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are removed from the same parameters, each unit as a whole.

    name: of the first parameter that makes the channels, with #2 and so on where another group has that name.
    units: how many. width: channels in a unit, on average. link: groups with the same link that is not None have to
    keep the same fraction of their units.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    link: int | None = None

    @property
    def width(self) -> int:
        first = self.members[0].units
        return int((first >= 0).sum()) // self.units

    def __str__(self) -> str:
        wide = f" of {self.width}" if self.width > 1 else ""
        return f"{self.name}: {self.units} units{wide} in {len(self.members)} dimensions"


def trace(model: nn.Module, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> list[Group]:
    """The groups of `model(*args, **kwargs)`: which entries of which parameters and buffers must be removed together.

    args: the example input, a tuple (a single tensor is taken as the one argument). No value is looked at, nothing is
    computed, no weight is copied, and what the forward pass writes down is written down in a copy. The batch and all
    other sizes of the input, and the sizes of the output, are fixed. Raises InputError if the model does not run on the
    example, if its forward pass depends on values, if its output holds no number that can be compared
    (`returned.outputs`), or if nothing in the model can be pruned.
    """
    return list(Coupling.of(model, args, kwargs).groups)


def arguments(args: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs) as a call takes them; InputError where kwargs are no {name: value}."""
    if isinstance(args, (Tensor, Mapping)) or not isinstance(args, (tuple, list)):
        args = (args,)
    if kwargs is not None:
        check_mapping(kwargs, "kwargs", "name: value")
    return tuple(args), dict(kwargs or {})


@dataclass(eq=False)
class Coupling:
    """What a trace finds, ready to say what a choice of units means for every parameter.

    roots: per group the class of each unit. follows: {(class of a module, attribute): whether this number follows a
    size}, where the rule in `attributes` is wrong.
    """

    record: Record
    classes: np.ndarray  # of every label
    reasons: Mapping[int, str]  # of the classes that stay
    groups: tuple[Group, ...]
    roots: tuple[np.ndarray, ...]
    follows: Mapping[tuple[type, str], bool] = field(default_factory=dict)

    @classmethod
    @torch.inference_mode(False)  # what is made here outlives the caller's mode
    @tracing.collecting_later()
    def of(
        cls, model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None, **options: bool
    ) -> "Coupling":
        """options: within_groups, the units of a grouped convolution are the same channels of every group, not whole
        groups; whole_heads, of a dimension that is split as [heads, size] only whole heads go.
        """
        args, kwargs = arguments(args, kwargs)
        record = tracing.record(model, args, kwargs, **options)
        classes, reasons = record.labels.resolve()
        coupling = cls(record, classes, reasons, *_groups(record, classes, reasons))
        if not coupling.groups:
            raise InputError(coupling._nothing())
        with tracing.unchanged(model):
            return coupling._fitting(model, args, kwargs)

    # --- what the forward pass allows ---------------------------------------------------------------------------------

    def _fitting(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> "Coupling":
        """Self, if the model's forward pass runs without one unit of each group; else with what it takes to run.

        A forward pass may write down that the width of its input is heads x head size (nn.MultiheadAttention, Swin).
        Groups that meet in such a module with the same size are then linked, or numbers follow that did not. What still
        fails does not shrink; links only stay where that leaves more groups.
        """

        trials: dict[tuple[bytes, str], fits.Mismatch | None] = {}

        def failure(coupling: Coupling, clusters: list[list[int]]) -> fits.Mismatch | None:
            gone = coupling._one_step([i for cluster in clusters for i in cluster])
            if not gone.any():
                return None
            keep = coupling.record.kept(gone)
            attributes = coupling.attributes(model, keep, gone)
            key = (gone.tobytes(), repr(attributes))
            if key not in trials:  # candidates differ in few of them
                trials[key] = fits.trial(model, coupling.record, gone, keep, attributes, args, kwargs)
            return trials[key]

        def apart(coupling: Coupling, clusters: list[list[int]]) -> fits.Mismatch | None:
            """Pieces of several sizes, and numbers for several, may fit where all shrink and not where some do."""
            some = clusters[::2] if coupling.follows or self.record.labels.pieces else []
            return failure(coupling, clusters) or failure(coupling, some)

        def pinned(coupling: Coupling, failure: Callable) -> Coupling:
            stuck = failing(coupling.groups, coupling.clusters(), partial(failure, coupling))
            return coupling.pinned({i: f"the forward pass needs this size ({why})" for i, (why, *_) in stuck.items()})

        def renumbered(coupling: Coupling) -> Coupling:
            """With numbers that follow a size, or no longer do, where some cluster of each place only fits so."""
            stuck = failing(coupling.groups, coupling.clusters(), partial(failure, coupling)).keys()
            clusters = [cluster for cluster in coupling.clusters() if stuck & set(cluster)]
            for cluster in {_place(coupling.groups, cluster): cluster for cluster in clusters}.values():
                failed = failure(coupling, [cluster])
                end = farther(coupling, cluster, failed, set())
                if end is None:
                    several = coupling._several(model, cluster, failed.module)
                    end = next((choice for choice in several if not failure(choice, [cluster])), None)
                coupling = end or coupling
            return coupling

        def farther(
            coupling: Coupling, cluster: list[int], failed: fits.Mismatch | None, tried: set
        ) -> Coupling | None:
            """With one number after another that the pass comes farther by, up to its end; None if none leads there.

            The farthest first. Where a head is as wide as there are heads, that may be the wrong one of two numbers.
            """
            if failed is None:
                return coupling
            choices = coupling._choices(model, cluster, failed.module)
            rows = [(choice, failure(choice, [cluster])) for choice in choices]
            better = [(choice, later) for choice, later in rows if later is None or later.after > failed.after]
            better.sort(key=lambda row: row[1].after if row[1] else (math.inf,), reverse=True)
            for choice, later in better[:2]:
                follows = frozenset(choice.follows.items())
                if follows in tried:
                    continue
                tried.add(follows)
                if end := farther(choice, cluster, later, tried):
                    return end
            return None

        written = [(type(module), key) for module in model.modules() for key, _ in fits.written(module)]
        every = {(kind, key): True for kind, key in written if not key.startswith(fits.CONFIG)}
        linked, numbered = self._linked(), replace(self, follows=every)
        for candidate in (self, numbered, linked, replace(linked, follows=every)):
            if not apart(candidate, candidate.clusters()):
                return candidate
        candidates = [pinned(candidate, failure) for candidate in (linked, renumbered(self), numbered)]
        best = max(candidates, key=lambda c: (len(c.groups), sum(group.link is None for group in c.groups)))
        best = pinned(best, apart)
        if not best.groups or failure(best, best.clusters()):
            raise InputError(best._nothing())
        return best

    def _choices(self, model: nn.Module, cluster: list[int], name: str) -> list["Coupling"]:
        """In each, one number of the module `name` follows a size which did not, or the other way round."""
        gone = self._one_step(cluster)
        module, sizes = model.get_submodule(name), self._sizes(gone)
        changed = self.attributes(model, self.record.kept(gone), gone).get(name, {})
        return [
            replace(self, follows={**self.follows, (type(module), key): key not in changed})
            for key, value in fits.written(module)
            if any((name, n) in sizes for n in ([value] if type(value) is int else value))
        ]

    def _several(self, model: nn.Module, cluster: list[int], name: str) -> Iterator["Coupling"]:
        """In each, several numbers of the module `name` follow at once, of those for which it is unsure.

        They equal a size that shrinks and another that does not; one alone leads nowhere where a pass divides them.
        """
        sizes, module = self._sizes(self._one_step(cluster)), model.get_submodule(name)
        numbers = [(key, n) for key, n in fits.written(module) if type(n) is int and not key.startswith(fits.CONFIG)]
        unsure = [key for key, n in numbers if not sizes.get((name, n), (n, True))[1]][:UNSURE]
        for count in range(2, len(unsure) + 1):
            for keys in itertools.combinations(unsure, count):
                follows = {(type(module), key): key in keys for key in unsure}
                yield replace(self, follows={**self.follows, **follows})

    def _sizes(self, gone: np.ndarray) -> dict[tuple[str, int], tuple[int, bool]]:
        """{(module, size that its forward pass wrote down): (what it becomes, whether it always does)}"""
        seen: dict[tuple[str, int], set[int]] = {}
        for module, size, labels, axis in self.record.sizes:
            shrinks = labels is not None and gone[labels].any()
            seen.setdefault((module, size), set()).add(fits.remaining(gone[labels], axis) if shrinks else size)
        for axis in self.record.axes:  # as many experts as neurons, say
            if not gone[axis.base : axis.base + axis.size].any():
                seen.setdefault((axis.name.rpartition(".")[0], axis.size), set()).add(axis.size)
        changed = {(module, size): now - {size} for (module, size), now in seen.items()}
        return {place: (new.pop(), len(seen[place]) == 1) for place, new in changed.items() if len(new) == 1}

    def _linked(self) -> "Coupling":
        """Groups that have the same size in a view of the same module are linked."""
        group_of = np.full(len(self.classes), -1, dtype=np.int64)
        for i, units in enumerate(self.roots):
            group_of[units] = i
        seen: dict[tuple[str, int], int] = {}
        a, b = [], []
        for module, size, labels, _ in self.record.sizes:
            groups = np.unique(group_of[self.classes[labels]]) if labels is not None and labels.ndim == 1 else ()
            if len(groups) == 1 and groups[0] >= 0:
                a.append(int(groups[0]))
                b.append(seen.setdefault((module, size), int(groups[0])))
        links = components(len(self.groups), np.array(a, dtype=np.int64), np.array(b, dtype=np.int64)).tolist()
        linked = (
            replace(group, link=link if links.count(link) > 1 else None)
            for group, link in zip(self.groups, links, strict=True)
        )
        return replace(self, groups=tuple(linked))

    def _one_step(self, groups: list[int]) -> np.ndarray:
        """`gone` if the last unit of each of these groups goes, of linked groups the last equal part."""
        removed = {}
        for cluster in self.clusters():
            steps = math.gcd(*(self.groups[i].units for i in cluster))
            for i in set(groups) & set(cluster) if steps > 1 else ():
                removed[i] = torch.arange(self.groups[i].units) >= self.groups[i].units * (steps - 1) // steps
        return self.gone(removed)

    def pinned(self, reasons: Mapping[int, str]) -> "Coupling":
        """The same without these groups, {number: why they stay}."""
        rows = dict(self.reasons)
        for i, reason in reasons.items():
            rows |= dict.fromkeys(self.roots[i].tolist(), reason)
        free = [i for i in range(len(self.groups)) if i not in reasons]
        groups, roots = tuple(self.groups[i] for i in free), tuple(self.roots[i] for i in free)
        return replace(self, reasons=rows, groups=groups, roots=roots)

    # --- what it says -------------------------------------------------------------------------------------------------

    def clusters(self) -> list[list[int]]:
        """Numbers of the groups that keep the same fraction, each by itself where nothing links it."""
        clusters: dict[Any, list[int]] = {}
        for i, group in enumerate(self.groups):
            clusters.setdefault(("alone", i) if group.link is None else group.link, []).append(i)
        return list(clusters.values())

    def _nothing(self) -> str:
        why = "; ".join(f"{what}: {reason}" for what, reason in self.unprunable[:3])
        return f"Nothing in this model can be pruned ({why or 'it has no parameters that its forward pass uses'})."

    @cached_property
    def unprunable(self) -> list[tuple[str, str]]:
        """(parameter and dimension, why it stays), for those of which nothing can be removed."""
        free = {(m.name, m.dim) for group in self.groups for m in group.members}
        rows = []
        for axis in self.record.axes:
            if (axis.name, axis.dim) in free or axis.name in self.record.constants:
                continue
            classes = np.unique(self.classes[axis.base : axis.base + axis.size]).tolist()
            reasons = sorted({self.reasons[c] for c in classes if self.reasons.get(c)})
            if reasons or any(c not in self.reasons for c in classes):
                why = "; ".join(reasons) or "all of it hangs together as one unit"
                rows.append((f"{axis.name} dimension {axis.dim}", why))
        return rows + [(name, "is not used by the forward pass") for name in self.record.unused]

    def gone(self, removed: Mapping[int, Tensor]) -> np.ndarray:
        """Which labels go, [labels], if of group i the units go where removed[i] ([units], bool) is true."""
        gone = np.zeros(len(self.classes), dtype=bool)
        for i, units in removed.items():
            gone[self.roots[i][units.cpu().numpy()]] = True
        return gone[self.classes]

    def attributes(self, model: nn.Module, keep: fits.Keep, gone: np.ndarray) -> dict[str, dict[str, Any]]:
        """{module: {attribute: new value}} without the labels in `gone`.

        A number that equals a size which the module's forward pass wrote down (a view's 768, 12 heads) becomes what
        that size becomes, where all equal ones become the same and the number is the module's own and not its config's,
        but for those in `follows`. Numbers that are a whole shape there become what it becomes.
        """
        sizes = self._sizes(gone)
        modules = dict(model.named_modules())
        called: dict[str, str] = {}
        for name in modules:  # one that is not called serves the one that it is in by other methods
            called[name] = name if name in self.record.called else called[name.rpartition(".")[0]]

        def new(module: str, attribute: str, value: Any) -> Any:
            if type(value) is not int:
                operation = self.record.made.get((called[module], tuple(value)))
                numbers = fits.shape_of(operation, gone) if operation else [new(module, attribute, n) for n in value]
                return type(value)(numbers)
            size, always = sizes.get((called[module], value), (value, True))
            certain = always and not attribute.startswith(fits.CONFIG)
            return size if self.follows.get((type(modules[module]), attribute), certain) else value

        return fits.attributes(model, keep, new)

    def macs(self, gone: np.ndarray | None = None) -> int:
        """Multiply-adds of the products of the traced call, with the labels in `gone` removed."""
        total = 0.0
        for cost in self.record.costs:
            shares = [1 - gone[labels].mean() for labels in cost.factors] if gone is not None else []
            total += cost.macs * math.prod(shares)
        return round(total)


def _place(groups: Sequence[Group], cluster: list[int]) -> tuple[tuple[str, int], ...]:
    """The same for clusters of one place in repeated blocks."""
    return tuple((re.sub(r"\b\d+\b", "", groups[i].name), groups[i].units) for i in cluster)


def failing(
    groups: Sequence[Group], clusters: list[list[int]], failure: Callable[[list[list[int]]], Any]
) -> dict[int, Any]:
    """{group: what goes wrong without some of it}, by halving; failure(clusters) says what does, false if nothing.

    In repeated blocks the groups of one place fail alike: if the first, the middle and the last do, all do.
    """
    places: dict[Any, list[list[int]]] = {}
    for cluster in clusters:
        places.setdefault(_place(groups, cluster), []).append(cluster)

    def search(parts: list[list[list[int]]]) -> dict[int, Any]:
        whole = [cluster for part in parts for cluster in part]
        why = failure(whole)
        if not why:
            return {}
        samples = {0, len(whole) // 2, len(whole) - 1} if len(whole) > 1 else ()
        if len(parts) == 1 and all(failure([whole[n]]) for n in samples):
            return dict.fromkeys((i for cluster in whole for i in cluster), why)
        parts = parts if len(parts) > 1 else [[cluster] for cluster in whole]
        half = len(parts) // 2
        reasons = search(parts[:half]) | search(parts[half:])
        return reasons or dict.fromkeys((i for cluster in whole for i in cluster), why)

    return search(list(places.values()))


def _groups(
    record: Record, classes: np.ndarray, reasons: Mapping[int, str]
) -> tuple[tuple[Group, ...], tuple[np.ndarray, ...]]:
    """Classes that touch the same dimensions of the same parameters, and the same pieces of what is cut unevenly, are
    the units of one group.
    """
    free = np.ones(len(classes), dtype=bool)
    free[np.fromiter(reasons, dtype=np.int64, count=len(reasons))] = False  # by class
    signature = np.zeros(len(classes), dtype=np.uint64)
    touched = [(axis, classes[axis.base : axis.base + axis.size]) for axis in record.axes]
    places = [(f"{axis.name} {axis.dim}", roots) for axis, roots in touched]
    places += [(f"piece {n}", np.unique(classes[labels])) for n, labels in enumerate(record.labels.pieces)]
    for place, roots in places:
        signature[roots[free[roots]]] += np.uint64(zlib.crc32(place.encode()) * 0x9E3779B97F4A7C15 % 2**64)
    members: dict[int, list[tuple[Axis, np.ndarray]]] = {}
    for axis, roots in touched:
        for s in np.unique(signature[roots[free[roots]]]).tolist():
            members.setdefault(s, []).append((axis, roots))
    reads = np.zeros(len(classes), dtype=bool)
    for labels in record.contracted:
        reads[labels] = True
    groups: list[Group] = []
    units_of: list[np.ndarray] = []
    names: dict[str, int] = {}
    number = np.full(len(classes), -1, dtype=np.int64)
    for s, axes in members.items():
        _, first = axes[0]
        units, where = np.unique(first[free[first] & (signature[first] == np.uint64(s))], return_index=True)
        units = units[np.argsort(where)]  # in the order of the first parameter
        number[units] = np.arange(len(units))
        made = tuple(
            Member(axis.name, axis.dim, torch.from_numpy(number[roots]), "reads" if reads[axis.base] else "makes")
            for axis, roots in axes
        )
        number[units] = -1
        makers = [m.name for m in made if m.role == "makes" and m.name not in record.constants]
        if len(units) < 2 or not makers:
            continue
        name = next((name for name in makers if name.endswith("weight")), makers[0])
        names[name] = names.get(name, 0) + 1
        groups.append(Group(name if names[name] == 1 else f"{name}#{names[name]}", len(units), made))
        units_of.append(units)
    return tuple(groups), tuple(units_of)
