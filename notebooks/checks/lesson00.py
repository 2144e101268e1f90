"""Checks of lesson 00: the A/A test, the rank that coin flips give, the paired speed-up, a benchmark that is repaired.

None of them reads a clock: an answer gets a SIMULATED one that knows the truth and notes every call. What is asked of
the pairs is read from those notes; the ranks are compared with labkit.stats, which takes them from scipy.
"""

import math
import random
from collections.abc import Callable
from numbers import Integral

from labkit import stats
from labkit.lesson.failures import Failures, has_parts

# what a benchmark answers, trial by trial, and in how many of the trials it declares a difference
SCRIPTS = (
    ([(1.5, 1.5)], 1),
    ([(0.5, 0.5)], 1),
    ([(0.9, 0.99005)], 1),  # beyond 1 / 1.01, and not beyond 0.99
    ([(1.01, 1.2)], 0),  # not above 1.01
    ([(1.0, 1.0)], 0),
    ([(1.004, 1.004), (0.996, 0.996)], 0),
    ([(0.9, 1.1)] * 3, 0),
    ([(1.02, 1.3), (0.7, 0.98), (0.98, 1.02)], 2),
    ([(1.3, 1.5), (1.3, 1.5), (0.5, 0.6)], 3),  # the same interval twice is two trials
    ([(1.004, 1.2), (0.8, 0.996)], 0),
    ([(1.3, 1.3), (1.0, 1.0), (0.7, 0.7), (1.02, 1.02), (0.9, 1.2), (0.2, 0.4), (1.0, 1.5)], 4),
)
COUNTS = (*range(1, 121), 201, 500)
PAIRS = ((20, 0), (20, 1), (20, 2), (21, 3), (6, 4), (7, 5), (40, 6))  # pairs, seed
TRUTHS = (1.0, 1.25, 0.5)


def work_a() -> None:
    """Stands for a function; the simulated clock knows what it costs."""


def work_b() -> None:
    """Another one."""


def harness(fn: Callable, failures: Failures) -> None:
    """false_alarms(benchmark, fn, trials) -> in how many trials of fn against itself a difference is declared."""
    for script, alarms in SCRIPTS:
        sides, answers = [], iter(script)

        def benchmark(a, b, sides=sides, answers=answers):
            sides.append((a, b))
            return next(answers, (1.0, 1.0))

        with failures.given(trials=len(script), intervals=script):
            got = fn(benchmark, work_a, len(script))
            failures.expect(len(sides) == len(script), "call the benchmark as many times as there are trials")
            failures.expect(
                all(a is work_a and b is work_a for a, b in sides), "both sides of an A/A test are the same function"
            )
            failures.need(_is_whole(got), "return a whole number, for it counts trials")
            failures.close(
                got, alarms,
                "the number of trials: a difference is declared where the whole interval lies beyond 1.01 or 1/1.01",
            )  # fmt: skip


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # numpy's whole numbers too


def rank(fn: Callable, failures: Failures) -> None:
    """coin_rank(n) -> the largest k with P(fewer than k heads in n flips) <= 2.5 %; 0 where there is none."""
    for n in COUNTS:
        _, lowest, _ = stats.median_ci(range(1, n + 1))  # of the values 1 to n the k-th is k
        k = 0 if math.isinf(lowest) else int(lowest)
        with failures.given(n=n):
            got = fn(n)
            if not failures.expect(_is_whole(got), "return a whole number, for it counts values from the end"):
                continue
            failures.expect(
                got <= k, "too bold: fewer than that many heads come up more often than 2.5 % of the time",
                detail=f"expected {k}, got {got}",
            )  # fmt: skip
            failures.expect(
                got >= k, "too careful: a larger rank is still safe (0 is right only where none is)",
                detail=f"expected {k}, got {got}",
            )  # fmt: skip


class _NotingClock:
    """SIMULATED: cost[fn] seconds a call, on a machine that gets 1 % slower with every call and stumbles at times."""

    def __init__(self, cost: dict[Callable, float]) -> None:
        self.cost, self.notes = cost, []

    def __call__(self, fn: Callable, number: int = 1) -> float:
        turn = len(self.notes)
        slowness = 1 + 0.01 * turn
        stumbles = turn * 7 % 11 == 0
        noise = 1 + 0.4 * stumbles + 0.001 * (turn % 5)
        seconds = number * self.cost[fn] * slowness * noise
        self.notes.append((fn, seconds))
        return seconds


def pairs(fn: Callable, failures: Failures) -> None:
    """paired_speedup(a, b, pairs, seed, clock) -> (speed-up, low, high)."""
    shared_state = random.getstate()
    orders = {}
    for count, seed in PAIRS:
        with failures.given(pairs=count, seed=seed):
            orders[count, seed] = _one_comparison(fn, failures, count, seed)
    with failures.given(pairs=20, seed="1, twice"):
        again = _one_comparison(fn, failures, 20, 1)
        failures.expect(again == orders.get((20, 1)), "the same seed has to give the same order")
        failures.expect(
            random.getstate() == shared_state,
            "your function changes the generator that all of Python shares: make another, random.Random(seed)",
        )
    with failures.given(pairs=20, seed="0 to 9"):
        several = {tuple(_one_comparison(fn, failures, 20, seed) or ()) for seed in range(10)}
        failures.expect(len(several) > 5, "the order has to be drawn at random, from the seed")
    with failures.given(pairs=20, b="the same function as a"):
        _, low, high = _three(fn(work_a, work_a, 20, 0, _NotingClock({work_a: 2e-3})), failures)
        failures.expect(low < high, "each ratio comes from two calls, even where both sides are one function")
    for count in (1, 5):
        with failures.given(pairs=count):
            clock = _NotingClock({work_a: 2e-3, work_b: 1e-3})
            _, low, high = _three(fn(work_a, work_b, count, 0, clock), failures)
            failures.expect(
                low == 0 and high == math.inf, "below six pairs there is no 95 % interval: return 0 and math.inf"
            )


def _one_comparison(fn: Callable, failures: Failures, count: int, seed: int) -> list[bool] | None:
    """Look at one comparison; whether a went first, pair by pair, or None where there are no pairs."""
    clock = _NotingClock({work_a: 3e-3, work_b: 2e-3})
    answer = fn(work_a, work_b, count, seed, clock)
    couples = list(zip(clock.notes[::2], clock.notes[1::2], strict=False))
    are_pairs = all(first is not second for (first, _), (second, _) in couples)
    if not failures.expect(
        len(clock.notes) == 2 * count and are_pairs,
        "time one call of each function in every pair, one right after the other, and nothing else",
        detail=f"{len(clock.notes)} calls were timed",
    ):
        return None
    a_first = [x is work_a for (x, _), _ in couples]
    failures.expect(
        abs(2 * sum(a_first) - count) <= 1, "each function has to go first in half of the pairs",
        detail=f"a went first in {sum(a_first)} of {count}",
    )  # fmt: skip
    ratios = sorted(dict(couple)[work_a] / dict(couple)[work_b] for couple in couples)
    speedup, low, high = _three(answer, failures)
    k = int(stats.median_ci(range(1, count + 1))[1])
    lower, upper = ratios[(count - 1) // 2], ratios[count // 2]
    least, most = math.sqrt(lower * upper), (lower + upper) / 2  # the geometric and the arithmetic mean
    failures.expect(
        least * (1 - 1e-9) <= speedup <= most * (1 + 1e-9),
        "the speed-up is the median over pairs of the time of a over the time of b (of an even number of pairs, "
        "the mean of the two middle ratios)",
    )
    failures.close(low, ratios[k - 1], "the lower end: the k-th of the sorted ratios, counted from the smallest")
    failures.close(high, ratios[-k], "the upper end: the k-th of the sorted ratios, counted from the largest")
    return a_first


class _Machine:
    """SIMULATED: the accelerator of the exercise, with any of its three habits; it computes nothing."""

    LAUNCH_S, INPUT_S, LOOK_UP_S = 1e-5, 5e-3, 1e-6

    def __init__(self, cost: dict[Callable, float], lazy: bool, remembers: bool, slows: bool) -> None:
        self._cost, self._lazy, self._remembers, self._slows = cost, lazy, remembers, slows
        self._host = self._done = 0.0
        self._results, self._launches = [], 0

    def now(self) -> float:
        return self._host

    def wait(self) -> None:
        self._host = max(self._host, self._done)

    def new_input(self) -> object:
        self._queue(self.INPUT_S)
        return object()

    def launch(self, fn: Callable, x: object) -> None:
        seen = self._remembers and any(fn is f and x is y for f, y in self._results)
        self._results.append((fn, x))
        self._launches += 1
        slowness = 1.02**self._launches if self._slows else 1.0
        self._queue(self.LOOK_UP_S if seen else self._cost[fn] * slowness)

    def _queue(self, seconds: float) -> None:
        self._host += self.LAUNCH_S
        self._done = max(self._host, self._done) + seconds
        if not self._lazy:
            self.wait()


MACHINES = {
    "that does nothing odd": (False, False, False),
    "that returns before the work is done": (True, False, False),
    "that remembers the results of inputs it has seen": (False, True, False),
    "that is 2 % slower at each launch": (False, False, True),
    "with all three habits": (True, True, True),
}


def repair(fn: Callable, failures: Failures) -> None:
    """repaired(machine, a, b) -> the speed-up of b over a.

    Half a per cent is allowed. A right answer needs less: the launch, 1e-5 s of at least 5e-3 s, is a fifth of that;
    pairs in balanced order leave the square of the 2 %.
    """
    for habit, switches in MACHINES.items():
        for truth in TRUTHS:
            machine = _Machine({work_a: 1e-2 * truth, work_b: 1e-2}, *switches)
            with failures.given(truth=truth):
                failures.close(fn(machine, work_a, work_b), truth, f"your speed-up is wrong on a machine {habit}",
                               rtol=5e-3)  # fmt: skip


def _three(answer: object, failures: Failures) -> tuple:
    failures.need(has_parts(answer, 3), "return three values: the speed-up, the low end and the high end")
    return tuple(answer)


CHECKS = {"00.1": harness, "00.2": rank, "00.3": pairs, "00.4": repair}

TRIES = {
    "00.1": f"{len(SCRIPTS)} lists of made-up intervals, some of them at the limit",
    "00.2": f"{len(COUNTS)} numbers of flips from 1 to {COUNTS[-1]}",
    "00.3": f"{len(PAIRS)} runs on a simulated clock with even and odd numbers of pairs, then too few for an interval",
    "00.4": f"{len(MACHINES)} simulated machines with {len(TRUTHS)} known speed-ups each",
}
