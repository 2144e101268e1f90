"""Grading of a class: DIR/<student>/<lesson>.ipynb in, grades.csv and grades.html out.

A hand-in is read as data, however damaged, and only the sources of its cells count. Each answer runs with the check in
a separate process (course.answers), shut in so that no answer can do harm (course.sandbox). Forging a mark is not
fought, nor is copying: the worked answers are public. Text answers are left to people.
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
_Entry = tuple["Grade", Answer | None]  # a grade, and the answer that has to run for it, if any


@dataclass(frozen=True)
class Grade:
    """The grade of a student for an exercise.

    student   name of the student's folder
    lesson    name of the lesson
    exercise  the exercise
    result    an element of RESULTS
    reason    a sentence for the student; "" for a good answer
    """

    student: str
    lesson: str
    exercise: Exercise
    result: str
    reason: str

    @property
    def points(self) -> int:
        """The exercise's points for a passed check, else 0."""
        return self.exercise.points if self.result == "passed" else 0


@dataclass(frozen=True)
class Gradebook:
    """The grades of a class.

    grades    by student, lesson and exercise
    remarks   sentences about files and folders, for the instructor
    measures  the walls around the answers, in words
    """

    grades: list[Grade]
    remarks: list[str]
    measures: str

    @property
    def incomplete(self) -> str:
        """A sentence on the answers without a grade; "" if all answers were graded."""
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
    """A lesson of the course, as far as grading needs: name, code cells and exercises."""

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
    """Grade every student's folder, for each lesson handed in by any student.

    folder      the class's folder, with a folder per student or the files of a download from Canvas
    seconds     the limit for an answer, 1 to 86,400
    on_grade    called after each answer, with its grade and the number of all answers
    newest_abi  the newest version of Landlock to use, 0 for none (course.sandbox)

    Raises InputError, before any answer runs, if there is no hand-in or the grades could not be written.
    """
    if not 1 <= seconds <= MOST_SECONDS:
        raise InputError(f"The limit for one answer is {seconds:g} seconds; give 1 to {MOST_SECONDS:,.0f}.")
    lessons, remarks = read_lessons()
    entries, remarks_on_hand_ins = collect(folder, lessons)
    remarks += remarks_on_hand_ins
    grades = [grade for grade, _ in entries]
    answers_to_run = {place: answer for place, (_, answer) in enumerate(entries) if answer}

    measures = set()
    imports = _imports(lessons, {grade.lesson for grade in grades})
    with answers.runner(imports, seconds=seconds, newest_abi=newest_abi) as runner:
        remarks += runner.remarks
        for place, verdict in runner.run(answers_to_run):
            if verdict is None:
                continue  # the process of the grader was ended; the grade stays "not graded"
            reason = _printable(verdict.reason) + answers_to_run[place].note
            grades[place] = replace(grades[place], result=verdict.result, reason=reason)
            measures.add(verdict.measures)
            on_grade(grades[place], len(answers_to_run))
    remarks = [_printable(remark) for remark in remarks]
    return Gradebook(grades, remarks, "; ".join(filter(None, measures)))


# what was handed in -------------------------------------------------------------------------------


def read_lessons() -> tuple[list[Lesson], list[str]]:
    """Read the course's lessons, and a remark for each damaged lesson."""
    lessons, remarks = [], []
    for path in notebooks.all_lessons():
        try:
            notebook = notebooks.read(path)
            cells = [(cell.get("id", ""), cell.source) for cell in notebook.cells if cell.cell_type == "code"]
            lessons.append(Lesson(path.stem, cells, notebooks.exercises(notebook)))
        except LabError as error:
            remarks.append(f"Not graded: {error}")
    return lessons, remarks


def collect(folder: Path, lessons: Sequence[Lesson]) -> tuple[list[_Entry], list[str]]:
    """List the grades to be given.

    folder   the class's folder
    lessons  the course's lessons

    Returns (grade, answer to run) for each student and exercise, the answer None if the grade stands already, and
    remarks on the hand-ins. Raises InputError if there is no hand-in, or the grades could not be written.
    """
    _require_class(folder)
    students, remarks = _students(folder)
    if not students:
        raise InputError(
            f"{folder} holds no folders; put each student's notebooks into one: {folder}/ann/01_....ipynb."
        )
    handed_in = {}
    for student, paths in students.items():
        handed_in[student], remarks_on_student = _handed_in(paths, lessons)
        remarks += [f"{student}: {remark}" for remark in remarks_on_student]
    names_handed_in = set().union(*handed_in.values())
    graded_lessons = [lesson for lesson in lessons if lesson.name in names_handed_in]
    if not graded_lessons:
        raise InputError(f"No notebook in {folder} is of a lesson; they are looked for as {folder}/<student>/*.ipynb.")
    entries: list[_Entry] = []
    for student, by_lesson in handed_in.items():
        for lesson in graded_lessons:
            entries += _entries(_printable(student), lesson, by_lesson.get(lesson.name))
    return entries, remarks


def _require_class(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; give one that holds a folder for each student.")
    for name in FILES:
        if (folder / name).is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"{folder / name} cannot be written; fix that first, so that no grade is lost.")


def _students(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """Find each student's notebooks, from a folder per student or from Canvas' single folder, and remarks."""
    students: dict[str, list[Path]] = {}
    remarks = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            students[path.name], remarks_on_folder = _in_folder(path)
            remarks += [f"{path.name}: {remark}" for remark in remarks_on_folder]
        elif path.suffix == ".ipynb":
            match = _CANVAS.fullmatch(path.stem)
            if match:
                student = f"{match['student']} (Canvas {match['id']})"
                students.setdefault(student, []).append(path)
            else:
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
    """Read a student's notebooks.

    Returns, by the name of the lesson, the cells or the reason for an unreadable notebook, and remarks on further
    files. A notebook with the name of a lesson comes before a notebook that only belongs to the lesson.
    """
    names = [lesson.name for lesson in lessons]
    handed_in: dict[str, _Cells | str] = {}
    remarks = []
    # the last notebook of a lesson counts, so those with a lesson's name come last
    for path in sorted(paths, key=lambda path: (_name(path) in names, path.name)):
        try:
            cells, noted = read(path)
        except InputError as error:
            if _name(path) in names:
                handed_in.setdefault(_name(path), _printable(str(error)))
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
    """Name a file without ending, and without the words of Canvas around the student's name for the file."""
    match = _CANVAS.fullmatch(path.stem)
    return match["name"] if match else path.stem


def read(path: Path) -> tuple[_Cells, str]:
    """Read a notebook as handed in.

    Returns (id, source) of each code cell, and the lesson noted by `./lab start`, "" if none is noted. Damage in the
    remaining parts of the notebook is passed over. Raises InputError for a file of a different kind, a link, or a file
    far too large.
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
    length = sum(len(source) for _, source in sources)
    if length > MOST_SOURCE:
        raise InputError(f"{path.name} holds {length:,} characters of source, more than anybody writes")
    return sources, noted


def _text(value: Any) -> str:
    """Read a text, which may be a list of lines in a notebook; "" for a value of a different kind."""
    lines = value if isinstance(value, list) else [value]
    return "".join(line for line in lines if isinstance(line, str))


def _lesson_of(cells: _Cells, named: set[str], lessons: Sequence[Lesson]) -> str | None:
    """Find the lesson of a notebook: by a name, else by the functions of its exercises, different in each lesson.

    cells    (id, source) of each code cell
    named    the file's name, and the lesson noted by `./lab start`
    lessons  the course's lessons
    """
    for lesson in lessons:
        if lesson.name in named:
            return lesson.name
    answered = {lesson.name: _number_of_answers(cells, lesson) for lesson in lessons}
    best = max(answered, key=answered.get, default=None)
    return best if best and answered[best] else None


def _number_of_answers(cells: _Cells, lesson: Lesson) -> int:
    """Count the lesson's exercises with a function somewhere in the cells."""
    count = 0
    for task in lesson.exercises:
        if any(_defines(source, task.function) for _, source in cells):
            count += 1
    return count


def _entries(student: str, lesson: Lesson, handed_in: _Cells | str | None) -> Iterator[_Entry]:
    """Make a grade for each exercise of a lesson, with the answer to run, or with the reason for a missing answer.

    student    the student's name
    lesson     the lesson
    handed_in  the student's cells, the reason for an unreadable notebook, or None for no notebook
    """
    for task in lesson.exercises:
        answer = None
        if handed_in is None:
            reason = "no notebook of this lesson was handed in"
        elif isinstance(handed_in, str):
            reason = handed_in
        else:
            answer = _answer(handed_in, lesson, task)
            reason = "the exercise's cell is not in the notebook, and no other defines its function"
        result = "missing"
        if answer:
            result = NOT_GRADED  # until the answer has run
            reason = "the process that had to grade it was ended from outside"
        yield Grade(student, lesson.name, task, result, reason), answer


def _answer(handed_in: _Cells, lesson: Lesson, task: Exercise) -> Answer | None:
    source_and_note = _find(handed_in, task)
    if source_and_note is None:
        return None
    source, note = source_and_note
    return Answer(task.id, task.function, _cells_before(lesson, task, handed_in), source, note)


def _cells_before(lesson: Lesson, task: Exercise, handed_in: _Cells) -> list[str]:
    """List the sources that an answer may use: the lesson's cells above the exercise, then the student's added cells.

    The lesson's cells hold the worked answers. An added cell with an answer to any exercise is left out.
    """
    ids = [cell_id for cell_id, _ in lesson.cells]
    above = [source for _, source in lesson.cells[: ids.index(task.cell_id)]]
    added = [source for cell_id, source in handed_in if cell_id not in ids]
    return above + [source for source in added if not _answers_any(source, lesson)]


def _answers_any(source: str, lesson: Lesson) -> bool:
    return any(_defines(source, exercise.function) for exercise in lesson.exercises)


def _find(cells: _Cells, task: Exercise) -> tuple[str, str] | None:
    """Find the answer to an exercise.

    Returns the source and a note for the reader of the grade, or None. The exercise's cell counts if changed by the
    student and still with the function; else the last cell elsewhere with the function; else the exercise's cell as it
    is.
    """
    in_its_cell = [source for cell_id, source in cells if cell_id == task.cell_id]
    elsewhere = [source for cell_id, source in cells if cell_id != task.cell_id and _defines(source, task.function)]
    answered_in_its_cell = False
    if in_its_cell:
        source = in_its_cell[-1]
        answered_in_its_cell = _defines(source, task.function) and source.strip() != task.stub.strip()
    if elsewhere and not answered_in_its_cell:
        return elsewhere[-1], " (found by its function's name)"
    return (in_its_cell[-1], "") if in_its_cell else None


def _defines(source: str, function: str) -> bool:
    return bool(re.search(rf"^def {function}\b", source, re.MULTILINE))


def _imports(lessons: Sequence[Lesson], names: Container[str]) -> list[str]:
    """List the import statements for the warm process: all imports of the answers and checks.

    lessons  the course's lessons
    names    names of the lessons handed in

    torch._dynamo is on the list since torch imports it at the first operator on the device "meta".
    """
    statements = dict.fromkeys(("import labkit.lesson.settings", "import torch._dynamo"))
    for lesson in lessons:
        if lesson.name not in names:
            continue
        statements[f"from labkit.lesson import check; check.load({lesson.name[:2]!r})"] = None
        for _, source in lesson.cells:
            for node in answers.definitions(source):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    statements[ast.unparse(node)] = None
    return list(statements)


# the gradebook ------------------------------------------------------------------------------------


def write(book: Gradebook, folder: Path) -> tuple[Path, Path]:
    """Write grades.csv and grades.html into `folder`, each whole or not at all; returns the two paths.

    Raises InputError if a file cannot be written.
    """
    paths = tuple(folder / name for name in FILES)
    with files.refused(f"The grades cannot be written to {folder}"):
        for path, text in zip(paths, (table(book), html(book)), strict=True):
            files.write_text(path, text)
    return paths


def table(book: Gradebook) -> str:
    """Write the grades as CSV, with a row per student and exercise."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in book.grades:
        task = row.exercise
        cells = (row.student, row.lesson, task.id, task.title, row.points, task.points, row.result, row.reason)
        writer.writerow([spreadsheet_cell(cell) for cell in cells])
    return text.getvalue()


def spreadsheet_cell(value: Any) -> Any:
    """Put an apostrophe in front of a text that a spreadsheet would take for a formula; further values stay."""
    looks_like_a_formula = str(value).startswith(("=", "+", "-", "@"))
    return f"'{value}" if looks_like_a_formula else value


def html(book: Gradebook) -> str:
    """Write the page: points of all students at a glance, then the reason for each exercise, student by student."""
    by_student = [(name, list(rows)) for name, rows in groupby(book.grades, lambda row: row.student)]
    results_by_exercise: dict[Exercise, list[str]] = {}
    for row in book.grades:
        results_by_exercise.setdefault(row.exercise, []).append(row.result)
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return templates.get_template("grade.html.j2").render(
        book=book,
        students=by_student,
        exercises=list(results_by_exercise.items()),
        results=RESULTS,
        now=datetime.now(UTC),
    )


def _printable(text: str) -> str:
    """Replace each character that cannot be printed, or written as UTF-8, by its escape."""
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text)


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
