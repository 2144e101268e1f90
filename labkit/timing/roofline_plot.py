"""The roofline of a machine with measured points, as a figure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from labkit.errors import InputError
from labkit.show import COLOURS, WIDTH, quantity
from labkit.timing.roofs import Ceilings, peak

MARKERS = "os^DvPX*"  # one more than there are colours, so that 56 points all look different
LINE = "#222222"


class Point(NamedTuple):
    """A measured point: label, arithmetic intensity in FLOP/byte, speed in FLOP/s."""

    label: str
    intensity: float
    speed: float


class Ranges(NamedTuple):
    """Ranges (low, high) of the bandwidth in B/s and of the compute roof in FLOP/s."""

    bandwidth: tuple[float, float]
    peak: tuple[float, float]


def plot(
    points: Sequence[Sequence[Any]], ceilings: Ceilings, *, dtype: str = "fp32", title: str | None = None
) -> Figure:
    """Draw the log-log roofline of a machine with measured points, named in the legend in order of their speed.

    A band about the roof shows the range of the ceilings, if known. Nothing is shown, and pyplot's state is unchanged.

    points: (label, FLOP/byte, FLOP/s) each.
    ceilings: measured by labkit.machine.ceilings.
    dtype: type whose peak is drawn.
    title: None names the device.
    Raises InputError for a type without ceiling, and for a point without a place on logarithmic axes.
    """
    rows = _checked(points)
    scene = _Scene(ceilings, dtype, rows)
    fig = Figure(figsize=(WIDTH, 4.2 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.add_subplot(xscale="log", yscale="log", xlim=scene.xlim, ylim=scene.ylim)
    ax.set_xlabel("arithmetic intensity (FLOP/byte)")
    ax.set_ylabel(f"performance ({scene.unit})")
    ax.set_title(title or f"Roofline of {ceilings.device}, {dtype}", loc="left")
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    _draw_roof(ax, scene)
    _draw_ridge(ax, scene)
    _draw_points(ax, scene)
    fig.legend(loc="outside lower left", frameon=False)
    return fig


@dataclass
class _Scene:
    """Parts of a roofline plot: ceilings, points, and the limits and the unit of the axes."""

    ceilings: Ceilings
    dtype: str
    points: list[Point]

    def __post_init__(self) -> None:
        self.peak = peak(self.ceilings, self.dtype)
        self.bandwidth = self.ceilings.bandwidth
        self.ridge = self.peak / self.bandwidth
        self.scale, self.unit = (1e12, "TFLOP/s") if self.peak >= 1e13 else (1e9, "GFLOP/s")
        leftmost = min([self.ridge / 30, *(point.intensity / 3 for point in self.points)])
        rightmost = max([self.ridge * 30, *(point.intensity * 3 for point in self.points)])
        lowest = min([self.bandwidth * leftmost, *(point.speed / 2 for point in self.points)])
        highest = max([self.peak, *(point.speed for point in self.points)])
        self.xlim = leftmost, rightmost
        self.ylim = lowest / self.scale, 2 * highest / self.scale


def _draw_roof(ax: Axes, scene: _Scene) -> None:
    lowest, highest = scene.xlim
    floor, _ = scene.ylim
    flat = scene.peak / scene.scale
    start_of_slope = scene.bandwidth * lowest / scene.scale
    xs = [lowest, scene.ridge, highest]
    ys = [start_of_slope, flat, flat]
    bandwidth, speed = quantity(scene.bandwidth, "B/s"), quantity(scene.peak, "FLOP/s")
    ax.plot(xs, ys, color=LINE, linewidth=2, label=f"measured: {bandwidth}, {scene.dtype} {speed}")
    ax.fill_between(xs, ys, floor, color="#EEF3F7", zorder=0)  # the speeds within reach
    ranges = _ranges(scene.ceilings, scene.dtype)
    if ranges:
        intensities = np.geomspace(lowest, highest, 200)
        low, high = (
            np.minimum(bandwidth * intensities, speed) / scene.scale
            for bandwidth, speed in zip(ranges.bandwidth, ranges.peak, strict=True)
        )
        ax.fill_between(intensities, low, high, color=LINE, alpha=0.2, linewidth=0, label="range in this run")


def _draw_ridge(ax: Axes, scene: _Scene) -> None:
    floor, _ = scene.ylim
    ax.vlines(scene.ridge, floor, scene.peak / scene.scale, color="#666666", linestyle=":", linewidth=1, zorder=1)
    foot = (scene.ridge, floor)
    look = {"textcoords": "offset points", "va": "bottom"}
    ax.annotate("memory-bound", foot, (-5, 5), ha="right", **look)
    ax.annotate(f"compute-bound from {scene.ridge:.3g}", foot, (5, 5), ha="left", **look)


def _draw_points(ax: Axes, scene: _Scene) -> None:
    fastest_first = sorted(scene.points, key=lambda point: -point.speed)
    for number, point in enumerate(fastest_first):
        ax.plot(
            point.intensity,
            point.speed / scene.scale,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linestyle="none",
            markersize=8,
            markeredgecolor=LINE,
            markeredgewidth=0.6,
            zorder=4,
            label=point.label,
        )


def _checked(points: Sequence[Sequence[Any]]) -> list[Point]:
    rows = []
    for row in points:
        if not isinstance(row, tuple | list) or len(row) != 3:
            raise InputError(f"a point is (label, FLOP/byte, FLOP/s), got {row!r}: give all three.")
        label, intensity, speed = row
        if not _is_positive(intensity) or not _is_positive(speed):
            raise InputError(
                f"point {label!r} has no place on logarithmic axes: FLOP/byte and FLOP/s have to be above 0."
            )
        rows.append(Point(str(label), float(intensity), float(speed)))
    return rows


def _is_positive(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value) and value > 0


def _ranges(ceilings: Ceilings, dtype: str) -> Ranges | None:
    """Return the ranges of bandwidth and peak; None unless both ranges are known and finite."""
    bandwidth, compute_roof = ceilings.bandwidth_range, ceilings.flops_range.get(dtype)
    if not bandwidth or not compute_roof:
        return None
    are_finite = all(math.isfinite(end) for end in (*bandwidth, *compute_roof))
    return Ranges(bandwidth, compute_roof) if are_finite else None
