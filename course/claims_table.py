"""The guide's claims as tables, section by section: what would confirm each, and what every machine found.

The verdicts were given when the lessons ran; here they are only gathered, and counted over all machines.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from course import page
from course.columns import PRESETS, Column, valued
from labkit.claims import Claim, expected

DIFFERS, NOT_YET, NOT_HERE = "differs by machine", "not yet measured", "not measurable here"
VERDICTS = ("confirmed", "contradicted", "inconclusive", DIFFERS, NOT_HERE, NOT_YET)
SETTLED_ON = {
    "any": "any machine",
    "cpu": "a CPU",
    "gpu": "a GPU",
    "arithmetic": "arithmetic",
    "document": "a document",
}

Found = dict[
    tuple[str, bool], tuple[dict[str, Any], Column]
]  # (machine, the user's own) -> a record's claim, and whose


def claims_section(chosen: Sequence[Claim], columns: Sequence[Column]) -> str:
    """Counts, a choice of verdict that works without a script, and a folded table for each section, as HTML."""
    verdicts = {claim.id: verdict(claim, _found(claim, columns)) for claim in chosen}
    titles = {int(column.record.lesson): column.record.title for column in columns}
    said = f"<p>{page.text(_counted(verdicts.values()))} {_by_machine(columns)}</p>"
    parts = [said, _counts(chosen, verdicts, titles), _choice(verdicts.values())]
    for section in dict.fromkeys(claim.section for claim in chosen):
        inside = [claim for claim in chosen if claim.section == section]
        summary = f'<b id="claims-{section}">{page.text(_title(section, titles))}</b>'
        parts.append(page.folded(summary, claims_table(inside, columns), unfolded=True))
    return f'<div class="claims">{"".join(parts)}</div>'


def claims_table(chosen: Iterable[Claim], columns: Sequence[Column]) -> str:
    """Each claim, and what the record of each machine with the largest preset says about it, as HTML."""
    machines = dict.fromkeys(_whose(column) for column in columns)
    headings = {_whose(column): column for column in columns}
    rows, kinds = [], []
    for claim in chosen:
        found = _found(claim, columns)
        overall = verdict(claim, found)
        kinds.append(f"claim {overall.replace(' ', '-')}")
        rows.append(
            [
                f'<span id="claim-{page.text(claim.id)}">{page.text(claim.id)}</span>',
                f"{page.text(claim.text)}<br><small>{page.text(claim.quantity)}; {page.text(claim.source)}</small>",
                f"{page.text(expected(claim))}<br><small>settled by {SETTLED_ON[claim.needs]}</small>",
                *(_cell(claim, found.get(key)) for key in machines or [None]),
            ]
        )
    measured = [
        f"{page.text(headings[key].machine)}<br><small>{'your runs' if key[1] else 'recorded'}</small>"
        for key in machines
    ]
    head = ["", "claim", "would be confirmed by", *(measured or ["measured"])]
    return page.table(head, rows, wide=True, kinds=kinds)


def verdict(claim: Claim, found: Found) -> str:
    """What all machines together say: of each machine the largest preset counts, the user's own before the recorded.

    A claim about a device that no record was made on is not yet measured, whatever other machines had to say.
    """
    machines: dict[str, tuple] = {}
    for (machine, here), (said, column) in found.items():
        weight = (PRESETS.index(column.record.preset) if column.record.preset in PRESETS else -1, here)
        machines[machine] = max(machines.get(machine, ((-2, False), "")), (weight, said["verdict"]))
    settled = {said for _, said in machines.values()} - {NOT_HERE}
    if settled:
        return settled.pop() if len(settled) == 1 else DIFFERS
    on_device = {"cpu": "cpu", "gpu": "cuda"}.get(claim.needs)
    tried = [column for _, column in found.values() if not on_device or column.record.device.startswith(on_device)]
    return NOT_HERE if claim.needs == "document" or tried else NOT_YET


def _found(claim: Claim, columns: Sequence[Column]) -> Found:
    """Of each machine, the user's own and the recorded, what its record with the largest preset says of the claim."""
    found: Found = {}
    for column in sorted(
        columns, key=lambda one: PRESETS.index(one.record.preset) if one.record.preset in PRESETS else -1
    ):
        found |= {(_whose(column)): (said, column) for said in column.record.claims if said.get("id") == claim.id}
    return found


def _whose(column: Column) -> tuple[str, bool]:
    return str(column.record.machine.get("slug", "")), column.here


def _cell(claim: Claim, found: tuple[dict[str, Any], Column] | None) -> str:
    if found is None:
        missing = "needs a document" if claim.needs == "document" else NOT_YET
        return page.badge("missing", missing)
    said, column = found
    value = "" if said["value"] is None else f"<br>{valued(said['value'], claim.unit, said.get('ci95'))}"
    preset = " <small>at smoke</small>" if column.record.preset == "smoke" else ""
    return f"{page.badge(said['verdict'], said['verdict'])}{preset}{value}"


def _counts(chosen: Sequence[Claim], verdicts: Mapping[str, str], titles: Mapping[int, str]) -> str:
    """How many claims of each section have each verdict."""
    there = [one for one in VERDICTS if one in verdicts.values()]
    rows = []
    for section in dict.fromkeys(claim.section for claim in chosen):
        counts = Counter(verdicts[claim.id] for claim in chosen if claim.section == section)
        link = f'<a href="#claims-{section}">{page.text(_title(section, titles))}</a>'
        rows.append([link, str(counts.total()), *(str(counts[one]) for one in there)])
    return page.table(["section of the guide", "claims", *there], rows)


def _title(section: int, titles: Mapping[int, str]) -> str:
    return ": ".join(filter(None, [f"Section {section}", titles.get(section)]))


def _counted(verdicts: Iterable[str]) -> str:
    counts = Counter(verdicts)
    words = [f"{counts[one]} {one}" for one in VERDICTS if counts[one]]
    return f"{counts.total()} claims: {', '.join(words)}."


def _by_machine(columns: Sequence[Column]) -> str:
    gpus = sum(column.record.device.startswith("cuda") for column in columns)
    return "" if gpus else "No record of a GPU is here, so claims about one are not yet measured."


def _choice(verdicts: Iterable[str]) -> str:
    """Radio buttons that the page's style sheet answers to."""
    there = [one for one in VERDICTS if one in set(verdicts)]
    buttons = "".join(
        f'<label><input type="radio" name="verdict" id="only-{one.replace(" ", "-")}">{one}</label>' for one in there
    )
    every = '<label><input type="radio" name="verdict" id="only-all" checked>all</label>'
    return f'<fieldset class="choice"><legend>Show claims that are</legend>{every}{buttons}</fieldset>'
