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
        ([1.0] * 600 + [0.8] * 200 + [1.0] * 200, "From call 600 to 800 a call took 20% less than the median of all."),
        ([1.0] * 800 + [1.3] * 100 + [1.0] * 50 + [1.2] * 50, "From call 800 to 900 a call took 30% more"),
        (
            [1.0] * 600 + [1.06] * 50 + [1.0] * 200 + [1.2] * 50 + [1.0] * 100,
            "From call 850 to 900 a call took 20% more",
        ),
        ([1.0] * 600 + [0.8] * 200 + [1.0] * 200, "drift outweighs noise here"),
        ([1.0] * 1000, "So noise alone can make this chart"),
    ],
)
def test_of_the_run_chart_s_longest_stretches_of_another_speed_the_farthest_is_named(times: list[float], words: str):
    assert words in said_of_the_run_chart(times)


def test_drift_is_said_to_hide_the_tail_only_where_the_mean_lies_below_the_median():
    assert "drift outweighs" not in said_of_the_run_chart([1.0] * 800 + [1.3] * 200)


QUICK_MOMENT = "may be of a quick moment."


@pytest.mark.parametrize(
    ("quick", "words"),
    [
        (range(300, 320), "quickest"),
        (range(25, 1000, 50), None),
    ],
)
def test_quick_calls_in_a_string_are_told_from_scattered_ones(quick: range, words: str | None):
    draw = random.Random(0)
    times = [draw.gauss(0.8 if call in quick else 1.0, 0.01) for call in range(1000)]
    said = said_of_the_run_chart(times)
    assert (QUICK_MOMENT in said) == (words is not None)
    assert (f"{words} calls come in strings." if words else "So noise alone can make this chart") in said


def test_slow_calls_in_a_string_do_not_make_the_best_one_of_a_quick_moment():
    draw = random.Random(0)
    times = [draw.gauss(1.3 if 500 <= call < 520 else 1.0, 0.01) for call in range(1000)]
    said = said_of_the_run_chart(times)
    assert "The slowest calls come in strings." in said and QUICK_MOMENT not in said


@pytest.mark.parametrize(
    ("processes", "words"),
    [(5, ["Over all processes it is 1.04 (1.02 to 1.06 over 5 processes)."]), (0, [])],
)
def test_nothing_is_concluded_from_a_median_of_the_first_calls(processes: int, words: list[str]):
    said, say = listener()
    opening = SimpleNamespace(value=1.04, ci95=(1.02, 1.06), processes=processes)
    lab = SimpleNamespace(say=say, record=ignore, result=lambda _: opening)
    executed("00", "settling-say", lab=lab, settling=[1.04] * 100, samples=[1.0] * 1000)
    assert "took 1.04 times as long" in said[0]
    assert said[1:-1] == words and "drift moves it" in said[-1]


def said_of_the_run_chart(times: list[float]) -> str:
    said, say = listener()
    lesson = executed("00", "noise-wander", samples=times)
    names = {
        "best": min(times),
        "mean": statistics.mean(times),
        "middle": statistics.median(times),
        "samples": times,
    }
    executed("00", "noise-say", **lesson | names | {"lab": SimpleNamespace(say=say, table=ignore)})
    return " ".join(said)


@pytest.mark.parametrize(
    ("processes", "words"), [(5, "none of 300 (at most 1.3% if independent)"), (0, "0 (0 to 2 within this run)")]
)
def test_no_false_alarm_in_any_process_is_told_with_the_share_that_it_allows(processes: int, words: str):
    told_share = function("00", "told_share", trials=60, wilson=stats.wilson)
    ends = (0.0, 0.0) if processes else (0.0, 2.0)
    assert told_share(SimpleNamespace(value=0.0, ci95=ends, processes=processes)) == words


@pytest.mark.parametrize(
    ("alarms_of_pairs", "words"),
    [
        ((0.0, 0.0), "40 pairs see the 3 % in 60 of 60 comparisons."),
        ((6.0, 30.0), "but raise more false alarms than honest pairs should: run it again."),
    ],
)
def test_methods_that_name_winners_where_there_are_none_are_not_believed(
    alarms_of_pairs: tuple[float, float], words: str
):
    said, say = listener()
    shares = [SimpleNamespace(ci95=ends) for ends in [(50.0, 63.0), (6.0, 30.0), alarms_of_pairs, (0.0, 2.0)]]
    names = {"PAIRS": 40, "trials": 60, "shares": shares, "seen": [21, 60, 60, 60]}
    executed("00", "ladder-here-say", lab=SimpleNamespace(say=say), **names)
    assert (
        "That one call and the best of 40 see the 3 % proves little: winners are named where there are none, too."
        in said
    )
    assert words in " ".join(said)


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
        "in_blocks": lambda *_: named("blocks"),
        "false_alarms": lambda benchmark, fn, trials: sum(benchmark(fn, fn)[0] > 1.01 for _ in range(trials)),
    }
    executed("00", "ladder-measure", lab=SimpleNamespace(by_preset=lambda *_: 60), **names)
    turns = [called[start : start + 8] for start in range(0, len(called), 8)]
    assert len(turns) == 60 and all(sorted(turn) == sorted(turns[0]) for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 6  # all orders of one call, the best and the pairs
    after_pairs = [called[i + 2] for i, name in enumerate(called[:-2]) if name == "pairs" and called[i + 1] == "pairs"]
    assert set(after_pairs) == {"blocks"}


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (
            1.5,
            "So single pairs are narrower here, in part by counting, which promises 97.9% for 10 ratios and 96.2% for "
            "40.",
        ),
        (0.8, "So blocks are narrower here, too."),
        (1.0, "Which are narrower is not shown."),
    ],
)
def test_blocks_are_judged_by_their_intervals_from_the_same_calls(share: float, words: str):
    said, say = listener()
    lab = SimpleNamespace(say=say, record=ignore, result=lambda _: SimpleNamespace(value=share, **ENDS[share]))
    names = {
        "widths": [share] * 60,
        "seen": [20, 40, 40, 40],
        "trials": 60,
        "PAIRS": 40,
        "stats": stats,
        "show": show,
    }
    executed("00", "exercise-2", "blocks-here-say", lab=lab, **names)
    assert words in " ".join(said)


ENDS = {share: {"ci95": (share, share), "processes": 0} for share in (1.5, 0.8, 1.0)}


def test_blocks_take_the_times_of_the_same_calls_as_single_pairs():
    def ticking() -> Callable:
        ticks = itertools.count(1)
        return lambda fn, number=1: 1e-3 * (1 + next(ticks) % 7 / 100)

    alike = "exercise-1", "repeated", "exercise-2", "exercise-3", "paired", "ladder-measure"
    names = {"PAIRS": 40, "SEED": 0, "partial": partial, "work": work, "more_work": more_work}
    names["stopwatch"] = lambda *_: (1.0, 1.0)
    lab = SimpleNamespace(answer=lambda _, own: own, by_preset=lambda *_: 4)
    lesson = executed("00", *alike, lab=lab, seconds=ticking(), **names)
    assert lesson["tape"] == []
    assert [len(answers) for answers in lesson["answers_of"].values()] == [4] * 4


@pytest.mark.parametrize(
    ("ends", "speaks_of_itself"), [((1.19, 1.21), True), ((1.1, 1.3), False), ((0.0, math.inf), False)]
)
def test_an_interval_within_a_run_speaks_of_that_run_where_runs_differ_by_more_than_twice_its_span(
    ends: tuple[float, float], speaks_of_itself: bool
):
    runs = [SimpleNamespace(process_speedup=ratio, within_run=ends) for ratio in WIDE]
    assert (OF_ITSELF in said_of_processes(runs, runs)) == speaks_of_itself


@pytest.mark.parametrize(
    ("processes", "said_of_cold"),
    [
        ((0.56, 0.6, 0.63), "3 processes differ by 12.5%, the interval within one spans 1.0%."),
        ((0.625, 0.63, 0.635), None),
        ((), None),
    ],
)
def test_an_interval_speaks_of_its_run_where_processes_differ_by_more_in_the_cold_comparison(
    processes: tuple[float, ...], said_of_cold: str | None
):
    within_run = (0.628, 0.634)
    ends = (min(processes), max(processes)) if processes else within_run
    cold = SimpleNamespace(processes=processes, ci95=ends, within_run=within_run)
    said = said_of_processes([timed(ratio) for ratio in STEADY], [timed(ratio) for ratio in STEADY], cold)
    assert (OF_ITSELF in said) == (said_of_cold is not None)
    assert (said_of_cold or "") in said


OF_ITSELF = "An interval within a run speaks of that run alone."


STEADY, WIDE = (1.19, 1.195, 1.2, 1.205, 1.21), (1.1, 1.15, 1.2, 1.25, 1.3)


@pytest.mark.parametrize(
    ("here", "fresh", "words"),
    [
        (STEADY, WIDE, "So another process changes more than another moment."),
        (WIDE, STEADY, "So another moment is enough to change it."),
        (WIDE, WIDE, "Whether process or moment matters more is not shown."),
        ((1.5, 1.55, 1.6, 1.65, 1.7), WIDE, "All runs here lie on one side of all fresh ones"),
        (STEADY[:2], WIDE[:2], "is not shown"),  # too few
    ],
)
def test_moment_and_process_are_told_apart_by_runs_in_turn(
    here: tuple[float, ...], fresh: tuple[float, ...], words: str
):
    verdicts = (
        "another process changes more",
        "another moment is enough",
        "is not shown",
        "All runs here lie on one side",
    )
    said = said_of_processes([timed(ratio) for ratio in here], [timed(ratio) for ratio in fresh])
    assert words in said
    assert [verdict for verdict in verdicts if verdict in said] == [verdict for verdict in verdicts if verdict in words]


@pytest.mark.parametrize(
    ("here", "words"),
    [
        ((2.6, 2.65, 2.17, 2.62, 2.64), "Run here 3 makes most of that: the others differ by 1.9%. One run cannot"),
        ((1.1, 1.15, 1.2, 1.25, 1.3), None),
    ],
)
def test_a_run_that_makes_the_spread_by_itself_is_named_and_nothing_concluded_from_it(
    here: tuple[float, ...], words: str | None
):
    runs = [SimpleNamespace(process_speedup=ratio, within_run=(ratio, 1.005 * ratio)) for ratio in here]
    said = said_of_processes(runs, [SimpleNamespace(process_speedup=2.6, within_run=(2.6, 2.61))] * 5)
    verdicts = ("another moment is enough", "is not shown", OF_ITSELF)
    if words:
        assert words in said and not any(verdict in said for verdict in verdicts)
    else:
        assert "makes most" not in said


@pytest.mark.parametrize(("pages", "are_told"), [((0.6, 0.7, 0.72), True), ((), False)])
def test_the_pages_of_a_recording_are_told_beside_the_runs_here(pages: tuple[float, ...], are_told: bool):
    runs = [timed(ratio) for ratio in STEADY]
    said = said_of_processes(runs, runs, pages=pages)
    assert (", of the pages by 20.0%." in said) == are_told
    assert ("The pages differ most" in said) == are_told


def timed(speedup: float) -> SimpleNamespace:
    """A comparison of one process whose interval holds what the others say."""
    return SimpleNamespace(process_speedup=speedup, within_run=(1.0, 1.5))


ALIKE = SimpleNamespace(processes=(), ci95=(0.6, 0.61), within_run=(0.6, 0.61))


def said_of_processes(
    here: list[SimpleNamespace],
    fresh: list[SimpleNamespace],
    cold: SimpleNamespace = ALIKE,
    pages: tuple[float, ...] = (),
) -> str:
    said, say = listener()
    names = {
        "lab": SimpleNamespace(say=say, record=ignore),
        "this": SimpleNamespace(verdict="slower", processes=pages, ci95=(0.6, 0.72)),
        "here": here,
        "fresh": fresh,
        "cold": cold,
    }
    executed("00", "processes-apart", "processes-say", **names)
    return " ".join(said)


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


def test_the_median_over_blocks_of_four_reaches_the_goal_as_well():
    lesson = challenge_of("00")

    def by_blocks(a: Callable, b: Callable, clock: Callable, seed: int) -> float:
        times: dict[str, list[float]] = {"A": [], "B": []}

        def noting(side: str) -> float:
            times[side].append(clock({"A": a, "B": b}[side]))
            return times[side][-1]

        lesson["paired_speedup"]("A", "B", 40, seed, noting)
        return stats.paired_ratio(times["A"], times["B"], 4)[0]

    assert reaches_the_goal(lesson["place"](by_blocks, TRIALS))


def test_untimed_calls_stretch_the_blocks_of_a_drifting_machine_and_so_cost_accuracy():
    lesson = challenge_of("00")

    def by_blocks(a: Callable, b: Callable, clock: Callable, seed: int, settled: bool) -> float:
        functions, times = {"A": a, "B": b}, {"A": [], "B": []}
        before = None

        def noting(side: str) -> float:
            nonlocal before
            if settled and side != before:
                clock(functions[side])
            before = side
            times[side].append(clock(functions[side]))
            return times[side][-1]

        lesson["paired_speedup"]("A", "B", 48, seed, noting)
        return stats.paired_ratio(times["A"], times["B"], 6)[0]

    plain, settled = (lesson["place"](partial(by_blocks, settled=way), 1000) for way in (False, True))
    assert settled["smallest difference ci95"][0] > plain["smallest difference ci95"][1]


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
    place, _, _ = cells(lesson)["place"].partition("def by_labkit")
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


def ignore(*_: Any, **__: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("speedups", "tilted", "words"),
    [
        ([1.05] * 81 + [0.95] * 9, True, "81 lie above 1: the first call was mostly slower"),
        ([1.05] * 9 + [0.95] * 81, True, "81 lie below 1: the second call was mostly slower"),
        ([1.05] * 45 + [0.95] * 45, False, "by a factor of 1.05"),
        ([1.0], False, "by a factor of 1.00"),
    ],
)
def test_a_tilt_of_the_stopwatch_is_told_as_what_happened_in_this_burst(
    speedups: list[float], tilted: bool, words: str
):
    said, say = listener()
    names = {"alarms": 1, "trials": len(speedups), "recorded": SimpleNamespace(processes=0)}
    lesson = executed("00", "stopwatch-say", lab=SimpleNamespace(say=say), speedups=speedups, **names)
    assert lesson["tilted"] == tilted and words in " ".join(said)


def test_the_stopwatch_s_share_of_a_recording_stands_beside_the_count_of_its_last_process():
    said, say = listener()
    recorded = SimpleNamespace(processes=5, value=88.0, ci95=(80.0, 96.0))
    names = {"alarms": 86, "trials": 100, "speedups": [1.05] * 86 + [1.0] * 14, "recorded": recorded}
    executed("00", "stopwatch-say", lab=SimpleNamespace(say=say), show=show, **names)
    assert said[0].endswith("in 86 of 100 comparisons.")
    assert said[1] == "Over all processes the median share is 88 % (80 to 96 over 5 processes)."


@pytest.mark.parametrize(
    ("mean_of_a_hundred", "words"),
    [(75.5, "(76 %) is as bad as one call (72 %)"), (95.0, "is worse than"), (50.0, "is better than")],
)
def test_the_mean_of_a_hundred_is_set_beside_one_call(mean_of_a_hundred: float, words: str):
    said, say = listener()
    numbers = {0.0: (1, 100), 0.5: (10, 100, 760, 1000)}
    of_drift = itertools.product(numbers, ("best", "median", "mean"), (1, 10, 100, 760, 1000))
    alarms_of = dict.fromkeys(of_drift, 71.5) | {(0.0, "mean", 100): mean_of_a_hundred}
    executed("00", "sweep-say", lab=SimpleNamespace(say=say), numbers=numbers, alarms_of=alarms_of)
    assert words in " ".join(said)


def test_labkit_s_own_a_a_test_leans_to_one_side_with_two_threads_by_less_than_a_verdict():
    lesson = executed("00", "coverage", files=files, json=json)
    assert lesson["processes_of"] == {1: 40, 2: 40}
    assert lesson["below"][2] >= 30  # by chance once in four hundred times
    assert 14 < lesson["below"][1] < 26  # with one thread no side is common
    assert lesson["shift"] < 0.01


def test_ranges_of_five_hold_the_median_as_counting_promises_and_equal_as_one_less_often():
    lesson = executed("00", "coverage", files=files, json=json)
    share, promised = lesson["mean_share"], lesson["by_counting"]
    assert promised == pytest.approx(0.967, abs=5e-4)
    assert abs(share("over five", lesson["settings"]) - promised) < 0.02
    assert share("over five, known", lesson["equal"][2]) < 0.9375 - 0.2
