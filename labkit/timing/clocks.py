"""The clocks that labkit.bench reads (wall and CPU time, CUDA events, one handed in), and the machine meanwhile.

Synchronisation and the flush of twice the L2 follow torch.utils.benchmark and FlashInfer's testing utilities. The load
by others is (busy + steal time of our cores - own CPU time) / wall time; the load average lags by a minute. It only
reads: clocks and priorities of a shared machine are left as they are. What is called how often is decided in bench.
"""

import functools
import itertools
import math
import mmap
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils._pytree import tree_leaves

from labkit.errors import InputError

Call = Callable[[], Any]
Seconds = tuple[float, float]  # by the clock, and by the second clock
Sample = tuple[float, float, float]  # a call's seconds by both clocks, and its page faults

SAMPLE_S = 1e-3  # shorter calls are repeated until a sample lasts so long: a thousand times what reading a clock costs
MOST_CALLS = 1_000_000
FOREIGN_CORES = 0.15  # cores' worth of load by other programs from which on a run counts as disturbed


@dataclass(frozen=True)
class Clock:
    """block(fn, number) times `number` calls by two clocks; now() is the time that a budget is spent in."""

    name: str  # wall, cuda_event or injected
    other: str  # the second clock: cpu beside wall, wall beside CUDA; "" for an injected clock, which has none
    device: torch.device
    cache: str
    block: Callable[[Call, int], Seconds]
    now: Callable[[], float] = time.perf_counter
    evict: Call | None = None  # empties a CPU's caches before each sample, which is then one call, off the clock
    evict_s: float | None = None  # seconds that it takes

    def sample(self, call: Call, number: int) -> Sample:
        """Seconds per call by both clocks, and page faults per call."""
        if self.evict is not None:
            self.evict()
        before = page_faults()
        seconds, other = self.block(call, number)
        return seconds / number, other / number, (page_faults() - before) / number


def choose(
    device: torch.device,
    cache: str = "hot",
    injected: Callable[[Call, int], float] | None = None,
    evict: Call | None = None,
) -> Clock:
    """CUDA events on a CUDA device, wall and CPU time elsewhere; an injected clock before both.

    cache: "hot", or "cold": on CUDA twice the L2 is written over before each call, elsewhere `evict()` runs before each
        sample, off the clock, and a sample is one call. Warming up needs no empty caches, and does without.
    """
    if injected is not None:
        clock = _injected(injected, device, cache)
    elif device.type == "cuda":
        return _cuda(device, cache)
    else:
        clock = Clock("wall", "cpu", device, cache, _wall)
    if evict is None:
        return clock
    start = time.perf_counter()
    evict()
    return replace(clock, evict=evict, evict_s=time.perf_counter() - start)


@functools.lru_cache(maxsize=1)  # to touch new pages takes longer than to evict
def evictor(last_level_cache: int) -> Call:
    """A function that leaves nothing of what was used before in a CPU's caches, for `cache="cold"`.

    It reads and writes one and a half times the last-level caches (64 MiB at least), each thread of torch its part, as
    it does the parts of a call; after two and a half times, reading 1 to 128 MB took no longer. What it evicts includes
    code: a tiny product brings back the interpreter's and torch's most used, and some 20 microseconds a call remain, so
    that shorter calls are mostly that.
    last_level_cache: bytes in all, over the sockets that this process may use (labkit.machine.fingerprint).
    """
    everything = torch.ones(max(64 * 2**20, 3 * last_level_cache // 2) // 8, dtype=torch.int64)
    tiny = torch.ones(4, 4)

    def evict() -> None:
        everything.add_(1)
        torch.mm(tiny, tiny)

    return evict


def check_budget(budget_s: float) -> None:
    """InputError for a budget that is no number of seconds above 0."""
    if not isinstance(budget_s, int | float) or isinstance(budget_s, bool) or not 0 < budget_s < math.inf:
        raise InputError(f"budget_s must be a number of seconds above 0, got {budget_s!r}: 1 to 10 is usual.")


def first_call(fn: Call) -> Any:
    """What fn returns; compilation and lazy set-up are then over.

    Raises InputError if what it returns is work still to be done (a generator, a coroutine, a future, a function).
    """
    with torch.inference_mode():
        output = fn()
    if (lazy := next((leaf for leaf in tree_leaves(output) if _is_lazy(leaf)), None)) is not None:
        raise InputError(
            f"the callable returns a {type(lazy).__name__}, whose work is not done when the call ends: "
            "finish it inside the callable: list() of a generator, asyncio.run() of a coroutine, .result() of a "
            "future, or call the function that came back."
        )
    return output


def device_of(output: Any) -> torch.device | None:
    """Where the first tensor inside a callable's output lives; None if there is no tensor."""
    return next((leaf.device for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)


def _is_lazy(leaf: Any) -> bool:
    is_future = any(callable(getattr(leaf, name, None)) for name in ("result", "get", "wait")) and any(
        callable(getattr(leaf, name, None)) for name in ("done", "ready")
    )  # of concurrent.futures, multiprocessing, torch.futures, dask
    return is_future or isinstance(leaf, (Iterator, Awaitable, AsyncIterator, FunctionType, functools.partial))


def warm_up(clock: Clock, calls: Sequence[Call], budget_s: float) -> list[float]:
    """Call all in turn until none got faster by 2 % for three rounds; return each one's least seconds.

    Lasts a tenth of the budget at least; half of it, and one round, at most: some code never settles
    (Barrett et al. 2017, Virtual Machine Warmup Blows Hot and Cold).
    """
    start, least, settled = clock.now(), [math.inf] * len(calls), 0
    while True:
        seconds = [clock.block(call, 1)[0] for call in calls]
        settled = 0 if any(s < 0.98 * best for s, best in zip(seconds, least, strict=True)) else settled + 1
        least = [min(pair) for pair in zip(seconds, least, strict=True)]
        spent = clock.now() - start
        if spent >= 0.5 * budget_s or (settled >= 3 and spent >= 0.1 * budget_s):
            return least


def repeats(clock: Clock, call: Call, seconds: float) -> int:
    """How many calls make a sample of SAMPLE_S, from the least seconds of a single call; one, if caches are emptied."""
    number = 1
    while clock.evict is None and seconds < SAMPLE_S and number < MOST_CALLS:
        needed = math.ceil(number * SAMPLE_S / max(seconds, 1e-9))
        number = min(max(needed, 2 * number), 1000 * number, MOST_CALLS)
        # on CUDA by the wall: events may see nothing of a call that works on another stream
        seconds = max(clock.block(call, number)) if clock.other == "wall" else clock.block(call, number)[0]
    return number


def _synchronize() -> None:
    """Wait until the accelerators that are in use have finished."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


def _wall(fn: Call, number: int) -> Seconds:
    with torch.inference_mode():
        _synchronize()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in itertools.repeat(None, number):
            fn()
        _synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu


def _injected(clock: Callable[[Call, int], float], device: torch.device, cache: str) -> Clock:
    spent = 0.0

    def block(fn: Call, number: int) -> Seconds:
        nonlocal spent
        seconds = clock(fn, number)
        if not 0 < seconds < math.inf:
            raise InputError(f"clock(fn, number) must return seconds above 0, got {seconds!r}: check the clock.")
        spent += seconds
        return seconds, seconds

    return Clock("injected", "", device, cache, block, now=lambda: spent)


def _cuda(device: torch.device, cache: str) -> Clock:
    flush = None
    if cache == "cold":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def block(fn: Call, number: int) -> Seconds:
        groups, calls = (1, number) if flush is None else (number, 1)
        event = [torch.cuda.Event(enable_timing=True) for _ in range(2 * groups + 1)]
        with torch.inference_mode(), torch.cuda.device(device):
            torch.cuda.synchronize()
            wall = time.perf_counter()
            event[-1].record()
            for group in range(groups):
                if flush is not None:
                    flush.zero_()
                event[2 * group].record()
                for _ in itertools.repeat(None, calls):
                    fn()
                event[2 * group + 1].record()
            torch.cuda.synchronize()
            wall = time.perf_counter() - wall
        seconds = sum(event[2 * group].elapsed_time(event[2 * group + 1]) for group in range(groups)) / 1e3
        flushing = event[-1].elapsed_time(event[2 * groups - 1]) / 1e3 - seconds
        return seconds, wall - flushing

    return Clock("cuda_event", "wall", device, cache, block)


# --- what else went on ------------------------------------------------------------------------------------------------

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
    process_s: float
    busy_s: float
    sm_mhz: int | None = None
    slowed_by: tuple[str, ...] = ()


def snapshot(device: torch.device) -> Snapshot:
    """Read the machine's counters now; the GPU's clock and throttle reasons where pynvml is installed."""
    cores = psutil.cpu_times(percpu=True)
    if hasattr(os, "sched_getaffinity"):
        ours = os.sched_getaffinity(0)
        if max(ours) < len(cores):  # some containers number the cores anew
            cores = [cores[index] for index in ours]
    busy_s = sum(seconds for core in cores for state, seconds in core._asdict().items() if state not in IDLE)
    gpu = _gpu_state(device) if device.type == "cuda" else (None, ())
    return Snapshot(time.perf_counter(), time.process_time(), busy_s, *gpu)


def foreign_cores(before: Snapshot, after: Snapshot) -> float | None:
    """Cores' worth of work that others did on our cores; None over less than 0.2 s, where 10 ms ticks say nothing."""
    wall = after.wall_s - before.wall_s
    if wall < 0.2:
        return None
    return max(0.0, (after.busy_s - before.busy_s - (after.process_s - before.process_s)) / wall)


def throttling(snapshots: Sequence[Snapshot]) -> str | None:
    """One phrase on what slowed the GPU down or how far its clock moved over the snapshots; None if nothing did."""
    reasons = sorted({reason for moment in snapshots for reason in moment.slowed_by})
    speeds = [moment.sm_mhz for moment in snapshots if moment.sm_mhz]
    moved = bool(speeds) and min(speeds) < 0.95 * max(speeds)
    if not reasons and not moved:
        return None
    span = f"SM clock {min(speeds)}-{max(speeds)} MHz" if speeds else "SM clock unknown"
    return f"the GPU was throttled ({', '.join(reasons)}; {span})" if reasons else f"the GPU's clock moved ({span})"


def page_faults() -> int:
    """Pages that this process touched for the first time so far; 0 where the system does not count them."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@functools.cache
def fault_s() -> float:
    """Seconds that a page fault takes here: the best of three mappings of 16 MiB that are touched page by page."""
    seconds = []
    for _ in range(3):
        fresh = np.frombuffer(mmap.mmap(-1, 2**24), np.uint8)
        before, start = page_faults(), time.perf_counter()
        fresh[:: mmap.PAGESIZE] = 1
        seconds.append((time.perf_counter() - start) / max(1, page_faults() - before))
    return min(seconds)


@functools.cache
def _nvml():
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml
    except Exception:  # not installed, no driver, or no permission: then the GPU's clocks are simply not known
        return None


def _gpu_state(device: torch.device) -> tuple[int | None, tuple[str, ...]]:
    nvml = _nvml()
    if nvml is None:
        return None, ()
    try:
        # by UUID, for CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode())
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        clock = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
    except nvml.NVMLError:
        return None, ()
    return clock, tuple(name for bit, name in SLOWED_BY.items() if bits & bit)
