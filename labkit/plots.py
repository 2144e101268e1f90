"""A plot that several pages draw: lines with error bars."""

import math
from typing import Any

from labkit.show import Rows
from labkit.words import is_open

LINE_STYLES = ("-", "-.", ":")


def lines(ax: Any, rows: Rows, x: str, y: str, *, by: str) -> None:
    """Draw a line for each value of a column, with a label for the legend.

    ax: matplotlib axes to draw into.
    rows: the data, a dict per row. Columns "low" and "high", if all rows of a line have both, become error bars. An
        interval that excludes nothing, such as (0, inf), has no bar.
    x, y: names of the columns to draw.
    by: name of the column whose values distinguish the lines.
    """
    import matplotlib

    colours = len(matplotlib.rcParams["axes.prop_cycle"])
    names = dict.fromkeys(row[by] for row in rows)
    for number, name in enumerate(names):
        group = [row for row in rows if row[by] == name]
        times_round = number // colours  # colours come again, with another line style
        look: dict[str, Any] = {"linestyle": LINE_STYLES[times_round % len(LINE_STYLES)]}
        if all("low" in row and "high" in row for row in group):
            bars = [_bar(row[y], row["low"], row["high"]) for row in group]
            look["yerr"] = list(zip(*bars, strict=True))
        look |= {"marker": "o", "markersize": 3, "capsize": 2}
        xs = [row[x] for row in group]
        ys = [row[y] for row in group]
        ax.errorbar(xs, ys, label=str(name), **look)


def _bar(value: float, low: float, high: float) -> tuple[float, float]:
    """Return the lengths of an error bar below and above a value; NaN, which draws none, for an open interval."""
    if is_open((low, high)):
        return math.nan, math.nan
    return value - low, high - value
