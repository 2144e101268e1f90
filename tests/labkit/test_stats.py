"""The statistics behind every claim, on SIMULATED clocks: the interval is honest, and its guard can fail."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import spearmanr

from labkit import stats
from labkit.errors import InputError

RUNS, PAIRS, PER_BLOCK = 1000, 120, 6


def slots(environment: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """SIMULATED seconds of n consecutive calls of the same work: 3 % noise, 2 % spikes, and what the machine does."""
    seconds = 1e-3 * np.exp(rng.normal(0, 0.03, n)) * (1 + 0.5 * (rng.random(n) < 0.02))
    t = np.arange(n) / n
    if environment == "linear drift":
        return seconds * (1 + 0.5 * t)
    if environment == "step":
        return seconds * np.where(t < rng.random(), 1, 1.8)
    if environment == "bursts":
        return seconds * np.where(np.cumsum(rng.random(n) < 0.05) % 2, 1.8, 1)
    if environment == "preemption":
        return seconds + (rng.random(n) < 0.4) * rng.uniform(0.5e-3, 3e-3, n)
    return seconds


ENVIRONMENTS = ("stationary", "linear drift", "step", "bursts", "preemption")


def interleaved(seconds, rng, ratio, order_cost=0.0, order=None):
    """Baseline and candidate seconds when the slots are dealt out in pairs; whoever goes first pays order_cost."""
    order = order or stats.balanced_order(random.Random(int(rng.integers(2**31))), PER_BLOCK)
    first = np.array([next(order) for _ in range(len(seconds) // 2)])
    pairs = seconds.reshape(-1, 2) * np.array([1 + order_cost, 1])
    a = np.where(first, pairs[:, 0], pairs[:, 1])
    b = np.where(first, pairs[:, 1], pairs[:, 0])
    return a * ratio, b


def sequential(seconds, rng, ratio):
    """All of the baseline, then all of the candidate, as a harness without interleaving does it."""
    half = len(seconds) // 2
    return seconds[:half] * ratio, seconds[half:]


def misses(design, environment, ratio=1.0, per_block=PER_BLOCK, **how):
    """How often the interval leaves out the true ratio, and the median error of the estimate."""
    rng = np.random.default_rng(7)
    results = []
    for _ in range(RUNS):
        a, b = design(slots(environment, rng, 2 * PAIRS), rng, ratio, **how)
        results.append(stats.paired_ratio(a.tolist(), b.tolist(), per_block))
    estimates, lo, hi = np.array(results).T
    return float(np.mean((lo > ratio) | (hi < ratio))), float(np.median(estimates) / ratio - 1)


def honest(miss_rate: float) -> bool:
    return 0.025 <= miss_rate <= 0.075


@pytest.mark.slow
@pytest.mark.parametrize("per_block", [1, PER_BLOCK])
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_interval_covers_the_true_ratio(environment, per_block):
    missed, bias = misses(interleaved, environment, ratio=2.0, per_block=per_block)
    assert honest(missed), f"{environment}: the interval misses 2.0 in {missed:.1%}"
    assert abs(bias) < 0.005


@pytest.mark.parametrize("environment", ["linear drift", "step", "bursts"])
def test_guard_fails_a_sequential_design(environment):
    missed, _ = misses(sequential, environment, per_block=1)
    assert not honest(missed)
    assert missed > 0.25


def test_guard_fails_a_fixed_order_where_going_first_costs():
    always_first = {"order_cost": 0.05, "order": iter(lambda: True, None)}
    missed, bias = misses(interleaved, "stationary", **always_first)
    assert not honest(missed)
    assert missed > 0.99
    assert bias > 0.03


def test_balanced_order_cancels_an_order_effect():
    missed, bias = misses(interleaved, "stationary", order_cost=0.05)
    assert missed <= 0.075
    assert abs(bias) < 0.005


def at_most(k: int, n: int) -> Fraction:
    """P(Binomial(n, 1/2) <= k), exactly."""
    return Fraction(sum(math.comb(n, i) for i in range(k + 1)), 2**n)


@pytest.mark.parametrize("n", [1, 5, 6, 7, 20, 60, 999, 2000])
def test_rank_inverts_the_binomial(n):
    k = stats._rank(n)
    assert at_most(k - 1, n) <= Fraction(25, 1000) < at_most(k, n) and (k > 0) == (n >= stats.LEAST)


def test_median_ci_by_hand():
    # n = 8: P(Bin <= 0) = 1/256, P(Bin <= 1) = 9/256 > 0.025, so k = 1: least and greatest value
    assert stats.median_ci([5, 3, 8, 1, 7, 2, 6, 4]) == (4.5, 1, 8)
    assert stats.median_ci([1.0, 3.0]) == (2.0, -math.inf, math.inf)
    assert stats.paired_ratio([2.0] * 5, [1.0] * 5) == (2.0, 0.0, math.inf)


def test_block_minima_by_hand():
    assert stats.block_minima([3, 1, 2, 9, 8, 7], 3) == [1, 7]
    assert stats.block_minima([3, 1], 1) == [3, 1]


@pytest.mark.parametrize("group", [2, 4, 6])
def test_every_group_is_balanced_and_orders_differ(group):
    order = stats.balanced_order(random.Random(0), group)
    groups = [tuple(next(order) for _ in range(group)) for _ in range(200)]
    assert all(sum(pairs) == group // 2 for pairs in groups)
    assert len(set(groups)) == math.comb(group, group // 2)


@pytest.mark.parametrize(
    ("levels", "change"),
    [
        ([1.0] * 20 + [1.8] * 20, 0.8),
        ([1.0] * 20 + [0.9] * 20, -0.1),
        ([1.0] * 20 + [1.029] * 20, None),  # real, and too small to warn of
        ([1.0] * 20 + [1.031] * 20, 0.031),
        ([0.9, 1.1] * 10 + [1.0, 1.2] * 10, None),  # the intervals of the halves overlap
        ([1.0, 9.0], None),  # too few to say
        ([1.0], None),
    ],
)
def test_drift_is_a_real_change_of_three_per_cent(levels, change):
    assert stats.drift(levels) == (change if change is None else pytest.approx(change))


@pytest.mark.parametrize("draw", ["normal", "exponential", "uniform"])
def test_drift_is_seldom_seen_in_noise(draw):
    rng, runs = np.random.default_rng(5), 300
    alarms = sum(stats.drift((1 + 0.05 * getattr(rng, draw)(size=40)).tolist()) is not None for _ in range(runs))
    assert alarms <= 0.05 * runs


# intervals of accuracies ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("share", [0.5, 0.93])
def test_wilson_covers_the_share(n, share):
    """Exact: the binomial probability of all outcomes whose interval holds the share, within what Wilson's can miss."""
    held = [right for right in range(n + 1) if stats.wilson(right, n)[1] <= share <= stats.wilson(right, n)[2]]
    covered = sum(math.comb(n, right) * share**right * (1 - share) ** (n - right) for right in held)
    assert 0.93 <= covered <= 0.98


def test_wilson_solves_its_own_equation():
    """Each bound p is where the observed share lies z standard errors of p away."""
    share, *bounds = stats.wilson(930, 1000)
    for p in bounds:
        assert abs(share - p) / math.sqrt(p * (1 - p) / 1000) == pytest.approx(1.959964)


def test_paired_difference_covers_the_truth_where_pairs_agree_mostly():
    """Two models right on 80 and 75 % of the examples, with most answers in common: a narrow interval that holds."""
    rng, inside, widths = np.random.default_rng(0), 0, []
    for _ in range(500):
        u = rng.uniform(size=400)
        mean, low, high = stats.paired_difference((u < 0.80).tolist(), (u < 0.75).tolist())
        inside += low <= 0.05 <= high
        widths.append(high - low)
        assert low <= mean <= high
    assert inside >= 450  # the normal law is rough at 20 differing pairs; far below 95 % it would be wrong
    assert np.mean(widths) < 0.05  # unpaired it would be 0.11


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.706205), (10, 2.262157), (11, 2.228139), (31, 2.042272)])
def test_mean_ci_is_students(n: int, quantile: float):
    """The quantiles are those of the printed tables of t."""
    values = list(range(n))
    mean, low, high = stats.mean_ci(values)
    assert (high - mean) / (np.std(values, ddof=1) / np.sqrt(n)) == pytest.approx(quantile, abs=1e-6)
    assert high - mean == pytest.approx(mean - low)


def test_one_value_has_no_interval_and_equal_ones_have_none_to_speak_of():
    assert stats.mean_ci([0.9]) == (0.9, -math.inf, math.inf)
    assert stats.mean_ci([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: stats.wilson(11, 10), "11 right of 10"),
        (lambda: stats.wilson(0, 0), "0 right of 0"),
        (lambda: stats.mean_ci([]), "got 0"),
        (lambda: stats.paired_difference([1] * 29, [1] * 29), "30 values or more, got 29 and 29"),
        (lambda: stats.paired_difference([1] * 30, [1] * 31), "equally long"),
        (lambda: stats.spearman([1, 2, 3, 4], [1, 2, 3]), "of one length"),
        (lambda: stats.spearman([1, 2, 3], [1, 2, 3]), "four or more"),
        (lambda: stats.spearman([1] * 5, range(5)), "the same everywhere"),
        (lambda: stats.spearman(range(5), [1] * 5), "the same everywhere"),
    ],
)
def test_what_has_no_interval_is_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def test_over_seeds_has_one_row_for_each_combination_in_order():
    rows = [{"name": n, "share": s, "seed": k, "y": k + s} for n in ("b", "a") for s in (1, 2) for k in range(3)]
    means = stats.over_seeds(rows, "y", by=("name", "share"))
    cells = [("b", 1, 2), ("b", 2, 3), ("a", 1, 2), ("a", 2, 3)]
    assert [(row["name"], row["share"], row["y"]) for row in means] == cells
    assert (means[0]["low"], means[0]["high"]) == stats.mean_ci([1, 2, 3])[1:]


# rank correlation ----------------------------------------------------------------------------------


def test_rank_correlation_is_scipy_s_with_ties_and_without():
    generator = np.random.default_rng(3)
    for a, b in ((generator.normal(size=20), generator.normal(size=20)), generator.integers(0, 4, (2, 30))):
        assert stats.spearman(a, b)[0] == pytest.approx(spearmanr(a, b).statistic)


@pytest.mark.slow
def test_the_rank_interval_holds_the_truth_about_as_often_as_it_says():
    generator, rho, inside = np.random.default_rng(0), 0.6, 0
    truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's of a normal pair with Pearson's rho
    for _ in range(100):
        a, noise = generator.normal(size=(2, 72))
        _, low, high = stats.spearman(a, rho * a + np.sqrt(1 - rho**2) * noise)
        inside += low <= truth <= high
    assert inside >= 86  # of 100 at 95 %: fewer has a probability below 1 in 1000
