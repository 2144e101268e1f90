"""A class's points arrive in the gradebook of Canvas or Moodle, at the right student.

tests/course/test_grade.py has them written by the command.
"""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from commands import labkit
from handins import FULL, LESSON, solved, write

from course import grade, notebooks, totals
from course.grade import Grade, Gradebook

SECOND = "02_unstructured_pruning"
EXERCISES = {lesson: notebooks.exercises(notebooks.read(notebooks.find(lesson))) for lesson in (LESSON, SECOND)}
CANVAS, MOODLE = "smithbob (Canvas 340934)", "Ann Smith_1327627_assignsubmission_file_"


def book(*students: str) -> Gradebook:
    """Every student passed all of the first lesson, and of the second the first exercise."""
    grades = []
    for student in students:
        for lesson, tasks in EXERCISES.items():
            for number, task in enumerate(tasks):
                passed = lesson == LESSON or number == 0
                grades.append(Grade(student, lesson, task, "passed" if passed else "wrong", ""))
    return Gradebook(grades, [], "")


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def test_canvas_finds_a_student_by_its_id_or_by_the_login():
    first, second = (sum(task.points for task in tasks) for tasks in EXERCISES.values())
    got = EXERCISES[SECOND][0].points
    assert rows(totals.table(book(CANVAS, "ann_12"), "canvas")) == [
        ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", LESSON, SECOND, "Final Points"],
        ["    Points Possible", "", "", "", "", str(first), str(second), "(read only)"],
        ["smithbob", "340934", "", "", "", str(first), str(got), str(first + got)],
        ["ann_12", "", "", "ann_12", "", str(first), str(got), str(first + got)],
    ]


def test_moodle_finds_a_participant_or_a_username():
    first, got = sum(task.points for task in EXERCISES[LESSON]), EXERCISES[SECOND][0].points
    assert rows(totals.table(book(MOODLE, "bob"), "moodle")) == [
        ["Identifier", "Full name", "Username", LESSON, SECOND, "Grade", "Last modified (grade)"],
        ["Participant 1327627", "Ann Smith", "", str(first), str(got), str(first + got), ""],
        ["", "", "bob", str(first), str(got), str(first + got), ""],
    ]


def test_an_exercise_that_is_missing_counts_no_points_of_those_possible():
    (row, *others) = book("ann").grades
    text = totals.table(Gradebook([replace(row, result="missing"), *others], [], ""), "canvas")
    possible, ann = rows(text)[1:]
    assert int(possible[5]) - int(ann[5]) == row.exercise.points


def test_a_name_is_no_formula_of_a_spreadsheet():
    assert all(",'=cmd()" in totals.table(book("=cmd()"), system) for system in ("canvas", "moodle"))


@pytest.mark.parametrize(
    ("file", "student"),
    [
        ("smithbob_340934_208490284_homework.ipynb", "smithbob (Canvas 340934)"),
        ("smithbob_LATE_340934_208490284_homework-2.ipynb", "smithbob (Canvas 340934)"),
        ("van_dyke_1_2_3_4_5.ipynb", "van_dyke (Canvas 1)"),
    ],
)
def test_files_as_canvas_downloads_them_are_their_students(tmp_path: Path, file: str, student: str):
    write(tmp_path, "x", solved()).rename(tmp_path / file)
    (tmp_path / "x").rmdir()
    (tmp_path / "notes.ipynb").write_text("{}")
    entries, remarks = grade.collect(tmp_path, grade.read_lessons()[0])
    assert [(row.student, row.exercise.id, bool(answer)) for row, answer in entries] == [
        (student, exercise, True) for exercise in FULL
    ]
    assert remarks == ["notes.ipynb lies in no student's folder"]


def test_what_the_student_called_the_file_names_the_lesson(tmp_path: Path):
    copy = solved()
    copy.metadata.pop("labkit")
    copy.cells = copy.cells[:3]
    write(tmp_path, "x", copy).rename(tmp_path / f"smithbob_1_2_{LESSON}.ipynb")
    (tmp_path / "x").rmdir()
    entries, _ = grade.collect(tmp_path, grade.read_lessons()[0])
    assert {row.lesson for row, _ in entries} == {LESSON}


@pytest.mark.parametrize("place", [".", "not there/points.csv"])
def test_totals_that_cannot_be_written_are_refused_before_anything_runs(tmp_path: Path, place: str):
    write(tmp_path, "ann", solved())
    result = labkit("grade", tmp_path, "--totals", "canvas", tmp_path / place)
    assert result.exit_code == 2 and "give a file in a folder that is there" in result.stderr
    assert not (tmp_path / "grades.csv").exists()
