"""A graded class as files: grades.csv, a line for each student and exercise, and grades.html, a page to read.

Both are made of one Book; nothing is judged or rounded here.
"""

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from course import page
from course.grading import Book, Row
from labkit.errors import InputError
from labkit.files import write_text

COLUMNS = ("student", "lesson", "exercise", "title", "points", "of", "result", "reason")


def write(book: Book, folder: Path) -> tuple[Path, Path]:
    """Write grades.csv and grades.html into `folder`, each whole or not at all; InputError where that cannot be."""
    files = folder / "grades.csv", folder / "grades.html"
    try:
        for path, text in zip(files, (table(book), html(book)), strict=True):
            write_text(path, text)
    except OSError as error:
        raise InputError(
            f"The grades cannot be written to {folder} ({error.strerror}); mend that, then again."
        ) from None
    return files


def table(book: Book) -> str:
    """The rows as CSV. A text that a spreadsheet would take for a formula gets an apostrophe in front."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in book.rows:
        one = row.exercise
        cells = (row.student, row.lesson, one.id, one.title, row.points, one.points, row.result, row.reason)
        writer.writerow([f"'{cell}" if str(cell).startswith(("=", "+", "-", "@", "\t")) else cell for cell in cells])
    return text.getvalue()


def html(book: Book) -> str:
    """The page: points of all students at a glance, then the reason for each exercise, student by student."""
    students = {name: list(rows) for name, rows in groupby(book.rows, lambda row: row.student)}
    intro = (
        f"Graded {datetime.now(UTC):%d %B %Y, %H:%M} UTC. An exercise counts as many points as its difficulty, all or "
        f"none. Each answer ran by itself: {page.text(', '.join(book.measures) or 'none ran')}."
    )
    remarks = "".join(f"<li>{page.text(remark)}</li>" for remark in book.remarks)
    body = [
        page.section("Points", _points(students)),
        page.section("Remarks", f"<ul>{remarks}</ul>") if remarks else "",
        page.section("Exercises", _exercises(book.rows)),
        page.section("Reasons", "".join(_reasons(name, rows) for name, rows in students.items())),
    ]
    return page.whole("Grades", intro, "\n".join(body))


def _points(students: dict[str, list[Row]]) -> str:
    first = next(iter(students.values()))
    headings = ["student", "total", *(f"{row.exercise.id}<br><small>of {row.exercise.points}</small>" for row in first)]
    rows = [
        [
            f'<a href="#{quote(name)}">{page.text(name)}</a>',
            f"<b>{sum(row.points for row in own)}</b> of {sum(row.exercise.points for row in own)}",
            *(str(row.points) if row.points else f"0 {page.badge(row.result, row.result)}" for row in own),
        ]
        for name, own in students.items()
    ]
    return page.table(headings, rows)


def _exercises(rows: Sequence[Row]) -> str:
    """How many passed each exercise: what to speak about in class."""
    found = []
    for exercise in {row.exercise.id: row.exercise for row in rows}.values():
        own = [row.result for row in rows if row.exercise.id == exercise.id]
        counts = ", ".join(f"{own.count(kind)} {kind}" for kind in sorted(set(own)) if kind != "passed")
        passed = f"{own.count('passed')} of {len(own)}"
        found.append([page.text(exercise.id), page.text(exercise.title), passed, page.text(counts or "–")])
    return page.table(["exercise", "title", "passed", "others"], found)


def _reasons(student: str, rows: Sequence[Row]) -> str:
    cells = [
        [page.text(row.exercise.id), page.badge(row.result, row.result), page.text(row.reason) or "–"] for row in rows
    ]
    total = f"{sum(row.points for row in rows)} of {sum(row.exercise.points for row in rows)}"
    shown = page.table(["exercise", "result", "reason"], cells)
    return f'<details open id="{page.text(student)}"><summary>{page.text(student)}, {total}</summary>{shown}</details>'
