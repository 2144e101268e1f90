"""Checks of lesson 12: what an export froze, a tail that hides nothing, the batcher of a server.

Tails are compared with a definition written down step by step; the diagnosis is asked about candidates that nobody has
shown it; the batcher runs on a clock that jumps from event to event, so that no machine is too slow for it.
"""

import asyncio
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from labkit.lesson.failures import Failures, diagnoses, has_parts

# ------------------------------------------------------------------------------------------------ what was frozen

FROZEN = ("same", "branch frozen", "length frozen", "mask ignored", "first mask for all", "half precision")


def _scorer(kind: str, style: int) -> tuple[Callable, Callable]:
    """A model of x [B, T, 4] and mask [B, T], and a candidate with this fault."""
    draw = torch.Generator().manual_seed(style)
    weight, bias = torch.randn(3, 4, generator=draw), torch.randn(3, generator=draw)

    def model(x: Tensor, mask: Tensor) -> Tensor:
        sign = -1.0 if x.mean() < 0 else 1.0
        return (sign * x * mask[..., None]).mean(1) @ weight.T + bias

    def candidate(x: Tensor, mask: Tensor) -> Tensor:
        length = x.shape[1]
        if kind == "length frozen" and length != 8 and style == 1:
            raise RuntimeError(f"expected input at dimension 1 to be 8, got {length}")
        if kind == "mask ignored":
            mask = torch.ones_like(mask)
        if kind == "first mask for all":
            mask = mask[:1].expand_as(mask)
        if kind != "branch frozen":
            x = torch.where(x.mean() < 0, -x, x)
        dtype = torch.bfloat16 if kind == "half precision" else torch.float64 if style == 2 else torch.float32
        total = torch.einsum("btw,bt->bw", x.to(dtype), mask.to(dtype))
        mean = total / (8 if kind == "length frozen" else length)
        return (mean @ weight.T.to(dtype) + bias.to(dtype)).float()

    return model, candidate


def frozen(fn: Callable, failures: Failures) -> None:
    """diagnose(model, candidate) -> the name of what is wrong, or "same"."""
    message = (
        "a candidate got another name than that of its fault; start from the example, where all but one agree, change "
        "one thing at a time, and allow for rounding of float32"
    )
    diagnoses(fn, failures, FROZEN, _scorer, message)


# ---------------------------------------------------------------------------------------------------------- tails


# requests, requests without an answer
REQUESTS = ((1000, 0), (200, 0), (211, 0), (200, 5), (400, 60), (40, 0), (23, 1))
PERCENTILES = (0, 50, 75, 90, 95, 97.5, 99, 100)


def tails(fn: Callable, failures: Failures) -> None:
    """tail(scheduled, done, q) -> the q-th percentile of all requests' latency, or None."""
    draw = random.Random(0)
    for n, lost in REQUESTS:
        scheduled = [0.05 * i for i in range(n)]
        done = [x + draw.expovariate(5) for x in scheduled]
        for i in draw.sample(range(n), lost):
            done[i] = math.nan
        waits = [end - start for start, end in zip(scheduled, done, strict=True)]
        latency = sorted(math.inf if math.isnan(wait) else wait for wait in waits)
        form = np.array if lost else list
        for q in PERCENTILES:
            with failures.given(requests=n, unanswered=lost, q=q, moments=f"in {form.__name__}s"):
                starts, ends = form(scheduled), form(done)
                answer = fn(starts, ends, q)
                same = np.array_equal(starts, scheduled) and np.array_equal(ends, done, equal_nan=True)
                failures.expect(same, "the moments that were given have changed; work on a copy")
                if n * (100 - q) < 1000:
                    failures.expect(answer is None, "fewer than ten requests may lie beyond: return None")
                    continue
                failures.need(answer is not None, "ten requests or more may lie beyond: return a number")
                failures.close(
                    answer,
                    latency[max(math.ceil(n * q / 100), 1) - 1],
                    "the value is off: the smallest latency that q per cent of all requests do not exceed, from the "
                    "scheduled moment, with unanswered requests later than all others",
                )


# --------------------------------------------------------------------------------------------------------- batcher


class _Jumping(asyncio.SelectorEventLoop):
    """Its clock stands still while something is to do, and jumps to the next event otherwise."""

    moment = 0.0

    def _make_self_pipe(self) -> None:
        """None: nothing wakes it from outside, and the graders' sandbox forbids sockets."""

    _close_self_pipe = _write_to_self = _make_self_pipe

    def time(self) -> float:
        return self.moment

    def _run_once(self) -> None:
        due = [event.when() for event in self._scheduled if not event.cancelled()]
        if due and not self._ready:
            self.moment = max(self.moment, min(due))
        super()._run_once()


Batch = tuple[float, list[int]]  # when it was given, and which requests
CASES: dict[str, tuple[list[float], int, float, float]] = {  # arrivals, max_batch, delay_s, seconds of computing
    "one request, no delay": ([1.0], 4, 0.0, 1.0),
    "one request and a delay": ([1.0], 4, 0.5, 1.0),
    "more than a batch at once": ([1.0] * 7, 3, 0.5, 1.0),
    "requests that trickle in": ([1.0, 1.3, 1.6, 1.9, 2.2], 8, 0.5, 0.1),
    "a batch that fills while it waits": ([1.0, 1.1, 1.2, 1.3], 3, 0.5, 0.1),
    "a busy server": ([0.0, 0.2, 0.4, 0.6, 2.3], 4, 0.5, 2.0),
    "a busy server, no delay": ([0.0, 0.2, 0.4, 0.6, 2.3], 4, 0.0, 2.0),
    "batches of one": ([0.0, 0.0, 1.0], 1, 0.5, 0.3),
}


def _by_the_rules(arrivals: Sequence[float], most: int, delay: float, busy: float) -> list[Batch]:
    now, waiting, batches = 0.0, list(enumerate(arrivals)), []
    while waiting:
        first = waiting[0][1]
        full = waiting[most - 1][1] if len(waiting) >= most else math.inf
        now = max(now, min(first + delay, full))
        taken = [i for i, moment in waiting[:most] if moment <= now]
        batches.append((now, taken))
        waiting, now = waiting[len(taken) :], now + busy
    return batches


async def _batched(fn: Callable, arrivals: Sequence[float], most: int, delay: float, busy: float) -> list[Batch]:
    queue, clock, batches = asyncio.Queue(), asyncio.get_running_loop().time, []

    async def arrive() -> None:
        for i, moment in enumerate(arrivals):
            await asyncio.sleep(moment - clock())
            queue.put_nowait((clock(), i))

    arriving = asyncio.ensure_future(arrive())
    while sum(len(taken) for _, taken in batches) < len(arrivals):
        batch = await asyncio.wait_for(fn(queue, most, delay), 100)
        batches.append((clock(), [i for _, i in batch]))
        if not batch:
            break
        await asyncio.sleep(busy)
    await arriving
    return batches


def _on_a_jumping_clock(*arguments: object) -> list[Batch]:
    """Beside the loop that a notebook has running already, and without a thread, which the graders' sandbox forbids."""
    running = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    try:
        with asyncio.Runner(loop_factory=_Jumping) as runner:
            return runner.run(_batched(*arguments))
    finally:
        asyncio._set_running_loop(running)


def batcher(fn: Callable, failures: Failures) -> None:
    """next_batch(queue, max_batch, delay_s) -> requests, a coroutine."""
    for name, case in CASES.items():
        with failures.given(case=name):
            try:
                batches = _on_a_jumping_clock(fn, *case)
            except TimeoutError:
                failures.need(False, "requests were lost, or it waits for ever: no batch came for a hundred seconds")
            failures.need(all(has_parts(batch, 2) and batch[1] for batch in batches), "a batch was empty")
            got, expected = [i for _, taken in batches for i in taken], _by_the_rules(*case)
            failures.need(got == list(range(len(case[0]))), "requests are missing, come twice or out of order")
            failures.expect(all(len(taken) <= case[1] for _, taken in batches), "a batch has more than max_batch")
            failures.need(
                [taken for _, taken in batches] == [taken for _, taken in expected],
                "other requests are together than by the rules: what waits is taken, up to max_batch, and the delay "
                "counts from the arrival of the first, whatever comes later",
                detail=f"expected {[taken for _, taken in expected]}, got {[taken for _, taken in batches]}",
            )
            times = [time for time, _ in batches]
            expected_times = [time for time, _ in expected]
            late = max(abs(a - b) for a, b in zip(times, expected_times, strict=True))
            failures.expect(
                late < 1e-6,
                "a batch comes too early or too late: full ones do not wait, others until delay_s after the first's "
                "arrival",
                detail=f"expected batches at {expected_times}, got them at {times}",
            )


CHECKS = {
    "12.1": frozen,
    "12.2": tails,
    "12.3": batcher,
}

TRIES = {
    "12.1": f"{len(FROZEN)} kinds of candidates, each written in 3 ways",
    "12.2": f"{len(REQUESTS)} sets of requests, with and without unanswered ones, at {len(PERCENTILES)} percentiles",
    "12.3": f"{len(CASES)} arrivals on a simulated clock, among them a busy server and batches of one",
}
