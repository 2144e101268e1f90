"""The clocks that labkit.bench reads: wall and CPU time, CUDA events with hot or cold L2, CUDA graphs, or one given.

Synchronisation and the flush of twice the L2 follow torch.utils.benchmark and FlashInfer's testing utilities. A clock
only times `number` calls in a row; which calls, how many and in what order is decided in bench.py.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from labkit.errors import InputError

Call = Callable[[], Any]
Sample = tuple[float, float]  # seconds by the clock, seconds by the second clock

SAMPLE_S = (
    1e-3  # shorter calls are repeated until a sample lasts this long: a thousand times what reading the clocks costs
)
MOST_CALLS = 1_000_000


@dataclass(frozen=True)
class Clock:
    """block(fn, number) times `number` calls by two clocks; now() is the time that a budget is spent in."""

    name: str  # wall, cuda_event, cuda_graph or injected
    other: str  # the second clock: cpu beside wall, wall beside CUDA; "" for an injected clock, which has none
    device: torch.device
    cache: str
    block: Callable[[Call, int], Sample]
    now: Callable[[], float] = time.perf_counter
    prepare: Callable[[Call], Call] = lambda call: call  # what is timed in place of the callable: its graph, or itself

    def sample(self, call: Call, number: int) -> Sample:
        """Seconds per call by both clocks."""
        seconds, other = self.block(call, number)
        return seconds / number, other / number


def choose(device: torch.device, cache: str, graph: bool, given: Callable[[Call, int], float] | None) -> Clock:
    """CUDA events on a CUDA device, wall and CPU time elsewhere, and before both the clock that was given."""
    if given is not None:
        return _injected(given, device, cache)
    if device.type == "cuda":
        return _cuda(device, cache, graph)
    return Clock("wall", "cpu", device, cache, _wall)


def first_call(fn: Call) -> tuple[Any, float]:
    """What fn returns and the wall seconds of this call, compilation and lazy set-up included."""
    with torch.inference_mode():
        start = time.perf_counter()
        output = fn()
        _synchronize(device_of(output))
        return output, time.perf_counter() - start


def device_of(output: Any) -> torch.device | None:
    """Where the first tensor inside a callable's output lives; None if there is no tensor."""
    if isinstance(output, torch.Tensor):
        return output.device
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return next((device for item in output if (device := device_of(item)) is not None), None)
    return None


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
    """How many calls make a sample of SAMPLE_S, from the least seconds of a single call."""
    number = 1
    while seconds < SAMPLE_S and number < MOST_CALLS:
        wanted = math.ceil(number * SAMPLE_S / max(seconds, 1e-9))
        number = min(max(wanted, 2 * number), 1000 * number, MOST_CALLS)
        # on CUDA by the wall: events may see nothing of a call that works on another stream
        seconds = max(clock.block(call, number)) if clock.other == "wall" else clock.block(call, number)[0]
    return number


def _synchronize(device: torch.device | None = None) -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize(device if device is not None and device.type == "cuda" else None)
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


def _wall(fn: Call, number: int) -> Sample:
    with torch.inference_mode():
        _synchronize()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in itertools.repeat(None, number):
            fn()
        _synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu


def _injected(given: Callable[[Call, int], float], device: torch.device, cache: str) -> Clock:
    spent = 0.0

    def block(fn: Call, number: int) -> Sample:
        nonlocal spent
        seconds = given(fn, number)
        if not 0 < seconds < math.inf:
            raise InputError(f"clock(fn, number) must return seconds above 0, got {seconds!r}: check the clock.")
        spent += seconds
        return seconds, seconds

    return Clock("injected", "", device, cache, block, now=lambda: spent)


def _cuda(device: torch.device, cache: str, graph: bool) -> Clock:
    flush = None
    if cache == "cold":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def block(fn: Call, number: int) -> Sample:
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

    prepare = (lambda fn: _captured(fn, device)) if graph else (lambda fn: fn)
    return Clock("cuda_graph" if graph else "cuda_event", "wall", device, cache, block, prepare=prepare)


def _captured(fn: Call, device: torch.device) -> Call:
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.inference_mode(), torch.cuda.device(device):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # lazy set-up must be over before a capture, and off the default stream
            for _ in range(3):
                fn()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            fn()
    return graph.replay
