"""Checks of lesson 01: the work of a convolution, the time bound, the users of a device.

Each compares with an independent computation (an operator counter, the definition turned round, a search through all
batches) on awkward inputs.
"""

import itertools
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


# peak, bandwidth, memory
DEVICES = (
    {"peak": 4e13, "bandwidth": 1e11, "memory": 32e9},
    {"peak": 1e15, "bandwidth": 8e11, "memory": 256e9},
    {"peak": 1e15, "bandwidth": 4e12, "memory": 40e9},
    {"peak": 2e11, "bandwidth": 2e12, "memory": 64e9},
)
EXACT = ({"peak": 1e15, "bandwidth": 2.0**30, "memory": 2.0**31},)  # full to the last byte
# weight bytes, bytes of a cache, parameters, seconds of a step at most
WISHES = (
    (14e9, 1.1e9, 7e9, 0.255),
    (14e9, 1.1e9, 7e9, 0.0513),
    (14e9, 0.7e9, 7e9, 0.0097),
    (3.5e9, 1.3e6, 7e9, 0.0513),
    (14e9, 1.1e9, 7e9, 0.001),
    (300e9, 1.1e9, 7e9, 1.03),
)
EXACT_WISHES = (
    (2.0**30, 2.0**27, 1e6, 2.3),
    (2.0**30, 2.0**30, 1e6, 2.3),  # a single sequence
    (2.0**30, 2.0**26, 2.0**20, 2.3),
)


def users(fn: Callable, failures: Failures) -> None:
    """largest_batch(device, weight_bytes, kv_bytes, parameters, step_limit) -> sequences."""
    cases = [*itertools.product(DEVICES, WISHES), *itertools.product(EXACT, EXACT_WISHES)]
    for device, wish in cases:
        want = _largest_batch(device, *wish)
        names = ("weight_bytes", "kv_bytes", "parameters", "step_limit")
        with failures.given(device=device, **dict(zip(names, wish, strict=True))):
            batch = failures.call(fn, dict(device), *wish, changed="leave the device as it is")
            failures.need(batch is not None, "return a number; it is 0 where not even one sequence is possible")
            failures.expect(
                batch == want,
                "the largest batch; look at all three limits, round down, and never below 0",
                detail=f"expected {want}, got {batch}",
            )


def _largest_batch(device: dict, weight_bytes: float, kv_bytes: float, parameters: float, limit: float) -> int:
    """By trying one batch after the other."""
    batch = 0
    while True:
        moved = weight_bytes + (batch + 1) * kv_bytes
        step_s = max(moved / device["bandwidth"], 2 * parameters * (batch + 1) / device["peak"])
        if moved > device["memory"] or step_s > limit:
            return batch
        batch += 1


def _pair(answer: object, failures: Failures) -> tuple:
    failures.need(has_parts(answer, 2), "return two values, in the order of the card")
    return tuple(answer)


CHECKS = {"01.1": convolution, "01.2": bound, "01.3": users}

TRIES = {
    "01.1": f"{len(CONVOLUTIONS)} convolutions, among them grouped ones and images that are not square",
    "01.2": f"{len(BOUNDS)} computations on either side of the ridge, and one exactly at it",
    "01.3": "six models and limits on each of four devices, and three that fill a device to the last byte",
}
