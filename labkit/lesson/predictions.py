"""Predictions: a reader's guesses before a measurement (how far off they were: calibration.py)."""

import math
from collections.abc import Iterator
from html import escape
from types import EllipsisType

from labkit import show
from labkit.errors import InputError
from labkit.lesson.records import Prediction, RecordedValue


class Predictions:
    """The predictions of a session by name; a recorded value of the same name completes a prediction.

    judges: False for a preset whose results are no yardstick: predictions then stay without a measured number.
    """

    def __init__(self, judges: bool) -> None:
        self._judges = judges
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
        if not self._judges:
            return
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
