"""A class's points for the gradebook of Canvas or Moodle: a row a student, a column a lesson, and the total.

Canvas (Instructure, gradebook import) finds a student by Canvas' own ID, else by the login, and wants the points
possible in the second row; columns called "Final Points" it leaves alone, so that no total is counted twice. Moodle's
import of grades finds a student by a column that the instructor points out, and stops at a row that is no student's.
Its grading worksheet of an assignment finds one by "Identifier" and takes the column "Grade".
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
    """A student, with the points for each lesson."""

    student: str
    points: Sequence[int]


def require_writable(path: Path) -> None:
    """InputError where a file of totals could not be written to `path`."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"The totals cannot be written to {path}; give a file in a folder that is there.")


def write(book: Gradebook, system: Literal["canvas", "moodle"], path: Path) -> None:
    """Write the totals for a system, whole or not at all. InputError where that fails."""
    with files.refused(f"The totals cannot be written to {path}"):
        files.write_text(path, table(book, system))


def table(book: Gradebook, system: Literal["canvas", "moodle"]) -> str:
    """The totals as CSV."""
    possible: dict[str, dict[str, int]] = {}  # lesson -> exercise -> points
    for row in book.grades:
        possible.setdefault(row.lesson, {})[row.exercise.id] = row.exercise.points
    most = [sum(points.values()) for points in possible.values()]
    rows = []
    for student, grades in groupby(book.grades, lambda row: row.student):
        by_lesson = dict.fromkeys(possible, 0)
        for grade in grades:
            by_lesson[grade.lesson] += grade.points
        rows.append(_Row(student, list(by_lesson.values())))
    lines = _canvas(list(possible), most, rows) if system == "canvas" else _moodle(list(possible), rows)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([spreadsheet_cell(cell) for cell in line] for line in lines)
    return text.getvalue()


def _canvas(lessons: Sequence[str], most: Sequence[int], rows: Sequence[_Row]) -> list[list]:
    """A student from a file that Canvas has named has an ID; any other folder's name is taken for the login."""
    lines = [
        ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", *lessons, "Final Points"],
        ["    Points Possible", "", "", "", "", *most, "(read only)"],
    ]
    for row in rows:
        match = _CANVAS_STUDENT.fullmatch(row.student)
        who = [match["name"], match["id"], "", ""] if match else [row.student, "", "", row.student]
        lines.append([*who, "", *row.points, sum(row.points)])
    return lines


def _moodle(lessons: Sequence[str], rows: Sequence[_Row]) -> list[list]:
    """A student from a folder that Moodle has named is a participant; any other folder's name is the username."""
    lines = [["Identifier", "Full name", "Username", *lessons, "Grade", "Last modified (grade)"]]
    for row in rows:
        match = _MOODLE_FOLDER.fullmatch(row.student)
        who = [f"Participant {match['number']}", match["name"], ""] if match else ["", "", row.student]
        lines.append([*who, *row.points, sum(row.points), ""])
    return lines
