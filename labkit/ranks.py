"""How alike two rankings are: Spearman's correlation, with an interval by resampling (Efron 1979).

For scores whose scale means nothing, such as the importance of heads by two methods. It says nothing about the lowest
ranks in particular, which are the ones that pruning takes.
"""

import numpy as np
import pandas as pd

from labkit.errors import InputError


def spearman(a, b, *, draws: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Rank correlation of two equally long scores, and its 95 % percentile interval over resampled items.

    Ties share their mean rank. The interval says how much rests on which items (heads) there are, not how noisy each
    score is. InputError for scores of different lengths, fewer than four, or a constant one, which has no ranking.
    """
    a, b = (np.asarray(one, dtype=np.float64).ravel() for one in (a, b))
    if len(a) != len(b) or len(a) < 4:
        raise InputError(f"two scores of one length, four or more, can be compared; these have {len(a)} and {len(b)}.")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        raise InputError("a score that is the same everywhere ranks nothing; look at how it was computed.")
    picks = np.random.default_rng(seed).integers(len(a), size=(draws, len(a)))
    drawn = [_correlation(a[pick], b[pick]) for pick in picks]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    value = _correlation(a, b)
    return value, min(value, float(low)), max(value, float(high))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    ranked = [pd.Series(one).rank().to_numpy() for one in (a, b)]
    if min(np.ptp(one) for one in ranked) == 0:
        return float("nan")  # a draw of one item only
    return float(np.corrcoef(*ranked)[0, 1])
