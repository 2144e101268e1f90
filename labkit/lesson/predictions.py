"""Predictions: a reader's guess before a measurement, and how far off it was."""

import math
import statistics
from collections.abc import Iterator, Sequence
from html import escape
from types import EllipsisType

from labkit import show
from labkit.errors import InputError
from labkit.lesson.records import Prediction, RecordedValue

NONE = "–"
RIGHT = 0.05  # relative: a guess without an interval to compare with is right up to this error


class Predictions:
    """The predictions of a session by name; a recorded value of the same name completes a prediction."""

    def __init__(self) -> None:
        self._by_name: dict[str, Prediction] = {}

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self._by_name.values())

    def predict(self, name: str, value: float | EllipsisType, unit: str, question: str, *, is_measured: bool) -> None:
        """Note a guess and print it, or ask the question if `value` is `...`.

        name: name of the quantity, as later in the record.
        value: the guess in `unit`; `...` notes the question without a guess.
        is_measured: True if the session has measured it already: a guess then comes too late and is not noted.
        Raises InputError if `value` is neither a finite number nor `...`.
        """
        guess = _checked_guess(name, value)
        if is_measured and guess is not None:
            show.emit(f"{name} has been measured already: {self._verdict(name)}. Restart the kernel to predict afresh.")
            return
        if not is_measured:
            self._by_name[name] = Prediction(name=name, question=question, unit=unit, predicted=guess, measured=None)
        if guess is None:
            _ask(question or name, unit)
        else:
            show.emit(f"predicted  {name}: {show.quantity(guess, unit)}")

    def complete(self, value: RecordedValue) -> None:
        """Write a recorded number and the interval, in the guess's unit, into the prediction of the same name.

        A text, and a number without a prediction, are ignored. Raises InputError if the units do not compare.
        """
        prediction = self._by_name.get(value.name)
        if prediction is None or show.number(value.value) is None:
            return
        factor = show.factor(value.unit, prediction.unit)
        if factor is None:
            raise InputError(
                f"{value.name!r} was predicted in {prediction.unit} and measured in {value.unit}; "
                "use one unit for both."
            )
        prediction.measured = value.value * factor
        prediction.ci95, prediction.covers = None, value.covers
        if value.ci95 is not None:
            low, high = value.ci95
            prediction.ci95 = (low * factor, high * factor)

    def _verdict(self, name: str) -> str:
        """Say in a clause why a late guess is not noted."""
        first = self._by_name.get(name)
        if first is None or first.predicted is None:
            return "too late"
        return f"your prediction of {show.quantity(first.predicted, first.unit)} stands"


def off_by(guess: Prediction) -> str:
    """Say how far a prediction was off: "above the interval: 1.80x too high"; "–" if no factor can be given."""
    low, high = _finite_interval(guess)
    if guess.predicted is not None and low <= guess.predicted <= high:
        return "inside the interval"
    if not _has_factor(guess):
        return NONE
    side = ""
    if low <= high:
        side = "above the interval: " if guess.predicted > high else "below the interval: "
    ratio = guess.predicted / guess.measured
    if not side and abs(ratio - 1) < RIGHT:
        return "right within 5 %"
    if ratio > 1:
        return f"{side}{show.quantity(ratio, 'x')} too high"
    return f"{side}{show.quantity(1 / ratio, 'x')} too low"


def calibration(predictions: Sequence[Prediction]) -> str:
    """Say in a sentence how good several guesses were together; "" if fewer than two were made and measured.

    Guesses are off by factors, so the sentence gives the median of max(predicted / measured, measured / predicted).
    """
    usable = [guess for guess in predictions if _has_factor(guess)]
    if len(usable) < 2:
        return ""
    factors = [max(guess.predicted / guess.measured, guess.measured / guess.predicted) for guess in usable]
    middle = statistics.median(factors)
    phrases = [off_by(guess) for guess in usable]
    inside = sum("inside" in phrase for phrase in phrases)
    high = sum("too high" in phrase for phrase in phrases)
    low = sum("too low" in phrase for phrase in phrases)
    return (
        f"Of {len(usable)} predictions {inside} lay inside the measured interval; half were off by a factor of "
        f"{show.quantity(middle, '')} or less. Too high: {high}, too low: {low}."
    )


def _checked_guess(name: str, value: float | EllipsisType) -> float | None:
    if value is ...:
        return None
    guess = show.number(value)
    if guess is None or not math.isfinite(guess):
        raise InputError(f"The prediction {name!r} is {value!r}; give one number, your best guess will do.")
    return guess


def _ask(question: str, unit: str) -> None:
    unit = "as a factor" if unit == "x" else unit
    if unit and unit not in show.BARE:
        question = f"{question} ({unit})"
    request = "no prediction yet: replace the ... by your number"
    html = f"<p><b>{escape(question)}</b><br><i>{escape(request)}</i></p>"
    show.emit(f"{question}\n{request}", html)


def _finite_interval(guess: Prediction) -> tuple[float, float]:
    """Return the measured interval; the empty (inf, -inf) if there is no interval or an end is infinite."""
    if guess.ci95 is None or not all(math.isfinite(end) for end in guess.ci95):
        return (math.inf, -math.inf)
    return guess.ci95


def _has_factor(guess: Prediction) -> bool:
    if guess.predicted is None or guess.measured is None:
        return False
    return guess.predicted * guess.measured > 0
