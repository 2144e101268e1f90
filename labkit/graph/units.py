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
    """A dimension of a parameter or buffer, in which entries go with the units of a group.

    name, dim: the parameter or buffer, and the dimension.
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
    """Units to be removed from the same parameters, each unit as a whole.

    name: name of the first parameter that makes the channels, with #2 and so on for further groups of the same name.
    units: how many.
    members: the dimensions in which entries go.
    link: groups with the same link keep the same fraction of units; None for a group without a link.
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


class _AxisClasses(NamedTuple):
    """A dimension of a parameter, and the class of each index."""

    axis: Axis
    classes: np.ndarray


def group_units(
    record: Record, classes: np.ndarray, reasons: Mapping[int, str]
) -> tuple[tuple[Group, ...], tuple[np.ndarray, ...]]:
    """Collect the classes of labels in groups.

    The units of a group are classes in the same dimensions of the same parameters, and in the same pieces of
    dimensions cut unevenly.

    record: record of the traced call.
    classes: [labels], the class of each label.
    reasons: {class to stay for good: reason}.
    Returns the groups, and for each group the class of each unit.
    """
    sides = [_AxisClasses(axis, classes[axis.labels]) for axis in record.axes]
    signatures = _signatures(record, sides, classes, reasons)
    reads = np.zeros(len(classes), dtype=bool)
    for labels in record.contracted:
        reads[labels] = True
    sides_by_signature: dict[int, list[_AxisClasses]] = {}
    for side in sides:
        for signature in np.unique(signatures[side.classes]).tolist():
            if signature:
                sides_by_signature.setdefault(signature, []).append(side)
    groups: list[Group] = []
    unit_classes: list[np.ndarray] = []
    names: Counter[str] = Counter()
    unit_of_class = np.full(len(classes), -1, dtype=np.int64)  # filled for one group after another
    for signature, group_sides in sides_by_signature.items():
        first_side = group_sides[0]
        units = _units_in_order(first_side.classes, signatures, signature)
        unit_of_class[units] = np.arange(len(units))
        members = tuple(_member(side, unit_of_class, reads) for side in group_sides)
        unit_of_class[units] = -1
        makers = [member.name for member in members if member.role == "makes"]
        makers = [name for name in makers if name not in record.constants]
        if len(units) > 1 and makers:
            name = _most_telling(makers)
            names[name] += 1
            suffix = "" if names[name] == 1 else f"#{names[name]}"
            groups.append(Group(name + suffix, len(units), members))
            unit_classes.append(units)
    return tuple(groups), tuple(unit_classes)


def _signatures(
    record: Record, sides: Sequence[_AxisClasses], classes: np.ndarray, reasons: Mapping[int, str]
) -> np.ndarray:
    """Return by class a number, equal for classes in the same places, 0 for a class to stay for good."""
    free = np.ones(len(classes), dtype=bool)
    free[np.fromiter(reasons, dtype=np.int64, count=len(reasons))] = False
    places = []
    for axis, axis_classes in sides:
        places.append((f"{axis.name} {axis.dim}", axis_classes))
    for number, labels in enumerate(record.labels.pieces):
        places.append((f"piece {number}", np.unique(classes[labels])))
    signatures = np.zeros(len(classes), dtype=np.uint64)
    for place, place_classes in places:
        free_classes = place_classes[free[place_classes]]
        signatures[free_classes] += _hash(place)  # once for each class, however often the place has it
    return signatures


def _hash(place: str) -> np.uint64:
    spread = zlib.crc32(place.encode()) * 0x9E3779B97F4A7C15
    return np.uint64(spread % 2**64)


def _units_in_order(classes: np.ndarray, signatures: np.ndarray, signature: int) -> np.ndarray:
    """Return the classes with the given signature, in the order of first indices in a dimension."""
    in_group = classes[signatures[classes] == np.uint64(signature)]
    units, first_index = np.unique(in_group, return_index=True)
    return units[np.argsort(first_index)]


def _member(side: _AxisClasses, unit_of_class: np.ndarray, reads: np.ndarray) -> Member:
    axis = side.axis
    role = "reads" if reads[axis.base] else "makes"
    return Member(axis.name, axis.dim, torch.from_numpy(unit_of_class[side.classes]), role)


def _most_telling(names: Sequence[str]) -> str:
    """Return the first name of a weight, or the first name."""
    weights = [name for name in names if name.endswith("weight")]
    return weights[0] if weights else names[0]


# --- groups of one place in repeated blocks ---------------------------------------------------------------------------


def place_of(groups: Sequence[Group], cluster: Cluster) -> tuple[tuple[str, int], ...]:
    """Return a key, equal for clusters of the same place in repeated blocks."""
    place = []
    for i in cluster:
        name_without_numbers = re.sub(r"\b\d+\b", "", groups[i].name)
        place.append((name_without_numbers, groups[i].units))
    return tuple(place)


Obstacle = Callable[[list[Cluster]], Any]


def failing(groups: Sequence[Group], clusters: list[Cluster], obstacle: Obstacle) -> dict[int, Any]:
    """Find the groups in which units cannot go, by halving.

    In repeated blocks the groups of a place fail alike: if the first, the middle and the last fail, all do.

    groups: groups of the model.
    clusters: clusters to be searched.
    obstacle: obstacle(clusters) cuts clusters and returns the failure, a false value for success.
    Returns {number of a group: failure without some units}.
    """
    places: dict[Any, list[Cluster]] = {}
    for cluster in clusters:
        places.setdefault(place_of(groups, cluster), []).append(cluster)
    return _failing_in(list(places.values()), obstacle)


def _failing_in(places: list[list[Cluster]], obstacle: Obstacle) -> dict[int, Any]:
    """Search clusters by halving; `places` has a list of clusters for each place."""
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
    reasons = _failing_in(places[:half], obstacle)
    reasons |= _failing_in(places[half:], obstacle)
    return reasons or all_groups


def _samples_fail(clusters: list[Cluster], obstacle: Obstacle) -> bool:
    """Return True if the first, the middle and the last cluster fail, or for a single cluster."""
    if len(clusters) == 1:
        return True
    samples = {0, len(clusters) // 2, len(clusters) - 1}
    return all(obstacle([clusters[number]]) for number in samples)
