"""What a sweep found, for the report: a row for each combination of parameters, the best marked, and figures.

Means and intervals are over seeds. Ratios that were measured within a run are compared between runs, times are not:
the machine changes from run to run. What the parameters do not change is folded away.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from course import page, pareto
from course.pareto_figure import LEGEND, WIDTH, figure
from course.points import Estimate, Point, estimate, pooled, varying
from course.rows import of_record, short
from labkit import show

MOST_COLUMNS, MOST_FIGURES = 8, 4
# What a ratio has to differ by for a parameter to have moved it: the interval of a run holds nothing of what changes
# from one run to the next, and ratios that no parameter touches were seen to differ by several per cent.
BETWEEN_RUNS = 0.1
# Words and units that say which way a value is better; a loss of accuracy is a loss.
_LESS = ("lost", "below", "error", "perplexity", "latency", "price", "left", "size")
_MORE = ("accuracy", "agreement", "speed", "over", "gain", "kept")
_UNITS = {**dict.fromkeys(("s", "ms", "µs", "B", "kB", "MB", "GB", "J"), False), "x": True}


class Found(NamedTuple):
    """A value at one point of the sweep."""

    estimate: Estimate
    unit: str
    clock: bool


Values = dict[Point, Found]


def swept(points: Sequence[Point]) -> str:
    """The section of one sweep as HTML: what was varied, the table of combinations, trade-offs, values by parameter."""
    names = varying(points)
    values = _values(points)
    moved = dict(list(_moved(values))[:MOST_COLUMNS])
    rest = {name: of for name, of in values.items() if name not in moved}
    parts = [f"<p>{page.text(_said(points, names))}</p>", *([_table(points, names, moved)] if names else [])]
    if rest:
        count = f"{len(rest)} {'further ' * bool(moved)}value{'s' * (len(rest) > 1)}"
        parts.append(page.folded(count, _across(points, names, rest)))
    figures = [figure(one) for one in pareto.trade_offs(points) if names and _is_swept(one)]
    figures += [_line(points, names, name, moved[name]) for name in _drawable(points, names, moved)]
    return "".join(parts) + (f'<div class="figures">{"".join(figures)}</div>' if figures else "")


def _said(points: Sequence[Point], names: Mapping[str, Sequence[Any]]) -> str:
    grid = ", ".join(f"{name} {', '.join(map(short, values))}" for name, values in names.items())
    runs = sum(len(point.records) for point in points)
    seeds = sorted({record.parameters.get("SEED", 0) for point in points for record in point.records})
    machine = points[0].records[0].machine.get("label", "")
    repeated = f" Seeds {', '.join(map(str, seeds))}: means with 95 % intervals over them." if len(seeds) > 1 else ""
    shown = (
        " Shown are the values that the parameters change, but no times: the machine changes between runs, and only "
        f"ratios that were measured within a run can be compared, from a difference of {BETWEEN_RUNS:.0%} on."
    )
    return (
        f"{runs} runs at {points[0].records[0].preset} on {machine}{': ' * bool(grid)}{grid}.{repeated}"
        f"{shown if names else ''}"
    )


# values -------------------------------------------------------------------------------------------


def _values(points: Sequence[Point]) -> dict[str, Values]:
    """Every number of the records by its name, single values first, then those of tables with their row."""
    single: dict[str, Values] = {}
    tables: dict[str, Values] = {}
    for point in points:
        rows: dict[str, list[dict[str, Any]]] = {}
        for record in point.records:
            for row in of_record(record):
                if row["value"] is not None and math.isfinite(row["value"]) and not row["name"].startswith("run: "):
                    rows.setdefault(f"{row['name']}, {row['key']}" if row["key"] else row["name"], []).append(row)
        for name, some in rows.items():
            one = pooled([estimate(row["value"], (row["low"], row["high"])) for row in some])
            found = Found(one, some[0]["unit"], some[0]["clock"])
            (tables if some[0]["key"] else single).setdefault(name, {})[point] = found
    return single | tables


def _moved(values: Mapping[str, Values]) -> Iterator[tuple[str, Values]]:
    """The values that the parameters change, the first of those that are the same everywhere."""
    known: set[tuple] = set()
    for name, of in values.items():
        same = tuple((point, found.estimate) for point, found in of.items())
        if same not in known and _moves(name, of):
            known.add(same)
            yield name, of


def _moves(name: str, of: Values) -> bool:
    """Whether the parameters change a value: at all, where no clock made it; a ratio, by more than chance would."""
    estimates = [found.estimate for found in of.values()]
    first = next(iter(of.values()))
    if not first.clock:
        return any(not math.isclose(one[0], estimates[0][0], rel_tol=1e-9) for one in estimates)
    if first.unit not in ("x", "×") and "speed-up" not in name:
        return False
    least, most = min(estimates), max(estimates)
    apart = max(low for _, low, _ in estimates) > min(high for _, _, high in estimates)
    return apart and most[0] > (1 + BETWEEN_RUNS) * least[0]


def more_is_better(name: str, unit: str) -> bool | None:
    """Which way a value is better, by its name and unit; None where they do not say."""
    words = name.lower()
    if any(word in words for word in _LESS):
        return False
    if unit in _UNITS:
        return _UNITS[unit]
    return True if unit.endswith("/s") or any(word in words for word in _MORE) else None


def _best(name: str, of: Values) -> Point | None:
    more = more_is_better(name, next(iter(of.values())).unit)
    if more is None or len(of) < 2:
        return None
    return (max if more else min)(of, key=lambda point: of[point].estimate[0])


def _table(points: Sequence[Point], names: Mapping[str, Any], moved: Mapping[str, Values]) -> str:
    best = {name: _best(name, of) for name, of in moved.items()}
    rows = [
        [
            *(page.text(short(point.parameters.get(name))) for name in names),
            str(len(point.records)),
            *(_cell(of.get(point), best[name] is point) for name, of in moved.items()),
        ]
        for point in points
    ]
    return page.table([*map(page.text, names), "runs", *map(page.text, moved)], rows)


def _across(points: Sequence[Point], names: Mapping[str, Any], rest: Mapping[str, Values]) -> str:
    """The other values, a row each, as they are many."""
    heads = [", ".join(f"{name} {short(point.parameters.get(name))}" for name in names) or "mean" for point in points]
    rows = [[page.text(name), *(_cell(of.get(point), False) for point in points)] for name, of in rest.items()]
    return page.table(["value", *map(page.text, heads)], rows)


def _cell(found: Found | None, best: bool) -> str:
    if found is None:
        return "–"
    value, low, high = found.estimate
    shown = page.text(show.quantity(value, found.unit))
    words = show.interval((low, high), found.unit) if math.isfinite(high - low) else ""
    interval = f" <small>({page.text(words)})</small>" if words and low != high else ""
    return f"{shown}{interval}" + (f" {page.badge('finished', 'best')}" if best else "")


# figures ------------------------------------------------------------------------------------------


def _is_swept(shown: pareto.TradeOff) -> bool:
    """Whether the parameters change the quality anywhere; a table that they leave alone needs no figure here."""
    found: dict[tuple, set[float]] = {}
    for spot in shown.spots:
        found.setdefault(tuple(spot.settings.items()), set()).add(round(spot.quality[0], 9))
    return any(len(values) > 1 for values in found.values())


def _drawable(points: Sequence[Point], names: Mapping[str, Any], moved: Mapping[str, Values]) -> list[str]:
    whole = [name for name, of in moved.items() if len(of) == len(points) and _best(name, of)]
    return whole[:MOST_FIGURES] if names else []


def _line(points: Sequence[Point], names: Mapping[str, Sequence[Any]], name: str, of: Values) -> str:
    """One value against the first parameter that is a number, a line for each combination of the others."""
    import matplotlib
    from matplotlib.figure import Figure

    along = next((one for one, values in names.items() if not isinstance(values[0], str)), next(iter(names)))
    unit = of[points[0]].unit
    rows = []
    for point in points:
        value, low, high = of[point].estimate
        others = ", ".join(f"{one} {short(point.parameters.get(one))}" for one in names if one != along)
        ends = {"low": low, "high": high} if math.isfinite(high - low) else {}
        rows.append({along: point.parameters.get(along), "with": others or "all", name: value, **ends})
    label = f"{name} ({unit})" if unit and unit not in show.BARE else name
    with matplotlib.rc_context():
        show.style()
        fig = Figure(figsize=(WIDTH / 80, 3.6))
        ax = fig.add_subplot()
        show.lines(ax, rows, along, name, by="with")
        way = "more" if more_is_better(name, unit) else "less"
        ax.set(xlabel=along, ylabel=textwrap.fill(f"{label}, {way} is better", 40))
        if len({row["with"] for row in rows}) > 1:
            longest = max(len(row["with"]) for row in rows)
            fig.legend(loc="outside lower left", ncols=2 if longest <= LEGEND else 1, fontsize=8)
        png = show.png(fig, scale=2)
    best = max(rows, key=lambda row: row[name] if way == "more" else -row[name])
    at = ", ".join(filter(None, [f"{along} {short(best[along])}", best["with"] if best["with"] != "all" else ""]))
    reached = f"the best is {show.quantity(best[name], unit)} at {at}"
    alt = f"{label} against {along} for {len(rows)} points of the sweep; {reached}."
    return page.figure(png, alt, f"{name} against {along}.", show.html_table(rows), width=WIDTH)
