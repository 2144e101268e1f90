"""A lesson's challenge: a goal on a plane of two quantities, and where points lie on it.

Goals are {column: (least, most, unit)}, two columns, x then y; None where a side is open. Points are dicts with both
columns, and under "<column> ci95" the (low, high) of a 95 % interval where there is one.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from labkit import show
from labkit.errors import InputError

Goals = Mapping[str, tuple[float | None, float | None, str]]


def checked(goals: Any, point: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `point` that the goals are about, as plain numbers; InputError for goals or a point that are none."""
    sides = list(goals.values()) if isinstance(goals, Mapping) else []
    if len(sides) != 2 or not all(len(side) == 3 and isinstance(side[2], str) for side in sides):
        raise InputError(f"The goals are {goals!r}; give two columns, each with (least, most, unit).")
    if all(bound is None for side in sides for bound in side[:2]):
        raise InputError(f"The goals {goals!r} ask for nothing; give a least or a most for one column or both.")
    numbers_only = {}
    for column in goals:
        value = point.get(column) if isinstance(point, Mapping) else None
        number = show.number(value)
        if number is None or not math.isfinite(number):
            raise InputError(f"A point of the plane has {value!r} as its {column!r}; give a number for {list(goals)}.")
        numbers_only[column] = float(number)
        if (ci95 := point.get(f"{column} ci95")) is not None:
            numbers_only[f"{column} ci95"] = tuple(map(float, ci95))
    return numbers_only


def missed(goals: Goals, point: Mapping[str, Any]) -> list[str]:
    """What of the goals the point does not reach, in words: "time is 0.71x, and at most 0.60x was asked for"."""
    words = []
    for column, (least, most, unit) in goals.items():
        here = f"{column} is {show.quantity(point[column], unit)}, and"
        if least is not None and point[column] < least:
            words.append(f"{here} at least {show.quantity(least, unit)} was asked for")
        if most is not None and point[column] > most:
            words.append(f"{here} at most {show.quantity(most, unit)} was asked for")
    return words


def asked(goals: Goals) -> str:
    """The goals in words: "time at most 0.60x, accuracy at least 84 %"."""
    words = []
    for column, (least, most, unit) in goals.items():
        ends = [("at least", least), ("at most", most)]
        bounds = " and ".join(f"{side} {show.quantity(end, unit)}" for side, end in ends if end is not None)
        words.append(f"{column} {bounds or 'open'}")
    return ", ".join(words)


def rows(goals: Goals, points: Sequence[Mapping[str, Any]], label: str) -> list[dict[str, Any]]:
    """The points as rows of a table: their `label`, and both columns with their units."""
    return [{label: point[label], **{heading(goals, column): point[column] for column in goals}} for point in points]


def heading(goals: Goals, column: str) -> str:
    """The column with its unit, as it stands above a table and along an axis."""
    unit = goals[column][2]
    return f"{column} ({unit})" if unit else column


def plane(ax: Any, goals: Goals, points: Sequence[Mapping[str, Any]], label: str, star: str | None = None) -> None:
    """Draw the points, each with its `label`, over the shaded region of the goal; the one labelled `star` as a star."""
    from matplotlib.patches import Rectangle

    (x, (least_x, most_x, _)), (y, (least_y, most_y, _)) = goals.items()
    ax.margins(0.18)
    for point in points:
        is_star = star is not None and point[label] == star
        look = (
            {"marker": "*", "markersize": 16, "color": show.COLOURS[1]}
            if is_star
            else {"marker": "o", "color": "black"}
        )
        bars = {
            f"{axis}err": [[max(0.0, point[column] - ends[0])], [max(0.0, ends[1] - point[column])]]
            for axis, column in (("x", x), ("y", y))
            if (ends := point.get(f"{column} ci95")) and all(map(math.isfinite, ends))
        }
        ax.errorbar([point[x]], [point[y]], capsize=2, zorder=3, **look, **bars)
    for bound, line in ((least_x, ax.axvline), (most_x, ax.axvline), (least_y, ax.axhline), (most_y, ax.axhline)):
        if bound is not None:
            line(bound, color=show.COLOURS[2], linewidth=1, linestyle="--")
    ax.update_datalim([(end, point[y]) for end in (least_x, most_x) if end is not None for point in points])
    ax.update_datalim([(point[x], end) for end in (least_y, most_y) if end is not None for point in points])
    ax.autoscale_view()
    (x_low, x_high), (y_low, y_high) = ax.get_xlim(), ax.get_ylim()
    corner = x_low if least_x is None else least_x, y_low if least_y is None else least_y
    far = x_high if most_x is None else most_x, y_high if most_y is None else most_y
    size = far[0] - corner[0], far[1] - corner[1]
    ax.add_patch(Rectangle(corner, *size, facecolor=show.COLOURS[2], alpha=0.15, zorder=0))
    ax.annotate("goal", (corner[0], far[1]), (5, -5), textcoords="offset points", va="top", color=show.COLOURS[2])
    ax.set(xlim=(x_low, x_high), ylim=(y_low, y_high))
    ax.set(xlabel=heading(goals, x), ylabel=heading(goals, y))
    named = {star, *_named(goals, points, label)}
    named_first = sorted(points, key=lambda point: (point[label] != star, point[label] not in named))
    labels = [((point[x], point[y]), str(point[label]), point[label] in named) for point in named_first]
    _label(ax, labels)


def _named(goals: Goals, points: Sequence[Mapping[str, Any]], label: str) -> list[Any]:
    """Labels of the points that a reader looks for: those that reach the goal, and the best along each axis."""
    signs = {c: 0 if least is most is None else 1 if most is not None else -1 for c, (least, most, _) in goals.items()}
    names = [point[label] for point in points if not missed(goals, point)]
    ranks = {column: [sign * point[column] for point in points] for column, sign in signs.items()}
    for first, second in itertools.permutations(goals):  # of equals along one axis the better along the other
        if points and signs[first]:
            *_, best = min(zip(ranks[first], ranks[second], [point[label] for point in points], strict=True))
            names.append(best)
    return names


def _label(ax: Any, points: Sequence[tuple[tuple[float, float], str, bool]]) -> None:
    """Write each label, (point, words, whether it has to be there), where it meets nothing and no other is nearer.

    Where points crowd, those without such a place stay without a label, all but the first of them: the table beside
    the plane names them all. A label that has to be there may stand further away, with a line to its point.
    """
    from matplotlib.patches import ConnectionPatch
    from matplotlib.transforms import Bbox, offset_copy

    corners = itertools.product(((7, "left"), (-7, "right")), ((5, "bottom"), (-5, "top")))
    near = [((dx, dy), ha, va) for (dx, ha), (dy, va) in corners]
    near += [((0, 7), "center", "bottom"), ((0, -7), "center", "top")]
    far = [((dx, dy), "center", "center") for dy in (26, -26, 48, -48) for dx in (0, 45, -45, 90, -90)]
    ground = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5}  # error bars may cross a label
    places = ax.transData.transform([point for point, *_ in points])  # [points, 2], in pixels
    taken = [Bbox.from_bounds(*(place - 4), 8, 8) for place in places]

    def is_nearest(i: int, box: Bbox) -> bool:
        """Whether a reader takes this label for point i's, and not for that of another point beside it."""
        gaps = np.hypot(*np.maximum(0, np.maximum(box.min - places, places - box.max)).T)
        return gaps[i] <= gaps.min()

    for i, (point, label, has_to) in enumerate(points):
        words = label.replace("$", r"\$")
        texts = [
            ax.annotate(words, point, to, textcoords="offset points", ha=ha, va=va, bbox=ground)
            for to, ha, va in near + far * has_to
        ]
        boxes = [text.get_window_extent() for text in texts]
        free = [
            ax.bbox.x0 < box.x0
            and box.x1 < ax.bbox.x1
            and ax.bbox.y0 < box.y0
            and box.y1 < ax.bbox.y1
            and not box.count_overlaps(taken)
            and (number >= len(near) or is_nearest(i, box))
            for number, box in enumerate(boxes)
        ]
        place = free.index(True) if True in free else None if i else 0
        taken += [] if place is None else [boxes[place]]
        for number, text in enumerate(texts):
            if number != place:
                text.remove()
            elif number >= len(near):
                end = offset_copy(ax.transData, ax.figure, *text.xyann, units="points")
                line = ConnectionPatch(point, point, ax.transData, end, color="grey", linewidth=0.8, zorder=1)
                ax.add_artist(line)
