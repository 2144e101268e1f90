"""What lesson 00 concludes holds for its own simulated machine, whose truth is known."""

import itertools
import json
import math
import random
import statistics
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from course import notebooks
from labkit import files, stats

TRIALS = 200


@cache
def cells() -> dict[str, str]:
    return {cell.id: cell.source for cell in notebooks.read(notebooks.find("00")).cells}


def executed(*ids: str, **names: Any) -> dict[str, Any]:
    """The names that cells of the lesson define, run one after another."""
    space: dict[str, Any] = {"math": math, "random": random, "statistics": statistics, "itertools": itertools, **names}
    for name in ids:
        exec(cells()[name], space)
    return space


def work() -> None:
    """The function under test; the simulated machine never calls it."""


def false_alarms(summary: Callable, calls: int) -> int:
    """The A/A tests in which a summary of all of A, then all of B, declares a difference on the drifting machine."""
    lesson = executed("machine", "seconds", "repeated", "exercise-1", time=None)
    machine, benchmark = lesson["Machine"]({work: 0.002}, drift=0.5), lesson["repeated"](summary, calls)
    return lesson["false_alarms"](lambda a, b: benchmark(a, b, clock=machine), work, TRIALS)


def test_the_best_of_many_calls_is_fooled_until_a_side_covers_most_of_a_swing():
    swing = executed("sweep-numbers")["swing"]
    alarms = {calls: false_alarms(min, calls) for calls in (10, 100, 300, 500, 1000)}
    assert alarms[10] < 0.6 * TRIALS and min(alarms[100], alarms[300]) > 0.95 * TRIALS
    assert alarms[500] < 0.75 * TRIALS and 0.5 * swing < 500 < swing
    assert alarms[1000] == 0 and 300 < swing < 1000


def test_the_median_of_a_thousand_calls_is_still_fooled():
    assert false_alarms(statistics.median, 1000) > 0.8 * TRIALS


def test_a_swing_has_as_many_calls_as_the_page_draws():
    machine = executed("machine")["Machine"]({work: 0.002}, drift=0.5)
    calls = sum(1 for _ in itertools.takewhile(lambda _: machine.now < 200, iter(lambda: machine(work), None)))
    assert executed("sweep-numbers")["swing"] == pytest.approx(calls / 100, rel=0.03)


@pytest.mark.parametrize(("drift", "has_speeds"), [(0.0, False), (0.5, True), (0.1, True)])
def test_the_run_chart_tells_another_speed_from_noise(drift: float, has_speeds: bool):
    machine = executed("machine")["Machine"]({work: 0.002}, drift=drift)
    samples = [machine(work) for _ in range(2000)]
    lesson = executed("noise-wander", samples=samples)
    assert (lesson["wandered"] > lesson["by_chance"]) == has_speeds


@pytest.mark.parametrize("calls", [10, 40, 100])
def test_rivals_at_equal_calls_make_equally_many(calls: int):
    lesson = executed("seconds", "repeated", "exercise-2", "exercise-3", time=None)
    clocked: list[Callable] = []

    def clock(fn: Callable) -> float:
        clocked.append(fn)
        return 0.002

    lesson["repeated"](min, calls)(work, work, clock)
    assert len(clocked) == 2 * calls
    clocked.clear()
    lesson["paired_speedup"](work, test_a_swing_has_as_many_calls_as_the_page_draws, calls, 0, clock)
    assert len(clocked) == 2 * calls


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((415, 575, 420), "no difference is seen. This does not reproduce the tilt of section 2"),
        ((415, 575, 420), "an untimed call removes that"),
        ((415, 575, 462), "One untimed call removes 65% of what is above 50 %"),
        ((480, 575, 560), "The place in the pair has a cause of its own."),
        ((415, 575, 580), "an untimed call does not mend it. A balanced order"),
        ((415, 420, 410), "does not slow the first call here"),
    ],
)
def test_what_is_said_of_the_first_of_a_pair_follows_from_the_three_counts(counts: tuple[int, ...], words: str):
    assert words in said_of_the_first_of_a_pair(counts, tilted=True)


@pytest.mark.parametrize(("alone", "tilted"), [(415, False), (480, True), (320, True)])
def test_a_tilt_is_called_unexplained_only_where_the_stopwatch_has_it_and_the_pairs_do_not(alone: int, tilted: bool):
    assert "tilt" not in said_of_the_first_of_a_pair((alone, 575, 420), tilted)


def said_of_the_first_of_a_pair(counts: tuple[int, ...], tilted: bool) -> str:
    said: list[str] = []

    def say(_: str, *sentences: str | bool) -> None:
        said.extend(filter(None, sentences))

    def ignore(*_: Any, **__: Any) -> None:
        pass

    slower = dict(zip(("nothing", "8 MB written", "an untimed call"), counts, strict=True))
    names = {"slower": slower, "pairs_each": 800, "wilson": stats.wilson, "tilted": tilted}
    lab = SimpleNamespace(say=say, record=ignore, table=ignore)
    executed("first-of-pair-say", lab=lab, result=ignore, **names)
    return " ".join(said)


@pytest.mark.parametrize(
    ("speedups", "tilted", "words"),
    [
        ([1.05] * 81 + [0.95] * 9, True, "81 lie above it: mostly the first call took longer"),
        ([1.05] * 9 + [0.95] * 81, True, "81 lie below it: mostly the second call took longer"),
        ([1.05] * 45 + [0.95] * 45, False, "by a factor of 1.1"),
        ([1.0], False, "by a factor of 1.0"),
    ],
)
def test_a_tilt_of_the_stopwatch_needs_more_dots_on_a_side_than_chance_puts_there(
    speedups: list[float], tilted: bool, words: str
):
    said: list[str] = []

    def say(_: str, *sentences: str | bool) -> None:
        said.extend(filter(None, sentences))

    names = {"alarms": 1, "trials": len(speedups), "wilson": stats.wilson}
    lesson = executed("stopwatch-say", lab=SimpleNamespace(say=say), speedups=speedups, **names)
    assert lesson["tilted"] == tilted and words in " ".join(said)


@pytest.mark.parametrize(
    ("mean_of_a_hundred", "words"),
    [(81.5, "(82 %) is no better than one call (72 %)"), (95.0, "is worse than"), (50.0, "is better than")],
)
def test_the_mean_is_set_beside_one_call_by_the_intervals_of_two_hundred_tests(mean_of_a_hundred: float, words: str):
    said: list[str] = []

    def say(_: str, *sentences: str | bool, any_preset: bool) -> None:
        said.extend(filter(None, sentences))

    numbers = {0.0: (1, 100), 0.5: (10, 100, 1000)}
    of_drift = itertools.product(numbers, ("best", "median", "mean"), (1, 10, 100, 1000))
    alarms_of = dict.fromkeys(of_drift, 71.5) | {(0.0, "mean", 100): mean_of_a_hundred}
    names = {"numbers": numbers, "alarms_of": alarms_of, "wilson": stats.wilson}
    executed("sweep-say", lab=SimpleNamespace(say=say), **names)
    assert words in " ".join(said)


def test_processes_with_two_threads_share_a_shift_below_the_one_per_cent_of_a_verdict():
    lesson = executed("coverage", files=files, json=json)
    one, two = (statistics.fmean(lesson["below"][threads]) for threads in (1, 2))
    assert abs(one - 0.5) < 0.1 and two > 0.7
    assert lesson["shift"] < 0.01
