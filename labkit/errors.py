"""Errors for the person who reads them: one sentence with what was wrong, what is allowed and what to do.

The command line prints these without a traceback; any other exception is a bug of labkit and keeps its traceback.
"""

import math
from collections.abc import Collection
from numbers import Integral, Real


class LabError(Exception):
    """Something that the user can mend."""


class InputError(LabError, ValueError):
    """An argument, parameter or model that cannot be used as given."""


class EqualityError(LabError, ArithmeticError):
    """A changed model that does not compute what it has to: it is not returned. Mended by changing less of it."""


class DataError(LabError, RuntimeError):
    """A data set, model or record that is missing, damaged or out of reach."""


def check_whole(value: object, name: str, least: int = 1, most: int | None = None) -> None:
    """InputError unless `value` is a whole number from `least` on, or to `most`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        to = "" if most is None else f" to {most}"
        raise InputError(f"{name} is {value!r}, but it must be a whole number from {least}{to}.")


def check_number(
    value: object,
    name: str,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    """InputError unless `value` is a finite number from `least` to `most`, above `above` and below `below`."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (least <= value <= most and above < value < below):
        limits = {"from": least, "above": above, "to": most, "and below": below}
        words = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
        raise InputError(f"{name} is {value!r}, but it must be {' '.join(['a finite number', *words])}.")


def check_choice(value: object, choices: Collection[str], what: str) -> None:
    """InputError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"There is no {what} {value!r}: choose one of {', '.join(choices)}.")


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
