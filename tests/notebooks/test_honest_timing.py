"""What lesson 00 concludes holds for its own simulated machine, whose truth is known."""

import itertools
import json
import math
import random
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import pytest
from lesson_cells import cells, executed, function
from scipy.special import bdtrik

from labkit import files, show

TRIALS = 200


def work() -> None:
    """The function under test; the simulated machine never calls it."""


def test_the_best_of_many_calls_is_fooled_until_a_side_covers_a_whole_swing():
    lesson = executed("00", "machine", "seconds", "repeated", "exercise-1", "sweep", time=None)
    alarms, swing = lesson["alarms_of"], lesson["swing"]
    assert alarms["drifting", 3] < alarms["drifting", 1] and alarms["steady", 100] == 0
    assert min(alarms["drifting", calls] for calls in (30, 100, 300)) > 0.95 * TRIALS
    assert alarms["drifting", 500] > 0.5 * TRIALS and 0.5 * swing < 500 < swing < 760
    assert max(alarms["drifting", 760], alarms["drifting", 1000]) < 0.05 * TRIALS
    machine = lesson["Machine"]({lesson["work"]: 0.002}, drift=0.5)
    clocked = iter(lambda: machine(lesson["work"]), None)
    calls = sum(1 for _ in itertools.takewhile(lambda _: machine.now < 200, clocked))
    assert swing == pytest.approx(calls / 100, rel=0.01)


@pytest.mark.parametrize(
    ("calls", "title"),
    [(100, r"Speed-up 1\.1\d\d: a false alarm"), (1000, r"Speed-up (1\.00|0\.99)\d: no false alarm")],
)
def test_the_sliders_picture_agrees_with_the_figure_of_false_alarms(calls: int, title: str):
    shown: list[Any] = []
    said: list[str] = []
    lab = SimpleNamespace(show=lambda fig, **_: shown.append(fig), say=lambda _, text, **__: said.append(text))
    names = {"plt": plt, "ORANGE": "#D55E00", "BLUE": "#0072B2", "lab": lab}
    before = ("machine", "seconds", "repeated", "exercise-1", "sweep")
    lesson = executed("00", *before, "explore-draw", "explore", time=None, **names)
    lesson["explore"](calls, slowest=1.5, begin=0.2)
    (axes,) = shown[-1].axes
    assert re.fullmatch(title, axes.get_title(plt.rcParams["axes.titlelocation"]))
    assert f"moments, {lesson['alarms_of']['drifting', calls] / 2:g} % raise" in said[-1]
    plt.close("all")


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

    lesson["best_of"](calls)(work, work, clock)
    assert len(clocked) == 2 * calls
    clocked.clear()
    lesson["paired_speedup"](work, more_work, calls, 0, clock)
    assert len(clocked) == 2 * calls


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([1.0] * 600 + [0.8] * 200 + [1.0] * 200, "lies 25.0 % above the lowest; in 99 shufflings"),
        ([1.0] * 600 + [0.8] * 200 + [1.0] * 200, "changed its speed; why was not tested."),
        ([1.0] * 1000, "So noise alone can make this chart"),
    ],
)
def test_another_speed_is_told_from_noise_in_words(times: list[float], words: str):
    said, say = listener()
    lesson = executed("00", "noise-wander", samples=times)
    executed("00", "noise-say", **lesson | {"lab": SimpleNamespace(say=say)})
    assert words in " ".join(said)


@pytest.mark.parametrize(("processes", "words"), [(5, "none of 300"), (0, "0 % (0 to 2 within this run)")])
def test_no_false_alarm_in_any_process_is_told_with_the_number_of_tests(processes: int, words: str):
    told_share = function("00", "told_share", trials=60)
    ends = (0.0, 0.0) if processes else (0.0, 2.0)
    assert told_share(SimpleNamespace(value=0.0, ci95=ends, processes=processes)) == words


def test_all_methods_take_turns_on_the_real_clock():
    """The tests of each method lie in the same stretch of time, not one method after another."""
    called: list[str] = []

    def named(name: str) -> Callable:
        def benchmark(*_: Any, **__: Any) -> tuple[float, float]:
            called.append(name)
            return 1.0, 1.0

        return benchmark

    names = {
        "PAIRS": 40,
        "SEED": 0,
        "partial": partial,
        "work": work,
        "more_work": more_work,
        "seconds": None,
        "best_of": lambda *_: named("best"),
        "paired": lambda *_: named("pairs"),
        "false_alarms": lambda benchmark, fn, trials: sum(benchmark(fn, fn)[0] > 1.01 for _ in range(trials)),
    }
    executed("00", "ladder-measure", lab=SimpleNamespace(by_preset=lambda *_: 60), **names)
    turns = [called[start : start + 4] for start in range(0, len(called), 4)]
    assert len(turns) == 60 and all(sorted(turn) == sorted(turns[0]) for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 2  # both orders


def test_the_folded_solution_of_the_challenge_reaches_its_goal_and_pairs_alone_do_not():
    lesson = challenge_of("00")
    _, solution, _ = re.split("```(?:python)?\n", cells("00")["challenge-idea"])
    exec(solution, lesson)
    forty, hundred = (partial(pairs_of, lesson["paired_speedup"], pairs) for pairs in (40, 100))
    reached = [reaches_the_goal(lesson["place"](method, TRIALS)) for method in (lesson["plan"], forty, hundred)]
    assert reached == [True, False, False]
    point = lesson["place"](lesson["plan"], TRIALS)
    low, high = point["smallest difference ci95"]
    assert low < point["smallest difference"] < high
    told = f"{point['machine time']:.2f} s, and {point['smallest difference']:.2f} %"
    assert f"{told} (95 % interval {low:.2f} to {high:.2f})" in " ".join(cells("00")["challenge-idea"].split())


def test_the_interval_of_a_95th_percentile_is_found_by_counting():
    low, high = challenge_of("00")["places_of_95"](200)
    assert low == bdtrik_rank(0.025) - 1 and high == bdtrik_rank(0.975)
    draw, held = random.Random(0), 0
    for _ in range(1000):
        values = sorted(draw.random() for _ in range(200))
        held += values[low] <= 0.95 <= values[high]
    assert 940 <= held <= 985


def bdtrik_rank(chance: float) -> int:
    """The number of heads, of 200 flips of a coin with 95 % heads, up to which lies this chance, rounded up."""
    return math.ceil(bdtrik(chance, 200, 0.95))


def test_no_luck_of_the_shuffling_lets_as_many_pairs_as_fit_reach_the_goal():
    lesson = challenge_of("00")

    def shuffled_otherwise(a: Callable, b: Callable, clock: Callable, seed: int, change: int) -> float:
        return lesson["paired_speedup"](a, b, 45, seed ^ change, clock)[0]

    points = [lesson["place"](partial(shuffled_otherwise, change=change), TRIALS) for change in range(20)]
    assert max(point["machine time"] for point in points) <= 0.25
    assert not any(map(reaches_the_goal, points))


def test_a_plan_can_read_neither_the_machine_nor_the_true_speed_up_from_its_seed():
    def reader(a: Callable, b: Callable, clock: Callable, seed: int) -> float:
        return clock.cost[a] / clock.cost[b]

    def guesser(a: Callable, b: Callable, clock: Callable, seed: int) -> float:
        return random.Random(f"trial {seed}").uniform(0.8, 1.25)

    place = challenge_of("00")["place"]
    with pytest.raises(AttributeError, match="cost"):
        place(reader, TRIALS)
    assert not reaches_the_goal(place(guesser, TRIALS))


def challenge_of(lesson: str) -> dict[str, Any]:
    """The cells of the challenge that place a method, without the reference methods."""
    made = executed(lesson, "machine", "exercise-2", "exercise-3", seconds=None, work=work, more_work=more_work)
    exec(cells(lesson)["clock-of"], made)
    return made


def more_work() -> None:
    """The slower function of the challenge; the simulated machine never calls it."""


def pairs_of(paired_speedup: Callable, pairs: int, a: Callable, b: Callable, clock: Callable, seed: int) -> float:
    return paired_speedup(a, b, pairs, seed, clock)[0]


def reaches_the_goal(point: dict[str, float]) -> bool:
    return point["machine time"] <= 0.25 and point["smallest difference"] <= 1.7


def listener() -> tuple[list[str], Callable]:
    """A list, and a stand-in of lab.say that puts its sentences there."""
    said: list[str] = []

    def say(_: str, *sentences: str | bool, any_preset: bool = False) -> None:
        said.extend(filter(None, sentences))

    return said, say


def test_the_stopwatch_s_shares_are_those_of_the_recording():
    said, say = listener()
    recorded = SimpleNamespace(processes=5, value=88.0, ci95=(80.0, 96.0))
    favoured = SimpleNamespace(processes=5, value=90.0, ci95=(84.0, 93.0))
    names = {"recorded": recorded, "favoured": favoured}
    executed("00", "stopwatch-say", lab=SimpleNamespace(say=say), show=show, **names)
    alarms, faster = "88 % (80 to 96 over 5 processes)", "90 % (84 to 93 over 5 processes)"
    assert said[0] == f"False alarms of the stopwatch: {alarms}; the second call is faster in {faster}."


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((84.0, 93.0), "so the second call is favoured: a bias"),
        ((7.0, 16.0), "so the first call is favoured: a bias"),
        ((41.0, 60.0), "No clear bias towards the first or the second call is seen."),
    ],
)
def test_a_bias_towards_one_place_in_the_pair_is_told_from_chance(ends: tuple[float, float], words: str):
    said, say = listener()
    recorded = SimpleNamespace(processes=1, value=86.0, ci95=(78.0, 92.0))
    favoured = SimpleNamespace(processes=1, value=sum(ends) / 2, ci95=ends)
    names = {"recorded": recorded, "favoured": favoured}
    executed("00", "stopwatch-say", lab=SimpleNamespace(say=say), show=show, **names)
    assert len(said) == 2 and words in said[1]


def test_ranges_of_five_hold_the_median_of_twenty_and_intervals_of_one_process_seldom():
    lesson = executed("00", "coverage", files=files, json=json)
    assert len(lesson["different"]) == 16
    assert lesson["mean_share"]("within a run") < 0.6 and lesson["mean_share"]("over five") > 0.9
    shown, holds = lesson["shown"], lesson["holds"]
    assert sum(map(holds, shown["intervals"])) == round(20 * shown["within a run"])
    assert all(map(holds, lesson["ranges"]))


def test_of_an_a_a_test_s_three_wrong_benchmarks_one_is_caught():
    lesson = executed("00", "exercise-2", "exercise-3", "accelerator", "ann", seconds=None)
    fn = work
    ratios = [lesson[name](lesson["Accelerator"]({fn: 0.01}), fn, fn) for name in ("ann", "ben", "cem")]
    assert [round(ratio, 2) for ratio in ratios] == [1.0, 0.67, 1.0]
