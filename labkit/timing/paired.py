"""Changes of quality between two models on the same images or texts: accuracy, losses, perplexity, with intervals.

Pairs decide: images that both models get right say nothing of a change. An interval of accuracy is exact over images,
and covers seeds as well for answers of several seeds. An interval of perplexity is over texts: tokens of a text share
its subject and are no independent evidence. `benchmarks/quality_intervals.py` measures how often the intervals hold.
All intervals are 95 % intervals with 2.5 % beyond each end.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import betainc, betaincinv, roots_sh_legendre  # scipy.stats would take half a second to import

from labkit.errors import InputError
from labkit.timing.quality_stats import mean_ci
from labkit.timing.stats import LEAST, TAIL, Estimate

LEAST_PAIRS = 30  # with fewer pairs, Student's law of a mean of differences is a guess
RESAMPLINGS = 2000  # of the texts
PROBABILITIES, WEIGHTS = roots_sh_legendre(200)  # quantiles to average a distribution over (Gauss and Legendre)


# --- accuracy ---------------------------------------------------------------------------------------------------------


def accuracy_change(after: Any, before: Any) -> Estimate:
    """Return the change of the share of right answers, -1 to 1, and its exact interval over images.

    Images on which the models differ are the discordant pairs of McNemar (1947): wins turned right, losses turned
    wrong. The number of discordant pairs among all images has the interval of Clopper and Pearson (1934), and so have
    the wins among the discordant pairs. Fay and Lumbard (2021, Statistics in Medicine 40, 1147-1159) combine the two:
    the interval excludes 0 if and only if McNemar's exact test rejects at 5 %. Without a discordant pair among n images
    the interval is -+(1 - 0.025**(1/n)). (Fagerland, Lydersen and Laake, 2014, Statistics in Medicine 33, 2850-2875,
    compare approximate intervals, which are narrower and sometimes miss more often than they say.)

    after, before: the two models' answers to the same images [images], True or 1 for a right answer.
    Raises InputError for answers of different shapes, and for values other than True, False, 0 and 1.
    """
    changes = _changes(after, before, dimensions=("images",))
    return _exact_change(float((changes > 0).sum()), float((changes < 0).sum()), len(changes))


def accuracy_change_over_seeds(after: Any, before: Any) -> Estimate:
    """Return the mean change of the share of right answers, and its interval over images and over seeds.

    Another set of images and another training would both change the result, so both distances to the ends count, as
    the root of the sum of squares (Zou and Donner 2008, Statistics in Medicine 27, 1693-1702): the distance over
    images, as in `accuracy_change` with an image's change averaged over the seeds, and the distance over seeds, by
    Student's t. The interval is wide for two or three seeds, and a single seed has (-1, 1).

    after, before: answers [seeds, images], True or 1 for a right answer; the images are the same for every seed.
    Raises InputError as `accuracy_change`.
    """
    changes = _changes(after, before, dimensions=("seeds", "images"))
    of_image = changes.mean(0)
    wins, losses = of_image.clip(0).sum(), (-of_image).clip(0).sum()
    value, *over_images = _exact_change(float(wins), float(losses), len(of_image))
    _, *over_seeds = mean_ci(changes.mean(1).tolist())
    down = math.hypot(value - over_images[0], value - over_seeds[0])
    up = math.hypot(over_images[1] - value, over_seeds[1] - value)
    return value, max(value - down, -1.0), min(value + up, 1.0)


def _changes(after: Any, before: Any, dimensions: tuple[str, ...]) -> np.ndarray:
    """Return after - before as numbers -1, 0 and 1."""
    after, before = np.asarray(after), np.asarray(before)
    form = ", ".join(dimensions)
    if after.shape != before.shape or after.ndim != len(dimensions) or not after.size:
        raise InputError(
            f"A change of accuracy takes two models' answers [{form}], got {list(after.shape)} and "
            f"{list(before.shape)}: give both models the same images."
        )
    for answers in (after, before):
        if answers.dtype != bool and not np.isin(answers, (0, 1)).all():
            raise InputError("An answer is neither right nor wrong: give True or False, or 1 or 0, for each image.")
    return after.astype(np.float64) - before.astype(np.float64)


def _exact_change(wins: float, losses: float, images: int) -> Estimate:
    """Return (wins - losses) / images and its interval; both counts may have fractions, if averaged over seeds."""
    low, high = _lower_end(wins, losses, images), -_lower_end(losses, wins, images)
    return (wins - losses) / images, low, high


@functools.lru_cache(maxsize=4096)
def _lower_end(wins: float, losses: float, images: int) -> float:
    """Return the lower end of the interval by Fay and Lumbard.

    The end is the 2.5 % quantile of D (2 W - 1). D is the share of discordant pairs, W the share of wins among them,
    each distributed as the ends of its Clopper-Pearson interval are: Beta(k, n - k + 1) for the lower, and
    Beta(k + 1, n - k) for the upper end, with k of n counted.
    """
    discordant = wins + losses
    if wins == 0:  # W is 0
        return -float(_beta_quantile(losses + 1, images - losses, 1 - TAIL))
    are_fewer_wins_excluded = betainc(wins, losses + 1, 0.5) < TAIL  # McNemar's exact test, one side
    if are_fewer_wins_excluded:
        shares = _beta_quantile(discordant, images - discordant + 1, PROBABILITIES)
    else:
        shares = _beta_quantile(discordant + 1, images - discordant, PROBABILITIES)

    def excess(end: float) -> float:
        """Return P(D (2 W - 1) <= end) - 2.5 %."""
        wins_at_end = np.clip((1 + end / shares) / 2, 0, 1)
        return float(WEIGHTS @ betainc(wins, losses + 1, wins_at_end)) - TAIL

    from scipy.optimize import brentq  # takes a fifth of a second to import

    return brentq(excess, -1, 1, xtol=1e-9)


def _beta_quantile(a: float, b: float, probability: Any) -> Any:
    """Return quantiles of Beta(a, b), which is 1 without doubt for b = 0."""
    return betaincinv(a, b, probability) if b > 1e-9 else np.ones_like(probability)


# --- any values -------------------------------------------------------------------------------------------------------


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Return the mean of first[i] - second[i] and its interval.

    The interval speaks of other examples from the same source. Right answers, counted as 1 or as any other number such
    as 100, have the exact interval of `accuracy_change`, which has a width even if no answer changed. Other values
    have Student's interval. For few values, such as a value per seed, use `mean_ci`.

    first, second: values of two models for the same examples, at least LEAST_PAIRS; InputError otherwise.
    """
    if len(first) != len(second) or len(first) < LEAST_PAIRS:
        raise InputError(
            f"paired_difference takes two equally long lists of {LEAST_PAIRS} values or more, got {len(first)} and "
            f"{len(second)}."
        )
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    unit = max(first.max(), second.max()) or 1.0
    if np.isin((first, second), (0, unit)).all():
        value, low, high = accuracy_change(first == unit, second == unit)
        return float(unit * value), float(unit * low), float(unit * high)
    return mean_ci((first - second).tolist())


# --- perplexity -------------------------------------------------------------------------------------------------------


def perplexity_ci(losses: Sequence[float], tokens: Sequence[int], over: Sequence[float] | None = None) -> Estimate:
    """Return a perplexity, or the ratio of two models' perplexities, and its interval over texts.

    The interval is from a bootstrap of whole texts, the clusters (Field and Welsh 2007), and studentised: each
    resampling's error is divided by its standard error (Efron and Tibshirani 1993, section 12.5). Simulated with 6 to
    60 texts, the interval holds the truth in 93 to 95 % of the draws for normal changes, and in 89 to 93 % for strongly
    skewed changes, most often too low when it misses. Plain percentiles hold it in 86 and 80 % with six texts.

    losses: mean loss of each text, in nats a token [texts].
    tokens: number of tokens that each text's loss is the mean of [texts].
    over: losses of another model for the same texts; the result is then the perplexity over that model's, paired.
    Fewer than six texts, and texts of exactly the same loss (or change), give no interval: (0, inf). Raises InputError
    for lists of different lengths, for losses that are no finite numbers, and for texts without a token.
    """
    losses, tokens = np.asarray(losses, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    subtracted = np.zeros_like(losses) if over is None else np.asarray(over, dtype=np.float64)
    _check_texts(losses, tokens, subtracted)
    sums = tokens * (losses - subtracted)
    mean, error = (float(of_all[0]) for of_all in _means_and_errors(sums[None], tokens[None]))
    ends = (-math.inf, math.inf)
    if len(losses) >= LEAST and error > 0:
        ends = _studentised(sums, tokens, mean, error)
    with np.errstate(over="ignore"):
        value, low, high = np.exp([mean, *ends]).tolist()
    return value, low, high


def perplexity_ratio(after: Any, before: Any, tokens: int) -> Estimate:
    """Return a model's perplexity over another's, paired, and its interval over texts and draws.

    A draw is whatever chance decides about a model, such as the calibration text or noise on the weights. Other texts
    and another draw would both change the ratio, so both distances to the ends count, as the root of the sum of squares
    of logarithms (Zou and Donner 2008, Statistics in Medicine 27, 1693-1702): the distance over texts, as in
    `perplexity_ci` with each text's loss averaged over the draws, and the distance over draws, by Student's t.

    after, before: mean losses in nats a token [draws, texts]; the same texts, and draw by draw the same chance. A side
        with a single draw stands beside each draw of the other. A single draw on both sides gives the interval over
        texts alone.
    tokens: number of tokens that each loss is the mean of.
    Raises InputError for losses that are not [draws, texts], and as `perplexity_ci`.
    """
    after, before = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    draws = {len(losses) for losses in (after, before) if losses.ndim == 2}
    if after.ndim != 2 or before.ndim != 2 or len(draws - {1}) > 1:
        raise InputError(
            f"A ratio takes losses [draws, texts], got {list(after.shape)} and {list(before.shape)}: give both models "
            "the same draws, or a model without draws a single row."
        )
    counts = [tokens] * after.shape[1]
    over_texts = perplexity_ci(after.mean(0), counts, before.mean(0))
    value, low, high = (math.log(end) if end > 0 else -math.inf for end in over_texts)
    down, up = value - low, high - value
    if max(draws) > 1:
        middle, least, most = mean_ci((after - before).mean(1).tolist())
        down = math.hypot(down, middle - least)
        up = math.hypot(up, most - middle)
    return math.exp(value), math.exp(value - down), math.exp(value + up)


def _check_texts(losses: np.ndarray, tokens: np.ndarray, subtracted: np.ndarray) -> None:
    shapes = {column.shape for column in (losses, tokens, subtracted)}
    if len(shapes) > 1 or losses.ndim != 1 or not len(losses):
        listed = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise InputError(f"Losses and tokens have the shapes {listed}: give lists of the same length, a value a text.")
    if not np.isfinite(losses - subtracted).all():
        raise InputError("A text's loss is NaN or infinite: look at how it was computed.")
    if not (tokens >= 1).all():
        raise InputError(f"A text has {tokens.min():g} tokens, but its loss needs one at least: leave the text out.")


def _studentised(sums: np.ndarray, tokens: np.ndarray, mean: float, error: float) -> tuple[float, float]:
    """Return the interval of the mean loss; scipy.stats.bootstrap has no studentised intervals."""
    picks = np.random.default_rng(0).integers(len(sums), size=(RESAMPLINGS, len(sums)))
    means, errors = _means_and_errors(sums[picks], tokens[picks])
    with np.errstate(divide="ignore", invalid="ignore"):
        deviations = (means - mean) / errors
    deviations = deviations[~np.isnan(deviations)]
    least = np.quantile(deviations, TAIL, method="lower")
    most = np.quantile(deviations, 1 - TAIL, method="higher")
    return mean - most * error, mean - least * error


def _means_and_errors(sums: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean loss a token and its standard error of each sample of texts, both [samples].

    sums, tokens: loss and number of tokens of each text [samples, texts]. The error is that of a ratio estimator
    (Cochran, Sampling Techniques, section 6.3).
    """
    all_tokens = tokens.sum(1)
    means = sums.sum(1) / all_tokens
    residuals = sums - means[:, None] * tokens
    texts = sums.shape[1]
    spread = np.sqrt((residuals**2).sum(1) * texts / max(texts - 1, 1))
    return means, spread / all_tokens
