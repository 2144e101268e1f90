"""Checks of lesson 01: the work of a convolution, the time bound, and the decode bound.

Each compares with an independent computation (an operator counter, the definition turned round) on awkward inputs.
"""

from collections.abc import Callable
from numbers import Real

import torch
from torch import nn

from labkit import roofline
from labkit.lesson.failures import Failures, has_parts

# batch, c_in, c_out, height, width, kernel, groups, bytes a value
CONVOLUTIONS = (
    (1, 1, 1, 1, 1, 1, 1, 4),
    (2, 3, 8, 7, 5, 3, 1, 4),
    (1, 8, 12, 9, 9, 3, 4, 2),
    (3, 16, 16, 6, 10, 5, 16, 2),
    (4, 32, 64, 14, 14, 1, 1, 4),
)
DTYPES = {2: torch.float16, 4: torch.float32}
# flops, bytes, peak, bandwidth
BOUNDS = (
    (1e9, 1e6, 1e12, 1e11),
    (1e9, 1e9, 1e12, 1e11),
    (0.0, 5e8, 2e12, 1e9),
    (8e12, 4.004e9, 2e12, 1e9),  # a thousandth left of the ridge
    (3e4, 1e5, 1e12, 3e12),  # 33 nanoseconds
)


def convolution(fn: Callable, failures: Failures) -> None:
    """conv_work(batch, c_in, c_out, h, w, kernel, groups, s) -> (FLOPs, bytes)."""
    for batch, c_in, c_out, h, w, kernel, groups, s in CONVOLUTIONS:
        layer = nn.Conv2d(
            c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=False, device="meta", dtype=DTYPES[s]
        )
        want = roofline.count(layer, torch.empty(batch, c_in, h, w, device="meta", dtype=DTYPES[s]))
        with failures.given(batch=batch, c_in=c_in, c_out=c_out, h=h, w=w, kernel=kernel, groups=groups, s=s):
            flops, moved = _pair(fn(batch, c_in, c_out, h, w, kernel, groups, s), failures)
            failures.close(
                flops, want.flops, "the FLOPs differ from an operator counter's; look at 2, at groups, at kernel"
            )
            failures.close(
                moved, want.bytes, "the bytes differ; count input, weight and output once each, s bytes a value"
            )


def bound(fn: Callable, failures: Failures) -> None:
    """time_bound(flops, moved, peak, bandwidth) -> (seconds, "memory" | "compute")."""
    for flops, moved, peak, bandwidth in BOUNDS:
        with failures.given(flops=flops, moved=moved, peak=peak, bandwidth=bandwidth):
            seconds, limiter = _pair(fn(flops, moved, peak, bandwidth), failures)
            added = flops and seconds == flops / peak + moved / bandwidth
            failures.need(not added, "you added the two times; the arithmetic and the transfer run side by side")
            least = max(flops / peak, moved / bandwidth)
            early = isinstance(seconds, Real) and seconds < least
            sooner, later = "the slower of the two is not done yet at this time", "both are done before this time"
            failures.close(seconds, least, sooner if early else f"{later}; look at what you divide by what")
            intensity_side = "memory" if flops / moved < peak / bandwidth else "compute"
            failures.expect(
                limiter == intensity_side,
                "the name of the limiter: compare the intensity with the ridge",
                detail=f"expected {intensity_side!r}, got {limiter!r}",
            )
    with failures.given(flops=8e12, moved=4e9, peak=2e12, bandwidth=1e9):  # exactly at the ridge
        seconds, limiter = _pair(fn(8e12, 4e9, 2e12, 1e9), failures)
        failures.expect(limiter == "compute", 'at the ridge itself the exercise asks for "compute"')
        failures.close(seconds, 4.0, "at the ridge both resources take the same time, and they work side by side")


def decode(fn: Callable, failures: Failures) -> None:
    """decode_limit(weight_bytes, kv_bytes, parameters, batch, peak, bandwidth) -> tokens/s."""
    peak, bandwidth = 1e15, 2e12
    for weight_bytes, kv_bytes, parameters, batch in (
        (14e9, 0.0, 7e9, 1), (14e9, 1e9, 7e9, 1), (7e9, 5e8, 7e9, 32), (14e9, 0.0, 7e9, 4096), (14e9, 1e7, 7e9, 4096),
    ):  # fmt: skip
        with failures.given(weight_bytes=weight_bytes, kv_bytes=kv_bytes, parameters=parameters, batch=batch):
            step_s = max((weight_bytes + batch * kv_bytes) / bandwidth, 2 * parameters * batch / peak)
            failures.close(
                fn(weight_bytes, kv_bytes, parameters, batch, peak, bandwidth),
                batch / step_s,
                "the tokens a second; each step reads the weights once and every cache once",
            )
    with failures.given(batch="1 against 8, no cache"):
        alone, eight = (fn(14e9, 0.0, 7e9, batch, peak, bandwidth) for batch in (1, 8))
        failures.close(
            eight, 8 * alone, "without a cache and below the ridge, eight sequences share one reading of the weights"
        )
    with failures.given(batch="very large, no cache"):
        failures.close(
            fn(1.0, 0.0, 7e9, 10**6, peak, bandwidth),
            peak / 14e9,
            "far right of the ridge the arithmetic sets the limit",
        )


def _pair(answer: object, failures: Failures) -> tuple:
    failures.need(has_parts(answer, 2), "return two values, in the order of the card")
    return tuple(answer)


CHECKS = {"01.1": convolution, "01.2": bound, "01.3": decode}

TRIES = {
    "01.1": f"{len(CONVOLUTIONS)} convolutions, among them grouped ones and images that are not square",
    "01.2": f"{len(BOUNDS)} computations on either side of the ridge, and one exactly at it",
    "01.3": "batches from 1 to a million, with a cache and without",
}
