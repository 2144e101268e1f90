"""Numbers in sentences: one vocabulary for an interval, a number with an interval, and the verdict on a speed-up.

    >>> from labkit import show
    >>> show.speed(1.8, (1.6, 2.0), processes=5)
    '1.8 times as fast (1.6 to 2.0 over 5 processes)'
    >>> show.speed(1.01, (0.97, 1.04), processes=1)
    'no difference can be told (0.97 to 1.04 within this run)'
    >>> show.told(-0.5, (-0.81, -0.2), "+.1f", " points")
    '-0.5 points (-0.8 to -0.2)'

The two ends of an interval differ in print whenever the ends differ at all: 0.931 to 0.934, never 0.93 to 0.93.
"""

import math
import re
from collections.abc import Sequence

from labkit.show import quantity, supported_decimals

EQUAL = 1.01  # a ratio between 1 / EQUAL and EQUAL is no difference that anybody notices
MOST_DIGITS = 15  # of a float: two numbers that agree in all of them are equal
NO_INTERVAL = "no interval"
# Of "-0" and "-0.00"; not of "-0.5", and not the hyphen of "1e-05" or "5-0".
MINUS_OF_ZERO = re.compile(r"(?<![\w.)^-])-(?=0(?:\.0+)?(?!\.?\d))")
UNDEFINED = re.compile(r"(?<![a-z])(?:nan|inf)(?![a-wyz])|\bundefined\b|∞")  # as Python and labkit.show print them


def interval(ci95: Sequence[float] | None, unit: str = "", *, form: str = "", processes: int = 0) -> str:
    """Print a 95 % interval as "1.10 ms to 1.30 ms"; "" for None, "no interval" for an interval that excludes nothing.

    ci95: (low, high). An infinite end is open: "at least 3".
    unit: unit of both ends, as in `show.quantity`.
    form: format of both ends, such as "+.1f"; empty prints the ends as `show.quantity` does.
    processes: number of processes that the interval is over; 1 for "within this run", 0 to leave it open.
    """
    if ci95 is None:
        return ""
    low, high = ci95
    if is_open(ci95):
        return NO_INTERVAL
    if low == high:
        words = f"{_printed(low, unit, form)} at both ends"
    elif math.isinf(high):
        words = f"at least {_printed(low, unit, form)}"
    elif math.isinf(low):
        words = f"at most {_printed(high, unit, form)}"
    else:
        words = " to ".join(_apart(low, high, unit, form))
    return f"{words}{_over(processes)}"


def span(values: Sequence[float], form: str) -> str:
    """Print where several numbers lie: "0.931 to 0.934", or "0.93" if they are equal; "undefined" with a NaN.

    form: format of the numbers, such as ".2f".
    """
    if any(map(math.isnan, values)):
        return quantity(math.nan)
    low, high = min(values), max(values)
    if math.isclose(low, high, rel_tol=10.0 ** (1 - MOST_DIGITS)):
        return _formatted(low, form)
    return " to ".join(_apart(low, high, "", form))


def is_open(ci95: Sequence[float]) -> bool:
    """Return True for an interval that excludes nothing: (-inf, inf), a ratio's (0, inf), or an undefined end."""
    low, high = ci95
    return math.isnan(low) or math.isnan(high) or (low <= 0 and high == math.inf)


def covers(processes: int) -> str:
    """Say what the interval of a timing covers: several processes, or the calls of a single process."""
    return f"over {processes} processes" if processes > 1 else "within this run"


def told(value: float, ci95: Sequence[float], form: str = ".2f", unit: str = "", *, processes: int = 0) -> str:
    """Print a number and its interval: "1.80x (1.60 to 2.00 over 5 processes)"; "undefined" for an undefined number.

    value: the number.
    ci95: (low, high).
    form: format of the number and of both ends, such as "+.1f".
    unit: text behind the number alone, such as "x" or " points".
    processes: as in `interval`.
    """
    if math.isnan(value):
        return quantity(float(value))
    number = _formatted(value, form, further_digits(ci95, form=form))
    return f"{number}{unit} ({interval(ci95, form=form, processes=processes)})"


def speed(ratio: float, ci95: Sequence[float], *, processes: int = 0) -> str:
    """Say how fast a candidate is beside a baseline: "1.8 times as fast (1.6 to 2.0 within this run)".

    An interval that holds 1 tells no difference, and an interval within 1 % of 1 tells that there is none.

    ratio: the baseline's time over the candidate's time.
    ci95: (low, high) of the ratio.
    processes: as in `interval`.
    """
    if not 0 < ratio < math.inf:
        return "not measured"
    low, high = ci95
    if is_open(ci95):
        return f"{ratio:.2g} times as fast ({NO_INTERVAL})"
    form = f".{max(0, supported_decimals(ratio, (high - low) / 2))}f"
    ends = interval(ci95, form=form, processes=processes)
    if low >= 1 / EQUAL and high <= EQUAL:
        return f"equally fast within 1 % ({ends})"
    if low <= 1 <= high:
        return f"no difference can be told ({ends})"
    return f"{ratio:{form}} times as fast ({ends})"


def change(before: float, after: float, form: str) -> str:
    """Say how a number changed: "from 0.931 to 0.934", or "from 0.93 to the same 0.93" if the number did not change.

    form: format of both numbers, such as ".2f".
    """
    if before == after:
        return f"from {_formatted(before, form)} to the same {_formatted(after, form)}"
    return f"from {' to '.join(_apart(before, after, '', form))}"


def apart(value: float, other: float, unit: str) -> str:
    """Print a quantity with as many digits as tell it apart from another quantity: 1.003x beside 1.000x."""
    return _apart(value, other, unit, "")[0]


def further_digits(ends: Sequence[float], unit: str = "", *, form: str = "") -> int:
    """Return how many digits beyond the usual tell two numbers apart in print; 0 for equal and infinite numbers."""
    first, second = ends
    if first == second or not math.isfinite(second - first):
        return 0
    more = 0
    while _same_print(first, second, unit, form, more) and more < MOST_DIGITS:
        more += 1
    return more


def defined(sentences: Sequence[str]) -> list[str]:
    """Return the sentences without an undefined or infinite number; a sentence that says so if none is left.

    No zero keeps a minus, and no sentence a space at an end.
    """
    texts = [sentence for sentence in sentences if not UNDEFINED.search(sentence)]
    texts = texts or ["A number of this result is undefined or infinite here, so nothing is said about it."]
    return [MINUS_OF_ZERO.sub("", text).strip() for text in texts]


def _over(processes: int) -> str:
    return f" {covers(processes)}" if processes else ""


def _apart(first: float, second: float, unit: str, form: str) -> tuple[str, str]:
    """Print two numbers with the fewest further digits that make the texts differ; equal numbers stay equal."""
    more = further_digits((first, second), unit, form=form)
    return _printed(first, unit, form, more), _printed(second, unit, form, more)


def _same_print(first: float, second: float, unit: str, form: str, more: int) -> bool:
    return _without_zeros(_printed(first, unit, form, more)) == _without_zeros(_printed(second, unit, form, more))


def _without_zeros(text: str) -> str:
    """Cut the zeros that end a decimal fraction: "2.00 ms" and "2 ms" are the same number."""
    return re.sub(r"\.(\d*?)0*(?!\d)", lambda fraction: f".{fraction[1]}" if fraction[1] else "", text)


def _printed(value: float, unit: str, form: str, more: int = 0) -> str:
    return _formatted(value, form, more) if form else quantity(value, unit, more)


def _formatted(value: float, form: str, more: int = 0) -> str:
    """Format a number with `more` further digits, and no zero with a minus."""
    if not math.isfinite(value):
        return quantity(float(value))
    text = format(value, _with_digits(form, more))
    is_zero = not re.search("[1-9]", text)
    return format(0.0, _with_digits(form, more)) if is_zero else text


def _with_digits(form: str, more: int) -> str:
    """Raise the precision of a format: (".2f", 1) -> ".3f"."""
    return re.sub(r"\.(\d+)", lambda digits: f".{int(digits[1]) + more}", form)
