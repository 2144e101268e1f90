"""Claims put to the test in a session: the verdict of each value, and the folded box on the page."""

from collections.abc import Mapping, Sequence
from html import escape

from labkit import show
from labkit.errors import InputError
from labkit.lesson import claims, reference_runs
from labkit.lesson.by_device import kind_of
from labkit.lesson.claims import Claim
from labkit.lesson.records import SettledClaim

MOST_SHOWN = 5


class ClaimTests:
    """The tested claims of a session.

    lesson: "00" to "13": the lesson's reference runs may settle a claim, too.
    device: "cpu" or "cuda", the kind of the session's device.
    judges: False for a preset whose values settle nothing.
    """

    def __init__(self, lesson: str, device: str, judges: bool) -> None:
        self._lesson = lesson
        self._device = device
        self._judges = judges
        self._settled: dict[str, SettledClaim] = {}

    @property
    def settled(self) -> list[SettledClaim]:
        """The tested claims, in the order of the first test."""
        return list(self._settled.values())

    def test(
        self,
        claim_id: str,
        value: float | None,
        ci95: Sequence[float] | None,
        trained: Mapping[str, float] | None,
        device: str | None,
    ) -> None:
        """Note the verdict of a value (`claims.verdict`, with the same arguments and errors) in silence.

        device: device that the value was timed on, such as "cpu" or "cuda:0"; None for the session's.
        A CPU's number settles no claim about a GPU, nor a GPU's number a claim about a CPU, nor a number of a preset
        that only tries the code any claim: the value is dropped.
        """
        kind = kind_of(device or self._device)
        claim = claims.entry(claim_id)
        number = show.number(value)
        verdict = claims.verdict(claim, value if number is None else number, ci95, trained)
        if not (self._judges and claims.can_be_settled_on(claim, kind)):
            verdict, number, ci95 = "not measurable here", None, None
        self._settled[claim_id] = SettledClaim(
            id=claim_id,
            value=number,
            ci95=ci95 and tuple(ci95),
            trained=trained and dict(trained),
            verdict=verdict,
            device=device,
        )

    def show_folded(self, claim_ids: Sequence[str]) -> None:
        """Show up to five tested claims in a folded box: the verdict, why people say so, when people are right.

        The verdicts of reference runs stand beside a claim that was not settled or not measured here.
        Raises InputError for zero or more than five ids, an untested claim, an entry without `why` or `right_when`.
        """
        if not 1 <= len(claim_ids) <= MOST_SHOWN:
            raise InputError(
                f"lab.claims shows one to five claims, not {len(claim_ids)}; choose those that teach most."
            )
        title = f"{show.counted(len(claim_ids), 'widespread claim')}, tested"
        text = [title]
        html = [f"<details><summary><b>{title}</b></summary>"]
        for claim_id in claim_ids:
            claim, settled = self._tested(claim_id)
            facts = self._facts(claim, settled)
            text += _as_text(claim, settled, facts)
            html.append(_as_html(claim, settled, facts))
        html.append("</details>")
        show.emit("\n".join(text), "".join(html))

    def _tested(self, claim_id: str) -> tuple[Claim, SettledClaim]:
        claim = claims.entry(claim_id)
        if claim_id not in self._settled:
            raise InputError(
                f"Claim {claim_id} has not been tested; call lab.claim({claim_id!r}, value) in a cell above."
            )
        if not claim.why or not claim.right_when:
            raise InputError(f"Claim {claim_id} has no why and right_when in claims.toml; add both, a sentence each.")
        return claim, self._settled[claim_id]

    def _facts(self, claim: Claim, settled: SettledClaim) -> dict[str, str]:
        """Return the facts about a claim by heading; empty facts are left out."""
        here = claims.measured(claim, settled.value, settled.ci95)
        facts = {claim.quantity: f"expected {claims.expected(claim)}; here {here}"}
        if settled.verdict == "not settled here":
            facts["Why it is not settled"] = f"it takes at least {claims.recipe(claim)}"
        if "here" in settled.verdict:
            facts["Recorded"] = "; ".join(reference_runs.verdicts(self._lesson, claim))
        facts["Why people say it"] = claim.why
        facts["When they are right"] = claim.right_when
        return {heading: words for heading, words in facts.items() if words}


def _as_text(claim: Claim, settled: SettledClaim, facts: Mapping[str, str]) -> list[str]:
    lines = [f"    {heading}: {words}" for heading, words in facts.items()]
    return [f"{claim.text}  {settled.verdict.upper()}", *lines]


def _as_html(claim: Claim, settled: SettledClaim, facts: Mapping[str, str]) -> str:
    html = f"<p><b>{escape(claim.text)}</b> <b>[{settled.verdict}]</b>"
    for heading, words in facts.items():
        html += f"<br><i>{escape(heading)}</i>: {escape(words)}"
    return f"{html}</p>"
