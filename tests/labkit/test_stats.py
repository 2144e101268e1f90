"""The statistics behind every claim, by hand, exactly or against scipy; on SIMULATED clocks they are in test_bench."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from refusals import Refusals, check_refusal, refused
from scipy.stats import binom, rankdata, spearmanr

from labkit.timing import stats


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
    assert stats.paired_ratio([4, 9] * 6, [1, 2] * 6, 2) == pytest.approx((4, 4, 4))  # of each block the least


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


def test_wilson_solves_its_own_equation():
    """Each bound p is where the observed share lies z standard errors of p away."""
    share, *bounds = stats.wilson(930, 1000)
    for p in bounds:
        assert abs(share - p) / math.sqrt(p * (1 - p) / 1000) == pytest.approx(1.959964)


@pytest.mark.parametrize(("right", "n"), [(0, 300), (3, 300), (299, 300), (300, 300)])
def test_clopper_pearson_leaves_the_tail_beyond_each_end(right, n):
    share, low, high = stats.clopper_pearson(right, n)
    assert share == right / n
    assert right == 0 or binom.sf(right - 1, n, low) == pytest.approx(0.025)
    assert right == n or binom.cdf(right, n, high) == pytest.approx(0.025)


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


# ceiling of a correlation --------------------------------------------------------------------------


def test_the_reliability_of_parts_with_one_spread_is_spearman_and_browns():
    """Ranks have the same spread in each part: alpha is k r / (1 + (k - 1) r), with r the mean correlation."""
    generator = np.random.default_rng(1)
    truth = generator.normal(size=40)
    ranks = rankdata(truth + generator.normal(size=(3, 40)), axis=1)
    r = np.corrcoef(ranks)[np.triu_indices(3, 1)].mean()
    value, low, high = stats.correlation_ceiling(ranks)
    assert value == pytest.approx(math.sqrt(3 * r / (1 + 2 * r)))
    assert 0 <= low < value < high <= 1


def test_the_ceiling_is_the_correlation_that_noisy_scores_of_one_truth_have():
    """In the mean over thirty draws; the truth is skewed, and one score has more noise than the other."""
    generator, parts = np.random.default_rng(2), 24
    with_each_other, with_truth = [], []
    for _ in range(30):
        truth = generator.exponential(size=200)
        first, second = (truth + spread * generator.normal(size=(parts, 200)) for spread in (3.0, 5.0))
        measured = np.corrcoef([truth, first.mean(0), second.mean(0)])
        with_each_other.append((measured[1, 2], stats.correlation_ceiling(first, second)[0]))
        with_truth.append((measured[0, 1], stats.correlation_ceiling(first)[0]))
    for pairs in (with_each_other, with_truth):
        measured, ceiling = np.mean(pairs, axis=0)
        assert ceiling == pytest.approx(measured, abs=0.015)


def test_scores_of_pure_noise_may_have_a_ceiling_of_zero():
    value, low, high = stats.correlation_ceiling(np.random.default_rng(0).normal(size=(8, 72)))
    assert low == 0 and value < 0.6 and high > value
    opposite = [[1, 2, 3, 4], [4, 3, 2, 1], [1, 2, 4, 3]]  # two parts cancel: the jackknife has no end
    assert stats.correlation_ceiling(opposite)[1:] == (0, 1)


SIX = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
REFUSALS: Refusals = {
    "right, of these images, is 11, but it must be a whole number from 0 to 10": lambda: stats.wilson(11, 10),
    "n, of all images, is 0": lambda: stats.wilson(0, 0),
    "got 0": lambda: stats.mean_ci([]),
    "of one length": lambda: stats.spearman([1, 2, 3, 4], [1, 2, 3]),
    "four or more": lambda: stats.spearman([1, 2, 3], [1, 2, 3]),
    "the same everywhere": lambda: stats.spearman([1] * 5, range(5)),
    "a score that is the same everywhere": lambda: stats.spearman(range(5), [1] * 5),
    "no value to take the median of": lambda: stats.median_ci([]),
    "per_block is 0": lambda: stats.block_minima(SIX, 0),
    "per_block is 1.5": lambda: stats.paired_ratio(SIX, SIX, 1.5),
    "got 6 and 5 values": lambda: stats.paired_ratio(SIX, SIX[:5]),
    "got 0 and 0 values": lambda: stats.paired_ratio([], []),
    "seconds above 0": lambda: stats.paired_ratio(SIX, [0.0, *SIX[1:]]),
    "right, of these images, is 3.5": lambda: stats.wilson(3.5, 10),
    "n, of all images, is '10'": lambda: stats.wilson(3, "10"),
    "right, of these images, is -1": lambda: stats.wilson(-1, 10),
    "A row has no column 'seed': it has 'a', 'v'": lambda: stats.over_seeds([{"a": 1, "v": 2.0}], "v", ["seed"]),
    "A row has no column 'w'": lambda: stats.over_seeds([{"a": 1, "v": 2.0}], "w", ["a"]),
    "v of a row is 'x'": lambda: stats.over_seeds([{"a": 1, "v": "x"}], "v", ["a"]),
    "Scores have to be numbers": lambda: stats.spearman(["a", "b", "c", "d"], SIX[:4]),
    "A score is NaN or infinite": lambda: stats.spearman([1.0, 2.0, math.nan, 3.0], SIX[:4]),
    "mean_ci takes one value or more": lambda: stats.mean_ci(()),
    "n, of all images, is 0, ": lambda: stats.clopper_pearson(0, 0),
    "got none": lambda: stats.correlation_ceiling(),
    "3 parts and 4 items or more, got [2, 6]": lambda: stats.correlation_ceiling([SIX, SIX]),
    "got [3, 3]": lambda: stats.correlation_ceiling(np.eye(3)),
    "got [6]": lambda: stats.correlation_ceiling(SIX),
    "NaN or infinite: look": lambda: stats.correlation_ceiling(np.full((3, 4), math.nan)),
    "do not differ at all": lambda: stats.correlation_ceiling(np.ones((3, 4))),
    "or the parts, do not differ": lambda: stats.correlation_ceiling([SIX, SIX, SIX]),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
