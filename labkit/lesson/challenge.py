"""Challenges: a goal on a plane of two quantities, and points on it.

Goals are {column: (least, most, unit)} for two columns, x then y of the plane; a bound of None is open. A point is a
dict with the two columns and, under "<column> ci95", its interval (low, high), if the point has one. "seconds" splits
a time of several parts, such as preparing and running, for the table and the state of the plan.

    goals = {"time": (None, 0.6, "x"), "accuracy": (84, None, "%")}
    point = {"recipe": "half", "time": 0.55, "time ci95": (0.5, 0.6), "accuracy": 85.2}
    point = {"recipe": "engine", "time": 0.4, "accuracy": 90.1, "seconds": {"preparing": 8.1, "running": 4.6}}
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from labkit import show
from labkit.errors import InputError, first_line
from labkit.lesson.records import Challenge

Goals = Mapping[str, tuple[float | None, float | None, str]]
Line = tuple[list[float], list[float]]  # on the plane: x of the two ends, y of the two ends
YOURS = "your plan"
MARGIN = 0.18  # of the plane, around the points: room for names
NAME_DISTANCE = (0.02, 0.4)  # of a name to its point, least and most, as shares of the plane
CANDIDATES = 1000  # places to try for a name
BACKGROUND = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5}  # a bound may cross a name
EDGE = 0.01  # of the plane, free of names
GOAL_COLOUR = show.COLOURS[2]


@contextmanager
def judging(takes: str) -> Iterator[None]:
    """Carry out the learner's plan in a `with` block, and tell an exception of whatever kind in a line.

    takes: a sentence on what a plan is, shown after the exception.
    """
    try:
        yield
    except Exception as error:
        print(f"Your plan failed, so it is not placed: {type(error).__name__}: {first_line(error)}")
        print(takes)


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
        points.append({label: str(reference.get(label)), **checked(goals, reference), **_split(reference)})
    if plan is None:
        record = Challenge(name=name, goal=goal, point=None, goals=dict(goals), reached=None)
        return record, points, "no plan yet"
    numbers, split = checked(goals, plan), _split(plan)
    points.append({label: YOURS, **numbers, **split})
    shortfalls = missed(goals, numbers)
    phrases = ["not reached yet", *shortfalls] if shortfalls else ["reached"]
    if split:
        phrases.append(_parts_in_words(split["seconds"]))
    record = Challenge(name=name, goal=goal, point=numbers, goals=dict(goals), reached=not shortfalls)
    return record, points, "; ".join(phrases)


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
    """Return the points as rows of a table: the column `label`, and the goals' two columns with units.

    An interval and the parts of a time get columns, if any point has them.
    """
    whole = [column for column in goals if all(float(point[column]).is_integer() for point in points)]
    with_interval = [column for column in goals if any(_error_bar(point, column) for point in points)]
    parts = dict.fromkeys(part for point in points for part in point.get("seconds", {}))
    table = []
    for point in points:
        row = {label: point[label]}
        for column in goals:
            row[heading(goals, column)] = int(point[column]) if column in whole else point[column]
            if column in with_interval:
                ends = point[f"{column} ci95"] if _error_bar(point, column) else None
                row[f"{column}, interval"] = show.interval(ends)
        for part in parts:
            row[f"{part} (s)"] = point.get("seconds", {}).get(part)
        table.append(row)
    return table


def heading(goals: Goals, column: str) -> str:
    """Return a column's name and unit, as above a table and along an axis: "accuracy (%)"."""
    unit = goals[column][2]
    return f"{column} ({unit})" if unit else column


def plane(ax: Any, goals: Goals, points: Sequence[Mapping[str, Any]], label: str, star: str | None = None) -> None:
    """Draw points with their names and intervals over the shaded region of the goal.

    ax: a matplotlib axis.
    goals: ranges of the goal by column, see the top of the file.
    points: results of `checked`, each with the column `label`, its name.
    star: the name of a point to draw as a star, and to name first.
    """
    ax.margins(MARGIN)
    for point in points:
        _draw_point(ax, goals, point, is_star=star is not None and point[label] == star)
    _draw_bounds(ax, goals)
    _make_room_for_bounds(ax, goals, points)
    if points and ax.dataLim.x0 >= 0:
        ax.set_xlim(left=max(0.0, ax.get_xlim()[0]))  # no time lies below zero, and no margin either
    if points and ax.dataLim.y0 >= 0:
        ax.set_ylim(bottom=max(0.0, ax.get_ylim()[0]))
    x, y = goals
    ax.set(xlabel=heading(goals, x), ylabel=heading(goals, y))
    goal_word = _shade_goal(ax, goals)
    if points:  # the star first, then long names, which are the hardest to place
        hardest_first = sorted(points, key=lambda point: (point[label] != star, -len(str(point[label]))))
        _write_names(ax, goals, hardest_first, label, goal_word)


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
    ax.errorbar([point[x]], [point[y]], capsize=2, elinewidth=1, zorder=3, **look, **bars)


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


def _shade_goal(ax: Any, goals: Goals) -> Any:
    """Shade the region between the bounds, and return the word in it; an open side reaches to the edge of the plane."""
    from matplotlib.patches import Rectangle

    (least_x, most_x, _), (least_y, most_y, _) = goals.values()
    x_limits, y_limits = ax.get_xlim(), ax.get_ylim()
    x_low = x_limits[0] if least_x is None else least_x
    x_high = x_limits[1] if most_x is None else most_x
    y_low = y_limits[0] if least_y is None else least_y
    y_high = y_limits[1] if most_y is None else most_y
    ax.add_patch(Rectangle((x_low, y_low), x_high - x_low, y_high - y_low, facecolor=GOAL_COLOUR, alpha=0.15, zorder=0))
    word = ax.annotate("goal", (x_low, y_high), (5, -5), textcoords="offset points", va="top", color=GOAL_COLOUR)
    ax.set(xlim=x_limits, ylim=y_limits)
    return word


def _write_names(ax: Any, goals: Goals, points: Sequence[Mapping[str, Any]], label: str, goal_word: Any) -> None:
    """Write the name of each point beside it, clear of points, intervals, bounds and names written before.

    Where a crowd leaves no such place for some name, names may stand over bounds, and then over the lines that join
    names and points as well.
    goal_word: the word in the goal, which stays free as well.
    """
    ax.figure.draw_without_rendering()  # places the axes, and with them the word
    marks = [*_intervals(goals, points), _diagonal(ax, goal_word)]
    bounds = _bound_lines(ax, goals)
    x, y = goals
    positions = [point[x] for point in points], [point[y] for point in points]
    names = [str(point[label]).replace("$", r"\$") for point in points]
    if _allocated(ax, positions, names, [*marks, *bounds]) or _allocated(ax, positions, names, marks):
        return
    _allocated(ax, positions, names, marks, is_last=True)


def _allocated(
    ax: Any, positions: tuple[list[float], list[float]], names: list[str], lines: list[Line], *, is_last: bool = False
) -> bool:
    """Write names clear of points and lines; return False and write none if a name has no free place.

    is_last: True to write all names in any case: lines from names to points may cross, and a name that still has no
        free place stands over points.
    """
    import textalloc
    from matplotlib import rcParams

    xs, ys = positions
    least, most = NAME_DISTANCE
    _, _, texts, leaders = textalloc.allocate(
        ax,
        xs,
        ys,
        names,
        x_scatter=xs,
        y_scatter=ys,
        x_lines=[line[0] for line in lines],
        y_lines=[line[1] for line in lines],
        xlims=_inside(ax.get_xlim()),
        ylims=_inside(ax.get_ylim()),
        min_distance=least,
        max_distance=most,
        nbr_candidates=CANDIDATES,
        draw_all=is_last,
        avoid_label_lines_overlap=not is_last,
        avoid_crossing_label_lines=not is_last,
        textsize=rcParams["font.size"],
        linecolor="grey",
        linewidth=0.8,
        bbox=BACKGROUND,
    )
    if None not in texts:
        return True
    for artist in filter(None, [*texts, *leaders]):
        artist.remove()
    return False


def _inside(limits: tuple[float, float]) -> tuple[float, float]:
    """Return limits that leave the edge of the plane free."""
    low, high = limits
    edge = EDGE * (high - low)
    return low + edge, high - edge


def _intervals(goals: Goals, points: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Return the intervals of all points as lines on the plane."""
    x, y = goals
    lines = []
    for point in points:
        if _error_bar(point, x):
            lines.append((list(point[f"{x} ci95"]), [point[y], point[y]]))
        if _error_bar(point, y):
            lines.append(([point[x], point[x]], list(point[f"{y} ci95"])))
    return lines


def _bound_lines(ax: Any, goals: Goals) -> list[Line]:
    """Return the bounds of the goal as lines from edge to edge of the plane."""
    x, _ = goals
    lines = []
    for column, _, bound in _bounds_with_lines(ax, goals):
        if column == x:
            lines.append(([bound, bound], list(ax.get_ylim())))
        else:
            lines.append((list(ax.get_xlim()), [bound, bound]))
    return lines


def _diagonal(ax: Any, text: Any) -> Line:
    """Return the diagonal of a text's box as a line on the plane."""
    corners = ax.transData.inverted().transform(text.get_window_extent().get_points())
    return corners[:, 0].tolist(), corners[:, 1].tolist()


def _split(point: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"seconds": {part: seconds}} of a point that has them, else an empty dict."""
    return {"seconds": dict(point["seconds"])} if "seconds" in point else {}


def _parts_in_words(seconds: Mapping[str, float]) -> str:
    """Return the parts of a time: "of the time preparing 8.10 s, running 4.60 s"."""
    phrases = [f"{part} {show.quantity(value, 's')}" for part, value in seconds.items()]
    return f"of the time {', '.join(phrases)}"
