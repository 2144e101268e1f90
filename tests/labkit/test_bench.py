"""What measure() and compare() claim: against a known truth on a SIMULATED clock, and on the real one, idle and loaded.

Tests marked `timing` read the real clock. Identical is one callable against itself: two copies lie in different places
of memory, which by itself makes some tenths of a per cent. The load is another process that spins on every core we may
use, from the middle of each comparison on; one thread, so that the claim may rest on CPU time then.
"""

import functools
import gc
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from refusals import Refusals, check_refusal, refused
from scipy.stats import binom

from labkit.timing import bench, clocks, interference, machine, roofline, stats
from labkit.timing.bench import Comparison, Measurement, compare, measure, race
from labkit.timing.machine import Ceilings, on_threads

RUNS = 300


def work_a():
    """Stands for a callable; the simulated clock knows what it costs."""


def work_b():
    """Another one."""


class SimulatedClock:
    """SIMULATED: cost[fn] seconds a call, 3 % noise, and a machine whose speed depends on the simulated time."""

    def __init__(self, environment="stationary", cost=None, seed=0):
        self.rng, self.now, self.environment = random.Random(seed), 0.0, environment
        self.cost = {} if cost is None else cost
        self.step_at = self.rng.uniform(0.1, 0.9)

    def __call__(self, fn, number):
        seconds = number * self.cost.get(fn, 2e-3) * math.exp(self.rng.gauss(0, 0.03)) * self.slowness()
        if self.environment == "preemption" and self.rng.random() < 0.4:
            seconds += self.rng.uniform(1e-3, 6e-3)
        self.now += seconds
        return seconds

    def slowness(self):
        if self.environment == "linear drift":
            return 1 + 0.5 * self.now
        if self.environment == "step":
            return 1.8 if self.now > self.step_at else 1.0
        if self.environment == "bursts":
            return 1.8 if int(self.now / 0.07) % 2 else 1.0
        return 1.0


def simulate(environment="stationary", cost=None, seed=0, **how):
    clock = SimulatedClock(environment, cost, seed)
    return compare(work_a, work_b, clock=clock, seed=seed, **{"budget_s": 1.0, **how})


def comparison(times_a, times_b, **how):
    sides = [
        Measurement(name, tuple(times), 1, "wall", "hot", "cpu", 1)
        for name, times in (("fp32", times_a), ("int8", times_b))
    ]
    return Comparison(*sides, (True, False) * (len(times_a) // 2), 1, 0.0, **how)


def too_often(excluded: int, runs: int, rate: float = 0.05) -> bool:
    """Whether an interval that may leave out the truth at this rate does so this often in under 1 % of such tests."""
    return binom.sf(excluded - 1, runs, rate) < 0.01


# Rate of verdicts that tell identical work apart. An interval leaves out 1 in 5 % of the runs, but a verdict also needs
# a difference of over 1 %.
FALSE_ALARMS = 1 / 200


def excludes(interval, truth):
    return not interval[0] <= truth <= interval[1]


ENVIRONMENTS = ("stationary", "linear drift", "step", "bursts", "preemption")


@pytest.mark.slow
def test_stopping_at_a_width_stays_honest():
    results = [simulate(seed=seed, budget_s=20.0) for seed in range(RUNS // 5)]
    excluded = sum(excludes(result.ci95, 1.0) for result in results)
    assert not too_often(excluded, len(results)), f"{excluded} of {len(results)}"
    assert sum(result.verdict == "equivalent" for result in results) > 0.9 * len(results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ratio", "environment"),
    [
        *((1.0, environment) for environment in ENVIRONMENTS),
        *((ratio, "bursts") for ratio in (1.05, 2.0)),
        *(
            pytest.param(ratio, environment, marks=pytest.mark.nightly)
            for ratio in (1.05, 2.0)
            for environment in ENVIRONMENTS
            if environment != "bursts"
        ),
    ],
)
def test_the_interval_covers_the_truth_and_no_verdict_is_wrong(environment, ratio):
    results = [simulate(environment, {work_a: 2e-3 * ratio}, seed) for seed in range(RUNS)]
    excluded = sum(excludes(result.ci95, ratio) for result in results)
    assert not too_often(excluded, RUNS), f"{environment}: {excluded} of {RUNS}"
    wrong = {1.0: ("faster", "slower")}.get(ratio, ("slower", "equivalent"))
    assert sum(result.verdict in wrong for result in results) <= RUNS // 100
    speedups = sorted(result.speedup for result in results)
    assert speedups[RUNS // 2] == pytest.approx(ratio, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["linear drift", "step"])
def test_guard_fails_when_the_interleaving_is_taken_out(environment):
    """The same harness, all of one side and then all of the other: the guard above must call this dishonest."""
    excluded = 0
    for seed in range(RUNS):
        clock = SimulatedClock(environment, seed=seed)
        first, second = (measure(fn, clock=clock, budget_s=0.5).samples_s for fn in (work_a, work_b))
        n = min(len(first), len(second))
        _, *interval = stats.paired_ratio(first[:n], second[:n])
        excluded += excludes(interval, 1.0)
    assert too_often(excluded, RUNS)
    assert excluded > RUNS // 4


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ((1.02, 1.03), "faster"),
        ((0.95, 0.98), "slower"),
        ((0.995, 1.005), "equivalent"),
        ((1.002, 1.008), "equivalent"),  # a real difference, and too small to be claimed
        ((1.005, 1.02), "inconclusive"),
        ((0.97, 1.03), "inconclusive"),
    ],
)
def test_verdict_is_what_the_whole_interval_supports(ratios, verdict):
    result = comparison([*ratios] * 10, [1.0] * 20)
    assert result.ci95 == pytest.approx(ratios)
    assert result.verdict == verdict


@pytest.mark.parametrize("cost", [1e-6, 1e-3, 0.02, 0.1, 0.35])
@pytest.mark.parametrize("budget_s", [0.5, 2.0])
def test_budget_is_kept(cost, budget_s):
    clock = SimulatedClock(cost={work_a: cost, work_b: 1.3 * cost})
    result = compare(work_a, work_b, clock=clock, budget_s=budget_s)
    warm_up_s, one_pair_s = 0.6 * budget_s + 2.5 * cost, 5 * 1.3 * cost
    assert clock.now <= 1.5 * budget_s + warm_up_s + one_pair_s
    assert len(result.baseline_first) >= 1


def test_both_end_when_they_are_precise_not_when_it_is_significant_and_look_only_now_and_then():
    result = simulate(cost={work_a: 4e-3}, budget_s=30.0)
    assert stats.half_width(result.speedup, *result.ci95) <= 0.005
    assert len(result.baseline_first) > bench.BLOCKS * result.per_block  # a factor of two was plain after six blocks
    result = measure(work_a, clock=SimulatedClock(), budget_s=30.0)
    assert len(result.samples_s) % bench.SAMPLES == 0
    assert stats.half_width(result.median_s, *result.ci95_s) <= bench.PRECISION
    assert sum(result.samples_s) >= bench.LEAST_S
    short = measure(work_a, clock=SimulatedClock(), budget_s=0.1)
    assert sum(short.samples_s) == pytest.approx(0.1, rel=0.1) and len(short.samples_s) < bench.SAMPLES + 5


def test_order_is_balanced_in_every_block():
    result = simulate()
    firsts = iter(result.baseline_first)
    blocks = iter(lambda: list(itertools.islice(firsts, result.per_block)), [])
    assert {sum(block) for block in blocks} == {result.per_block // 2}


def test_first_call_after_each_switch_is_not_timed():
    """SIMULATED carry-over: a call that follows the other side's costs half as much again."""
    clock, last = SimulatedClock(cost={work_a: 4e-3}), None

    def carry_over(fn, number):
        nonlocal last
        penalty, last = (0.5 * 2e-3 if fn is not last else 0.0), fn
        return clock(fn, number) + penalty

    result = compare(work_a, work_b, clock=carry_over)
    assert result.speedup == pytest.approx(2.0, rel=0.01)


def work_c():
    """A third one."""


THREE = {"a": work_a, "b": work_b, "c": work_c}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_in_a_race_every_two_give_an_interval_that_covers_the_truth(environment):
    costs, pairs = {work_a: 4e-3, work_c: 1e-3}, {("a", "b"): 2.0, ("b", "c"): 2.0, ("a", "c"): 4.0}
    excluded, runs = dict.fromkeys(pairs, 0), RUNS // 5
    for seed in range(runs):
        result = race(THREE, clock=SimulatedClock(environment, costs, seed), seed=seed, budget_s=3.0)
        for pair, truth in pairs.items():
            excluded[pair] += excludes(result.over(*pair).ci95, truth)
    assert not any(too_often(count, runs) for count in excluded.values()), excluded


def test_a_race_runs_all_in_each_round_in_random_order_and_lets_each_settle_untimed():
    """SIMULATED carry-over: for 8 ms after a switch a call costs twice as much."""
    clock, last, since = SimulatedClock(cost={work_a: 4e-3}), None, 0.0

    def carry_over(fn, number):
        nonlocal last, since
        if fn is not last:
            last, since = fn, clock.now
        slow = clock.now < since + 8e-3
        return clock(fn, number) * (2 if slow else 1)

    result = race(THREE, clock=carry_over, budget_s=4.0)
    assert len(result.orders) >= bench.BLOCKS
    assert len(set(result.orders)) > 3
    assert all(sorted(order) == sorted(THREE) for order in result.orders)
    pair = result.over("a", "b")
    assert pair.speedup == pytest.approx(2.0, rel=0.02)
    assert [pair.baseline.name, pair.candidate.name] == ["a", "b"]
    assert not result.warnings
    short = race(THREE, clock=SimulatedClock(), budget_s=0.3)
    assert "blocks of pairs, and" in short.over(*list(THREE)[:2]).warnings[0]


def test_two_callables_are_a_race():
    two = dict(list(THREE.items())[:2])
    result = race(two, clock=SimulatedClock(), budget_s=1.0)
    assert all(sorted(order) == sorted(two) for order in result.orders) and len(set(result.orders)) == 2


@pytest.fixture
def evictions(monkeypatch):
    """What the clock and a stand-in for the evictor did, in order; the real evictor takes some ten milliseconds."""
    events = []
    monkeypatch.setattr(clocks, "evictor", lambda last_level_cache: lambda: events.append("evict"))
    return events


def test_caches_are_emptied_before_every_timed_call_and_off_the_clock(evictions):
    clock = SimulatedClock(cost={work_a: 4e-6, work_b: 2e-6})  # so short that hot calls would be repeated

    def logged(fn, number):
        evictions.append((fn, number))
        return clock(fn, number)

    result = compare(work_a, work_b, clock=logged, cache="cold", budget_s=1e-3)
    order = [fn for first in result.baseline_first for fn in ((work_a, work_b) if first else (work_b, work_a))]
    assert evictions[-2 * len(order) :] == [event for fn in order for event in ("evict", (fn, 1))]  # and no other call
    assert result.baseline.number == result.candidate.number == 1
    assert result.speedup == pytest.approx(2.0, rel=0.02)
    assert result.baseline.cache == "cold"
    assert measure(work_a, clock=SimulatedClock(), cache="cold").cache == "cold"


def test_what_emptying_the_caches_takes_is_in_the_budget_but_not_in_the_time(monkeypatch):
    monkeypatch.setattr(clocks, "evictor", lambda last_level_cache: lambda: time.sleep(0.01))
    result = compare(lambda: None, lambda: None, cache="cold", device="cpu", budget_s=0.4)
    assert result.baseline.median_s < 0.005
    assert len(result.baseline_first) <= 0.4 / 0.02 and result.per_block == 1


def factory(clock, seconds, side, order):
    """Builds callables that cost `seconds()` each, drawn anew for each build and fixed for its life (SIMULATED)."""

    def make():
        call = functools.partial(str, side)
        clock.cost[call], order[len(order) :] = seconds(), [side]
        return call

    return make


def test_an_interval_over_builds_covers_what_pairs_of_one_build_do_not():
    over_builds, of_one = [], []
    for seed in range(100):
        clock = SimulatedClock(seed=seed)
        make = factory(clock, lambda clock=clock: 2e-3 * clock.rng.uniform(0.95, 1.05), "", [])  # placed well or badly
        over_builds.append(compare(make, make, builds=8, clock=clock, seed=seed))
        of_one.append(compare(make(), make(), clock=clock, seed=seed))
    excluded, excluded_of_one = (sum(excludes(r.ci95, 1.0) for r in results) for results in (over_builds, of_one))
    assert not too_often(excluded, 100), excluded
    assert not [result.verdict for result in over_builds if result.verdict in ("faster", "slower")]
    assert too_often(excluded_of_one, 100), excluded_of_one


def test_builds_are_made_in_balanced_order_and_checked_and_give_one_ratio_each():
    order, checked, clock = [], [], SimulatedClock()
    slow, fast = factory(clock, lambda: 4e-3, "a", order), factory(clock, lambda: 2e-3, "b", order)
    result = compare(slow, fast, builds=8, clock=clock, check=lambda *outputs: checked.append(outputs))
    assert len(order) == 16 and order[::2].count("a") == order[1::2].count("a") == 4
    assert checked == [("a", "b")] * 16
    assert sum(result.pairs_per_build) == len(result.baseline_first) and len(result.pairs_per_build) == 8
    ratios = []
    for end, count in zip(itertools.accumulate(result.pairs_per_build), result.pairs_per_build, strict=True):
        sides = (side.samples_s[end - count : end] for side in (result.baseline, result.candidate))
        ratios.append(stats.paired_ratio(*sides, result.per_block)[0])
    assert result.ci95 == pytest.approx((min(ratios), max(ratios)))  # of eight values
    assert "8 builds, " in str(result) and result.verdict == "faster"


def test_short_calls_are_repeated_to_a_millisecond():
    result = simulate(cost={work_a: 2e-6, work_b: 1e-6})
    assert result.baseline.number * 2e-6 == pytest.approx(1e-3, rel=0.25)
    assert result.candidate.number * 1e-6 == pytest.approx(1e-3, rel=0.25)
    assert statistics.median(result.candidate.samples_s) == pytest.approx(1e-6, rel=0.02)


def test_the_times_of_the_sides_agree_with_the_ratio_beside_them():
    """One call in three is undisturbed on one side, two in three on the other; the same work all the same."""
    often, seldom = [1.0, 1.5, 1.5] * 8, [1.0, 1.0, 1.5] * 8
    sides = [
        Measurement(name, tuple(times), 1, "wall", "hot", "cpu", 1, per_block=3)
        for name, times in (("fp32", often), ("int8", seldom))
    ]
    result = Comparison(*sides, (True, False) * 12, per_block=3)
    assert statistics.median(often) / statistics.median(seldom) == 1.5
    assert result.baseline.median_s / result.candidate.median_s == result.speedup == 1.0
    assert simulate().baseline.per_block == simulate().per_block > 1


@pytest.mark.parametrize(
    ("seconds", "warning"),
    [
        (0.3, "budget_s was spent after 1 block of pairs, and an interval takes 6: close other programs, or raise"),
        (0.03, "only {} blocks of pairs, and 20 are needed: raise budget_s"),
    ],
)
def test_few_blocks_give_a_warning_and_too_few_no_interval(seconds, warning):
    result = simulate(cost={work_a: seconds, work_b: seconds})
    blocks = len(result.baseline_first)
    assert result.warnings[-1].startswith(warning.format(blocks))
    assert (result.ci95 == (0.0, math.inf)) == (blocks < stats.LEAST)
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))["result"]
    if blocks < stats.LEAST:
        assert result.verdict == "inconclusive" and "no interval" in str(result) and written["ci95"] is None


def test_what_is_written_holds_every_sample():
    result = simulate(cost={work_a: 4e-3})
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["baseline"]["samples_s"] == list(result.baseline.samples_s)
    assert written["baseline_first"] == list(result.baseline_first)
    assert written["result"] == {"speedup": result.speedup, "ci95": list(result.ci95), "verdict": "faster"}


def test_drift_is_warned_of():
    assert any("drifted" in warning for warning in simulate("linear drift").warnings)
    assert simulate(budget_s=2.0).warnings == ()


def test_lines_hold_what_a_reader_needs_and_no_digit_more_than_the_interval_supports():
    narrow = comparison([0.0410, 0.0416] * 10, [0.0239, 0.0241] * 10, warnings=("speed drifted",))
    assert str(narrow) == (
        "fp32 41.3 ms -> int8 24.0 ms: 1.72x [95% CI 1.72, 1.73 within this run; 20 blocks of 1 pair, "
        "wall time, hot, cpu, 1 thread] faster - warning: speed drifted"
    )
    wide = str(comparison([0.038, 0.046] * 10, [0.024, 0.023] * 10))
    assert wide.startswith("fp32 42 ms") and "1.8x [95% CI 1.6, 2.0 within this run;" in wide
    one = Measurement("fp32", (0.0412, 0.0416) * 10, 3, "wall", "hot", "cpu", 2)
    assert str(one) == (
        "fp32 41.4 ms [95% CI 41.2, 41.6 within this run; 20 samples of 3 calls, wall time, hot, cpu, 2 threads]"
    )


@pytest.mark.parametrize(("threads", "words"), [(1, "the times may be off"), (2, "2 threads wait for the busy cores")])
def test_a_busy_program_beside_is_warned_of_with_the_remedy_for_the_threads(threads: int, words: str, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    clock = clocks.choose(torch.device("cpu"))
    before, after = interference.Snapshot(0.0, 0.0, 0.0), interference.Snapshot(2.0, 2.0, 4.0)
    (warning,) = interference.warnings(clock, [before, after], by_cpu=False, samples_by_side=[])
    assert warning.startswith("other programs kept 1.0 cores busy: ") and words in warning


def by_threads(seconds: float) -> None:
    """Work that two threads do four times as slowly as one."""
    time.sleep(seconds * (4 if torch.get_num_threads() > 1 else 1))


def test_threads_that_make_a_call_slower_are_warned_of():
    fast, slow = (lambda: time.sleep(1e-3)), (lambda: by_threads(1e-3))
    with on_threads(2):
        line, pair = str(measure(slow, budget_s=0.4)), str(compare(slow, fast, budget_s=0.6))
        assert torch.get_num_threads() == 2
    with on_threads(1):
        alone = str(measure(slow, budget_s=0.2))
    assert re.search(r"2 threads take [2-5]\.\d times as long as one: torch\.set_num_threads\(1\)", line)
    assert "baseline: 2 threads take" in pair and "candidate: 2 threads" not in pair
    assert "threads take" not in alone


def test_over_processes_a_result_is_the_median_and_its_interval_the_range_and_what_holds_within_the_run_comes_after():
    here = comparison([0.0410, 0.0416] * 10, [0.0239, 0.0241] * 10)
    others = [comparison([seconds] * 20, [0.02] * 20) for seconds in (0.033, 0.0362, 0.034, 0.0199)]
    over = here.over_processes(others)
    assert (over.speedup, over.process_speedup, over.within_run) == (pytest.approx(1.7), here.speedup, here.ci95)
    assert (over.ci95, over.verdict, here.verdict) == ((0.995, 1.81), "inconclusive", "faster")
    assert (over.covers, here.covers) == ("over 5 processes", "within this run")
    assert "1.70x [0.99x to 1.81x over 5 processes; 1.72x in the last of them, 95% CI 1.72, 1.73; 20 blocks" in str(
        over
    )
    side = over.baseline
    assert (side.median_s, side.ci95_s, side.covers) == (0.034, (0.0199, 0.0413), "over 5 processes")
    assert (side.process_median_s, side.within_run_s) == (here.baseline.median_s, here.baseline.ci95_s)
    assert str(over).startswith("fp32 34.0 ms -> int8 20.0 ms: ")
    assert "[19.9 ms to 41.3 ms over 5 processes; 41.3 ms in the last of them, 95% CI 41.0, 41.6; " in str(side)


def test_a_share_of_the_roof_over_processes_is_of_the_median_time():
    work = roofline.Work(flops=10**6, bytes=10**6)
    sides = [comparison([seconds] * 20, [seconds] * 20).baseline for seconds in (0.002, 0.004, 0.005)]
    over = sides[0].over_processes(sides[1:])
    over = roofline.placed(over, work, Ceilings("a small CPU", {"fp32": 100e9}, 1e9))
    assert over.roof_share == 0.25
    assert ", 25 % of the roof, limited by memory" in str(over)


def test_shares_of_the_roof_are_printed_and_written():
    work = roofline.Work(flops=10**6, bytes=10**6)
    roofs = Ceilings("a small CPU", {"fp32": 100e9}, 1e9)
    line = comparison([0.010] * 20, [0.005] * 20)
    sides = [roofline.placed(side, work, roofs) for side in (line.baseline, line.candidate)]
    line = replace(line, baseline=sides[0], candidate=sides[1])
    assert "faster, 10 % and 20 % of the roof, limited by memory" in str(line)
    assert "], 10 % of the roof, limited by memory" in str(sides[0])
    assert [line.to_dict()[side]["roof_share"] for side in ("baseline", "candidate")] == pytest.approx([0.1, 0.2])


def test_outputs_are_checked_before_and_after():
    seen = []
    compare(lambda: 1, lambda: 2, check=lambda *outputs: seen.append(outputs), clock=SimulatedClock())
    assert seen == [(1, 2), (1, 2)]


def test_the_callables_own_error_passes_through_and_the_collector_comes_back():
    def broken():
        raise ZeroDivisionError("mine")

    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError, match="mine"):
        compare(lambda: 1, broken)
    assert gc.isenabled()


def test_real_clock_runs_in_inference_mode_without_collector():
    states = set()

    def spy():
        states.add((torch.is_inference_mode_enabled(), gc.isenabled()))
        return torch.ones(2)

    result = measure(spy, budget_s=0.05)
    assert states == {(True, False)}
    assert result.device == "cpu"


def test_a_call_that_sleeps_is_not_judged_by_cpu_time():
    result = measure(lambda: time.sleep(0.002), budget_s=0.4)
    assert result.clock == "wall"
    assert result.median_s > 0.002


@pytest.mark.gpu(pretended=False)
@pytest.mark.parametrize("how", [{}, {"cache": "cold"}])
def test_cuda_finds_twice_the_work(how):
    x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)

    def chain(length):
        def run():
            y = x
            for _ in range(length):
                y = y @ x
            return y

        return run

    result = compare(chain(16), chain(8), **how)
    assert result.baseline.device.startswith("cuda")
    assert result.speedup == pytest.approx(2.0, rel=0.04)


@pytest.mark.gpu(pretended=False)
def test_work_on_another_stream_is_flagged():
    x, side = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()

    def hidden():
        with torch.cuda.stream(side):
            return x @ x

    assert any("another stream" in warning for warning in measure(hidden).warnings)


# --- on the real clock ------------------------------------------------------------------------------------------------

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
SPINNER = """
import os, sys, time
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(sys.argv[1])})
for line in sys.stdin:  # each line: spin from when until when
    start, end = map(float, line.split())
    time.sleep(max(0.0, start - time.time()))
    while time.time() < end:
        pass
"""


@pytest.fixture
def one_thread():
    """A single thread, and a heap that is quick to collect before each comparison."""
    with on_threads(1):
        gc.collect()
        gc.freeze()
        yield


@pytest.fixture(params=["idle", "loaded"])
def disturb(request, one_thread):
    """A function that has every core spin through the second half of the next `seconds`; idle: it does nothing."""
    spinners = [
        subprocess.Popen([sys.executable, "-c", SPINNER, str(core)], stdin=subprocess.PIPE, text=True)
        for core in (CORES if request.param == "loaded" else ())
    ]

    def start(seconds):
        for spinner in spinners:
            spinner.stdin.write(f"{time.time() + seconds / 2} {time.time() + seconds}\n")
            spinner.stdin.flush()

    yield start
    for spinner in spinners:
        spinner.kill()
        spinner.wait()


def chain(length, size=256):
    """A chain of matrix products: exactly `length` times the work of one."""
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) / size**0.5

    def run():
        y = x
        for _ in range(length):
            y = y @ x
        return y

    return run


@pytest.mark.timing
def test_identical_work_is_not_told_apart_on_this_machine(disturb):
    runs, results = 20, []
    for seed in range(runs):
        run = chain(4)
        disturb(0.4)  # warm-up included
        results.append(compare(run, run, budget_s=0.3, seed=seed))
    excluded = sum(excludes(result.ci95, 1.0) for result in results)
    assert not too_often(excluded, runs), [str(result) for result in results]
    told_apart = [str(result) for result in results if result.verdict in ("faster", "slower")]
    assert not too_often(len(told_apart), runs, FALSE_ALARMS), told_apart


@pytest.mark.nightly
@pytest.mark.timing
def test_identical_work_on_data_of_its_own_is_not_told_apart_over_builds(one_thread):
    """Without builds, 9 of 15 intervals (1 MB) excluded 1, and 4 of 12 verdicts (16 MB) were wrong."""
    builds, results = 8, []
    for megabytes in (1, 16):

        def make(rows=megabytes * 2**18 // 512):
            weight, x = torch.randn(rows, 512), torch.randn(4, 512)
            return lambda: torch.nn.functional.linear(x, weight)

        results += [compare(make, make, builds=builds, budget_s=0.8, seed=seed) for seed in range(6)]
    excluded = [str(result) for result in results if excludes(result.ci95, 1.0)]
    # eight builds have the interval [least, greatest]: it leaves out the truth where all eight fall on one side of it
    assert not too_often(len(excluded), len(results), 2 / 2**builds), excluded


@pytest.mark.timing
def test_reading_what_fits_a_cache_is_slower_cold(one_thread):
    x = torch.ones(machine.fingerprint("cpu").caches.get("L2", 2**19) // 8)  # half of it
    hot = measure(x.sum, cache="hot", budget_s=0.5)
    cold = measure(x.sum, cache="cold", budget_s=4.0)  # to empty half a gigabyte of cache takes 0.1 s a sample
    assert cold.ci95_s[0] > 1.5 * hot.ci95_s[1], f"{hot}; {cold}"


@pytest.mark.timing
def test_twice_the_work_is_found_on_this_machine(disturb):
    """In one of three rounds: a neighbour on the same core disturbs for a while, which no counter shows."""
    for _ in range(3):
        results = []
        for seed in range(3):
            disturb(1.3)
            results.append(compare(chain(16), chain(8), budget_s=1.0, seed=seed))
        lines = [str(result) for result in results]
        assert {result.verdict for result in results} <= {"faster", "inconclusive"}, lines
        if not all(result.ci95[0] <= 2.04 and result.ci95[1] >= 1.96 for result in results):
            continue
        if max(result.foreign_cores or 0.0 for result in results) > 0.6 * len(CORES):
            return  # others had the machine
        precise = min(stats.half_width(result.speedup, *result.ci95) for result in results) <= 0.02
        if precise and sorted(result.speedup for result in results)[1] == pytest.approx(2.0, rel=0.02):
            break
    else:
        pytest.fail(f"three rounds, none of them right within 2 %: {lines}")
    assert {result.verdict for result in results} == {"faster"}, lines


@pytest.mark.timing
def test_foreign_load_is_seen_and_named(one_thread):
    spinner = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    before = interference.snapshot(torch.device("cpu"))
    try:
        result = measure(chain(4), budget_s=1.0)
    finally:
        spinner.kill()
        spinner.wait()
    after = interference.snapshot(torch.device("cpu"))
    assert any("other programs kept" in warning for warning in result.warnings)
    assert result.clock == "cpu"
    assert after.busy_s - before.busy_s >= 0.8 * (after.process_s - before.process_s) > 0  # our own included


@pytest.mark.timing
def test_a_call_that_maps_its_memory_anew_is_told(one_thread):
    """64 MiB are more than malloc ever keeps (32 MiB): each call gets pages that nobody has touched."""
    out = torch.ones(2**24)
    result = compare(lambda: torch.ones(2**24), lambda: out.fill_(1.0), names=("mapped", "preallocated"))
    (told,) = (warning for warning in result.all_warnings if "page faults" in warning)
    assert told.startswith("mapped: ") and "per call: memory is mapped anew each time; preallocate" in str(result)


# --- refusals, and a hint ---------------------------------------------------------------------------------------------


def work() -> int:
    raise AssertionError("called before the arguments were checked")


REFUSALS: Refusals = {
    "baseline must be a function": lambda: compare(torch.zeros(1), work),
    "candidate must be a function": lambda: compare(work, None),
    "b must be a function": lambda: race({"a": work, "b": None}),
    "a race takes two callables or more, got 1": lambda: race({"a": work}),
    "budget_s must be a number of seconds above 0, got 0": lambda: measure(work, budget_s=0),
    "budget_s must be a number of seconds above 0, got 0: ": lambda: compare(work, work, budget_s=0),
    "budget_s must be a number of seconds above 0, got nan": lambda: measure(work, budget_s=math.nan),
    "budget_s must be a number of seconds above 0, got nan: ": lambda: compare(work, work, budget_s=math.nan),
    "budget_s must be a number of seconds above 0, got True": lambda: measure(work, budget_s=True),
    "budget_s must be a number of seconds above 0, got True: ": lambda: compare(work, work, budget_s=True),
    "no cache 'warm': choose one of hot, cold": lambda: measure(work, cache="warm"),
    "There is no cache 'warm': choose one of hot, cold": lambda: compare(work, work, cache="warm"),
    "device is 'gpu'; choose auto, cpu, cuda or cuda:N": lambda: measure(work, device="gpu"),
    "device is 'gpu'; choose auto, cpu, cuda or cuda:N.": lambda: compare(work, work, device="gpu"),
    "builds must be 6 or more, or None, got 3": lambda: compare(work, work, builds=3),
    "names must be two different names": lambda: compare(work, work, names=("same", "same")),
    "check must be a function": lambda: compare(work, work, check=True),
    "must return seconds above 0, got -1": lambda: measure(work_a, clock=lambda fn, number: -1.0),
    "must return seconds above 0, got nan": lambda: measure(work_a, clock=lambda fn, number: math.nan),
    # what is unequal, or no work, is not timed
    "small and large do not compute the same": lambda: compare(
        lambda: 1, lambda: 2, check=lambda a, b: a == b, names=("small", "large")
    ),
    "with builds, candidate must return a function without arguments, got int": lambda: compare(
        lambda: work_a, lambda: 3, builds=8
    ),
    "returns a function, whose work is not done": lambda: compare(lambda: work_a, lambda: work_b),  # without builds
    "budget_s must be a number of seconds above 0, got '2'": lambda: measure(work, budget_s="2"),
    "budget_s must be a number of seconds above 0, got None": lambda: compare(work, work, budget_s=None),
    "no cache ['hot']": lambda: measure(work, cache=["hot"]),
    "no cache None": lambda: compare(work, work, cache=None),
    "clock must be a function": lambda: measure(work, clock=3),
    "seconds or None, got 'wall'": lambda: compare(work, work, clock="wall"),
    "got ('a',)": lambda: compare(work, work, names=("a",)),
    "got (1, 2)": lambda: compare(work, work, names=(1, 2)),
    "got 'ab'": lambda: compare(work, work, names="ab"),
    "builds must be 6 or more, or None, got '8'": lambda: compare(work, work, builds="8"),
    "seed is 'a'": lambda: compare(work, work, seed="a"),
    "seed is None": lambda: race({"a": work, "b": work}, seed=None),
    "calls is a list": lambda: race([work, work]),
    "a must be a function": lambda: race({"a": 1, "b": work}),
    "device is 3": lambda: measure(work, device=3),
    "q is 101": lambda: comparison([0.01] * 20, [0.01] * 20).baseline.percentile(101),
    "q is '50'": lambda: comparison([0.01] * 20, [0.01] * 20).baseline.percentile("50"),
}


@refused(REFUSALS)
def test_bad_arguments_are_refused_in_a_sentence(words, call):
    check_refusal(words, call)


@pytest.mark.parametrize(("ratio", "hints"), [(1.05, True), (0.95, True), (1.0, False), (1.5, False), (0.5, False)])
def test_a_small_difference_without_builds_hints_at_them(ratio, hints):
    line = comparison([0.010 * ratio] * 20, [0.010] * 20)
    assert ("compare with builds=8" in str(line)) == hints
    over_builds = replace(line, pairs_per_build=(2,) * 10)
    assert over_builds.verdict == line.verdict and "builds=8" not in str(over_builds)
