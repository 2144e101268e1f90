"""Challenges: a goal on a plane of two quantities, and points on it.

Goals are {column: (least, most, unit)} for two columns, x then y of the plane; a bound of None is open. A point is a
dict with the two columns and, under "<column> ci95", the (low, high) of a 95 % interval if it has one.

    goals = {"time": (None, 0.6, "x"), "accuracy": (84, None, "%")}
    point = {"recipe": "half", "time": 0.55, "time ci95": (0.5, 0.6), "accuracy": 85.2}
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from labkit import show
from labkit.errors import InputError
from labkit.lesson.plane_labels import Label, place_labels
from labkit.lesson.records import Challenge

Goals = Mapping[str, tuple[float | None, float | None, str]]
YOURS = "your plan"
MARGIN = 0.18  # of the plane, around the points: room for labels
GOAL_COLOUR = show.COLOURS[2]


def judge(
    name: str, goal: str, plan: Mapping[str, Any] | None, *, goals: Goals, references: show.Rows, label: str
) -> tuple[Challenge, list[dict[str, Any]], str]:
    """Compare the learner's plan with the goal; return the challenge's record, the points of the plane and the state.

    name: name of the challenge.
    goal: a sentence that asks for the goal.
    plan: the point of the learner's plan; None without a plan.
    goals: ranges of the goal by column, see the top of the file.
    references: points, each with the column `label`, the point's name.
    label: name of the column of `references` with the points' names, such as "recipe".
    Raises InputError for goals or points without numbers for two columns.
    """
    points = []
    for reference in show.checked_rows(references):
        points.append({label: str(reference.get(label)), **checked(goals, reference)})
    reached, state = None, "no plan yet"
    if plan is not None:
        plan = checked(goals, plan)
        points.append({label: YOURS, **plan})
        shortfalls = missed(goals, plan)
        reached = not shortfalls
        state = "; ".join(["not reached yet", *shortfalls]) if shortfalls else "reached"
    record = Challenge(name=name, goal=goal, point=plan, goals=dict(goals), reached=reached)
    return record, points, state


def show_plane(record: Challenge, goals: Goals, points: list[dict[str, Any]], label: str, state: str) -> None:
    """Show the points of `judge` on the plane of the goal, and print the state of the plan."""
    _show(goals, points, label, record.goal, state)
    show.emit(f"challenge {record.name}: {state}.")


def checked(goals: Any, point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of `point` that the goals name, as plain numbers.

    Raises InputError for goals without two columns or without any bound, and for a column without a finite number.
    """
    sides = list(goals.values()) if isinstance(goals, Mapping) else []
    if len(sides) != 2 or not all(_is_side(side) for side in sides):
        raise InputError(f"The goals are {goals!r}; give two columns, each with (least, most, unit).")
    if all(least is None and most is None for least, most, _ in sides):
        raise InputError(f"The goals {goals!r} ask for nothing; give a least or a most for one column or both.")
    numbers: dict[str, Any] = {}
    for column in goals:
        value = point.get(column) if isinstance(point, Mapping) else None
        number = show.number(value)
        if number is None or not math.isfinite(number):
            raise InputError(f"A point of the plane has {value!r} as its {column!r}; give a number for {list(goals)}.")
        numbers[column] = float(number)
        ci95 = point.get(f"{column} ci95")
        if ci95 is not None:
            numbers[f"{column} ci95"] = tuple(float(end) for end in ci95)
    return numbers


def missed(goals: Goals, point: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each goal that the point misses: "time is 0.71x, and at most 0.60x was asked for"."""
    phrases = []
    for column, (least, most, unit) in goals.items():
        value = f"{column} is {show.quantity(point[column], unit)}"
        if least is not None and point[column] < least:
            phrases.append(f"{value}, and at least {show.quantity(least, unit)} was asked for")
        if most is not None and point[column] > most:
            phrases.append(f"{value}, and at most {show.quantity(most, unit)} was asked for")
    return phrases


def asked(goals: Goals) -> str:
    """Return the goals in words: "time at most 0.60x, accuracy at least 84 %"."""
    return ", ".join(f"{column} {_bounds(*goals[column])}" for column in goals)


def rows(goals: Goals, points: Sequence[Mapping[str, Any]], label: str) -> list[dict[str, Any]]:
    """Return the points as rows of a table: the column `label`, and the goals' two columns with units."""
    table = []
    for point in points:
        numbers = {heading(goals, column): point[column] for column in goals}
        table.append({label: point[label], **numbers})
    return table


def heading(goals: Goals, column: str) -> str:
    """Return a column's name and unit, as above a table and along an axis: "accuracy (%)"."""
    unit = goals[column][2]
    return f"{column} ({unit})" if unit else column


def plane(ax: Any, goals: Goals, points: Sequence[Mapping[str, Any]], label: str, star: str | None = None) -> None:
    """Draw points with their names over the shaded region of the goal.

    ax: a matplotlib axis.
    goals: ranges of the goal by column, see the top of the file.
    points: results of `checked`, each with the column `label`, its name.
    star: the name of a point to draw as a star, and to label first.
    """
    ax.margins(MARGIN)
    for point in points:
        _draw_point(ax, goals, point, is_star=star is not None and point[label] == star)
    _draw_bounds(ax, goals)
    _make_room_for_bounds(ax, goals, points)
    _shade_goal(ax, goals)
    x, y = goals
    ax.set(xlabel=heading(goals, x), ylabel=heading(goals, y))
    important = {star, *_notable(goals, points, label)}
    labels = []
    for point in sorted(points, key=lambda point: (point[label] != star, point[label] not in important)):
        name = point[label]
        labels.append(Label((point[x], point[y]), str(name), is_required=name in important))
    place_labels(ax, labels)


def _is_side(side: Any) -> bool:
    return len(side) == 3 and isinstance(side[2], str)


def _show(goals: Goals, points: Sequence[Mapping[str, Any]], label: str, goal: str, state: str) -> None:
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    plane(ax, goals, points, label, YOURS)
    x, y = goals
    axes = f"{y} against {x}, points: {len(points)}"
    alt = f"{axes}; shaded is the goal, {asked(goals)}. Your plan: {state}."
    show.figure(fig, alt=alt, table=rows(goals, points, label), caption=goal)


def _bounds(least: float | None, most: float | None, unit: str) -> str:
    phrases = []
    if least is not None:
        phrases.append(f"at least {show.quantity(least, unit)}")
    if most is not None:
        phrases.append(f"at most {show.quantity(most, unit)}")
    return " and ".join(phrases) or "open"


def _draw_point(ax: Any, goals: Goals, point: Mapping[str, Any], *, is_star: bool) -> None:
    x, y = goals
    look = {"marker": "o", "color": "black"}
    if is_star:
        look = {"marker": "*", "markersize": 16, "color": show.COLOURS[1]}
    bars = {"xerr": _error_bar(point, x), "yerr": _error_bar(point, y)}
    ax.errorbar([point[x]], [point[y]], capsize=2, zorder=3, **look, **bars)


def _error_bar(point: Mapping[str, Any], column: str) -> list[list[float]] | None:
    """Return the lengths of an error bar below and above the point, in matplotlib's form; None without a bar."""
    ends = point.get(f"{column} ci95")
    if not ends or not all(math.isfinite(end) for end in ends):
        return None
    below = point[column] - ends[0]
    above = ends[1] - point[column]
    return [[max(0.0, below)], [max(0.0, above)]]


def _draw_bounds(ax: Any, goals: Goals) -> None:
    for _, line, bound in _bounds_with_lines(ax, goals):
        line(bound, color=GOAL_COLOUR, linewidth=1, linestyle="--")


def _make_room_for_bounds(ax: Any, goals: Goals, points: Sequence[Mapping[str, Any]]) -> None:
    """Widen the axes to include every bound of the goal."""
    x, y = goals
    for column, _, bound in _bounds_with_lines(ax, goals):
        if column == x:
            ax.update_datalim([(bound, point[y]) for point in points])
        else:
            ax.update_datalim([(point[x], bound) for point in points])
    ax.autoscale_view()


def _bounds_with_lines(ax: Any, goals: Goals) -> Iterator[tuple[str, Callable, float]]:
    """Yield the column of each bound, the axis's method to draw a line there, and the bound; leave out open sides."""
    lines = dict(zip(goals, (ax.axvline, ax.axhline), strict=True))
    for column, (least, most, _) in goals.items():
        for bound in (least, most):
            if bound is not None:
                yield column, lines[column], bound


def _shade_goal(ax: Any, goals: Goals) -> None:
    """Shade the region between the bounds; an open side reaches to the edge of the plane."""
    from matplotlib.patches import Rectangle

    (least_x, most_x, _), (least_y, most_y, _) = goals.values()
    x_limits, y_limits = ax.get_xlim(), ax.get_ylim()
    x_low = x_limits[0] if least_x is None else least_x
    x_high = x_limits[1] if most_x is None else most_x
    y_low = y_limits[0] if least_y is None else least_y
    y_high = y_limits[1] if most_y is None else most_y
    ax.add_patch(Rectangle((x_low, y_low), x_high - x_low, y_high - y_low, facecolor=GOAL_COLOUR, alpha=0.15, zorder=0))
    ax.annotate("goal", (x_low, y_high), (5, -5), textcoords="offset points", va="top", color=GOAL_COLOUR)
    ax.set(xlim=x_limits, ylim=y_limits)


def _notable(goals: Goals, points: Sequence[Mapping[str, Any]], label: str) -> list[Any]:
    """Return the names of the points that a reader looks for: in the goal, and the best along each axis.

    Of several best points along an axis, the best along the second axis counts.
    """
    names = [point[label] for point in points if not missed(goals, point)]
    signs = {column: _sign(least, most) for column, (least, most, _) in goals.items()}
    for first, second in itertools.permutations(goals):
        if points and signs[first]:
            costs = [(signs[first] * point[first], signs[second] * point[second]) for point in points]
            _, name = min(zip(costs, [point[label] for point in points], strict=True))
            names.append(name)
    return names


def _sign(least: float | None, most: float | None) -> int:
    """Return 1 if less of a column is better, -1 if more is, 0 if the goals leave the column open."""
    if most is not None:
        return 1
    return 0 if least is None else -1
