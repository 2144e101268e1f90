"""What a sweep found, for the report: a row for each combination of parameters, the best marked, and figures.

Only single values that the parameters change are shown; rows.csv holds the rest. Means and intervals are over seeds.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from labkit import page, pareto, plots
from labkit.pareto_figure import WIDTH, figure
from labkit.points import Estimate, Point, estimate, pooled, varying
from labkit.rows import clocked, number, short

MOST_FIGURES = 4
# Words and units that say which way a value is better; a loss of accuracy is a loss.
_LESS = ("lost", "below", "error", "perplexity", "latency", "price", "left", "size")
_MORE = ("accuracy", "agreement", "speed", "over", "gain", "kept")
_UNITS = {**dict.fromkeys(("s", "ms", "µs", "B", "kB", "MB", "GB", "J"), False), "x": True}


def swept(points: Sequence[Point]) -> str:
    """The section of one sweep as HTML: what was varied, the table of combinations, trade-offs, values by parameter."""
    names = varying(points)
    values = _values(points)
    moved = {name: of for name, of in values.items() if _differ(of)}
    parts = [f"<p>{page.text(_said(points, names))}</p>", _table(points, names, moved)]
    if rest := [name for name in values if name not in moved]:
        listed = "".join(f"<li>{page.text(name)}</li>" for name in rest)
        count = "1 further value does" if len(rest) == 1 else f"{len(rest)} further values do"
        summary = f"{count} not differ by more than the intervals"
        parts.append(page.folded(summary, f"<ul>{listed}</ul>"))
    figures = [figure(one) for one in pareto.trade_offs(points) if names and _moves(one)]
    figures += [_line(points, names, name, moved[name]) for name in _drawable(points, names, moved)]
    return "".join(parts) + (f'<div class="figures">{"".join(figures)}</div>' if figures else "")


def _said(points: Sequence[Point], names: Mapping[str, Sequence[Any]]) -> str:
    grid = ", ".join(f"{name} {', '.join(map(short, values))}" for name, values in names.items())
    runs = sum(len(point.records) for point in points)
    seeds = sorted({record.parameters.get("SEED", 0) for point in points for record in point.records})
    machine = points[0].records[0].machine.get("label", "")
    repeated = f" Seeds {', '.join(map(str, seeds))}: means with 95 % intervals over them." if len(seeds) > 1 else ""
    return f"{runs} runs at {points[0].records[0].preset} on {machine}{': ' * bool(grid)}{grid}.{repeated}"


# single values ------------------------------------------------------------------------------------

Values = dict[Point, tuple[Estimate, str, bool]]  # what each point has, its unit, whether a clock made it


def _values(points: Sequence[Point]) -> dict[str, Values]:
    found: dict[str, Values] = {}
    for point in points:
        entries: dict[str, list[Mapping[str, Any]]] = {}
        for record in point.records:
            for entry in record.measurements:
                if entry["kind"] != "table" and number(entry.get("value")) is not None:
                    entries.setdefault(entry["name"], []).append(entry)
        for name, some in entries.items():
            one = pooled([estimate(number(entry["value"]), entry.get("ci95")) for entry in some])
            found.setdefault(name, {})[point] = (one, some[0].get("unit") or "", clocked(some[0]))
    return found


def _differ(of: Values) -> bool:
    """Whether two points differ beyond their intervals; without these, whether they differ and no clock made them."""
    estimates = [one for one, _, _ in of.values()]
    if any(math.isinf(low) or math.isinf(high) for _, low, high in estimates):
        timed = any(clock for _, _, clock in of.values())
        return not timed and not all(math.isclose(one[0], estimates[0][0], rel_tol=1e-9) for one in estimates)
    return max(low for _, low, _ in estimates) > min(high for _, _, high in estimates)


def more_is_better(name: str, unit: str) -> bool | None:
    """Which way a value is better, by its name and unit; None where they do not say."""
    words = name.lower()
    if any(word in words for word in _LESS):
        return False
    if unit in _UNITS:
        return _UNITS[unit]
    return True if unit.endswith("/s") or any(word in words for word in _MORE) else None


def _best(name: str, of: Values) -> Point | None:
    more = more_is_better(name, next(iter(of.values()))[1])
    if more is None or len(of) < 2:
        return None
    return (max if more else min)(of, key=lambda point: of[point][0][0])


def _table(points: Sequence[Point], names: Mapping[str, Any], moved: Mapping[str, Values]) -> str:
    best = {name: _best(name, of) for name, of in moved.items()}
    rows = [
        [
            *(page.text(short(point.parameters.get(name))) for name in names or ["–"]),
            str(len(point.records)),
            *(_cell(of.get(point), best[name] is point) for name, of in moved.items()),
        ]
        for point in points
    ]
    return page.table([*map(page.text, names or ["parameters"]), "runs", *map(page.text, moved)], rows)


def _cell(found: tuple[Estimate, str, bool] | None, best: bool) -> str:
    if found is None:
        return "–"
    (value, low, high), unit, _ = found
    shown = page.text(plots.quantity(value, unit))
    words = f" <small>({page.text(plots.interval((low, high), unit))})</small>" if math.isfinite(high - low) else ""
    return f"{shown}{words}" + (f" {page.badge('finished', 'best')}" if best else "")


# figures ------------------------------------------------------------------------------------------


def _moves(shown: pareto.TradeOff) -> bool:
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
    unit = of[points[0]][1]
    rows = []
    for point in points:
        (value, low, high), _, _ = of[point]
        others = ", ".join(f"{one} {short(point.parameters.get(one))}" for one in names if one != along)
        ends = {"low": low, "high": high} if math.isfinite(high - low) else {}
        rows.append({along: point.parameters.get(along), "with": others or "all", name: value, **ends})
    label = f"{name} ({unit})" if unit and unit not in plots.BARE else name
    with matplotlib.rc_context():
        plots.style()
        fig = Figure(figsize=(WIDTH / 80, 3.6))
        ax = fig.add_subplot()
        plots.lines(ax, rows, along, name, by="with")
        way = "more" if more_is_better(name, unit) else "less"
        ax.set(xlabel=along, ylabel=textwrap.fill(f"{label}, {way} is better", 40))
        if len({row["with"] for row in rows}) > 1:
            fig.legend(loc="outside lower left", ncols=2, fontsize=8)
        png = plots.png(fig, scale=2)
    best = max(rows, key=lambda row: row[name] if way == "more" else -row[name])
    at = ", ".join(filter(None, [f"{along} {short(best[along])}", best["with"] if best["with"] != "all" else ""]))
    reached = f"the best is {plots.quantity(best[name], unit)} at {at}"
    alt = f"{label} against {along} for {len(rows)} points of the sweep; {reached}."
    return page.figure(png, alt, f"{name} against {along}.", plots.html_table(rows), width=WIDTH)
