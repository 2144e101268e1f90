"""A residual block drawn with its couplings: parts of one colour lose the same channels.

The colours come from the groups of `coupling.trace`; which modules stand on which branch is said by the caller.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure

from labkit.errors import InputError
from labkit.pruning.coupling import Group
from labkit.show import COLOURS

STEP, HEIGHT = 1.3, 0.36
BOX, SIGN = 38, 10  # points that an arrow stays away from the middle of a box, and of the plus sign


def residual(
    groups: Sequence[Group], source: str, branch: Sequence[str], shortcut: Sequence[str], reader: str
) -> tuple[Figure, list[dict[str, Any]]]:
    """The figure of source -> (branch + shortcut) -> reader, and its data, one row a module.

    All are names of modules with a weight: source writes the block's input, the branches run in parallel into an
    addition (an empty shortcut is the identity), reader is the next to read. Left half of a box: the group of the
    weight's columns; right half: of its rows; a norm has only the one. InputError for a module that no group holds.
    """
    group_of = {(member.name, member.dim): n for n, group in enumerate(groups) for member in group.members}
    for name in (source, *branch, *shortcut, reader):
        if (f"{name}.weight", 0) not in group_of and (f"{name}.weight", 1) not in group_of:
            raise InputError(f"No group holds a weight of {name!r}: take names of named_modules() that have one.")
    length = max(len(branch), len(shortcut), 1)
    places = {source: (0.0, 0.5), reader: ((length + 1.6) * STEP, 0.5)}
    for y, names in ((1.0, branch), (0.0, shortcut)):
        for i, name in enumerate(names):
            places[name] = ((1 + (i + 0.5) * length / len(names) - 0.5) * STEP, y)
    plus = ((length + 0.8) * STEP, 0.5)

    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(1.6 * (length + 2.4), 2.3))
    ends = [path[-1] for path in (branch, shortcut) if path]
    edges = [(source, path[0]) for path in (branch, shortcut) if path]
    edges += [pair for path in (branch, shortcut) for pair in pairwise(path)]
    for start, end in edges:
        _arrow(ax, places[start], places[end], BOX, BOX)
    for end in ends if shortcut else [*ends, source]:
        _arrow(ax, places[end], plus, BOX, SIGN)
    _arrow(ax, plus, places[reader], SIGN, BOX)
    ax.text(*plus, "+", ha="center", va="center", fontsize=14)

    rows = []
    for name, (x, y) in places.items():
        columns, own = (group_of.get((f"{name}.weight", dim)) for dim in (1, 0))
        for side, number in enumerate((own if columns is None else columns, own)):
            colour = "white" if number is None else COLOURS[number % len(COLOURS)]
            ax.add_patch(
                plt.Rectangle((x - 0.5 + side / 2, y - HEIGHT / 2), 0.5, HEIGHT, facecolor=colour, alpha=0.4, lw=0)
            )
        ax.text(x, y, name, ha="center", va="center", fontsize=7)
        named = ["" if number is None else groups[number].name for number in (columns, own)]
        rows.append({"module": name, "columns in group": named[0], "rows in group": named[1]})
    ax.set(xlim=(-0.6, places[reader][0] + 0.6), ylim=(-0.3, 1.3))
    ax.set_axis_off()
    return fig, rows


def _arrow(ax: Any, start: tuple[float, float], end: tuple[float, float], leave: float, reach: float) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "dimgrey", "shrinkA": leave, "shrinkB": reach})
