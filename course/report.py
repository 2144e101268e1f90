"""One HTML page out of run records, with their rows beside it: machines, claims, guesses, trade-offs, sweeps, results.

The page carries all that it shows, needs no script and no network, and prints (page.py is its frame). It only reads
records: what they mean was decided when they were made.
"""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from course import pareto, rows
from course.claims_table import claims_section
from course.columns import Column, quantity, side_by_side, valued
from course.page import badge as _badge
from course.page import contents, folded, scroll, whole
from course.page import section as _section
from course.page import table as _table
from course.page import text as _text
from course.pareto_figure import figure
from course.points import Point, points, sweeps
from course.results import Result, collect, recorded_runs
from course.swept import swept
from labkit import claims, show
from labkit.errors import InputError
from labkit.files import write_text
from labkit.records import RunRecord, calibration, off_by


def write(folders: Sequence[Path], destination: Path) -> Path:
    """Write the page of all results below `folders`, and their rows beside it, atomically; returns the page's path.

    The rows (see `labkit.rows.frame`) are in rows.csv and rows.parquet. InputError where a folder is missing or none of
    them holds a result; a damaged result is listed on the page instead.
    """
    results, problems = collect(folders)
    recorded, unreadable = recorded_runs()
    made = page(results, recorded, [*problems, *unreadable], destination.parent)
    table = rows.frame(result.record for result in results if result.record)
    try:
        write_text(destination, made)
    except OSError as error:
        raise InputError(
            f"The report cannot be written to {destination} ({error.strerror}); mend that first."
        ) from None
    rows.write(table, destination.parent)
    return destination


def page(results: Sequence[Result], recorded: Sequence[RunRecord], problems: Sequence[str], base: Path) -> str:
    """The whole page; links are relative to the folder `base`."""
    columns = side_by_side(results, recorded)
    lessons = sorted({column.record.lesson for column in columns})
    sections = [
        *_problems(problems),
        ("Machines", machines_table(columns)),
        ("Runs", _runs(_shown(results), base)),
        ("What the guide claims", claims_section(list(claims.load().values()), columns)),
        ("Predictions against measurements", _predictions(columns)),
        *map(_sweep, sweeps(points(result.record for result in results if result.record))),
        *(_lesson([column for column in columns if column.record.lesson == lesson]) for lesson in lessons),
    ]
    intro = (
        f"Made {datetime.now(UTC):%d %B %Y, %H:%M} UTC from run records. A range in brackets is a 95 % interval. "
        f"{show.BADGE} marks what a model computed and no clock saw. All values of these runs as rows: "
        '<a href="rows.csv">rows.csv</a>, <a href="rows.parquet">rows.parquet</a>.'
    )
    body = [contents(title for title, _ in sections), *(_section(*one) for one in sections)]
    return whole("Inference optimisation, measured", intro, "\n".join(body))


# sections -----------------------------------------------------------------------------------------


def _problems(problems: Sequence[str]) -> list[tuple[str, str]]:
    items = "".join(f"<li>{_text(problem)}</li>" for problem in problems)
    return [("Could not be read", f"<ul>{items}</ul>")] if items else []


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
                quantity(machine.get("memory"), "B"),
                _text(machine.get("os", "")),
                _text(f"Python {machine.get('python', '?')}, torch {machine.get('torch', '?')}"),
            ]
        )
    return _table(["", "machine", "GPU", "threads", "memory", "system", "software"], rows)


def _shown(results: Sequence[Result]) -> list[Result]:
    """Of each lesson the newest result, and every one that failed."""
    newest = {result.lesson: result for result in results}
    failed = [one for one in results if one.run.get("status") == "failed" and newest[one.lesson] is not one]
    return sorted([*newest.values(), *failed], key=lambda one: one.lesson)


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
        return quantity(used, unit)
    text = f"{quantity(used, unit)} of {quantity(limit, unit)}"
    return text if used <= limit else f"{text} {_badge('failed', 'over budget')}"


def _predictions(columns: Sequence[Column]) -> str:
    rows = [
        [
            _text(column.record.lesson),
            f"{_text(one['question'] or one['name'])}",
            quantity(one["predicted"], one["unit"]),
            quantity(one["measured"], one["unit"]),
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


def _sweep(chosen: Sequence[Point]) -> tuple[str, str]:
    record = chosen[0].records[0]
    return f"Sweep of {record.lesson} {record.title}, {record.preset}", swept(chosen)


def _lesson(columns: Sequence[Column]) -> tuple[str, str]:
    record = columns[0].record
    found = pareto.trade_offs([Point((column.record,), column.here) for column in columns])
    checks = [
        [_text(check["id"]), _badge("finished", "passed") if check["passed"] else _failures(check), column.heading]
        for column in columns
        if column.here
        for check in column.record.checks
    ]
    parts = [f'<div class="figures">{"".join(map(figure, found))}</div>'] if found else []
    parts.append(measurements_table(columns))
    if checks:
        parts += ["<h3>Exercises</h3>", _table(["exercise", "result", "machine"], checks)]
    return f"{record.lesson} {record.title}", "".join(parts)


def _failures(check: dict[str, Any]) -> str:
    listed = "".join(f"<li>{_text(failure)}</li>" for failure in check.get("failures") or [])
    return f"{_badge('failed', 'not yet')}<ul>{listed}</ul>"


def measurements_table(columns: Sequence[Column]) -> str:
    """One row a name with a value from each record, then the recorded tables, folded, as HTML."""
    names = dict.fromkeys(entry["name"] for column in columns for entry in column.record.measurements)
    rows, tables = [], []
    for name in names:
        entries = [(column, column.record.named(name)) for column in columns]
        if any(entry and entry["kind"] == "table" for _, entry in entries):
            tables += [_folded(column, entry) for column, entry in entries if entry]
        else:
            simulated = any(entry and entry.get("simulated") for _, entry in entries)
            label = f"{_text(name)} {show.BADGE}" if simulated else _text(name)
            rows.append([label, *(_entry(entry) if entry else "–" for _, entry in entries)])
    table = _table(["measured", *(column.heading for column in columns)], rows) if rows else ""
    return table + "".join(tables)


def _entry(entry: dict[str, Any]) -> str:
    verdict = f" {_badge(entry['verdict'], entry['verdict'])}" if entry.get("verdict") else ""
    return valued(entry.get("value"), entry.get("unit", ""), entry.get("ci95")) + verdict


def _folded(column: Column, entry: dict[str, Any]) -> str:
    simulated = f" {show.BADGE}" if entry.get("simulated") else ""
    summary = f"{_text(entry['name'])}{simulated} <small>{column.heading.replace('<br>', ', ')}</small>"
    table = show.html_table(entry["rows"]) if entry.get("rows") else ""
    return folded(summary, scroll(table))


# pieces -------------------------------------------------------------------------------------------


def _link(notebook: Path | None, base: Path) -> str:
    if notebook is None:
        return "–"
    return f'<a href="{quote(Path(os.path.relpath(notebook, base)).as_posix())}">{_text(notebook.name)}</a>'
