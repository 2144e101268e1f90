"""Time callables honestly: measure() a callable, compare() two, race() several (race.py), on a machine in use.

Calls are paired and interleaved in balanced random order, so that drift hits all sides alike; short calls are repeated,
as in torch.utils.benchmark. No sample is dropped, and samples of different processes are never pooled. An interval
holds within its run: another process settles at a speed of its own (processes.py compares in several). A callable that
replays its last result looks like a fast callable: give `check`. Two callables that do the same work on data of their
own differ by some per cent, because the place of the data in memory is part of the comparison: give `builds`.

>>> import torch
>>> from labkit import bench
>>> x, weight = torch.randn(512, 512), torch.randn(512, 512)
>>> def two_products():
...     return x @ weight @ weight
>>> def one_product():
...     return x @ weight
>>> result = bench.compare(two_products, one_product, names=("two products", "one product"), budget_s=0.5)
>>> print(result)  # doctest: +SKIP
two products 7.46 ms -> one product 3.73 ms: 2.00x [95% CI 1.99, 2.01 within this run; 20 blocks ...] faster
>>> result.speedup > 1
True
"""

import contextlib
import gc
import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from labkit.errors import InputError, check_choice, check_whole
from labkit.on_demand import names_on_demand
from labkit.timing import clocks, interference, stats
from labkit.timing.clocks import Call, Clock
from labkit.timing.fingerprint import fingerprint, torch_device
from labkit.timing.interference import Snapshot
from labkit.timing.results import (
    Comparison,
    Measurement,
    Verdict,
    measurement,
)
from labkit.timing.rounds import (
    BLOCKS,
    LEAST_S,
    PRECISION,
    SAMPLES,
    PreciseMedian,
    PreciseRatio,
    Samples,
    Turn,
    take_turns,
)

__all__ = [
    "BLOCKS",
    "LEAST_S",
    "PRECISION",
    "SAMPLES",
    "Comparison",
    "Measurement",
    "Verdict",
    "compare",
    "measure",
]

CACHES = ("hot", "cold")
PAIRS_PER_BLOCK = (6, 4, 2)  # on a CPU, the most that the budget allows, otherwise 1
SPARE = 1.25  # of the time for BLOCKS blocks

InjectedClock = Callable[[Call, int], float]  # (fn, number) -> seconds

__getattr__ = names_on_demand(__name__, dict.fromkeys(("Race", "race"), "labkit.timing.race"))


# --- one callable -----------------------------------------------------------------------------------------------------


def measure(
    fn: Call,
    *,
    device: str | torch.device | None = None,
    budget_s: float = 1.0,
    name: str | None = None,
    cache: str = "hot",
    clock: InjectedClock | None = None,
) -> Measurement:
    """Time `fn()`, a callable without arguments, in inference mode with the garbage collector off.

    The measurement ends when the median's interval is within 1 %, or after `budget_s` seconds. The interval is checked
    every 50 samples, after a quarter of a second at least. Warm-up may take half of the budget in addition. Code that
    needs gradients opens `torch.inference_mode(False)` inside `fn`.

    device: where the work runs; None takes the device of the tensors that `fn` returns, or the CPU without tensors.
    budget_s: seconds for the measurement.
    name: name of the result; None takes the function's own name.
    cache: "hot" leaves the caches as the previous call left them. "cold" empties them before each call, off the clock:
        a layer finds them so in a model larger than the caches. On a CPU each sample is then a single call.
    clock: clock(fn, number) -> seconds replaces the real clocks, for simulations.
    Raises InputError for unusable arguments and for work that is unfinished when `fn` returns. Errors of `fn` pass
    through.
    """
    from labkit.timing import doubts

    check_calls({"fn": fn})
    check_conditions(budget_s, cache, clock)
    name = name or getattr(fn, "__name__", type(fn).__name__)
    target = None if device is None else torch_device(device)
    with garbage_collector_off(clock):
        output = clocks.first_call(fn)
        chosen_clock = clock_for(target or clocks.device_of(output), cache, clock)
        del output
        (fastest_s,) = clocks.warm_up(chosen_clock, [fn], budget_s)
        number = clocks.repeats(chosen_clock, fn, fastest_s)
        rule = PreciseMedian(chosen_clock, budget_s)
        rounds = itertools.repeat([Turn(name, number)])
        samples = take_turns(chosen_clock, {name: fn}, rounds, rule)[name]
        result = measurement(name, chosen_clock, samples, number, rule.by_cpu)
        of_threads = doubts.thread_warnings(chosen_clock, fn, result.median_s, budget_s)
    warnings = interference.warnings(chosen_clock, rule.snapshots, rule.by_cpu, [samples])
    return replace(result, warnings=warnings + doubts.sample_warnings(result.samples_s) + result.warnings + of_threads)


# --- two callables ----------------------------------------------------------------------------------------------------


def compare(
    baseline: Callable[[], Any],
    candidate: Callable[[], Any],
    *,
    device: str | torch.device | None = None,
    budget_s: float = 2.0,
    names: Sequence[str] = ("baseline", "candidate"),
    check: Callable[[Any, Any], Any] | None = None,
    cache: str = "hot",
    builds: int | None = None,
    clock: InjectedClock | None = None,
    seed: int = 0,
) -> Comparison:
    """Time two callables without arguments in pairs, side by side in balanced random order, and judge the ratio.

    The comparison ends when the interval of the ratio is within 0.5 %, whatever the ratio, or when the budget is spent.
    The first look at the interval comes after 20 blocks of pairs. If torch has a single thread and other programs use
    the cores, the result is CPU time.

    device, budget_s, cache, clock: as in `measure`.
    names: names of baseline and candidate in the printed line.
    check: check(baseline_output, candidate_output) runs before and after the timing, off the clock; no comparison is
        made if `check` returns False.
    builds: number of times that the sides are built anew. `baseline` and `candidate` are then factories: each returns a
        callable with data of its own. All builds share the budget, and the interval is over the builds. Use `builds`
        wherever each side owns data, because the place of the data in memory is part of the timing. Building is not
        timed.
    seed: seed of the order of the pairs and of the building.
    Raises InputError for unusable arguments and for work that is unfinished when a call returns. Errors of the
    callables pass through.
    """
    check_calls({"baseline": baseline, "candidate": candidate})
    check_conditions(budget_s, cache, clock)
    _check_comparison(names, check, builds, seed)
    target = None if device is None else torch_device(device)
    pairs = _Pairs(
        names=tuple(names),
        check=check,
        budget_s=budget_s / (builds or 1),
        least_s=LEAST_S / (builds or 1),
        choose_clock=lambda output: clock_for(target or clocks.device_of(output), cache, clock),
        rng=random.Random(seed),
    )
    with garbage_collector_off(clock):
        if builds is None:
            pairs.time_build(baseline, candidate)
        else:
            for calls in _built(baseline, candidate, builds, pairs.rng):
                pairs.time_build(*calls)
                del calls  # the data of a build go before the data of the next build come
    return pairs.comparison(over_builds=builds is not None)


class _Pairs:
    """Time pairs of two callables, build after build, and keep all samples.

    names: names of baseline and candidate.
    check: as in `compare`.
    budget_s, least_s: seconds for the pairs of a build, and seconds before the first look at the interval.
    choose_clock: choose_clock(output of the baseline) -> clock.
    rng: draws the order of the pairs.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        check: Callable[[Any, Any], Any] | None,
        budget_s: float,
        least_s: float,
        choose_clock: Callable[[Any], Clock],
        rng: random.Random,
    ) -> None:
        self.names = names
        self.check = check
        self.budget_s = budget_s
        self.least_s = least_s
        self.choose_clock = choose_clock
        self.rng = rng
        # settled by the first build
        self.clock: Clock | None = None
        self.numbers: dict[str, int] = {}  # calls in a sample
        self.per_block = 1  # pairs in a block
        self.of_threads: dict[str, tuple[str, ...]] = {}  # warnings by side
        # of all builds
        self.samples: Samples = {name: [] for name in names}
        self.baseline_first: list[bool] = []  # the order of each pair
        self.snapshots: list[Snapshot] = []
        self.pairs_per_build: list[int] = []

    def time_build(self, baseline: Call, candidate: Call) -> None:
        """Time pairs of two callables until the stopping rule `PreciseRatio` ends the comparison."""
        from labkit.timing import doubts

        calls = dict(zip(self.names, (baseline, candidate), strict=True))
        outputs = self._checked_outputs(calls)
        if self.clock is None:
            self.clock = self.choose_clock(outputs[0])
        del outputs
        fastest_s = clocks.warm_up(self.clock, list(calls.values()), self.budget_s)
        if not self.numbers:
            self._settle(calls, fastest_s)
        pairs_before = len(self.baseline_first)
        rule = PreciseRatio(self.clock, self.budget_s, self.per_block, self.least_s)
        samples = take_turns(self.clock, calls, self._blocks(), rule)
        if self.check is not None:
            self._checked_outputs(calls)  # timing must not have changed the results
        for name, of_side in samples.items():
            self.samples[name] += of_side
            if not pairs_before:
                median_s = statistics.median(sample.seconds for sample in of_side)
                self.of_threads[name] = doubts.thread_warnings(self.clock, calls[name], median_s, self.budget_s)
        self.snapshots += rule.snapshots
        self.pairs_per_build.append(len(self.baseline_first) - pairs_before)

    def comparison(self, over_builds: bool) -> Comparison:
        """Make the result from the samples of all builds."""
        from labkit.timing import doubts

        sides = list(self.samples.values())
        by_cpu = interference.cpu_time_is_better(self.clock, self.snapshots, sides)
        both = []
        for name, samples in self.samples.items():
            side = measurement(name, self.clock, samples, self.numbers[name], by_cpu)
            doubted = side.warnings + self.of_threads[name]
            both.append(replace(side, warnings=doubted, per_block=self.per_block))
        baseline, candidate = both
        warnings = interference.warnings(self.clock, self.snapshots, by_cpu, sides)
        if not over_builds:
            warnings += doubts.pair_warnings(baseline, candidate, self.per_block)
        return Comparison(
            baseline=baseline,
            candidate=candidate,
            baseline_first=tuple(self.baseline_first),
            per_block=self.per_block,
            foreign_cores=interference.foreign_load(self.clock, self.snapshots),
            warnings=warnings,
            pairs_per_build=tuple(self.pairs_per_build) if over_builds else (),
        )

    def _checked_outputs(self, calls: Mapping[str, Call]) -> list[Any]:
        """Call each side once and return the outputs; raise InputError if `check` says that the outputs differ."""
        outputs = [clocks.first_call(call) for call in calls.values()]
        are_equal = self.check(*outputs) if self.check is not None else None
        if are_equal is not None and not are_equal:
            raise InputError(
                f"check says that {self.names[0]} and {self.names[1]} do not compute the same: "
                "make them equal before timing them."
            )
        return outputs

    def _settle(self, calls: Mapping[str, Call], fastest_s: Sequence[float]) -> None:
        """Settle how many calls make a sample, and how many pairs make a block, from the fastest time of each call."""
        for (name, call), seconds in zip(calls.items(), fastest_s, strict=True):
            self.numbers[name] = clocks.repeats(self.clock, call, seconds)
        if self.clock.device.type == "cuda":
            return  # blocks of a single pair: noise on a GPU has two sides, and the least of several is no better
        pair_s = 0.0
        for number, seconds in zip(self.numbers.values(), fastest_s, strict=True):
            pair_s += number * seconds
        # beside the samples, a pair takes 1.5 untimed calls on average, or two evictions of the caches
        pair_s += 0.75 * sum(fastest_s) if self.clock.evict is None else 2 * self.clock.evict_s
        for pairs in PAIRS_PER_BLOCK:
            if SPARE * BLOCKS * pairs * pair_s <= self.budget_s:
                self.per_block = pairs
                return

    def _blocks(self) -> Iterator[list[Turn]]:
        """Draw blocks of pairs without end, and note the order of each pair in `baseline_first`."""
        group = self.per_block if self.per_block > 1 else stats.LEAST
        orders = stats.balanced_order(self.rng, group)
        while True:
            block = list(itertools.islice(orders, self.per_block))
            self.baseline_first += block
            yield self._turns(block)

    def _turns(self, block: Sequence[bool]) -> list[Turn]:
        baseline, candidate = self.names
        names: list[str] = []
        for is_baseline_first in block:
            names += [baseline, candidate] if is_baseline_first else [candidate, baseline]
        turns = []
        for previous, name in zip([None, *names], names, strict=False):
            # the first call after a switch finds the other side's data in the cache: untimed
            untimed = 1 if name != previous and self.clock.evict is None else 0
            turns.append(Turn(name, self.numbers[name], untimed))
        return turns


def _built(
    baseline: Callable[[], Call], candidate: Callable[[], Call], builds: int, rng: random.Random
) -> Iterator[tuple[Call, Call]]:
    """Build both sides anew, `builds` times, in balanced order: an allocator treats first and second differently."""
    for is_baseline_first in itertools.islice(stats.balanced_order(rng, 2), builds):
        if is_baseline_first:
            calls = baseline(), candidate()
        else:
            second = candidate()
            calls = baseline(), second
            del second
        for name, call in zip(("baseline", "candidate"), calls, strict=True):
            if not callable(call):
                raise InputError(
                    f"with builds, {name} must return a function without arguments, got {type(call).__name__}: "
                    "build the data in it, and return for example lambda: model(x)."
                )
        del call  # else the data of this build would lie beside the data of the next
        yield calls
        del calls
        gc.collect(1)  # frees objects of the build that refer to each other in circles


# --- conditions of a measurement --------------------------------------------------------------------------------------


def clock_for(device: torch.device | None, cache: str, injected: InjectedClock | None) -> Clock:
    device = device or torch.device("cpu")
    evict = None
    if cache == "cold" and device.type != "cuda":
        evict = clocks.evictor(fingerprint(device).last_level_cache)
    return clocks.choose(device, cache, injected, evict)


@contextlib.contextmanager
def garbage_collector_off(injected: InjectedClock | None) -> Iterator[None]:
    """Collect garbage now, then keep the collector out of timed calls; with an injected clock, do nothing."""
    if injected is not None:
        yield
        return
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def check_calls(calls: Mapping[str, Any]) -> None:
    for name, call in calls.items():
        if not callable(call):
            raise InputError(
                f"{name} must be a function without arguments, got {type(call).__name__}: wrap the work, "
                f"for example {name}=lambda: model(x)."
            )


def check_conditions(budget_s: float, cache: str, clock: object) -> None:
    clocks.check_budget(budget_s)
    check_choice(cache, CACHES, "cache")
    if clock is not None and not callable(clock):
        raise InputError(f"clock must be a function (fn, number) -> seconds or None, got {clock!r}.")


def _check_comparison(names: Sequence[str], check: object, builds: int | None, seed: int) -> None:
    check_whole(seed, "seed", 0)
    are_names = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
    if not are_names or len(names) != 2 or names[0] == names[1]:
        raise InputError(f"names must be two different names, for baseline and candidate, got {names!r}.")
    if check is not None and not callable(check):
        raise InputError(f"check must be a function (baseline_output, candidate_output) or None, got {check!r}.")
    is_number = isinstance(builds, int) and not isinstance(builds, bool)
    if builds is not None and (not is_number or builds < stats.LEAST):
        raise InputError(f"builds must be {stats.LEAST} or more, or None, got {builds!r}: fewer give no interval.")
