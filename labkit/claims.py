"""What the guide claims, and what a measured value says about it: confirmed, contradicted, inconclusive, or nothing.

The claims stand in notebooks/claims.toml, each with the range of values that would confirm it, written down before
anything is measured. A verdict weighs one value with its interval; it does not judge how the value was obtained.
"""

import math
import numbers
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from labkit import files, show
from labkit.errors import DataError, InputError

Verdict = Literal["confirmed", "contradicted", "inconclusive", "not measurable here"]
ROUNDING = 1e-9  # relative: a bound that a value meets exactly is met


def _range(bounds: Any) -> tuple[float, float]:
    pair = isinstance(bounds, list) and len(bounds) == 2 and all(map(_is_number, bounds))
    if not pair or not bounds[0] <= bounds[1]:
        raise ValueError(f"expected is {bounds!r}; give [low, high] with low <= high, -inf or inf for no bound")
    return float(bounds[0]), float(bounds[1])


class Claim(BaseModel, frozen=True, extra="forbid", strict=True):
    """One entry of claims.toml. `expected` is (lowest, highest) of the values that confirm it, infinite where open.

    `needs` says where it can be settled: on any machine, on a "cpu" or "gpu" only, by "arithmetic", by a "document".
    """

    id: str
    section: int
    text: str = Field(pattern=r"\S")
    quantity: str = Field(pattern=r"\S")
    unit: str
    expected: Annotated[tuple[float, float], BeforeValidator(_range)]
    needs: Literal["any", "cpu", "gpu", "arithmetic", "document"]
    source: str = Field(pattern=r"\S")

    @model_validator(mode="after")
    def _id_in_section(self) -> "Claim":
        if not self.id.startswith(f"{self.section}."):
            raise ValueError(f"the id has to be <section>.<n>, with section = {self.section!r} before the dot")
        return self


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
        try:
            claim = Claim.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            fault = ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
            raise DataError(f"{path.name}, entry {number} ({entry.get('id', 'without id')!r}): {fault}.") from None
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


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
