"""The roofline: what a call has to do against what a machine can do, as bounds on time and as a picture.

Williams, Waterman, Patterson 2009. `count` (from `labkit.counting`) gives the work, `labkit.machine.ceilings` the
machine. A bound says what no kernel can beat, not what one reaches: launches, caches and instructions are not in it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from labkit.counting import Op, Work, count
from labkit.errors import InputError
from labkit.show import COLOURS, quantity

__all__ = ["Bound", "Op", "Point", "Work", "bound", "count", "decode_bound", "describe", "plot"]


class Ceilings(Protocol):
    """What `labkit.machine.Ceilings` has: FLOP/s by dtype, bandwidth in B/s, whose they are, measured or datasheet."""

    flops: Mapping[str, float]
    bandwidth: float
    device: Any
    how: str


@dataclass(frozen=True)
class Bound:
    """No execution takes less than `seconds`. `ridge` and `intensity` in FLOP/byte; `limiter` "memory" or "compute"."""

    seconds: float
    limiter: str
    intensity: float
    ridge: float

    def share(self, measured_seconds: float) -> float:
        """The part of the roof that was reached, 1 at best.

        Above 1, the data stayed in a cache that is faster than the memory whose bandwidth was taken (time it with more
        data than the last cache holds), or the count, a ceiling or the clock is wrong.
        """
        if not measured_seconds > 0:
            raise InputError(f"a measured time has to be positive, got {measured_seconds}: give seconds a call.")
        return self.seconds / measured_seconds

    def __str__(self) -> str:
        return (
            f"at least {quantity(self.seconds, 's')}, {self.limiter}-bound "
            f"({self.intensity:.3g} FLOP/byte, ridge at {self.ridge:.3g})"
        )


def bound(work: Work | Op | Sequence[Work | Op], ceilings: Ceilings, dtype: str = "fp32") -> Bound:
    """time >= max(FLOPs / peak, bytes / bandwidth), with the peak of `dtype`.

    A sequence is work done one after the other: the sum of its maxima, and `limiter` is what takes more of that sum.
    Rows of `Work.by_op` can be given too, for running operator by operator out of memory.
    """
    peak = _peak(ceilings, dtype)
    works = list(work) if isinstance(work, Sequence) else [work]
    if not works or not all(isinstance(w, Work | Op) for w in works):
        raise InputError("bound needs a Work or a sequence of them: get it from labkit.roofline.count(model, inputs).")
    flops = [w.flops or w.elementwise_flops for w in works]
    nbytes = [w.bytes for w in works]
    if not sum(flops) + sum(nbytes):
        raise InputError("work without FLOPs and bytes has no bound: count a call that computes something.")
    seconds = {"memory": 0.0, "compute": 0.0}
    for f, b in zip(flops, nbytes, strict=True):
        computing, moving = f / peak, b / ceilings.bandwidth
        seconds["compute" if computing > moving else "memory"] += max(computing, moving)
    limiter = max(seconds, key=lambda name: seconds[name])
    intensity = sum(flops) / sum(nbytes) if sum(nbytes) else math.inf
    return Bound(sum(seconds.values()), limiter, intensity, peak / ceilings.bandwidth)


def decode_bound(
    *,
    weight_bytes: float,
    kv_bytes: float,
    bandwidth: float,
    batch: int = 1,
    flops_per_token: float = 0.0,
    peak: float | None = None,
) -> float:
    """Tokens a second that a decoder can't exceed: each step reads all weights once and every sequence's KV cache once.

    batch / max((weight_bytes + batch * kv_bytes) / bandwidth, batch * flops_per_token / peak), `kv_bytes` those of one
    sequence. Memory and compute are taken over the whole step; layer by layer the bound is tighter (`bound` of a list).
    """
    if not bandwidth > 0 or (peak is not None and not peak > 0):
        raise InputError(f"bandwidth and peak have to be positive (B/s, FLOP/s), got {bandwidth} and {peak}.")
    if min(weight_bytes, kv_bytes, flops_per_token) < 0 or not weight_bytes + kv_bytes + flops_per_token > 0:
        raise InputError("bytes and FLOPs a step can't be negative, nor all zero: give the sizes of weights and cache.")
    if batch < 1 or batch != int(batch):
        raise InputError(f"batch has to be a whole number from 1 up, got {batch}.")
    if flops_per_token and peak is None:
        raise InputError("flops_per_token needs a peak to be held against: give peak in FLOP/s, or leave both out.")
    moving = (weight_bytes + batch * kv_bytes) / bandwidth
    computing = batch * flops_per_token / peak if peak is not None else 0.0
    return batch / max(moving, computing)


def _peak(ceilings: Ceilings, dtype: str) -> float:
    if dtype not in ceilings.flops:
        raise InputError(
            f"no ceiling is known for dtype {dtype!r} here: choose from {', '.join(sorted(ceilings.flops))}."
        )
    if not ceilings.bandwidth > 0 or not ceilings.flops[dtype] > 0:
        got = f"{ceilings.flops[dtype]} FLOP/s and {ceilings.bandwidth} B/s"
        raise InputError(f"ceilings have to be positive, got {got}: measure them with labkit.machine.ceilings().")
    return ceilings.flops[dtype]


# -------------------------------------------------------------------------------------------------------- the picture


class Point(NamedTuple):
    """A measured call: its FLOP/byte, and the FLOP/s that it reached."""

    label: str
    intensity: float
    flops_per_second: float


def _points(points: Sequence[Sequence[Any]]) -> list[Point]:
    rows = []
    for row in points:
        if len(row) != 3:
            raise InputError(f"a point is (label, FLOP/byte, FLOP/s), got {tuple(row)!r}: give all three.")
        point = Point(str(row[0]), float(row[1]), float(row[2]))
        if not all(math.isfinite(v) and v > 0 for v in point[1:]):
            raise InputError(
                f"point {point.label!r} has no place on logarithmic axes: FLOP/byte and FLOP/s have to be above 0."
            )
        rows.append(point)
    return rows


def describe(
    points: Sequence[Sequence[Any]], ceilings: Ceilings, *, dtype: str = "fp32", datasheet: Ceilings | None = None
) -> str:
    """The roofline in words, for whoever does not see it: ceilings, ridge, and each point's share of its roof."""
    peak = _peak(ceilings, dtype)
    ridge = peak / ceilings.bandwidth
    sentences = [
        f"Roofline of {ceilings.device}, {ceilings.how}: {quantity(ceilings.bandwidth, 'B/s')}, {dtype} peak "
        f"{quantity(peak, 'FLOP/s')}, ridge at {ridge:.3g} FLOP/byte."
    ]
    if datasheet is not None:
        peaks = f"{quantity(datasheet.bandwidth, 'B/s')} and {quantity(_peak(datasheet, dtype), 'FLOP/s')}"
        sentences.append(f"Dashed, from the datasheet: {peaks}.")
    for point in _points(points):
        side = "memory" if point.intensity < ridge else "compute"
        share = point.flops_per_second / min(peak, ceilings.bandwidth * point.intensity)
        verdict = "" if share <= 1 else ": above it, so its data stay in a cache, or the count or a ceiling is wrong"
        sentences.append(
            f"{point.label}: {point.intensity:.3g} FLOP/byte, {quantity(point.flops_per_second, 'FLOP/s')}, "
            f"{100 * share:.3g} % of the {side} roof{verdict}."
        )
    return " ".join(sentences)


_MARKERS = "os^DvPX"  # another each time the colours have run out
_INK, _GREY, _SHADE = "#222222", "#666666", "#EEF3F7"
_ROOFS = ((_INK, "-", 2.0), (_GREY, "--", 1.4))  # colour, style, width: the ceilings, and the datasheet beside them
# Where a label can stand beside its point: alignment, and direction.
_ACROSS = (("left", 1), ("right", -1), ("center", 0))
_ALONG = (("center", 0), ("bottom", 1), ("top", -1))


def plot(
    points: Sequence[Sequence[Any]],
    ceilings: Ceilings,
    *,
    dtype: str = "fp32",
    datasheet: Ceilings | None = None,
    title: str | None = None,
) -> Figure:
    """Log-log roofline of `ceilings` with labelled `points` of (label, FLOP/byte, FLOP/s); `datasheet` is drawn dashed.

    A figure by itself: nothing is shown, and pyplot's state is not touched. `describe` says the same in words.
    """
    rows = _points(points)
    roofs = [ceilings] if datasheet is None else [ceilings, datasheet]
    peaks = [_peak(roof, dtype) for roof in roofs]
    ridges = [peak / roof.bandwidth for peak, roof in zip(peaks, roofs, strict=True)]
    scale, unit = (1e12, "TFLOP/s") if max(peaks) >= 1e13 else (1e9, "GFLOP/s")
    left = min([ridge / 30 for ridge in ridges] + [p.intensity / 3 for p in rows])
    right = max([ridge * 30 for ridge in ridges] + [p.intensity * 4 for p in rows])
    low = min([roof.bandwidth * left for roof in roofs] + [p.flops_per_second for p in rows]) / 3
    high = 3 * max(peaks + [p.flops_per_second for p in rows])

    fig = Figure(figsize=(8, 5), dpi=110, layout="none")
    FigureCanvasAgg(fig)
    fig.subplots_adjust(left=0.1, right=0.97, top=0.91, bottom=0.12)
    ax = fig.add_subplot(xscale="log", yscale="log", xlim=(left, right), ylim=(low / scale, high / scale))
    ax.set_xlabel("arithmetic intensity (FLOP/byte)")
    ax.set_ylabel(f"performance ({unit})")
    ax.set_title(title or f"Roofline of {ceilings.device}, {dtype}", loc="left", fontsize=12, color=_INK)
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)

    for (colour, style, width), roof, peak, ridge in zip(_ROOFS, roofs, peaks, ridges, strict=False):
        name = f"{roof.how}: {quantity(roof.bandwidth, 'B/s')}, {dtype} {quantity(peak, 'FLOP/s')}"
        ys = [roof.bandwidth * left / scale, peak / scale, peak / scale]
        ax.plot([left, ridge, right], ys, style, color=colour, linewidth=width, zorder=2, label=name)
    ax.legend(loc="upper left", frameon=False, fontsize=9)  # above the roofs, where no point can be
    _sides(ax, ridges[0], peaks[0] / scale)
    _mark(ax, [p._replace(flops_per_second=p.flops_per_second / scale) for p in rows])
    return fig


def _say(ax: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **how: Any) -> Annotation:
    return ax.annotate(text, at, offset, textcoords="offset points", fontsize=9, color=_INK, zorder=5, **how)


def _sides(ax: Axes, ridge: float, peak: float) -> None:
    """What the ridge parts, named at its foot; what can be reached is shaded."""
    xs, ys = ax.lines[0].get_data()
    floor = ax.get_ylim()[0]
    ax.fill_between(xs, ys, floor, color=_SHADE, zorder=0)
    ax.vlines(ridge, floor, peak, color=_GREY, linestyle=":", linewidth=1, zorder=1)
    _say(ax, "memory-bound", (ridge, floor), (-5, 5), ha="right", va="bottom")
    _say(ax, f"compute-bound, from {ridge:.3g} FLOP/byte", (ridge, floor), (5, 5), ha="left", va="bottom")


def _mark(ax: Axes, points: Sequence[Point]) -> None:
    """The points, and their labels where these lie least on one another, on points and on roofs."""
    renderer = ax.figure.canvas.get_renderer()
    corners = [ax.transData.transform(np.transpose(line.get_data())) for line in ax.lines]
    pixels = [np.linspace(a, b, 60) for path in corners for a, b in itertools.pairwise(path)]
    for i, point in enumerate(points):
        turn, colour = divmod(i, len(COLOURS))
        look = {"color": COLOURS[colour], "marker": _MARKERS[turn % len(_MARKERS)], "linestyle": "none"}
        ax.plot(*point[1:], **look, markersize=8, markeredgecolor=_INK, markeredgewidth=0.6, zorder=4)
        pixels.append(np.repeat(ax.transData.transform([point[1:]]), 5, axis=0))
    avoided = np.concatenate(pixels)
    taken = [text.get_window_extent(renderer) for text in ax.texts]

    def cost(box: Bbox) -> float:
        """In square pixels: lying on other texts, leaving the axes, and a good deal for each bit of roof or point."""
        shared = [part for other in taken if (part := Bbox.intersection(box, other)) is not None]
        inside = Bbox.intersection(box, ax.bbox) or Bbox.null()
        outside = box.width * box.height - max(0.0, inside.width * inside.height)
        hits = ((avoided > box.min) & (avoided < box.max)).all(axis=1).sum()
        return sum(part.width * part.height for part in shared) + 5 * outside + 40 * hits

    for point in sorted(points, key=lambda p: -p.flops_per_second):
        choices = []
        for distance, (ha, dx), (va, dy) in itertools.product((8, 20, 36), _ACROSS, _ALONG):
            if dx or dy:
                leader = {"arrowstyle": "-", "color": _GREY, "linewidth": 0.7} if distance > 8 else None
                how = {"offset": (dx * distance, dy * distance), "ha": ha, "va": va}
                trial = _say(ax, point.label, point[1:], **how)
                trial.update_positions(renderer)
                box = Text.get_window_extent(trial, renderer).padded(2)  # without its leader
                choices.append((cost(box) + distance, len(choices), box, {**how, "arrowprops": leader}))
                trial.remove()
        _, _, box, how = min(choices)
        _say(ax, point.label, point[1:], **how)
        taken.append(box)
