"""SIMULATED: requests that wait, are batched and served, under static, dynamic and continuous batching.

A discrete-event simulation of a server that decodes a batch step by step. Continuous batching is the iteration-level
scheduling of Orca (Yu et al. 2022); dynamic batching is the rule of Triton's batcher. All times follow from given step
times: no model runs, and prompts, memory, networks and preemption are left out.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.errors import InputError, check_whole

Seconds = Callable[[int], float]  # of a batch size
Times = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Served:
    """SIMULATED: times of arrival and of the last token, [requests] seconds each."""

    arrival_s: Times
    finish_s: Times

    @property
    def latency_s(self) -> Times:
        """Seconds from arrival to the last token, [requests]."""
        return self.finish_s - self.arrival_s


def poisson_arrivals(rate: float, n: int, seed: int = 0) -> Times:
    """Draw arrival times of n independent requests, in seconds from 0, [n].

    rate: mean requests per second.
    """
    if not 0 < rate < math.inf:
        raise InputError(f"rate has to be above 0 requests a second, got {rate!r}: give how many arrive in a second.")
    check_whole(n, "n")
    generator = np.random.default_rng(seed)
    gaps = generator.exponential(1 / rate, n)
    return np.cumsum(gaps)


def static(arrivals: ArrayLike, lengths: ArrayLike, step_seconds: Seconds, *, batch: int) -> Served:
    """SIMULATED: wait until `batch` requests have come, serve them until the longest is done, take the next `batch`.

    The requests that remain at the end make a last, smaller batch. See `continuous` for the other arguments.
    """
    return dynamic(arrivals, lengths, step_seconds, max_batch=batch, max_delay_s=math.inf)


def dynamic(
    arrivals: ArrayLike, lengths: ArrayLike, step_seconds: Seconds, *, max_batch: int, max_delay_s: float
) -> Served:
    """SIMULATED: a free server starts when `max_batch` requests wait or the oldest has waited `max_delay_s` seconds.

    All requests of a batch are padded to the longest and finish together. See `continuous` for the other arguments.
    """
    if not max_delay_s >= 0:
        raise InputError(f"max_delay_s has to be 0 or more seconds, got {max_delay_s!r}: inf waits for a full batch.")
    arrival, tokens = _requests(arrivals, lengths)
    step = _step_table(step_seconds, max_batch)
    finish = np.empty_like(arrival)
    first = 0  # the oldest request that waits
    free_at = 0.0  # when the server is free
    while first < len(arrival):
        last = min(first + max_batch, len(arrival)) - 1
        batch_is_due = min(arrival[last], arrival[first] + max_delay_s)
        start = max(free_at, batch_is_due)
        arrived = np.searchsorted(arrival[first : last + 1], start, side="right")
        end = first + int(arrived)
        steps = int(tokens[first:end].max())
        free_at = start + steps * step[end - first]
        finish[first:end] = free_at
        first = end
    return Served(arrival, finish)


def continuous(arrivals: ArrayLike, lengths: ArrayLike, step_seconds: Seconds, *, max_batch: int) -> Served:
    """SIMULATED: requests join between decode steps while fewer than `max_batch` run, and leave when they are done.

    arrivals: arrival times in seconds, rising, [requests].
    lengths: numbers of tokens to generate, [requests].
    step_seconds: step_seconds(b) is the time of a decode step of b requests, which gives each request a token.
    Raises InputError for impossible requests or times.
    """
    arrival, tokens = _requests(arrivals, lengths)
    step = _step_table(step_seconds, max_batch)
    finish = np.empty_like(arrival)
    running: list[tuple[int, int]] = []  # heap of (the step after which the request is done, request)
    steps = 0
    now = 0.0
    waiting = 0  # the oldest request that waits
    while waiting < len(arrival) or running:
        if not running:
            now = max(now, arrival[waiting])
        while waiting < len(arrival) and arrival[waiting] <= now and len(running) < max_batch:
            done_after = steps + int(tokens[waiting])
            heapq.heappush(running, (done_after, waiting))
            waiting += 1
        batch = len(running)
        first_done, _ = running[0]
        ahead = first_done - steps  # nothing changes until a request is done, or another can join
        if waiting < len(arrival) and batch < max_batch:
            until_arrival = math.ceil((arrival[waiting] - now) / step[batch])
            ahead = min(ahead, max(1, until_arrival))
        now += ahead * step[batch]
        steps += ahead
        while running and running[0][0] == steps:
            _, request = heapq.heappop(running)
            finish[request] = now
    return Served(arrival, finish)


def _requests(arrivals: ArrayLike, lengths: ArrayLike) -> tuple[Times, NDArray[np.int64]]:
    arrival = np.array(arrivals, dtype=float)
    tokens = np.array(lengths)
    if arrival.ndim != 1 or arrival.shape != tokens.shape or not len(arrival):
        raise InputError(f"arrivals {arrival.shape} and lengths {tokens.shape} have to match: give both per request.")
    is_rising = (np.diff(arrival) >= 0).all()
    if not np.isfinite(arrival).all() or not is_rising or arrival[0] < 0:
        raise InputError("arrivals have to be seconds from 0 on that do not fall: sort them.")
    if not np.issubdtype(tokens.dtype, np.integer) or (tokens < 1).any():
        raise InputError("lengths have to be whole numbers of tokens, at least 1 each: a request generates something.")
    return arrival, tokens.astype(np.int64)


def _step_table(step_seconds: Seconds, max_batch: int) -> list[float]:
    """Return the seconds of a step by batch size, 0 for an empty batch."""
    check_whole(max_batch, "the largest batch")
    step = [float(step_seconds(size)) for size in range(1, max_batch + 1)]
    if not all(0 < seconds < math.inf for seconds in step):
        raise InputError(
            f"step_seconds has to give above 0 seconds up to a batch of {max_batch}: check what it returns."
        )
    return [0.0, *step]
