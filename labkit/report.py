"""One HTML page out of run records: this machine beside the recorded ones, the guide's claims, how good guesses were.

The page carries all that it shows, needs no script and no network, and prints (page.py is its frame). It only reads
records: what they mean was decided when they were made.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from labkit import claims, plots
from labkit.errors import InputError
from labkit.lessons import write as write_text
from labkit.page import badge as _badge
from labkit.page import section as _section
from labkit.page import table as _table
from labkit.page import text as _text
from labkit.page import whole
from labkit.record import RunRecord
from labkit.results import Result, collect, recorded_runs
from labkit.summary import calibration, off_by


@dataclass(frozen=True)
class Column:
    """A record as one column of a table; `here` tells the user's runs from the recorded ones."""

    record: RunRecord
    here: bool

    @property
    def heading(self) -> str:
        whose = "your run" if self.here else "recorded"
        label = self.record.machine.get("label", self.record.device).split(", ")
        return f"{_text(', '.join(label[:2]))}<br><small>{whose}, {_text(self.record.preset)}</small>"


def write(folders: Sequence[Path], destination: Path) -> Path:
    """Write the page of all results below `folders`, atomically, and return its path.

    InputError where a folder is missing or none of them holds a result; a damaged result is listed on the page instead.
    """
    results, problems = collect(folders)
    recorded, unreadable = recorded_runs()
    try:
        write_text(destination, page(results, recorded, [*problems, *unreadable], destination.parent))
    except OSError as error:
        raise InputError(
            f"The report cannot be written to {destination} ({error.strerror}); mend that first."
        ) from None
    return destination


def page(results: Sequence[Result], recorded: Sequence[RunRecord], problems: Sequence[str], base: Path) -> str:
    """The whole page; links are relative to the folder `base`."""
    newest = {result.lesson: result for result in results}
    columns = side_by_side(results, recorded)
    lessons = sorted({column.record.lesson for column in columns})
    body = [
        _problems(problems),
        _section("Machines", machines_table(columns)),
        _section("Runs", _runs([newest[lesson] for lesson in sorted(newest)], base)),
        _section("What the guide claims", claims_table(claims.load().values(), columns)),
        _section("Predictions against measurements", _predictions(columns)),
        *(_lesson([column for column in columns if column.record.lesson == lesson]) for lesson in lessons),
    ]
    intro = (
        f"Made {datetime.now(UTC):%d %B %Y, %H:%M} UTC from run records. A range in brackets is a 95 % interval. "
        f"{plots.BADGE} marks what a model computed and no clock saw."
    )
    return whole("Inference optimisation, measured", intro, "\n".join(body))


# reading ------------------------------------------------------------------------------------------


def side_by_side(results: Iterable[Result], recorded: Iterable[RunRecord]) -> list[Column]:
    """The newest of the user's records of each lesson on each machine at each preset, then the recorded ones."""
    found = {}
    for result in results:  # oldest first
        if record := result.record:
            found[record.lesson, record.machine.get("slug"), record.preset] = record
    return [*(Column(one, True) for one in found.values()), *(Column(one, False) for one in recorded)]


# sections -----------------------------------------------------------------------------------------


def _problems(problems: Sequence[str]) -> str:
    items = "".join(f"<li>{_text(problem)}</li>" for problem in problems)
    return _section("Could not be read", f"<ul>{items}</ul>") if items else ""


def machines_table(columns: Sequence[Column]) -> str:
    """The machines that the columns were measured on, as HTML."""
    seen = {(column.record.machine.get("slug"), column.here): column for column in columns}
    rows = []
    for column in seen.values():
        machine = column.record.machine
        gpu = machine.get("gpu") or {}
        rows.append(
            [
                "your runs" if column.here else "recorded",
                f"<b>{_text(machine.get('label', ''))}</b>",
                _text(gpu.get("name") or "none"),
                _text(machine.get("threads", "")),
                _quantity(machine.get("memory"), "B"),
                _text(machine.get("os", "")),
                _text(f"Python {machine.get('python', '?')}, torch {machine.get('torch', '?')}"),
            ]
        )
    return _table(["", "machine", "GPU", "threads", "memory", "system", "software"], rows)


def _runs(results: Sequence[Result], base: Path) -> str:
    rows = []
    for result in results:
        record, run = result.record, result.run
        failed = run.get("status") == "failed"
        error = run.get("error") or {}
        where = f" (cell {error['cell']}, {error['section']})" if error.get("cell") else ""
        reason = f"<br><small>{_text(error.get('name'))}: {_text(error.get('message'))}{_text(where)}</small>"
        passed = sum(check["passed"] for check in record.checks) if record else 0
        rows.append(
            [
                _text(result.lesson),
                _text(record.title if record else run["lesson"]),
                _text(record.preset if record else run.get("parameters", {}).get("PRESET", "")),
                _badge("failed", "failed") + reason if failed else _badge("finished", "finished"),
                _budget(record.seconds if record else run.get("seconds"), record, "seconds", "s"),
                _budget(record.peak_memory if record else run.get("peak_memory"), record, "memory", "B"),
                f"{passed} of {len(record.checks)}" if record and record.checks else "–",
                _text(result.created[:16].replace("T", " ")),
                _link(result.notebook, base),
            ]
        )
    return _table(["lesson", "title", "preset", "state", "time", "memory", "checks", "when (UTC)", "notebook"], rows)


def _budget(used: float | None, record: RunRecord | None, name: str, unit: str) -> str:
    """What was used, and what of the preset's budget that is."""
    limit = record.budget.get(name) if record else None
    if not limit or used is None:
        return _quantity(used, unit)
    text = f"{_quantity(used, unit)} of {_quantity(limit, unit)}"
    return text if used <= limit else f"{text} {_badge('failed', 'over budget')}"


def claims_table(chosen: Iterable[claims.Claim], columns: Sequence[Column]) -> str:
    """Each claim, and what the newest record of each machine says about it, as HTML."""
    machines: dict[tuple[Any, bool], Column] = {}
    verdicts: dict[tuple[str, Any, bool], dict] = {}
    for column in columns:
        key = (column.record.machine.get("slug"), column.here)
        machines[key] = column
        verdicts |= {(claim["id"], *key): claim for claim in column.record.claims}
    rows = []
    for claim in chosen:
        found = [verdicts.get((claim.id, *key)) for key in machines]
        missing = "needs a document" if claim.needs == "document" else "not yet measured"
        rows.append(
            [
                f'<span id="claim-{_text(claim.id)}">{_text(claim.id)}</span>',
                f"{_text(claim.text)}<br><small>{_text(claim.quantity)}; {_text(claim.source)}</small>",
                _text(claims.expected(claim)),
                *(_verdict(one, claim.unit) if one else _badge("missing", missing) for one in found or [None]),
            ]
        )
    headings = [column.heading for column in machines.values()] or ["measured"]
    return _table(["", "claim", "would be confirmed by", *headings], rows, wide=True)


def _verdict(claim: dict[str, Any], unit: str) -> str:
    value = "" if claim["value"] is None else f"<br>{_valued(claim['value'], unit, claim.get('ci95'))}"
    return f"{_badge(claim['verdict'], claim['verdict'])}{value}"


def _predictions(columns: Sequence[Column]) -> str:
    rows = [
        [
            _text(column.record.lesson),
            f"{_text(one['question'] or one['name'])}",
            _quantity(one["predicted"], one["unit"]),
            _quantity(one["measured"], one["unit"]),
            _text(off_by(one["predicted"], one["measured"])),
            column.heading,
        ]
        for column in columns
        if column.here
        for one in column.record.predictions
    ]
    if not rows:
        return "<p>No prediction was made yet.</p>"
    said = calibration([one for column in columns if column.here for one in column.record.predictions])
    overall = f"<p>{_text(said)}</p>" if said else ""
    return overall + _table(["lesson", "question", "predicted", "measured", "off by", "machine"], rows)


def _lesson(columns: Sequence[Column]) -> str:
    record = columns[0].record
    checks = [
        [_text(check["id"]), _badge("finished", "passed") if check["passed"] else _failures(check), column.heading]
        for column in columns
        if column.here
        for check in column.record.checks
    ]
    parts = [measurements_table(columns)]
    if checks:
        parts += ["<h3>Exercises</h3>", _table(["exercise", "result", "machine"], checks)]
    return _section(f"{record.lesson} {record.title}", "".join(parts))


def _failures(check: dict[str, Any]) -> str:
    listed = "".join(f"<li>{_text(failure)}</li>" for failure in check.get("failures") or [])
    return f"{_badge('failed', 'not yet')}<ul>{listed}</ul>"


def measurements_table(columns: Sequence[Column]) -> str:
    """One row a name with a value from each record, then the recorded tables, folded, as HTML."""
    names = dict.fromkeys(entry["name"] for column in columns for entry in column.record.measurements)
    rows, folded = [], []
    for name in names:
        entries = [(column, column.record.named(name)) for column in columns]
        if any(entry and entry["kind"] == "table" for _, entry in entries):
            folded += [_folded(column, entry) for column, entry in entries if entry]
        else:
            simulated = any(entry and entry.get("simulated") for _, entry in entries)
            label = f"{_text(name)} {plots.BADGE}" if simulated else _text(name)
            rows.append([label, *(_entry(entry) if entry else "–" for _, entry in entries)])
    table = _table(["measured", *(column.heading for column in columns)], rows) if rows else ""
    return table + "".join(folded)


def _entry(entry: dict[str, Any]) -> str:
    verdict = f" {_badge(entry['verdict'], entry['verdict'])}" if entry.get("verdict") else ""
    return _valued(entry.get("value"), entry.get("unit", ""), entry.get("ci95")) + verdict


def _folded(column: Column, entry: dict[str, Any]) -> str:
    simulated = f" {plots.BADGE}" if entry.get("simulated") else ""
    summary = f"{_text(entry['name'])}{simulated} <small>{column.heading.replace('<br>', ', ')}</small>"
    table = plots.html_table(entry["rows"]) if entry.get("rows") else ""
    return f'<details><summary>{summary}</summary><div class="scroll">{table}</div></details>'


# pieces -------------------------------------------------------------------------------------------


def _quantity(value: Any, unit: str) -> str:
    return _text(plots.quantity(value, unit))


def _valued(value: Any, unit: str, ci95: Any) -> str:
    if not ci95:
        return _quantity(value, unit)
    bounded = all(isinstance(end, int | float) for end in ci95)  # a record writes infinity as a text
    words = plots.interval(ci95, unit) if bounded else "too few samples for an interval"
    return f"{_quantity(value, unit)} <small>({_text(words)})</small>"


def _link(notebook: Path | None, base: Path) -> str:
    if notebook is None:
        return "–"
    return f'<a href="{quote(Path(os.path.relpath(notebook, base)).as_posix())}">{_text(notebook.name)}</a>'
