"""SIMULATED: requests that wait, are put together and served, under static, dynamic and continuous batching.

A discrete-event simulation of one server that decodes a batch step by step; continuous batching is the iteration-level
scheduling of Orca (Yu et al. 2022), dynamic batching what Triton's batcher does. Its times are those of the step times
that it is given: no model runs, and memory, networks, chunked prefill and preemption are not in it.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from labkit.errors import InputError

Seconds = Callable[[int], float]  # of a batch size
Times = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Served:
    """SIMULATED: when each request arrived, gave its first token and finished, [requests] seconds each.

    `tokens` are the lengths asked for, [requests]. `batch_steps` counts decode steps times the size of their batch:
    the tokens computed, padding included. `steps` are the decode steps, `busy_s` the time that the server worked.
    """

    policy: str
    arrival_s: Times
    first_token_s: Times
    finish_s: Times
    tokens: NDArray[np.int64]
    steps: int
    batch_steps: int
    busy_s: float

    @property
    def latency_s(self) -> Times:
        """From arrival to the last token, [requests]."""
        return self.finish_s - self.arrival_s

    @property
    def time_to_first_token_s(self) -> Times:
        """From arrival to the first token, [requests]."""
        return self.first_token_s - self.arrival_s

    @property
    def span_s(self) -> float:
        """From the first arrival to the last token."""
        return float(self.finish_s.max() - self.arrival_s[0])

    @property
    def tokens_per_s(self) -> float:
        """Tokens that were asked for, over the span; padding does not count."""
        return float(self.tokens.sum() / self.span_s)

    @property
    def mean_batch(self) -> float:
        """Requests in the batch, averaged over decode steps."""
        return self.batch_steps / self.steps

    @property
    def utilisation(self) -> float:
        """The part of the span in which the server worked, 0 to 1."""
        return self.busy_s / self.span_s

    @property
    def padding(self) -> float:
        """The part of the tokens computed that nobody asked for, 0 to 1."""
        return 1 - float(self.tokens.sum()) / self.batch_steps

    def percentile(self, q: float) -> float:
        """The latency that q percent of the requests do not exceed, in seconds."""
        if not 0 <= q <= 100:
            raise InputError(f"a percentile lies between 0 and 100, got {q!r}: 50 and 99 are usual.")
        return float(np.percentile(self.latency_s, q))

    @property
    def p50(self) -> float:
        """Median latency in seconds."""
        return self.percentile(50)

    @property
    def p99(self) -> float:
        """The latency of the slowest hundredth, in seconds."""
        return self.percentile(99)

    def to_dict(self) -> dict:
        """The summary as plain values, marked as simulated."""
        ttft = self.time_to_first_token_s
        return {
            "policy": self.policy,
            "simulated": True,
            "requests": len(self.tokens),
            "p50_s": self.p50,
            "p99_s": self.p99,
            "ttft_p50_s": float(np.percentile(ttft, 50)),
            "ttft_p99_s": float(np.percentile(ttft, 99)),
            "tokens_per_s": self.tokens_per_s,
            "mean_batch": self.mean_batch,
            "utilisation": self.utilisation,
            "padding": self.padding,
        }


def poisson_arrivals(rate: float, n: int, seed: int = 0) -> Times:
    """Arrival times of n independent requests, `rate` a second on average, in seconds from 0, [n]."""
    if not 0 < rate < math.inf:
        raise InputError(f"rate has to be above 0 requests a second, got {rate!r}: give how many arrive in a second.")
    _count("n", n)
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


def no_prefill(batch_size: int) -> float:
    """Prompts that cost nothing."""
    return 0.0


def static(
    arrivals: ArrayLike,
    lengths: ArrayLike,
    step_seconds: Seconds,
    *,
    batch: int,
    prefill_seconds: Seconds = no_prefill,
) -> Served:
    """SIMULATED: wait until `batch` requests are there, serve them until the longest is done, take the next `batch`.

    See `continuous` for the arguments; what is left at the end makes a last, smaller batch.
    """
    return dynamic(
        arrivals, lengths, step_seconds, max_batch=batch, max_delay_s=math.inf, prefill_seconds=prefill_seconds
    )


def dynamic(
    arrivals: ArrayLike,
    lengths: ArrayLike,
    step_seconds: Seconds,
    *,
    max_batch: int,
    max_delay_s: float,
    prefill_seconds: Seconds = no_prefill,
) -> Served:
    """SIMULATED: a free server starts when `max_batch` requests wait or the oldest has waited `max_delay_s`.

    All in a batch are padded to its longest and finish with it; their first tokens come after the first step. See
    `continuous` for the other arguments.
    """
    if not max_delay_s >= 0:
        raise InputError(f"max_delay_s has to be 0 or more seconds, got {max_delay_s!r}: inf waits for a full batch.")
    arrival, tokens = _requests(arrivals, lengths)
    step, prefill = _tables(step_seconds, prefill_seconds, max_batch)
    first, finish = np.empty_like(arrival), np.empty_like(arrival)
    steps = batch_steps = head = 0
    free = busy = 0.0
    while head < len(arrival):
        last = min(head + max_batch, len(arrival)) - 1
        start = max(free, min(arrival[last], arrival[head] + max_delay_s))
        tail = head + int(np.searchsorted(arrival[head : last + 1], start, side="right"))
        size, longest = tail - head, int(tokens[head:tail].max())
        first[head:tail] = start + prefill[size] + step[size]
        free = start + prefill[size] + longest * step[size]
        finish[head:tail] = free
        busy += free - start
        steps += longest
        batch_steps += longest * size
        head = tail
    policy = "static" if max_delay_s == math.inf else "dynamic"
    return Served(policy, arrival, first, finish, tokens, steps, batch_steps, busy)


def continuous(
    arrivals: ArrayLike,
    lengths: ArrayLike,
    step_seconds: Seconds,
    *,
    max_batch: int,
    prefill_seconds: Seconds = no_prefill,
) -> Served:
    """SIMULATED: requests join between decode steps while fewer than `max_batch` run, and leave when they are done.

    `arrivals` in seconds, rising, [requests]; `lengths` in tokens to generate, [requests]. A decode step of b requests
    takes step_seconds(b) and gives each a token; the prompts of k requests that start together take prefill_seconds(k)
    first, in which the others wait. Raises InputError for requests or times that cannot be.
    """
    arrival, tokens = _requests(arrivals, lengths)
    step, prefill = _tables(step_seconds, prefill_seconds, max_batch)
    first, finish = np.empty_like(arrival), np.empty_like(arrival)
    running: list[tuple[int, int]] = []  # heap of (the step after which it is done, request)
    steps = batch_steps = head = 0
    now = busy = 0.0
    while head < len(arrival) or running:
        if not running:
            now = max(now, arrival[head])
        joined = head
        while head < len(arrival) and arrival[head] <= now and len(running) < max_batch:
            heapq.heappush(running, (steps + int(tokens[head]), head))
            head += 1
        started, size = now, len(running)
        now += prefill[head - joined]
        first[joined:head] = now + step[size]
        ahead = running[0][0] - steps  # nothing changes until the first one is done, or one can join
        if head < len(arrival) and size < max_batch:
            ahead = min(ahead, max(1, math.ceil((arrival[head] - now) / step[size])))
        now += ahead * step[size]
        steps += ahead
        batch_steps += ahead * size
        busy += now - started
        while running and running[0][0] == steps:
            finish[heapq.heappop(running)[1]] = now
    return Served("continuous", arrival, first, finish, tokens, steps, batch_steps, busy)


def _requests(arrivals: ArrayLike, lengths: ArrayLike) -> tuple[Times, NDArray[np.int64]]:
    arrival, tokens = np.array(arrivals, dtype=float), np.array(lengths)
    if arrival.ndim != 1 or arrival.shape != tokens.shape or not len(arrival):
        raise InputError(f"arrivals {arrival.shape} and lengths {tokens.shape} have to match: give both per request.")
    if not np.isfinite(arrival).all() or (np.diff(arrival) < 0).any() or arrival[0] < 0:
        raise InputError("arrivals have to be seconds from 0 on that do not fall: sort them.")
    if not np.issubdtype(tokens.dtype, np.integer) or (tokens < 1).any():
        raise InputError("lengths have to be whole numbers of tokens, at least 1 each: a request generates something.")
    return arrival, tokens.astype(np.int64)


def _tables(step_seconds: Seconds, prefill_seconds: Seconds, max_batch: int) -> tuple[list[float], list[float]]:
    """Seconds of a step and of a prefill by batch size, 0 for none."""
    _count("the largest batch", max_batch)
    step = [0.0, *(float(step_seconds(size)) for size in range(1, max_batch + 1))]
    prefill = [0.0, *(float(prefill_seconds(size)) for size in range(1, max_batch + 1))]
    for name, times, least in (("step_seconds", step[1:], "above 0"), ("prefill_seconds", prefill, "0 or more")):
        if not all(math.isfinite(t) and (t > 0 or (t == 0 and least == "0 or more")) for t in times):
            raise InputError(f"{name} has to give {least} seconds up to a batch of {max_batch}: check what it returns.")
    return step, prefill


def _count(name: str, value: int) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} has to be a whole number from 1 on, got {value!r}: give a count.")
