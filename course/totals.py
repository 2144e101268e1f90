"""The points of a class for the gradebook of Canvas or Moodle: a row per student, a column per lesson, and the total.

Canvas (Instructure, gradebook import) finds a student by the ID of Canvas, else by the login. The second row holds the
points possible. Canvas ignores columns called "Final Points", so no total is counted twice. Moodle's import of grades
finds a student by a column chosen by the instructor, and stops at a row without a student. The grading worksheet of an
assignment finds a student by "Identifier" and takes the column "Grade".
"""

import csv
import io
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

from course.grade import Gradebook, spreadsheet_cell
from labkit import files
from labkit.errors import InputError

_CANVAS_STUDENT = re.compile(r"(?P<name>.+) \(Canvas (?P<id>\d+)\)")  # as course.grade calls who handed in there
_MOODLE_FOLDER = re.compile(r"(?P<name>.+)_(?P<number>\d+)_assignsubmission_file_?")  # of "Download all submissions"


class _Row(NamedTuple):
    """The points of a student for each lesson."""

    student: str
    points: Sequence[int]


def require_writable(path: Path) -> None:
    """Raise InputError if a file of totals could not be written to `path`."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"The totals cannot be written to {path}; give a file in a folder that is there.")


def write(book: Gradebook, system: Literal["canvas", "moodle"], path: Path) -> None:
    """Write the totals for a gradebook to `path`, whole or not at all; InputError if the file cannot be written."""
    with files.refused(f"The totals cannot be written to {path}"):
        files.write_text(path, table(book, system))


def table(book: Gradebook, system: Literal["canvas", "moodle"]) -> str:
    """Write the totals as CSV, in the columns of the gradebook's system."""
    possible = _possible_points(book)
    rows = []
    for student, grades in groupby(book.grades, lambda grade: grade.student):
        points = dict.fromkeys(possible, 0)
        for grade in grades:
            points[grade.lesson] += grade.points
        rows.append(_Row(student, list(points.values())))

    lessons = list(possible)
    if system == "canvas":
        lines = _canvas(lessons, list(possible.values()), rows)
    else:
        lines = _moodle(lessons, rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for line in lines:
        writer.writerow([spreadsheet_cell(cell) for cell in line])
    return text.getvalue()


def _possible_points(book: Gradebook) -> dict[str, int]:
    """Sum the points of all exercises of each lesson."""
    exercises = {(grade.lesson, grade.exercise.id): grade.exercise.points for grade in book.grades}
    possible: dict[str, int] = {}
    for (lesson, _), points in exercises.items():
        possible[lesson] = possible.get(lesson, 0) + points
    return possible


def _canvas(lessons: Sequence[str], most: Sequence[int], rows: Sequence[_Row]) -> list[list]:
    """Make the lines for Canvas: a student of a file named by Canvas has an ID; else the folder's name is the login."""
    lines = [
        ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *lessons, "Final Points"],
        ["    Points Possible", "", "", "", "", *most, "(read only)"],
    ]
    for row in rows:
        match = _CANVAS_STUDENT.fullmatch(row.student)
        student = [match["name"], match["id"], "", ""] if match else [row.student, "", "", row.student]
        lines.append([*student, "", *row.points, sum(row.points)])
    return lines


def _moodle(lessons: Sequence[str], rows: Sequence[_Row]) -> list[list]:
    """Make the lines for Moodle: a student of a folder named by Moodle has a number; else the name is the username."""
    lines = [["Identifier", "Full name", "Username", *lessons, "Grade", "Last modified (grade)"]]
    for row in rows:
        match = _MOODLE_FOLDER.fullmatch(row.student)
        student = [f"Participant {match['number']}", match["name"], ""] if match else ["", "", row.student]
        lines.append([*student, *row.points, sum(row.points), ""])
    return lines
