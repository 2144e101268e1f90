"""Answers to the exercises: right ones that are written otherwise, and wrong ones, each a patch on the worked answer.

lessonNN.py holds RIGHT: {exercise: one more right answer}, and in some lessons MORE_RIGHT: {exercise: right answers of
other types}. lessonNN.toml holds the wrong answers by name: pairs of
old and new text. Each old text stands once in the worked answer, below its docstring. nightly/lessonNN.toml holds
further answers of both kinds, the right ones whole.
"""

import ast
import importlib
import tomllib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from course import answers, notebooks

FOLDER = Path(__file__).parent
NIGHTLY = FOLDER / "nightly"
FURTHER = sorted(path.stem.removeprefix("lesson") for path in NIGHTLY.glob("lesson*.toml"))  # lessons


@dataclass(frozen=True)
class Bank:
    """The answers to the exercises of a lesson. right: {exercise: answers}. wrong: {exercise: {name: answer}}."""

    right: dict[str, list[Callable]]
    wrong: dict[str, dict[str, Callable]]


@dataclass(frozen=True)
class Worked:
    """A worked answer: its source, the name of its function, and what the cells above define."""

    source: str
    function: str
    above: dict[str, object]

    def answer(self) -> Callable:
        return self.written(self.source, "the worked answer")

    def patched(self, name: str, patches: list[tuple[str, str]]) -> Callable:
        """Make the function with old texts replaced by new ones; ValueError unless each stands once in the body."""
        lines = self.source.splitlines(keepends=True)
        end = end_of_docstring(self.source)
        head, body = "".join(lines[:end]), "".join(lines[end:])
        for old, new in patches:
            if body.count(old) != 1:
                raise ValueError(f"{self.function}, {name!r}: {old!r} stands {body.count(old)} times in the answer")
            body = body.replace(old, new)
        return self.written(head + body, name)

    def written(self, source: str, name: str) -> Callable:
        """Make the function of an answer from its source, below what the cells above define."""
        space = dict(self.above)
        exec(compile(source, f"<{name}>", "exec"), space)
        return space[self.function]


def end_of_docstring(source: str) -> int:
    """Count the lines up to the end of the docstring of an answer, which is the last definition of its cell."""
    return ast.parse(source).body[-1].body[0].end_lineno


@cache
def worked(lesson: str) -> dict[str, Worked]:
    """Read the worked answers of a lesson, "03", each with the imports, functions and constants of the cells above."""
    notebook = notebooks.read(notebooks.find(lesson))
    tasks = {task.cell_id: task for task in notebooks.exercises(notebook)}
    answers_by_exercise: dict[str, Worked] = {}
    above: dict[str, object] = {"__name__": "__main__"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if task := tasks.get(cell.id):
            answers_by_exercise[task.id] = Worked(task.solution, task.function, dict(above))
        define(cell.source, above)
    return answers_by_exercise


def define(source: str, space: dict[str, object]) -> None:
    """Run a cell's definitions; those that need what is not there are left out."""
    for statement in answers.definitions(source):
        with suppress(Exception):
            exec(compile(ast.Module([statement], []), "<the lesson>", "exec"), space)


@cache
def bank(lesson: str) -> Bank:
    """Read the right and the wrong answers of a lesson, "03"."""
    written = importlib.import_module(f"mutants.lesson{lesson}")
    solutions = worked(lesson)
    more = getattr(written, "MORE_RIGHT", {})
    right = {}
    for exercise, solution in solutions.items():
        right[exercise] = [solution.answer(), written.RIGHT[exercise], *more.get(exercise, ())]
    tables = tomllib.loads((FOLDER / f"lesson{lesson}.toml").read_text(encoding="utf-8"))
    return Bank(right, _patched(solutions, tables))


@cache
def further(lesson: str) -> Bank:
    """Read the further answers of a lesson of FURTHER."""
    solutions = worked(lesson)
    tables = tomllib.loads((NIGHTLY / f"lesson{lesson}.toml").read_text(encoding="utf-8"))
    right = {}
    for exercise, sources in tables["right"].items():
        right[exercise] = [solutions[exercise].written(source, name) for name, source in sources.items()]
    return Bank(right, _patched(solutions, tables["wrong"]))


def _patched(solutions: dict[str, Worked], tables: dict[str, dict]) -> dict[str, dict[str, Callable]]:
    wrong = {}
    for exercise, rows in tables.items():
        wrong[exercise] = {name: solutions[exercise].patched(name, patches) for name, patches in rows.items()}
    return wrong
