"""Hand-ins for the grader's tests: a learner's copy of a lesson, solved, changed, and put into a student's folder."""

import json
import os
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from course import notebooks
from labkit import files

LESSON = "01_inference_challenge"
CONV, BOUND, USERS = "conv_work", "time_bound", "largest_batch"
FULL = {"01.1": 2, "01.2": 1, "01.3": 4}


def solved(lesson: Path = files.NOTEBOOKS / f"{LESSON}.ipynb") -> NotebookNode:
    """The learner's copy of a lesson with every answer right."""
    source = notebooks.read(lesson)
    copy = notebooks.student_copy(source, lesson.stem)
    answers = {task.cell_id: task.solution for task in notebooks.exercises(source)}
    for cell in copy.cells:
        cell.source = answers.get(cell.id, cell.source)
    return copy


def with_first_line(
    function: str, *lines: str, before: str = "", lesson: Path = files.NOTEBOOKS / f"{LESSON}.ipynb"
) -> NotebookNode:
    """As solved(), with `lines` at the beginning of one function's body and `before` above it."""
    copy = solved(lesson)
    for cell in copy.cells:
        if f"def {function}(" in cell.source and "exercise" in notebooks.tags(cell):
            docstring = next(line for line in cell.source.splitlines() if line.strip().startswith('"""'))
            indented = "\n".join("    " + line for line in "\n".join(lines).splitlines())
            cell.source = before + cell.source.replace(docstring, f"{docstring}\n{indented}")
    return copy


def write(folder: Path, student: str | bytes, notebook: Any, name: str = LESSON) -> Path:
    path = folder / os.fsdecode(student) / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(notebook))
    return path
