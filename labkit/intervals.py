"""What a set of timings supports: exact order-statistic intervals, the paired ratio, and detectors of bad conditions.

The interval inverts the sign test (Conover, Practical Nonparametric Statistics, section 3.2); pairing follows duet
benchmarking (Bulej et al. 2020). Beside them the two of accuracies: Wilson's for a share of images, Student's over
seeds. Pure functions of numbers: no clock is read, and nothing here decides a verdict.
"""

import functools
import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from labkit.errors import InputError

LEAST = 6  # below six values no 95 % interval of a median exists: 2 / 2**5 is more than 0.05
DRIFT = 0.03  # a speed that moved by less is no reason to warn: pairs cancel it anyway
ORDER_EFFECT = 0.01  # the smallest difference that is ever claimed
MODES_APART = 0.05
Z95 = 1.959964  # the 0.975 quantile of the normal distribution
T95 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)  # of t with 1 to 9


@functools.lru_cache(maxsize=4096)
def rank(n: int, confidence: float = 0.95) -> int:
    """The largest k with P(Binomial(n, 1/2) <= k - 1) <= (1 - confidence) / 2; 0 where n values give no interval.

    Integer arithmetic, so exact for every n.
    """
    allowed = int((1 - confidence) / 2 * 2**53) * 2**n >> 53
    term, cumulative, k = 1, 0, 0
    while (cumulative := cumulative + term) <= allowed:
        term = term * (n - k) // (k + 1)
        k += 1
    return k


def median_ci(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Median and the exact interval [x_(k), x_(n+1-k)] of the median, whatever the distribution of the values.

    Fewer than six values say nothing at 95 %: the interval is then (-inf, inf).
    """
    ordered = sorted(values)
    k = rank(len(ordered), confidence)
    lo, hi = (ordered[k - 1], ordered[-k]) if k else (-math.inf, math.inf)
    return statistics.median(ordered), lo, hi


def block_minima(values: Sequence[float], per_block: int) -> list[float]:
    """The least of every `per_block` values in turn: noise of the machine only ever adds time (Chen & Revels 2016)."""
    return [min(values[start : start + per_block]) for start in range(0, len(values), per_block)]


def paired_ratio(
    baseline: Sequence[float], candidate: Sequence[float], per_block: int = 1
) -> tuple[float, float, float]:
    """Speed-up of the candidate and its exact 95 % interval: exp of the median of ln(a_i / b_i) over blocks of pairs.

    baseline, candidate: seconds, pair i measured side by side in random order. If both do the same work the random
    order makes the sign of ln(a_i / b_i) a fair coin whatever the machine did meanwhile, so the interval covers 1 in
    at least 95 % of the cases. Without an interval (fewer than six blocks) the bounds are (0, inf).
    """
    a, b = block_minima(baseline, per_block), block_minima(candidate, per_block)
    middle, lo, hi = median_ci([math.log(x / y) for x, y in zip(a, b, strict=True)])
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


def wilson(right: int, n: int) -> tuple[float, float, float]:
    """Share of `right` among `n` images and its 95 % interval, which stays within 0..1 (Wilson 1927).

    It speaks of other images from the same source, not of another training run: for that see `mean_ci`.
    """
    if not 0 <= right <= n or n < 1:
        raise InputError(f"{right!r} right of {n!r} is no share: give whole numbers with 0 <= right <= n and n >= 1.")
    share, z2 = right / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return share, max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Mean of one[i] - other[i] and its 95 % interval by the normal law: two models' answers to the same examples.

    It speaks of other examples from the same source. For few values, such as one a seed, use `mean_ci`.
    """
    if len(one) != len(other) or len(one) < 30:
        raise InputError(
            f"paired_difference takes two equally long lists of 30 values or more, got {len(one)} and {len(other)}."
        )
    gaps = [float(a) - float(b) for a, b in zip(one, other, strict=True)]
    mean, half = statistics.fmean(gaps), Z95 * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return mean, mean - half, mean + half


def mean_ci(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the values, one a seed, and its 95 % interval by Student's t: mean -+ t s / sqrt(n).

    It supposes values that spread about normally. One value has no interval: it is then (-inf, inf).
    """
    n = len(values)
    if not n:
        raise InputError("mean_ci takes one value or more, one a seed, got 0.")
    mean = statistics.fmean(values)
    half = _t95(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return mean, mean - half, mean + half


def over_seeds(rows: Sequence[Mapping[str, Any]], value: str, by: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each combination of the columns `by`, in order of appearance: the mean of `value`, low and high."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in by), []).append(row[value])
    means = {key: mean_ci(values) for key, values in groups.items()}
    return [dict(zip(by, key, strict=True)) | {value: m, "low": lo, "high": hi} for key, (m, lo, hi) in means.items()]


def half_width(estimate: float, lo: float, hi: float) -> float:
    """Half the interval's width relative to the estimate; the only quantity that may end a measurement early.

    Ending on significance instead would make one identical pair in five look different (optional stopping).
    """
    return (hi - lo) / 2 / estimate


def drift(levels: Sequence[float]) -> float | None:
    """Relative change of time from the first half of a run to the second, where it is real (3 % or more); or None."""
    half = len(levels) // 2
    first, second = median_ci(levels[:half] or [1.0]), median_ci(levels[half:] or [1.0])
    change = second[0] / first[0] - 1
    return change if _disjoint(first, second) and abs(change) >= DRIFT else None


def order_effect(log_ratios: Sequence[float], baseline_first: Sequence[bool]) -> float | None:
    """How much going first costs, as a fraction, where it is real (1 % or more); else None.

    With the baseline first ln(a/b) is true ratio + effect, with the candidate first true ratio - effect.
    """
    ahead = [d for d, first in zip(log_ratios, baseline_first, strict=True) if first]
    behind = [d for d, first in zip(log_ratios, baseline_first, strict=True) if not first]
    first, second = median_ci(ahead or [0.0]), median_ci(behind or [0.0])
    effect = (first[0] - second[0]) / 2
    return effect if _disjoint(first, second) and abs(effect) >= ORDER_EFFECT else None


def bimodal(values: Sequence[float]) -> bool:
    """Whether the values fall into two clumps, so that a median may jump from one to the other.

    Logarithms are split where the variance between the two parts is greatest (Otsu 1979). Two clumps: each holds a
    fifth of the values, their means are 5 % and at least six within-clump standard deviations apart (many values reach
    3.5 standard deviations if uniform, 2.7 if normal; twenty of a skewed distribution pass six in one case of 100).
    """
    logs = sorted(math.log(value) for value in values)
    n, total = len(logs), sum(logs)
    if n < 2 * LEAST:
        return False
    best, cut, running = -1.0, 0, 0.0
    for i in range(1, n):
        running += logs[i - 1]
        between = i * (n - i) * (running / i - (total - running) / (n - i)) ** 2
        best, cut = max((best, cut), (between, i))
    low, high = logs[:cut], logs[cut:]
    if min(cut, n - cut) < n / 5:
        return False
    within = math.sqrt((_squares(low) + _squares(high)) / n)
    apart = statistics.fmean(high) - statistics.fmean(low)
    return apart >= max(MODES_APART, 6 * within)


def _t95(freedom: int) -> float:
    """The 0.975 quantile of Student's t within 0.0002: a table up to 9, then Fisher and Cornish's expansion (1960)."""
    if freedom <= len(T95):
        return T95[freedom - 1]
    z, v = Z95, freedom
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3


def _squares(values: Sequence[float]) -> float:
    mean = statistics.fmean(values)
    return sum((value - mean) ** 2 for value in values)


def _disjoint(first: tuple[float, float, float], second: tuple[float, float, float]) -> bool:
    return first[1] > second[2] or second[1] > first[2]
