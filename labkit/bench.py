"""Honest timing: measure() one callable, compare() two of them, with an interval that holds on a machine in use.

Pairs interleaved in balanced random order follow duet benchmarking (Bulej et al. 2020), repeats of short calls
torch.utils.benchmark. It never pools different processes, never drops a sample, and cannot tell a callable that replays
its last result from one that computes: give `check` and `ceiling`.
"""

import contextlib
import functools
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from labkit import clocks, environment, stats
from labkit.clocks import Call, Clock, Sample
from labkit.errors import InputError
from labkit.measurement import Comparison, Measurement

CACHES = ("hot", "cold")
BLOCKS = 20  # fewer blocks of pairs get a warning; the width is not looked at before
LOOK_AGAIN = 1.5  # the next look at the width comes after this many times the blocks: each look costs some honesty
SAMPLES = 50  # samples between two looks of measure()
PRECISION = 0.01  # half-width at which measure() has enough; compare() goes to half its min_effect
LEAST_S = 0.25  # no run ends earlier unless its budget does: over less the load by others cannot be judged
FOREIGN_CORES = 0.15
CLAIMABLE = 0.01  # differences below 1 % are never claimed: memory placement alone makes as much

Sides = tuple[list[Sample], list[Sample]]


def measure(
    fn: Call,
    *,
    device: str | torch.device | None = None,
    budget_s: float = 1.0,
    name: str | None = None,
    cache: str = "hot",
    graph: bool = False,
    clock: Callable[[Call, int], float] | None = None,
) -> Measurement:
    """Time `fn()`, a callable without arguments, in inference mode with the garbage collector off.

    Ends when the median's interval is within 1 % (looked at every 50 samples, after a quarter of a second at least) or
    after `budget_s` seconds; warm-up may take half as much again. device: where the work runs; None asks the tensors
    that fn returns, and means the CPU where there are none. cache: "hot", or on CUDA "cold": twice the L2 is written
    over before each call. graph: replay fn as a CUDA graph, free of launch costs. clock(fn, number) -> seconds stands
    in for the real clocks, for simulations. For code that needs gradients, open `torch.inference_mode(False)` inside
    fn. Raises InputError for arguments that cannot be used; what fn raises passes through.
    """
    _check_arguments({"fn": fn}, clock, budget_s, cache)
    name = _check_name(getattr(fn, "__name__", type(fn).__name__) if name is None else name)
    target = _device(device, cache, graph)
    with environment.garbage_collector_off() if clock is None else contextlib.nullcontext():
        output, first_s = clocks.first_call(fn)
        run = clocks.choose(target or clocks.device_of(output) or torch.device("cpu"), cache, graph, clock)
        del output
        call = run.prepare(fn)
        number = clocks.repeats(run, call, *clocks.warm_up(run, [call], budget_s))
        samples, moments, start = [], [environment.snapshot(run.device)], run.now()
        while True:
            samples.append(run.sample(call, number))
            elapsed = run.now() - start
            spent = elapsed >= budget_s
            if not spent and (len(samples) % SAMPLES or elapsed < LEAST_S):
                continue
            moments.append(environment.snapshot(run.device))
            by_cpu = _cpu_time_is_better(run, moments, [samples])
            if spent or stats.half_width(*stats.median_ci([s[by_cpu] for s in samples])) <= PRECISION:
                break
    shared = _machine_warnings(run, moments, by_cpu, [samples])
    return _measurement(name, run, samples, number, first_s, by_cpu, shared)


def compare(
    baseline: Call,
    candidate: Call,
    *,
    device: str | torch.device | None = None,
    budget_s: float = 2.0,
    names: Sequence[str] = ("baseline", "candidate"),
    check: Callable[[Any, Any], Any] | None = None,
    fresh: bool = False,
    cache: str = "hot",
    graph: bool = False,
    min_effect: float = CLAIMABLE,
    ceiling: float | None = None,
    clock: Callable[[Call, int], float] | None = None,
    seed: int = 0,
) -> Comparison:
    """Time two callables without arguments in pairs, side by side in balanced random order, and judge their ratio.

    Ends when the interval is within half of min_effect (looked at from 20 blocks on), whatever it shows, or when the
    budget is spent. On one thread and with other programs at work the claim rests on CPU time.
    device, budget_s, cache, graph, clock: as in measure(). check(baseline_output, candidate_output): runs before and
    after the timing, off the clock; if it returns False there is no comparison. fresh: both arguments are factories,
    called anew for every block of pairs, which averages over where the data happens to lie in memory (for kernels).
    min_effect: the smallest difference worth a claim, at least 0.01. ceiling: the largest speed-up that can be, such as
    the ratio of two roofline bounds; an interval above it is refused: verdict "inconclusive" and a warning. Raises
    InputError for arguments that cannot be used; what the callables raise passes through.
    """
    _check_arguments({"baseline": baseline, "candidate": candidate}, clock, budget_s, cache)
    _check_comparison(names, check, min_effect, ceiling)
    target, makers = _device(device, cache, graph), (baseline, candidate)
    with environment.garbage_collector_off() if clock is None else contextlib.nullcontext():
        start = time.perf_counter()
        calls = [make() for make in makers] if fresh else makers
        build_s = time.perf_counter() - start
        (output, first_a), (other_output, first_b) = (clocks.first_call(call) for call in calls)
        run = clocks.choose(target or clocks.device_of(output) or torch.device("cpu"), cache, graph, clock)
        _check_outputs(check, output, other_output, names)
        del output, other_output
        timed = [run.prepare(call) for call in calls]
        least = clocks.warm_up(run, timed, budget_s)
        numbers = [clocks.repeats(run, call, seconds) for call, seconds in zip(timed, least, strict=True)]
        per_block = _per_block(run, least, numbers, build_s if fresh else 0.0, budget_s)
        rebuild = functools.partial(_rebuild, run, makers) if fresh else None
        blocks = _blocks(run, timed, numbers, per_block, rebuild, seed)
        samples, firsts, moments, by_cpu = _until_precise(run, blocks, per_block, budget_s, min_effect / 2)
        if check is not None:  # once more: timing must not have changed what they compute
            _check_outputs(check, clocks.first_call(calls[0])[0], clocks.first_call(calls[1])[0], names)
    sides = [
        _measurement(name, run, of_side, number, first_s, by_cpu)
        for name, of_side, number, first_s in zip(names, samples, numbers, (first_a, first_b), strict=True)
    ]
    foreign = _foreign_cores(run, moments)
    result = Comparison(*sides, tuple(firsts), per_block, min_effect, ceiling, fresh, foreign)
    return replace(result, warnings=_machine_warnings(run, moments, by_cpu, samples) + _pair_warnings(result))


def _per_block(run: Clock, least: Sequence[float], numbers: Sequence[int], build_s: float, budget_s: float) -> int:
    """Pairs in a block: as many, six at most, as leave time for 25 blocks. One on CUDA, where noise has two sides."""
    if run.device.type == "cuda":
        return 1
    pair_s = sum(number * seconds for number, seconds in zip(numbers, least, strict=True)) + 0.75 * sum(least)
    return next((pairs for pairs in (6, 4, 2) if 1.25 * BLOCKS * (build_s + pairs * pair_s) <= budget_s), 1)


def _blocks(
    run: Clock,
    calls: Sequence[Call],
    numbers: Sequence[int],
    per_block: int,
    rebuild: Callable[[bool], Sequence[Call]] | None,
    seed: int,
) -> Iterator[tuple[list[bool], Sides]]:
    """Time blocks of pairs for as long as they are asked for: who went first in each pair, and both sides' samples."""
    orders = stats.balanced_order(random.Random(seed), per_block if per_block > 1 else stats.LEAST)
    for block in itertools.count():
        order = list(itertools.islice(orders, per_block))
        if rebuild is not None and block > 0:
            calls = rebuild(order[0])
        sides, last = ([], []), None
        for baseline_first in order:
            for side in (0, 1) if baseline_first else (1, 0):
                if side != last:  # the first call after a switch finds the other side's data in the cache: untimed
                    run.block(calls[side], 1)
                sides[side].append(run.sample(calls[side], numbers[side]))
                last = side
        yield order, sides


def _rebuild(run: Clock, makers: Sequence[Call], baseline_first: bool) -> list[Call]:
    """New copies of both, each called once. The old ones still live meanwhile, so that the new ones lie elsewhere."""
    turn = 1 if baseline_first else -1
    calls = [run.prepare(make()) for make in makers[::turn]][::turn]
    for call in calls:
        run.block(call, 1)
    return calls


def _until_precise(
    run: Clock, blocks: Iterator[tuple[list[bool], Sides]], per_block: int, budget_s: float, width: float
) -> tuple[Sides, list[bool], list[environment.Snapshot], bool]:
    """Take blocks until the interval's half-width is `width` or the budget is spent, whatever the interval says."""
    samples, firsts, moments, start = ([], []), [], [environment.snapshot(run.device)], run.now()
    look_at = BLOCKS
    for count, (order, sides) in enumerate(blocks, 1):
        firsts += order
        for so_far, new in zip(samples, sides, strict=True):
            so_far += new
        elapsed = run.now() - start
        spent = elapsed * (1 + 0.5 / count) >= budget_s  # another block would end half a block late
        if not spent and (count < look_at or elapsed < LEAST_S):
            continue
        look_at = LOOK_AGAIN * count
        moments.append(environment.snapshot(run.device))
        by_cpu = _cpu_time_is_better(run, moments, samples)
        ratio = stats.paired_ratio(*([sample[by_cpu] for sample in side] for side in samples), per_block)
        if spent or stats.half_width(*ratio) <= width:
            return samples, firsts, moments, by_cpu
    raise AssertionError("blocks never end")


def _foreign_cores(run: Clock, moments: Sequence[environment.Snapshot]) -> float | None:
    return None if run.name == "injected" else environment.foreign_cores(moments[0], moments[-1])


def _cpu_time_is_better(run: Clock, moments: Sequence[environment.Snapshot], sides: Sequence[Sequence[Sample]]) -> bool:
    """Whether the claim rests on CPU time: others compete for the cores, and the call is one thread's computing.

    With more threads CPU time also bills workers that spin; and a call that mostly sleeps or waits has next to none.
    """
    if run.other != "cpu" or run.device.type != "cpu" or torch.get_num_threads() != 1:
        return False
    if (_foreign_cores(run, moments) or 0.0) <= FOREIGN_CORES:
        return False
    shares = [statistics.median(cpu / wall for wall, cpu in samples) for samples in sides]
    return time.get_clock_info("process_time").resolution <= 1e-5 and all(0.2 <= share <= 1.1 for share in shares)


def _measurement(
    name: str, run: Clock, samples: Sequence[Sample], number: int, first_s: float, by_cpu: bool, shared: tuple = ()
) -> Measurement:
    """One side's result, with the warnings that its own samples give rise to."""
    seconds, others = tuple(sample[by_cpu] for sample in samples), tuple(sample[not by_cpu] for sample in samples)
    warnings, other = list(shared), run.name if by_cpu else run.other
    if other == "cpu" and torch.get_num_threads() > 1:  # counts the threads that wait for each other: no evidence
        other, others = "", ()
    if len(seconds) < BLOCKS:
        warnings.append(f"only {len(seconds)} samples, and {BLOCKS} are wanted: raise budget_s")
    if (change := stats.drift(seconds)) is not None:
        warnings.append(f"speed drifted: {change:+.0%} time from the first half of the run to the second")
    return Measurement(
        name=name,
        samples_s=seconds,
        number=number,
        clock=run.other if by_cpu else run.name,
        cache=run.cache,
        device=str(run.device),
        threads=torch.get_num_threads(),
        first_call_s=first_s,
        other_clock=other,
        other_s=others if other else (),
        warnings=tuple(warnings),
    )


def _machine_warnings(
    run: Clock, moments: Sequence[environment.Snapshot], by_cpu: bool, sides: Sequence[Sequence[Sample]]
) -> tuple[str, ...]:
    """What disturbed the run from outside the callables, and work that the clock did not see."""
    warnings = []
    if (foreign := _foreign_cores(run, moments) or 0.0) > FOREIGN_CORES:
        remedy = "times are CPU time" if by_cpu else "the times may be off"
        warnings.append(f"other programs kept {foreign:.1f} cores busy: {remedy}")
    if (slowed := environment.throttling(moments)) is not None:
        warnings.append(slowed)
    if run.other == "wall" and any(statistics.median(event / wall for event, wall in side) < 0.5 for side in sides):
        warnings.append(
            "CUDA events saw under half of the wall time: work on another stream, or launches that lag behind"
        )
    return tuple(warnings)


def _pair_warnings(result: Comparison) -> tuple[str, ...]:
    """What the pairs themselves show: too few, drift, more than can be."""
    a, b = (stats.block_minima(side.samples_s, result.per_block) for side in (result.baseline, result.candidate))
    warnings = []
    if len(a) < BLOCKS:
        warnings.append(f"only {len(a)} blocks of pairs, and {BLOCKS} are wanted: raise budget_s")
    if (change := stats.drift([math.sqrt(x * y) for x, y in zip(a, b, strict=True)])) is not None:
        warnings.append(
            f"speed drifted: {change:+.0%} time from the first half of the run to the second, alike for both"
        )
    if result.ceiling is not None and result.speedup > result.ceiling:
        fate = "refused, check the benchmark" if result.ci95[0] > result.ceiling else "the interval reaches below it"
        warnings.append(f"{result.speedup:.2f}x is above the ceiling of {result.ceiling:.2f}x: {fate}")
    return tuple(warnings)


def _check_arguments(calls: dict[str, Any], clock: Any, budget_s: float, cache: str) -> None:
    for name, call in calls.items():
        if not callable(call):
            raise InputError(
                f"{name} must be a function without arguments, got {type(call).__name__}: wrap the work, "
                f"for example {name}=lambda: model(x)."
            )
    if clock is not None and not callable(clock):
        raise InputError(f"clock must be a function (fn, number) -> seconds or None, got {clock!r}.")
    if not _is_number(budget_s) or not 0 < budget_s < math.inf:
        raise InputError(f"budget_s must be a number of seconds above 0, got {budget_s!r}.")
    if cache not in CACHES:
        raise InputError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}.")


def _check_comparison(names: Any, check: Any, min_effect: Any, ceiling: Any) -> None:
    if not isinstance(names, (tuple, list)) or len(names) != 2 or names[0] == names[1]:
        raise InputError(f"names must be two different names, for baseline and candidate, got {names!r}.")
    for name in names:
        _check_name(name)
    if check is not None and not callable(check):
        raise InputError(f"check must be a function (baseline_output, candidate_output) or None, got {check!r}.")
    if not _is_number(min_effect) or not CLAIMABLE <= min_effect < 1:
        raise InputError(f"min_effect must be from {CLAIMABLE} to below 1, got {min_effect!r}: less cannot be claimed.")
    if ceiling is not None and not (_is_number(ceiling) and 0 < ceiling < math.inf):
        raise InputError(f"ceiling must be the largest possible speed-up, a number above 0, or None, got {ceiling!r}.")


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise InputError(f"A name must be a word or two on one line, got {name!r}.")
    return name


def _check_outputs(check: Callable[[Any, Any], Any] | None, output: Any, other: Any, names: Sequence[str]) -> None:
    if check is None:
        return
    same = check(output, other)
    if same is not None and not same:
        raise InputError(
            f"check says that {names[0]} and {names[1]} do not compute the same: make them equal before timing them."
        )


def _device(device: Any, cache: str, graph: bool) -> torch.device | None:
    """The device asked for, its index filled in; None where the callable's output will tell."""
    cuda = torch.cuda.is_available()
    if device is None and (cache == "cold" or graph):
        device = "cuda"
    if device is None:
        return None
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device must be cpu, mps, cuda or cuda:N, got {device!r}.") from None
    if (cache == "cold" or graph) and target.type != "cuda":
        raise InputError(f"cache='cold' and graph=True need a CUDA device, got {target}: leave them out.")
    available = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": cuda}
    if not available.get(target.type, False) or (cuda and (target.index or 0) >= torch.cuda.device_count()):
        raise InputError(
            f"{target} is not available here: use {' or '.join(d for d, here in available.items() if here)}."
        )
    if target.type == "cuda" and target.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return target


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
