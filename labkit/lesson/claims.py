"""Widespread claims with a number in them, and what a measured value says: confirmed, contradicted, or neither.

The claims stand in notebooks/claims.toml, each with the range of values that would confirm it. A verdict weighs one
value with its interval. Where the value rests on training, the entry has a recipe, the least training that could settle
it: a shorter one settles nothing.
"""

import datetime
import math
import tomllib
from collections.abc import Mapping, Sequence
from html import escape
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
    pair = isinstance(bounds, list) and len(bounds) == 2 and None not in map(show.number, bounds)
    if not pair or not bounds[0] <= bounds[1]:
        raise ValueError(f"expected is {bounds!r}; give [low, high] with low <= high, -inf or inf for no bound")
    return float(bounds[0]), float(bounds[1])


class Change(BaseModel, frozen=True, extra="forbid", strict=True):
    """On which day a claim's quantity was exchanged for another, from what to what, and why."""

    date: datetime.date
    from_: str = Field(alias="from", pattern=r"\S")
    to: str = Field(pattern=r"\S")
    why: str = Field(pattern=r"\S")


class Claim(BaseModel, frozen=True, extra="forbid", strict=True):
    """One entry of claims.toml.

    id          "<section>.<n>"; it stays when others go
    text        the claim, in our words
    quantity    what is measured for it, in `unit`
    expected    (lowest, highest) of the values that confirm it, infinite where open
    needs       where it can be settled: on "any" machine, on a "cpu" or "gpu" only, by "arithmetic", by a "document"
    source      where it stands, and what its verdict rests on
    why         why people say it, for the reader of a lesson that shows it
    right_when  under which conditions they are right
    changed     each time that the quantity was exchanged after a value was known
    recipe      the least training that could settle it, such as {"steps": 600, "seeds": 5}; empty where none is needed
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


def entry(id: str) -> Claim:
    """The claim with this id; InputError naming those of its section."""
    entries = load()
    if id not in entries:
        near = [other for other in entries if other.partition(".")[0] == str(id).partition(".")[0]] or list(entries)
        raise InputError(f"There is no claim {id!r} in claims.toml; there are {', '.join(near) or 'none yet'}.")
    return entries[id]


def verdict(
    claim: Claim,
    value: float | None,
    ci95: Sequence[float] | None = None,
    trained: Mapping[str, float] | None = None,
) -> Verdict:
    """What `value` (None: not measurable) with its 95 % interval says about the claim.

    The whole interval within the expected range confirms, the whole outside contradicts, an edge inside it is
    inconclusive; without an interval the value alone decides. trained: what the value rests on, in the terms of the
    claim's recipe; less than the recipe settles nothing. InputError for a value that is no number, and where a claim
    with a recipe is not told all that it asks for.
    """
    if missing := [term for term in claim.recipe if term not in (trained or {})]:
        asked = ", ".join(f'"{term}": ...' for term in claim.recipe)
        raise InputError(
            f"Claim {claim.id} rests on training, and {', '.join(missing)} is not given; pass trained={{{asked}}}."
        )
    too_short = any(trained[term] < least for term, least in claim.recipe.items())
    if value is None:
        return "not settled here" if too_short else "not measurable here"
    low, high = _interval(claim, value, ci95)
    if too_short:
        return "not settled here"
    least, most = claim.expected
    if _at_least(low, least) and _at_least(most, high):
        return "confirmed"
    return "inconclusive" if _at_least(high, least) and _at_least(most, low) else "contradicted"


def is_current(claim: Claim, created: str, trained: Mapping[str, float] | None) -> bool:
    """Whether what a record of this day (ISO 8601) says about the claim is about the quantity that it has now.

    A record from before the claim had its recipe does not say what was trained, and is not either.
    """
    newest = max((change.date for change in claim.changed), default=datetime.date.min)
    return datetime.date.fromisoformat(created[:10]) >= newest and not (claim.recipe and trained is None)


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


def recipe(claim: Claim) -> str:
    """The least training that could settle it, in words: "1,290 steps, 1 seed"; "" where none is needed."""
    return ", ".join(f"{n:,} {term.removesuffix('s') if n == 1 else term}" for term, n in claim.recipe.items())


def measured(claim: Claim, value: float | None, ci95: Sequence[float] | None) -> str:
    """A value in words: "2.50x (2.41x to 2.60x)"; without one, why there is none."""
    if value is None:
        return SETTLED_BY.get(claim.needs, (None, "not measured"))[1]
    if not ci95:
        return show.quantity(value, claim.unit)
    no_end = ci95[0] <= 0 and ci95[1] == math.inf
    between = "too few samples for an interval" if no_end else show.interval(ci95, claim.unit)
    return f"{show.quantity(value, claim.unit)} ({between})"


def folded(tested: Sequence[tuple[Claim, Verdict, str, str]]) -> tuple[str, str]:
    """A folded box as text and as HTML: each claim with its verdict, what was measured here, and a recorded run."""
    title = f"{len(tested)} widespread claim{'s' * (len(tested) > 1)}, tested"
    text, html = [title], [f"<details><summary><b>{title}</b></summary>"]
    for claim, outcome, here, elsewhere in tested:
        facts = {
            claim.quantity: f"expected {expected(claim)}; here {here}",
            "Why it is not settled": f"it takes at least {recipe(claim)}" if outcome == "not settled here" else "",
            "Recorded": elsewhere,
            "Why people say it": claim.why,
            "When they are right": claim.right_when,
        }
        facts = {name: words for name, words in facts.items() if words}
        text += [f"{claim.id}  {claim.text}  {outcome.upper()}", *(f"    {name}: {facts[name]}" for name in facts)]
        lines = "".join(f"<br><i>{escape(name)}</i>: {escape(words)}" for name, words in facts.items())
        html.append(f"<p><b>{claim.id}. {escape(claim.text)}</b> <b>[{outcome}]</b>{lines}</p>")
    return "\n".join(text), "".join([*html, "</details>"])


def _at_least(value: float, bound: float) -> bool:
    return value >= bound or math.isclose(value, bound, rel_tol=ROUNDING)


def _interval(claim: Claim, value: Any, ci95: Any) -> tuple[float, float]:
    ends = (value, value) if ci95 is None else tuple(ci95)
    if any(show.number(end) is None or math.isnan(end) for end in (value, *ends)):
        raise InputError(f"Claim {claim.id} takes a number, or None where it cannot be measured, not {value!r}.")
    if len(ends) != 2 or not ends[0] <= value <= ends[1]:
        raise InputError(f"The interval {ci95!r} of claim {claim.id} has to be (low, high) around the value {value!r}.")
    return float(ends[0]), float(ends[1])
