"""What lesson 00 concludes holds for its own simulated machine, whose truth is known."""

import itertools
import json
import math
import random
import re
import statistics
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from lesson_cells import cells, executed, function
from scipy.special import bdtrik

from labkit import bench, files, show, stats

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


def test_the_median_of_a_thousand_calls_is_still_fooled_but_rarely_that_of_a_whole_swing():
    assert false_alarms(statistics.median, 1000) > 0.8 * TRIALS
    assert false_alarms(statistics.median, 760) < 0.3 * TRIALS


@pytest.mark.parametrize(("calls", "fewer_of_best"), [(10, True), (100, False)])
def test_the_order_of_pairs_removes_most_false_alarms_of_the_best_and_the_median_the_rest_of_many(
    calls: int, fewer_of_best: bool
):
    lesson = executed("00", "machine", "seconds", "exercise-1", "exercise-2", "exercise-3", time=None)
    lesson = executed("00", "paired", **lesson | {"lab": SimpleNamespace(answer=lambda _, fn: fn)})
    benchmarks = lesson["best_in_pairs"](calls), lesson["paired"](calls, interval=False)
    best, median = (
        lesson["false_alarms"](partial(benchmark, clock=lesson["Machine"]({work: 0.002}, 0.5)), work, TRIALS)
        for benchmark in benchmarks
    )
    assert best < 0.5 * false_alarms(min, calls)
    assert (best < 0.5 * median) if fewer_of_best else (median < 0.5 * best)


def test_a_swing_has_as_many_calls_as_the_page_draws():
    machine = executed("00", "machine")["Machine"]({work: 0.002}, drift=0.5)
    calls = sum(1 for _ in itertools.takewhile(lambda _: machine.now < 200, iter(lambda: machine(work), None)))
    assert executed("00", "sweep-numbers")["swing"] == pytest.approx(calls / 100, rel=0.01)


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
    lesson = executed("00", "machine", "exercise-2", "exercise-3", "carry", seconds=None, bench=bench)
    a, b, of_200 = lesson["side_a"], lesson["side_b"], lesson["of_200"]
    alarms = [
        of_200(side, side, method)[0] for side in (a, b) for method in (lesson["hundred_pairs"], lesson["of_labkit"])
    ]
    carried, speedup = of_200(a, b, lesson["hundred_pairs"])
    kept, unbiased = of_200(a, b, lesson["of_labkit"])
    assert max(alarms) <= 10 and carried > 180 and speedup < 0.98
    assert kept <= 10 and abs(unbiased - 1) < 0.002


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([1.0] * 600 + [0.8] * 200 + [1.0] * 200, "lies 25.00% above the lowest; in 99 shufflings"),
        ([1.0] * 600 + [0.8] * 200 + [1.0] * 200, "changed its speed."),
        ([1.05] * 100 + [1.0] * 900, "The change lies in the first hundred calls"),
        ([1.0] * 1000, "So noise alone can make this chart"),
    ],
)
def test_another_speed_is_told_from_noise_in_words(times: list[float], words: str):
    said, say = listener()
    lesson = executed("00", "noise-wander", samples=times)
    executed("00", "noise-say", **lesson | {"lab": SimpleNamespace(say=say)})
    assert words in " ".join(said)


@pytest.mark.parametrize(
    ("processes", "words"), [(5, "none of 300 (at most 1.3% if independent)"), (0, "0 (0 to 2 within this run)")]
)
def test_no_false_alarm_in_any_process_is_told_with_the_share_that_it_allows(processes: int, words: str):
    told_share = function("00", "told_share", trials=60, wilson=stats.wilson)
    ends = (0.0, 0.0) if processes else (0.0, 2.0)
    assert told_share(SimpleNamespace(value=0.0, ci95=ends, processes=processes)) == words


@pytest.mark.parametrize(
    ("of_one_call", "of_best", "words"),
    [
        (
            (50.0, 63.0),
            (6.0, 30.0),
            "One call and the best of 40 raise more than 5 % false alarms, so a declared difference",
        ),
        ((0.0, 9.0), (6.0, 30.0), "The best of 40 raises more than 5 % false alarms, so a declared difference"),
        ((0.0, 9.0), (0.0, 9.0), "40 pairs see the 3 % in 59 of 60 comparisons."),
    ],
)
def test_methods_that_name_winners_where_there_are_none_are_not_believed(
    of_one_call: tuple[float, float], of_best: tuple[float, float], words: str
):
    said, say = listener()
    shares = [SimpleNamespace(ci95=ends, processes=0) for ends in (of_one_call, of_best, (0.0, 0.0))]
    executed("00", "ladder-here-say", lab=SimpleNamespace(say=say), **names_of_the_ladder(shares))
    assert said[0].startswith(words) and said[-1] == "40 pairs see the 3 % in 59 of 60 comparisons."


@pytest.mark.parametrize(("median", "is_named"), [(18.0, True), (4.0, False)])
def test_of_several_processes_the_median_decides_whether_a_method_is_believed(median: float, is_named: bool):
    said, say = listener()
    shares = [SimpleNamespace(value=value, ci95=(3.0, 60.0), processes=5) for value in (57.0, median, 0.0)]
    executed("00", "ladder-here-say", lab=SimpleNamespace(say=say), **names_of_the_ladder(shares))
    assert ("the best of 40" in said[0]) == is_named


@pytest.mark.parametrize(
    ("favour_b", "words"),
    [
        ((48, 20, 0), ["The false alarms of one call mostly favour B, which is timed second. Such a bias also helps"]),
        ((48, 38, 0), ["The false alarms of one call and the best of 40 mostly favour B"]),
        (
            (5, 38, 0),
            ["alarms of the best of 40 mostly favour B", "alarms of one call mostly favour A, which is timed"],
        ),
        ((27, 20, 0), []),
    ],
)
def test_false_alarms_that_favour_one_place_in_the_pair_are_told(favour_b: tuple[int, int, int], words: list[str]):
    said, say = listener()
    shares = [SimpleNamespace(value=value, ci95=(3.0, 95.0), processes=5) for value in (88.0, 67.0, 0.0)]
    names = names_of_the_ladder(shares, favour_b=favour_b)
    executed("00", "ladder-here-say", lab=SimpleNamespace(say=say), **names)
    told = [sentence for sentence in said if "favour" in sentence]
    assert len(told) == len(words) and all(word in sentence for word, sentence in zip(words, told, strict=True))


def names_of_the_ladder(shares: list[SimpleNamespace], favour_b: tuple[int, int, int] = (0, 0, 0)) -> dict[str, Any]:
    """What the sentences on the ladder read; without an alarm that favours B there are no alarms at all."""
    alarms = (53, 41, 0) if any(favour_b) else (0, 0, 0)
    return {
        "PAIRS": 40,
        "trials": 60,
        "shares": shares,
        "favour_b": favour_b,
        "alarms_here": dict(zip(("one call", "best of 40", "40 pairs"), alarms, strict=True)),
        "rows": [{"3 % seen": seen} for seen in (21, 60, 59)],
        "wilson": stats.wilson,
    }


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
        "stopwatch": named("one"),
        "repeated": lambda *_: named("best"),
        "paired": lambda *_: named("pairs"),
        "false_alarms": lambda benchmark, fn, trials: sum(benchmark(fn, fn)[0] > 1.01 for _ in range(trials)),
    }
    executed("00", "ladder-measure", lab=SimpleNamespace(by_preset=lambda *_: 60), **names)
    turns = [called[start : start + 6] for start in range(0, len(called), 6)]
    assert len(turns) == 60 and all(sorted(turn) == sorted(turns[0]) for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 6  # all orders of one call, the best and the pairs


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


def test_a_plan_cannot_buy_a_part_of_a_call():
    def cheap(a: Callable, b: Callable, clock: Callable, seed: int) -> float:
        return clock(a, 0.001) / clock(b, 0.001)

    with pytest.raises(TypeError, match="integer"):
        challenge_of("00")["place"](cheap, TRIALS)


def test_calls_that_are_timed_together_are_disturbed_each_for_itself():
    machine = executed("00", "machine")["Machine"]({work: 0.002})
    apart, together = ([machine(work, number) / number for _ in range(500)] for number in (1, 100))
    assert statistics.stdev(together) < 0.2 * statistics.stdev(apart)
    assert statistics.fmean(together) == pytest.approx(statistics.fmean(apart), rel=0.05)


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
    place, _, _ = cells(lesson)["place"].partition("methods = {")
    exec(cells(lesson)["clock-of"] + "\n" + place, made)
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


def test_the_stopwatch_s_share_of_a_recording_stands_beside_the_count_of_its_last_process():
    said, say = listener()
    recorded = SimpleNamespace(processes=5, value=88.0, ci95=(80.0, 96.0))
    favoured = SimpleNamespace(processes=5, value=90.0, ci95=(84.0, 93.0))
    names = {"alarms": 86, "trials": 100, "second_faster": 91, "recorded": recorded, "favoured": favoured}
    executed("00", "stopwatch-say", lab=SimpleNamespace(say=say), show=show, **names)
    assert "process 86 of 100 A/A tests of the stopwatch raised a false alarm; in 91 the second" in said[0]
    alarms, faster = "88 % (80 to 96 over 5 processes)", "90 % (84 to 93 over 5 processes)"
    assert said[1] == f"All recorded processes: false alarms in {alarms}, the second call faster in {faster}."


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((84.0, 93.0), "So the second call is favoured: a bias"),
        ((7.0, 16.0), "So the first call is favoured: a bias"),
        ((41.0, 60.0), "No clear bias towards the first or the second call is seen."),
    ],
)
def test_a_bias_towards_one_place_in_the_pair_is_told_from_chance(ends: tuple[float, float], words: str):
    said, say = listener()
    recorded = SimpleNamespace(processes=0, value=86.0, ci95=None)
    favoured = SimpleNamespace(processes=0, value=sum(ends) / 2, ci95=ends)
    names = {"alarms": 86, "trials": 100, "second_faster": 50, "recorded": recorded, "favoured": favoured}
    executed("00", "stopwatch-say", lab=SimpleNamespace(say=say), show=show, **names)
    assert len(said) == 2 and words in said[1]


def test_labkit_s_own_a_a_test_leans_to_one_side_with_two_threads_by_less_than_a_verdict():
    lesson = executed("00", "coverage", files=files, json=json)
    assert lesson["processes_of"] == {1: 40, 2: 40}
    assert lesson["below"][2] >= 30
    assert 14 < lesson["below"][1] < 26  # with one thread no side is common
    assert max(abs(row["median"] - 1) for row in lesson["equal"][2]) < 0.01
    assert len(lesson["ends_of"]) == 80 and not any(low > 1.01 or high < 1 / 1.01 for low, high in lesson["ends_of"])


def test_ranges_of_five_hold_the_median_as_counting_promises_and_equal_as_one_less_often():
    lesson = executed("00", "coverage", files=files, json=json)
    share, promised = lesson["mean_share"], lesson["by_counting"]
    assert promised == pytest.approx(0.967, abs=5e-4)
    error = statistics.stdev(row["over five"] for row in lesson["settings"]) / len(lesson["settings"]) ** 0.5
    assert abs(share("over five", lesson["settings"]) - promised) < min(0.02, error)
    assert share("over five, known", lesson["equal"][2]) < 0.9375 - 0.2
    for case in lesson["words"].keys() - {*lesson["one_function"]}:
        of = [row for row in lesson["settings"] if row["case"] == case]
        assert share("within a run", of) < 0.6 and share("over five", of) > 0.9


def test_of_an_a_a_test_s_three_wrong_benchmarks_one_is_caught():
    lesson = executed("00", "accelerator", "ann", "ben", "cem")
    fn = work
    ratios = [lesson[name](lesson["Accelerator"]({fn: 0.01}), fn, fn) for name in ("ann", "ben", "cem")]
    assert [round(ratio, 2) for ratio in ratios] == [1.0, 0.67, 1.0]


@pytest.mark.parametrize(("five", "words"), [(0.96, "no difference is seen"), (0.8, "five in a row do worse")])
def test_ranges_of_five_in_a_row_are_judged_by_what_counting_promises(five: float, words: str):
    said, say = listener()
    lesson = executed("00", "coverage", files=files, json=json)
    settings = [row | {"over five": five + 0.05 * (-1) ** place} for place, row in enumerate(lesson["settings"])]
    executed("00", "coverage-say", **lesson | {"settings": settings, "lab": SimpleNamespace(say=say)})
    assert words in said[0]
