"""Statistics of timings: exact intervals of medians, paired ratios, drift.

The interval of a median inverts the sign test (Conover, Practical Nonparametric Statistics, section 3.2). All functions
are pure functions of numbers: no clock is read, and no verdict is given. All intervals are 95 % intervals.
"""

import functools
import itertools
import math
import random
import statistics
from collections.abc import Iterator, Sequence

from scipy.special import bdtrik  # scipy.stats would take half a second to import

from labkit.errors import InputError, check_whole
from labkit.on_demand import names_on_demand

LEAST = 6  # fewer values give no 95 % interval of a median: 2 / 2**5 is more than 0.05
DRIFT = 0.03  # a smaller change of speed is no reason to warn: pairs cancel drift anyway
TAIL = 0.025  # probability beyond each end of an interval

Estimate = tuple[float, float, float]  # an estimate, and the low and high end of its interval

# `labkit.stats` has the statistics of quality as well.
_SHARES = ("clopper_pearson", "correlation_ceiling", "mean_ci", "over_seeds", "spearman", "wilson")
_CHANGES = ("accuracy_change", "accuracy_change_over_seeds", "paired_difference")
_CHANGES += ("perplexity_ci", "perplexity_ratio")
_ORIGINS = dict.fromkeys(_SHARES, "labkit.timing.quality_stats") | dict.fromkeys(_CHANGES, "labkit.timing.paired")
__getattr__ = names_on_demand(__name__, _ORIGINS)


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

    The place of a build's data in memory makes all its calls faster or slower. Builds are therefore
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
