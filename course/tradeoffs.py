"""What a table trades for what: its qualities against its costs, with the Pareto front, pooled over seeds, and figures.

Which columns are which is read from the record (labkit.records), not guessed. A front is drawn through the values,
whose intervals may overlap: the figure shows them.
"""

import base64
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from markupsafe import Markup

from course.results import RunColumn, as_number, short, with_unit
from labkit import show
from labkit.lesson.records import SEED, Column, RecordedTable
from labkit.timing.stats import mean_ci

MARKERS = "osD^vPX"
FAR_APART = 50.0  # values that differ by more are drawn on a logarithmic axis
MOST_FIGURES = 3  # of a table
WIDTH = 384  # pixels of a figure on the page: three in a row on a wide screen, and a phone shows it almost unscaled

Estimate = tuple[float, float, float]  # value, low, high; the ends are infinite where there is no interval

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
        return len(self.points) > 0 and any(self.points.groupby("compared")["front"].sum() > 1)


def trade_offs(runs: Sequence[RunColumn], swept: Sequence[str] = ()) -> list[TradeOff]:
    """What the tables of runs of one lesson trade for what.

    A quality is set against each cost, against qualities of another unit, and both against settings with a role
    (`"sparsity": quality()` of a column in `by`), where the best point in one is not the best in the other. Qualities
    of a table without any of this that repeats over seeds are set against its first setting. Rows and runs that differ
    only in the seed are pooled. A table gets MOST_FIGURES at most: its rows lie beside the report.
    swept: parameters in which the runs differ. Then all points share one front, and a parameter that changes nothing
    in a table is left out of it; otherwise each machine, preset and owner has a front of its own.
    """
    tables = (entry.name for run in runs for entry in run.record.measurements if isinstance(entry, RecordedTable))
    return [trade_off for name in dict.fromkeys(tables) for trade_off in _of_table(name, runs, swept)]


def _of_table(name: str, runs: Sequence[RunColumn], swept: Sequence[str]) -> list[TradeOff]:
    entries = [(run, entry) for run in runs if isinstance(entry := run.record.named(name), RecordedTable)]
    table = entries[0][1]
    meaning = {column: table.meaning(column) for column in (*table.columns, *table.by)}
    settings = [column for column in table.by if column != SEED]
    ranked = [column for column in meaning if meaning[column].role in RANKED]
    values = pd.concat([
        pd.DataFrame(entry.rows).assign(run=_source(run, entries), here=run.here, **{
            f"p.{parameter}": f"{parameter} {short(run.record.parameters.get(parameter))}" for parameter in swept})
        for run, entry in entries], ignore_index=True)  # fmt: skip
    numbers = {end for column in ranked for end in (column, meaning[column].low, meaning[column].high)} - {None}
    for column in numbers & set(values):
        values[column] = values[column].map(as_number).astype(float).replace([math.inf, -math.inf], math.nan)
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
    figures = [_trade_off(table, values, settings, meaning, *pair) for pair in pairs]
    figures = [trade_off for trade_off in figures if trade_off.trades]
    if not figures and settings and SEED in table.by:
        return [_trade_off(table, values, settings, meaning, settings[0], y) for y in best]
    return figures[:MOST_FIGURES]


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
    usable = values.dropna(subset=[column for column in dict.fromkeys((x, y)) if meaning[column].role in RANKED])
    series = [column for column in settings if column != x]
    for _, part in usable.groupby(["run", *settings], sort=False, dropna=False):
        first = part.iloc[0]
        texts = [first[column] for column in series if isinstance(first[column], str)]
        point = {**first[["run", "here", "compared", *series]], "series": ", ".join(texts)}
        for axis, column in axes.items():
            ends = first.get(meaning[column].low, math.nan), first.get(meaning[column].high, math.nan)
            named = short(first[column]), -math.inf, math.inf
            estimate = pooled(list(part[column]), ends) if meaning[column].role in RANKED else named
            point |= dict(zip((axis, f"{axis}_low", f"{axis}_high"), estimate, strict=True))
        points.append(point | {"repetitions": len(part), "front": False})
    points = pd.DataFrame(points)
    if meaning[x].role in RANKED and len(points):
        more = [meaning[column].role == "quality" for column in (x, y)]
        for _, part in points.groupby("compared"):
            points.loc[front(part, *more), "front"] = True
    names = [with_unit(column, meaning[column].unit) for column in (x, y)]
    meant = {axis: meaning[column] for axis, column in axes.items()}
    return TradeOff(table.name, *names, meant, table.simulated, points)


def pooled(values: Sequence[Any], ci95: tuple[float, float]) -> Estimate:
    """A value with its own interval, if that is a number; of several, one a seed, their mean with its interval."""
    if len(values) > 1:
        return mean_ci([float(value) for value in values])
    low, high = ci95
    return (float(values[0]), -math.inf, math.inf) if math.isnan(high - low) else (float(values[0]), low, high)


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


def figure(shown: TradeOff) -> dict[str, Any]:
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
    height = 3.5 if shown.ranked else 4.6  # names of settings stand upright
    return picture(lambda ax: _draw(ax, shown), " ".join(words), caption, table.to_dict("records"), height)


def picture(
    draw: Callable[[Any], None], alt: str, caption: str, rows: list[dict[str, Any]], height: float = 3.5
) -> dict[str, Any]:
    """A figure for the template. `draw` fills an axis; the legend stands below it, for which the figure grows."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        show.style(10)
        fig = Figure()
        ax = fig.add_subplot()
        draw(ax)
        handles = {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        columns = 2 if max(map(len, handles), default=0) <= 24 else 1
        fig.set_size_inches(WIDTH / 80, height + 0.2 * math.ceil(len(handles) / columns))
        if len(handles) > 1:
            look = {"fontsize": 8, "handlelength": 1.4, "columnspacing": 1}
            fig.legend([*handles.values()], [*handles], loc="outside lower left", ncols=columns, **look)
        png = base64.b64encode(show.png(fig)).decode()
    return {"png": png, "alt": alt, "caption": caption, "table": Markup(show.html_table(rows))}


def _draw(ax: Any, shown: TradeOff) -> None:
    """Colours tell series apart and marks tell runs, white for recorded ones; of one series, colours tell runs too."""
    points = shown.points.map(literal)
    runs, series, compared = (list(dict.fromkeys(points[column])) for column in ("run", "series", "compared"))
    steps = "steps-post" if shown.meaning["x"].role == "cost" else "steps-pre"  # what is reached at this x or better
    for name, part in points[points["front"]].groupby("compared", sort=False):
        label = f"front: {name}" if len(compared) > 1 else "Pareto front"
        look = {"color": "grey" if compared.index(name) else "black", "linewidth": 1, "zorder": 1}
        line = part.sort_values("x")
        ax.plot(line["x"], line["y"], label=label, drawstyle=steps, **look)
    for (run, name), part in points.groupby(["run", "series"], sort=False):
        number = series.index(name) if len(series) > 1 else runs.index(run)
        colour, mark = show.COLOURS[number % len(show.COLOURS)], MARKERS[runs.index(run) % len(MARKERS)]
        look = {"marker": mark, "markerfacecolor": colour if part["here"].all() else "white", "linestyle": ""}
        bars = {}
        for axis in "xy" if shown.ranked else "y":
            ends = part[axis] - part[f"{axis}_low"], part[f"{axis}_high"] - part[axis]
            bars[f"{axis}err"] = [end.where(end < math.inf, 0.0).clip(lower=0.0) for end in ends]
        ax.errorbar(part["x"], part["y"], **bars, color=colour, elinewidth=0.8, capsize=2, zorder=2, **look)
        if len(series) > 1:
            ax.plot([], [], linestyle="", marker="s", color=colour, label=name)
        if len(runs) > 1:
            ax.plot([], [], color=colour if len(series) == 1 else "grey", label=run, **look)
    _set_axes(ax, shown)


def literal(value: Any) -> Any:
    """A text for a figure, in which a dollar does not begin a formula."""
    return value.replace("$", r"\$") if isinstance(value, str) else value


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
        getattr(ax, f"set_{axis}label")(literal(textwrap.fill(words, 40)))
