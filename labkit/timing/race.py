"""Time several callables in turns: `labkit.bench.race`, imported on first use.

>>> import torch
>>> from labkit import bench
>>> x = torch.randn(256, 256)
>>> finish = bench.race({"product": lambda: x @ x, "sum": lambda: x + x, "copy": x.clone}, budget_s=0.3)
>>> finish.over("product", "copy").verdict  # doctest: +SKIP
'faster'
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from labkit.errors import InputError, check_whole
from labkit.timing import bench, clocks, interference
from labkit.timing.clocks import Call, Clock
from labkit.timing.doubts import pair_warnings
from labkit.timing.fingerprint import torch_device
from labkit.timing.results import Comparison, Measurement, measurement
from labkit.timing.rounds import SpentBudget, Turn, take_turns

SAMPLES_PER_ROUND = 3  # of each callable in a race, of which the least counts
SETTLE_S = 0.01  # untimed after a switch in a race: the workers of the callable before spin on for milliseconds


@dataclass(frozen=True)
class Race:
    """Times of several callables, taken in rounds: each callable has a block of samples in each round.

    sides: the measurement of each callable, by name.
    orders: order of the names in each round.
    per_block: samples in a block, of which the least counts.
    foreign_cores: as in `Comparison`.
    warnings: warnings about the whole race; `over` adds the warnings about a pair.
    processes: the race in other processes; values are then medians over all processes, and intervals their range.
    """

    sides: dict[str, Measurement]
    orders: tuple[tuple[str, ...], ...]
    per_block: int
    foreign_cores: float | None = None
    warnings: tuple[str, ...] = ()
    processes: "tuple[Race, ...]" = ()

    def over(self, baseline: str, candidate: str) -> Comparison:
        """Compare two callables of the race by their names, paired round by round; KeyError for an unknown name."""
        pair = self.sides[baseline], self.sides[candidate]
        baseline_first = []
        for order in self.orders:
            is_first = order.index(baseline) < order.index(candidate)
            baseline_first += [is_first] * self.per_block
        warnings = self.warnings + pair_warnings(*pair, self.per_block)
        comparison = Comparison(*pair, tuple(baseline_first), self.per_block, self.foreign_cores, warnings)
        elsewhere = [race for race in self.processes if baseline in race.sides and candidate in race.sides]
        if not elsewhere or len(elsewhere) < len(self.processes):
            return comparison
        return comparison.over_processes([race.over(baseline, candidate) for race in elsewhere])

    def over_processes(self, others: "Sequence[Race]") -> "Race":
        """Return the race with the medians and ranges over processes, for each callable that all processes timed.

        others: the same race in other processes.
        """
        sides = dict(self.sides)
        for name, side in self.sides.items():
            elsewhere = [race.sides[name] for race in others if name in race.sides]
            if len(elsewhere) == len(others):
                sides[name] = side.over_processes(elsewhere)
        return replace(self, sides=sides, processes=tuple(others))


def race(
    calls: dict[str, Callable[[], Any]],
    *,
    device: str | torch.device | None = None,
    budget_s: float = 10.0,
    clock: bench.InjectedClock | None = None,
    seed: int = 0,
) -> Race:
    """Time several callables without arguments in rounds, so that any two can be compared although the machine drifts.

    In each round every callable has a block of three samples, in random order. Before its block a callable runs untimed
    for a hundredth of a second: libraries let their threads spin for milliseconds after a call, on cores that the next
    callable needs.

    calls: name -> callable; two callables at least.
    device, clock: as in `measure`, with hot caches.
    budget_s: seconds for all callables; the race ends with the round that spends the budget.
    seed: seed of the order in each round.
    Raises InputError for unusable arguments. Errors of the callables pass through.
    """
    if not isinstance(calls, Mapping):
        raise InputError(f"calls is a {type(calls).__name__}, but it must be a dict from names to functions.")
    check_whole(seed, "seed", 0)
    bench.check_calls(calls)
    bench.check_conditions(budget_s, "hot", clock)
    if len(calls) < 2:
        raise InputError(f"a race takes two callables or more, got {len(calls)}: measure() times one.")
    target = None if device is None else torch_device(device)
    with bench.garbage_collector_off(clock):
        outputs = [clocks.first_call(call) for call in calls.values()]
        chosen_clock = bench.clock_for(target or clocks.device_of(outputs[0]), "hot", clock)
        del outputs
        fastest_s = clocks.warm_up(chosen_clock, list(calls.values()), budget_s)
        blocks = {}
        for (name, call), seconds in zip(calls.items(), fastest_s, strict=True):
            blocks[name] = _block(chosen_clock, name, call, seconds)
        rule = SpentBudget(chosen_clock, budget_s)
        rounds = _ShuffledRounds(blocks, random.Random(seed))
        samples = take_turns(chosen_clock, calls, rounds, rule)
    sides = {}
    for name, of_side in samples.items():
        side = measurement(name, chosen_clock, of_side, blocks[name][0].number, by_cpu=False)
        sides[name] = replace(side, per_block=SAMPLES_PER_ROUND)
    return Race(
        sides=sides,
        orders=tuple(rounds.orders),
        per_block=SAMPLES_PER_ROUND,
        foreign_cores=interference.foreign_load(chosen_clock, rule.snapshots),
        warnings=interference.warnings(chosen_clock, rule.snapshots, False, list(samples.values())),
    )


def _block(clock: Clock, name: str, call: Call, fastest_s: float) -> list[Turn]:
    """Plan the turns of a callable in a round of a race: untimed calls for SETTLE_S, then the samples."""
    settling_calls = max(1, math.ceil(SETTLE_S / fastest_s))
    clock.block(call, settling_calls)
    number = clocks.repeats(clock, call, fastest_s)
    first = Turn(name, number, untimed=settling_calls)
    return [first] + [Turn(name, number)] * (SAMPLES_PER_ROUND - 1)


class _ShuffledRounds:
    """Rounds without end, each with the blocks of all callables in random order.

    blocks: {name of a callable: turns of its block}.
    rng: draws the order of each round.
    `orders` lists the orders so far, each a tuple of names.
    """

    def __init__(self, blocks: Mapping[str, list[Turn]], rng: random.Random) -> None:
        self.blocks = blocks
        self.rng = rng
        self.orders: list[tuple[str, ...]] = []

    def __iter__(self) -> Iterator[list[Turn]]:
        while True:
            order = self.rng.sample(list(self.blocks), len(self.blocks))
            self.orders.append(tuple(order))
            yield list(itertools.chain.from_iterable(self.blocks[name] for name in order))
