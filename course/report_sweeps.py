"""The report's sections on sweeps: values at the points of a grid, with the best point marked, as a table and lines.

The runs of a sweep differ in parameters. A parameter moves a value if the value changes with the parameter, beyond
rounding, or, for ratios from a clock, beyond the differences between any two runs.
"""

import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from course.results import RunColumn, frame, short, with_unit
from course.tradeoffs import RANKED, Estimate, figure, literal, picture, pooled, trade_offs
from labkit import show
from labkit.lesson.records import RunRecord

MOST_COLUMNS, MOST_FIGURES = 8, 4  # of a sweep
# What a ratio has to differ by for a parameter to have moved it: the interval of a run holds nothing of what changes
# from one run to the next, and ratios that no parameter touches were seen to differ by several per cent.
BETWEEN_RUNS = 0.1


@dataclass(frozen=True, eq=False)
class SweepPoint:
    """Runs of a lesson on a machine at a preset, with only the seed different."""

    parameters: dict[str, Any]
    runs: list[RunRecord]


@dataclass(frozen=True, eq=False)
class SweptValue:
    """A recorded value over a sweep.

    name       name, and key of the row if the value comes from a table
    unit       unit, such as "ms"
    role       "quality", "cost", "setting" or "result"
    clock      True if a clock made the value
    estimates  number of the point in the sweep -> (value, low, high); points without the value are left out
    """

    name: str
    unit: str
    role: str
    clock: bool
    estimates: dict[int, Estimate]

    @property
    def best(self) -> int | None:
        """The number of the best point; None for a value without a better end or with a single point."""
        if self.role not in RANKED or len(self.estimates) < 2:
            return None

        def value(point: int) -> float:
            return self.estimates[point][0]

        return max(self.estimates, key=value) if self.role == "quality" else min(self.estimates, key=value)

    @property
    def moves(self) -> bool:
        """Return True if the parameters change the value.

        A value without a clock moves if any two points differ beyond rounding. A ratio (unit "x"), measured within a
        run, moves if two intervals lie apart and the largest ratio exceeds the smallest by BETWEEN_RUNS. Times never
        count: the machine changes from run to run.
        """
        estimates = list(self.estimates.values())
        values = [value for value, _, _ in estimates]
        if not self.clock:
            return any(not math.isclose(value, values[0], rel_tol=1e-9) for value in values)
        if self.unit != "x":
            return False
        highest_low = max(low for _, low, _ in estimates)
        lowest_high = min(high for _, _, high in estimates)
        intervals_lie_apart = highest_low > lowest_high
        return intervals_lie_apart and max(values) > (1 + BETWEEN_RUNS) * min(values)


def sweeps(records: Iterable[RunRecord]) -> list[list[SweepPoint]]:
    """Group records into sweeps: the points of a lesson on the same machine and device, at the same preset.

    A group is a sweep if the group has several points, or a point with several seeds. Of several runs with the same
    parameters and seed the last counts. Points are sorted by parameters.
    """
    points_by_place: dict[tuple, dict[str, dict[Any, RunRecord]]] = {}
    for record in records:
        points = points_by_place.setdefault(_place(record), {})
        parameters = {name: value for name, value in record.parameters.items() if name != "SEED"}
        runs_by_seed = points.setdefault(json.dumps(parameters, sort_keys=True), {})
        runs_by_seed[record.parameters.get("SEED")] = record

    groups = []
    for place in sorted(points_by_place):
        points = []
        for parameters, runs_by_seed in points_by_place[place].items():
            points.append(SweepPoint(json.loads(parameters), list(runs_by_seed.values())))
        if len(points) > 1 or len(points[0].runs) > 1:
            groups.append(sorted(points, key=_order_of_point))
    return groups


def _place(record: RunRecord) -> tuple[str, str, str, str]:
    machine = str(record.machine.get("slug", ""))
    kind_of_device = record.device.partition(":")[0]
    return record.lesson, machine, kind_of_device, record.preset


def _order_of_point(point: SweepPoint) -> list[tuple]:
    return [_order(value) for value in point.parameters.values()]


def _order(value: Any) -> tuple:
    """Make a key that sorts numbers by size and puts numbers before texts."""
    if isinstance(value, int | float):
        return False, value
    return True, str(value)


def swept(points: Sequence[SweepPoint]) -> dict[str, Any]:
    """Prepare the section of a sweep for the template report.html.j2.

    points  the points of a sweep, from `sweeps`

    Returns the title, the grid, the table of combinations ("points" and "moved": the values moved by a parameter), the
    remaining values ("rest") and the figures.
    """
    grid = _grid(points)
    values = _values(points)
    moved = _distinct(value for value in values if value.moves)[:MOST_COLUMNS]
    first = points[0].runs[0]
    seeds = set()
    for point in points:
        seeds.update(run.parameters.get("SEED", 0) for run in point.runs)
    return {
        "title": f"Sweep of {first.lesson} {first.title}, {first.preset}",
        "first": first,
        "count": sum(len(point.runs) for point in points),
        "grid": {name: ", ".join(map(short, settings)) for name, settings in grid.items()},
        "seeds": sorted(seeds),
        "points": points,
        "moved": moved,
        "rest": [value for value in values if value not in moved],
        "figures": _figures(points, grid, moved) if grid else [],
        "between_runs": BETWEEN_RUNS,
    }


def _grid(points: Sequence[SweepPoint]) -> dict[str, list[Any]]:
    """Map each parameter with several values in the sweep to the sorted values."""
    names: dict[str, None] = {}
    for point in points:
        names |= dict.fromkeys(point.parameters)
    grid = {}
    for name in names:
        values = [point.parameters.get(name) for point in points]
        distinct = {json.dumps(value): value for value in values}  # a value may be a list, which has no hash
        if len(distinct) > 1:
            grid[name] = sorted(distinct.values(), key=_order)
    return grid


def _distinct(values: Iterable[SweptValue]) -> list[SweptValue]:
    """Keep the first of several values with the same numbers at all points."""
    by_numbers: dict[tuple, SweptValue] = {}
    for value in values:
        by_numbers.setdefault(tuple(value.estimates.items()), value)
    return list(by_numbers.values())


def _values(points: Sequence[SweepPoint]) -> list[SweptValue]:
    """List every number of the records, pooled over seeds: single values first, then values of tables."""
    tables = [frame(point.runs).assign(point=number) for number, point in enumerate(points)]
    rows = pd.concat(tables, ignore_index=True)
    measured = rows["value"].map(math.isfinite)
    about_the_run = rows["name"].str.startswith("run: ")  # its time and memory
    rows = rows[measured & ~about_the_run]
    row_of_table = rows["key"].map(lambda key: f", {key}" if key else "")
    rows = rows.assign(label=rows["name"] + row_of_table)
    rows = rows.sort_values("key", key=lambda keys: keys != "", kind="stable")

    values = []
    for label, same_label in rows.groupby("label", sort=False):
        estimates = {}
        for number, repetitions in same_label.groupby("point"):
            first = repetitions.iloc[0]
            estimates[number] = pooled(list(repetitions["value"]), (first["low"], first["high"]))
        first = same_label.iloc[0]
        values.append(SweptValue(label, first["unit"], first["role"], bool(first["clock"]), estimates))
    return values


def _figures(
    points: Sequence[SweepPoint], grid: Mapping[str, Sequence[Any]], moved: Sequence[SweptValue]
) -> list[dict[str, Any]]:
    """Draw the trade-offs of the sweep, then lines of the moved values with a number at every point."""
    runs = []
    for point in points:
        runs += [RunColumn(run, True) for run in point.runs]
    figures = [figure(trade_off) for trade_off in trade_offs(runs, list(grid))]

    complete = [value for value in moved if len(value.estimates) == len(points)]
    ranked = [value for value in complete if value.best is not None]
    figures += [_line(points, grid, value) for value in ranked[:MOST_FIGURES]]
    return figures


def _line(points: Sequence[SweepPoint], grid: Mapping[str, Sequence[Any]], value: SweptValue) -> dict[str, Any]:
    """Draw a value against the first parameter with numbers, a line per combination of the remaining parameters."""
    along = _first_numeric(grid)
    rows = {}
    for number, (estimate, low, high) in value.estimates.items():
        parameters = points[number].parameters
        combination = [f"{name} {short(parameters.get(name))}" for name in grid if name != along]
        row = {along: parameters.get(along), "with": ", ".join(combination) or "all", value.name: estimate}
        if math.isfinite(high - low):
            row |= {"low": low, "high": high}
        rows[number] = row
    label = with_unit(value.name, value.unit)

    def draw(ax: Any) -> None:
        literal_rows = [row | {"with": literal(row["with"])} for row in rows.values()]
        show.lines(ax, literal_rows, along, value.name, by="with")
        y_label = textwrap.fill(f"{label}, {RANKED[value.role]}", 40)
        ax.set(xlabel=literal(along), ylabel=literal(y_label))

    best = rows[value.best]
    place = f"{along} {short(best[along])}"
    if best["with"] != "all":
        place += f", {best['with']}"
    reached = f"the best is {show.quantity(best[value.name], value.unit)} at {place}"
    alt = f"{label} against {along} for {len(rows)} points of the sweep; {reached}."
    return picture(draw, alt, f"{value.name} against {along}.", list(rows.values()))


def _first_numeric(grid: Mapping[str, Sequence[Any]]) -> str:
    """The first parameter with numbers as values; the first of all if no parameter has numbers."""
    for name, values in grid.items():
        if not isinstance(values[0], str):
            return name
    return next(iter(grid))
