"""The lesson notebooks as files: which there are, which section a cell belongs to, and what of one is worth keeping.

Executing them is runs.py's work, the learner's copies are course.py's.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from labkit import files
from labkit.errors import InputError
from labkit.files import replacing

if TYPE_CHECKING:
    import nbformat  # takes a second to import, and finding a lesson needs none of it


def all_lessons(folder: Path | None = None) -> list[Path]:
    """The lesson notebooks, in order."""
    return sorted((folder or files.NOTEBOOKS).glob("[0-9][0-9]_*.ipynb"))


def find(name: str, folder: Path | None = None) -> Path:
    """The lesson called "3", "03" or "03_structured_pruning_cnns"; InputError naming what there is."""
    known = all_lessons(folder)
    for path in known:
        if name in (path.stem, path.name) or (name.isdigit() and int(name) == int(path.stem[:2])):
            return path
    there = ", ".join(path.stem[:2] for path in known) or f"none in {folder or files.NOTEBOOKS}"
    raise InputError(f"There is no lesson {name}; give the number of one that exists: {there}.")


def sections(notebook: "nbformat.NotebookNode") -> Iterator[tuple[str, str]]:
    """(cell id, nearest heading at or above the cell) for each cell."""
    title = "before the first heading"
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (heading := re.search(r"^#{1,3} +(.+)$", cell.source, re.MULTILINE)):
            title = heading[1].strip()
        yield cell.get("id", ""), title


def tidied(notebook: "nbformat.NotebookNode") -> "nbformat.NotebookNode":
    """A copy fit for keeping: no injected cell, counts 1..n, and no metadata that changes from run to run; ids stay.

    The record that the last cell carries loses samples and the rows of tables: they stand in the record's own file.
    """
    import nbformat

    from labkit.records import MIME

    kept = nbformat.from_dict(notebook)
    kept.cells = [cell for cell in kept.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for volatile in ("papermill", "widgets"):
        kept.metadata.pop(volatile, None)
    kept.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    kept.metadata.language_info = {"name": "python"}
    for cell in kept.cells:
        for volatile in ("papermill", "execution", "collapsed"):
            cell.metadata.pop(volatile, None)
        if not cell.metadata.get("tags", [True]):
            del cell.metadata["tags"]
    executed = [cell for cell in kept.cells if cell.cell_type == "code" and cell.execution_count]
    for count, cell in enumerate(executed, start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            for measurement in output.get("data", {}).get(MIME, {}).get("measurements", []):
                for long in ("detail", "rows"):
                    measurement.pop(long, None)
    return kept


def write(path: Path, text: str) -> None:
    """Write a text file atomically, with its folder."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
