"""The exercises of a lesson as data: card, stub, check and worked answer, read from the notebook itself.

An exercise is three cells: a card in Markdown, a code cell tagged `exercise`, and one tagged `check` that calls
`lab.check("NN.k", function)`. The markers are nbgrader's. Whether an answer is right is decided in labkit.checks.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass

import nbformat

from course import lessons
from labkit.checks import STUB_SAYS
from labkit.errors import InputError

MARKERS = BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
_STUB = f'raise NotImplementedError("{STUB_SAYS}; then run the check below.")'
_CARD = re.compile(r"^\*Difficulty (\d) of 5 · (\d+) minutes(?: · (.+))?\*$", re.MULTILINE)
_TITLE = re.compile(r"^### Exercise (\d+) · (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Exercise:
    """One exercise. advice: when to skip it. function: what the check takes. source: the cell with its answer."""

    id: str
    title: str
    difficulty: int
    minutes: int
    advice: str
    hints: int
    function: str
    cell_id: str
    source: str

    @property
    def points(self) -> int:
        """What the exercise counts in a class: its difficulty, 1 to 5."""
        return self.difficulty

    @property
    def stub(self) -> str:
        return without_solution(self.source)


def read(notebook: nbformat.NotebookNode) -> list[Exercise]:
    """The exercises of a lesson, in order; InputError, naming the cell, where one lacks its card or its check."""
    found = []
    for place, cell in enumerate(notebook.cells):
        if "exercise" in tags(cell):
            found.append(_read(notebook.cells, place))
    return found


def tags(cell: nbformat.NotebookNode) -> Sequence[str]:
    return cell.metadata.get("tags", [])


def find(exercise_id: str) -> Exercise:
    """The exercise "03.1" of the course; InputError naming those that the lesson has."""
    lesson, dot, _ = exercise_id.partition(".")
    if not dot:
        raise InputError(f"{exercise_id!r} is no exercise; give lesson and number, like 03.1.")
    known = read(nbformat.read(lessons.find(lesson), as_version=4))
    wanted = f"{lesson.zfill(2)}.{exercise_id[len(lesson) + 1 :]}"
    for exercise in known:
        if exercise.id == wanted:
            return exercise
    there = ", ".join(exercise.id for exercise in known) or "none"
    raise InputError(f"There is no exercise {exercise_id}; lesson {lesson.zfill(2)} has {there}.")


def without_solution(source: str) -> str:
    """The cell with each block between the markers replaced by a raise at the block's own indentation."""
    lines, inside = [], False
    for line in source.splitlines():
        mark = line.strip()
        if mark in MARKERS:
            if inside == (mark == BEGIN):
                raise InputError(f"`{mark}` stands alone in an exercise; each `{BEGIN}` needs one `{END}` after it.")
            inside = mark == BEGIN
            if inside:
                lines.append(line[: len(line) - len(line.lstrip())] + _STUB)
        elif not inside:
            lines.append(line)
    if inside:
        raise InputError(f"`{BEGIN}` stands alone in an exercise; each `{BEGIN}` needs one `{END}` after it.")
    return "\n".join(lines)


def _read(cells: Sequence[nbformat.NotebookNode], place: int) -> Exercise:
    name = cells[place].get("id", f"cell {place + 1}")
    card = cells[place - 1].source if place and cells[place - 1].cell_type == "markdown" else ""
    title, facts = _TITLE.search(card), _CARD.search(card)
    if not title or not facts:
        raise InputError(
            f"{name} has no card above it; write `### Exercise 1 · Its title` and `*Difficulty 2 of 5 · 10 minutes*`."
        )
    call = _check_of(cells[place + 1].source) if place + 1 < len(cells) and "check" in tags(cells[place + 1]) else None
    if call is None:
        raise InputError(f'{name} has no check below it; write `lab.check("NN.1", its_function)` tagged `check`.')
    return Exercise(
        id=call[0],
        title=title[2].strip(),
        difficulty=int(facts[1]),
        minutes=int(facts[2]),
        advice=facts[3] or "",
        hints=len(re.findall(r"<summary>Hint", card)),
        function=call[1],
        cell_id=name,
        source=cells[place].source,
    )


def _check_of(source: str) -> tuple[str, str] | None:
    """Id and function of a cell that is `lab.check("03.1", cut)` and nothing else."""
    match ast.parse(source).body:
        case [
            ast.Expr(
                ast.Call(
                    func=ast.Attribute(value=ast.Name(id="lab"), attr="check"),
                    args=[ast.Constant(value=str(check_id)), ast.Name(id=function)],
                    keywords=[],
                )
            )
        ]:
            return check_id, function
    return None
