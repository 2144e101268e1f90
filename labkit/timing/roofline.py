"""The roofline: what a call has to do against what a machine can do, as bounds on time and as a picture.

Williams, Waterman, Patterson 2009. `count` (from `labkit.counting`) gives the work, `labkit.machine.ceilings` the
machine. A bound says what no kernel can beat, not what one reaches: launches, caches and instructions are not in it.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from labkit.arguments import check_module, check_tensor
from labkit.errors import InputError, check_number
from labkit.show import COLOURS, WIDTH, interval, quantity
from labkit.timing import machine
from labkit.timing.bench import Measurement
from labkit.timing.counting import Work, count
from labkit.timing.machine import Ceilings, Device

__all__ = ["Bound", "Work", "bound", "cache_bytes", "count", "decode_step", "describe", "placed", "plot"]


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
        check_number(measured_seconds, "measured_seconds", above=0)
        return self.seconds / measured_seconds

    def __str__(self) -> str:
        return (
            f"at least {quantity(self.seconds, 's')}, {self.limiter}-bound "
            f"({self.intensity:.3g} FLOP/byte, ridge at {self.ridge:.3g})"
        )


def bound(work: Work, ceilings: Ceilings | Device, dtype: str = "fp32") -> Bound:
    """time >= max(FLOPs / peak, bytes / bandwidth), with the peak of `dtype`.

    work: from `count`. ceilings: measured ones, or a row of labkit.machine.DEVICES.
    Raises InputError for a dtype without ceiling, and for work that neither computes nor moves anything.
    """
    _check_ceilings(ceilings)
    peak = machine.peak(ceilings, dtype)
    if not isinstance(work, Work):
        raise InputError("bound needs a Work: get it from labkit.roofline.count(model, inputs).")
    if not work.flops + work.bytes:
        raise InputError("work without FLOPs and bytes has no bound: count a call that computes something.")
    computing, moving = work.flops / peak, work.bytes / ceilings.bandwidth
    limiter = "compute" if computing > moving else "memory"
    return Bound(max(computing, moving), limiter, work.intensity, peak / ceilings.bandwidth)


def _check_ceilings(ceilings: object) -> None:
    if not isinstance(ceilings, Ceilings | Device):
        raise InputError(
            f"ceilings is a {type(ceilings).__name__}: give labkit.machine.ceilings() or a row of "
            "labkit.machine.DEVICES."
        )


def placed(measurement: Measurement, work: Work, ceilings: Ceilings | Device, dtype: str = "fp32") -> Measurement:
    """The measurement with its share of the roof, `Bound.share` of its median time, and what limits it.

    work, ceilings, dtype: as for `bound`, which also says what is refused. The bound takes all bytes from main memory,
    so that a share above 1 is no discovery: the data were in a cache (measure with cache="cold"), or more was counted
    than has to be done. A type that has no ceiling on this machine gives a warning, and no share.
    """
    _check_ceilings(ceilings)
    if dtype in machine.PRODUCTS and dtype not in ceilings.flops:
        warning = f"no share of the roof, for {dtype} has no ceiling here"
        return replace(measurement, warnings=(*measurement.warnings, warning))
    least = bound(work, ceilings, dtype)
    share, warnings = least.share(measurement.median_s), measurement.warnings
    if share > 1:
        spoiled = "".join(f", or {warning}" for warning in getattr(ceilings, "warnings", ()) if "busy" in warning)
        warnings = (*warnings, f"above the roof: its data stay in a cache, or the count is too high{spoiled}")
    return replace(measurement, roof_share=share, limited_by=least.limiter, warnings=warnings)


# --- one token on top of a cache --------------------------------------------------------------------------------------


def decode_step(model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
    """Fill a KV cache with `prompt`; the returned function writes one more token for each sequence.

    It returns the logits [batch, 1, vocabulary] and cuts the cache back to the prompt, so that every call does the same
    work. model: a decoder of transformers. prompt: token ids, [batch, tokens].
    Raises InputError for a prompt of another shape or a model without a cache.
    """
    argument, cache = filled_cache(model, prompt)
    last = prompt[:, -1:]

    def step() -> Tensor:
        logits = model(last, use_cache=True, **{argument: cache}).logits
        cache.crop(-1)
        return logits

    return step


def cache_bytes(model: nn.Module, prompt: Tensor) -> int:
    """Bytes of the KV cache that `prompt` [batch, tokens] fills, counted on its tensors. Raises as decode_step does."""
    _, cache = filled_cache(model, prompt)
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def filled_cache(model: nn.Module, prompt: Tensor) -> tuple[str, Any]:
    """`cache_argument`, and a cache with the prompt [batch, tokens] in it. Raises as decode_step does."""
    check_module(model)
    check_tensor(prompt, "The prompt")
    if prompt.ndim != 2 or prompt.numel() == 0 or prompt.is_floating_point():
        raise InputError(
            f"The prompt has shape {tuple(prompt.shape)}; give token ids as [batch, tokens], at least one."
        )
    argument = cache_argument(model)
    with torch.inference_mode():
        output = model(prompt, use_cache=True)
    cache = getattr(output, "cache", None)
    return argument, output.past_key_values if cache is None else cache


def cache_argument(model: nn.Module) -> str:
    """The name of the model's argument for a cache, which changed within transformers 5; InputError without one."""
    accepted = inspect.signature(model.forward).parameters
    argument = next((name for name in ("cache", "past_key_values") if name in accepted), None)
    if argument is None:
        raise InputError(f"{type(model).__name__} takes no KV cache; decode_step needs a decoder of transformers.")
    return argument


# --- the picture ------------------------------------------------------------------------------------------------------


def _checked(points: Sequence[Sequence[Any]]) -> list[tuple[str, float, float]]:
    rows = []
    for row in points:
        if not isinstance(row, tuple | list) or len(row) != 3:
            raise InputError(f"a point is (label, FLOP/byte, FLOP/s), got {row!r}: give all three.")
        label, intensity, speed = row
        if not all(_is_positive(value) for value in (intensity, speed)):
            raise InputError(
                f"point {label!r} has no place on logarithmic axes: FLOP/byte and FLOP/s have to be above 0."
            )
        rows.append((str(label), float(intensity), float(speed)))
    return rows


def _is_positive(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value) and value > 0


def describe(points: Sequence[Sequence[Any]], ceilings: Ceilings, *, dtype: str = "fp32") -> str:
    """The roofline in words, for those who cannot see it: ceilings, ridge, and each point's share of its roof.

    points, dtype: as in `plot`.
    """
    peak = machine.peak(ceilings, dtype)
    ridge = peak / ceilings.bandwidth
    sentences = [
        f"Roofline of {ceilings.device}, measured: {quantity(ceilings.bandwidth, 'B/s')}, {dtype} peak "
        f"{quantity(peak, 'FLOP/s')}, ridge at {ridge:.3g} FLOP/byte."
    ]
    if ranges := _ranges(ceilings, dtype):
        sentences.append(
            f"From most repetitions to the best: {interval(ranges[0], 'B/s')} and {interval(ranges[1], 'FLOP/s')}."
        )
    sentences += [f"While it was measured, {warning}." for warning in ceilings.warnings]
    for label, intensity, speed in _checked(points):
        side = "memory" if intensity < ridge else "compute"
        share = speed / min(peak, ceilings.bandwidth * intensity)
        verdict = "" if share <= 1 else ": above it, so its data stay in a cache, or the count or a ceiling is wrong"
        sentences.append(
            f"{label}: {intensity:.3g} FLOP/byte, {quantity(speed, 'FLOP/s')}, "
            f"{100 * share:.3g} % of the {side} roof{verdict}."
        )
    return " ".join(sentences)


def _ranges(ceilings: Ceilings, dtype: str) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """The ranges of bandwidth and peak; None unless both are there and finite."""
    ranges = ceilings.bandwidth_range, ceilings.flops_range.get(dtype)
    return ranges if all(ends and all(map(math.isfinite, ends)) for ends in ranges) else None


MARKERS = "os^DvPX*"  # one more than there are colours, so that no two of 56 points look alike


def plot(
    points: Sequence[Sequence[Any]], ceilings: Ceilings, *, dtype: str = "fp32", title: str | None = None
) -> Figure:
    """Log-log roofline of `ceilings` with its measured points, named in the legend in order of their speed.

    points: (label, FLOP/byte, FLOP/s) each. dtype: whose peak is drawn. title: None names the device.
    Where the ceilings have a range, a band about the roof shows them.
    A figure by itself: nothing is shown, and pyplot's state is not touched. `describe` says the same in words.
    """
    rows, peak = _checked(points), machine.peak(ceilings, dtype)
    ridge = peak / ceilings.bandwidth
    scale, unit = (1e12, "TFLOP/s") if peak >= 1e13 else (1e9, "GFLOP/s")
    intensities, speeds = [x for _, x, _ in rows], [y for _, _, y in rows]
    xlim = min([ridge / 30, *(x / 3 for x in intensities)]), max([ridge * 30, *(x * 3 for x in intensities)])
    floor = min([ceilings.bandwidth * xlim[0], *(y / 2 for y in speeds)]) / scale

    fig = Figure(figsize=(WIDTH, 4.2 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(fig)
    ax = fig.add_subplot(xscale="log", yscale="log", xlim=xlim, ylim=(floor, 2 * max([peak, *speeds]) / scale))
    ax.set_xlabel("arithmetic intensity (FLOP/byte)")
    ax.set_ylabel(f"performance ({unit})")
    ax.set_title(title or f"Roofline of {ceilings.device}, {dtype}", loc="left")
    ax.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)

    name = f"measured: {quantity(ceilings.bandwidth, 'B/s')}, {dtype} {quantity(peak, 'FLOP/s')}"
    xs, ys = [xlim[0], ridge, xlim[1]], [ceilings.bandwidth * xlim[0] / scale, peak / scale, peak / scale]
    ax.plot(xs, ys, color="#222222", linewidth=2, label=name)
    ax.fill_between(xs, ys, floor, color="#EEF3F7", zorder=0)  # what can be reached
    if ranges := _ranges(ceilings, dtype):
        at = np.geomspace(*xlim, 200)
        low, high = (np.minimum(rate * at, peak) / scale for rate, peak in zip(*ranges, strict=True))
        ax.fill_between(at, low, high, color="#222222", alpha=0.2, linewidth=0, label="range in this run")
    ax.vlines(ridge, floor, peak / scale, color="#666666", linestyle=":", linewidth=1, zorder=1)
    foot = {"textcoords": "offset points", "va": "bottom"}
    ax.annotate("memory-bound", (ridge, floor), (-5, 5), ha="right", **foot)
    ax.annotate(f"compute-bound from {ridge:.3g}", (ridge, floor), (5, 5), ha="left", **foot)
    for i, (label, intensity, speed) in enumerate(sorted(rows, key=lambda row: -row[2])):
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        ax.plot(intensity, speed / scale, **look, ls="none", ms=8, mec="#222222", mew=0.6, zorder=4, label=label)
    fig.legend(loc="outside lower left", frameon=False)
    return fig
