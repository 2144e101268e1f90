"""What lesson 00 concludes holds for its own simulated machine, whose truth is known."""

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from lesson_cells import cells, executed

from labkit import files, show

TRIALS = 200


def work() -> None:
    """The function under test; the simulated machine never calls it."""


def false_alarms(summary: Callable, calls: int) -> int:
    """The A/A tests in which a summary of all of A, then all of B, declares a difference on the drifting machine."""
    lesson = executed("00", "machine", "seconds", "repeated", "exercise-1", time=None)
    machine, benchmark = lesson["Machine"]({work: 0.002}, drift=0.5), lesson["repeated"](summary, calls)
    return lesson["false_alarms"](lambda a, b: benchmark(a, b, clock=machine), work, TRIALS)


def test_the_best_of_many_calls_is_fooled_until_a_side_covers_a_whole_swing():
    swing = executed("00", "sweep-numbers")["swing"]
    alarms = {calls: false_alarms(min, calls) for calls in (10, 100, 300, 500, math.ceil(swing), 1000)}
    assert alarms[10] < 0.6 * TRIALS and min(alarms[100], alarms[300]) > 0.95 * TRIALS
    assert alarms[500] > 0.5 * TRIALS and 0.5 * swing < 500 < swing
    assert max(alarms[math.ceil(swing)], alarms[1000]) < 0.05 * TRIALS


def test_the_median_of_a_thousand_calls_is_still_fooled():
    assert false_alarms(statistics.median, 1000) > 0.8 * TRIALS


def test_a_swing_has_as_many_calls_as_the_page_draws():
    machine = executed("00", "machine")["Machine"]({work: 0.002}, drift=0.5)
    calls = sum(1 for _ in itertools.takewhile(lambda _: machine.now < 200, iter(lambda: machine(work), None)))
    assert executed("00", "sweep-numbers")["swing"] == pytest.approx(calls / 100, rel=0.03)


@pytest.mark.parametrize(("drift", "has_speeds"), [(0.0, False), (0.5, True), (0.1, True)])
def test_the_run_chart_tells_another_speed_from_noise(drift: float, has_speeds: bool):
    machine = executed("00", "machine")["Machine"]({work: 0.002}, drift=drift)
    samples = [machine(work) for _ in range(2000)]
    lesson = executed("00", "noise-wander", samples=samples)
    assert (lesson["wandered"] > lesson["by_chance"]) == has_speeds


@pytest.mark.parametrize("calls", [10, 40, 100])
def test_rivals_at_equal_calls_make_equally_many(calls: int):
    lesson = executed("00", "seconds", "repeated", "exercise-2", "exercise-3", time=None)
    clocked: list[Callable] = []

    def clock(fn: Callable) -> float:
        clocked.append(fn)
        return 0.002

    lesson["repeated"](min, calls)(work, work, clock)
    assert len(clocked) == 2 * calls
    clocked.clear()
    lesson["paired_speedup"](work, test_a_swing_has_as_many_calls_as_the_page_draws, calls, 0, clock)
    assert len(clocked) == 2 * calls


def test_no_a_a_test_sees_what_a_leaves_behind_for_b_and_an_untimed_call_removes_it():
    lesson = executed("00", "machine", "exercise-2", "exercise-3", "carry", seconds=None)
    alarms = [lesson["of_200"](side, side)[0] for side in "AB"]
    carried, speedup = lesson["of_200"]("A", "B")
    settled, _ = lesson["of_200"]("A", "B", settled=True)
    assert max(alarms) <= 10 and carried > 180 and speedup < 0.98
    assert settled <= 10


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([1.0] * 600 + [0.8] * 200 + [1.0] * 200, "From call 600 to 800 a call took 20% less than the median of all."),
        ([1.0] * 800 + [1.3] * 100 + [1.0] * 50 + [1.2] * 50, "From call 800 to 900 a call took 30% more"),
        ([1.0] * 600 + [0.8] * 200 + [1.0] * 200, "drift outweighs noise here"),
        ([1.0] * 1000, "So noise explains this chart"),
    ],
)
def test_the_run_chart_s_longest_stretch_of_another_speed_is_named(times: list[float], words: str):
    assert words in said_of_the_run_chart(times)


def test_drift_is_said_to_hide_the_tail_only_where_the_mean_lies_below_the_median():
    assert "drift outweighs" not in said_of_the_run_chart([1.0] * 800 + [1.3] * 200)


def said_of_the_run_chart(times: list[float]) -> str:
    said, say = listener()
    lesson = executed("00", "noise-wander", samples=times)
    names = {
        "in_order": lesson["of_neighbours"](times),
        "mean": statistics.mean(times),
        "middle": statistics.median(times),
        "samples": times,
    }
    wanders = {name: lesson[name] for name in ("wandered", "by_chance")}
    executed("00", "noise-say", lab=SimpleNamespace(say=say), show=show, **names, **wanders)
    return " ".join(said)


@pytest.mark.parametrize(
    ("within", "words"),
    [
        ([(1.0, 1.1), (1.0, 1.2), (1.05, 1.15)], "no process stands apart"),
        ([(1.0, 1.1), (1.2, 1.3), (1.05, 1.25)], "no process stands apart"),
        ([(1.0, 1.1), (1.2, 1.3), (1.05, 1.15)], "1 of 3 intervals shares no value with two or more others"),
        ([(1.0, 1.1), (1.2, 1.3), (1.4, 1.5)], "3 of 3 intervals share no value with two or more others"),
        ([(0.0, math.inf), (1.2, 1.3), (1.0, 1.1)], "no process stands apart"),
    ],
)
def test_a_process_stands_apart_whose_interval_shares_no_value_with_two_others(
    within: list[tuple[float, float]], words: str
):
    said, say = listener()
    names = {
        "lab": SimpleNamespace(say=say, record=ignore),
        "fresh": [SimpleNamespace(within_run=ends) for ends in within],
        "over": (1.05, 1.25),
        "this": SimpleNamespace(within_run=(1.0, 1.2), ci95=(1.0, 1.3), processes=(1.0, 1.1, 1.3)),
        "runs": [],
    }
    executed("00", "processes-apart", "processes-say", show=show, partial=partial, **names)
    assert words in " ".join(said)
    assert "3 processes that ran this whole page, this one among them, say 1.00 to 1.30: 30% apart." in said


def test_the_folded_solution_of_the_challenge_reaches_its_goal_and_pairs_alone_do_not():
    lesson = executed("00", "machine", "exercise-2", "exercise-3", seconds=None, work=work, more_work=more_work)
    place, _, _ = cells("00")["place"].partition("def by_labkit")
    _, solution, _ = re.split("```(?:python)?\n", cells("00")["challenge-idea"])
    exec(place + solution, lesson)
    forty, hundred = (partial(pairs_of, lesson["paired_speedup"], pairs) for pairs in (40, 100))
    reached = [reaches_the_goal(lesson["place"](method, TRIALS)) for method in (lesson["plan"], forty, hundred)]
    assert reached == [True, False, False]


def more_work() -> None:
    """The slower function of the challenge; the simulated machine never calls it."""


def pairs_of(paired_speedup: Callable, pairs: int, a: Callable, b: Callable, clock: Callable, seed: int) -> float:
    return paired_speedup(a, b, pairs, seed, clock)[0]


def reaches_the_goal(point: dict[str, float]) -> bool:
    return point["machine time"] <= 0.25 and point["smallest difference"] <= 2


def listener() -> tuple[list[str], Callable]:
    """A list, and a stand-in of lab.say that puts its sentences there."""
    said: list[str] = []

    def say(_: str, *sentences: str | bool, any_preset: bool = False) -> None:
        said.extend(filter(None, sentences))

    return said, say


def ignore(*_: Any, **__: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("speedups", "tilted", "words"),
    [
        ([1.05] * 81 + [0.95] * 9, True, "81 lie above it: here the first call was mostly slower"),
        ([1.05] * 9 + [0.95] * 81, True, "81 lie below it: here the second call was mostly slower"),
        ([1.05] * 45 + [0.95] * 45, False, "by a factor of 1.1"),
        ([1.0], False, "by a factor of 1.0"),
    ],
)
def test_a_tilt_of_the_stopwatch_is_told_as_what_happened_in_this_burst(
    speedups: list[float], tilted: bool, words: str
):
    said, say = listener()
    names = {"alarms": 1, "trials": len(speedups)}
    lesson = executed("00", "stopwatch-say", lab=SimpleNamespace(say=say), speedups=speedups, **names)
    assert lesson["tilted"] == tilted and words in " ".join(said)


@pytest.mark.parametrize(
    ("mean_of_a_hundred", "words"),
    [(75.5, "(76 %) is as bad as one call (72 %)"), (95.0, "is worse than"), (50.0, "is better than")],
)
def test_the_mean_of_a_hundred_is_set_beside_one_call(mean_of_a_hundred: float, words: str):
    said, say = listener()
    numbers = {0.0: (1, 100), 0.5: (10, 100, 1000)}
    of_drift = itertools.product(numbers, ("best", "median", "mean"), (1, 10, 100, 1000))
    alarms_of = dict.fromkeys(of_drift, 71.5) | {(0.0, "mean", 100): mean_of_a_hundred}
    executed("00", "sweep-say", lab=SimpleNamespace(say=say), numbers=numbers, alarms_of=alarms_of)
    assert words in " ".join(said)


def test_processes_with_two_threads_share_a_shift_below_the_one_per_cent_of_a_verdict():
    lesson = executed("00", "coverage", files=files, json=json)
    one, two = (statistics.fmean(lesson["below"][threads]) for threads in (1, 2))
    assert abs(one - 0.5) < 0.1 and two > 0.7
    assert lesson["shift"] < 0.01
