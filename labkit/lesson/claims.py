"""Widespread claims with a number, and the verdict of a measured value: confirmed, contradicted, or undecided.

The claims stand in notebooks/claims.toml, each with the range of values that confirm it. A verdict weighs a value
and an interval. A claim about trained models has a recipe, the least training able to settle the claim: after a shorter
training the claim stays open.
"""

import datetime
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from labkit import files, show
from labkit.errors import DataError, InputError

Verdict = Literal["confirmed", "contradicted", "inconclusive", "not settled here", "not measurable here"]
SETTLED_BY = {  # what a claim needs -> the kind of device that can settle it, and what to say elsewhere
    "gpu": ({"cuda"}, "it needs a GPU"),
    "cpu": ({"cpu"}, "it was not measured on a CPU"),
    "document": (set(), "only a document could settle it"),
}
ROUNDING = 1e-9  # relative: a bound that a value meets exactly is met


def _range(bounds: Any) -> tuple[float, float]:
    is_pair = isinstance(bounds, list) and len(bounds) == 2
    is_numeric = is_pair and all(show.number(bound) is not None for bound in bounds)
    if not is_numeric or not bounds[0] <= bounds[1]:
        raise ValueError(f"expected is {bounds!r}; give [low, high] with low <= high, -inf or inf for no bound")
    return float(bounds[0]), float(bounds[1])


class Change(BaseModel, frozen=True, extra="forbid", strict=True):
    """An exchange of a claim's quantity: the day or moment (UTC), the quantities before and after, and the reason."""

    date: datetime.datetime | datetime.date
    from_: str = Field(alias="from", pattern=r"\S")
    to: str = Field(pattern=r"\S")
    why: str = Field(pattern=r"\S")


class Claim(BaseModel, frozen=True, extra="forbid", strict=True):
    """An entry of claims.toml.

    id: "<section>.<n>"; stays when a neighbour goes.
    text: the claim, in our words.
    quantity: the measured quantity, in `unit`.
    expected: (lowest, highest) of the confirming values, infinite for an open side.
    needs: the judge of the claim: "any" machine, a "cpu", a "gpu", "arithmetic", a "document".
    source: place of the claim, and the evidence for our verdict.
    why: why people say so, for readers of a lesson.
    right_when: the conditions under which people are right.
    changed: the exchanges of the quantity after a value was known.
    recipe: the least training able to settle the claim: {"steps": 600, "seeds": 5}; empty without training.
    """

    id: str
    section: int
    text: str = Field(pattern=r"\S")
    quantity: str = Field(pattern=r"\S")
    unit: str
    expected: Annotated[tuple[float, float], BeforeValidator(_range)]
    needs: Literal["any", "cpu", "gpu", "arithmetic", "document"]
    source: str = Field(pattern=r"\S")
    why: str = ""
    right_when: str = ""
    changed: list[Change] = []
    recipe: dict[str, int] = {}

    @model_validator(mode="after")
    def _id_in_section(self) -> "Claim":
        if not self.id.startswith(f"{self.section}."):
            raise ValueError(f"the id has to be <section>.<n>, with section = {self.section!r} before the dot")
        return self


def load(path: Path | None = None) -> dict[str, Claim]:
    """Read all claims by id, in the file's order.

    path: path of a file like claims.toml, which is read by default.
    Raises DataError, naming the entry, for a malformed or repeated entry.
    """
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
            name = entry.get("id", "without id")
            raise DataError(f"{path.name}, entry {number} ({name!r}): {_first_fault(error)}.") from None
        if claim.id in claims:
            raise DataError(
                f"{path.name}, entry {number}: the id {claim.id!r} is there twice; give each claim its own."
            )
        claims[claim.id] = claim
    return claims


def entry(id: str) -> Claim:
    """Return the claim called `id`; InputError, naming the claims of the same section, for an unknown id."""
    claims = load()
    if id in claims:
        return claims[id]
    section = str(id).partition(".")[0]
    near = [name for name in claims if name.partition(".")[0] == section]
    listed = ", ".join(near or claims) or "none yet"
    raise InputError(f"There is no claim {id!r} in claims.toml; there are {listed}.")


def verdict(
    claim: Claim,
    value: float | None,
    ci95: Sequence[float] | None = None,
    trained: Mapping[str, float] | None = None,
) -> Verdict:
    """Return the verdict of a value on a claim.

    value: a number in the claim's unit; None if the quantity is not measurable here.
    ci95: the value's 95 % interval, (low, high). The whole interval within the expected range confirms, the whole
        interval outside contradicts, an edge of the range inside the interval is inconclusive. Without an interval the
        value alone decides.
    trained: the training behind the value, in the terms of the claim's recipe; less than the recipe settles nothing.
    Raises InputError for a value that is no number, and for a `trained` without a term of the recipe.
    """
    _check_trained(claim, trained)
    is_too_short = any(trained[term] < least for term, least in claim.recipe.items())
    if value is None:
        return "not settled here" if is_too_short else "not measurable here"
    low, high = _interval(claim, value, ci95)
    if is_too_short:
        return "not settled here"
    least, most = claim.expected
    if _at_least(low, least) and _at_least(most, high):
        return "confirmed"
    if _at_least(high, least) and _at_least(most, low):
        return "inconclusive"
    return "contradicted"


def can_be_settled_on(claim: Claim, device: str) -> bool:
    """Return True if a value measured on a kind of device, "cpu" or "cuda", can settle the claim."""
    if claim.needs not in SETTLED_BY:
        return True
    devices, _ = SETTLED_BY[claim.needs]
    return device in devices


def is_current(claim: Claim, created: str, trained: Mapping[str, float] | None) -> bool:
    """Return True if a record's verdict is about the claim's present quantity.

    created: moment of the record in UTC (ISO 8601).
    trained: the training in the record's entry; a record from before the claim had its recipe has none, and is not
        current.
    """
    if claim.recipe and trained is None:
        return False
    return all(change.date.isoformat() <= created for change in claim.changed)  # days and moments sort as texts


def expected(claim: Claim) -> str:
    """Return the expected range in words: "10 to 20 tokens/s", "at least 1.05", "at most 1", "exactly 2 TOPS/W"."""
    low, high = (f"{bound:,.10g}" for bound in claim.expected)
    if low == high:
        words = f"exactly {low}"
    elif high == "inf":
        words = f"at least {low}"
    elif low == "-inf":
        words = f"at most {high}"
    else:
        words = f"{low} to {high}"
    return words if claim.unit in show.BARE else f"{words} {claim.unit}".strip()


def recipe(claim: Claim) -> str:
    """Return the claim's recipe in words: "1,290 steps, 1 seed"; "" without a recipe."""
    phrases = []
    for term, number in claim.recipe.items():
        noun = term.removesuffix("s") if number == 1 else term
        phrases.append(f"{number:,} {noun}")
    return ", ".join(phrases)


def measured(claim: Claim, value: float | None, ci95: Sequence[float] | None) -> str:
    """Return a value in words: "2.50x (2.41x to 2.60x)"; without a value, the reason."""
    if value is None:
        _, reason = SETTLED_BY.get(claim.needs, (None, "not measured"))
        return reason
    quantity = show.quantity(value, claim.unit)
    return f"{quantity} ({show.interval(ci95, claim.unit)})" if ci95 else quantity


def _first_fault(error: ValidationError) -> str:
    """Return pydantic's first fault as "<field>: <message>"."""
    first = error.errors()[0]
    field = [str(part) for part in first["loc"]]
    return ": ".join([*field, first["msg"].removeprefix("Value error, ")])


def _check_trained(claim: Claim, trained: Mapping[str, float] | None) -> None:
    missing = [term for term in claim.recipe if term not in (trained or {})]
    if missing:
        example = ", ".join(f'"{term}": ...' for term in claim.recipe)
        raise InputError(
            f"Claim {claim.id} rests on training, and {', '.join(missing)} is not given; pass trained={{{example}}}."
        )


def _at_least(value: float, bound: float) -> bool:
    return value >= bound or math.isclose(value, bound, rel_tol=ROUNDING)


def _interval(claim: Claim, value: Any, ci95: Any) -> tuple[float, float]:
    """Return the ends of the interval, or of the value alone; InputError unless the interval holds the value."""
    ends = (value, value) if ci95 is None else tuple(ci95)
    if any(show.number(end) is None or math.isnan(end) for end in (value, *ends)):
        raise InputError(f"Claim {claim.id} takes a number, or None where it cannot be measured, not {value!r}.")
    if len(ends) != 2 or not ends[0] <= value <= ends[1]:
        raise InputError(f"The interval {ci95!r} of claim {claim.id} has to be (low, high) around the value {value!r}.")
    return float(ends[0]), float(ends[1])
