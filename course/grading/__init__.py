"""A class's notebooks graded: DIR/<student>/<lesson>.ipynb in, a row for each student and exercise out.

Each answer is judged in processes of its own (judge.py), so that one that hangs or misbehaves costs nobody else
anything. Copying is not looked for: the worked answers are public. Text answers are left to people.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from nbformat import NotebookNode

from course import notebooks as lessons
from course.grading import submissions
from course.grading.submissions import Lesson
from course.notebooks import Exercise
from labkit.errors import InputError

if TYPE_CHECKING:
    from course.grading.judge import Task

SECONDS = 30.0  # for one answer; the worked ones need far less
GOOD = "passed"


@dataclass(frozen=True)
class Row:
    """One exercise of one student. result: passed, wrong, not done, broken, stopped, or missing."""

    student: str
    lesson: str
    exercise: Exercise
    result: str
    reason: str = ""

    @property
    def points(self) -> int:
        return self.exercise.points if self.result == GOOD else 0


@dataclass(frozen=True)
class Book:
    """The result: rows by student and exercise, remarks that belong to no exercise, how the answers were shut in."""

    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    measures: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    student: str
    lesson: Lesson
    exercise: Exercise
    answer: submissions.Answer | None
    before: tuple[str, ...]
    why_missing: str


def grade(
    folder: Path,
    *,
    seconds: float = SECONDS,
    notebooks: Path | None = None,
    on_row: Callable[[Row, int], None] = lambda row, total: None,
) -> Book:
    """Grade every student's folder in `folder`; InputError where there is none, before anything runs.

    seconds: the limit for one answer. on_row is called with each row as it is done, and their number in all.
    """
    jobs, remarks = _collect(folder, [Lesson.read(path) for path in lessons.all_lessons(notebooks)])
    context = multiprocessing.get_context("forkserver")
    wanted = sorted({job.exercise.id.partition(".")[0] for job in jobs})
    # once for all judges; torch fetches _dynamo at the first operator on the meta device, which takes seconds
    preload = ["torch._dynamo", "course.grading.judge", *(f"labkit.checks.lesson{one}" for one in wanted)]
    context.set_forkserver_preload(preload)
    rows, measures = [], ()
    with _one_thread(), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for row, how in pool.map(lambda job: _judged(job, seconds, context), jobs):
            rows.append(row)
            measures = measures or how
            on_row(row, len(jobs))
    return Book(tuple(rows), tuple(remarks), measures)


def _collect(folder: Path, known: Sequence[Lesson]) -> tuple[list[_Job], list[str]]:
    """What is to be judged. Every student gets a row for each exercise of each lesson that anybody handed in."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; give one that holds a folder for each student.")
    students = sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not students:
        raise InputError(
            f"{folder} holds no folders; put each student's notebooks into one: {folder}/ann/01_....ipynb."
        )
    read = {student: _notebooks(student, known) for student in students}
    handed = {student: found for student, (found, _) in read.items()}
    remarks = [f"{student.name}: {text}" for student, (_, said) in read.items() for text in said]
    seen = {name for found in handed.values() for name in found}
    if not seen:
        raise InputError(f"No notebook in {folder} is of a lesson; they are looked for as {folder}/<student>/*.ipynb.")
    jobs = [
        job
        for student in students
        for lesson in known
        if lesson.name in seen
        for job in _jobs(student.name, lesson, handed[student].get(lesson.name))
    ]
    return jobs, remarks


def _notebooks(student: Path, known: Sequence[Lesson]) -> tuple[dict[str, NotebookNode | str], list[str]]:
    """A student's notebook for each lesson, by its name, or why it cannot be read; and remarks on other files."""
    found: dict[str, NotebookNode | str] = {}
    remarks = []
    for path in sorted(student.glob("*.ipynb")):
        try:
            notebook = submissions.read(path)
        except InputError as error:
            if any(path.stem == lesson.name for lesson in known):
                found.setdefault(path.stem, str(error))
            remarks.append(str(error))
            continue
        lesson = submissions.lesson_of(notebook, path.stem, known)
        if lesson is None:
            remarks.append(f"{path.name} belongs to no lesson")
        elif path.stem == lesson.name or not isinstance(found.get(lesson.name), NotebookNode):
            if isinstance(found.get(lesson.name), NotebookNode):
                remarks.append(f"of several notebooks for {lesson.name} the one of that name was graded")
            found[lesson.name] = notebook
        else:
            remarks.append(f"{path.name} was not graded: there is another notebook for {lesson.name}")
    return found, remarks


def _jobs(student: str, lesson: Lesson, handed: NotebookNode | str | None) -> Iterator[_Job]:
    if handed is None:
        there, missing = {}, "no notebook of this lesson was handed in"
    elif isinstance(handed, str):
        there, missing = {}, handed
    else:
        there = submissions.answers(handed, lesson)
        missing = "the exercise's cell is not in the notebook, and no other defines its function"
    for exercise in lesson.exercises:
        answer = there.get(exercise.id)
        before = submissions.needs(exercise, answer.source, handed, lesson) if answer else []
        yield _Job(student, lesson, exercise, answer, tuple(before), missing)


def _judged(job: _Job, seconds: float, context: multiprocessing.context.BaseContext) -> tuple[Row, tuple[str, ...]]:
    if job.answer is None:
        return Row(job.student, job.lesson.name, job.exercise, "missing", job.why_missing), ()
    from course.grading.judge import Task, Verdict

    task = Task(job.exercise.id, job.exercise.function, job.before, submissions.plain(job.answer.source), seconds)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_judge, args=(task, sender), daemon=True)
    process.start()
    sender.close()
    verdict = Verdict("stopped", ("its check was ended, over what the answer returned",))
    try:
        if receiver.poll(seconds + 60):  # the judge ends an answer itself; this is for what a judge may meet
            verdict = receiver.recv()
    except EOFError:
        pass
    finally:
        process.kill()
        process.join()
        receiver.close()
    said = "; ".join(verdict.reasons)
    note = f" ({job.answer.note})" if job.answer.note else ""
    return Row(job.student, job.lesson.name, job.exercise, verdict.kind, said + note), verdict.measures


def _judge(task: "Task", sender: Connection) -> None:
    from course.grading.judge import judge

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the grader, which then ends its judges
    sender.send(judge(task))


@contextmanager
def _one_thread() -> Iterator[None]:
    """While the judges' server starts: one thread for every library, since they fork."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
