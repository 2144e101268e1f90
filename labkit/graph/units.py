"""Groups of units: classes of labels become units, and units in the same dimensions become groups.

A unit is a channel of a residual stage, a whole group of a grouped convolution, or an attention head with its rows and
columns: the operators decide.
"""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from labkit.graph.record import Axis, Record

Cluster = list[int]  # numbers of groups that keep the same fraction of their units


@dataclass(frozen=True, eq=False)
class Member:
    """A dimension of a parameter or buffer that loses entries with the units of a group.

    name, dim: the parameter or buffer, and its dimension.
    units: [size of the dimension], the unit of each index, -1 for an index of no unit.
    role: "reads" if a product sums over the dimension (the columns that read a channel), else "makes".
    """

    name: str
    dim: int
    units: Tensor
    role: str

    def indices(self, unit: int) -> Tensor:
        """Return the indices of a unit in the dimension."""
        return (self.units == unit).nonzero().squeeze(1)


@dataclass(frozen=True, eq=False)
class Group:
    """Units that are removed from the same parameters, each unit as a whole.

    name: of the first parameter that makes the channels, with #2 and so on for further groups of this name.
    units: how many.
    members: the dimensions that lose entries.
    link: groups with the same link keep the same fraction of their units; None for a group without a link.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    link: int | None = None

    @property
    def width(self) -> int:
        """The number of channels in a unit, on average, rounded down."""
        first = self.members[0].units
        return int((first >= 0).sum()) // self.units

    def __str__(self) -> str:
        wide = f" of {self.width}" if self.width > 1 else ""
        return f"{self.name}: {self.units} units{wide} in {len(self.members)} dimensions"


# --- from classes of labels to groups ---------------------------------------------------------------------------------


class _Side(NamedTuple):
    """A dimension of a parameter, and the class of each of its indices."""

    axis: Axis
    classes: np.ndarray


def group_units(
    record: Record, classes: np.ndarray, reasons: Mapping[int, str]
) -> tuple[tuple[Group, ...], tuple[np.ndarray, ...]]:
    """Collect the classes of labels in groups.

    Classes that touch the same dimensions of the same parameters, and the same pieces of a dimension that is cut
    unevenly, are the units of a group.

    classes: [labels], the class of each label.
    reasons: {class that never goes: reason}.
    Returns the groups, and for each group the class of each unit.
    """
    sides = [_Side(axis, classes[axis.labels]) for axis in record.axes]
    signatures = _signatures(record, sides, classes, reasons)
    reads = np.zeros(len(classes), dtype=bool)
    for labels in record.contracted:
        reads[labels] = True
    sides_by_signature: dict[int, list[_Side]] = {}
    for side in sides:
        for signature in np.unique(signatures[side.classes]).tolist():
            if signature:
                sides_by_signature.setdefault(signature, []).append(side)
    groups: list[Group] = []
    roots: list[np.ndarray] = []
    names: Counter[str] = Counter()
    unit_of_class = np.full(len(classes), -1, dtype=np.int64)  # filled for one group after another
    for signature, group_sides in sides_by_signature.items():
        units = _units_in_order(group_sides[0].classes, signatures, signature)
        unit_of_class[units] = np.arange(len(units))
        members = tuple(_member(side, unit_of_class, reads) for side in group_sides)
        unit_of_class[units] = -1
        makers = [member.name for member in members if member.role == "makes" and member.name not in record.constants]
        if len(units) < 2 or not makers:
            continue
        name = _most_telling(makers)
        names[name] += 1
        full_name = name if names[name] == 1 else f"{name}#{names[name]}"
        groups.append(Group(full_name, len(units), members))
        roots.append(units)
    return tuple(groups), tuple(roots)


def _signatures(record: Record, sides: Sequence[_Side], classes: np.ndarray, reasons: Mapping[int, str]) -> np.ndarray:
    """Return by class a number that is equal for classes in the same places, 0 for a class that never goes."""
    free = np.ones(len(classes), dtype=bool)
    free[np.fromiter(reasons, dtype=np.int64, count=len(reasons))] = False
    places = [(f"{axis.name} {axis.dim}", roots) for axis, roots in sides]
    for number, labels in enumerate(record.labels.pieces):
        places.append((f"piece {number}", np.unique(classes[labels])))
    signatures = np.zeros(len(classes), dtype=np.uint64)
    for place, roots in places:
        signatures[roots[free[roots]]] += _hash(place)  # once for each class, however often it is in `roots`
    return signatures


def _hash(place: str) -> np.uint64:
    return np.uint64(zlib.crc32(place.encode()) * 0x9E3779B97F4A7C15 % 2**64)


def _units_in_order(classes: np.ndarray, signatures: np.ndarray, signature: int) -> np.ndarray:
    """Return the classes with this signature, in the order of their first indices in a dimension."""
    in_group = classes[signatures[classes] == np.uint64(signature)]
    units, first_index = np.unique(in_group, return_index=True)
    return units[np.argsort(first_index)]


def _member(side: _Side, unit_of_class: np.ndarray, reads: np.ndarray) -> Member:
    axis = side.axis
    role = "reads" if reads[axis.base] else "makes"
    return Member(axis.name, axis.dim, torch.from_numpy(unit_of_class[side.classes]), role)


def _most_telling(names: Sequence[str]) -> str:
    """Return the first name of a weight, or the first name."""
    weights = [name for name in names if name.endswith("weight")]
    return weights[0] if weights else names[0]


# --- groups of one place in repeated blocks ---------------------------------------------------------------------------


def place_of(groups: Sequence[Group], cluster: Cluster) -> tuple[tuple[str, int], ...]:
    """Return a key that is the same for clusters of one place in repeated blocks."""
    return tuple((re.sub(r"\b\d+\b", "", groups[i].name), groups[i].units) for i in cluster)


Obstacle = Callable[[list[Cluster]], Any]


def failing(groups: Sequence[Group], clusters: list[Cluster], obstacle: Obstacle) -> dict[int, Any]:
    """Find the groups that cannot lose units, by halving.

    In repeated blocks the groups of one place fail alike: if the first, the middle and the last fail, all do.

    clusters: to be looked through.
    obstacle: obstacle(clusters) cuts these clusters and returns what goes wrong, a false value if nothing does.
    Returns {number of a group: what goes wrong without some of its units}.
    """
    places: dict[Any, list[Cluster]] = {}
    for cluster in clusters:
        places.setdefault(place_of(groups, cluster), []).append(cluster)
    return _failing_in(list(places.values()), obstacle)


def _failing_in(places: list[list[Cluster]], obstacle: Obstacle) -> dict[int, Any]:
    """Search clusters by halving; places: those of one place in a list."""
    clusters = [cluster for place in places for cluster in place]
    reason = obstacle(clusters)
    if not reason:
        return {}
    all_groups = {i: reason for cluster in clusters for i in cluster}
    if len(places) == 1:
        if _samples_fail(clusters, obstacle):
            return all_groups
        places = [[cluster] for cluster in clusters]
    half = len(places) // 2
    reasons = _failing_in(places[:half], obstacle) | _failing_in(places[half:], obstacle)
    return reasons or all_groups


def _samples_fail(clusters: list[Cluster], obstacle: Obstacle) -> bool:
    """Return True if the first, the middle and the last cluster fail, or if there is no other cluster."""
    if len(clusters) == 1:
        return True
    samples = {0, len(clusters) // 2, len(clusters) - 1}
    return all(obstacle([clusters[number]]) for number in samples)
