"""Labels of points on a plane, placed so that a reader can match labels and points, also in a crowd.

Each label takes the first free place near the point: no overlap with a point, a label or the edge, and no nearer point.
A label without a free place is left out, since a table beside the plane names all points. A required label may stand
further away, with a line to the point.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

POINT_SIZE = 8  # pixels: the square around a point that no label may cover
BACKGROUND = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5}  # error bars may cross a label


@dataclass(frozen=True)
class Label:
    """A label of a point.

    point: (x, y) in the units of the axes.
    is_required: True for a label that may stand further away, with a line to the point.
    """

    point: tuple[float, float]
    text: str
    is_required: bool


class Place(NamedTuple):
    """A place for a label, relative to the point: offset in typographic points, and the label's anchor."""

    offset: tuple[int, int]
    horizontal: str
    vertical: str
    is_far: bool = False


def place_labels(ax: Any, labels: Sequence[Label]) -> None:
    """Write labels into a matplotlib axis, in order: an early label has more free places to take.

    The first label is written in any case, over a second label or a point if no place is free.
    """
    crowd = _Crowd(ax, [label.point for label in labels])
    for number, label in enumerate(labels):
        places = NEAR + FAR if label.is_required else NEAR
        candidates = [_write(ax, label, place) for place in places]
        boxes = [candidate.get_window_extent() for candidate in candidates]
        selected = crowd.first_free(number, places, boxes)
        if selected is None and number == 0:
            selected = 0  # the reader's own plan comes first, and is always named
        for index, candidate in enumerate(candidates):
            if index != selected:
                candidate.remove()
        if selected is not None:
            crowd.taken.append(boxes[selected])
            if places[selected].is_far:
                _draw_line(ax, label, candidates[selected])


class _Crowd:
    """The points and the labels written so far, in pixels.

    ax: a matplotlib axis.
    points: [N, 2] in the units of the axes.
    """

    def __init__(self, ax: Any, points: Sequence[tuple[float, float]]) -> None:
        from matplotlib.transforms import Bbox

        self._edge = ax.bbox
        self._points = ax.transData.transform(points)  # [N, 2] in pixels
        corners = self._points - POINT_SIZE / 2
        self.taken = [Bbox.from_bounds(*corner, POINT_SIZE, POINT_SIZE) for corner in corners]

    def first_free(self, number: int, places: Sequence[Place], boxes: Sequence[Any]) -> int | None:
        """Return the index of the first free place for the label of point `number`; None if no place is free.

        boxes: the label's box at each place, a matplotlib Bbox in pixels.
        """
        for index, (place, box) in enumerate(zip(places, boxes, strict=True)):
            is_free = self._is_inside(box) and not box.count_overlaps(self.taken)
            if is_free and (place.is_far or self._is_nearest(number, box)):
                return index
        return None

    def _is_inside(self, box: Any) -> bool:
        edge = self._edge
        is_inside_x = edge.x0 < box.x0 and box.x1 < edge.x1
        is_inside_y = edge.y0 < box.y0 and box.y1 < edge.y1
        return is_inside_x and is_inside_y

    def _is_nearest(self, number: int, box: Any) -> bool:
        """Return True if point `number` is the nearest to the box, so that a reader matches point and label."""
        beyond = np.maximum(box.min - self._points, self._points - box.max)  # [N, 2], negative inside the box
        gaps = np.hypot(*np.maximum(0, beyond).T)  # [N]
        return gaps[number] <= gaps.min()


def _places_near() -> list[Place]:
    """Return the corners around a point, right before left and above before below, then above and below."""
    return [
        Place((7, 5), "left", "bottom"),
        Place((7, -5), "left", "top"),
        Place((-7, 5), "right", "bottom"),
        Place((-7, -5), "right", "top"),
        Place((0, 7), "center", "bottom"),
        Place((0, -7), "center", "top"),
    ]


def _places_far() -> list[Place]:
    """Return places on a coarse grid around a point, the nearest rows first."""
    rows = (26, -26, 48, -48)
    columns = (0, 45, -45, 90, -90)
    return [Place((dx, dy), "center", "center", is_far=True) for dy, dx in itertools.product(rows, columns)]


NEAR = _places_near()
FAR = _places_far()


def _write(ax: Any, label: Label, place: Place) -> Any:
    return ax.annotate(
        label.text.replace("$", r"\$"),
        label.point,
        place.offset,
        textcoords="offset points",
        ha=place.horizontal,
        va=place.vertical,
        bbox=BACKGROUND,
    )


def _draw_line(ax: Any, label: Label, text: Any) -> None:
    """Draw a line from a point to the label."""
    from matplotlib.patches import ConnectionPatch
    from matplotlib.transforms import offset_copy

    end = offset_copy(ax.transData, ax.figure, *text.xyann, units="points")
    line = ConnectionPatch(label.point, label.point, ax.transData, end, color="grey", linewidth=0.8, zorder=1)
    ax.add_artist(line)
