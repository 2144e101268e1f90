"""The benchmark of intervals: what it counts, on processes drawn at random."""

import random
import statistics

import pytest
from interval_coverage import CASES, QUICK, holding, judged, over_five

PROCESSES = 20
WIDTH = 0.01  # half of an interval within a run


def drawn(rng: random.Random, spread: float) -> tuple[list[float], list[tuple[float, float]]]:
    """Ratios of processes about 2, each with a state of its own, and intervals about each ratio."""
    ratios = [2 + rng.gauss(0, spread) for _ in range(PROCESSES)]
    return ratios, [(ratio - WIDTH, ratio + WIDTH) for ratio in ratios]


def coverage(spread: float) -> tuple[float, float]:
    """The mean coverage of both kinds of intervals over many cases."""
    rng = random.Random(0)
    rows = [judged(*drawn(rng, spread), known=None) for _ in range(500)]
    return statistics.fmean(row["within a run"] for row in rows), statistics.fmean(row["over five"] for row in rows)


def test_intervals_within_a_run_hold_where_processes_agree_and_fail_where_each_has_a_state_of_its_own():
    agreeing, _ = coverage(spread=WIDTH / 4)
    parting, over_processes = coverage(spread=5 * WIDTH)
    assert agreeing > 0.99 and parting < 0.25 and over_processes > 0.95


def test_a_range_is_of_five_processes_that_ran_one_after_another():
    assert over_five([5, 4, 3, 2, 1, 9]) == [(1, 5), (1, 9)]
    assert over_five([1, 2, 3, 4]) == []


def test_shares_are_of_intervals_that_hold_a_number_ends_included():
    intervals = [(1.0, 2.0), (2.0, 3.0), (2.5, 3.0), (0.0, float("inf"))]
    assert holding(intervals, 2.0) == 0.75
    assert holding(intervals, None) is None


@pytest.mark.parametrize("name", CASES)
def test_each_case_builds_both_sides(name: str):
    case = CASES[name]
    for build in (case.baseline, case.candidate):
        assert build()().isfinite().all()
    assert set(QUICK) <= CASES.keys()
