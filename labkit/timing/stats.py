"""Statistics of timings and accuracies: exact order-statistic intervals, the paired ratio, intervals over seeds.

The interval of a median inverts the sign test (Conover, Practical Nonparametric Statistics, section 3.2). Pure
functions of numbers: nothing here reads a clock or gives a verdict.
"""

import functools
import itertools
import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import bdtrik, ndtri, stdtrit  # not scipy.stats, which takes half a second to import

from labkit.errors import InputError, check_number, check_whole

LEAST_PAIRS = 30  # below so many the normal law of a mean of differences is a guess
LEAST = 6  # below six values no 95 % interval of a median exists: 2 / 2**5 is more than 0.05
DRIFT = 0.03  # a speed that moved by less is no reason to warn: pairs cancel it anyway

Estimate = tuple[float, float, float]  # an estimate and its 95 % interval


@functools.lru_cache(maxsize=4096)
def _rank(n: int) -> int:
    """The largest k with P(Binomial(n, 1/2) <= k - 1) <= 0.025; 0 below six values, which give no interval."""
    return math.ceil(bdtrik(0.025, n, 0.5)) if n >= LEAST else 0


def median_ci(values: Sequence[float]) -> Estimate:
    """Median and the exact 95 % interval [x_(k), x_(n+1-k)] of the median, whatever the distribution of the values.

    Fewer than six values say nothing: the interval is then (-inf, inf). InputError without any.
    """
    ordered = sorted(values)
    if not ordered:
        raise InputError("There is no value to take the median of: give one or more.")
    k = _rank(len(ordered))
    lo, hi = (ordered[k - 1], ordered[-k]) if k else (-math.inf, math.inf)
    return statistics.median(ordered), lo, hi


def block_minima(values: Sequence[float], per_block: int) -> list[float]:
    """The least of every `per_block` values in turn: noise of the machine only ever adds time (Chen & Revels 2016)."""
    check_whole(per_block, "per_block")
    return [min(values[start : start + per_block]) for start in range(0, len(values), per_block)]


def paired_ratio(baseline: Sequence[float], candidate: Sequence[float], per_block: int = 1) -> Estimate:
    """Speed-up of the candidate and its exact 95 % interval: exp of the median of ln(a_i / b_i) over blocks of pairs.

    If both do the same work, the random order makes the sign of ln(a_i / b_i) a fair coin whatever the machine did
    meanwhile, so the interval covers 1 in at least 95 % of the cases.
    baseline, candidate: seconds; pair i was measured side by side in random order.
    per_block: this many pairs in turn make one block, of which each side's least counts.
    Fewer than six blocks have no interval: the bounds are then (0, inf).
    InputError for sides of different lengths and for a time that is not above 0.
    """
    if len(baseline) != len(candidate) or not len(baseline) or not min(min(baseline), min(candidate)) > 0:
        raise InputError(
            f"A ratio takes two equally long lists of seconds above 0, got {len(baseline)} and {len(candidate)} values."
        )
    a, b = block_minima(baseline, per_block), block_minima(candidate, per_block)
    middle, lo, hi = median_ci([math.log(x / y) for x, y in zip(a, b, strict=True)])
    return math.exp(middle), math.exp(lo), math.exp(hi)


def ratio_over_builds(
    baseline: Sequence[float], candidate: Sequence[float], per_block: int, pairs: Sequence[int]
) -> Estimate:
    """`paired_ratio` of sides that were built anew several times: each build gives one ratio, and these are judged.

    Where in memory the data of a build lies makes it a little faster or slower for as long as it lives, so pairs of one
    build are no independent evidence; builds are. Fewer than six builds have no interval.
    pairs: how many pairs in turn belong to each build.
    """
    ends = list(itertools.accumulate(pairs))
    parts = [slice(end - count, end) for end, count in zip(ends, pairs, strict=True)]
    ratios = [paired_ratio(baseline[part], candidate[part], per_block)[0] for part in parts]
    middle, lo, hi = median_ci([math.log(ratio) for ratio in ratios])
    return math.exp(middle), math.exp(lo), math.exp(hi)


def balanced_order(rng: random.Random, group: int) -> Iterator[bool]:
    """For each pair, whether the baseline goes first: shuffled groups of `group` (even) pairs, one half each way.

    Balance cancels a constant advantage of going first or second; the shuffle keeps drift and rhythm from lining up
    with it. Groups are independent of each other, which the exactness of `paired_ratio` over blocks rests on.
    """
    while True:
        orders = [True, False] * (group // 2)
        rng.shuffle(orders)
        yield from orders


def half_width(estimate: float, lo: float, hi: float) -> float:
    """Half the interval's width relative to the estimate; the only quantity that may end a measurement early.

    Ending on significance instead would make one identical pair in five look different (optional stopping).
    """
    return (hi - lo) / 2 / estimate


def drift(levels: Sequence[float]) -> float | None:
    """Relative change of time from the first half of a run to the second, where it is real (3 % or more); or None."""
    half = len(levels) // 2
    if half < 1:
        return None
    first, second = median_ci(levels[:half]), median_ci(levels[half:])
    change = second[0] / first[0] - 1
    disjoint = first[1] > second[2] or second[1] > first[2]
    return change if disjoint and abs(change) >= DRIFT else None


def wilson(right: int, n: int) -> Estimate:
    """Share of `right` among `n` images and its 95 % interval, which stays within 0..1 (Wilson 1927).

    It speaks of other images from the same source, not of another training run: for that see `mean_ci`.
    """
    check_whole(n, "n, of all images,")
    check_whole(right, "right, of these images,", 0, n)
    from scipy.stats import binomtest

    low, high = binomtest(right, n).proportion_ci(0.95, method="wilson")
    return right / n, float(low), float(high)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of first[i] - second[i] and its 95 % interval by the normal law: two models' answers to the same examples.

    It speaks of other examples from the same source. For few values, such as one a seed, use `mean_ci`.
    """
    if len(first) != len(second) or len(first) < LEAST_PAIRS:
        raise InputError(
            f"paired_difference takes two equally long lists of {LEAST_PAIRS} values or more, got {len(first)} and "
            f"{len(second)}."
        )
    return _around_the_mean(np.subtract(first, second, dtype=float), float(ndtri(0.975)))


def mean_ci(values: Sequence[float]) -> Estimate:
    """Mean of the values, one a seed, and its 95 % interval by Student's t: mean -+ t s / sqrt(n).

    It supposes values that spread about normally. One value has no interval: it is then (-inf, inf).
    """
    if not len(values):
        raise InputError("mean_ci takes one value or more, one a seed, got 0.")
    if len(values) == 1:
        return float(values[0]), -math.inf, math.inf
    return _around_the_mean(values, float(stdtrit(len(values) - 1, 0.975)))


def _around_the_mean(values: Sequence[float], quantile: float) -> Estimate:
    mean, half = statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def over_seeds(rows: Sequence[Mapping[str, Any]], value: str, by: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each combination of the columns `by`, in order of appearance: the mean of `value`, low and high."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if missing := [column for column in (*by, value) if column not in row]:
            raise InputError(f"A row has no column {missing[0]!r}: it has {', '.join(map(repr, row))}.")
        check_number(row[value], f"{value} of a row")
        groups.setdefault(tuple(row[column] for column in by), []).append(row[value])
    means = {key: mean_ci(values) for key, values in groups.items()}
    return [dict(zip(by, key, strict=True)) | {value: m, "low": lo, "high": hi} for key, (m, lo, hi) in means.items()]


def spearman(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Spearman's rank correlation of two equally long scores, and its 95 % percentile interval (Efron 1979).

    For scores whose scale means nothing, such as the importance of heads by two methods; ties share their mean rank.
    The interval, of 1000 resamplings of the items, says how much rests on which items (heads) there are, not how noisy
    each score is. InputError for scores of different lengths, fewer than four, or a constant one, which has no ranking.
    """
    a, b = _scores(a), _scores(b)
    if len(a) != len(b) or len(a) < 4:
        raise InputError(f"two scores of one length, four or more, can be compared; these have {len(a)} and {len(b)}.")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        raise InputError("a score that is the same everywhere ranks nothing; look at how it was computed.")
    picks = np.random.default_rng(0).integers(len(a), size=(1000, len(a)))
    (value,), drawn = _rank_correlation(a[None], b[None]), _rank_correlation(a[picks], b[picks])
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(value), min(float(value), float(low)), max(float(value), float(high))


def _scores(values: Sequence[float]) -> np.ndarray:
    try:
        scores = np.asarray(values, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        raise InputError(f"Scores have to be numbers, one an item, not {type(values).__name__}: give a list.") from None
    if not np.isfinite(scores).all():
        raise InputError("A score is NaN or infinite, which has no rank: look at how it was computed.")
    return scores


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the ranks, row by row, [rows, items] -> [rows]; NaN where a row is constant."""
    from scipy.stats import rankdata

    x, y = (ranks - ranks.mean(1, keepdims=True) for ranks in (rankdata(a, axis=1), rankdata(b, axis=1)))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
