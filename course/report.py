"""The report: one HTML page out of run records, and all their values as rows beside it.

It reads what the records declare (labkit.records) and guesses nothing: a column's role says whether more of it is
better, its clock whether a repetition differs. The page itself is report.html.j2: no script, no network, it prints.
"""

import functools
import json
import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd
from markupsafe import Markup

from course.results import ResultFolder, RunColumn, collect, frame, recorded_runs, short, side_by_side, with_unit
from course.tradeoffs import RANKED, Estimate, figure, literal, picture, pooled, trade_offs
from labkit import files, show
from labkit.lesson import challenge, claims
from labkit.lesson.claims import Claim
from labkit.lesson.predictions import calibration, off_by
from labkit.lesson.records import Challenge, RunRecord, SettledClaim

DIFFERS, NOT_YET = "differs by machine", "not yet measured"
NOT_SETTLED, NOT_HERE = "not settled here", "not measurable here"
VERDICTS = ("confirmed", "contradicted", "inconclusive", DIFFERS, NOT_SETTLED, NOT_HERE, NOT_YET)
SETTLED_ON = {"any": "any machine", "cpu": "a CPU", "gpu": "a GPU", "document": "a document"}
MOST_COLUMNS, MOST_FIGURES = 8, 4  # of a sweep
# What a ratio has to differ by for a parameter to have moved it: the interval of a run holds nothing of what changes
# from one run to the next, and ratios that no parameter touches were seen to differ by several per cent.
BETWEEN_RUNS = 0.1


# sweeps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SweepPoint:
    """Runs of a lesson on one machine at one preset that differ only in the seed."""

    parameters: dict[str, Any]
    runs: list[RunRecord]


@dataclass(frozen=True, eq=False)
class SweptValue:
    """A value at the points of a sweep that have it, by the point's number."""

    name: str
    unit: str
    role: str
    clock: bool
    estimates: dict[int, Estimate]

    @property
    def best(self) -> int | None:
        """The number of the best point, where the role says which way is better and several can be compared."""
        if self.role not in RANKED or len(self.estimates) < 2:
            return None
        return (max if self.role == "quality" else min)(self.estimates, key=lambda point: self.estimates[point][0])

    @property
    def moves(self) -> bool:
        """Whether the parameters change it: at all, where no clock made it; a ratio, by more than chance would.

        Ratios (unit x) were measured within a run; times are not compared, as the machine changes from run to run.
        """
        estimates = list(self.estimates.values())
        if not self.clock:
            return any(not math.isclose(value, estimates[0][0], rel_tol=1e-9) for value, _, _ in estimates)
        least, most = min(estimates)[0], max(estimates)[0]
        apart = max(low for _, low, _ in estimates) > min(high for _, _, high in estimates)
        return self.unit == "x" and apart and most > (1 + BETWEEN_RUNS) * least


def sweeps(records: Iterable[RunRecord]) -> list[list[SweepPoint]]:
    """The points that belong together, lesson by lesson: several points of one lesson, or one with several seeds.

    Of several runs with the same parameters and seed the last one counts.
    """
    groups: dict[tuple, dict[str, dict[Any, RunRecord]]] = {}
    for record in records:
        where = record.lesson, str(record.machine.get("slug", "")), record.device.partition(":")[0], record.preset
        parameters = {name: value for name, value in record.parameters.items() if name != "SEED"}
        point = groups.setdefault(where, {}).setdefault(json.dumps(parameters, sort_keys=True), {})
        point[record.parameters.get("SEED")] = record
    listed = [
        [SweepPoint(json.loads(text), list(seeds.values())) for text, seeds in points.items()]
        for _, points in sorted(groups.items())
    ]
    return [
        sorted(points, key=lambda point: [_order(value) for value in point.parameters.values()])
        for points in listed
        if len(points) > 1 or len(points[0].runs) > 1
    ]


def _order(value: Any) -> tuple:
    """A key that sorts numbers by size and puts them before texts."""
    return (False, value) if isinstance(value, int | float) else (True, str(value))


def swept(points: Sequence[SweepPoint]) -> dict[str, Any]:
    """The section of one sweep: what was varied, the table of combinations with the best marked, figures, the rest."""
    grid = {}
    for name in dict.fromkeys(name for point in points for name in point.parameters):
        distinct = {json.dumps(value): value for value in (point.parameters.get(name) for point in points)}
        if len(distinct) > 1:
            grid[name] = sorted(distinct.values(), key=_order)
    values = _values(points)
    alike = {tuple(value.estimates.items()): value for value in reversed(values) if value.moves}  # the first of them
    columns = list(reversed(alike.values()))[:MOST_COLUMNS]
    runs = [RunColumn(run, True) for point in points for run in point.runs]
    lines = [value for value in columns if len(value.estimates) == len(points) and value.best is not None]
    figures = [figure(shown) for shown in trade_offs(runs, list(grid))] if grid else []
    figures += [_line(points, grid, value) for value in lines[:MOST_FIGURES]] if grid else []
    first = points[0].runs[0]
    return {
        "title": f"Sweep of {first.lesson} {first.title}, {first.preset}",
        "first": first,
        "count": len(runs),
        "grid": {name: ", ".join(map(short, values)) for name, values in grid.items()},
        "seeds": sorted({run.parameters.get("SEED", 0) for point in points for run in point.runs}),
        "points": points,
        "moved": columns,
        "rest": [value for value in values if value not in columns],
        "figures": figures,
        "between_runs": BETWEEN_RUNS,
    }


def _values(points: Sequence[SweepPoint]) -> list[SweptValue]:
    """Every number of the records, pooled over seeds: single values first, then those of tables with their row."""
    tables = [frame(point.runs).assign(point=number) for number, point in enumerate(points)]
    table = pd.concat(tables, ignore_index=True)
    table = table[table["value"].map(math.isfinite) & ~table["name"].str.startswith("run: ")]
    table = table.assign(what=table["name"] + table["key"].map(lambda key: f", {key}" if key else ""))
    values = []
    for what, part in table.sort_values("key", key=lambda keys: keys != "", kind="stable").groupby("what", sort=False):
        estimates = {
            number: pooled(list(some["value"]), (some["low"].iloc[0], some["high"].iloc[0]))
            for number, some in part.groupby("point")
        }
        first = part.iloc[0]
        values.append(SweptValue(what, first["unit"], first["role"], bool(first["clock"]), estimates))
    return values


def _line(points: Sequence[SweepPoint], grid: Mapping[str, Sequence[Any]], value: SweptValue) -> dict[str, Any]:
    """One value against the first parameter that is a number, a line for each combination of the others."""
    along = next((name for name, values in grid.items() if not isinstance(values[0], str)), next(iter(grid)))
    rows = []
    for number, (estimate, low, high) in value.estimates.items():
        parameters = points[number].parameters
        series = ", ".join(f"{name} {short(parameters.get(name))}" for name in grid if name != along)
        ends = {"low": low, "high": high} if math.isfinite(high - low) else {}
        rows.append({along: parameters.get(along), "with": series or "all", value.name: estimate, **ends})
    label = with_unit(value.name, value.unit)

    def draw(ax: Any) -> None:
        show.lines(ax, [row | {"with": literal(row["with"])} for row in rows], along, value.name, by="with")
        ax.set(xlabel=literal(along), ylabel=literal(textwrap.fill(f"{label}, {RANKED[value.role]}", 40)))

    best = rows[list(value.estimates).index(value.best)]
    at = ", ".join(filter(None, [f"{along} {short(best[along])}", best["with"] if best["with"] != "all" else ""]))
    reached = f"the best is {show.quantity(best[value.name], value.unit)} at {at}"
    alt = f"{label} against {along} for {len(rows)} points of the sweep; {reached}."
    return picture(draw, alt, f"{value.name} against {along}.", rows)


# claims -----------------------------------------------------------------------------------------------------------

Settled = dict[tuple[str, bool], tuple[SettledClaim, RunColumn]]  # by machine, and whether the run is the user's own


def settled(claim: Claim, columns: Sequence[RunColumn]) -> Settled:
    """Of each machine, the user's own and the recorded, what its record with the largest preset says of the claim.

    A record from before the claim's quantity was exchanged says nothing of it.
    """
    return {
        column.whose: (result, column)
        for column in sorted(columns, key=lambda column: column.rank)
        for result in column.record.claims
        if result.id == claim.id and claims.is_current(claim, column.record.created, result.trained)
    }


def verdict(claim: Claim, columns: Sequence[RunColumn]) -> str:
    """What all machines together say: of each machine the largest preset counts, the user's own before the recorded.

    A claim about a device that no record was made on is not yet measured, whatever other machines had to say.
    """
    results = settled(claim, columns)
    ranked = sorted(results.items(), key=lambda item: (item[1][1].rank, item[1][1].here))
    outcomes = set({machine: result.verdict for (machine, _), (result, _) in ranked}.values()) - {NOT_HERE}
    if verdicts := outcomes - {NOT_SETTLED} or outcomes:
        return verdicts.pop() if len(verdicts) == 1 else DIFFERS
    on_device = {"cpu": "cpu", "gpu": "cuda"}.get(claim.needs, "")
    tried = any(column.record.device.startswith(on_device) for _, column in results.values())
    return NOT_HERE if claim.needs == "document" or tried else NOT_YET


# challenges -------------------------------------------------------------------------------------------------------


def challenged(results: Sequence[ResultFolder]) -> list[dict[str, Any]]:
    """A figure for each challenge of one lesson's results: the plane with the point of every run that has a plan."""
    tasks: dict[str, list[tuple[str, Challenge]]] = {}
    for result in results:
        for task in result.record.challenges if result.record else ():
            tasks.setdefault(task.name, []).append((_whose(result, results), task))
    figures = []
    for name, entries in tasks.items():
        newest = entries[-1][1]
        points = [{"run": whose, **task.point} for whose, task in entries if task.point and task.goals == newest.goals]
        reached = [point["run"] for point in points if not challenge.missed(newest.goals, point)]
        caption = f"Challenge {name}: {newest.goal} {len(reached)} of {len(entries)} runs reached it."
        alt = f"The goal is {challenge.asked(newest.goals)}. Reached by: {', '.join(reached) or 'none yet'}."
        draw = functools.partial(challenge.plane, goals=newest.goals, points=points, label="run")
        rows = challenge.rows(newest.goals, points, "run") or [{"run": "no plan yet"}]
        figures.append(picture(draw, alt, caption, rows))
    return figures


def _whose(result: ResultFolder, results: Sequence[ResultFolder]) -> str:
    """The first folder in which a run differs from the others, which is a student's in a class."""
    folders = [other.folder.resolve() for other in results]
    parts = result.folder.resolve().relative_to(os.path.commonpath(folders)).parts
    return parts[0] if parts else "your run"


# the page ---------------------------------------------------------------------------------------------------------


def write(folders: Sequence[Path], destination: Path) -> Path:
    """Write the page of all results below `folders`, and their rows beside it, atomically; returns the page's path.

    The rows (see `frame`) are in rows.csv and rows.parquet. InputError where a folder is missing or none of them holds
    a result, or where a file cannot be written; a damaged result is listed on the page instead.
    """
    results, problems = collect(folders)
    recorded, unreadable = recorded_runs()
    records = [result.record for result in results if result.record]
    columns = side_by_side(results, recorded)
    by_lesson = attrgetter("record.lesson")
    by_number = [list(some) for _, some in groupby(sorted(columns, key=by_lesson), by_lesson)]
    lessons = [some for some in by_number if any(column.here for column in some)]  # all recorded runs are on the site
    newest = {result.lesson: result for result in results}
    failed = [run for run in results if run.run.get("status") == "failed" and newest[run.lesson] is not run]
    asked = [(column, guess) for column in columns if column.here for guess in column.record.predictions]
    guesses = [(column, guess) for column, guess in asked if guess.predicted is not None]
    entries = claims.load().values()
    verdicts = {claim.id: verdict(claim, columns) for claim in entries}
    text = template().render(
        title="Inference optimisation, measured",
        made=datetime.now(UTC),
        columns=columns,
        problems=[*problems, *unreadable],
        results=sorted([*newest.values(), *failed], key=lambda result: result.lesson),
        guesses=guesses,
        unanswered=len(asked) - len(guesses),
        calibration=calibration([guess for _, guess in guesses]),
        claims=entries,
        verdicts={name: ids for name in VERDICTS if (ids := [id for id, word in verdicts.items() if word == name])},
        section_titles={int(column.record.lesson): f": {column.record.title}" for column in columns},
        sweeps=[swept(points) for points in sweeps(records)],
        titles=[f"{some[0].record.lesson} {some[0].record.title}" for some in lessons],
        lessons=[
            (
                some,
                challenged([result for result in results if result.lesson == some[0].record.lesson])
                + [figure(shown) for shown in trade_offs(some)],
            )
            for some in lessons
        ],
        link=lambda path: quote(Path(os.path.relpath(path, destination.parent)).as_posix()),
    )
    table = frame(records)
    saves = {
        destination: lambda path: path.write_text(text.strip() + "\n", encoding="utf-8"),
        destination.with_name("rows.csv"): lambda path: table.to_csv(path, index=False),
        destination.with_name("rows.parquet"): lambda path: table.to_parquet(path, index=False),
    }
    for path, save in saves.items():
        with files.refused(f"{path} cannot be written", "fix that first"), files.replacing(path) as partial:
            save(partial)
    return destination


@functools.cache
def template() -> jinja2.Template:
    """The page. Its `module` has the tables that the site shows too, as HTML, each a function of a list of RunColumn:

    machines_table(columns)        the machines that the columns were measured on
    measurements_table(columns)    one row a name with a value from each record, then the recorded tables, folded
    claims_table(claims, columns)  each claim, and what the record of each machine with the largest preset says about it
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.filters["anchor"] = lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    templates.globals |= {
        "SETTLED_ON": SETTLED_ON, "expected": claims.expected, "recipe": claims.recipe,
        "isfinite": math.isfinite, "NOT_YET": NOT_YET,
        "off_by": off_by, "quantity": show.quantity, "interval": show.interval, "settled": settled, "short": short,
        "verdict": verdict,
        "badge_simulated": Markup(show.BADGE), "rows_table": lambda rows: Markup(show.html_table(rows)),
    }  # fmt: skip
    return templates.get_template("report.html.j2")
