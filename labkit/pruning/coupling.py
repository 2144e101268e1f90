"""Which channels hang together: groups of parameter entries that can only be removed as one unit, found by tracing.

`trace` runs the model once on the meta device. What a unit is follows from the operators: a channel of a residual
stage, a whole group of a grouped convolution, an attention head with its rows and columns. What cannot shrink is
listed with the reason. Nothing is ranked or removed here.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labkit.errors import InputError
from labkit.pruning import fits, tracing
from labkit.pruning.labels import components
from labkit.pruning.tracing import Entry, Record


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
    computed, no weight is copied and the model is as before afterwards. The batch and all other sizes of the input, and
    the sizes of the output, are fixed. Raises InputError if the forward pass depends on values, or if nothing in the
    model can be pruned.
    """
    return list(Coupling.of(model, args, kwargs).groups)


def arguments(args: Any, kwargs: Mapping[str, Any] | None) -> tuple[tuple, dict[str, Any]]:
    if isinstance(args, (Tensor, Mapping)) or not isinstance(args, (tuple, list)):
        args = (args,)
    return tuple(args), dict(kwargs or {})


@dataclass(eq=False)
class Coupling:
    """What a trace found, ready to say what a choice of units means for every parameter."""

    record: Record
    classes: np.ndarray  # of every label
    reasons: Mapping[int, str]  # of the classes that stay
    groups: tuple[Group, ...]
    roots: tuple[np.ndarray, ...]  # per group: the class of each unit
    numbers: bool = False  # attributes follow a size that shrinks even where the module has another one that does not

    @classmethod
    @torch.inference_mode(False)  # what is made here outlives the caller's mode
    def of(cls, model: nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> "Coupling":
        args, kwargs = arguments(args, kwargs)
        record = tracing.record(model, args, kwargs)
        classes, reasons = record.labels.resolve()
        coupling = cls(record, classes, reasons, *_groups(record, classes, reasons))
        if not coupling.groups:
            raise InputError(coupling.nothing())
        return coupling.fitting(model, args, kwargs)

    def fitting(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> "Coupling":
        """Self, if the model's forward pass runs without one unit of each group; else with what it takes to run.

        A forward pass may write down that the width of its input is heads x head size (nn.MultiheadAttention, Swin).
        Groups that meet in such a module with the same size are then linked. What still fails does not shrink; links
        are only kept where that leaves more groups.
        """

        def error(coupling: Coupling, clusters: list[list[int]]) -> str:
            only = {i for cluster in clusters for i in cluster}
            return fits.error(model, coupling, coupling.one_step(only), args, kwargs) if only else ""

        def failing(coupling: Coupling, clusters: list[list[int]]) -> dict[int, str]:
            """{group: what goes wrong without some of it}"""
            why = error(coupling, clusters)
            if not why or len(clusters) == 1:
                return dict.fromkeys(clusters[0], why) if why else {}
            half = len(clusters) // 2
            parts = failing(coupling, clusters[:half]) | failing(coupling, clusters[half:])
            return parts or dict.fromkeys((i for cluster in clusters for i in cluster), why)

        linked = self._linked()
        for candidate in (self, replace(self, numbers=True), linked, replace(linked, numbers=True)):
            if not error(candidate, candidate.clusters()):
                return candidate
        last = (linked, self, replace(self, numbers=True))
        left = [candidate._without(failing(candidate, candidate.clusters())) for candidate in last]
        best = max(left, key=lambda candidate: len(candidate.groups))
        if not best.groups or error(best, best.clusters()):
            raise InputError(best.nothing())
        return best

    def clusters(self) -> list[list[int]]:
        """Numbers of the groups that keep the same fraction, each by itself where nothing links it."""
        found: dict[Any, list[int]] = {}
        for i, group in enumerate(self.groups):
            found.setdefault(("alone", i) if group.link is None else group.link, []).append(i)
        return list(found.values())

    def one_step(self, only: set[int]) -> np.ndarray:
        """`gone` if the last unit of each of these groups goes, of linked groups the last equal part."""
        removed = {}
        for cluster in self.clusters():
            steps = math.gcd(*(self.groups[i].units for i in cluster))
            for i in only & set(cluster) if steps > 1 else ():
                removed[i] = torch.arange(self.groups[i].units) >= self.groups[i].units * (steps - 1) // steps
        return self.gone(removed)

    def _linked(self) -> "Coupling":
        """Groups that have the same size in a view of the same module are linked."""
        group_of = np.full(len(self.classes), -1, dtype=np.int64)
        for i, units in enumerate(self.roots):
            group_of[units] = i
        seen: dict[tuple[str, int], int] = {}
        a, b = [], []
        for module, size, labels, _ in self.record.sizes:
            own = np.unique(group_of[self.classes[labels]]) if labels is not None and labels.ndim == 1 else ()
            if len(own) == 1 and own[0] >= 0:
                a.append(int(own[0]))
                b.append(seen.setdefault((module, size), int(own[0])))
        links = components(len(self.groups), np.array(a, dtype=np.int64), np.array(b, dtype=np.int64))
        several = {int(link) for link, n in zip(*np.unique(links, return_counts=True), strict=True) if n > 1}
        groups = tuple(
            replace(group, link=int(link) if int(link) in several else None)
            for group, link in zip(self.groups, links, strict=True)
        )
        return replace(self, groups=groups)

    def _without(self, failing: Mapping[int, str]) -> "Coupling":
        """The same without these groups, for the reasons given."""
        reasons = dict(self.reasons)
        for i, reason in failing.items():
            reasons |= dict.fromkeys(self.roots[i].tolist(), f"the forward pass needs this size ({reason})")
        left = [i for i in range(len(self.groups)) if i not in failing]
        groups, roots = tuple(self.groups[i] for i in left), tuple(self.roots[i] for i in left)
        return replace(self, reasons=reasons, groups=groups, roots=roots)

    def nothing(self) -> str:
        why = "; ".join(f"{what}: {reason}" for what, reason in self.unprunable[:3])
        return f"Nothing in this model can be pruned ({why or 'it has no parameters that its forward pass uses'})."

    @cached_property
    def unprunable(self) -> list[tuple[str, str]]:
        """(parameter and dimension, why it stays), for those of which nothing can be removed."""
        free = {name for group in self.groups for name in ((m.name, m.dim) for m in group.members)}
        found = []
        for entry in self.record.entries:
            if (entry.name, entry.dim) in free or entry.name in self.record.constants:
                continue
            classes = np.unique(self.classes[entry.base : entry.base + entry.size]).tolist()
            reasons = {self.reasons[c] for c in classes if self.reasons.get(c)}
            silent = all(c in self.reasons for c in classes)
            if reasons or not silent:
                why = "; ".join(sorted(reasons)) or "all of it hangs together as one unit"
                found.append((f"{entry.name} dimension {entry.dim}", why))
        found += [(name, "is not used by the forward pass") for name in self.record.unused]
        return found

    def gone(self, removed: Mapping[int, Tensor]) -> np.ndarray:
        """Which labels go, [labels], if of group i the units go where removed[i] ([units], bool) is true."""
        gone = np.zeros(len(self.classes), dtype=bool)
        for i, units in removed.items():
            gone[self.roots[i][units.cpu().numpy()]] = True
        return gone[self.classes]

    def kept(self, gone: np.ndarray) -> dict[str, dict[int, Tensor]]:
        """{parameter or buffer: {dimension: kept indices}}, only where something goes."""
        kept: dict[str, dict[int, Tensor]] = {}
        for entry in self.record.entries:
            stays = ~gone[entry.base : entry.base + entry.size]
            if not stays.all():
                for name in self.record.names(entry.name):
                    kept.setdefault(name, {})[entry.dim] = torch.from_numpy(stays.nonzero()[0])
        return kept

    def sizes(self, gone: np.ndarray) -> dict[str, dict[int, int]]:
        """{module: {size written down as a number: what it becomes}}, where that is certain."""
        found: dict[str, dict[int, set[int]]] = {}
        for module, size, labels, axis in self.record.sizes:
            now = size
            if labels is not None and gone[labels].any():
                alive = ~gone[labels]
                now = int(alive.any(tuple(i for i in range(alive.ndim) if i != axis)).sum())
            found.setdefault(module, {}).setdefault(size, set()).add(now)
        certain: dict[str, dict[int, int]] = {}
        for module, sizes in found.items():
            for size, now in sizes.items():
                changed = now - {size}
                if len(changed) == 1 and (len(now) == 1 or self.numbers):
                    certain.setdefault(module, {})[size] = changed.pop()
        return certain

    def macs(self, gone: np.ndarray | None = None) -> int:
        """Multiply-adds of the products of the traced call, with the labels in `gone` removed."""
        total = 0.0
        for cost in self.record.costs:
            share = 1.0
            for labels in cost.factors if gone is not None else ():
                share *= 1 - gone[labels].mean()
            total += cost.macs * share
        return round(total)


def _groups(
    record: Record, classes: np.ndarray, reasons: Mapping[int, str]
) -> tuple[tuple[Group, ...], tuple[np.ndarray, ...]]:
    """Classes that touch the same dimensions of the same parameters are the units of one group."""
    free = np.ones(len(classes), dtype=bool)
    free[np.fromiter(reasons, dtype=np.int64, count=len(reasons))] = False  # by class
    signature = np.zeros(len(classes), dtype=np.uint64)
    members: dict[int, list[tuple[Entry, np.ndarray]]] = {}
    for entry in record.entries:
        own = classes[entry.base : entry.base + entry.size]
        here = np.unique(own[free[own]])
        signature[here] += np.uint64(zlib.crc32(f"{entry.name} {entry.dim}".encode()) * 0x9E3779B97F4A7C15 % 2**64)
    for entry in record.entries:
        own = classes[entry.base : entry.base + entry.size]
        for s in np.unique(signature[own[free[own]]]).tolist():
            members.setdefault(s, []).append((entry, own))
    reads = np.zeros(len(classes), dtype=bool)
    for labels in record.contracted:
        reads[labels] = True
    groups, roots = [], []
    named: dict[str, int] = {}
    for s, found in members.items():
        _, first = found[0]
        inside = free[first] & (signature[first] == np.uint64(s))
        units, where = np.unique(first[inside], return_index=True)
        units = units[np.argsort(where)]  # in the order of the first parameter
        if len(units) < 2:
            continue
        number = np.full(len(classes), -1, dtype=np.int64)
        number[units] = np.arange(len(units))
        made = []
        for entry, own in found:
            role = "reads" if reads[entry.base] else "makes"
            made.append(Member(entry.name, entry.dim, torch.from_numpy(number[own]), role))
        makers = [m.name for m in made if m.role == "makes" and m.name not in record.constants]
        if not makers:
            continue
        name = next((n for n in makers if n.endswith("weight")), makers[0])
        named[name] = named.get(name, 0) + 1
        name = name if named[name] == 1 else f"{name}#{named[name]}"
        groups.append(Group(name, len(units), tuple(made)))
        roots.append(units)
    return tuple(groups), tuple(roots)
