"""Honest timing: measure() one callable, compare() two, race() many, with intervals that hold on a machine in use.

Calls are paired and interleaved in balanced random order, so that drift hits both sides alike; short calls are repeated
as in torch.utils.benchmark. It never pools different processes, never drops a sample, and cannot tell a callable that
replays its last result from one that computes: give `check`. Two callables that do the same work on data of their own
differ by some per cent, because where data lies in memory is part of what is compared: build them anew, with `builds`.
"""

import contextlib
import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from labkit.errors import InputError, check_choice, check_number, check_whole
from labkit.timing import clocks, machine, stats
from labkit.timing.clocks import Call, Clock, Sample, Snapshot

CACHES = ("hot", "cold")
BLOCKS = 20  # fewer blocks of pairs get a warning; the width is not looked at before
LOOK_AGAIN = 1.5  # the next look at the width comes after this many times the blocks: each look costs some honesty
SAMPLES = 50  # samples between two looks of measure()
PRECISION = 0.01  # half-width at which measure() has enough; compare() goes to half of CLAIMABLE
LEAST_S = 0.25  # no run ends earlier unless its budget does: over less, the load by others cannot be judged
FAULTS = 0.2  # share of the time in page faults that is worth a warning
SETTLE_S = 0.01  # untimed after a switch between systems: the workers of the one before spin on for milliseconds
PLACEMENT = 0.10  # by so much two sides may differ because of where in memory the data of each lies
CLAIMABLE = 0.01  # differences below 1 % are never claimed: memory placement alone makes as much

Verdict = Literal["faster", "slower", "equivalent", "inconclusive"]


@dataclass(frozen=True)
class Measurement:
    """Times of one callable. `samples_s` holds seconds per call in run order, each the mean over `number` calls."""

    name: str
    samples_s: tuple[float, ...]
    number: int
    clock: str  # wall, cpu, cuda_event or injected
    cache: str  # hot or cold
    device: str
    threads: int
    warnings: tuple[str, ...] = ()
    roof_share: float | None = None  # bound over measured time, and what the bound is by; see labkit.roofline.placed
    limited_by: str | None = None

    @property
    def median_s(self) -> float:
        """Median seconds per call."""
        return stats.median_ci(self.samples_s)[0]

    @property
    def ci95_s(self) -> tuple[float, float]:
        """Exact 95 % interval of the median within this run; (0, inf) below six samples.

        Another process may settle elsewhere: to compare two callables use compare(), never two of these intervals.
        """
        _, lo, hi = stats.median_ci(self.samples_s)
        return max(0.0, lo), hi

    def percentile(self, q: float) -> float:
        """The q-th percentile (0 to 100) of the samples, in seconds per call; a tail is only seen with number = 1."""
        check_number(q, "q", 0, 100)
        return float(np.percentile(self.samples_s, q))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict: every sample, and under "result" the statistics for readers without labkit."""
        result = {"median_s": self.median_s, "ci95_s": _finite(self.ci95_s)}
        return {"kind": "measurement", **_plain(self), "result": result}

    def __str__(self) -> str:
        median, interval = _seconds(self.median_s, self.ci95_s)
        how = f"{_count(len(self.samples_s), 'sample')} of {_count(self.number, 'call')}, {_conditions(self)}"
        return f"{self.name} {median} [{interval}; {how}]{_roof(self)}{_warned(self.warnings)}"


@dataclass(frozen=True)
class Comparison:
    """Times of two callables taken in pairs: sample i of the baseline beside sample i of the candidate."""

    baseline: Measurement
    candidate: Measurement
    baseline_first: tuple[bool, ...]  # for each pair
    per_block: int  # the least of this many pairs in turn is one value
    foreign_cores: float | None = None  # mean load by other programs; None where it could not be judged
    warnings: tuple[str, ...] = ()
    pairs_per_build: tuple[int, ...] = ()  # empty: one build, and the interval is over blocks of pairs

    @property
    def speedup(self) -> float:
        """Baseline time over candidate time."""
        return self._ratio()[0]

    @property
    def ci95(self) -> tuple[float, float]:
        """Exact 95 % interval of the speed-up, over builds if there are several; (0, inf) below six blocks."""
        return self._ratio()[1:]

    @property
    def verdict(self) -> Verdict:
        """What the whole interval supports: more than 1 % on one side, within 1 % on both, or nothing."""
        lo, hi = self.ci95
        least = 1 + CLAIMABLE
        if lo > least:
            return "faster"
        if hi < 1 / least:
            return "slower"
        return "equivalent" if lo >= 1 / least and hi <= least else "inconclusive"

    @property
    def hint(self) -> str:
        """The likely cause of a claimed difference below PLACEMENT between sides that were built once; "" for none."""
        claimed = self.verdict in ("faster", "slower")
        if not claimed or self.pairs_per_build or abs(math.log(self.speedup)) > math.log1p(PLACEMENT):
            return ""
        return "data of each side's own may make this difference by where they lie in memory: compare with builds=8"

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """Those of the comparison, and those of its sides under their names."""
        sides = (self.baseline, self.candidate)
        return (*self.warnings, *(f"{side.name}: {warning}" for side in sides for warning in side.warnings))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict: every pair, and under "result" the statistics for readers without labkit."""
        result = {"speedup": self.speedup, "ci95": _finite(self.ci95), "verdict": self.verdict}
        sides = {"baseline": self.baseline.to_dict(), "candidate": self.candidate.to_dict()}
        return {"kind": "comparison", **_plain(self), **sides, "result": result}

    def __str__(self) -> str:
        lo, hi = self.ci95
        decimals = _decimals(self.speedup, (hi - lo) / 2)
        times = [f"{side.name} {_seconds(side.median_s, side.ci95_s)[0]}" for side in (self.baseline, self.candidate)]
        blocks = len(self.baseline_first) // self.per_block
        builds = f"{len(self.pairs_per_build)} builds, " if self.pairs_per_build else ""
        how = f"{builds}{_count(blocks, 'block')} of {_count(self.per_block, 'pair')}, {_conditions(self.baseline)}"
        ratio = f"{_number(self.speedup, decimals)}x [{_interval(lo, hi, decimals)}; {how}]"
        roof = _roof(self.baseline, self.candidate)
        hint = f" - hint: {self.hint}" if self.hint else ""
        return f"{' -> '.join(times)}: {ratio} {self.verdict}{roof}{_warned(self.all_warnings)}{hint}"

    def _ratio(self) -> stats.Estimate:
        times = self.baseline.samples_s, self.candidate.samples_s, self.per_block
        if self.pairs_per_build:
            return stats.ratio_over_builds(*times, self.pairs_per_build)
        return stats.paired_ratio(*times)


def measure(
    fn: Call,
    *,
    device: str | torch.device | None = None,
    budget_s: float = 1.0,
    name: str | None = None,
    cache: str = "hot",
    clock: Callable[[Call, int], float] | None = None,
) -> Measurement:
    """Time `fn()`, a callable without arguments, in inference mode with the garbage collector off.

    Ends when the median's interval is within 1 % (looked at every 50 samples, after a quarter of a second at least) or
    after `budget_s` seconds; warm-up may take half as much again. For code that needs gradients, open
    `torch.inference_mode(False)` inside fn.
    device: where the work runs; None asks the tensors that fn returns, and means the CPU where there are none.
    name: what the result is called; None takes the function's own name.
    cache: "hot" leaves the caches as the call before left them. "cold" empties them before each call, off the clock, as
        work between two calls does in a model that is larger than they are; on a CPU each call is then a sample.
    clock: clock(fn, number) -> seconds stands in for the real clocks, for simulations.
    Raises InputError for arguments that cannot be used and for work that is not done when fn returns; what fn raises
    passes through.
    """
    _check_arguments({"fn": fn}, budget_s, cache, clock)
    name = name or getattr(fn, "__name__", type(fn).__name__)
    target = None if device is None else machine.torch_device(device)
    with _garbage_collector_off() if clock is None else contextlib.nullcontext():
        output = clocks.first_call(fn)
        run = _clock(target or clocks.device_of(output), cache, clock)
        del output
        number = clocks.repeats(run, fn, *clocks.warm_up(run, [fn], budget_s))
        samples, moments, start = [], [clocks.snapshot(run.device)], run.now()
        while True:
            samples.append(run.sample(fn, number))
            elapsed = run.now() - start
            spent = elapsed >= budget_s
            if not spent and (len(samples) % SAMPLES or elapsed < LEAST_S):
                continue
            moments.append(clocks.snapshot(run.device))
            by_cpu = _cpu_time_is_better(run, moments, [samples])
            if spent or stats.half_width(*stats.median_ci([s[by_cpu] for s in samples])) <= PRECISION:
                break
    result = _measurement(name, run, samples, number, by_cpu)
    warnings = _machine_warnings(run, moments, by_cpu, [samples]) + _sample_warnings(result.samples_s)
    return replace(result, warnings=warnings + result.warnings)


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
    clock: Callable[[Call, int], float] | None = None,
    seed: int = 0,
) -> Comparison:
    """Time two callables without arguments in pairs, side by side in balanced random order, and judge their ratio.

    Ends when the interval is within 0.5 % (looked at from 20 blocks on), whatever it shows, or when the budget is
    spent. On one thread and with other programs at work the claim rests on CPU time.
    device, budget_s, cache, clock: as in measure().
    names: what the two are called in the printed line.
    check: check(baseline_output, candidate_output) runs before and after the timing, off the clock; if it returns False
        there is no comparison.
    builds: with a number, `baseline` and `candidate` are factories: each returns a callable with data of its own. Both
        are built that often, in balanced order, share the budget, and the interval is over the builds: use it wherever
        each side owns data, since where that lies in memory is part of what is timed. What a factory does is not timed.
    seed: of the order of the pairs and of the building.
    Raises InputError for arguments that cannot be used and for work that is not done when a call returns; what the
    callables raise passes through.
    """
    _check_arguments({"baseline": baseline, "candidate": candidate}, budget_s, cache, clock)
    check_whole(seed, "seed", 0)
    named = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
    if not named or len(names) != 2 or names[0] == names[1]:
        raise InputError(f"names must be two different names, for baseline and candidate, got {names!r}.")
    if check is not None and not callable(check):
        raise InputError(f"check must be a function (baseline_output, candidate_output) or None, got {check!r}.")
    if builds is not None and (not isinstance(builds, int) or isinstance(builds, bool) or builds < stats.LEAST):
        raise InputError(f"builds must be {stats.LEAST} or more, or None, got {builds!r}: fewer give no interval.")
    target = None if device is None else machine.torch_device(device)
    rng, budget_s = random.Random(seed), budget_s / (builds or 1)
    run, samples, firsts, moments, pairs = None, ([], []), [], [], []
    with _garbage_collector_off() if clock is None else contextlib.nullcontext():
        for calls in [(baseline, candidate)] if builds is None else _built(baseline, candidate, builds, rng):
            outputs = [clocks.first_call(call) for call in calls]
            _check_outputs(check, outputs, names)
            run = run or _clock(target or clocks.device_of(outputs[0]), cache, clock)
            del outputs
            least = clocks.warm_up(run, calls, budget_s)
            if not pairs:
                numbers = [clocks.repeats(run, call, seconds) for call, seconds in zip(calls, least, strict=True)]
                per_block = _per_block(run, least, numbers, budget_s)
            blocks = _blocks(run, calls, numbers, per_block, rng)
            order, sides, looks = _until_precise(run, blocks, per_block, budget_s, LEAST_S / (builds or 1))
            if check is not None:  # once more: timing must not have changed what they compute
                _check_outputs(check, [clocks.first_call(call) for call in calls], names)
            firsts, moments, pairs = firsts + order, moments + looks, [*pairs, len(order)]
            for so_far, new in zip(samples, sides, strict=True):
                so_far += new
            del calls, blocks  # the data of one build go before the next ones come
    by_cpu = _cpu_time_is_better(run, moments, samples)
    sides = [
        _measurement(name, run, of_side, number, by_cpu)
        for name, of_side, number in zip(names, samples, numbers, strict=True)
    ]
    warnings = _machine_warnings(run, moments, by_cpu, samples)
    if builds is None:
        warnings += _pair_warnings(*sides, per_block)
    foreign = _foreign_cores(run, moments)
    return Comparison(*sides, tuple(firsts), per_block, foreign, warnings, () if builds is None else tuple(pairs))


@dataclass(frozen=True)
class Race:
    """Times of several callables taken in turn: a round has a block of each, in random order."""

    sides: dict[str, Measurement]
    orders: tuple[tuple[str, ...], ...]  # of each round
    per_block: int  # samples in a block, of which the least counts
    foreign_cores: float | None = None
    warnings: tuple[str, ...] = ()  # of all; those of two of them are in `over`

    def over(self, baseline: str, candidate: str) -> Comparison:
        """Any two of them, paired round by round. Raises KeyError for a name that did not run."""
        pair = self.sides[baseline], self.sides[candidate]
        first = [order.index(baseline) < order.index(candidate) for order in self.orders for _ in range(self.per_block)]
        warnings = self.warnings + _pair_warnings(*pair, self.per_block)
        return Comparison(*pair, tuple(first), self.per_block, self.foreign_cores, warnings)


def race(
    calls: dict[str, Callable[[], Any]],
    *,
    device: str | torch.device | None = None,
    budget_s: float = 10.0,
    clock: Callable[[Call, int], float] | None = None,
    seed: int = 0,
) -> Race:
    """Time callables without arguments in rounds, so that any two can be compared although the machine drifts.

    Before its block of three samples each one runs untimed for a hundredth of a second: libraries let their threads
    spin for milliseconds after a call, on cores that the next one needs.
    calls: name -> callable; two at least.
    device, clock: as in measure(), with hot caches.
    budget_s: seconds for all of them; the round that spends it is the last.
    seed: of the order in each round.
    Raises InputError for arguments that cannot be used; what the callables raise passes through.
    """
    if not isinstance(calls, Mapping):
        raise InputError(f"calls is a {type(calls).__name__}, but it must be a dict from names to functions.")
    check_whole(seed, "seed", 0)
    _check_arguments(calls, budget_s, "hot", clock)
    if len(calls) < 2:
        raise InputError(f"a race takes two callables or more, got {len(calls)}: measure() times one.")
    rng, per_block, orders = random.Random(seed), 3, []
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    target = None if device is None else machine.torch_device(device)
    with _garbage_collector_off() if clock is None else contextlib.nullcontext():
        outputs = [clocks.first_call(call) for call in calls.values()]
        run = _clock(target or clocks.device_of(outputs[0]), "hot", clock)
        del outputs
        least = dict(zip(calls, clocks.warm_up(run, list(calls.values()), budget_s), strict=True))
        settle = {name: max(1, math.ceil(SETTLE_S / seconds)) for name, seconds in least.items()}
        numbers = {}
        for name, call in calls.items():
            run.block(call, settle[name])
            numbers[name] = clocks.repeats(run, call, least[name])
        moments, start = [clocks.snapshot(run.device)], run.now()
        while not orders or run.now() - start < budget_s:
            order = rng.sample(list(calls), len(calls))
            for name in order:
                run.block(calls[name], settle[name])
                samples[name] += [run.sample(calls[name], numbers[name]) for _ in range(per_block)]
            orders.append(tuple(order))
        moments.append(clocks.snapshot(run.device))
    sides = {name: _measurement(name, run, of_side, numbers[name], False) for name, of_side in samples.items()}
    warnings = _machine_warnings(run, moments, False, list(samples.values()))
    return Race(sides, tuple(orders), per_block, _foreign_cores(run, moments), warnings)


def _clock(device: torch.device | None, cache: str, injected: Callable[[Call, int], float] | None) -> Clock:
    device, evict = device or torch.device("cpu"), None
    if cache == "cold" and device.type != "cuda":
        evict = clocks.evictor(machine.fingerprint(device).last_level_cache)
    return clocks.choose(device, cache, injected, evict)


def _built(
    baseline: Callable[[], Call], candidate: Callable[[], Call], builds: int, rng: random.Random
) -> Iterator[tuple[Call, Call]]:
    """Both sides built anew; which is built first is balanced, since the allocator treats first and second unlike."""
    for baseline_first in itertools.islice(stats.balanced_order(rng, 2), builds):
        if baseline_first:
            calls = baseline(), candidate()
        else:
            calls = (candidate(), baseline())[::-1]
        for name, call in zip(("baseline", "candidate"), calls, strict=True):
            if not callable(call):
                raise InputError(
                    f"with builds, {name} must return a function without arguments, got {type(call).__name__}: "
                    "build the data in it, and return for example lambda: model(x)."
                )
        yield calls
        del calls
        gc.collect(1)  # what was built since the last time, where it hangs together in circles


def _per_block(run: Clock, least: Sequence[float], numbers: Sequence[int], budget_s: float) -> int:
    """Pairs in a block: as many, six at most, as leave time for 25 blocks. One on CUDA, where noise has two sides."""
    if run.device.type == "cuda":
        return 1
    pair_s = sum(number * seconds for number, seconds in zip(numbers, least, strict=True))
    pair_s += 0.75 * sum(least) if run.evict is None else 2 * run.evict_s
    return next((pairs for pairs in (6, 4, 2) if 1.25 * BLOCKS * pairs * pair_s <= budget_s), 1)


def _blocks(
    run: Clock, calls: Sequence[Call], numbers: Sequence[int], per_block: int, rng: random.Random
) -> Iterator[tuple[list[bool], tuple[list[Sample], list[Sample]]]]:
    """Time blocks of pairs for as long as they are asked for: who went first in each pair, and both sides' samples."""
    orders = stats.balanced_order(rng, per_block if per_block > 1 else stats.LEAST)
    while True:
        order = list(itertools.islice(orders, per_block))
        sides, last = ([], []), None
        for baseline_first in order:
            for side in (0, 1) if baseline_first else (1, 0):
                # the first call after a switch finds the other side's data in the cache: untimed
                if side != last and run.evict is None:
                    run.block(calls[side], 1)
                sides[side].append(run.sample(calls[side], numbers[side]))
                last = side
        yield order, sides


def _until_precise(
    run: Clock, blocks: Iterator, per_block: int, budget_s: float, least_s: float
) -> tuple[list[bool], tuple[list[Sample], list[Sample]], list[Snapshot]]:
    """Take blocks until the interval is narrow enough or the budget is spent, whatever the interval says."""
    samples, firsts, moments, start = ([], []), [], [clocks.snapshot(run.device)], run.now()
    look_at = BLOCKS
    for count, (order, sides) in enumerate(blocks, 1):
        firsts += order
        for so_far, new in zip(samples, sides, strict=True):
            so_far += new
        elapsed = run.now() - start
        spent = elapsed * (1 + 0.5 / count) >= budget_s  # another block would end half a block late
        if not spent and (count < look_at or elapsed < least_s):
            continue
        look_at = LOOK_AGAIN * count
        moments.append(clocks.snapshot(run.device))
        by_cpu = _cpu_time_is_better(run, moments, samples)
        ratio = stats.paired_ratio(*([sample[by_cpu] for sample in side] for side in samples), per_block)
        if spent or stats.half_width(*ratio) <= CLAIMABLE / 2:
            return firsts, samples, moments
    raise AssertionError("blocks never end")


@contextlib.contextmanager
def _garbage_collector_off() -> Iterator[None]:
    """Collect now, then keep the collector from running inside a timed call; its former state comes back."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _foreign_cores(run: Clock, moments: Sequence[Snapshot]) -> float | None:
    return None if run.name == "injected" else clocks.foreign_cores(moments[0], moments[-1])


def _cpu_time_is_better(run: Clock, moments: Sequence[Snapshot], sides: Sequence[Sequence[Sample]]) -> bool:
    """Whether the claim rests on CPU time: others compete for the cores, and the call is one thread's computing.

    With more threads CPU time also bills workers that spin; and a call that mostly sleeps or waits has next to none.
    """
    if run.other != "cpu" or run.device.type != "cpu" or torch.get_num_threads() != 1:
        return False
    if (_foreign_cores(run, moments) or 0.0) <= clocks.FOREIGN_CORES:
        return False
    shares = [statistics.median(cpu / wall for wall, cpu, _ in samples) for samples in sides]
    return time.get_clock_info("process_time").resolution <= 1e-5 and all(0.2 <= share <= 1.1 for share in shares)


def _measurement(name: str, run: Clock, samples: Sequence[Sample], number: int, by_cpu: bool) -> Measurement:
    """One side's result, with a warning where its calls spend their time in page faults."""
    seconds, warnings = tuple(sample[by_cpu] for sample in samples), []
    faults = statistics.fmean(sample[2] for sample in samples)
    if run.name == "wall" and faults and faults * clocks.fault_s() > FAULTS * statistics.fmean(seconds):
        warnings.append(f"{faults:.0f} page faults per call: memory is mapped anew each time; preallocate outputs")
    return Measurement(
        name=name,
        samples_s=seconds,
        number=number,
        clock=run.other if by_cpu else run.name,
        cache=run.cache,
        device=str(run.device),
        threads=torch.get_num_threads(),
        warnings=tuple(warnings),
    )


def _sample_warnings(seconds: Sequence[float]) -> tuple[str, ...]:
    """What the samples of one callable show: too few of them, or drift."""
    warnings = []
    if len(seconds) < BLOCKS:
        warnings.append(f"only {_count(len(seconds), 'sample')}, and {BLOCKS} are needed: raise budget_s")
    if (change := stats.drift(seconds)) is not None:
        warnings.append(f"speed drifted: {change:+.0%} time from the first half of the run to the second")
    return tuple(warnings)


def _machine_warnings(
    run: Clock, moments: Sequence[Snapshot], by_cpu: bool, sides: Sequence[Sequence[Sample]]
) -> tuple[str, ...]:
    """What disturbed the run from outside the callables, and work that the clock did not see."""
    warnings = []
    if (foreign := _foreign_cores(run, moments) or 0.0) > clocks.FOREIGN_CORES:
        remedy = "times are CPU time" if by_cpu else "the times may be off"
        warnings.append(f"other programs kept {foreign:.1f} cores busy: {remedy}")
    if (slowed := clocks.throttling(moments)) is not None:
        warnings.append(slowed)
    if run.other == "wall" and any(statistics.median(event / wall for event, wall, _ in side) < 0.5 for side in sides):
        warnings.append(
            "CUDA events saw under half of the wall time: work on another stream, or launches that lag behind"
        )
    return tuple(warnings)


def _pair_warnings(baseline: Measurement, candidate: Measurement, per_block: int) -> tuple[str, ...]:
    """What the pairs themselves show: too few of them, or drift."""
    a, b = (stats.block_minima(side.samples_s, per_block) for side in (baseline, candidate))
    warnings = []
    if len(a) < stats.LEAST:
        warnings.append(
            f"budget_s was spent after {_count(len(a), 'block')} of pairs, and an interval takes {stats.LEAST}: "
            "close other programs, or raise budget_s"
        )
    elif len(a) < BLOCKS:
        warnings.append(f"only {_count(len(a), 'block')} of pairs, and {BLOCKS} are needed: raise budget_s")
    if (change := stats.drift([math.sqrt(x * y) for x, y in zip(a, b, strict=True)])) is not None:
        warnings.append(
            f"speed drifted: {change:+.0%} time from the first half of the run to the second, alike for both"
        )
    return tuple(warnings)


# --- what is refused --------------------------------------------------------------------------------------------------


def _check_arguments(calls: Mapping[str, Any], budget_s: float, cache: str, clock: object) -> None:
    for name, call in calls.items():
        if not callable(call):
            raise InputError(
                f"{name} must be a function without arguments, got {type(call).__name__}: wrap the work, "
                f"for example {name}=lambda: model(x)."
            )
    clocks.check_budget(budget_s)
    check_choice(cache, CACHES, "cache")
    if clock is not None and not callable(clock):
        raise InputError(f"clock must be a function (fn, number) -> seconds or None, got {clock!r}.")


def _check_outputs(check: Callable[[Any, Any], Any] | None, outputs: Sequence[Any], names: Sequence[str]) -> None:
    same = check(*outputs) if check is not None else None
    if same is not None and not same:
        raise InputError(
            f"check says that {names[0]} and {names[1]} do not compute the same: make them equal before timing them."
        )


# --- printing: no digit that the interval does not support ------------------------------------------------------------


def _plain(result: Measurement | Comparison) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(result).items()}


def _finite(interval: tuple[float, float]) -> list[float] | None:
    return list(interval) if math.isfinite(interval[1]) else None


def _decimals(value: float, half_width: float) -> int:
    """The decimals to print: the last digit's rounding stays within the half-width. Two to four significant digits."""
    least = 1 - math.floor(math.log10(value))
    if not math.isfinite(half_width):
        return least
    supported = math.ceil(-math.log10(2 * half_width)) if half_width > 0 else least + 2
    return min(max(least, supported), least + 2)


def _number(value: float, decimals: int) -> str:
    return f"{round(value, decimals):.{max(0, decimals)}f}"


def _seconds(value: float, interval: tuple[float, float]) -> tuple[str, str]:
    """A time with its unit, and its interval in the same unit."""
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if value >= s), ("ns", 1e-9))
    lo, hi = (bound / scale for bound in interval)
    decimals = _decimals(value / scale, (hi - lo) / 2)
    return f"{_number(value / scale, decimals)} {unit}", _interval(lo, hi, decimals)


def _interval(lo: float, hi: float, decimals: int) -> str:
    return f"95% CI {_number(lo, decimals)}, {_number(hi, decimals)}" if math.isfinite(hi) else "no interval"


def _conditions(side: Measurement) -> str:
    threads = f", {_count(side.threads, 'thread')}" if side.device == "cpu" else ""
    return f"{side.clock} time, {side.cache}, {side.device}{threads}"


def _roof(*sides: Measurement) -> str:
    """The shares of the roof in words, "" where no work was stated."""
    if any(side.roof_share is None for side in sides):
        return ""
    shares = " and ".join(f"{100 * side.roof_share:.3g} %" for side in sides)
    limits = " and ".join(dict.fromkeys(side.limited_by for side in sides))
    return f", {shares} of the roof, limited by {limits}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _warned(warnings: Sequence[str]) -> str:
    return f" - warning: {'; '.join(warnings)}" if warnings else ""
