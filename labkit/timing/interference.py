"""Interference with a measurement: load by other programs, throttling of a GPU, work unseen by a clock.

The load by other programs is (busy and steal time of the usable cores - own CPU time) / wall time. The load average of
the system lags by a minute. Reading the counters leaves frequencies and priorities of a shared machine unchanged.
"""

import functools
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import psutil
import torch

from labkit.timing.clocks import Clock, Sample

FOREIGN_CORES = 0.15  # load by other programs, in cores, from which a run counts as disturbed
SHORTEST_S = 0.2  # over less time the system's ticks of 10 ms tell nothing about the load
MOVED = 0.95  # a GPU clock below this share of its highest frequency has moved
UNSEEN = 0.5  # CUDA events that cover less than this share of the wall time have missed work
CPU_BOUND = (0.2, 1.1)  # CPU time over wall time of a call that computes in a single thread

IDLE = {"idle", "iowait", "guest", "guest_nice"}  # guest time is part of user time already

# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a kernel down (NVML API reference, nvmlClocksEventReasons)
SLOWED_BY = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal limit",
    0x40: "hardware thermal limit",
    0x80: "power brake",
}


# --- counters of the machine ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """Counters of a machine at a moment.

    wall_s: wall time in seconds.
    process_s: CPU seconds of the process.
    busy_s: busy seconds of all usable cores.
    sm_mhz: frequency of the GPU; None if unknown.
    slowed_by: reasons of the GPU for running slower, from SLOWED_BY.
    """

    wall_s: float
    process_s: float
    busy_s: float
    sm_mhz: int | None = None
    slowed_by: tuple[str, ...] = ()


def snapshot(device: torch.device) -> Snapshot:
    """Read the counters of the machine now; the counters of a GPU only if pynvml is installed."""
    busy_s = 0.0
    for core in _usable_cores():
        busy_s += sum(seconds for state, seconds in core._asdict().items() if state not in IDLE)
    gpu = _gpu_state(device) if device.type == "cuda" else _GpuState()
    return Snapshot(time.perf_counter(), time.process_time(), busy_s, gpu.sm_mhz, gpu.slowed_by)


def _usable_cores() -> list:
    """Return psutil's CPU times of the cores in the affinity of the process."""
    cores = psutil.cpu_times(percpu=True)
    if not hasattr(os, "sched_getaffinity"):
        return cores
    usable = os.sched_getaffinity(0)
    if max(usable) >= len(cores):  # some containers number the cores anew
        return cores
    return [cores[index] for index in usable]


class _GpuState(NamedTuple):
    sm_mhz: int | None = None
    slowed_by: tuple[str, ...] = ()


def _gpu_state(device: torch.device) -> _GpuState:
    nvml = _nvml()
    if nvml is None:
        return _GpuState()
    # by UUID, for CUDA_VISIBLE_DEVICES renumbers the devices of torch and not of NVML
    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        frequency = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
    except nvml.NVMLError:
        return _GpuState()
    return _GpuState(frequency, tuple(name for bit, name in SLOWED_BY.items() if bits & bit))


@functools.cache
def _nvml() -> ModuleType | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml
    except Exception:  # not installed, no driver, or no permission: the GPU's clocks are then unknown
        return None


# --- judgements -------------------------------------------------------------------------------------------------------


def foreign_cores(before: Snapshot, after: Snapshot) -> float | None:
    """Return the load by other programs on the usable cores, in cores; None if less than 0.2 s lie between."""
    wall_s = after.wall_s - before.wall_s
    if wall_s < SHORTEST_S:
        return None
    busy_s = after.busy_s - before.busy_s
    own_s = after.process_s - before.process_s
    return max(0.0, (busy_s - own_s) / wall_s)


def foreign_load(clock: Clock, snapshots: Sequence[Snapshot]) -> float | None:
    """Return `foreign_cores` from the first snapshot to the last; None for an injected clock: a simulation."""
    return None if clock.name == "injected" else foreign_cores(snapshots[0], snapshots[-1])


def cpu_time_is_better(
    clock: Clock, snapshots: Sequence[Snapshot], samples_by_side: Sequence[Sequence[Sample]]
) -> bool:
    """Return True if CPU time is a better clock than wall time for a measurement.

    CPU time is better if other programs compete for the cores and all calls compute in a single thread. With several
    threads, CPU time includes workers that spin. A call that mostly sleeps or waits has hardly any CPU time.

    snapshots: snapshots from before, during and after the measurement.
    samples_by_side: samples of each timed callable.
    """
    if clock.other != "cpu" or clock.device.type != "cpu" or torch.get_num_threads() != 1:
        return False
    load = foreign_load(clock, snapshots) or 0.0
    if load <= FOREIGN_CORES:
        return False
    is_fine_grained = time.get_clock_info("process_time").resolution <= 1e-5
    return is_fine_grained and all(_computes(side) for side in samples_by_side)


def _computes(samples: Sequence[Sample]) -> bool:
    """Return True if a call neither sleeps nor keeps several threads busy, from samples of wall time and CPU time."""
    least, most = CPU_BOUND
    return least <= statistics.median(sample.other_s / sample.seconds for sample in samples) <= most


def throttling(snapshots: Sequence[Snapshot]) -> str | None:
    """Say in a phrase why the GPU slowed down, or how far its clock moved; None for a steady GPU."""
    reasons = sorted(set().union(*(moment.slowed_by for moment in snapshots)))
    frequencies = [moment.sm_mhz for moment in snapshots if moment.sm_mhz]
    span = "SM clock unknown"
    has_moved = False
    if frequencies:
        lowest, highest = min(frequencies), max(frequencies)
        span = f"SM clock {lowest}-{highest} MHz"
        has_moved = lowest < MOVED * highest
    if reasons:
        return f"the GPU was throttled ({', '.join(reasons)}; {span})"
    return f"the GPU's clock moved ({span})" if has_moved else None


def warnings(
    clock: Clock, snapshots: Sequence[Snapshot], by_cpu: bool, samples_by_side: Sequence[Sequence[Sample]]
) -> tuple[str, ...]:
    """Return a warning for each interference with a measurement.

    by_cpu: True if the result is CPU time; the other arguments as for `cpu_time_is_better`.
    """
    messages = []
    load = foreign_load(clock, snapshots) or 0.0
    if load > FOREIGN_CORES:
        remedy = "times are CPU time" if by_cpu else "the times may be off"
        threads = torch.get_num_threads()
        if clock.device.type == "cpu" and threads > 1:
            remedy = f"{threads} threads wait for the busy cores, and a time may be several times too long; use one"
        messages.append(f"other programs kept {load:.1f} cores busy: {remedy}")
    slowed = throttling(snapshots)
    if slowed is not None:
        messages.append(slowed)
    if clock.other == "wall" and any(_work_is_unseen(side) for side in samples_by_side):
        messages.append(
            "CUDA events saw under half of the wall time: work on another stream, or launches that lag behind"
        )
    return tuple(messages)


def _work_is_unseen(samples: Sequence[Sample]) -> bool:
    return statistics.median(sample.seconds / sample.other_s for sample in samples) < UNSEEN
