"""Statistics of timings and accuracies: exact intervals of medians, paired ratios, means over seeds, rank correlation.

The interval of a median inverts the sign test (Conover, Practical Nonparametric Statistics, section 3.2). All functions
are pure functions of numbers: no clock is read, and no verdict is given. All intervals are 95 % intervals.
"""

import functools
import itertools
import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import bdtrik, ndtri, stdtrit  # scipy.stats would take half a second to import

from labkit.errors import InputError, check_number, check_whole

LEAST_PAIRS = 30  # with fewer pairs, the normal law of a mean of differences is a guess
LEAST = 6  # fewer values give no 95 % interval of a median: 2 / 2**5 is more than 0.05
DRIFT = 0.03  # a smaller change of speed is no reason to warn: pairs cancel drift anyway
TAIL = 0.025  # probability beyond each end of an interval
RESAMPLINGS = 1000  # of the items, for the interval of a rank correlation
LEAST_ITEMS = 4  # of a rank correlation

Estimate = tuple[float, float, float]  # an estimate, and the low and high end of its interval


# --- medians of times -------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _rank(n: int) -> int:
    """Return the largest k with P(Binomial(n, 1/2) <= k - 1) <= 0.025; 0 below six values, too few for an interval."""
    return math.ceil(bdtrik(TAIL, n, 0.5)) if n >= LEAST else 0


def median_ci(values: Sequence[float]) -> Estimate:
    """Return the median and its exact interval [x_(k), x_(n+1-k)], for any distribution of the values.

    Fewer than six values have the interval (-inf, inf). Raises InputError for an empty sequence.
    """
    ordered = sorted(values)
    if not ordered:
        raise InputError("There is no value to take the median of: give one or more.")
    k = _rank(len(ordered))
    low, high = -math.inf, math.inf
    if k > 0:
        low, high = ordered[k - 1], ordered[-k]
    return statistics.median(ordered), low, high


def block_minima(values: Sequence[float], per_block: int) -> list[float]:
    """Return the least of every `per_block` values in turn.

    Noise of a machine only adds time (Chen and Revels 2016), so the least time is the least disturbed.
    """
    check_whole(per_block, "per_block")
    starts = range(0, len(values), per_block)
    return [min(values[start : start + per_block]) for start in starts]


def paired_ratio(baseline: Sequence[float], candidate: Sequence[float], per_block: int = 1) -> Estimate:
    """Return the speed-up of a candidate over a baseline, and its exact interval.

    The speed-up is exp of the median of ln(a_i / b_i) over blocks of pairs. If both sides do the same work, the random
    order makes the sign of ln(a_i / b_i) a fair coin, whatever the machine did meanwhile. The interval then covers 1 in
    at least 95 % of all comparisons.

    baseline, candidate: seconds of each pair, measured side by side in random order.
    per_block: pairs in a block, of which the least time of each side counts.
    Fewer than six blocks have the interval (0, inf). Raises InputError for sides of different lengths, and for times
    that are not above 0.
    """
    lengths_agree = len(baseline) == len(candidate) and len(baseline) > 0
    if not lengths_agree or not min(min(baseline), min(candidate)) > 0:
        raise InputError(
            f"A ratio takes two equally long lists of seconds above 0, got {len(baseline)} and {len(candidate)} values."
        )
    blocks = zip(block_minima(baseline, per_block), block_minima(candidate, per_block), strict=True)
    return _geometric([math.log(a / b) for a, b in blocks])


def ratio_over_builds(
    baseline: Sequence[float], candidate: Sequence[float], per_block: int, pairs: Sequence[int]
) -> Estimate:
    """Return the speed-up over several builds of the sides, and its exact interval.

    The place of a build's data in memory makes all calls of the build faster or slower. Builds are therefore
    independent evidence, and pairs of a build are not: `paired_ratio` gives a ratio for each build, and the median of
    the ratios is the result. Fewer than six builds have no interval.

    baseline, candidate, per_block: as in `paired_ratio`, build after build.
    pairs: number of pairs of each build.
    """
    log_ratios = []
    for end, count in zip(itertools.accumulate(pairs), pairs, strict=True):
        of_build = slice(end - count, end)
        ratio, _, _ = paired_ratio(baseline[of_build], candidate[of_build], per_block)
        log_ratios.append(math.log(ratio))
    return _geometric(log_ratios)


def _geometric(logarithms: Sequence[float]) -> Estimate:
    middle, low, high = median_ci(logarithms)
    return math.exp(middle), math.exp(low), math.exp(high)


def balanced_order(rng: random.Random, group: int) -> Iterator[bool]:
    """Draw the order of pairs without end: True if the baseline goes first.

    In each shuffled group of pairs, the baseline goes first in one half. The balance cancels a constant advantage of
    going first; the shuffle keeps the order from lining up with drift or rhythm of the machine. Groups are independent
    of each other: the exact interval of `paired_ratio` over blocks rests on independent groups.

    group: number of pairs in a group, even.
    """
    while True:
        orders = [True, False] * (group // 2)
        rng.shuffle(orders)
        yield from orders


def half_width(estimate: float, low: float, high: float) -> float:
    """Return half the width of an interval, relative to the estimate.

    Only the width may end a measurement early. Ending on a significant difference would make one identical pair in five
    look different (optional stopping).
    """
    return (high - low) / 2 / estimate


def drift(levels: Sequence[float]) -> float | None:
    """Return the relative change of time from the first half of a run to the second.

    levels: times in run order.
    Returns None for a change below 3 % (DRIFT), and if the intervals of the two medians overlap.
    """
    half = len(levels) // 2
    if half < 1:
        return None
    first, first_low, first_high = median_ci(levels[:half])
    second, second_low, second_high = median_ci(levels[half:])
    change = second / first - 1
    are_disjoint = first_low > second_high or second_low > first_high
    return change if are_disjoint and abs(change) >= DRIFT else None


# --- shares and means -------------------------------------------------------------------------------------------------


def wilson(right: int, n: int) -> Estimate:
    """Return the share of right answers and its interval, which stays within 0..1 (Wilson 1927).

    The interval speaks of other images from the same source, not of another training run (see `mean_ci`).

    right: number of right answers. n: number of images.
    """
    check_whole(n, "n, of all images,")
    check_whole(right, "right, of these images,", 0, n)
    from scipy.stats import binomtest

    low, high = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return right / n, float(low), float(high)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Return the mean of first[i] - second[i] and its interval by the normal law.

    The interval speaks of other examples from the same source. For few values, such as a value per seed, use `mean_ci`.

    first, second: answers of two models to the same examples, at least LEAST_PAIRS; InputError otherwise.
    """
    if len(first) != len(second) or len(first) < LEAST_PAIRS:
        raise InputError(
            f"paired_difference takes two equally long lists of {LEAST_PAIRS} values or more, got {len(first)} and "
            f"{len(second)}."
        )
    differences = np.subtract(first, second, dtype=float)
    return _around_the_mean(differences, quantile=float(ndtri(1 - TAIL)))


def mean_ci(values: Sequence[float]) -> Estimate:
    """Return the mean and its interval by Student's t: mean -+ t s / sqrt(n).

    values: a value per seed, supposed to spread about normally. A single value has the interval (-inf, inf). Raises
        InputError for an empty sequence.
    """
    if not len(values):
        raise InputError("mean_ci takes one value or more, one a seed, got 0.")
    if len(values) == 1:
        return float(values[0]), -math.inf, math.inf
    degrees_of_freedom = len(values) - 1
    return _around_the_mean(values, quantile=float(stdtrit(degrees_of_freedom, 1 - TAIL)))


def _around_the_mean(values: Sequence[float], quantile: float) -> Estimate:
    mean = statistics.fmean(values)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def over_seeds(rows: Sequence[Mapping[str, Any]], value: str, by: Sequence[str]) -> list[dict[str, Any]]:
    """Average a column over seeds: a row for each combination of the columns `by`, in order of appearance.

    rows: a dict per run. value: name of the column to average.
    Returns rows with the columns `by`, `value` (the mean), "low" and "high". Raises InputError for a missing column and
    for a value that is no number.
    """
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        missing = [column for column in (*by, value) if column not in row]
        if missing:
            raise InputError(f"A row has no column {missing[0]!r}: it has {', '.join(map(repr, row))}.")
        check_number(row[value], f"{value} of a row")
        key = tuple(row[column] for column in by)
        groups.setdefault(key, []).append(row[value])
    averaged = []
    for key, values in groups.items():
        mean, low, high = mean_ci(values)
        averaged.append(dict(zip(by, key, strict=True)) | {value: mean, "low": low, "high": high})
    return averaged


# --- rank correlation -------------------------------------------------------------------------------------------------


def spearman(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Return Spearman's rank correlation of two scores and its percentile interval (Efron 1979).

    Use the rank correlation for scores without a meaningful scale, such as the importance of heads by two methods. Ties
    share a mean rank. The interval is from 1000 resamplings of the items: the interval tells how much rests on the
    choice of the items (heads), not how noisy each score is.

    a, b: scores of the same items. Raises InputError for scores of different lengths, for fewer than four items, and
        for a constant score, which has no ranking.
    """
    a, b = _scores(a), _scores(b)
    if len(a) != len(b) or len(a) < LEAST_ITEMS:
        raise InputError(f"two scores of one length, four or more, can be compared; these have {len(a)} and {len(b)}.")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        raise InputError("a score that is the same everywhere ranks nothing; look at how it was computed.")
    picks = np.random.default_rng(0).integers(len(a), size=(RESAMPLINGS, len(a)))
    (correlation,) = _rank_correlation(a[None], b[None])
    resampled = _rank_correlation(a[picks], b[picks])
    low, high = np.nanpercentile(resampled, [100 * TAIL, 100 * (1 - TAIL)])
    correlation = float(correlation)
    return correlation, min(correlation, float(low)), max(correlation, float(high))


def _scores(values: Sequence[float]) -> np.ndarray:
    try:
        scores = np.asarray(values, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        raise InputError(f"Scores have to be numbers, one an item, not {type(values).__name__}: give a list.") from None
    if not np.isfinite(scores).all():
        raise InputError("A score is NaN or infinite, which has no rank: look at how it was computed.")
    return scores


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of the ranks row by row, [rows, items] -> [rows]; NaN for a constant row."""
    x, y = _centred_ranks(a), _centred_ranks(b)
    covariance = (x * y).sum(1)
    with np.errstate(invalid="ignore"):
        return covariance / np.sqrt((x * x).sum(1) * (y * y).sum(1))


def _centred_ranks(scores: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    ranks = rankdata(scores, axis=1)
    return ranks - ranks.mean(1, keepdims=True)
