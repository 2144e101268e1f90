"""Timing in rounds: the loop that times calls, and the rules that end a measurement.

In a round, callables take turns. `bench.measure` times rounds of a single callable, `bench.compare` and `bench.race`
time rounds of several in random order, and `ceilings.py` times the products and streams of a machine.
"""

import itertools
import math
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from labkit.timing import interference, stats
from labkit.timing.clocks import Call, Clock, Sample
from labkit.timing.interference import Snapshot

BLOCKS = 20  # fewer blocks of pairs get a warning; no interval is looked at before
LOOK_AGAIN = 1.5  # a next look at the interval comes after this many times the blocks: each look costs some honesty
SAMPLES = 50  # samples between two looks of measure()
PRECISION = 0.01  # half-width of the interval, relative to the median, at which measure() ends
LEAST_S = 0.25  # shortest run within the budget: over less time, the load by other programs cannot be judged
CLAIMABLE = 0.01  # smaller differences are never claimed: memory placement alone makes as much

Samples = dict[Hashable, list[Sample]]  # by the name of the callable, in run order


class Turn(NamedTuple):
    """A turn of a callable: `untimed` calls, then a sample of `number` calls."""

    name: Hashable
    number: int = 1
    untimed: int = 0


Rounds = Iterable[Sequence[Turn]]


class StoppingRule(Protocol):
    """Decides when a measurement ends."""

    def look(self, number: int, elapsed_s: float, samples: Samples) -> bool:
        """Look at a measurement after a round, and return True to end it.

        number: the number of rounds so far.
        elapsed_s: seconds since the first round began.
        samples: the samples of each callable so far.
        """


def take_turns(
    clock: Clock,
    calls: Mapping[Hashable, Call],
    rounds: Rounds,
    stopping_rule: StoppingRule,
) -> Samples:
    """Time callables in rounds until a stopping rule ends the measurement.

    calls: callables without arguments, by name.
    rounds: turns of each round, in order; an endless iterable.
    stopping_rule: looks at the measurement after each round, and decides whether it ends.
    Returns the samples of each callable.
    """
    samples: Samples = {name: [] for name in calls}
    start = clock.now()
    for number, turns in enumerate(rounds, start=1):
        for turn in turns:
            call = calls[turn.name]
            if turn.untimed:
                clock.block(call, turn.untimed)
            samples[turn.name].append(clock.sample(call, turn.number))
        if stopping_rule.look(number, clock.now() - start, samples):
            return samples
    raise AssertionError("the rounds ended before the measurement was over")


def fastest_s(call: Call, clock: Clock, rounds: int) -> float:
    """Return the seconds of the fastest of `rounds` single calls, after an untimed call."""
    clock.block(call, 1)
    turns = itertools.repeat([Turn("call")])
    samples = take_turns(clock, {"call": call}, turns, EnoughRounds(rounds))
    return min(sample.seconds for sample in samples["call"])


# --- stopping rules ---------------------------------------------------------------------------------------------------


class EnoughRounds:
    """End a measurement after `rounds` rounds, and not before `deadline`, in seconds of `time.perf_counter`."""

    def __init__(self, rounds: int, deadline: float = -math.inf) -> None:
        self.rounds = rounds
        self.deadline = deadline

    def look(self, number: int, elapsed_s: float, samples: Samples) -> bool:
        return number >= self.rounds and time.perf_counter() >= self.deadline


class SpentBudget:
    """End a measurement with the round that spends the budget of `budget_s` seconds.

    snapshots: counters of the machine at the beginning and at the end of the measurement.
    """

    def __init__(self, clock: Clock, budget_s: float) -> None:
        self.clock = clock
        self.budget_s = budget_s
        self.snapshots: list[Snapshot] = [interference.snapshot(clock.device)]

    def look(self, number: int, elapsed_s: float, samples: Samples) -> bool:
        if elapsed_s < self.budget_s:
            return False
        self.take_snapshot()
        return True

    def take_snapshot(self) -> None:
        self.snapshots.append(interference.snapshot(self.clock.device))


class PreciseMedian(SpentBudget):
    """End a measurement when the median's interval is within PRECISION, or the budget is spent.

    The interval is looked at every SAMPLES samples, after LEAST_S seconds at least.
    by_cpu: True if the last look was at CPU time.
    """

    def __init__(self, clock: Clock, budget_s: float) -> None:
        super().__init__(clock, budget_s)
        self.by_cpu = False

    def look(self, number: int, elapsed_s: float, samples: Samples) -> bool:
        is_spent = elapsed_s >= self.budget_s
        is_time_to_look = number % SAMPLES == 0 and elapsed_s >= LEAST_S
        if not is_spent and not is_time_to_look:
            return False
        self.take_snapshot()
        (of_call,) = samples.values()
        self.by_cpu = interference.cpu_time_is_better(self.clock, self.snapshots, [of_call])
        median = stats.median_ci(_seconds(of_call, self.by_cpu))
        return is_spent or stats.half_width(*median) <= PRECISION


class PreciseRatio(SpentBudget):
    """End a comparison when the interval of the ratio is within half of CLAIMABLE, or the budget is spent.

    The value of the ratio plays no part: ending on a significant ratio would be optional stopping.

    per_block: pairs in a round.
    least_s: seconds before the first look at the interval.
    """

    def __init__(self, clock: Clock, budget_s: float, per_block: int, least_s: float) -> None:
        super().__init__(clock, budget_s)
        self.per_block = per_block
        self.least_s = least_s
        self.look_at = BLOCKS

    def look(self, number: int, elapsed_s: float, samples: Samples) -> bool:
        half_a_round = 0.5 / number  # in parts of the elapsed time: a further round would end half a round late
        is_spent = elapsed_s * (1 + half_a_round) >= self.budget_s
        is_time_to_look = number >= self.look_at and elapsed_s >= self.least_s
        if not is_spent and not is_time_to_look:
            return False
        self.look_at = LOOK_AGAIN * number
        self.take_snapshot()
        sides = list(samples.values())
        by_cpu = interference.cpu_time_is_better(self.clock, self.snapshots, sides)
        baseline_s, candidate_s = (_seconds(side, by_cpu) for side in sides)
        ratio = stats.paired_ratio(baseline_s, candidate_s, self.per_block)
        return is_spent or stats.half_width(*ratio) <= CLAIMABLE / 2


def _seconds(samples: Sequence[Sample], by_cpu: bool) -> list[float]:
    return [sample.by(by_cpu) for sample in samples]
