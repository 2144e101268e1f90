"""The report: one HTML page out of run records, and all their values as rows beside it.

It reads what the records declare (labkit.records) and guesses nothing: a column's role says whether more of it is
better, its clock whether a repetition differs. The page itself is report.html.j2: no script, no network, it prints.
"""

import base64
import functools
import itertools
import json
import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd
from markupsafe import Markup

from labkit import claims, files, show
from labkit.claims import Claim
from labkit.errors import DataError, InputError
from labkit.records import SEED, Column, RecordedTable, RunRecord, SettledClaim, calibration, off_by, read
from labkit.stats import mean_ci

PRESETS = ("smoke", "class", "full")  # from the smallest
WHERE = ("PRESET", "DEVICE", "RESULTS_DIR")  # parameters that say how large and where, not what
DIFFERS, NOT_YET, NOT_HERE = "differs by machine", "not yet measured", "not measurable here"
VERDICTS = ("confirmed", "contradicted", "inconclusive", DIFFERS, NOT_HERE, NOT_YET)
SETTLED_ON = {"any": "any machine", "cpu": "a CPU", "gpu": "a GPU", "document": "a document"}
MARKERS = "osD^vPX"
FAR_APART = 50.0  # values that differ by more are drawn on a logarithmic axis
WIDTH = 384  # pixels of a figure on the page: three in a row on a wide screen, and a phone shows it almost unscaled
MOST_COLUMNS, MOST_FIGURES = 8, 4  # of a sweep
# What a ratio has to differ by for a parameter to have moved it: the interval of a run holds nothing of what changes
# from one run to the next, and ratios that no parameter touches were seen to differ by several per cent.
BETWEEN_RUNS = 0.1

Estimate = tuple[float, float, float]  # value, low, high; the ends are infinite where there is no interval


# result folders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResultFolder:
    """What a run left: its record (None where the lesson did not finish), run.json and executed notebook, if any."""

    folder: Path
    record: RunRecord | None
    run: dict[str, Any]
    notebook: Path | None

    @property
    def changed(self) -> str:
        """The parameters in which the run differed from what its lesson states, where run.json says so."""
        parameters = self.run.get("parameters") or {}
        return ", ".join(f"{name} {value}" for name, value in parameters.items() if name not in WHERE)

    @property
    def lesson(self) -> str:
        return self.record.lesson if self.record else self.run["lesson"][:2]

    @property
    def created(self) -> str:
        return self.record.created if self.record else self.run["created"]


def collect(folders: Iterable[Path]) -> tuple[list[ResultFolder], list[str]]:
    """The results in and below `folders`, oldest first, and a sentence for each that cannot be read.

    InputError where a folder is missing or none of them holds a result.
    """
    folders = list(folders)
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise InputError(f"There is no folder {missing[0]}; run a lesson first (./lab run 01), or name another folder.")
    homes = {home.resolve(): home for folder in folders for home in _homes(folder)}  # folders may overlap
    if not homes:
        raise InputError(f"There are no results in {', '.join(map(str, folders))}; run a lesson first: ./lab run 01.")
    results, problems = _readable(_result, homes.values())
    return sorted(results, key=lambda result: result.created), problems


def recorded_runs() -> tuple[list[RunRecord], list[str]]:
    """The reference runs of all lessons and machines, and a sentence for each that cannot be read."""
    return _readable(read, sorted(files.RECORDED.glob("*/[0-9][0-9].json")))


def _readable(reader: Callable[[Path], Any], paths: Iterable[Path]) -> tuple[list, list[str]]:
    results, problems = [], []
    for path in paths:
        try:
            results.append(reader(path))
        except DataError as error:
            problems.append(str(error))
    return results, problems


def _homes(folder: Path) -> list[Path]:
    homes = sorted({file.parent for name in ("run.json", "record.json") for file in folder.rglob(name)})
    return [home for home in homes if not any(part.startswith(".") for part in home.relative_to(folder).parts)]


def _result(home: Path) -> ResultFolder:
    record_file, run_file = home / "record.json", home / "run.json"
    record = read(record_file) if record_file.exists() else None
    try:
        run = json.loads(run_file.read_text(encoding="utf-8")) if run_file.exists() else {}
        if not record and not {"lesson", "created", "status"} <= set(run):
            raise ValueError
    except (OSError, ValueError):
        raise DataError(f"{run_file} cannot be read; remove its folder and run the lesson again.") from None
    return ResultFolder(home, record, run, next(home.glob("[0-9][0-9]_*.ipynb"), None))


# tidy rows --------------------------------------------------------------------------------------------------------


def rows(folders: Iterable[Path]) -> pd.DataFrame:
    """Every recorded value of the results in and below `folders` (see `frame`); what cannot be read is left out.

    InputError where a folder is missing or none of them holds a result.
    """
    return frame(result.record for result in collect(folders)[0] if result.record)


def frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """The values of the records, one a row.

    lesson, preset, machine (slug), device, seed, then p.<NAME> for each other parameter of the lessons
    name       of a single value, or "table: column"
    key        which row of the table, as "column=value; ..."; empty for single values
    value      a number, in `unit`, with the 95 % interval low..high where there is one; not a number for a `text`
    role       "quality": more is better; "cost": less is better; "setting", "result": neither
    clock      whether a clock or a memory counter made or decided it, so that a repetition differs
    simulated  whether it was computed and no clock saw it
    """
    records = list(records)
    parameters = dict.fromkeys(f"p.{name}" for record in records for name in record.parameters if name != "SEED")
    run, value = ("lesson", "preset", "machine", "device", "seed"), ("value", "low", "high")
    columns = [*run, *parameters, "name", "key", *value, "unit", "role", "text", "simulated", "clock"]
    table = pd.DataFrame([row for record in records for row in _rows(record)], columns=columns, dtype=object)
    for name in parameters:  # Parquet needs one type a column; lessons may use one name for different things
        kinds = {type(item) for item in table[name].dropna()}
        if kinds <= {int, float} or kinds == {bool}:
            table[name] = table[name].convert_dtypes()
        else:
            table[name] = table[name].map(lambda item: item if isinstance(item, str) else json.dumps(item), "ignore")
    kinds = dict.fromkeys((*run, "name", "key", "unit", "role", "text"), str) | dict.fromkeys(value, float)
    return table.astype(kinds | {"seed": "Int64", "simulated": bool, "clock": bool})


def _rows(record: RunRecord) -> Iterator[dict[str, Any]]:
    run = {"lesson": record.lesson, "preset": record.preset, "machine": str(record.machine.get("slug", ""))}
    run |= {"device": record.device, "seed": record.parameters.get("SEED")}
    run |= {f"p.{name}": value for name, value in record.parameters.items() if name != "SEED"}
    for entry in record.measurements:
        if not isinstance(entry, RecordedTable):
            row = _row(entry.name, "", entry.value, entry.ci95, entry, entry.simulated)
            yield run | row | ({"text": entry.verdict} if entry.verdict else {})
            continue
        ends = {end for column in entry.columns.values() for end in (column.low, column.high)}
        for number, values in enumerate(entry.rows, start=1):
            key = "; ".join(f"{name}={_short(values[name])}" for name in entry.by if name in values) or f"row={number}"
            for column, value in values.items():
                if value is not None and column not in entry.by and column not in ends:
                    meaning = entry.meaning(column)
                    name = f"{entry.name}: {_without_unit(column, meaning.unit)}"
                    ci95 = (values.get(meaning.low), values.get(meaning.high))
                    yield run | _row(name, key, value, ci95, meaning, entry.simulated)
    spent = {"seconds": (record.seconds, "s"), "peak memory": (record.peak_memory, "B")}
    spent["peak device memory"] = record.peak_device_memory, "B"
    for name, (value, unit) in spent.items():
        if value is not None:
            yield run | _row(f"run: {name}", "", value, None, Column(role="cost", unit=unit, clock=True), False)


def _row(name: str, key: str, value: Any, ci95: Any, meaning: Any, simulated: bool) -> dict[str, Any]:
    number, low, high = map(_number, (value, *(ci95 or (None, None))))
    text = "" if number is not None else str(value)
    about = {"unit": meaning.unit, "role": meaning.role, "clock": meaning.clock, "simulated": simulated}
    return {"name": name, "key": key, "value": number, "low": low, "high": high, "text": text, **about}


def _number(value: Any) -> float | None:
    """A number, a truth value, or one of the texts that a record writes for what JSON lacks ("inf")."""
    return float(value) if isinstance(value, int | float) or value in ("inf", "-inf", "nan") else None


def _short(value: Any) -> str:
    """A setting as text, the same for values that differ by rounding."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _without_unit(column: str, unit: str) -> str:
    return column.removesuffix(f" ({unit})")


def _with_unit(column: str, unit: str) -> str:
    name = _without_unit(column, unit)
    return name if unit in ("", *show.BARE, name) else f"{name} ({unit})"


def _pooled(values: Sequence[Any], ci95: Any = None) -> Estimate:
    """A value with its own interval; of several, one a seed, the mean with its interval over the seeds."""
    if len(values) > 1:
        return mean_ci([float(value) for value in values])
    low, high = map(_number, ci95 or (None, None))
    missing = low is None or high is None or math.isnan(high - low)
    return (float(values[0]), -math.inf, math.inf) if missing else (float(values[0]), low, high)


# runs side by side ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RunColumn:
    """A record as one column of the page's tables. `here` tells the user's runs from the recorded ones, `changed` says
    how its parameters differ from the lesson's own ("RATIO 0.7")."""

    record: RunRecord
    here: bool
    changed: str = ""

    @property
    def machine(self) -> str:
        return ", ".join(self.record.machine.get("label", self.record.device).split(", ")[:2])

    @property
    def run(self) -> str:
        """Whose run it is, at what preset, with which parameters."""
        return ", ".join(filter(None, ["your run" if self.here else "recorded", self.record.preset, self.changed]))

    @property
    def whose(self) -> tuple[str, bool]:
        return str(self.record.machine.get("slug", "")), self.here

    @property
    def rank(self) -> int:
        return PRESETS.index(self.record.preset) if self.record.preset in PRESETS else -1


def side_by_side(results: Iterable[ResultFolder], recorded: Iterable[RunRecord]) -> list[RunColumn]:
    """One column for each lesson, machine and preset of the user's results (oldest first), then the recorded ones.

    The newest run with the lesson's own parameters counts, as the recorded ones have those; else the newest one.
    """
    columns: dict[tuple, RunColumn] = {}
    for result in results:
        if record := result.record:
            key = (record.lesson, record.machine.get("slug"), record.preset)
            if not result.changed or key not in columns or columns[key].changed:
                columns[key] = RunColumn(record, True, result.changed)
    here = sorted(columns.values(), key=lambda column: column.record.lesson)
    return [*here, *(RunColumn(record, False) for record in recorded)]


# trade-offs -------------------------------------------------------------------------------------------------------

RANKED = {"quality": "more is better", "cost": "less is better"}


@dataclass(frozen=True, eq=False)
class TradeOff:
    """Column y of a table against column x, over several runs.

    points: a row each with run, here, series, the settings, x, x_low, x_high, y, y_low, y_high, repetitions, and front:
    whether no other point of the same runs beats it. An x without a role is a setting, and then there is no front.
    """

    table: str
    x: str
    y: str
    meaning: dict[str, Column] = field(repr=False)
    simulated: bool
    points: pd.DataFrame = field(repr=False)

    @property
    def ranked(self) -> bool:
        return self.meaning["x"].role in RANKED

    @property
    def trades(self) -> bool:
        """Whether somewhere the best point in one column is not the best in the other."""
        fronts = self.points[self.points["front"]].groupby("compared").size() if len(self.points) else []
        return any(size > 1 for size in fronts)


def trade_offs(runs: Sequence[RunColumn], swept: Sequence[str] = ()) -> list[TradeOff]:
    """What the tables of runs of one lesson trade for what.

    A quality is set against each cost, against qualities of another unit, and both against settings with a role
    (`"sparsity": quality()` of a column in `by`), where the best point in one is not the best in the other. Qualities
    of a table without any of this that repeats over seeds are set against its first setting. Rows and runs that differ
    only in the seed are pooled.
    swept: parameters in which the runs differ. Then all points share one front, and a parameter that changes nothing
    in a table is left out of it; otherwise each machine, preset and owner has a front of its own.
    """
    tables = (entry.name for run in runs for entry in run.record.measurements if isinstance(entry, RecordedTable))
    return [figure for name in dict.fromkeys(tables) for figure in _of_table(name, runs, swept)]


def _of_table(name: str, runs: Sequence[RunColumn], swept: Sequence[str]) -> list[TradeOff]:
    entries = [(run, entry) for run in runs if isinstance(entry := run.record.named(name), RecordedTable)]
    table = entries[0][1]
    meaning = {column: table.meaning(column) for column in (*table.columns, *table.by)}
    settings = [column for column in table.by if column != SEED]
    ranked = [column for column in meaning if meaning[column].role in RANKED]
    values = pd.concat([
        pd.DataFrame(entry.rows).assign(run=_source(run, entries), here=run.here, **{
            f"p.{parameter}": f"{parameter} {_short(run.record.parameters.get(parameter))}" for parameter in swept})
        for run, entry in entries], ignore_index=True)  # fmt: skip
    numbers = {end for column in ranked for end in (column, meaning[column].low, meaning[column].high)} - {None}
    for column in numbers & set(values):
        values[column] = values[column].map(_number).astype(float).replace([math.inf, -math.inf], math.nan)
    if swept:
        values = _without_idle(values, [f"p.{parameter}" for parameter in swept])
        parameters = [column for column in values if column.startswith("p.")]
        if not parameters:
            return []
        values["run"] = values[parameters].agg(", ".join, axis=1)
    values["compared"] = "all runs" if swept else values["run"]

    outcomes = [column for column in ranked if column not in table.by]
    best = [column for column in outcomes if meaning[column].role == "quality"]
    pairs = [(x, y) for y in outcomes for x in ranked if x in table.by]
    pairs += [(x, y) for x, y in itertools.product(outcomes, best) if meaning[x].role == "cost"]
    pairs += [(x, y) for y, x in itertools.combinations(best, 2) if meaning[x].unit != meaning[y].unit]
    found = [_trade_off(table, values, settings, meaning, *pair) for pair in pairs]
    found = [trade_off for trade_off in found if trade_off.trades]
    if not found and settings and SEED in table.by:
        return [_trade_off(table, values, settings, meaning, settings[0], y) for y in best]
    return found


def _without_idle(values: pd.DataFrame, parameters: Iterable[str]) -> pd.DataFrame:
    """The rows without the parameters of the sweep that change nothing in them, and without their repetitions."""
    for parameter in parameters:
        distinct = values.drop(columns=parameter)
        distinct = distinct[~distinct.astype(str).duplicated()]
        if len(distinct) * values[parameter].nunique() == len(values):
            values = distinct
    return values


def _trade_off(
    table: RecordedTable, values: pd.DataFrame, settings: list[str], meaning: Mapping[str, Column], x: str, y: str
) -> TradeOff:
    """One pair of columns, its rows pooled over seeds, with the fronts."""
    axes, points = {"x": x, "y": y}, []
    ranked = meaning[x].role in RANKED
    usable = values.dropna(subset=[column for column in dict.fromkeys((x, y)) if meaning[column].role in RANKED])
    for _, part in usable.groupby(["run", *settings], sort=False, dropna=False):
        first = part.iloc[0]
        others = [column for column in settings if column != x]
        texts = [first[column] for column in others if isinstance(first[column], str)]
        point = {**first[["run", "here", "compared", *others]], "series": ", ".join(texts)}
        for axis, column in axes.items():
            ends = first.get(meaning[column].low, math.nan), first.get(meaning[column].high, math.nan)
            named = _short(first[column]), -math.inf, math.inf
            pooled = _pooled(list(part[column]), ends) if meaning[column].role in RANKED else named
            point |= dict(zip((axis, f"{axis}_low", f"{axis}_high"), pooled, strict=True))
        points.append(point | {"repetitions": len(part), "front": False})
    points = pd.DataFrame(points)
    if ranked and len(points):
        more = [meaning[column].role == "quality" for column in (x, y)]
        for _, part in points.groupby("compared"):
            points.loc[front(part, *more), "front"] = True
    names = [_with_unit(column, meaning[column].unit) for column in (x, y)]
    meant = {axis: meaning[column] for axis, column in axes.items()}
    return TradeOff(table.name, *names, meant, table.simulated, points)


def front(points: pd.DataFrame, x_more: bool, y_more: bool) -> list[Any]:
    """The index of the points that no other beats: as good in both and better in one; of equal points the first.

    x_more, y_more: whether more of it is better.
    """
    dearer = pd.DataFrame({"x": points["x"] * (-1.0) ** x_more, "y": points["y"] * (-1.0) ** y_more})
    dearer = dearer.sort_values(["x", "y"], kind="stable")["y"]
    return list(dearer.index[dearer < dearer.cummin().shift(fill_value=math.inf)])


def _source(run: RunColumn, entries: Sequence[tuple[RunColumn, Any]]) -> str:
    """Whose run a point is of, at what preset, with which parameters, and on which machine where these differ."""
    several = len({other.record.machine.get("slug") for other, _ in entries}) > 1
    owner = "yours" if run.here else "recorded"
    return ", ".join(filter(None, [owner, run.record.preset, run.machine if several else "", run.changed]))


def _figure(shown: TradeOff) -> dict[str, Any]:
    """The trade-off for the page: picture, alt text, caption, and a table of exactly what is drawn."""
    points, units = shown.points, {axis: meaning.unit for axis, meaning in shown.meaning.items()}

    def at(point: Any) -> str:
        return f"{show.quantity(point.y, units['y'])} at {show.quantity(point.x, units['x'])}"

    words = [f"{shown.y} against {shown.x} for {len(points)} points of “{shown.table}”."]
    for name, part in points[points["front"]].groupby("compared", sort=False):
        ends = part.sort_values("x").iloc[[0, -1] if len(part) > 1 else [0]].itertuples()
        words.append(f"{name}: the Pareto front joins {len(part)} of them: {' to '.join(map(at, ends))}.")
    if not shown.ranked:
        best = points["y"].idxmax() if shown.meaning["y"].role == "quality" else points["y"].idxmin()
        words.append(f"The best is {at(points.loc[best])}.")
    seeds = points["repetitions"].max()
    caption = f"{'SIMULATED: ' * shown.simulated}{shown.table}: {shown.y} against {shown.x}."
    caption += f" Means over {seeds} seeds, bars: 95 % intervals over seeds." if seeds > 1 else ""
    table = points.drop(columns=["here", "compared", "series"]).rename(columns={"x": shown.x, "y": shown.y})
    for axis, name in (("x", shown.x), ("y", shown.y)):
        ends = zip(table.pop(f"{axis}_low"), table.pop(f"{axis}_high"), strict=True)
        ends = [show.interval((low, high)) if math.isfinite(high - low) else "–" for low, high in ends]
        table.insert(table.columns.get_loc(name) + 1, f"{name} 95 %", ends)
    table["front"] = table["front"].map({True: "yes", False: "no"})
    return _picture(lambda ax: _draw(ax, shown), " ".join(words), caption, table.to_dict("records"))


def _picture(draw: Callable[[Any], None], alt: str, caption: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A figure for the template. `draw` fills an axis; the legend stands below it, for which the figure grows."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        show.style()
        matplotlib.rcParams["text.parse_math"] = False  # a dollar in a record is a dollar
        fig = Figure()
        ax = fig.add_subplot()
        draw(ax)
        handles = {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        columns = 2 if max(map(len, handles), default=0) <= 24 else 1
        fig.set_size_inches(WIDTH / 80, 3.5 + 0.2 * math.ceil(len(handles) / columns))
        if len(handles) > 1:
            look = {"fontsize": 8, "handlelength": 1.4, "columnspacing": 1}
            fig.legend([*handles.values()], [*handles], loc="outside lower left", ncols=columns, **look)
        png = base64.b64encode(show.png(fig, scale=2)).decode()
    return {"png": png, "alt": alt, "caption": caption, "table": Markup(show.html_table(rows))}


def _draw(ax: Any, shown: TradeOff) -> None:
    """Colours tell series apart and marks tell runs, white for recorded ones; of one series, colours tell runs too."""
    points = shown.points
    runs, series, compared = (list(dict.fromkeys(points[column])) for column in ("run", "series", "compared"))
    same_side = (shown.meaning["x"].role == "cost") == (shown.meaning["y"].role == "quality")
    for name, part in points[points["front"]].groupby("compared", sort=False):
        label = f"front: {name}" if len(compared) > 1 else "Pareto front"
        look = {"color": "grey" if compared.index(name) else "black", "linewidth": 1, "zorder": 1}
        line = part.sort_values("x")
        ax.plot(line["x"], line["y"], label=label, drawstyle="steps-post" if same_side else "steps-pre", **look)
    for (run, name), part in points.groupby(["run", "series"], sort=False):
        number = series.index(name) if len(series) > 1 else runs.index(run)
        colour, mark = show.COLOURS[number % len(show.COLOURS)], MARKERS[runs.index(run) % len(MARKERS)]
        look = {"marker": mark, "markerfacecolor": colour if part["here"].all() else "white", "linestyle": ""}
        bars = {f"{axis}err": _bars(part, axis) for axis in ("xy" if shown.ranked else "y")}
        ax.errorbar(part["x"], part["y"], **bars, color=colour, elinewidth=0.8, capsize=2, zorder=2, **look)
        if len(series) > 1:
            ax.plot([], [], linestyle="", marker="s", color=colour, label=name)
        if len(runs) > 1:
            ax.plot([], [], color=colour if len(series) == 1 else "grey", label=run, **look)
    _set_axes(ax, shown)


def _bars(points: pd.DataFrame, axis: str) -> Any:
    """Distances below and above, none where there is no interval."""
    ends = points[axis] - points[f"{axis}_low"], points[f"{axis}_high"] - points[axis]
    return [end.where(end < math.inf, 0.0).clip(lower=0.0) for end in ends]


def _set_axes(ax: Any, shown: TradeOff) -> None:
    """Axes span the values, not the bars: with two seeds an interval is twelve times what it spans."""
    for axis in "xy" if shown.ranked else "y":
        values = shown.points[axis]
        low, high = values.min(), values.max()
        if low > 0 and high / low > FAR_APART:
            getattr(ax, f"set_{axis}scale")("log")
        elif high > low and axis == "y":
            ends = pd.concat([values, shown.points["y_low"], shown.points["y_high"]])
            ends, room = ends[ends.abs() < math.inf], (high - low) / 2
            ax.set_ylim(max(low - room, ends.min()) - room / 8, min(high + room, ends.max()) + room / 8)
    ax.tick_params("x", rotation=0 if shown.ranked else 90)
    for axis, name in (("x", shown.x), ("y", shown.y)):
        words = ", ".join(filter(None, [name, RANKED.get(shown.meaning[axis].role)]))
        getattr(ax, f"set_{axis}label")(textwrap.fill(words, 48))


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
    found = []
    for _, points in sorted(groups.items()):
        listed = [SweepPoint(json.loads(text), list(seeds.values())) for text, seeds in points.items()]
        if len(listed) > 1 or len(listed[0].runs) > 1:
            found.append(sorted(listed, key=lambda point: [_order(value) for value in point.parameters.values()]))
    return found


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
    figures = [_figure(shown) for shown in trade_offs(runs, list(grid))] if grid else []
    figures += [_line(points, grid, value) for value in lines[:MOST_FIGURES]] if grid else []
    first = points[0].runs[0]
    return {
        "title": f"Sweep of {first.lesson} {first.title}, {first.preset}",
        "first": first,
        "count": len(runs),
        "grid": {name: ", ".join(map(_short, values)) for name, values in grid.items()},
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
            number: _pooled(list(some["value"]), (some["low"].iloc[0], some["high"].iloc[0]))
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
        others = ", ".join(f"{name} {_short(parameters.get(name))}" for name in grid if name != along)
        ends = {"low": low, "high": high} if math.isfinite(high - low) else {}
        rows.append({along: parameters.get(along), "with": others or "all", value.name: estimate, **ends})
    label = _with_unit(value.name, value.unit)

    def draw(ax: Any) -> None:
        show.lines(ax, rows, along, value.name, by="with")
        ax.set(xlabel=along, ylabel=textwrap.fill(f"{label}, {RANKED[value.role]}", 40))

    best = rows[list(value.estimates).index(value.best)]
    at = ", ".join(filter(None, [f"{along} {_short(best[along])}", best["with"] if best["with"] != "all" else ""]))
    reached = f"the best is {show.quantity(best[value.name], value.unit)} at {at}"
    alt = f"{label} against {along} for {len(rows)} points of the sweep; {reached}."
    return _picture(draw, alt, f"{value.name} against {along}.", rows)


# claims -----------------------------------------------------------------------------------------------------------

Said = dict[tuple[str, bool], tuple[SettledClaim, RunColumn]]  # (machine, the user's own) -> a record's word, and whose


def said(claim: Claim, columns: Sequence[RunColumn]) -> Said:
    """Of each machine, the user's own and the recorded, what its record with the largest preset says of the claim."""
    return {
        column.whose: (settled, column)
        for column in sorted(columns, key=lambda column: column.rank)
        for settled in column.record.claims
        if settled.id == claim.id
    }


def verdict(claim: Claim, words: Said) -> str:
    """What all machines together say: of each machine the largest preset counts, the user's own before the recorded.

    A claim about a device that no record was made on is not yet measured, whatever other machines had to say.
    """
    machines: dict[str, tuple] = {}
    for (machine, here), (settled, column) in words.items():
        machines[machine] = max(machines.get(machine, ((-2, False), "")), ((column.rank, here), settled.verdict))
    settled = {verdict for _, verdict in machines.values()} - {NOT_HERE}
    if settled:
        return settled.pop() if len(settled) == 1 else DIFFERS
    on_device = {"cpu": "cpu", "gpu": "cuda"}.get(claim.needs, "")
    tried = any(column.record.device.startswith(on_device) for _, column in words.values())
    return NOT_HERE if claim.needs == "document" or tried else NOT_YET


def _claims(guide: Sequence[Claim], columns: Sequence[RunColumn]) -> dict[str, Any]:
    """What the template shows of the claims: their verdicts, counted by section, and the machines that spoke."""
    titles = {int(column.record.lesson): f": {column.record.title}" for column in columns}
    verdicts = {claim.id: verdict(claim, said(claim, columns)) for claim in guide}
    sections = {}
    for claim in guide:
        sections.setdefault(claim.section, []).append(claim)
    return {
        "claims": guide,
        "verdicts": verdicts,
        "present": [name for name in VERDICTS if name in verdicts.values()],
        "counts": Counter(verdicts.values()),
        "having": {name: [id for id, overall in verdicts.items() if overall == name] for name in VERDICTS},
        "sections": sections,
        "titles": {section: f"Section {section}{titles.get(section, '')}" for section in sections},
        "gpu": any(column.record.device.startswith("cuda") for column in columns),
    }


# the page ---------------------------------------------------------------------------------------------------------


def write(folders: Sequence[Path], destination: Path) -> Path:
    """Write the page of all results below `folders`, and their rows beside it, atomically; returns the page's path.

    The rows (see `frame`) are in rows.csv and rows.parquet. InputError where a folder is missing or none of them holds
    a result, or where a file cannot be written; a damaged result is listed on the page instead.
    """
    results, problems = collect(folders)
    recorded, unreadable = recorded_runs()
    text = page(results, recorded, [*problems, *unreadable], destination.parent)
    table = frame(result.record for result in results if result.record)
    _write(destination, lambda path: path.write_text(text, encoding="utf-8"))
    _write(destination.with_name("rows.csv"), lambda path: table.to_csv(path, index=False))
    _write(destination.with_name("rows.parquet"), lambda path: table.to_parquet(path, index=False))
    return destination


def _write(path: Path, save: Callable[[Path], Any]) -> None:
    try:
        with files.replacing(path) as partial:
            save(partial)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); fix that first.") from None


def page(results: Sequence[ResultFolder], recorded: Sequence[RunRecord], problems: Sequence[str], base: Path) -> str:
    """The whole page; links are relative to the folder `base`."""
    columns = side_by_side(results, recorded)
    lessons = {}
    for column in sorted(columns, key=lambda column: column.record.lesson):
        lessons.setdefault(column.record.lesson, []).append(column)
    newest = {result.lesson: result for result in results}
    failed = [one for one in results if one.run.get("status") == "failed" and newest[one.lesson] is not one]
    guesses = [(column, guess) for column in columns if column.here for guess in column.record.predictions]
    text = _template().render(
        title="Inference optimisation, measured",
        made=datetime.now(UTC),
        columns=columns,
        problems=problems,
        results=sorted([*newest.values(), *failed], key=lambda result: result.lesson),
        guesses=guesses,
        calibration=calibration([guess for _, guess in guesses]),
        guide=_claims(list(claims.load().values()), columns),
        sweeps=[swept(points) for points in sweeps(result.record for result in results if result.record)],
        titles=[f"{lesson} {columns[0].record.title}" for lesson, columns in lessons.items()],
        lessons=[(columns, [_figure(shown) for shown in trade_offs(columns)]) for columns in lessons.values()],
        link=lambda path: quote(Path(os.path.relpath(path, base)).as_posix()),
    )
    return text.strip() + "\n"


def claims_table(guide: Sequence[Claim], columns: Sequence[RunColumn]) -> str:
    """Each claim, and what the record of each machine with the largest preset says about it, as HTML."""
    return _macro("claims_table", guide, columns, _claims(guide, columns)["verdicts"])


def machines_table(columns: Sequence[RunColumn]) -> str:
    """The machines that the columns were measured on, as HTML."""
    return _macro("machines_table", columns)


def measurements_table(columns: Sequence[RunColumn]) -> str:
    """One row a name with a value from each record, then the recorded tables, folded, as HTML."""
    return _macro("measurements_table", columns)


def _macro(name: str, *arguments: Any) -> str:
    return str(getattr(_template().module, name)(*arguments))


@functools.cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.filters["anchor"] = lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    templates.globals |= {
        "SETTLED_ON": SETTLED_ON, "expected": claims.expected, "isfinite": math.isfinite, "NOT_YET": NOT_YET,
        "off_by": off_by, "quantity": show.quantity, "interval": show.interval, "said": said, "short": _short,
        "badge_simulated": Markup(show.BADGE), "rows_table": lambda rows: Markup(show.html_table(rows)),
    }  # fmt: skip
    return templates.get_template("report.html.j2")
