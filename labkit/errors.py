"""Errors for people, a sentence each: the mistake, the allowed values, the remedy. Checks of numbers and choices.

The command line prints a LabError without a traceback. Any other exception is a bug of labkit and keeps the traceback.
"""

import math
from collections.abc import Collection
from numbers import Integral, Real


class LabError(Exception):
    """Report a problem that the user can solve."""


class InputError(LabError, ValueError):
    """Report an argument, parameter or model that labkit cannot use."""


class EqualityError(LabError, ArithmeticError):
    """Report a changed model with wrong results. The model is not returned; a smaller change may succeed."""


class DataError(LabError, RuntimeError):
    """Report a data set, model or record that is missing, damaged or out of reach."""


def is_whole(value: object) -> bool:
    """Return True if `value` is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_index(index: object, n: int, what: str) -> None:
    """Raise InputError unless `index` is a whole number from 0 to n - 1; `what` is a noun for the error: "head"."""
    if not is_whole(index) or not 0 <= index < n:
        raise InputError(f"There is no {what} {index!r}: they are counted from 0 to {n - 1}.")


def check_whole(value: object, name: str, least: int = 1, most: int | None = None) -> None:
    """Raise InputError unless `value` is a whole number from `least` to `most`.

    name: name of the argument, for the error's sentence.
    most: the largest allowed value, None for no upper limit.
    """
    is_too_large = is_whole(value) and most is not None and value > most
    if not is_whole(value) or value < least or is_too_large:
        limit = "" if most is None else f" to {most}"
        raise InputError(f"{name} is {value!r}, but it must be a whole number from {least}{limit}.")


def check_number(
    value: object,
    name: str,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """Raise InputError unless `value` is a finite number within limits: least <= value <= most, above < value < below.

    name: name of the argument, for the error's sentence.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    is_finite = is_number and math.isfinite(value)
    if is_finite and least <= value <= most and above < value < below:
        return
    words = ["a finite number"]
    for word, limit in (("from", least), ("above", above), ("to", most), ("and below", below)):
        if math.isfinite(limit):
            words.append(f"{word} {limit:g}")
    raise InputError(f"{name} is {value!r}, but it must be {' '.join(words)}.")


def check_choice(value: object, choices: Collection[str], what: str) -> None:
    """Raise InputError unless `value` is among `choices`; `what` names the kind of choice, such as "cache"."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"There is no {what} {value!r}: choose one of {', '.join(choices)}.")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class for an empty message."""
    message = str(error)
    return message.splitlines()[0] if message else type(error).__name__
