"""What a model's quality costs: the trade-offs that recorded tables hold, their Pareto fronts, and figures of them.

QUALITY and COST say which columns are which; a table without one of each gives no figure. A front joins what no other
point beats in both. It is drawn through the values, whose intervals may overlap: the figure shows them.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from course.points import Estimate, Point, estimate, pooled, varying
from course.rows import layout, named, number, short
from labkit.records import RunRecord

# Columns that say how good a model is, and whether more is better.
QUALITY = {"accuracy": True, "agreement": True, "perplexity": False, "perplexity / dense": False}
# Columns that say what it costs: their name, their unit, the name of the axis, and how a value gets there.
_SAME, _REST, _INVERSE = (lambda value: value), (lambda value: 1 - value), (lambda value: 1 / value)
COST: tuple[tuple[str, str, str, Callable[[float], float]], ...] = (
    (r"(MACs|FLOPs|parameters|time|bytes) left", "", r"share of the dense model's \1", _SAME),
    (r"(MACs|FLOPs|parameters|bytes) removed", "", r"share of the dense model's \1", _REST),
    (r"speed-up", "x?", "share of the dense model's time", _INVERSE),
    (r".+", "s|ms|µs", "latency", _SAME),
    (r".+", "B|kB|MB|GB|KiB|MiB|GiB", "size", _SAME),
    (r"MACs|FLOPs", ".*", r"\g<0>", _SAME),
)
SHARE = "share of the dense model's"
FORMAT = "stored as"  # the setting that tells several sizes in one row apart


@dataclass(frozen=True, eq=False)
class Spot:
    """A row of a table, over all runs of a point: what it cost and how good it was. `series` is its line in the key."""

    point: Point
    series: str
    settings: Mapping[str, str]
    cost: Estimate
    quality: Estimate
    runs: int

    @property
    def dense(self) -> bool:
        """Whether it is the model that was not compressed, stored as such."""
        values = {name: value for name, value in self.settings.items() if name != FORMAT}
        uncut = "dense" in values.values() or values.get("sparsity") == "0"
        return uncut and self.settings.get(FORMAT, "dense") == "dense"


@dataclass(frozen=True, eq=False)
class TradeOff:
    """One quality against one cost, out of the tables of one name. `more`: whether more of the quality is better."""

    lesson: str
    table: str
    cost: str
    cost_unit: str
    quality: str
    quality_unit: str
    more: bool
    simulated: bool
    spots: tuple[Spot, ...]

    @functools.cached_property
    def differing(self) -> dict[str, list[Any]]:
        """The parameters that differ between the spots' runs, with their values."""
        return varying(list(dict.fromkeys(spot.point for spot in self.spots)))

    @functools.cached_property
    def swept(self) -> list[str]:
        """The parameters that differ within a sweep, texts first: colours tell texts apart best.

        Runs of other machines, presets or people make no sweep, whatever their parameters.
        """
        if len({(spot.point.where, spot.point.here) for spot in self.spots}) > 1:
            return []
        found = self.differing
        return sorted(found, key=lambda name: not any(isinstance(value, str) for value in found[name]))

    def front(self, spots: Sequence[Spot]) -> list[Spot]:
        """The spots that no other beats: none is both no dearer and no worse, and better in one. By rising cost."""
        sign = -1 if self.more else 1
        best, kept = math.inf, []
        for spot in sorted(spots, key=lambda one: (one.cost[0], sign * one.quality[0])):
            if sign * spot.quality[0] < best:
                best = sign * spot.quality[0]
                kept.append(spot)
        return kept


def trade_offs(chosen: Sequence[Point]) -> list[TradeOff]:
    """Every quality against every cost in the tables of the points, which are of one lesson."""
    names = dict.fromkeys(
        entry["name"]
        for point in chosen
        for record in point.records
        for entry in record.measurements
        if entry["kind"] == "table"
    )
    return [trade_off for name in names for trade_off in _of_table(name, chosen)]


def _of_table(name: str, chosen: Sequence[Point]) -> Iterable[TradeOff]:
    spots: dict[tuple, list[Spot]] = {}
    simulated = False
    for point in chosen:
        entries = [one for record in point.records if (one := _table(record, name))]
        simulated |= any(entry.get("simulated") for entry in entries)
        for axes, found in _spots(point, entries).items():
            spots.setdefault(axes, []).extend(found)
    for (cost, cost_unit, quality, unit), found in spots.items():
        yield TradeOff(
            chosen[0].lesson, name, cost, cost_unit, quality, unit, QUALITY[quality], simulated, _distinct(found)
        )


def _distinct(spots: Sequence[Spot]) -> tuple[Spot, ...]:
    """The spots without the repetitions over a parameter of the runs that changes nothing in this table."""
    for name in varying(list(dict.fromkeys(spot.point for spot in spots))):
        alike: dict[str, list[Spot]] = {}
        for spot in spots:
            others = {key: value for key, value in spot.point.parameters.items() if key != name}
            which = json.dumps([spot.point.where, spot.point.here, others, spot.settings], sort_keys=True)
            alike.setdefault(which, []).append(spot)
        if all(len({(spot.cost, spot.quality) for spot in some}) == 1 for some in alike.values()):
            spots = [some[0] for some in alike.values()]
    return tuple(spots)


def _table(record: RunRecord, name: str) -> Mapping[str, Any] | None:
    entry = record.named(name)
    return entry if entry and entry["kind"] == "table" else None


def _spots(point: Point, entries: Sequence[Mapping[str, Any]]) -> dict[tuple, list[Spot]]:
    """The spots of one point by (cost, its unit, quality, its unit); repetitions, also those in a table, are pooled."""
    values: dict[tuple, dict[tuple, list[tuple[Estimate, Estimate]]]] = {}
    for entry in entries:
        listed, keys, results, bounds = layout(entry)
        qualities = [column for column in results if named(column)[0] in QUALITY]
        costs = {column: axis for column in [*keys, *results] if (axis := _cost_axis(column))}
        kinds = [axis[0] for axis in costs.values()]
        for row in listed:
            for quality in qualities:
                for column, (axis, unit, convert) in costs.items():
                    y, x = number(row.get(quality)), number(row.get(column))
                    if y is None or x is None or not math.isfinite(x * y) or (convert is _INVERSE and x == 0):
                        continue
                    settings = {key: short(row.get(key)) for key in keys if key != "seed"}
                    if kinds.count(axis) > 1:
                        settings[FORMAT] = named(column)[0]
                    labels = [v for k, v in settings.items() if k == FORMAT or isinstance(row.get(k), str)]
                    pair = _turned(_bounded(row, column, x, bounds), convert), _bounded(row, quality, y, bounds)
                    which = (", ".join(labels), tuple(settings.items()))
                    values.setdefault((axis, unit, *named(quality)), {}).setdefault(which, []).append(pair)
    return {
        axes: [
            Spot(point, series, dict(key), pooled([c for c, _ in pairs]), pooled([q for _, q in pairs]), len(pairs))
            for (series, key), pairs in found.items()
        ]
        for axes, found in values.items()
    }


def _cost_axis(column: str) -> tuple[str, str, Callable[[float], float]] | None:
    name, unit = named(column)
    for pattern, units, axis, convert in COST:
        if (match := re.fullmatch(pattern, name)) and re.fullmatch(units, unit):
            return match.expand(axis), "" if SHARE in axis else unit, convert
    return None


def _bounded(row: Mapping[str, Any], column: str, value: float, bounds: Mapping[str, tuple[str, str]]) -> Estimate:
    return estimate(value, [number(row.get(side)) for side in bounds[column]] if column in bounds else None)


def _turned(one: Estimate, convert: Callable[[float], float]) -> Estimate:
    value, *ends = one
    low, high = sorted(convert(end) if end and math.isfinite(end) else math.copysign(math.inf, end) for end in ends)
    return convert(value), low, high
