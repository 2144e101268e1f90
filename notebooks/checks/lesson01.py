"""Checks of lesson 01: the work of a convolution, the time bound, the decode bound, the choice of hardware.

Each compares with an independent computation (an operator counter, the definition turned round, a search through all
batches) on awkward inputs.
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


# name, peak, bandwidth, memory, watts
OFFERS = tuple(
    dict(zip(("name", "peak", "bandwidth", "memory", "watts"), row, strict=True))
    for row in (
        ("frugal", 4e13, 1e11, 32e9, 60.0),
        ("large", 1e15, 8e11, 256e9, 500.0),
        ("fast", 1e15, 4e12, 40e9, 700.0),
        ("weak", 2e11, 2e12, 64e9, 30.0),
    )
)
# weight bytes, bytes of a cache, parameters, users, seconds of a step at most
WISHES = (
    (14e9, 1e9, 7e9, 1, 0.25),
    (14e9, 1e9, 7e9, 12, 0.25),
    (14e9, 1e9, 7e9, 100, 0.25),
    (14e9, 1e9, 7e9, 100, 0.05),
    (14e9, 0.7e9, 7e9, 33, 0.01),
    (3.5e9, 1e6, 7e9, 40_000, 0.05),
    (2.0**30, 2.0**27, 1e6, 29, 2.0),
    (2.0**30, 2.0**27, 1e6, 24, 2.0),  # three devices, all full
    (2.0**30, 1.2 * 2.0**27, 1e6, 13, 2.0),  # 6.67 would be the batch of a device
    (2.0**30, 2.0**30, 1e6, 3, 2.0),  # one sequence each
    (14e9, 1e9, 7e9, 1, 0.001),
    (300e9, 1e9, 7e9, 8, 1.0),
)


def hardware(fn: Callable, failures: Failures) -> None:
    """fleet(devices, weight_bytes, kv_bytes, parameters, users, step_limit) -> (name, number) or None."""
    exact = {"name": "exact", "peak": 1e15, "bandwidth": 2.0**30, "memory": 2.0**31, "watts": 10.0}
    for wish in WISHES:
        devices = [exact] if wish[0] == 2.0**30 else OFFERS  # where the caches fit it to the last byte
        users = wish[3]
        batches = {d["name"]: _largest_batch(d, *wish) for d in devices}
        numbers = {name: -(-users // batch) for name, batch in batches.items() if batch}  # of devices, rounded up
        watts_each = {device["name"]: device["watts"] for device in devices}
        watts = {name: watts_each[name] * number for name, number in numbers.items()}
        names = ("weight_bytes", "kv_bytes", "parameters", "users", "step_limit")
        with failures.given(**dict(zip(names, wish, strict=True))):
            answer = failures.call(fn, [dict(d) for d in devices], *wish, changed="leave the list of devices as it is")
            if not watts:
                failures.expect(answer is None, "no device can serve a single sequence here; return None")
                continue
            failures.need(answer is not None, "there is a device that can do it; yours returned None")
            name, number = _pair(answer, failures)
            failures.need(name in batches, "the first value is the name of one of the devices")
            failures.need(batches[name], "the device that you chose cannot serve even one sequence within the limits")
            failures.need(
                number == numbers[name],
                "the number of devices; round the batch of one down, the number of devices up, and look at all "
                "three limits of the batch",
                detail=f"expected {numbers[name]} of {name!r}, got {number}",
            )
            best = min(watts, key=watts.get)
            failures.expect(
                watts[name] <= watts[best],
                "another kind does it with fewer watts in all",
                detail=f"expected {best!r}, {watts[best]:.0f} W, got {name!r}, {watts[name]:.0f} W",
            )


def _largest_batch(device: dict, weight_bytes: float, kv_bytes: float, parameters: float, _: int, limit: float) -> int:
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


CHECKS = {"01.1": convolution, "01.2": bound, "01.3": decode, "01.4": hardware}

TRIES = {
    "01.1": f"{len(CONVOLUTIONS)} convolutions, among them grouped ones and images that are not square",
    "01.2": f"{len(BOUNDS)} computations on either side of the ridge, and one exactly at it",
    "01.3": "batches from 1 to a million, with a cache and without",
    "01.4": f"{len(WISHES)} wishes to a market of up to {len(OFFERS)} devices, among them some that nobody can meet",
}
