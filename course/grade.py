"""A class's notebooks graded: DIR/<student>/<lesson>.ipynb in, grades.csv and grades.html out.

A hand-in is read as data, however damaged, and only its sources count. Each answer runs with its check in a process of
its own (course.answers), which can harm nothing (course.sandbox). That a mark could be forged there is not fought, nor
is copying: the worked answers are public. Text answers are left to people.
"""

import ast
import csv
import io
import json
import os
import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from course import answers, notebooks, sandbox
from course.answers import Answer
from course.notebooks import Exercise
from labkit import files
from labkit.errors import InputError, LabError

SECONDS, MOST_SECONDS = 30.0, 86_400.0  # for one answer; the worked ones need far less than the first
LARGEST = 20 << 20  # bytes of a notebook, pictures included
MOST_SOURCE = 1 << 20  # characters of its cells
NOT_GRADED = "not graded"
RESULTS = (*answers.RESULTS, "missing", NOT_GRADED)
COLUMNS = ("student", "lesson", "exercise", "title", "points", "of", "result", "reason")
FILES = ("grades.csv", "grades.html")
_CANVAS = re.compile(r"(?P<student>.+?)(?:_LATE)?_(?P<id>\d+)_\d+_(?P<name>.+)")  # a file as Canvas downloads it
_Cells = list[tuple[str, str]]  # id and source of each code cell


@dataclass(frozen=True)
class Grade:
    """One exercise of one student. result: one of RESULTS."""

    student: str
    lesson: str
    exercise: Exercise
    result: str
    reason: str

    @property
    def points(self) -> int:
        return self.exercise.points if self.result == "passed" else 0


@dataclass(frozen=True)
class Gradebook:
    """Grades by student and exercise, remarks that belong to no exercise, and what shut the answers in."""

    grades: list[Grade]
    remarks: list[str]
    measures: str

    @property
    def incomplete(self) -> str:
        """A sentence on the answers that could not be graded; "" where all were."""
        number = sum(row.result == NOT_GRADED for row in self.grades)
        if not number:
            return ""
        return (
            f"{number} of {len(self.grades)} exercises were not graded, because a process of the grader was ended from "
            f"outside: they count no points and are marked {NOT_GRADED!r}. Mostly the machine had too little memory: "
            "close other programs, or put half of the students into another folder, and grade again."
        )


@dataclass(frozen=True)
class Lesson:
    name: str
    cells: _Cells
    exercises: Sequence[Exercise]


def grade(
    folder: Path,
    *,
    seconds: float = SECONDS,
    on_grade: Callable[[Grade, int], None] = lambda grade, total: None,
    newest_abi: int = sandbox.NEWEST_ABI,
) -> Gradebook:
    """Grade every student's folder in `folder`, each for every lesson that anybody has handed in.

    seconds     the limit for one answer, 1 to 86,400
    on_grade    called with the grade of each answer as it is done, and their number in all
    newest_abi  the newest version of Landlock to use, 0 for none (course.sandbox)
    InputError, before anything runs, where there is nothing to grade or the grades could not be written.
    """
    if not 1 <= seconds <= MOST_SECONDS:
        raise InputError(f"The limit for one answer is {seconds:g} seconds; give 1 to {MOST_SECONDS:,.0f}.")
    lessons, remarks = read_lessons()
    entries, more = collect(folder, lessons)
    remarks += more
    grades = [grade for grade, _ in entries]
    handed_in = {place: answer for place, (_, answer) in enumerate(entries) if answer}
    measures = set()
    imports = _imports(lessons, {grade.lesson for grade in grades})
    with answers.runner(imports, seconds=seconds, newest_abi=newest_abi) as runner:
        remarks += runner.remarks
        for place, verdict in runner.run(handed_in):
            if verdict is None:
                continue
            reason = _shown(verdict.reason) + handed_in[place].note
            grades[place] = replace(grades[place], result=verdict.result, reason=reason)
            measures.add(verdict.measures)
            on_grade(grades[place], len(handed_in))
    return Gradebook(grades, list(map(_shown, remarks)), "; ".join(filter(None, measures)))


# what was handed in -------------------------------------------------------------------------------


def read_lessons() -> tuple[list[Lesson], list[str]]:
    """The course's lessons; a damaged one is a remark."""
    lessons, remarks = [], []
    for path in notebooks.all_lessons():
        try:
            notebook = notebooks.read(path)
            cells = [(cell.get("id", ""), cell.source) for cell in notebook.cells if cell.cell_type == "code"]
            lessons.append(Lesson(path.stem, cells, notebooks.exercises(notebook)))
        except LabError as error:
            remarks.append(f"Not graded: {error}")
    return lessons, remarks


def collect(folder: Path, lessons: Sequence[Lesson]) -> tuple[list[tuple[Grade, Answer | None]], list[str]]:
    """The grades to be given, each with the answer that has to run for it; and remarks on what was handed in."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; give one that holds a folder for each student.")
    if unwritable := [name for name in FILES if (folder / name).is_dir() or not os.access(folder, os.W_OK)]:
        raise InputError(f"{folder / unwritable[0]} cannot be written; fix that first, so that no grade is lost.")
    students, remarks = _students(folder)
    if not students:
        raise InputError(
            f"{folder} holds no folders; put each student's notebooks into one: {folder}/ann/01_....ipynb."
        )
    handed_in = {}
    for student, paths in students.items():
        handed_in[student], more = _handed_in(paths, lessons)
        remarks += [f"{student}: {remark}" for remark in more]
    seen = [lesson for lesson in lessons if any(lesson.name in by_lesson for by_lesson in handed_in.values())]
    if not seen:
        raise InputError(f"No notebook in {folder} is of a lesson; they are looked for as {folder}/<student>/*.ipynb.")
    entries = [
        entry
        for student, by_lesson in handed_in.items()
        for lesson in seen
        for entry in _entries(_shown(student), lesson, by_lesson.get(lesson.name))
    ]
    return entries, remarks


def _students(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Each student's notebooks by name, from a folder a student or from Canvas' single folder for all; and remarks."""
    students: dict[str, list[Path]] = {}
    remarks = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            students[path.name], more = _in_folder(path)
            remarks += [f"{path.name}: {remark}" for remark in more]
        elif path.suffix == ".ipynb" and (match := _CANVAS.fullmatch(path.stem)):
            students.setdefault(f"{match['student']} (Canvas {match['id']})", []).append(path)
        elif path.suffix == ".ipynb":
            remarks.append(f"{path.name} lies in no student's folder")
    return students, remarks


def _in_folder(student: Path) -> tuple[list[Path], list[str]]:
    if student.is_symlink():
        return [], ["the folder is a link, and links are not followed"]
    try:
        return [path for path in student.iterdir() if path.name.endswith(".ipynb")], []
    except OSError as error:
        return [], [f"the folder cannot be opened ({error.strerror})"]


def _handed_in(paths: Sequence[Path], lessons: Sequence[Lesson]) -> tuple[dict[str, _Cells | str], list[str]]:
    """A student's cells for each lesson, by its name, or why they cannot be read; and remarks on other files."""
    names = [lesson.name for lesson in lessons]
    handed_in: dict[str, _Cells | str] = {}
    remarks = []
    for path in sorted(paths, key=lambda path: (_name(path) in names, path.name)):  # the ones of a lesson's name count
        try:
            cells, noted = read(path)
        except InputError as error:
            if _name(path) in names:
                handed_in.setdefault(_name(path), _shown(str(error)))
            remarks.append(str(error))
            continue
        name = _lesson_of(cells, {_name(path), noted}, lessons)
        if name is None:
            remarks.append(f"{path.name} belongs to no lesson")
            continue
        if name in handed_in:
            remarks.append(f"of several notebooks for {name}, {path.name} was graded")
        handed_in[name] = cells
    return handed_in, remarks


def _name(path: Path) -> str:
    """The name that the student gave to the file, without its ending."""
    match = _CANVAS.fullmatch(path.stem)
    return match["name"] if match else path.stem


def read(path: Path) -> tuple[_Cells, str]:
    """The code cells of a notebook as it was handed in, and the lesson noted in it ("" for none).

    Whatever else is damaged is passed over. InputError where it is no notebook, a link, or far too large.
    """
    if path.is_symlink():
        raise InputError(f"{path.name} is a link; hand in the file itself")
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise InputError(f"{path.name} is no file of at most {LARGEST >> 20} MB")
    try:
        notebook = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{path.name} cannot be read as a notebook") from None
    match notebook:
        case {"cells": list(cells), "metadata": {"labkit": {"lesson": str(noted)}}}:
            pass
        case {"cells": list(cells)}:
            noted = ""
        case _:
            raise InputError(f"{path.name} cannot be read as a notebook")
    code = [cell for cell in cells if isinstance(cell, dict) and cell.get("cell_type") == "code"]
    sources = [(_text(cell.get("id")), _text(cell.get("source"))) for cell in code]
    if (length := sum(len(source) for _, source in sources)) > MOST_SOURCE:
        raise InputError(f"{path.name} holds {length:,} characters of source, more than anybody writes")
    return sources, noted


def _text(value: Any) -> str:
    """A text, which a notebook may hold as a list of lines; "" for anything else."""
    lines = value if isinstance(value, list) else [value]
    return "".join(line for line in lines if isinstance(line, str))


def _lesson_of(cells: _Cells, named: set[str], lessons: Sequence[Lesson]) -> str | None:
    """By the file's name or what `./lab start` noted, else by the functions of its exercises, which are its alone."""
    for lesson in lessons:
        if lesson.name in named:
            return lesson.name
    answered = {
        lesson.name: sum(any(_defines(text, task.function) for _, text in cells) for task in lesson.exercises)
        for lesson in lessons
    }
    best = max(answered, key=answered.get, default=None)
    return best if best and answered[best] else None


def _entries(student: str, lesson: Lesson, handed_in: _Cells | str | None) -> Iterator[tuple[Grade, Answer | None]]:
    """A grade and an answer for each exercise: the grade of one without an answer stands already."""
    ids, graded = [cell_id for cell_id, _ in lesson.cells], {task.function for task in lesson.exercises}
    for task in lesson.exercises:
        result, reason, answer = "missing", "no notebook of this lesson was handed in", None
        if isinstance(handed_in, str):
            reason = handed_in
        elif handed_in is not None and (answer := _find(handed_in, task)) is None:
            reason = "the exercise's cell is not in the notebook, and no other defines its function"
        elif answer:
            source, note = answer
            result, reason = NOT_GRADED, "the process that had to grade it was ended from outside"
            above = [source for _, source in lesson.cells[: ids.index(task.cell_id)]]  # with the worked answers
            added = [text for cell_id, text in handed_in if cell_id not in ids]
            added = [text for text in added if not any(_defines(text, function) for function in graded)]
            answer = Answer(task.id, task.function, above + added, source, note)
        yield Grade(student, lesson.name, task, result, reason), answer


def _find(cells: _Cells, task: Exercise) -> tuple[str, str] | None:
    """The source of an answer, and a note where it was not found by its cell's id; the last of several counts."""
    named = [source for cell_id, source in cells if cell_id == task.cell_id]
    elsewhere = [text for cell_id, text in cells if cell_id != task.cell_id and _defines(text, task.function)]
    if elsewhere and not (named and _defines(named[-1], task.function) and named[-1].strip() != task.stub.strip()):
        return elsewhere[-1], " (found by its function's name)"
    return (named[-1], "") if named else None


def _defines(source: str, function: str) -> bool:
    return bool(re.search(rf"^def {function}\b", source, re.MULTILINE))


def _imports(lessons: Sequence[Lesson], names: Container[str]) -> list[str]:
    """What the answers to the lessons of these names import, every check, and torch at the first operator on "meta"."""
    statements = dict.fromkeys(("import labkit.lesson.settings", "import torch._dynamo"))
    for lesson in (lesson for lesson in lessons if lesson.name in names):
        statements[f"from labkit.lesson import check; check.load({lesson.name[:2]!r})"] = None
        for node in (node for _, source in lesson.cells for node in answers.definitions(source)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                statements[ast.unparse(node)] = None
    return list(statements)


# the gradebook ------------------------------------------------------------------------------------


def write(book: Gradebook, folder: Path) -> tuple[Path, Path]:
    """Write grades.csv and grades.html into `folder`, each whole or not at all; InputError where that fails."""
    paths = tuple(folder / name for name in FILES)
    with files.refused(f"The grades cannot be written to {folder}"):
        for path, text in zip(paths, (table(book), html(book)), strict=True):
            files.write_text(path, text)
    return paths


def table(book: Gradebook) -> str:
    """The grades as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in book.grades:
        task = row.exercise
        cells = (row.student, row.lesson, task.id, task.title, row.points, task.points, row.result, row.reason)
        writer.writerow([spreadsheet_cell(cell) for cell in cells])
    return text.getvalue()


def spreadsheet_cell(value: Any) -> Any:
    """The value, with an apostrophe in front of a text that a spreadsheet would take for a formula."""
    return f"'{value}" if str(value).startswith(("=", "+", "-", "@")) else value


def html(book: Gradebook) -> str:
    """The page: points of all students at a glance, then the reason for each exercise, student by student."""
    by_student = [(name, list(rows)) for name, rows in groupby(book.grades, lambda row: row.student)]
    by_exercise = [
        (task, [row.result for row in book.grades if row.exercise == task])
        for task in {row.exercise: None for row in book.grades}
    ]
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("grade.html.j2")
    return page.render(book=book, students=by_student, exercises=by_exercise, results=RESULTS, now=datetime.now(UTC))


def _shown(text: str) -> str:
    """The text with what cannot be printed, or written as UTF-8, as its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
