"""Trade-offs in recorded tables: quality against cost, pooled over seeds, with the Pareto front, and their figures.

The role of a column (quality, cost, setting) is declared in the record (labkit.lesson.records), never guessed from a
name. A front is drawn through the values. Their intervals may overlap, so the figure shows the intervals too.
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
from labkit.timing.quality_stats import mean_ci

MARKERS = "osD^vPX"
FAR_APART = 50.0  # values that differ by more are drawn on a logarithmic axis
MOST_FIGURES = 3  # of a table
WIDTH = 384  # pixels of a figure on the page: three in a row on a wide screen, and a phone shows it almost unscaled
PIXELS_PER_INCH = 80
LONGEST_IN_TWO_COLUMNS = 24  # characters of a legend's entry; longer entries get the whole width
LEGEND_ROW = 0.2  # inches

Estimate = tuple[float, float, float]  # value, low, high; the ends are infinite where there is no interval
Recording = tuple[RunColumn, RecordedTable]  # a run, and the table of a certain name in its record

RANKED = {"quality": "more is better", "cost": "less is better"}


@dataclass(frozen=True, eq=False)
class TradeOff:
    """Column y of a table against column x, over several runs.

    table      name of the table
    x, y       labels of the axes, with units
    meaning    declared meaning of the columns: {"x": ..., "y": ...}
    simulated  True if the table was computed and no clock was read
    points     a row per point: run, here, compared, the settings, series, x, x_low, x_high, y, y_low, y_high,
               repetitions, and front (True if no point with the same `compared` beats the point)

    An x without a role is a setting, for example "criterion"; then no point is on a front.
    """

    table: str
    x: str
    y: str
    meaning: dict[str, Column] = field(repr=False)
    simulated: bool
    points: pd.DataFrame = field(repr=False)

    @property
    def ranked(self) -> bool:
        """Return True if x has a better end: x is a quality or a cost."""
        return self.meaning["x"].role in RANKED

    @property
    def trades(self) -> bool:
        """Return True if some front has several points: the best in x is not the best in y."""
        if self.points.empty:
            return False
        points_on_front = self.points.groupby("compared")["front"].sum()
        return any(points_on_front > 1)


def trade_offs(runs: Sequence[RunColumn], swept: Sequence[str] = ()) -> list[TradeOff]:
    """Find the trade-offs in the tables of several runs of a lesson.

    runs   runs of the same lesson
    swept  parameters in which the runs of a sweep differ. All points of a sweep share a front, and a parameter without
           effect on a table is left out. Without `swept` each machine, preset and owner has a front alone.

    Drawn are, if the best point in x is not the best in y: a quality against each cost, qualities of different units
    against each other, and qualities and costs against settings with a role (`"sparsity": quality()` of a column in
    `by`). A table without trade-offs but with several seeds has its qualities drawn against its first setting. Rows and
    runs with only the seed different are pooled. A table gets MOST_FIGURES at most: its rows lie beside the report.
    """
    names: dict[str, None] = {}
    for run in runs:
        tables = [entry for entry in run.record.measurements if isinstance(entry, RecordedTable)]
        names |= dict.fromkeys(table.name for table in tables)
    figures = []
    for name in names:
        figures += _of_table(name, runs, swept)
    return figures


def _of_table(name: str, runs: Sequence[RunColumn], swept: Sequence[str]) -> list[TradeOff]:
    recordings = _recordings(name, runs)
    table = recordings[0][1]
    values = _rows(recordings, swept)
    _make_numeric_(values, table)
    if swept:
        values = _named_by_parameters(values, swept)
        if values.empty:
            return []
        values["compared"] = "all runs"
    else:
        values["compared"] = values["run"]

    figures: list[TradeOff] = []
    for x, y in _pairs(table):
        trade_off = _trade_off(table, values, x, y)
        if trade_off.trades:
            figures.append(trade_off)
        if len(figures) == MOST_FIGURES:
            break
    settings = _settings(table)
    if not figures and settings and SEED in table.by:
        return [_trade_off(table, values, settings[0], y) for y in _outcomes(table, "quality")]
    return figures


def _recordings(name: str, runs: Sequence[RunColumn]) -> list[Recording]:
    recordings = []
    for run in runs:
        entry = run.record.named(name)
        if isinstance(entry, RecordedTable):
            recordings.append((run, entry))
    return recordings


def _rows(recordings: Sequence[Recording], swept: Sequence[str]) -> pd.DataFrame:
    """Join the rows of a table from several runs.

    Added are the columns "run" (label of the run), "here" (True for the user's run), and "p.NAME" for each swept
    parameter, with texts such as "RATIO 0.5".
    """
    parts = []
    for run, table in recordings:
        rows = pd.DataFrame(table.rows)
        rows["run"] = _run_label(run, recordings)
        rows["here"] = run.here
        for parameter in swept:
            setting = short(run.record.parameters.get(parameter))
            rows[f"p.{parameter}"] = f"{parameter} {setting}"
        parts.append(rows)
    return pd.concat(parts, ignore_index=True)


def _run_label(run: RunColumn, recordings: Sequence[Recording]) -> str:
    """Name a run in a figure's legend, for example "recorded, class, AMD EPYC 2c".

    The machine is part of the name only if `recordings` come from several machines.
    """
    machines = {other.record.machine.get("slug") for other, _ in recordings}
    parts = ["yours" if run.here else "recorded", run.record.preset]
    if len(machines) > 1:
        parts.append(run.machine)
    parts.append(run.changed)
    return ", ".join(filter(None, parts))


def _make_numeric_(values: pd.DataFrame, table: RecordedTable) -> None:
    """Turn the columns with a role, and the ends of intervals, into floats; infinities become NaN."""
    for column in _ranked(table):
        meaning = table.meaning(column)
        for name in (column, meaning.low, meaning.high):
            if name in values:
                numbers = values[name].map(as_number)
                values[name] = numbers.astype(float).replace([math.inf, -math.inf], math.nan)


def _named_by_parameters(values: pd.DataFrame, swept: Sequence[str]) -> pd.DataFrame:
    """Label the rows of a sweep by the parameters with an effect on them; an empty frame if no parameter has any."""
    values = _without_idle(values, [f"p.{parameter}" for parameter in swept])
    parameters = [column for column in values if column.startswith("p.")]
    if not parameters:
        return pd.DataFrame()
    return values.assign(run=values[parameters].agg(", ".join, axis=1))


def _without_idle(values: pd.DataFrame, parameters: Iterable[str]) -> pd.DataFrame:
    """Drop each parameter of a sweep without effect on the rows, and the repeated rows with it."""
    for parameter in parameters:
        without = values.drop(columns=parameter)
        distinct = without[~without.astype(str).duplicated()]
        settings = values[parameter].nunique()
        if len(distinct) * settings == len(values):  # every setting gave the same rows
            values = distinct
    return values


def _role(table: RecordedTable, column: str) -> str:
    return table.meaning(column).role


def _ranked(table: RecordedTable) -> list[str]:
    """List the columns with a better end: qualities and costs."""
    return [column for column in table.columns if _role(table, column) in RANKED]


def _outcomes(table: RecordedTable, role: str) -> list[str]:
    """List the measured columns of a role, "quality" or "cost"."""
    measured = [column for column in table.columns if column not in table.by]
    return [column for column in measured if _role(table, column) == role]


def _settings(table: RecordedTable) -> list[str]:
    return [column for column in table.by if column != SEED]


def _pairs(table: RecordedTable) -> list[tuple[str, str]]:
    """List the pairs (x, y) of columns worth a figure, the most important first."""
    ranked = _ranked(table)
    settings_with_role = [column for column in ranked if column in table.by]
    outcomes = [column for column in ranked if column not in table.by]
    qualities = _outcomes(table, "quality")
    costs = _outcomes(table, "cost")

    pairs = [(x, y) for y in outcomes for x in settings_with_role]
    pairs += itertools.product(costs, qualities)
    for y, x in itertools.combinations(qualities, 2):
        if table.meaning(x).unit != table.meaning(y).unit:
            pairs.append((x, y))
    return pairs


def _trade_off(table: RecordedTable, values: pd.DataFrame, x: str, y: str) -> TradeOff:
    """Pool the rows of column y against column x over seeds, and mark the points on a front."""
    ranked_axes = [column for column in (x, y) if _role(table, column) in RANKED]
    usable = values.dropna(subset=ranked_axes)
    groups = usable.groupby(["run", *_settings(table)], sort=False, dropna=False)
    points = pd.DataFrame([_point(table, rows, x, y) for _, rows in groups])
    if x in ranked_axes and len(points):
        x_more = _role(table, x) == "quality"
        y_more = _role(table, y) == "quality"
        for _, compared in points.groupby("compared"):
            points.loc[front(compared, x_more, y_more), "front"] = True
    meaning = {"x": table.meaning(x), "y": table.meaning(y)}
    return TradeOff(
        table=table.name,
        x=with_unit(x, meaning["x"].unit),
        y=with_unit(y, meaning["y"].unit),
        meaning=meaning,
        simulated=table.simulated,
        points=points,
    )


def _point(table: RecordedTable, rows: pd.DataFrame, x: str, y: str) -> dict[str, Any]:
    """Make a point of a figure from rows with only the seed different; the keys are the columns of TradeOff.points."""
    first = rows.iloc[0].to_dict()
    settings = [column for column in _settings(table) if column != x]
    texts = [first[column] for column in settings if isinstance(first[column], str)]
    point = {column: first[column] for column in ("run", "here", "compared", *settings)}
    point["series"] = ", ".join(texts)
    for axis, column in (("x", x), ("y", y)):
        value, low, high = _coordinate(table, column, first, list(rows[column]))
        point[axis] = value
        point[f"{axis}_low"] = low
        point[f"{axis}_high"] = high
    point["repetitions"] = len(rows)
    point["front"] = False
    return point


def _coordinate(
    table: RecordedTable, column: str, first: Mapping[str, Any], values: Sequence[Any]
) -> tuple[Any, float, float]:
    """Pool a column's values into (value, low, high); a setting without a role stays text.

    first   the first row, with the interval of a single value
    values  the column's value from each row
    """
    meaning = table.meaning(column)
    if meaning.role not in RANKED:
        return short(first[column]), -math.inf, math.inf
    low = first.get(meaning.low, math.nan)
    high = first.get(meaning.high, math.nan)
    return pooled(values, (low, high))


def pooled(values: Sequence[Any], ci95: tuple[float, float]) -> Estimate:
    """Pool repetitions of a value into (value, low, high).

    values  a number per seed
    ci95    interval of a single value; NaN if the record has no interval

    Several values become their mean with its 95 % interval over seeds. A single value keeps `ci95`, or gets infinite
    ends.
    """
    if len(values) > 1:
        return mean_ci([float(value) for value in values])
    low, high = ci95
    if math.isnan(high - low):
        return float(values[0]), -math.inf, math.inf
    return float(values[0]), low, high


def front(points: pd.DataFrame, x_more: bool, y_more: bool) -> list[Any]:
    """Find the Pareto front: the points beaten by no point as good in x and y and better in x or y.

    points          columns x and y, numbers
    x_more, y_more  True if more of x, or of y, is better

    Returns labels of the index of `points`; of equal points the first.
    """
    x_sign = -1.0 if x_more else 1.0
    y_sign = -1.0 if y_more else 1.0
    costs = pd.DataFrame({"x": x_sign * points["x"], "y": y_sign * points["y"]})
    y_by_rising_x = costs.sort_values(["x", "y"], kind="stable")["y"]
    least_y_before = y_by_rising_x.cummin().shift(fill_value=math.inf)
    return list(y_by_rising_x.index[y_by_rising_x < least_y_before])


# figures ----------------------------------------------------------------------------------------------------------


def figure(shown: TradeOff) -> dict[str, Any]:
    """Draw a trade-off for the page: picture, alt text, caption, and a table of exactly the points drawn."""
    height = 3.5 if shown.ranked else 4.6  # names of settings stand upright
    rows = _point_table(shown).to_dict("records")
    return picture(lambda ax: _draw(ax, shown), _alt_text(shown), _caption(shown), rows, height)


def _alt_text(shown: TradeOff) -> str:
    points = shown.points
    title = f"{shown.y} against {shown.x}"
    sentences = [f"{title} for {len(points)} points of “{shown.table}”."]
    on_front = points[points["front"]]
    for name, line in on_front.groupby("compared", sort=False):
        line = line.sort_values("x")
        ends = line.iloc[[0, -1]] if len(line) > 1 else line
        places = [_place(point, shown) for point in ends.itertuples()]
        sentences.append(f"{name}: the Pareto front joins {len(line)} of them: {' to '.join(places)}.")
    if not shown.ranked:
        more = shown.meaning["y"].role == "quality"
        best = points["y"].idxmax() if more else points["y"].idxmin()
        sentences.append(f"The best is {_place(points.loc[best], shown)}.")
    return " ".join(sentences)


def _place(point: Any, shown: TradeOff) -> str:
    """Name a point by its coordinates, for example "90 % at 0.500"."""
    y = show.quantity(point.y, shown.meaning["y"].unit)
    x = show.quantity(point.x, shown.meaning["x"].unit)
    return f"{y} at {x}"


def _caption(shown: TradeOff) -> str:
    caption = f"{shown.table}: {shown.y} against {shown.x}."
    if shown.simulated:
        caption = f"SIMULATED: {caption}"
    seeds = shown.points["repetitions"].max()
    if seeds > 1:
        caption += f" Means over {seeds} seeds, bars: 95 % intervals over seeds."
    return caption


def _point_table(shown: TradeOff) -> pd.DataFrame:
    table = shown.points.drop(columns=["here", "compared", "series"])
    table = table.rename(columns={"x": shown.x, "y": shown.y})
    for axis, name in (("x", shown.x), ("y", shown.y)):
        lows = table.pop(f"{axis}_low")
        highs = table.pop(f"{axis}_high")
        intervals = [_interval_text(*ends) for ends in zip(lows, highs, strict=True)]
        after_value = table.columns.get_loc(name) + 1
        table.insert(after_value, f"{name} 95 %", intervals)
    table["front"] = table["front"].map({True: "yes", False: "no"})
    return table


def _interval_text(low: float, high: float) -> str:
    if math.isfinite(high - low):
        return show.interval((low, high))
    return "–"


def picture(
    draw: Callable[[Any], None], alt: str, caption: str, rows: list[dict[str, Any]], height: float = 3.5
) -> dict[str, Any]:
    """Draw a figure for the page's template, with a legend below the axes; the figure grows by the legend's height.

    draw     function of a matplotlib axis: draws on the axis
    alt      alt text
    caption  caption
    rows     a dict per row of the table under the figure
    height   inches without the legend

    Returns {"png": base64 text, "alt": ..., "caption": ..., "table": HTML}.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        show.style(10)
        fig = Figure()
        ax = fig.add_subplot()
        draw(ax)
        handles, labels = ax.get_legend_handles_labels()
        legend = dict(zip(labels, handles, strict=True))  # a label that was drawn twice stands once
        longest = max(map(len, legend), default=0)
        columns = 2 if longest <= LONGEST_IN_TWO_COLUMNS else 1
        legend_height = LEGEND_ROW * math.ceil(len(legend) / columns)
        fig.set_size_inches(WIDTH / PIXELS_PER_INCH, height + legend_height)
        if len(legend) > 1:
            look = {"fontsize": 8, "handlelength": 1.4, "columnspacing": 1}
            fig.legend(list(legend.values()), list(legend), loc="outside lower left", ncols=columns, **look)
        png = base64.b64encode(show.png(fig)).decode()
    return {"png": png, "alt": alt, "caption": caption, "table": Markup(show.html_table(rows))}


def _draw(ax: Any, shown: TradeOff) -> None:
    """Draw the fronts as steps and the points with error bars.

    Colours tell series apart and markers tell runs, white inside for recorded runs. If all points are of the same
    series, colours tell runs too.
    """
    points = shown.points.map(literal)
    _draw_fronts(ax, points, shown.meaning["x"].role)
    runs = list(points["run"].unique())
    series = list(points["series"].unique())
    axes_with_bars = "xy" if shown.ranked else "y"
    for (run, name), group in points.groupby(["run", "series"], sort=False):
        number = series.index(name) if len(series) > 1 else runs.index(run)
        colour = show.COLOURS[number % len(show.COLOURS)]
        look = {
            "marker": MARKERS[runs.index(run) % len(MARKERS)],
            "markerfacecolor": colour if group["here"].all() else "white",
            "linestyle": "",
        }
        bars = {f"{axis}err": _error_bars(group, axis) for axis in axes_with_bars}
        bars |= {"elinewidth": 0.8, "capsize": 2}
        ax.errorbar(group["x"], group["y"], color=colour, zorder=2, **bars, **look)
        # empty lines, for the legend alone
        if len(series) > 1:
            ax.plot([], [], linestyle="", marker="s", color=colour, label=name)
        if len(runs) > 1:
            ax.plot([], [], color=colour if len(series) == 1 else "grey", label=run, **look)
    _set_axes(ax, shown)


def _draw_fronts(ax: Any, points: pd.DataFrame, x_role: str) -> None:
    compared = list(points["compared"].unique())
    steps = "steps-post" if x_role == "cost" else "steps-pre"  # the best y that is reached at this x or a better one
    for name, line in points[points["front"]].groupby("compared", sort=False):
        label = f"front: {name}" if len(compared) > 1 else "Pareto front"
        colour = "black" if name == compared[0] else "grey"
        look = {"drawstyle": steps, "color": colour, "linewidth": 1, "zorder": 1}
        line = line.sort_values("x")
        ax.plot(line["x"], line["y"], label=label, **look)


def _error_bars(points: pd.DataFrame, axis: str) -> list[pd.Series]:
    """Lengths of the error bars below and above the points; 0 if a point has no interval."""
    below = points[axis] - points[f"{axis}_low"]
    above = points[f"{axis}_high"] - points[axis]
    return [length.where(length < math.inf, 0.0).clip(lower=0.0) for length in (below, above)]


def literal(value: Any) -> Any:
    """Escape the dollars of a text, which would begin a formula in a figure; a value of a different type stays."""
    if isinstance(value, str):
        return value.replace("$", r"\$")
    return value


def _set_axes(ax: Any, shown: TradeOff) -> None:
    """Set scales, limits and labels. An axis spans the values, not the bars, which are far longer with two seeds."""
    for axis in "xy" if shown.ranked else "y":
        values = shown.points[axis]
        low, high = values.min(), values.max()
        if low > 0 and high / low > FAR_APART:
            getattr(ax, f"set_{axis}scale")("log")
        elif high > low and axis == "y":
            _set_y_limits(ax, shown.points)
    ax.tick_params("x", rotation=0 if shown.ranked else 90)
    for axis, name in (("x", shown.x), ("y", shown.y)):
        better = RANKED.get(shown.meaning[axis].role)
        label = textwrap.fill(f"{name}, {better}" if better else name, 40)
        getattr(ax, f"set_{axis}label")(literal(label))


def _set_y_limits(ax: Any, points: pd.DataFrame) -> None:
    """Leave at most half the span of the values for the error bars at either end, and a margin."""
    values = points["y"]
    low, high = values.min(), values.max()
    room = (high - low) / 2
    ends = pd.concat([values, points["y_low"], points["y_high"]])
    ends = ends[ends.abs() < math.inf]
    bottom = max(low - room, ends.min())
    top = min(high + room, ends.max())
    ax.set_ylim(bottom - room / 8, top + room / 8)
