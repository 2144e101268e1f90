"""The roofline: the work of a call against the roofs of a machine, as a bound on time and as a picture.

Williams, Waterman and Patterson 2009. `count` gives the work of a call, `labkit.machine.ceilings` the roofs. A bound is
a time that no kernel can beat; launches, caches and instructions are not part of the bound.

>>> import torch
>>> from labkit import machine, roofline
>>> linear, x = torch.nn.Linear(1024, 1024, bias=False), torch.ones(1, 1024)
>>> work = roofline.count(linear, x)
>>> print(work)
0.002097 GFLOP, 4.202 MB, 0.499 FLOP/byte
>>> print(roofline.bound(work, machine.DEVICES["H100 SXM"]))
at least 1.25 µs, memory-bound (0.499 FLOP/byte, ridge at 20)
"""

from dataclasses import dataclass, replace

from labkit.errors import InputError, check_number
from labkit.on_demand import names_on_demand
from labkit.show import quantity
from labkit.timing.results import Measurement
from labkit.timing.roofs import PRODUCTS, Ceilings, Device, peak
from labkit.timing.work import Work

# Every lesson loads this file for its bounds; counting, decoding and plotting are loaded on first use.
__getattr__ = names_on_demand(
    __name__,
    {
        "count": "labkit.timing.counting",
        "decode_step": "labkit.modules.kv_cache",
        "plot": "labkit.timing.roofline_plot",
    },
)


@dataclass(frozen=True)
class Bound:
    """Least time of a call on a machine.

    seconds: no execution takes less.
    limiter: "memory" or "compute", the roof that sets the time.
    intensity: arithmetic intensity of the call, in FLOP/byte.
    ridge: intensity at which the two roofs of the machine meet, in FLOP/byte.
    """

    seconds: float
    limiter: str
    intensity: float
    ridge: float

    def share(self, measured_seconds: float) -> float:
        """Return the part of the roof that a measured time has reached, 1 at best.

        A share above 1 means that the data stayed in a cache faster than the memory (time the call with more data than
        the last cache holds), or that the count, a ceiling or the clock is wrong.
        """
        check_number(measured_seconds, "measured_seconds", above=0)
        return self.seconds / measured_seconds

    def __str__(self) -> str:
        return (
            f"at least {quantity(self.seconds, 's')}, {self.limiter}-bound "
            f"({self.intensity:.3g} FLOP/byte, ridge at {self.ridge:.3g})"
        )


def bound(work: Work, ceilings: Ceilings | Device, dtype: str = "fp32") -> Bound:
    """Bound the time of a call from below: time >= max(FLOPs / peak, bytes / bandwidth).

    work: work of the call, from `count`.
    ceilings: measured ceilings, or a row of labkit.machine.DEVICES.
    dtype: type of the products, whose peak counts.
    Raises InputError for a type without ceiling, and for work without FLOPs and bytes.
    """
    _check_ceilings(ceilings)
    compute_roof = peak(ceilings, dtype)
    if not isinstance(work, Work):
        raise InputError("bound needs a Work: get it from labkit.roofline.count(model, inputs).")
    if not work.flops + work.bytes:
        raise InputError("work without FLOPs and bytes has no bound: count a call that computes something.")
    computing_s = work.flops / compute_roof
    moving_s = work.bytes / ceilings.bandwidth
    return Bound(
        seconds=max(computing_s, moving_s),
        limiter="compute" if computing_s > moving_s else "memory",
        intensity=work.intensity,
        ridge=compute_roof / ceilings.bandwidth,
    )


def placed(measurement: Measurement, work: Work, ceilings: Ceilings | Device, dtype: str = "fp32") -> Measurement:
    """Return a measurement with its share of the roof (`Bound.share` of the median time), and the limiting roof.

    The bound takes all bytes from main memory. A share above 1 is therefore no discovery: the data were in a cache
    (measure with cache="cold"), or the count is too high. A warning says so. A type without ceiling on the machine
    gives a warning and no share.

    work, ceilings, dtype, errors: as in `bound`.
    """
    _check_ceilings(ceilings)
    if dtype in PRODUCTS and dtype not in ceilings.flops:
        warning = f"no share of the roof, for {dtype} has no ceiling here"
        return replace(measurement, warnings=(*measurement.warnings, warning))
    least = bound(work, ceilings, dtype)
    share = least.share(measurement.median_s)
    warnings = measurement.warnings
    if share > 1:
        warnings = (*warnings, _above_the_roof(ceilings))
    return replace(measurement, roof_share=share, limited_by=least.limiter, warnings=warnings)


def _above_the_roof(ceilings: Ceilings | Device) -> str:
    message = "above the roof: its data stay in a cache, or the count is too high"
    for warning in getattr(ceilings, "warnings", ()):  # rows of the catalogue have no warnings
        if "busy" in warning:
            message += f", or {warning}"
    return message


def _check_ceilings(ceilings: object) -> None:
    if not isinstance(ceilings, Ceilings | Device):
        raise InputError(
            f"ceilings is a {type(ceilings).__name__}: give labkit.machine.ceilings() or a row of "
            "labkit.machine.DEVICES."
        )
