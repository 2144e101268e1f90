"""What a learner handed in: which lesson a notebook is of, which cell answers which exercise, what that cell needs.

Cells are found by their id. Where an editor has lost ids, tags or the file's name, by the function that they define.
Only sources are read: outputs are ignored, and nothing is run here.
"""

import ast
import functools
import re
import symtable
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course import notebooks
from course.notebooks import Exercise
from labkit.errors import InputError

LARGEST = 20 << 20  # bytes of a notebook, pictures included
MOST_SOURCE = 1 << 20  # characters of its cells
_NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)  # what Python's parser answers with


@dataclass(frozen=True)
class Lesson:
    """A lesson of the course, as the grader knows it."""

    name: str
    notebook: NotebookNode
    exercises: tuple[Exercise, ...]

    @classmethod
    def read(cls, path: Path) -> "Lesson":
        notebook = nbformat.read(path, as_version=4)
        return cls(path.stem, notebook, tuple(notebooks.exercises(notebook)))


@dataclass(frozen=True)
class Answer:
    """The learner's source for an exercise, and how it was found, where that was not by its id."""

    source: str
    note: str = ""


def read(path: Path) -> NotebookNode:
    """A notebook as it was handed in; InputError where it is none, or far too large."""
    if not path.is_file() or path.stat().st_size > LARGEST:
        raise InputError(f"{path.name} is no file of at most {LARGEST >> 20} MB")
    try:
        with warnings.catch_warnings(action="ignore"):  # of lost ids, which are found again
            notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        length = sum(len(cell.source) for cell in notebook.cells)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError, nbformat.ValidationError):
        raise InputError(f"{path.name} cannot be read as a notebook") from None
    if length > MOST_SOURCE:
        raise InputError(f"{path.name} holds {length:,} characters of source, more than anybody writes")
    return notebook


def lesson_of(notebook: NotebookNode, name: str, known: Sequence[Lesson]) -> Lesson | None:
    """By its file name, else by what `./lab start` noted in it, else by the ids and functions of the exercises."""
    noted = notebook.metadata.get("labkit", {}).get("lesson")
    for lesson in known:
        if lesson.name in (name, noted):
            return lesson
    found = {lesson.name: len(answers(notebook, lesson)) for lesson in known}
    best = max(found, key=found.get, default=None)
    return next(lesson for lesson in known if lesson.name == best) if best and found[best] else None


def answers(notebook: NotebookNode, lesson: Lesson) -> dict[str, Answer]:
    """The answer to each exercise that has one, by the exercise's id."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    by_id = {cell.get("id"): cell for cell in code}
    found = {}
    for exercise in lesson.exercises:
        own = by_id.get(exercise.cell_id)
        if own is not None and exercise.function in defined(own.source) and own.source.strip() != exercise.stub.strip():
            found[exercise.id] = Answer(own.source)
            continue
        others = [cell for cell in code if cell is not own and exercise.function in defined(cell.source)]
        if others:  # the last one counts, as it does in a notebook
            found[exercise.id] = Answer(others[-1].source, "found by its function's name")
        elif own is not None:
            found[exercise.id] = Answer(own.source)
    return found


@functools.cache
def defined(source: str) -> set[str]:
    """Names of the functions that a cell defines; by their first lines alone where the cell is no Python."""
    try:
        return {node.name for node in ast.parse(plain(source)).body if isinstance(node, ast.FunctionDef)}
    except _NOT_PYTHON:
        return set(re.findall(r"^def (\w+)", source, re.MULTILINE))


def plain(source: str) -> str:
    """The cell without the lines that only IPython understands (%magic, !command)."""
    return "\n".join("pass" if re.match(r"[%!]", line) else line for line in source.splitlines())


def needs(exercise: Exercise, answer: str, notebook: NotebookNode, lesson: Lesson) -> list[str]:
    """The statements that the answer needs run before it: imports, definitions and literals that its names refer to.

    They come from the cells of the lesson above the exercise, earlier exercises with their worked answers, so that one
    mistake is not counted twice; then from cells that the learner has added.
    """
    known = {cell.get("id") for cell in lesson.notebook.cells}
    added = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.get("id") not in known]
    graded = {one.function for one in lesson.exercises}
    available: list[Definition] = []
    for cell in lesson.notebook.cells:
        if cell.get("id") == exercise.cell_id:
            break
        if cell.cell_type == "code":
            available += _definitions(cell.source)
    for cell in added:
        if not graded & defined(cell.source):
            available += _definitions(plain(cell.source))
    places: dict[str, list[int]] = {}
    for place, definition in enumerate(available):
        for name in definition.binds:
            places.setdefault(name, []).append(place)
    waiting, taken = _names(plain(answer)), set()
    while waiting:
        new = set(places.pop(waiting.pop(), [])) - taken
        taken |= new
        for place in new:
            waiting |= _names(available[place].source) & places.keys()
    return [available[place].source for place in sorted(taken)]


@dataclass(frozen=True)
class Definition:
    """A statement that may run by itself, and the names that it binds."""

    source: str
    binds: frozenset[str]


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(plain(source))
    except _NOT_PYTHON:
        return ast.Module([], [])


def _definitions(source: str) -> list[Definition]:
    """The cell's imports (one a name), functions, classes, and names that stand for a literal or a lambda."""
    found = []
    for statement in _statements(source):
        with suppress(RecursionError):
            found.append(Definition(ast.unparse(statement), frozenset(_bound(statement))))
    return found


def _statements(source: str) -> list[ast.stmt]:
    kept: list[ast.stmt] = []
    for node in _parsed(source).body:
        match node:
            case ast.Import(names=names):
                kept += [ast.Import([one]) for one in names]
            case ast.ImportFrom(module=module, names=names, level=level):
                kept += [ast.ImportFrom(module, [one], level) for one in names]
            case ast.FunctionDef() | ast.ClassDef() | ast.Assign(value=ast.Lambda()):
                kept.append(node)
            case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value) if _is_literal(value):
                kept.append(node)
    return kept


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _bound(statement: ast.stmt) -> set[str]:
    match statement:
        case ast.Import(names=[one]) | ast.ImportFrom(names=[one]):
            return {one.asname or one.name.partition(".")[0]}
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
    return set()


def _names(source: str) -> set[str]:
    """The names that the source takes from around it or from its own top level."""
    try:
        waiting = [symtable.symtable(source, "cell", "exec")]
    except _NOT_PYTHON:
        return set()
    found = set()
    for scope in waiting:
        waiting += scope.get_children()
        top = scope.get_type() == "module"
        found |= {one.get_name() for one in scope.get_symbols() if one.is_referenced() and (top or one.is_global())}
    return found
