"""What the machine did while something was timed: other programs' CPU load, GPU clocks and throttling, the GC.

The foreign load is (busy + steal time of our cores - own CPU time) / wall time; harnesses usually report the load
average, which lags by a minute. It only reads: clocks and priorities of a shared machine are left as they are.
"""

import functools
import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

IDLE = {"idle", "iowait", "guest", "guest_nice"}  # guest time is counted in user time already

# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a kernel down (NVML API reference, nvmlClocksEventReasons)
SLOWED_BY = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal limit",
    0x40: "hardware thermal limit",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Snapshot:
    """Clocks at one moment: wall and this process's CPU seconds, busy seconds of the cores we may use, GPU state."""

    wall_s: float
    own_s: float
    busy_s: float
    sm_mhz: int | None = None
    slowed_by: tuple[str, ...] = ()


def snapshot(device: torch.device) -> Snapshot:
    """Read the machine's counters now; the GPU's clock and throttle reasons where pynvml is installed."""
    sm_mhz, slowed_by = _gpu(device.index or 0) if device.type == "cuda" else (None, ())
    return Snapshot(time.perf_counter(), time.process_time(), _busy_seconds(), sm_mhz, slowed_by)


def foreign_cores(before: Snapshot, after: Snapshot) -> float | None:
    """Cores' worth of work that others did on our cores; None over less than 0.2 s, where 10 ms ticks say nothing."""
    wall = after.wall_s - before.wall_s
    if wall < 0.2:
        return None
    return max(0.0, (after.busy_s - before.busy_s - (after.own_s - before.own_s)) / wall)


def throttling(snapshots: Sequence[Snapshot]) -> str | None:
    """One sentence on what slowed the GPU down or how far its clock moved over the snapshots; None if nothing did."""
    reasons = sorted({reason for moment in snapshots for reason in moment.slowed_by})
    clocks = [moment.sm_mhz for moment in snapshots if moment.sm_mhz]
    moved = bool(clocks) and min(clocks) < 0.95 * max(clocks)
    if not reasons and not moved:
        return None
    span = f"SM clock {min(clocks)}-{max(clocks)} MHz" if clocks else "SM clock unknown"
    return f"the GPU was throttled ({', '.join(reasons)}; {span})" if reasons else f"the GPU's clock moved ({span})"


@contextmanager
def garbage_collector_off() -> Iterator[None]:
    """Collect now, then keep the collector from running inside a timed call; its former state comes back."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _busy_seconds() -> float:
    cores = psutil.cpu_times(percpu=True)
    if hasattr(os, "sched_getaffinity"):
        ours = os.sched_getaffinity(0)
        if max(ours) < len(cores):  # some containers number the cores anew
            cores = [cores[index] for index in ours]
    return sum(seconds for core in cores for state, seconds in core._asdict().items() if state not in IDLE)


@functools.cache
def _nvml():
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml
    except Exception:  # not installed, no driver, or no permission: then the GPU's clocks are simply not known
        return None


def _gpu(index: int) -> tuple[int | None, tuple[str, ...]]:
    nvml = _nvml()
    if nvml is None:
        return None, ()
    try:
        # by UUID, for CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode())
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
    except nvml.NVMLError:
        return None, ()
    return clock, tuple(name for bit, name in SLOWED_BY.items() if bits & bit)
