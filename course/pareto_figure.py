"""Figures of trade-offs for the report: points with intervals, the Pareto front as a step line, a table of the numbers.

Runs with the same parameters are told apart by machine; where parameters differ (a sweep), these give colour and mark.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from course import page
from course.pareto import SHARE, Spot, TradeOff
from course.points import Estimate, Point
from course.rows import short
from labkit import show

MARKERS = "osD^vPX"
FAR_APART = 50.0  # values that differ by more are drawn on a logarithmic axis
LEGEND = 24  # characters of a name, where two columns of names fit
WIDTH = 384  # pixels on the page: three in a row on a wide screen, and a phone shows it almost unscaled


def figure(shown: TradeOff) -> str:
    """The trade-off as HTML: picture, alt text, and a folded table of exactly what is drawn."""
    looks = {spot: _look(spot, shown) for spot in shown.spots}
    fronts = {name: shown.front(spots) for name, spots in _compared(shown).items()}
    rows = [_row(spot, shown, spot in fronts[_whose(spot, shown)]) for spot in shown.spots]
    alt = _alt(shown, fronts)
    seeds = max(spot.runs for spot in shown.spots)
    caption = f"{'SIMULATED: ' if shown.simulated else ''}{shown.table}: {shown.quality} against {_cost_name(shown)}."
    caption += f" Means over {seeds} seeds, bars: 95 % intervals over seeds." if seeds > 1 else ""
    return page.figure(_drawn(shown, looks, fronts), alt, caption, show.html_table(rows), width=WIDTH)


# what is drawn ------------------------------------------------------------------------------------


def _look(spot: Spot, shown: TradeOff) -> tuple[str, str]:
    """What the colour and what the mark of a spot say; colours tell texts apart best, such as what rows are called."""
    names, series = shown.swept, spot.series or shown.table
    if not names:
        return series, _source(spot.point, shown)
    values = [f"{name} {short(spot.point.parameters.get(name))}" for name in names]
    if not isinstance(spot.point.parameters.get(names[0]), str) and len({one.series for one in shown.spots}) > 1:
        return series, ", ".join(values)
    return values[0], ", ".join(values[1:]) or series


def _source(point: Point, shown: TradeOff) -> str:
    """Whose runs a point holds, at what preset, and on which machine or with what parameters where these differ."""
    record = point.records[0]
    machine = record.machine.get("label", record.device).split(", ")[:2]
    slugs = {spot.point.records[0].machine.get("slug") for spot in shown.spots}
    other = [f"{name} {short(point.parameters.get(name))}" for name in shown.differing]
    whose = "yours" if point.here else "recorded"
    return ", ".join([whose, record.preset, *(machine if len(slugs) > 1 else []), *(other if not shown.swept else [])])


def _whose(spot: Spot, shown: TradeOff) -> str:
    return "all runs" if shown.swept else _source(spot.point, shown)


def _compared(shown: TradeOff) -> dict[str, list[Spot]]:
    """The spots that one front is drawn through: machines and presets apart, the points of a sweep together."""
    found: dict[str, list[Spot]] = {}
    for spot in shown.spots:
        found.setdefault(_whose(spot, shown), []).append(spot)
    return found


def _row(spot: Spot, shown: TradeOff, on_front: bool) -> dict[str, Any]:
    swept = {name: short(spot.point.parameters.get(name)) for name in shown.swept}
    row: dict[str, Any] = {"runs": _source(spot.point, shown), **swept, **spot.settings}
    for name, (value, low, high) in ((_cost_name(shown), spot.cost), (_quality_name(shown), spot.quality)):
        row[name] = value
        row[f"{name} 95 %"] = show.interval((low, high)) if math.isfinite(low) and math.isfinite(high) else "–"
    return {**row, "repetitions": spot.runs, "on the front": "yes" if on_front else "no"}


def _cost_name(shown: TradeOff) -> str:
    return f"{shown.cost} ({shown.cost_unit})" if shown.cost_unit else shown.cost


def _quality_name(shown: TradeOff) -> str:
    return f"{shown.quality} ({shown.quality_unit})" if shown.quality_unit else shown.quality


def _alt(shown: TradeOff, fronts: Mapping[str, Sequence[Spot]]) -> str:
    words = [f"{_quality_name(shown)} against {_cost_name(shown)} for {len(shown.spots)} points of “{shown.table}”."]
    for name, front in fronts.items():
        ends = [front[0], front[-1]] if len(front) > 1 else front
        reached = " to ".join(
            f"{show.quantity(spot.quality[0], shown.quality_unit)} at {show.quantity(spot.cost[0], shown.cost_unit)}"
            for spot in ends
        )
        words.append(f"{name}: the Pareto front joins {len(front)} of them: {reached}.")
    for spot in dict((_whose(spot, shown), spot) for spot in shown.spots if spot.dense).values():
        had = show.quantity(spot.quality[0], shown.quality_unit)
        words.append(
            f"The dense model, {_whose(spot, shown)}: {had} at {show.quantity(spot.cost[0], shown.cost_unit)}."
        )
    return " ".join(words)


# drawing ------------------------------------------------------------------------------------------


def _drawn(shown: TradeOff, looks: Mapping[Spot, tuple[str, str]], fronts: Mapping[str, Sequence[Spot]]) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        show.style()
        names = {name for look in looks.values() for name in look} | {*fronts, "dense model"}
        columns = 2 if max(map(len, names)) <= LEGEND else 1
        fig = Figure(figsize=(WIDTH / 80, 3.5 + 0.2 * len(names) / columns))
        ax = fig.add_subplot()
        for place, (name, front) in enumerate(fronts.items()):
            _draw_front(ax, front, name if len(fronts) > 1 else "", "black" if place == 0 else "grey")
        _draw_spots(ax, shown, looks)
        if _reaches_dense(shown):
            ax.axvline(1, color="black", linestyle=":", linewidth=1, label="dense model's cost")
        _set_axes(ax, shown)
        fig.legend(*_unique(ax), loc="outside lower left", ncols=columns, fontsize=8, handlelength=1.4, columnspacing=1)
        return show.png(fig, scale=2)


def _reaches_dense(shown: TradeOff) -> bool:
    """Whether the dense model's cost, which no point has, is near enough to be drawn."""
    costs = [spot.cost[0] for spot in shown.spots]
    near = 1 - max(costs) <= 2 * (max(costs) - min(costs))
    return SHARE in shown.cost and near and not any(spot.dense for spot in shown.spots)


def _draw_front(ax: Any, front: Sequence[Spot], name: str, colour: str) -> None:
    x, y = [spot.cost[0] for spot in front], [spot.quality[0] for spot in front]
    label = f"front: {name}" if name else "Pareto front"
    ax.plot(x, y, drawstyle="steps-post", color=colour, linewidth=1, zorder=1, label=label)


def _draw_spots(ax: Any, shown: TradeOff, looks: Mapping[Spot, tuple[str, str]]) -> None:
    colours, marks = (list(dict.fromkeys(look[place] for look in looks.values())) for place in (0, 1))
    dense = [spot for spot in shown.spots if spot.dense]
    for colour, mark in dict.fromkeys(looks.values()):
        own = {"color": _cycled(show.COLOURS, colours, colour), "marker": _cycled(MARKERS, marks, mark)}
        own |= {"markerfacecolor": "white"} if mark != marks[0] and not shown.swept else {}
        _draw(ax, [spot for spot, look in looks.items() if look == (colour, mark) and not spot.dense], own)
    for spots, face in (
        ([s for s in dense if s.point.here], "black"),
        ([s for s in dense if not s.point.here], "white"),
    ):
        _draw(ax, spots, {"color": "black", "marker": "*", "markersize": 9, "markerfacecolor": face})

    drawn = {colour for spot, (colour, _) in looks.items() if not spot.dense}
    for name in colours if len(drawn) > 1 else []:
        if name in drawn:
            ax.plot([], [], linestyle="", marker="s", color=_cycled(show.COLOURS, colours, name), label=name)
    for name in marks if len(marks) > 1 else []:
        face = "white" if name != marks[0] and not shown.swept else "grey"
        ax.plot([], [], linestyle="", marker=_cycled(MARKERS, marks, name), color="grey", mfc=face, label=name)
    if dense:
        ax.plot([], [], linestyle="", marker="*", markersize=9, color="black", label="dense model")


def _cycled(looks: Sequence[str], names: Sequence[str], name: str) -> str:
    return looks[names.index(name) % len(looks)]


def _draw(ax: Any, spots: Sequence[Spot], own: Mapping[str, Any]) -> None:
    if spots:
        x, y = ([getattr(spot, axis)[0] for spot in spots] for axis in ("cost", "quality"))
        bars = {
            f"{end}err": _bars([getattr(spot, axis) for spot in spots])
            for end, axis in (("x", "cost"), ("y", "quality"))
        }
        ax.errorbar(x, y, **bars, linestyle="", elinewidth=0.8, capsize=2, zorder=2, **own)


def _bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Distances below and above, none where there is no interval."""
    ends = [(v - low, high - v) if math.isfinite(high - low) else (0.0, 0.0) for v, low, high in estimates]
    return [[max(0.0, end) for end in side] for side in zip(*ends, strict=True)]


def _set_axes(ax: Any, shown: TradeOff) -> None:
    """Axes span the values, not the bars: with two seeds an interval is twelve times what it spans."""
    for axis, values in (("x", [spot.cost[0] for spot in shown.spots]), ("y", [one.quality[0] for one in shown.spots])):
        low, high = min(values), max(values)
        if low > 0 and high / low > FAR_APART:
            getattr(ax, f"set_{axis}scale")("log")
        elif high > low and axis == "y":
            bars = [end for spot in shown.spots for end in spot.quality[1:] if math.isfinite(end)]
            room = (high - low) / 2
            ax.set_ylim(max(low - room, min([low, *bars])) - room / 8, min(high + room, max([high, *bars])) + room / 8)
    better = "more is better" if shown.more else "less is better"
    ax.set(xlabel=f"{_cost_name(shown)}, less is better", ylabel=f"{_quality_name(shown)}, {better}")


def _unique(ax: Any) -> Iterator[list]:
    handles = {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    yield list(handles.values())
    yield list(handles)
