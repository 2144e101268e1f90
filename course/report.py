"""The report: a page of HTML from run records, and all recorded values as rows in files beside the page.

The report reads the meaning declared in the records (labkit.lesson.records) and guesses none: the role of a column
tells whether more is better, the clock whether a repetition differs. The page is laid out by report.html.j2: no
script, no network, printable.
"""

import functools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from course.report_sweeps import sweeps, swept
from course.results import (
    RANGES,
    ResultFolder,
    RunColumn,
    collect,
    frame,
    interval_of,
    recorded_runs,
    short,
    side_by_side,
)
from course.tradeoffs import figure, picture, trade_offs
from labkit import files, show
from labkit.lesson import challenge, claims
from labkit.lesson.calibration import calibration, off_by
from labkit.lesson.claims import Claim
from labkit.lesson.parameters import SMOKE
from labkit.lesson.records import Challenge, Prediction, SettledClaim

DIFFERS, NOT_YET = "differs by machine", "not yet measured"
NOT_SETTLED, NOT_HERE = "not settled here", "not measurable here"
VERDICTS = ("confirmed", "contradicted", "inconclusive", DIFFERS, NOT_SETTLED, NOT_HERE, NOT_YET)
SETTLED_ON = {"any": "any machine", "cpu": "a CPU", "gpu": "a GPU", "document": "a document"}


# claims -----------------------------------------------------------------------------------------------------------

Settled = dict[tuple[str, bool], tuple[SettledClaim, RunColumn]]  # by machine, and whether the run is the user's own


def settled(claim: Claim, columns: Sequence[RunColumn]) -> Settled:
    """Find the result of a claim on each machine, for the user's runs and the recorded runs apart.

    Of several records of a machine the record with the largest preset counts. A record from before the claim's quantity
    was exchanged does not count.
    """
    results: Settled = {}
    for column in sorted(columns, key=lambda column: column.rank):  # a larger preset replaces a smaller one
        record = column.record
        for result in record.claims:
            if result.id == claim.id and claims.is_current(claim, record.created, result.trained):
                results[column.whose] = result, column
    return results


def verdict(claim: Claim, columns: Sequence[RunColumn]) -> str:
    """Join the results of a claim on all machines into a verdict from VERDICTS.

    Of each machine the largest preset counts, and of the same preset the user's run before the recorded run. A claim
    about a device without any record is "not yet measured", whatever the records of different devices say.
    """
    results = settled(claim, columns)
    outcomes = _outcome_by_machine(results)
    outcomes.discard(NOT_HERE)
    decided = outcomes - {NOT_SETTLED} or outcomes
    if decided:
        return decided.pop() if len(decided) == 1 else DIFFERS

    device = {"cpu": "cpu", "gpu": "cuda"}.get(claim.needs, "")
    tried = any(column.record.device.startswith(device) for _, column in results.values())
    return NOT_HERE if claim.needs == "document" or tried else NOT_YET


def _outcome_by_machine(results: Settled) -> set[str]:
    def importance(entry: tuple[SettledClaim, RunColumn]) -> tuple[int, bool]:
        column = entry[1]
        return column.rank, column.here

    outcomes = {}
    for result, column in sorted(results.values(), key=importance):  # the most important comes last and stays
        machine, _ = column.whose
        outcomes[machine] = result.verdict
    return set(outcomes.values())


# challenges -------------------------------------------------------------------------------------------------------


def challenged(results: Sequence[ResultFolder]) -> list[dict[str, Any]]:
    """Draw a figure for each challenge of a lesson: the plane of the goals with a point per run with a plan.

    results  all results of the lesson, oldest first; a run at smoke, which is not judged, has no point
    """
    entries_by_name: dict[str, list[tuple[str, Challenge]]] = {}
    for result in results:
        if result.record and result.record.preset != "smoke":
            for task in result.record.challenges:
                entry = _run_name(result, results), task
                entries_by_name.setdefault(task.name, []).append(entry)
    return [_challenge_figure(entries) for entries in entries_by_name.values()]


def _challenge_figure(entries: Sequence[tuple[str, Challenge]]) -> dict[str, Any]:
    """Draw a challenge from entries (name of the run, challenge); the newest run, the last, states the goals."""
    _, newest = entries[-1]
    points = []
    for run_name, task in entries:
        if task.point and task.goals == newest.goals:
            points.append({"run": run_name, **task.point})
    reached = [point["run"] for point in points if not challenge.missed(newest.goals, point)]
    number_reached = f"{len(reached)} of {len(entries)} runs reached it."
    if len(entries) == 1:
        number_reached = "The run reached it." if reached else "The run has not reached it."
    caption = f"Challenge {newest.name}: {newest.goal} {number_reached}"
    names = ", ".join(reached) or "none yet"
    alt = f"The goal is {challenge.asked(newest.goals)}. Reached by: {names}."
    draw = functools.partial(challenge.plane, goals=newest.goals, points=points, label="run")
    rows = challenge.rows(newest.goals, points, "run") or [{"run": "no plan yet"}]
    return picture(draw, alt, caption, rows)


def _run_name(result: ResultFolder, results: Sequence[ResultFolder]) -> str:
    """Name a run by the first folder below the folder common to all: the student's folder in a class."""
    common = os.path.commonpath([other.folder.resolve() for other in results])
    parts = result.folder.resolve().relative_to(common).parts
    return parts[0] if parts else "your run"


# the page ---------------------------------------------------------------------------------------------------------


def write(folders: Sequence[Path], destination: Path) -> Path:
    """Write the page of all results below `folders`, with the files rows.csv and rows.parquet in the same folder.

    folders      folders of results, such as runs/
    destination  the page's path

    Returns the page's path. Each file is written whole or not at all; the rows are those of `results.frame`. Raises
    InputError if a folder is missing, no folder holds a result, or a file cannot be written. A damaged result is listed
    on the page.
    """
    results, problems = collect(folders)
    recorded, unreadable = recorded_runs()
    columns = side_by_side(results, recorded)
    records = [result.record for result in results if result.record]
    context = {
        "title": "Inference optimisation, measured",
        "made": datetime.now(UTC),
        "columns": columns,
        "problems": [*problems, *unreadable],
        "results": _shown_results(results),
        "sweeps": [swept(points) for points in sweeps(records)],
        "link": functools.partial(_link, folder=destination.parent),
        **_prediction_section(columns),
        **_claim_section(columns),
        **_lesson_sections(columns, results),
    }
    page = template().render(context).strip()

    rows = frame(records)
    saves = {
        destination: lambda path: path.write_text(page + "\n", encoding="utf-8"),
        destination.with_name("rows.csv"): lambda path: rows.to_csv(path, index=False),
        destination.with_name("rows.parquet"): lambda path: rows.to_parquet(path, index=False),
    }
    for path, save in saves.items():
        with files.refused(f"{path} cannot be written", "fix that first"), files.replacing(path) as partial:
            save(partial)
    return destination


def _shown_results(results: Iterable[ResultFolder]) -> list[ResultFolder]:
    """List the newest result of each lesson, and all failed results, by lesson."""
    newest = {result.lesson: result for result in results}  # results come oldest first
    failed = [result for result in results if result.run.get("status") == "failed"]
    older_failures = [result for result in failed if result is not newest[result.lesson]]
    return sorted([*newest.values(), *older_failures], key=lambda result: result.lesson)


def _link(path: Path, folder: Path) -> str:
    """Write a path as a relative link from a page in `folder`."""
    relative = Path(os.path.relpath(path, folder))
    return quote(relative.as_posix())


def _prediction_section(columns: Sequence[RunColumn]) -> dict[str, Any]:
    questions: list[tuple[RunColumn, Prediction]] = []
    for column in columns:
        if column.here and not column.tries_the_code:
            questions += [(column, prediction) for prediction in column.record.predictions]
    answered = [(column, prediction) for column, prediction in questions if prediction.predicted is not None]
    return {
        "guesses": answered,
        "unanswered": len(questions) - len(answered),
        "calibration": calibration([prediction for _, prediction in answered]),
    }


def _claim_section(columns: Sequence[RunColumn]) -> dict[str, Any]:
    entries = claims.load().values()
    ids_by_verdict: dict[str, list[str]] = {name: [] for name in VERDICTS}
    for claim in entries:
        ids_by_verdict[verdict(claim, columns)].append(claim.id)
    return {
        "claims": entries,
        "verdicts": {name: ids for name, ids in ids_by_verdict.items() if ids},
        "section_titles": {int(column.record.lesson): f": {column.record.title}" for column in columns},
    }


def _lesson_sections(columns: Sequence[RunColumn], results: Sequence[ResultFolder]) -> dict[str, Any]:
    """Prepare a section for each lesson with a run of the user; recorded runs alone are shown on the site.

    Results at smoke, which only tries the code, are not shown.
    """
    by_lesson = attrgetter("record.lesson")
    titles, lessons = [], []
    for number, group in groupby(sorted(columns, key=by_lesson), by_lesson):
        columns_of_lesson = list(group)
        if any(column.here for column in columns_of_lesson):
            titles.append(f"{number} {columns_of_lesson[0].record.title}")
            shown = [column for column in columns_of_lesson if not column.tries_the_code]
            figures = challenged([result for result in results if result.lesson == number])
            figures += [figure(trade_off) for trade_off in trade_offs(shown)]
            checked = [column for column in columns_of_lesson if column.here]
            lessons.append({"columns": shown, "checked": checked, "figures": figures, "note": _smoke_note(shown)})
    return {"titles": titles, "lessons": lessons}


def _smoke_note(shown: Sequence[RunColumn]) -> str:
    """Say that the user's runs of a lesson only tried the code; "" if one of the shown runs is the user's."""
    if any(column.here for column in shown):
        return ""
    instead = "The recorded results are shown instead." if shown else "No results are recorded for this lesson."
    return f"{SMOKE.capitalize()}. {instead}"


@functools.cache
def template() -> jinja2.Template:
    """Load the page's template. Its `module` holds the tables shared with the site, functions of lists of RunColumn:

    machines_table(columns)        the machines of the columns
    measurements_table(columns)    a row per name with a value from each record, then the recorded tables, folded
    claims_table(claims, columns)  each claim, with the result from each machine's record with the largest preset
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    templates.filters["anchor"] = _anchor
    templates.globals |= {
        "NOT_YET": NOT_YET,
        "RANGES": RANGES,
        "SETTLED_ON": SETTLED_ON,
        "SMOKE": SMOKE,
        "badge_simulated": Markup(show.BADGE),
        "expected": claims.expected,
        "interval": show.interval,
        "interval_of": interval_of,
        "isfinite": math.isfinite,
        "off_by": off_by,
        "quantity": show.quantity,
        "recipe": claims.recipe,
        "rows_table": _rows_table,
        "settled": settled,
        "short": short,
        "verdict": verdict,
    }
    return templates.get_template("report.html.j2")


def _anchor(title: str) -> str:
    """Turn a title into the name of a place on the page: "Runs at smoke" -> "runs-at-smoke"."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> Markup:
    return Markup(show.html_table(rows))
