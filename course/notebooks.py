"""The lesson notebooks as files: which there are, their exercises, copies without answers for a learner or a class.

An exercise is three cells: a card in Markdown, a code cell tagged `exercise`, and one tagged `check` that calls
`lab.check("NN.k", function)`; an answer stands between nbgrader's markers. Executing lessons is course.run's work,
grading course.grade's. Each function reads the lessons that it is about, so that a damaged one hinders no other.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from labkit import files
from labkit.errors import DataError, InputError
from labkit.lesson import worked
from labkit.lesson.check import STUB_SAYS
from labkit.lesson.worked import BEGIN, END, MARKERS, without_markers

if TYPE_CHECKING:
    from nbformat import NotebookNode  # takes a second to import, and finding a lesson needs none of it

WORKSPACE = files.ROOT / "workspace"
RELEASED = ("labkit", "course", "data")  # folders that a class gets beside the lessons
_STUB = f'raise NotImplementedError("{STUB_SAYS}; then run the check below.")'
_TITLE = re.compile(r"^### Exercise \d+ · (.+)$", re.MULTILINE)
_FACTS = re.compile(r"^\*Difficulty (\d) of 5 · (\d+) minutes(?: · .+)?\*$", re.MULTILINE)
_CHECK = re.compile(r'lab\.check\("([\d.]+)", (\w+)\)')


# lessons ------------------------------------------------------------------------------------------


def all_lessons() -> list[Path]:
    """The lesson notebooks, in order."""
    return sorted(files.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def find(name: str) -> Path:
    """The lesson called "3", "03" or "03_structured_pruning_cnns"; InputError names the lessons that there are."""
    lessons = all_lessons()
    for path in lessons:
        if name in (path.stem, path.name) or (name.isdecimal() and int(name) == int(path.stem[:2])):
            return path
    numbers = ", ".join(path.stem[:2] for path in lessons) or f"none in {files.NOTEBOOKS}"
    raise InputError(f"There is no lesson {name}; give the number of one that exists: {numbers}.")


def read(path: Path) -> "NotebookNode":
    """The lesson's notebook; DataError where it is damaged."""
    import nbformat

    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        [cell.source for cell in notebook.cells]
    except (OSError, ValueError, LookupError, AttributeError, TypeError, nbformat.ValidationError):
        raise DataError(f"{path.name} is not a notebook that can be read; get it from the repository again.") from None
    return notebook


def title(notebook: "NotebookNode") -> str:
    """The first heading of the first cell."""
    return notebook.cells[0].source.partition("\n")[0].lstrip("# ")


def tags(cell: "NotebookNode") -> Sequence[str]:
    return cell.metadata.get("tags", [])


def sections(notebook: "NotebookNode") -> Iterator[tuple[str, str]]:
    """(cell id, nearest heading at or above the cell) for each cell."""
    heading = "before the first heading"
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (match := re.search(r"^#{1,3} +(.+)$", cell.source, re.MULTILINE)):
            heading = match[1].strip()
        yield cell.get("id", ""), heading


def tidied(notebook: "NotebookNode") -> "NotebookNode":
    """A copy fit for keeping: no injected cell, counts 1..n, and no metadata that changes from run to run; ids stay.

    What is tagged hide-input is folded in JupyterLab too.

    The record that the last cell carries loses samples and the rows of tables: they stand in the record's own file.
    """
    import nbformat

    from labkit.lesson.records import MIME

    tidy = nbformat.from_dict(notebook)
    tidy.cells = [cell for cell in tidy.cells if "injected-parameters" not in tags(cell)]
    for volatile in ("papermill", "widgets"):
        tidy.metadata.pop(volatile, None)
    tidy.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    tidy.metadata.language_info = {"name": "python"}
    for cell in tidy.cells:
        for volatile in ("papermill", "execution", "collapsed"):
            cell.metadata.pop(volatile, None)
        if cell.metadata.get("tags") == []:
            del cell.metadata["tags"]
        if cell.cell_type == "code" and "hide-input" in tags(cell):  # the site's word for it, and JupyterLab's
            cell.metadata["jupyter"] = {"source_hidden": True}
    executed = [cell for cell in tidy.cells if cell.cell_type == "code" and cell.execution_count]
    for number, cell in enumerate(executed, start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            for measurement in output.get("data", {}).get(MIME, {}).get("measurements", []):
                for long in ("detail", "rows"):
                    measurement.pop(long, None)
    return tidy


# exercises ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exercise:
    """One exercise. points: its difficulty, 1 to 5. function: what the check takes. source: the answered cell."""

    id: str
    title: str
    points: int
    minutes: int
    hints: int
    function: str
    cell_id: str
    source: str

    @property
    def stub(self) -> str:
        return without_solution(self.source)

    @property
    def solution(self) -> str:
        return without_markers(self.source)


def exercises(notebook: "NotebookNode") -> list[Exercise]:
    """The exercises of a lesson, in order; InputError, naming the cell, where one lacks its card or its check."""
    places = [place for place, cell in enumerate(notebook.cells) if "exercise" in tags(cell)]
    return [_exercise(notebook.cells, place) for place in places]


def exercise(exercise_id: str) -> Exercise:
    """The exercise "03.1" of the course; InputError names the exercises that the lesson has."""
    number, dot, k = exercise_id.partition(".")
    if not dot:
        raise InputError(f"{exercise_id!r} is no exercise; give lesson and number, like 03.1.")
    by_id = {task.id: task for task in exercises(read(find(number)))}
    if (full_id := f"{number.zfill(2)}.{k}") not in by_id:
        listed = ", ".join(by_id) or "none"
        raise InputError(f"There is no exercise {exercise_id}; lesson {number.zfill(2)} has {listed}.")
    return by_id[full_id]


def without_solution(source: str) -> str:
    """The cell with each block between the markers replaced by a raise at the block's own indentation."""
    markers = [line.strip() for line in source.splitlines() if line.strip() in MARKERS]
    if markers != [*MARKERS] * (len(markers) // 2):
        raise InputError(f"A marker stands alone in an exercise; each `{BEGIN}` needs one `{END}` after it.")
    return re.sub(rf"^([ \t]*){BEGIN}.*?{END}[ \t]*$", rf"\1{_STUB}", source, flags=re.MULTILINE | re.DOTALL)


def _exercise(cells: "Sequence[NotebookNode]", place: int) -> Exercise:
    cell_id = cells[place].get("id", f"cell {place + 1}")
    card = cells[place - 1].source if place and cells[place - 1].cell_type == "markdown" else ""
    heading, facts = _TITLE.search(card), _FACTS.search(card)
    if not heading or not facts:
        raise InputError(
            f"{cell_id} has no card above it; write `### Exercise 1 · Its title` and "
            "`*Difficulty 2 of 5 · 10 minutes*`."
        )
    below = cells[place + 1] if place + 1 < len(cells) else None
    check = _CHECK.fullmatch(below.source.strip()) if below and "check" in tags(below) else None
    if check is None:
        raise InputError(f'{cell_id} has no check below it; write `lab.check("NN.1", its_function)` tagged `check`.')
    hints = card.count("<summary>Hint")
    points, minutes = map(int, facts.groups())
    return Exercise(check[1], heading[1].strip(), points, minutes, hints, check[2], cell_id, cells[place].source)


# copies without answers ---------------------------------------------------------------------------


def student_copy(notebook: "NotebookNode", name: str = "") -> "NotebookNode":
    """A new notebook for the learner of lesson `name`: stubs for answers, no outputs; ids and tags stay.

    It carries a hash of what a learner would see differ (the cells' kinds and sources), so that a lesson that has
    changed since is noticed.
    """
    copy = tidied(notebook)
    for cell in copy.cells:
        if cell.cell_type == "code":
            cell.source = without_solution(cell.source)
            cell.outputs, cell.execution_count = [], None
    visible = json.dumps([(cell.cell_type, cell.source) for cell in copy.cells])
    copy.metadata.labkit = {"lesson": name, "source": hashlib.sha256(visible.encode()).hexdigest()[:16]}
    return copy


def prepare(name: str) -> Path:
    """The learner's copy of lesson `name`, made where there is none yet: one that exists is never written."""
    import nbformat

    lesson = find(name)
    copy = WORKSPACE / lesson.name
    if not copy.exists():
        text = nbformat.writes(student_copy(read(lesson), lesson.stem))
        with files.refused(f"The copy cannot be written to {WORKSPACE}"):
            files.write_text(copy, text + "\n")
            _copy_glossary(WORKSPACE)
    return copy


def has_changed(copy: Path) -> bool:
    """Whether the lesson has other cells now than when the copy was made; False where the copy does not say of what."""
    try:
        made_of = json.loads(copy.read_text(encoding="utf-8"))["metadata"]["labkit"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # damaged, or saved by an editor that drops metadata
    return made_of != student_copy(read(find(copy.stem))).metadata.labkit.source


def put_aside(name: str) -> Path | None:
    """Rename the copy of lesson `name`, if there is one, to <lesson>.<today>.ipynb, so that a new one can be made."""
    copy = WORKSPACE / find(name).name
    if not copy.exists():
        return None
    stem = f"{copy.stem}.{date.today().isoformat()}"
    names = (copy.with_name(f"{stem}{f'.{number}' if number > 1 else ''}.ipynb") for number in count(1))
    aside = next(path for path in names if not path.exists())
    with files.refused(f"{copy} cannot be renamed"):
        copy.rename(aside)
    return aside


def release(folder: Path) -> list[Path]:
    """Fill an empty or new `folder` for a class: every lesson without answers, an index, labkit and its data.

    The worked answers, which a lesson goes on with where the learner has none, are in notebooks/answers.json, packed.
    The folder stands by itself: a notebook in it imports the labkit beside it, in JupyterLab as on a hosted service.
    Returns the lessons' copies. InputError where the folder holds something, lies inside what is copied or cannot be
    written, DataError where a lesson is damaged; it appears whole or not at all.
    """
    lessons = all_lessons()
    if not lessons:
        raise InputError(f"There is no lesson to release in {files.NOTEBOOKS}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty, and handed-in work is never overwritten; give a new folder.")
    if any(folder.resolve().is_relative_to(files.ROOT / part) for part in RELEASED):
        raise InputError(f"{folder} lies inside what is released, which would copy into itself; give another folder.")
    nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    with (
        files.refused(f"The release cannot be written to {nearest}", "free some space or give another folder"),
        tempfile.TemporaryDirectory(prefix=".release-", dir=nearest) as work,
    ):
        partial = Path(work) / "class"
        _fill(partial, {path.name: read(path) for path in lessons})
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.replace(folder)
    return [folder / path.name for path in lessons]


def _fill(folder: Path, sources: "dict[str, NotebookNode]") -> None:
    import nbformat

    for name, source in sources.items():
        files.write_text(folder / name, nbformat.writes(student_copy(source, Path(name).stem)) + "\n")
    rows, answers = [], {}
    for name, source in sources.items():
        tasks = exercises(source)
        answers |= {task.id: task.solution for task in tasks}
        points, minutes = sum(task.points for task in tasks), sum(task.minutes for task in tasks)
        rows.append(f"| [{title(source)}]({name}) | {len(tasks)}, {points} points | {minutes} |")
    files.write_text(folder / "README.md", _INDEX.format(rows="\n".join(rows)))
    litter = shutil.ignore_patterns("__pycache__", "*.pyc", ".ipynb_checkpoints")
    for part in RELEASED:
        shutil.copytree(files.ROOT / part, folder / part, ignore=litter)
    shutil.copytree(files.CHECKS, folder / "notebooks" / files.CHECKS.name, ignore=litter)
    shutil.copy(files.NOTEBOOKS / "claims.toml", folder / "notebooks")
    _copy_glossary(folder)
    files.write_text(folder / "notebooks" / worked.PACKED, worked.packed(answers) + "\n")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(files.ROOT / name, folder)


def _copy_glossary(folder: Path) -> None:
    """Beside the copies of lessons, which link it."""
    for page in files.NOTEBOOKS.glob("glossary.md"):
        shutil.copy(page, folder)


def open_in_jupyterlab(notebook: Path, *, browser: bool = True) -> NoReturn:
    """Become JupyterLab on `notebook`: signals and the exit code are its own, so that whatever ends this ends it."""
    command = [
        sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={notebook.parent}",
        f"--LabApp.default_url=/lab/tree/{notebook.name}",
        "--LabApp.extension_manager=readonly",  # the other one asks a registry
    ]  # fmt: skip
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # in a container there is often no other user
        command.append("--allow-root")
    # course/jupyter: no news are asked for, and kernels encrypt what they say over TCP, of which ipykernel else warns
    settings = [str(Path(__file__).with_name("jupyter")), os.environ.get("JUPYTER_CONFIG_PATH")]
    environment = {**os.environ, "JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, settings))}
    sys.stdout.flush()
    os.chdir(notebook.parent)
    os.execve(sys.executable, command, environment)


_INDEX = """# Inference optimisation, measured: lessons to work on

| lesson | exercises | their minutes |
|---|---|---|
{rows}

**To begin**, in this folder, once: `pip install -e ".[course]"` installs what the lessons import, and `labkit data
fetch` brings the small models; nothing after that needs a network. Then `jupyter lab`, or VS Code with the Python that
you installed it in. On Colab, Kaggle or another server of notebooks upload the whole folder, and run this cell before a
lesson's first one, with the folder's path: `%run path/to/course/hosted.py`.

**To answer** an exercise, replace the line `raise NotImplementedError(...)` and run the cell and the check below it. A
check says everything that is wrong, as often as you like, and does not tell the answer. You may add cells: an answer
may use the functions, imports and constants of added cells, but not values that other cells of the lesson computed. It
cannot write files.

**To go on** without an answer is fine: the lesson then continues with the worked one, and says so.

**To hand in**, send the notebooks under the names that they have. Only sources are graded, so outputs may be cleared.
"""
