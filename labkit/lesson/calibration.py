"""How far off a reader's predictions were: one alone, and all of a run together."""

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from labkit import show
from labkit.lesson.records import Prediction

NONE = "–"
RIGHT = 0.05  # relative: a guess without an interval to compare with is right up to this error

Side = Literal["inside", "above", "below"]


def off_by(guess: Prediction) -> str:
    """Say how far a prediction was off: "above the interval: 1.80x too high"; "–" without a guess or a measurement.

    An interval that excludes nothing tells nothing of a guess.
    """
    if not _is_complete(guess):
        return NONE
    if guess.ci95 is None:
        return _off_without_interval(guess)
    if show.is_open(guess.ci95):
        return "not to be judged: no interval"
    side = _side(guess)
    if side == "inside":
        return "inside the interval"
    return f"{side} the interval: {_distance(guess)}"


def calibration(predictions: Sequence[Prediction]) -> str:
    """Say in a sentence or two how good several guesses were together; "" if fewer than two were made and measured.

    All of these guesses are counted. The typical error is the median of max(predicted / measured, measured / predicted)
    over the guesses that have such a factor: those on the same side of zero as the measurement.
    """
    made = [guess for guess in predictions if _is_complete(guess)]
    if len(made) < 2:
        return ""
    phrases = [off_by(guess) for guess in made]
    counts = {
        "inside the measured interval or right": _number_with(phrases, "inside", "right"),
        "too high": _number_with(phrases, "too high"),
        "too low": _number_with(phrases, "too low"),
        "not to be judged": _number_with(phrases, "not to be judged"),
    }
    listed = ", ".join(f"{count} {words}" for words, count in counts.items() if count)
    return " ".join([f"Of {len(made)} predictions: {listed}.", *_typical_factor(made)])


def _number_with(phrases: Sequence[str], *words: str) -> int:
    return sum(any(word in phrase for word in words) for phrase in phrases)


def _typical_factor(made: Sequence[Prediction]) -> list[str]:
    """Return the sentence about the median factor; none for fewer than two guesses with a factor."""
    ratios = [guess.predicted / guess.measured for guess in made if _has_factor(guess)]
    if len(ratios) < 2:
        return []
    middle = statistics.median(max(ratio, 1 / ratio) for ratio in ratios)
    of = "all" if len(ratios) == len(made) else f"the {len(ratios)} with a factor"
    return [f"Half of {of} were off by a factor of {show.quantity(middle)} or less."]


def _is_complete(guess: Prediction) -> bool:
    """Return True for a guess that was made, and measured as a number (NaN is none)."""
    return guess.predicted is not None and guess.measured is not None and not math.isnan(guess.measured)


def _off_without_interval(guess: Prediction) -> str:
    if math.isclose(guess.predicted, guess.measured, rel_tol=RIGHT):
        return "right within 5 %"
    return _distance(guess)


def _side(guess: Prediction) -> Side:
    low, high = guess.ci95
    if guess.predicted > high:
        return "above"
    return "below" if guess.predicted < low else "inside"


def _distance(guess: Prediction) -> str:
    """Return the distance from the measurement as a factor, or as a difference if the two are not of the same sign."""
    if _has_factor(guess):
        ratio = guess.predicted / guess.measured
        words = show.apart(max(ratio, 1 / ratio), 1.0, "x")
    else:
        words = show.quantity(abs(guess.predicted - guess.measured), guess.unit)
    direction = "high" if guess.predicted > guess.measured else "low"
    return f"{words} too {direction}"


def _has_factor(guess: Prediction) -> bool:
    return guess.predicted * guess.measured > 0 and math.isfinite(guess.measured)
