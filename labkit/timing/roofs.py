"""Roofs of a machine: peak rates of accelerators from a catalogue, and the ceilings measured on a machine.

The catalogue is `devices.toml`. Measuring is done in `ceilings.py`; `roofline.py` turns a roof into a bound on time.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from labkit.errors import InputError

MiB = 2**20
TYPES = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4")  # the columns of peaks in devices.toml
UNKNOWN_RANGE = (-math.inf, math.inf)

# Types whose ceiling is measured: CUDA compute capability that runs a product at the rate of the type, and whether a
# CPU is tried.
PRODUCTS = {
    "fp32": ((5, 0), True),
    "tf32": ((8, 0), False),
    "bf16": ((8, 0), True),
    "fp16": ((7, 0), True),
    "int8": ((7, 5), True),
    "fp8": ((8, 9), False),
}


@dataclass(frozen=True)
class Device:
    """Describe an accelerator as a vendor sells it: a whole chip, or a module.

    flops: dense peak by type (fp32, tf32, bf16, fp16, fp8, int8, fp4), in FLOP/s (OP/s for int8).
    sparse: peak with 2:4 sparsity by type, in FLOP/s.
    bandwidth: bandwidth of the memory, in B/s, decimal.
    memory: capacity in bytes, a vendor's GB being 1e9 bytes.
    l2: size of the L2 cache in bytes; None if the vendor does not state a size.
    tdp: power in W; None if the vendor does not state a figure.
    year: year of the announcement.
    evidence: the source of knowledge about the peaks, explained at the top of devices.toml.
    known_otherwise: evidence of single figures, by the name of the figure.
    source: the vendor's document.
    """

    name: str
    year: int
    flops: Mapping[str, float]
    sparse: Mapping[str, float]
    bandwidth: float
    memory: float
    l2: float | None
    tdp: float | None
    evidence: str
    known_otherwise: Mapping[str, str]
    source: str


def _read_catalogue() -> dict[str, Device]:
    text = Path(__file__).with_name("devices.toml").read_text("utf-8")
    rows = tomllib.loads(text)["devices"]
    return {name: _device(name, row) for name, row in rows.items()}


def _device(name: str, row: Sequence) -> Device:
    """Build a device from its row of devices.toml, in the column order of that file; 0 means "not stated"."""
    year, memory_gb, bandwidth_gb_s, l2_mib, tdp_w, *peaks, doubled_types, evidence, known_otherwise, source = row
    dense = {}
    for dtype, tera_flops in zip(TYPES, peaks, strict=True):
        if tera_flops:
            dense[dtype] = 1e12 * tera_flops
    if doubled_types == "all":
        doubled = dense.keys() - {"fp32"}
    else:
        doubled = set(doubled_types.split())
    return Device(
        name=name,
        year=year,
        flops=dense,
        sparse={dtype: 2 * rate for dtype, rate in dense.items() if dtype in doubled},
        bandwidth=1e9 * bandwidth_gb_s,
        memory=1e9 * memory_gb,
        l2=l2_mib * MiB or None,
        tdp=tdp_w or None,
        evidence=evidence,
        known_otherwise=known_otherwise,
        source=source,
    )


DEVICES: dict[str, Device] = _read_catalogue()


@dataclass(frozen=True)
class Ceilings:
    """Measured roofs of a machine.

    device: name of the machine.
    flops: compute roof by type, in FLOP/s (OP/s for int8).
    bandwidth: memory roof in B/s.
    streams: highest rate of each stream (read, copy, triad), in B/s; empty for ceilings read from a record.
    warnings: a phrase for each disturbance of the measurement; empty for an undisturbed run.
    flops_range, bandwidth_range: (low, high), from the low end of the median's 95 % interval to the best repetition.
        The ranges hold for the process and the minute of the measurement; rates at another time may lie outside.
    """

    device: str
    flops: Mapping[str, float]
    bandwidth: float
    warnings: tuple[str, ...] = ()
    flops_range: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    bandwidth_range: tuple[float, float] | None = None
    streams: Mapping[str, float] = field(default_factory=dict)

    def ridge(self, dtype: str) -> float:
        """Return the arithmetic intensity, in FLOP/B, at which the compute roof of `dtype` meets the memory roof."""
        return peak(self, dtype) / self.bandwidth

    def raised(self, again: "Ceilings") -> "Ceilings":
        """Combine two measurements of a device: the higher value of every roof, with its range.

        A disturbance only lowers a roof, and may outlast a measurement; a rate reached once can be reached.

        again: ceilings of the same device, measured at another time.
        Returns new ceilings, with the warnings of both measurements. Raises InputError for two devices.
        """
        if again.device != self.device:
            raise InputError(f"these are roofs of {self.device}, those of {again.device}: raise roofs of one device.")
        flops = dict(self.flops)
        flops_range = dict(self.flops_range)
        for dtype, rate in again.flops.items():
            if rate > flops.get(dtype, 0.0):
                flops[dtype] = rate
                flops_range[dtype] = again.flops_range.get(dtype, UNKNOWN_RANGE)
        names = {**self.streams, **again.streams}
        streams = {name: max(self.streams.get(name, 0.0), again.streams.get(name, 0.0)) for name in names}
        faster_memory = max(self, again, key=lambda roofs: roofs.bandwidth)
        return Ceilings(
            device=self.device,
            flops=flops,
            bandwidth=faster_memory.bandwidth,
            warnings=tuple(dict.fromkeys((*self.warnings, *again.warnings))),  # without repetitions, in order
            flops_range=flops_range,
            bandwidth_range=faster_memory.bandwidth_range,
            streams=streams,
        )


def peak(roofs: Ceilings | Device, dtype: str) -> float:
    """Return the compute roof of `dtype` in FLOP/s; raise InputError for a type without a roof."""
    if dtype not in roofs.flops:
        name = roofs.device if isinstance(roofs, Ceilings) else roofs.name
        raise InputError(f"there is no {dtype!r} ceiling for {name}: choose one of {', '.join(sorted(roofs.flops))}.")
    return roofs.flops[dtype]
