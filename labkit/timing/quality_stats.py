"""Statistics of accuracies, losses and scores: shares, paired differences, means over seeds, rank correlation.

All functions are pure functions of numbers, and all intervals are 95 % intervals.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit  # scipy.stats would take half a second to import

from labkit.errors import InputError, check_number, check_whole
from labkit.timing.stats import TAIL, Estimate

LEAST_PAIRS = 30  # with fewer pairs, the normal law of a mean of differences is a guess


RESAMPLINGS = 1000  # of the items, for the interval of a rank correlation


LEAST_ITEMS = 4  # of a rank correlation


def wilson(right: int, n: int) -> Estimate:
    """Return the share of right answers and its interval, which stays within 0..1 (Wilson 1927).

    The interval speaks of other images from the same source, not of another training run (see `mean_ci`).

    right: number of right answers.
    n: number of images.
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

    values: a value per seed, supposed to spread about normally. A single value has the interval (-inf, inf).
    Raises InputError for an empty sequence.
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

    rows: a dict per run.
    value: name of the column to average.
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


def spearman(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Return Spearman's rank correlation of two scores and its percentile interval (Efron 1979).

    Use the rank correlation for scores without a meaningful scale, such as the importance of heads by two methods. Ties
    share a mean rank. The interval is from 1000 resamplings of the items: the interval tells how much rests on the
    choice of the items (heads), not how noisy each score is.

    a, b: scores of the same items.
    Raises InputError for scores of different lengths, for fewer than four items, and for a constant score, which has no
    ranking.
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
