"""A class's notebooks graded: DIR/<student>/<lesson>.ipynb in, grades.csv and grades.html out.

A hand-in is read as data, however damaged, and only its sources count. Each answer runs with its check in a process of
its own, which can harm nothing (course.sandbox). That a mark could be forged there is not fought, nor is copying: the
worked answers are public. Text answers are left to people.
"""

import ast
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from course import notebooks, sandbox
from course.notebooks import Exercise
from labkit import checks, files
from labkit.errors import InputError, LabError

SECONDS, MOST_SECONDS = 30.0, 86_400.0  # for one answer; the worked ones need far less than the first
LARGEST = 20 << 20  # bytes of a notebook, pictures included
MOST_SOURCE = 1 << 20  # characters of its cells
RESULTS = ("passed", "wrong", "not done", "broken", "stopped", "missing")
COLUMNS = ("student", "lesson", "exercise", "title", "points", "of", "result", "reason")
FILES = ("grades.csv", "grades.html")
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


@dataclass(frozen=True)
class Lesson:
    name: str
    cells: _Cells
    exercises: Sequence[Exercise]


@dataclass(frozen=True)
class Answer:
    """What runs in one process. before: cells whose imports, definitions and constants the answer may use.

    note: said to whoever reads the grade, on how the answer was found.
    """

    check: str
    function: str
    before: Sequence[str]
    source: str
    note: str = ""


def grade(
    folder: Path,
    *,
    seconds: float = SECONDS,
    on_grade: Callable[[Grade, int], None] = lambda grade, total: None,
) -> Gradebook:
    """Grade every student's folder in `folder`, each for every lesson that anybody has handed in.

    seconds: the limit for one answer, 1 to 86,400. on_grade: called with the grade of each answer as it is done, and
    their number in all. InputError, before anything runs, where there is nothing to grade or the grades could not be
    written.
    """
    if not 1 <= seconds <= MOST_SECONDS:
        raise InputError(f"The limit for one answer is {seconds:g} seconds; give 1 to {MOST_SECONDS:,.0f}.")
    lessons, remarks = read_lessons()
    entries, more = collect(folder, lessons)
    grades = [grade for grade, _ in entries]
    answers = {place: answer for place, (_, answer) in enumerate(entries) if answer}
    measures = set()

    def note(place: int, result: str, reason: str, shut_in_by: str) -> None:
        grades[place] = replace(grades[place], result=result, reason=_shown(reason) + answers[place].note)
        measures.add(shut_in_by)
        on_grade(grades[place], len(answers))

    if not _run(answers, _imports(lessons, {grade.lesson for grade in grades}), seconds, note):
        remarks.append("Not all was graded: a process of the grader died; grade again.")
    return Gradebook(grades, list(map(_shown, remarks + more)), "; ".join(filter(None, measures)))


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
    students = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not students:
        raise InputError(
            f"{folder} holds no folders; put each student's notebooks into one: {folder}/ann/01_....ipynb."
        )
    handed_in = {student: _handed_in(student, lessons) for student in students}
    remarks = [f"{student.name}: {remark}" for student, (_, some) in handed_in.items() for remark in some]
    seen = [lesson for lesson in lessons if any(lesson.name in by_lesson for by_lesson, _ in handed_in.values())]
    if not seen:
        raise InputError(f"No notebook in {folder} is of a lesson; they are looked for as {folder}/<student>/*.ipynb.")
    entries = [
        entry
        for student, (by_lesson, _) in handed_in.items()
        for lesson in seen
        for entry in _entries(_shown(student.name), lesson, by_lesson.get(lesson.name))
    ]
    return entries, remarks


def _handed_in(student: Path, lessons: Sequence[Lesson]) -> tuple[dict[str, _Cells | str], list[str]]:
    """A student's cells for each lesson, by its name, or why they cannot be read; and remarks on other files."""
    if student.is_symlink():
        return {}, ["the folder is a link, and links are not followed"]
    try:
        paths = [path for path in student.iterdir() if path.name.endswith(".ipynb")]
    except OSError as error:
        return {}, [f"the folder cannot be opened ({error.strerror})"]
    names = [lesson.name for lesson in lessons]
    handed_in: dict[str, _Cells | str] = {}
    remarks = []
    for path in sorted(paths, key=lambda path: (path.stem in names, path.name)):  # the ones of a lesson's name count
        try:
            cells, noted = read(path)
        except InputError as error:
            if path.stem in names:
                handed_in.setdefault(path.stem, _shown(str(error)))
            remarks.append(str(error))
            continue
        name = _lesson_of(cells, {path.stem, noted}, lessons)
        if name is None:
            remarks.append(f"{path.name} belongs to no lesson")
            continue
        if name in handed_in:
            remarks.append(f"of several notebooks for {name}, {path.name} was graded")
        handed_in[name] = cells
    return handed_in, remarks


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
            result, reason = "stopped", "the grading ended early"
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


# answers run --------------------------------------------------------------------------------------


def _run(
    answers: Mapping[int, Answer],
    imports: Sequence[str],
    seconds: float,
    note: Callable[[int, str, str, str], None],
) -> bool:
    """Run the answers in children of one fresh process, which has imported once what they need; whether all came back.

    note: called with the key, the result, the reason and what shut it in, as each is done.
    """
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # since it forks
    with subprocess.Popen(
        [sys.executable, "-m", "course.grade"],
        cwd=files.ROOT,
        env={**os.environ, **one_thread},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the grader, which then ends them all
    ) as server:
        try:
            with suppress(BrokenPipeError), server.stdin as to_server:
                json.dump([imports, seconds, [(place, asdict(answer)) for place, answer in answers.items()]], to_server)
            for line in server.stdout:
                note(*json.loads(line))
            return server.wait() == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def _serve() -> None:
    """The fresh process: reads what is to be run, and writes a line for each answer as it is done."""
    imports, seconds, answers = json.load(sys.stdin)
    results = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no result
    for statement in imports:
        with suppress(Exception):
            exec(statement, {})
    workers = min(4, os.cpu_count() or 1)
    for worker in range(workers):
        if os.fork() == 0:
            for place, answer in answers[worker::workers]:
                result, reason, measures = _verdict(Answer(**answer), seconds)
                line = json.dumps([place, result, reason[:300], measures])
                os.write(results, f"{line}\n".encode())  # at once, for it is shorter than a pipe's page
            os._exit(0)
    died = [os.wait()[1] for _ in range(workers)]
    os._exit(any(died))  # nothing is left to tidy up, which takes seconds


def _verdict(answer: Answer, seconds: float) -> tuple[str, str, str]:
    try:
        measures, text = sandbox.run(lambda: _checked(answer), seconds=seconds)
    except (sandbox.Stopped, OSError) as error:
        return "stopped", str(error), ""
    result, _, reason = text.partition("\n")
    if result not in RESULTS:
        result, reason = "stopped", "its process replied with something else than a result"
    return result, reason, measures


def _checked(answer: Answer) -> str:
    """Result and reason, a line each. Runs shut in, with the answer, which may do to this process what it likes."""
    import torch

    torch.set_num_threads(1)
    space: dict[str, Any] = {"__name__": "__main__"}
    for source in answer.before:
        for statement in definitions(source):
            with suppress(BaseException):  # what the answer does not need may need what is not there
                exec(compile(ast.Module([statement], []), "<the lesson>", "exec"), space)
    raised = None
    try:
        exec(compile(_plain(answer.source), "<your cell>", "exec"), space)
    except BaseException as error:  # a try-out below the function may need the lesson around it
        raised = error
    function = space.get(answer.function)
    if not callable(function):
        if isinstance(raised, NotImplementedError):
            return "not done\nnot done yet"
        reason = f"raised {type(raised).__name__}: {' '.join(str(raised).split())[:300]}" if raised else ""
        return f"broken\nthe cell {reason or f'defines no function called {answer.function}'}"
    try:
        result = checks.check(answer.check, function)
    except NotImplementedError:
        return "not done\nnot done yet"
    except BaseException as error:  # of a check, over a value that no check expected
        return f"wrong\nthe check met {type(error).__name__} over what it returned"
    return "passed\n" if result.passed else f"wrong\n{'; '.join(result.failures)}"


def definitions(source: str) -> Iterator[ast.stmt]:
    """A cell's imports, functions, classes and constants: what may run without the cells above it.

    `choose = lab.answer("03.2", choose)` is `choose = choose`.
    """
    try:
        statements = ast.parse(_plain(source)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in statements:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.ClassDef():
                yield node
            case ast.Assign(value=ast.Call(func=ast.Attribute(attr="answer"), args=[_, ast.Name() as function])):
                yield ast.copy_location(ast.Assign(node.targets, function), node)  # above an answer all are worked
            case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
                if isinstance(value, ast.Lambda) or not any(
                    isinstance(part, ast.Name | ast.Call) for part in ast.walk(value)
                ):
                    yield node


def _plain(source: str) -> str:
    """The cell without the lines that only IPython understands (%magic, !command)."""
    return "\n".join("pass" if re.match(r"[%!]", line) else line for line in source.splitlines())


def _imports(lessons: Sequence[Lesson], names: Container[str]) -> list[str]:
    """What the answers to the lessons of these names import, and what torch does at the first operator on "meta"."""
    statements = {"import torch._dynamo": None}
    for lesson in (lesson for lesson in lessons if lesson.name in names):
        statements[f"import labkit.checks.lesson{lesson.name[:2]}"] = None
        for node in (node for _, source in lesson.cells for node in definitions(source)):
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
    """The grades as CSV. A text that a spreadsheet would take for a formula gets an apostrophe in front."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in book.grades:
        task = row.exercise
        cells = (row.student, row.lesson, task.id, task.title, row.points, task.points, row.result, row.reason)
        writer.writerow([f"'{cell}" if str(cell).startswith(("=", "+", "-", "@")) else cell for cell in cells])
    return text.getvalue()


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


if __name__ == "__main__":
    _serve()
