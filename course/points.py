"""Runs of one lesson gathered into points: runs that differ only in SEED are repetitions, and give mean and interval.

A sweep is nothing more than several points of a lesson on one machine at one preset; how it was run does not matter.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.records import RunRecord
from labkit.stats import mean_ci

Estimate = tuple[float, float, float]  # value, low, high; the ends are infinite where there is no interval


@dataclass(frozen=True, eq=False)
class Point:
    """Runs of a lesson on one machine at one preset with the same parameters, one a seed. `here`: the user's own."""

    records: tuple[RunRecord, ...]
    here: bool = True

    @property
    def lesson(self) -> str:
        return self.records[0].lesson

    @property
    def parameters(self) -> dict[str, Any]:
        return {name: value for name, value in self.records[0].parameters.items() if name != "SEED"}

    @property
    def where(self) -> tuple[str, str, str, str]:
        """Lesson, machine, kind of device and preset: what the points of a sweep have in common."""
        return _where(self.records[0])


def points(records: Iterable[RunRecord], *, here: bool = True) -> list[Point]:
    """The points that the records make; of several runs with the same seed the last one given counts."""
    found: dict[str, dict[Any, RunRecord]] = {}
    for one in records:
        key = json.dumps([_where(one), Point((one,)).parameters], sort_keys=True)
        found.setdefault(key, {})[one.parameters.get("SEED")] = one
    return [Point(tuple(seeds.values()), here) for seeds in found.values()]


def sweeps(chosen: Iterable[Point]) -> list[list[Point]]:
    """The points that belong together, lesson by lesson: several points of one lesson, or one with several seeds."""
    together: dict[tuple, list[Point]] = {}
    for one in chosen:
        together.setdefault(one.where, []).append(one)
    return [
        sorted(some, key=lambda one: _order(one.parameters.values()))
        for _, some in sorted(together.items())
        if len(some) > 1 or len(some[0].records) > 1
    ]


def varying(chosen: Sequence[Point]) -> dict[str, list[Any]]:
    """The parameters that differ between the points, with their values in order."""
    names = dict.fromkeys(name for one in chosen for name in one.parameters)
    values = {name: {json.dumps(v): v for v in (one.parameters.get(name) for one in chosen)} for name in names}
    return {name: sorted(found.values(), key=lambda v: _order([v])) for name, found in values.items() if len(found) > 1}


def pooled(estimates: Sequence[Estimate]) -> Estimate:
    """One estimate as it is; of several, one a seed, the mean of the values with its interval over the seeds."""
    return estimates[0] if len(estimates) == 1 else mean_ci([value for value, _, _ in estimates])


def estimate(value: float, ci95: Sequence[Any] | None) -> Estimate:
    """A recorded value with its interval; a record writes infinity as a text."""
    low, high = map(float, ci95) if ci95 and None not in ci95 else (-math.inf, math.inf)
    return float(value), low, high


def _where(record: RunRecord) -> tuple[str, str, str, str]:
    return record.lesson, str(record.machine.get("slug", "")), record.device.partition(":")[0], record.preset


def _order(values: Iterable[Any]) -> list[tuple]:
    """A key that sorts numbers by size and puts them before texts."""
    return [(isinstance(v, str), v) if isinstance(v, int | float | str) else (True, str(v)) for v in values]
