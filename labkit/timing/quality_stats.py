"""Statistics of accuracies and scores: shares, means over seeds, rank correlation and the ceiling of a correlation.

All functions are pure functions of numbers, and all intervals are 95 % intervals. Changes between two models on the
same images or texts are in `paired.py`.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit  # scipy.stats would take half a second to import

from labkit.errors import InputError, check_number, check_whole
from labkit.timing.stats import TAIL, Estimate

RESAMPLINGS = 1000  # of the items, for the interval of a rank correlation
LEAST_ITEMS = 4  # of a correlation
LEAST_PARTS = 3  # of the data, for the reliability of a score


def wilson(right: int, n: int) -> Estimate:
    """Return the share of right answers and its interval, which stays within 0..1 (Wilson 1927).

    The interval speaks of other images from the same source, not of another training run (see `mean_ci`).

    right: number of right answers.
    n: number of images.
    """
    return _share(right, n, method="wilson")


def clopper_pearson(right: int, n: int) -> Estimate:
    """Return the share of right answers and its exact interval (Clopper and Pearson 1934).

    Neither end errs in more than 2.5 % of all cases, whatever the share; Wilson's interval is narrower, and errs more
    often for shares near 0 and 1.

    right: number of right answers.
    n: number of images.
    """
    return _share(right, n, method="exact")


def _share(right: int, n: int, method: str) -> Estimate:
    check_whole(n, "n, of all images,")
    check_whole(right, "right, of these images,", 0, n)
    from scipy.stats import binomtest

    low, high = binomtest(right, n).proportion_ci(0.95, method=method)
    return right / n, float(low), float(high)


def mean_ci(values: Sequence[float]) -> Estimate:
    """Return the mean and its interval by Student's t: mean -+ t s / sqrt(n).

    values: a value per seed, supposed to spread about normally. A single value has the interval (-inf, inf).
    Raises InputError for an empty sequence.
    """
    if not len(values):
        raise InputError("mean_ci takes one value or more, one a seed, got 0.")
    if len(values) == 1:
        return float(values[0]), -math.inf, math.inf
    mean = statistics.fmean(values)
    degrees_of_freedom = len(values) - 1
    quantile = float(stdtrit(degrees_of_freedom, 1 - TAIL))
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


# --- ceiling of a correlation -----------------------------------------------------------------------------------------


def correlation_ceiling(*scores: Any) -> Estimate:
    """Return the correlation to expect at most between noisy scores, and its interval over parts of the data.

    Noise in a score lowers its correlation with anything (Spearman 1904): even if the true values agree perfectly, the
    correlation to expect is the root of the product of the reliabilities. The reliability of a mean over parts is
    Cronbach's alpha (1951), 1 - 1 / F, with F the mean square between items over the mean square of the rest. For two
    parts with the same spread, alpha is 2 r / (1 + r) by Spearman and Brown, with r the correlation of the parts.

    The interval is from a jackknife of ln F over the parts (Arvesen and Schmitz 1970, Biometrics 26, 677-686). The
    items, such as all heads of a model, are taken as they are; their true values may have any distribution, and their
    noise may differ from item to item. Simulated, the interval holds the truth in 94 % of the draws or more; for noise
    of heavy tails and a reliability of 0.9 in 86 %. The intervals of two reliabilities are multiplied end by end, which
    is wider than needed.

    scores: for each noisy score a table [parts, items]: the score of each item, computed from each part of the data
        alone, such as from each text. A single table is compared with a score without noise. Two scores need different
        texts, or their noise agrees as well. For the ceiling of a rank correlation give ranks in each part.
    Raises InputError for fewer than three parts or four items, for numbers that are not finite, and for tables without
    any noise or any difference between items.
    """
    if not scores:
        raise InputError("A ceiling takes the table [parts, items] of one noisy score or of two, got none.")
    reliabilities = [_reliability(table) for table in scores]
    value, low, high = np.sqrt(np.prod(reliabilities, axis=0)).tolist()
    return value, low, high


def _reliability(table: Any) -> Estimate:
    """Return Cronbach's alpha of a table [parts, items], and its jackknife interval; negative values become 0."""
    table = np.asarray(table, dtype=np.float64)
    _check_table(table)
    parts = len(table)
    log_ratio = _log_ratio(table)
    without_a_part = np.array([_log_ratio(np.delete(table, part, axis=0)) for part in range(parts)])
    low, high = 0.0, 1.0
    if np.isfinite(without_a_part).all():
        error = math.sqrt(parts - 1) * float(without_a_part.std())
        reach = float(stdtrit(parts - 1, 1 - TAIL)) * error
        low, high = _alpha(log_ratio - reach), _alpha(log_ratio + reach)
    return _alpha(log_ratio), low, high


def _alpha(log_ratio: float) -> float:
    return max(0.0, -math.expm1(-log_ratio))


def _check_table(table: np.ndarray) -> None:
    if table.ndim != 2 or len(table) < LEAST_PARTS or table.shape[1] < LEAST_ITEMS:
        raise InputError(
            f"A reliability takes a table [parts, items] of {LEAST_PARTS} parts and {LEAST_ITEMS} items or more, got "
            f"{list(table.shape)}."
        )
    if not np.isfinite(table).all():
        raise InputError("A score is NaN or infinite: look at how it was computed.")
    centred = table - table.mean(1, keepdims=True)
    are_items_alike, are_parts_alike = not centred.any(), np.ptp(centred, axis=0).max() == 0
    if are_items_alike or are_parts_alike:
        raise InputError("The items, or the parts, do not differ at all: give a score of each item from each part.")


def _log_ratio(table: np.ndarray) -> float:
    """Return ln F: the mean square between items over the mean square of the rest, of a table [parts, items]."""
    parts, items = table.shape
    of_item = table.mean(0)
    rest = table - of_item - table.mean(1, keepdims=True) + table.mean()
    between_items = parts * of_item.var(ddof=1)
    within = (rest**2).sum() / ((parts - 1) * (items - 1))
    with np.errstate(divide="ignore"):  # two parts of three may agree or cancel exactly
        return float(np.log(between_items) - np.log(within))
