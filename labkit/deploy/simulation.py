"""SIMULATED: requests that wait, are put together and served, under static, dynamic and continuous batching.

A discrete-event simulation of one server that decodes a batch step by step; continuous batching is the iteration-level
scheduling of Orca (Yu et al. 2022), dynamic batching what Triton's batcher does. Its times are those of the step times
that it is given: no model runs, and prompts, memory, networks and preemption are not in it.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.errors import InputError, check_whole

Seconds = Callable[[int], float]  # of a batch size
Times = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Served:
    """SIMULATED: when each request arrived and finished, [requests] seconds each."""

    arrival_s: Times
    finish_s: Times

    @property
    def latency_s(self) -> Times:
        """From arrival to the last token, [requests]."""
        return self.finish_s - self.arrival_s

    @property
    def p50(self) -> float:
        """Median latency in seconds."""
        return float(np.percentile(self.latency_s, 50))

    @property
    def p99(self) -> float:
        """The latency that one request in a hundred exceeds, in seconds."""
        return float(np.percentile(self.latency_s, 99))


def poisson_arrivals(rate: float, n: int, seed: int = 0) -> Times:
    """Arrival times of n independent requests, `rate` a second on average, in seconds from 0, [n]."""
    if not 0 < rate < math.inf:
        raise InputError(f"rate has to be above 0 requests a second, got {rate!r}: give how many arrive in a second.")
    check_whole(n, "n")
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, n))


def interpolate(batch_sizes: Sequence[int], seconds: Sequence[float]) -> Seconds:
    """Step time for any batch size between measured ones, on straight lines; the size is refused outside them."""
    sizes, times = np.asarray(batch_sizes, dtype=float), np.asarray(seconds, dtype=float)
    if sizes.ndim != 1 or sizes.shape != times.shape or not len(sizes) or not (np.diff(sizes) > 0).all():
        raise InputError(f"batch_sizes have to rise, each with its seconds, got {batch_sizes!r} and {seconds!r}.")
    if not ((times > 0) & np.isfinite(times)).all():
        raise InputError(f"seconds have to be above 0, got {seconds!r}: give measured step times.")

    def step_seconds(batch_size: int) -> float:
        if not sizes[0] <= batch_size <= sizes[-1]:
            low, high = int(sizes[0]), int(sizes[-1])
            raise InputError(f"batch size {batch_size} was not measured: stay within {low} to {high}, or measure it.")
        return float(np.interp(batch_size, sizes, times))

    return step_seconds


def static(arrivals: ArrayLike, lengths: ArrayLike, step_seconds: Seconds, *, batch: int) -> Served:
    """SIMULATED: wait until `batch` requests have come, serve them until the longest is done, take the next `batch`.

    The requests that remain at the end make a last, smaller batch. See `continuous` for the other arguments.
    """
    return dynamic(arrivals, lengths, step_seconds, max_batch=batch, max_delay_s=math.inf)


def dynamic(
    arrivals: ArrayLike, lengths: ArrayLike, step_seconds: Seconds, *, max_batch: int, max_delay_s: float
) -> Served:
    """SIMULATED: a free server starts when `max_batch` requests wait or the oldest has waited `max_delay_s` seconds.

    All in a batch are padded to its longest and finish with it. See `continuous` for the other arguments.
    """
    if not max_delay_s >= 0:
        raise InputError(f"max_delay_s has to be 0 or more seconds, got {max_delay_s!r}: inf waits for a full batch.")
    arrival, tokens = _requests(arrivals, lengths)
    step = _table(step_seconds, max_batch)
    finish = np.empty_like(arrival)
    head, free = 0, 0.0
    while head < len(arrival):
        last = min(head + max_batch, len(arrival)) - 1
        start = max(free, min(arrival[last], arrival[head] + max_delay_s))
        tail = head + int(np.searchsorted(arrival[head : last + 1], start, side="right"))
        free = start + int(tokens[head:tail].max()) * step[tail - head]
        finish[head:tail] = free
        head = tail
    return Served(arrival, finish)


def continuous(arrivals: ArrayLike, lengths: ArrayLike, step_seconds: Seconds, *, max_batch: int) -> Served:
    """SIMULATED: requests join between decode steps while fewer than `max_batch` run, and leave when they are done.

    arrivals: seconds, rising, [requests]. lengths: tokens to generate, [requests].
    step_seconds: step_seconds(b) is the time of a decode step of b requests, which gives each of them a token.
    Raises InputError for requests or times that cannot be.
    """
    arrival, tokens = _requests(arrivals, lengths)
    step = _table(step_seconds, max_batch)
    finish = np.empty_like(arrival)
    running: list[tuple[int, int]] = []  # heap of (the step after which it is done, request)
    steps, head, now = 0, 0, 0.0
    while head < len(arrival) or running:
        if not running:
            now = max(now, arrival[head])
        while head < len(arrival) and arrival[head] <= now and len(running) < max_batch:
            heapq.heappush(running, (steps + int(tokens[head]), head))
            head += 1
        size = len(running)
        ahead = running[0][0] - steps  # nothing changes until the first one is done, or one can join
        if head < len(arrival) and size < max_batch:
            ahead = min(ahead, max(1, math.ceil((arrival[head] - now) / step[size])))
        now += ahead * step[size]
        steps += ahead
        while running and running[0][0] == steps:
            finish[heapq.heappop(running)[1]] = now
    return Served(arrival, finish)


def _requests(arrivals: ArrayLike, lengths: ArrayLike) -> tuple[Times, NDArray[np.int64]]:
    arrival, tokens = np.array(arrivals, dtype=float), np.array(lengths)
    if arrival.ndim != 1 or arrival.shape != tokens.shape or not len(arrival):
        raise InputError(f"arrivals {arrival.shape} and lengths {tokens.shape} have to match: give both per request.")
    if not np.isfinite(arrival).all() or (np.diff(arrival) < 0).any() or arrival[0] < 0:
        raise InputError("arrivals have to be seconds from 0 on that do not fall: sort them.")
    if not np.issubdtype(tokens.dtype, np.integer) or (tokens < 1).any():
        raise InputError("lengths have to be whole numbers of tokens, at least 1 each: a request generates something.")
    return arrival, tokens.astype(np.int64)


def _table(step_seconds: Seconds, max_batch: int) -> list[float]:
    """Seconds of a step by batch size, 0 for none."""
    check_whole(max_batch, "the largest batch")
    step = [float(step_seconds(size)) for size in range(1, max_batch + 1)]
    if not all(0 < seconds < math.inf for seconds in step):
        raise InputError(
            f"step_seconds has to give above 0 seconds up to a batch of {max_batch}: check what it returns."
        )
    return [0.0, *step]
