"""What the guide claims, and what a measured value says about it: confirmed, contradicted, inconclusive, or nothing.

The claims stand in notebooks/claims.toml, each with the range of values that would confirm it, written down before
anything is measured. A verdict weighs one value with its interval; it does not judge how the value was obtained.
"""

import math
import numbers
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from labkit import files, show
from labkit.errors import DataError, InputError

Verdict = Literal["confirmed", "contradicted", "inconclusive", "not measurable here"]
NEEDS = ("any", "cpu", "gpu", "arithmetic", "document")
ROUNDING = 1e-9  # relative: a bound that a value meets exactly is met


@dataclass(frozen=True)
class Claim:
    """One entry of claims.toml. `expected` is (lowest, highest) of the values that confirm it, infinite where open.

    `needs` says where it can be settled: on any machine, on a "cpu" or "gpu" only, by "arithmetic", by a "document".
    """

    id: str
    section: int
    text: str
    quantity: str
    unit: str
    expected: tuple[float, float]
    needs: str
    source: str


def load(path: Path | None = None) -> dict[str, Claim]:
    """All claims by id, in the file's order; DataError naming the entry that is malformed or there twice."""
    path = path or files.NOTEBOOKS / "claims.toml"
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("claim", [])
    except FileNotFoundError:
        raise DataError(f"{path} is missing; take it from the course's repository.") from None
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path.name} is not TOML ({error}); correct that line.") from None
    claims: dict[str, Claim] = {}
    for number, entry in enumerate(entries, start=1):
        claim = _claim(entry, f"{path.name}, entry {number} ({entry.get('id', 'without id')!r})")
        if claim.id in claims:
            raise DataError(
                f"{path.name}, entry {number}: the id {claim.id!r} is there twice; give each claim its own."
            )
        claims[claim.id] = claim
    return claims


def verdict(claim: Claim, value: float | None, ci95: Sequence[float] | None = None) -> Verdict:
    """What `value` (None: not measurable) with its 95 % interval says about the claim.

    The whole interval within the expected range confirms, the whole outside contradicts, an edge inside it is
    inconclusive; without an interval the value alone decides. InputError for a value that is no number.
    """
    if value is None:
        return "not measurable here"
    low, high = _interval(claim, value, ci95)
    least, most = claim.expected
    if _at_least(low, least) and _at_least(most, high):
        return "confirmed"
    return "inconclusive" if _at_least(high, least) and _at_least(most, low) else "contradicted"


def expected(claim: Claim) -> str:
    """The range in words: "10 to 20 tokens/s", "at least 1.05", "at most 1", "exactly 2 TOPS/W"."""
    low, high = (f"{bound:,.10g}" for bound in claim.expected)
    if low == high:
        words = f"exactly {low}"
    elif high == "inf":
        words = f"at least {low}"
    else:
        words = f"at most {high}" if low == "-inf" else f"{low} to {high}"
    return words if claim.unit in show.BARE else f"{words} {claim.unit}".strip()


def _at_least(value: float, bound: float) -> bool:
    return value >= bound or math.isclose(value, bound, rel_tol=ROUNDING)


def _interval(claim: Claim, value: Any, ci95: Any) -> tuple[float, float]:
    ends = (value, value) if ci95 is None else tuple(ci95)
    if not all(_is_number(number) and not math.isnan(number) for number in (value, *ends)):
        raise InputError(f"Claim {claim.id} takes a number, or None where it cannot be measured, not {value!r}.")
    if len(ends) != 2 or not ends[0] <= value <= ends[1]:
        raise InputError(f"The interval {ci95!r} of claim {claim.id} has to be (low, high) around the value {value!r}.")
    return float(ends[0]), float(ends[1])


def _claim(entry: dict[str, Any], where: str) -> Claim:
    names = [field.name for field in fields(Claim)]
    if missing := [name for name in names if name not in entry]:
        raise DataError(f"{where} has no {missing[0]}; a claim has {', '.join(names)}.")
    if unknown := [name for name in entry if name not in names]:
        raise DataError(f"{where} has a field {unknown[0]}; a claim has {', '.join(names)}.")
    for name in ("id", "text", "quantity", "unit", "source"):
        if not isinstance(entry[name], str) or not (entry[name].strip() or name == "unit"):
            raise DataError(f"{where}: {name} has to be a text that is not empty.")
    if entry["needs"] not in NEEDS:
        raise DataError(f"{where}: needs is {entry['needs']!r}; choose one of {', '.join(NEEDS)}.")
    section, bounds = entry["section"], entry["expected"]
    if not isinstance(section, int) or not entry["id"].startswith(f"{section}."):
        raise DataError(f"{where}: the id has to be <section>.<n>, with section = {section!r} before the dot.")
    pair = isinstance(bounds, list) and len(bounds) == 2 and all(map(_is_number, bounds))
    if not pair or not bounds[0] <= bounds[1]:
        raise DataError(
            f"{where}: expected is {bounds!r}; give [low, high] with low <= high, -inf or inf for no bound."
        )
    return Claim(**{**entry, "expected": (float(bounds[0]), float(bounds[1]))})


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
