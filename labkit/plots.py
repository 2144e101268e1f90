"""Plots that several lessons draw: lines with error bars, and panels of curves with a common legend."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from labkit.show import WIDTH, Rows
from labkit.words import is_open

LINE_STYLES = ("-", "-.", ":")
PANEL_HEIGHT = 3.4  # inches


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


def curves(
    panels: Mapping[str, Rows],
    x: str,
    y: str,
    *,
    by: str,
    **axes: Any,
) -> Any:
    """Draw a figure of panels, two side by side, each with the curves of `lines`, and a common legend below.

    panels: the data of each panel, by its title.
    x, y, by: as in `lines`.
    axes: options for matplotlib's `Axes.set`, such as ylabel, yscale or ylim; labels default to the column names.
    Returns the matplotlib Figure.
    """
    import matplotlib.pyplot as plt

    across = min(len(panels), 2)
    down = math.ceil(len(panels) / across)
    fig, grid = plt.subplots(down, across, figsize=(WIDTH, PANEL_HEIGHT * down), sharey=True, squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.remove()
    for number, (title, rows) in enumerate(panels.items()):
        ax = grid.flat[number]
        lines(ax, rows, x, y, by=by)
        labels = {"xlabel": x, "ylabel": y, "title": title}
        ax.set(**{**labels, **axes})
        is_first_in_row = number % across == 0
        if not is_first_in_row:
            ax.set_ylabel("")
    _add_legend(fig, *ax.get_legend_handles_labels(), title=by, panels_height=PANEL_HEIGHT * down)
    return fig


def _add_legend(fig: Any, handles: Sequence[Any], labels: Sequence[str], title: str, panels_height: float) -> None:
    """Add a legend below the panels, and make the figure higher by its rows; nothing for a single curve."""
    if len(labels) < 2:
        return
    longest = max(map(len, labels))
    column_width = 0.7 + 0.1 * longest  # inches
    columns = max(1, int(WIDTH / column_width))
    legend_rows = math.ceil(len(labels) / columns)
    fig.set_figheight(panels_height + 0.25 * (1 + legend_rows))
    fig.legend(handles, labels, loc="outside lower left", ncols=columns, title=title, alignment="left")
