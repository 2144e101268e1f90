"""Clocks that labkit.bench reads: wall and CPU time, CUDA events, or a clock that the caller hands in.

Synchronisation and the flush of twice the L2 cache follow torch.utils.benchmark and FlashInfer's testing utilities.
Reading a clock changes no frequency and no priority of a shared machine. `bench.py` decides how often a call runs;
`interference.py` watches other programs meanwhile.
"""

import functools
import itertools
import math
import mmap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from labkit.errors import InputError

Call = Callable[[], Any]

SAMPLE_S = 1e-3  # shorter calls are repeated to fill a sample of this length: a thousand times the cost of a clock
MOST_CALLS = 1_000_000  # in a sample
GOT_FASTER = 0.98  # a call in at most this share of its fastest time has not warmed up yet
SETTLED_ROUNDS = 3  # rounds of warm-up without any call getting faster

LAZY_TYPES = (Iterator, Awaitable, AsyncIterator, FunctionType, functools.partial)
# Methods of futures in concurrent.futures, multiprocessing, torch.futures and dask: a future has one of each row.
FUTURE_RESULT = ("result", "get", "wait")
FUTURE_STATE = ("done", "ready")


class Seconds(NamedTuple):
    """Seconds of a block of calls by a clock, and by the second clock beside the first."""

    seconds: float
    other_s: float


class Sample(NamedTuple):
    """Seconds per call by a clock and by the second clock, and page faults per call."""

    seconds: float
    other_s: float
    page_faults: float

    def by(self, other: bool) -> float:
        """Return the seconds per call by the second clock if `other`, otherwise by the first."""
        return self.other_s if other else self.seconds


@dataclass(frozen=True)
class Clock:
    """Time calls by two clocks.

    name: "wall", "cuda_event" or "injected".
    other: name of the second clock: "cpu" beside wall time, "wall" beside CUDA events, "" beside an injected clock.
    device: where the work runs.
    cache: "hot" or "cold".
    block: block(fn, number) calls `fn` `number` times and returns the total Seconds.
    now: the time, in seconds, in which a budget is spent.
    evict: empties a CPU's caches before each sample, off the clock; None leaves the caches alone. Samples of a clock
        with `evict` are single calls.
    evict_s: duration of `evict` in seconds.
    """

    name: str
    other: str
    device: torch.device
    cache: str
    block: Callable[[Call, int], Seconds]
    now: Callable[[], float] = time.perf_counter
    evict: Call | None = None
    evict_s: float | None = None

    def sample(self, call: Call, number: int) -> Sample:
        """Time `number` calls, and return the mean of a call."""
        if self.evict is not None:
            self.evict()
        faults_before = page_faults()
        total = self.block(call, number)
        faults = page_faults() - faults_before
        return Sample(total.seconds / number, total.other_s / number, faults / number)


def choose(
    device: torch.device,
    cache: str = "hot",
    injected: Callable[[Call, int], float] | None = None,
    evict: Call | None = None,
) -> Clock:
    """Choose the clock for a device: CUDA events on a CUDA device, wall and CPU time on any other.

    cache: "hot", or "cold": empty caches before each timed call. On CUDA, twice the L2 cache is overwritten. On other
        devices `evict` runs before each sample, off the clock. Warm-up runs with the caches as they are.
    injected: injected(fn, number) -> seconds, a clock that replaces the real clocks, for simulations.
    evict: see `evictor`.
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


@functools.lru_cache(maxsize=1)  # touching new pages takes longer than evicting with touched pages
def evictor(last_level_cache: int) -> Call:
    """Make a function that displaces all data from a CPU's caches, for `cache="cold"`.

    The function reads and writes an array of one and a half times the last-level caches (64 MiB at least), each thread
    of torch its own part, like the parts of a timed call. Reading 1 to 128 MB after two and a half times the caches
    took no longer. Code is displaced as well: a tiny matrix product brings back the code of the interpreter and of
    torch that every call uses. About 20 microseconds per call remain, and dominate shorter calls.

    last_level_cache: total bytes over the sockets that this process may use (`labkit.machine.fingerprint`).
    """
    nbytes = max(64 * 2**20, 3 * last_level_cache // 2)
    everything = torch.ones(nbytes // 8, dtype=torch.int64)
    tiny = torch.ones(4, 4)

    def evict() -> None:
        everything.add_(1)
        torch.mm(tiny, tiny)

    return evict


def check_budget(budget_s: float) -> None:
    """Raise InputError unless `budget_s` is a number of seconds above 0."""
    is_number = isinstance(budget_s, int | float) and not isinstance(budget_s, bool)
    if not is_number or not 0 < budget_s < math.inf:
        raise InputError(f"budget_s must be a number of seconds above 0, got {budget_s!r}: 1 to 10 is usual.")


# --- before a call is timed -------------------------------------------------------------------------------------------


def first_call(fn: Call) -> Any:
    """Call `fn` in inference mode and return the output, so that compilation and lazy set-up are over.

    Raises InputError if the output is unfinished work: a generator, a coroutine, a future or a function.
    """
    with torch.inference_mode():
        output = fn()
    for leaf in tree_leaves(output):
        if _is_lazy(leaf):
            raise InputError(
                f"the callable returns a {type(leaf).__name__}, whose work is not done when the call ends: "
                "finish it inside the callable: list() of a generator, asyncio.run() of a coroutine, .result() of a "
                "future, or call the function that came back."
            )
    return output


def device_of(output: Any) -> torch.device | None:
    """Return the device of the first tensor in a callable's output; None for an output without tensors."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            return leaf.device
    return None


def _is_lazy(leaf: Any) -> bool:
    is_future = _has_method(leaf, FUTURE_RESULT) and _has_method(leaf, FUTURE_STATE)
    return is_future or isinstance(leaf, LAZY_TYPES)


def _has_method(leaf: Any, names: Sequence[str]) -> bool:
    return any(callable(getattr(leaf, name, None)) for name in names)


def warm_up(clock: Clock, calls: Sequence[Call], budget_s: float) -> list[float]:
    """Call all `calls` in turn until no call has become faster by 2 % for three rounds.

    Warm-up lasts a tenth of the budget at least, and half of it plus a round at most: some code never settles
    (Barrett et al. 2017, Virtual Machine Warmup Blows Hot and Cold).

    budget_s: seconds for the whole measurement.
    Returns the fastest time of each call, in seconds.
    """
    start = clock.now()
    fastest = [math.inf] * len(calls)
    settled_rounds = 0
    while True:
        seconds = [clock.block(call, 1).seconds for call in calls]
        got_faster = any(new < GOT_FASTER * best for new, best in zip(seconds, fastest, strict=True))
        settled_rounds = 0 if got_faster else settled_rounds + 1
        fastest = [min(pair) for pair in zip(seconds, fastest, strict=True)]
        spent_s = clock.now() - start
        settled = settled_rounds >= SETTLED_ROUNDS and spent_s >= 0.1 * budget_s
        if settled or spent_s >= 0.5 * budget_s:
            return fastest


def repeats(clock: Clock, call: Call, seconds: float) -> int:
    """Find the number of calls that fills a sample of SAMPLE_S seconds; 1 for a clock that empties caches.

    seconds: fastest time of a single call.
    """
    number = 1
    if clock.evict is not None:
        return number
    while seconds < SAMPLE_S and number < MOST_CALLS:
        needed = math.ceil(number * SAMPLE_S / max(seconds, 1e-9))
        number = min(max(needed, 2 * number), 1000 * number, MOST_CALLS)
        total = clock.block(call, number)
        # CUDA events may miss the work of a call on another stream, so the slower clock counts on CUDA
        seconds = max(total) if clock.other == "wall" else total.seconds
    return number


# --- the three clocks -------------------------------------------------------------------------------------------------


def _synchronize() -> None:
    """Wait until all accelerators in use have finished."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


def now() -> float:
    """Return the wall time in seconds, once all accelerators in use have finished what was asked of them so far."""
    _synchronize()
    return time.perf_counter()


def _wall(fn: Call, number: int) -> Seconds:
    with torch.inference_mode():
        _synchronize()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in itertools.repeat(None, number):
            fn()
        _synchronize()
        return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def _injected(clock: Callable[[Call, int], float], device: torch.device, cache: str) -> Clock:
    spent_s = 0.0

    def block(fn: Call, number: int) -> Seconds:
        nonlocal spent_s
        seconds = clock(fn, number)
        if not 0 < seconds < math.inf:
            raise InputError(f"clock(fn, number) must return seconds above 0, got {seconds!r}: check the clock.")
        spent_s += seconds
        return Seconds(seconds, seconds)

    def now() -> float:
        return spent_s

    return Clock("injected", "", device, cache, block, now)


def _cuda(device: torch.device, cache: str) -> Clock:
    if cache == "hot":
        block = functools.partial(_cuda_block, device=device)
    else:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)
        block = functools.partial(_flushed_cuda_block, device=device, flush=flush)
    return Clock("cuda_event", "wall", device, cache, block)


def _cuda_block(fn: Call, number: int, *, device: torch.device) -> Seconds:
    start, end = _timing_event(), _timing_event()
    with torch.inference_mode(), torch.cuda.device(device):
        torch.cuda.synchronize()
        wall_start = time.perf_counter()
        start.record()
        for _ in itertools.repeat(None, number):
            fn()
        end.record()
        torch.cuda.synchronize()
        wall_s = time.perf_counter() - wall_start
    return Seconds(start.elapsed_time(end) / 1e3, wall_s)


def _flushed_cuda_block(fn: Call, number: int, *, device: torch.device, flush: torch.Tensor) -> Seconds:
    """Time `number` calls, each after a write over `flush`; the time of the writes is taken out of both clocks."""
    before_all = _timing_event()
    starts = [_timing_event() for _ in range(number)]
    ends = [_timing_event() for _ in range(number)]
    with torch.inference_mode(), torch.cuda.device(device):
        torch.cuda.synchronize()
        wall_start = time.perf_counter()
        before_all.record()
        for start, end in zip(starts, ends, strict=True):
            flush.zero_()
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        wall_s = time.perf_counter() - wall_start
    seconds = sum(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)) / 1e3
    flushing_s = before_all.elapsed_time(ends[-1]) / 1e3 - seconds
    return Seconds(seconds, wall_s - flushing_s)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


# --- page faults ------------------------------------------------------------------------------------------------------


def page_faults() -> int:
    """Return the number of pages that this process has touched for the first time; 0 if the system does not count."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@functools.cache
def fault_s() -> float:
    """Measure the seconds of a page fault: the best of three mappings of 16 MiB, touched page by page."""
    seconds_per_fault = []
    for _ in range(3):
        fresh = np.frombuffer(mmap.mmap(-1, 2**24), np.uint8)
        faults_before, start = page_faults(), time.perf_counter()
        fresh[:: mmap.PAGESIZE] = 1
        seconds = time.perf_counter() - start
        faults = page_faults() - faults_before
        seconds_per_fault.append(seconds / max(1, faults))
    return min(seconds_per_fault)
