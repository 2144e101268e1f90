"""How often the 95 % intervals of quality hold the truth, on SIMULATED answers, losses and scores of known truth.

    python benchmarks/quality_intervals.py                           500 draws a row, about two minutes
    python benchmarks/quality_intervals.py --draws 5000 --only perplexity

A row is a setting; "holds" is the share of draws whose interval holds the truth, "below" and "above" the shares whose
interval lies wholly below it and above it, "width" the median width. An interval that is exact holds in 95 % of the
draws or more. Others are printed as they are: a bootstrap over few texts of skewed losses holds less often.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from scipy.special import ndtr, ndtri

from labkit import stats
from labkit.timing.stats import Estimate

Rng = np.random.Generator


@dataclass(frozen=True)
class Coverage:
    """How often intervals held the truth: shares of the draws, and the median width."""

    holds: float
    below: float
    above: float
    width: float


@dataclass(frozen=True)
class Setting:
    """A known truth, and an interval for it from one draw of the data."""

    name: str
    truth: float
    draw: Callable[[Rng], Estimate]


def coverage(setting: Setting, draws: int) -> Coverage:
    rng = np.random.default_rng(0)
    intervals = np.array([setting.draw(rng) for _ in range(draws)])
    low, high = intervals[:, 1], intervals[:, 2]
    below, above = np.mean(high < setting.truth), np.mean(low > setting.truth)
    return Coverage(float(1 - below - above), float(below), float(above), float(np.median(high - low)))


# --- accuracy of two models on the same images ------------------------------------------------------------------------


def changed_answers(rng: Rng, images: int, wins: float, losses: float) -> Estimate:
    """Draw answers of which these shares turn right and wrong."""
    place = rng.uniform(size=images)
    turned_right, turned_wrong = (place < wins).sum(), (place >= 1 - losses).sum()
    return change_of(images, int(turned_right), int(turned_wrong))


@cache
def change_of(images: int, turned_right: int, turned_wrong: int) -> Estimate:
    """Return the change of accuracy with so many changed answers, the same however they lie among the images."""
    image = np.arange(images)
    before = image >= turned_right
    after = image < images - turned_wrong
    return stats.accuracy_change(after, before)


def accuracy() -> Iterator[Setting]:
    for images in (50, 300, 2000):
        for wins, losses in ((0.0, 0.01), (0.005, 0.015), (0.02, 0.02), (0.05, 0.1), (0.3, 0.3)):
            name = f"{images} images, {wins:.1%} turn right, {losses:.1%} wrong"
            yield Setting(name, wins - losses, partial(changed_answers, images=images, wins=wins, losses=losses))


WINS, LOSSES = 0.02, 0.03  # shares of the answers of many seeds to many images


def trained_answers(rng: Rng, seeds: int, images: int, of_image: float, of_seed: float) -> Estimate:
    """Draw answers of several seeds; of_image, of_seed: shares of the variance that all answers to an image, or of a
    seed, have in common."""
    common = math.sqrt(of_image) * rng.normal(size=images) + math.sqrt(of_seed) * rng.normal(size=(seeds, 1))
    place = ndtr(common + math.sqrt(1 - of_image - of_seed) * rng.normal(size=(seeds, images)))
    return stats.accuracy_change_over_seeds(place < 1 - LOSSES, place >= WINS)


def seeds() -> Iterator[Setting]:
    for number, images in ((2, 300), (3, 300), (3, 2000), (5, 500)):
        for of_image, of_seed in ((0.5, 0.0), (0.9, 0.0), (0.5, 0.02), (0.5, 0.2)):
            name = f"{number} seeds, {images} images; shared by image {of_image:.0%}, by seed {of_seed:.0%}"
            shape = {"seeds": number, "images": images, "of_image": of_image, "of_seed": of_seed}
            yield Setting(name, WINS - LOSSES, partial(trained_answers, **shape))


# --- perplexity of two models on the same texts -----------------------------------------------------------------------

RISE = 0.05  # nats a token, in the mean over texts
NOISE = 0.5  # nats: standard deviation of a token's change about its text's


def normal_rise(rng: Rng, texts: int) -> np.ndarray:
    return rng.normal(RISE, 0.1, texts)


def skewed_rise(rng: Rng, texts: int) -> np.ndarray:
    return rng.lognormal(math.log(RISE) - 0.5, 1.0, texts)


def read_texts(rng: Rng, texts: int, rise: Callable[[Rng, int], np.ndarray], lengths: str) -> Estimate:
    tokens = np.full(texts, 512)
    if lengths == "unequal":
        tokens = 10 + rng.lognormal(5.0, 0.8, texts).round()
    before = rng.normal(3.0, 0.5, texts)
    after = before + rise(rng, texts) + rng.normal(0, NOISE, texts) / np.sqrt(tokens)
    return stats.perplexity_ci(after, tokens, before)


def perplexity() -> Iterator[Setting]:
    for name, rise in (("normal", normal_rise), ("skewed", skewed_rise)):
        for lengths in ("equal", "unequal"):
            for texts in (6, 8, 12, 26, 60):
                draw = partial(read_texts, texts=texts, rise=rise, lengths=lengths)
                yield Setting(f"{texts} texts of {lengths} length, {name} changes", math.exp(RISE), draw)


# --- ceiling of a correlation -----------------------------------------------------------------------------------------


def true_scores(items: int, law: str) -> np.ndarray:
    """Make true scores of mean 0 and variance 1: quantiles of a law, the same in all draws."""
    probabilities = (np.arange(items) + 0.5) / items
    scores = ndtri(probabilities) if law == "normal" else np.exp(0.8 * ndtri(probabilities))
    return (scores - scores.mean()) / scores.std(ddof=1)


def noisy_table(rng: Rng, truth: np.ndarray, parts: int, reliability: float, noise: str) -> np.ndarray:
    """Draw a table [parts, items]; the mean over its parts has this reliability."""
    errors = rng.normal(size=(parts, len(truth)))
    if noise == "larger for large scores":
        scale = 0.3 + abs(truth)
        errors *= scale / math.sqrt(np.mean(scale**2))
    elif noise == "heavy-tailed":
        errors = rng.standard_t(3, size=errors.shape) / math.sqrt(3)
    return truth + math.sqrt(parts * (1 - reliability) / reliability) * errors


def ceiling_of(rng: Rng, truth: np.ndarray, parts: int, reliabilities: tuple[float, ...], noise: str) -> Estimate:
    tables = [noisy_table(rng, truth, parts, reliability, noise) for reliability in reliabilities]
    return stats.correlation_ceiling(*tables)


def ceiling() -> Iterator[Setting]:
    for noise in ("the same for all", "larger for large scores", "heavy-tailed"):
        for parts, items, law in ((3, 72, "normal"), (6, 72, "normal"), (12, 72, "skewed"), (12, 16, "skewed")):
            for reliabilities in ((0.4,), (0.9,), (0.6, 0.8)):
                name = f"{parts} parts, {items} {law} items, noise {noise}, reliability {reliabilities}"
                shape = {"parts": parts, "reliabilities": reliabilities, "noise": noise}
                draw = partial(ceiling_of, truth=true_scores(items, law), **shape)
                yield Setting(name, math.sqrt(math.prod(reliabilities)), draw)


INTERVALS = {"accuracy": accuracy, "seeds": seeds, "perplexity": perplexity, "ceiling": ceiling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500, help="of the data, for each row")
    parser.add_argument("--only", nargs="+", choices=INTERVALS, default=list(INTERVALS), help="intervals to try")
    options = parser.parse_args()
    print("SIMULATED")
    for name in options.only:
        print(f"\n{name:92} {'holds':>7} {'below':>6} {'above':>6} {'width':>8}")
        for setting in INTERVALS[name]():
            row = coverage(setting, options.draws)
            print(f"{setting.name:92} {row.holds:7.1%} {row.below:6.1%} {row.above:6.1%} {row.width:8.4f}", flush=True)


if __name__ == "__main__":
    main()
