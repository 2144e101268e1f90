"""The lesson notebooks as files: finding, reading, exercises, copies without answers for a learner or a class.

An exercise is three cells: a card in Markdown, a code cell tagged `exercise`, and a code cell tagged `check` with the
call `lab.check("NN.k", function)`. The answer stands between nbgrader's markers. Lessons are executed by course.run and
graded by course.grade. Each function reads only the lessons needed, so a damaged lesson hinders no work on the rest.
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
from labkit.lesson.failures import STUB_SAYS
from labkit.lesson.worked import BEGIN, END, MARKERS, without_markers

if TYPE_CHECKING:
    from nbformat import NotebookNode  # takes a second to import, and finding a lesson needs none of it

WORKSPACE = files.ROOT / "workspace"
RELEASED = ("labkit", "course", "data")  # folders that a class gets beside the lessons
_STUB = f'raise NotImplementedError("{STUB_SAYS}; then run the check below.")'
_TITLE = re.compile(r"^### Exercise \d+ · (.+)$", re.MULTILINE)
_FACTS = re.compile(r"^\*Difficulty (\d) of 5 · (\d+) minutes(?: · .+)?\*$", re.MULTILINE)
WIDGET = "application/vnd.jupyter.widget-view+json"
_HEADING = re.compile(r"^#{1,3} +(.+)$", re.MULTILINE)
_CHECK = re.compile(r'lab\.check\("([\d.]+)", (\w+)\)')


# lessons ------------------------------------------------------------------------------------------


def all_lessons() -> list[Path]:
    """List the lesson notebooks, in order."""
    return sorted(files.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))


def find(name: str) -> Path:
    """Find the lesson called "3", "03" or "03_structured_pruning_cnns"; an InputError names the existing lessons."""
    lessons = all_lessons()
    for path in lessons:
        is_its_number = name.isdecimal() and int(name) == int(path.stem[:2])
        if is_its_number or name in (path.stem, path.name):
            return path
    numbers = ", ".join(path.stem[:2] for path in lessons) or f"none in {files.NOTEBOOKS}"
    raise InputError(f"There is no lesson {name}; give the number of one that exists: {numbers}.")


def read(path: Path) -> "NotebookNode":
    """Read a lesson's notebook; DataError if the file is damaged."""
    import nbformat

    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        [cell.source for cell in notebook.cells]  # a cell without a source is damage too
    except (OSError, ValueError, LookupError, AttributeError, TypeError, nbformat.ValidationError):
        raise DataError(f"{path.name} is not a notebook that can be read; get it from the repository again.") from None
    return notebook


def title(notebook: "NotebookNode") -> str:
    """Read the title of a lesson: the heading at the top of the first cell."""
    first_line, _, _ = notebook.cells[0].source.partition("\n")
    return first_line.lstrip("# ")


def tags(cell: "NotebookNode") -> Sequence[str]:
    return cell.metadata.get("tags", [])


def sections(notebook: "NotebookNode") -> Iterator[tuple[str, str]]:
    """Yield (cell id, nearest heading in or above the cell) for each cell."""
    heading = "before the first heading"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            match = _HEADING.search(cell.source)
            if match:
                heading = match[1].strip()
        yield cell.get("id", ""), heading


def tidied(notebook: "NotebookNode") -> "NotebookNode":
    """Make a copy fit for keeping: the same after each run of the lesson, apart from the outputs' contents.

    The copy has no cell injected by papermill, execution counts from 1, and no metadata of a run; cell ids stay. Cells
    tagged hide-input are folded in JupyterLab too. The record in the last cell loses samples and rows of tables, which
    stand in the record's file. Widgets go: without the kernel that made them, nothing can draw them.
    """
    import nbformat

    tidy = nbformat.from_dict(notebook)
    tidy.cells = [cell for cell in tidy.cells if "injected-parameters" not in tags(cell)]
    for volatile in ("papermill", "widgets"):
        tidy.metadata.pop(volatile, None)
    tidy.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    tidy.metadata.language_info = {"name": "python"}
    for cell in tidy.cells:
        _tidy_metadata_(cell)
    executed = [cell for cell in tidy.cells if cell.cell_type == "code" and cell.execution_count]
    for number, cell in enumerate(executed, start=1):
        cell.execution_count = number
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
            _shorten_record_(output)
    return tidy


def _tidy_metadata_(cell: "NotebookNode") -> None:
    for volatile in ("papermill", "execution", "collapsed"):
        cell.metadata.pop(volatile, None)
    if cell.metadata.get("tags") == []:
        del cell.metadata["tags"]
    if cell.cell_type == "code" and "hide-input" in tags(cell):  # the site's word for it, and JupyterLab's
        cell.metadata["jupyter"] = {"source_hidden": True}


def _shorten_record_(output: "NotebookNode") -> None:
    """Remove samples and rows from the run record in a cell's output, if any."""
    from labkit.lesson.records import MIME

    record = output.get("data", {}).get(MIME, {})
    for measurement in record.get("measurements", []):
        measurement.pop("detail", None)
        measurement.pop("rows", None)


# exercises ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exercise:
    """An exercise.

    id        lesson and number, "03.1"
    title     title
    points    difficulty, 1 to 5
    minutes   time for a learner
    hints     number of hints
    function  name of the function given to the check
    cell_id   id of the answer's cell
    source    source of the answer's cell, with the worked answer between markers
    """

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
        """The cell as a learner gets it."""
        return without_solution(self.source)

    @property
    def solution(self) -> str:
        """The cell with the worked answer, without markers."""
        return without_markers(self.source)


def exercises(notebook: "NotebookNode") -> list[Exercise]:
    """List the exercises of a lesson, in order; InputError for an exercise without a card above or a check below."""
    places = [place for place, cell in enumerate(notebook.cells) if "exercise" in tags(cell)]
    return [_exercise(notebook.cells, place) for place in places]


def exercise(exercise_id: str) -> Exercise:
    """Find the exercise "03.1" of the course; an InputError names the exercises of the lesson."""
    number, dot, k = exercise_id.partition(".")
    if not dot:
        raise InputError(f"{exercise_id!r} is no exercise; give lesson and number, like 03.1.")
    by_id = {task.id: task for task in exercises(read(find(number)))}
    full_id = f"{number.zfill(2)}.{k}"
    if full_id not in by_id:
        listed = ", ".join(by_id) or "none"
        raise InputError(f"There is no exercise {exercise_id}; lesson {number.zfill(2)} has {listed}.")
    return by_id[full_id]


def without_solution(source: str) -> str:
    """Replace each block between markers by a `raise NotImplementedError`, indented as the block.

    Raises InputError for a marker without a partner.
    """
    lines = [line.strip() for line in source.splitlines()]
    markers = [line for line in lines if line in MARKERS]
    pairs = len(markers) // 2
    if markers != [*MARKERS] * pairs:
        raise InputError(f"A marker stands alone in an exercise; each `{BEGIN}` needs one `{END}` after it.")
    block = rf"^([ \t]*){BEGIN}.*?{END}[ \t]*$"
    return re.sub(block, rf"\1{_STUB}", source, flags=re.MULTILINE | re.DOTALL)


def _exercise(cells: "Sequence[NotebookNode]", place: int) -> Exercise:
    """Read the exercise in cell number `place`, from the cell, the card above and the check below."""
    cell = cells[place]
    cell_id = cell.get("id", f"cell {place + 1}")
    above = cells[place - 1] if place else None
    below = cells[place + 1] if place + 1 < len(cells) else None
    card = above.source if above and above.cell_type == "markdown" else ""
    heading, facts = _TITLE.search(card), _FACTS.search(card)
    if not heading or not facts:
        raise InputError(
            f"{cell_id} has no card above it; write `### Exercise 1 · Its title` and "
            "`*Difficulty 2 of 5 · 10 minutes*`."
        )
    check = _CHECK.fullmatch(below.source.strip()) if below and "check" in tags(below) else None
    if check is None:
        raise InputError(f'{cell_id} has no check below it; write `lab.check("NN.1", its_function)` tagged `check`.')
    return Exercise(
        id=check[1],
        title=heading[1].strip(),
        points=int(facts[1]),
        minutes=int(facts[2]),
        hints=card.count("<summary>Hint"),
        function=check[2],
        cell_id=cell_id,
        source=cell.source,
    )


# copies without answers ---------------------------------------------------------------------------


def student_copy(notebook: "NotebookNode", name: str = "") -> "NotebookNode":
    """Make a learner's copy: stubs for answers, no outputs; ids and tags stay.

    notebook  the lesson
    name      the lesson's name, noted in the copy

    A hash of the cells' kinds and sources is noted too, so that `has_changed` can notice a lesson changed since.
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
    """Find the learner's copy of lesson `name`, or make a first copy; an existing copy is never overwritten."""
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
    """Return True if the lesson's cells have changed since the copy was made; False if the copy has no hash."""
    try:
        made_of = json.loads(copy.read_text(encoding="utf-8"))["metadata"]["labkit"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # damaged, or saved by an editor that drops metadata
    return made_of != student_copy(read(find(copy.stem))).metadata.labkit.source


def put_aside(name: str) -> Path | None:
    """Rename the learner's copy of lesson `name` to <lesson>.<today>.ipynb, which makes room for a new copy.

    Returns the new path, None without a copy.
    """
    copy = WORKSPACE / find(name).name
    if not copy.exists():
        return None
    dated = f"{copy.stem}.{date.today().isoformat()}"
    aside = copy.with_name(f"{dated}.ipynb")
    numbers = count(2)
    while aside.exists():
        aside = copy.with_name(f"{dated}.{next(numbers)}.ipynb")
    with files.refused(f"{copy} cannot be renamed"):
        copy.rename(aside)
    return aside


def release(folder: Path) -> list[Path]:
    """Fill a folder for a class: every lesson without answers, an index, labkit and data.

    folder  an empty or new folder

    Returns the paths of the lessons' copies. The worked answers, for learners who go on without an answer, are packed
    in notebooks/answers.json. The folder stands alone: its notebooks import the labkit beside them, in JupyterLab and
    on hosted services. The folder appears whole or not at all. Raises InputError if the folder is not empty, lies
    inside a copied folder, or cannot be written; DataError if a lesson is damaged.
    """
    lessons = all_lessons()
    if not lessons:
        raise InputError(f"There is no lesson to release in {files.NOTEBOOKS}.")
    is_empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_empty:
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
    """Write a class's folder. `sources` maps file names to lessons."""
    import nbformat

    rows, answers = [], {}
    for name, source in sources.items():
        copy = student_copy(source, Path(name).stem)
        files.write_text(folder / name, nbformat.writes(copy) + "\n")
        tasks = exercises(source)
        answers |= {task.id: task.solution for task in tasks}
        points = sum(task.points for task in tasks)
        minutes = sum(task.minutes for task in tasks)
        link = f"[{title(source)}]({name})"
        rows.append(f"| {link} | {len(tasks)}, {points} points | {minutes} |")
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
    """Copy the glossary beside the copies of lessons, which link to it."""
    for page in files.NOTEBOOKS.glob("glossary.md"):
        shutil.copy(page, folder)


def open_in_jupyterlab(notebook: Path, *, browser: bool = True) -> NoReturn:
    """Replace the process by JupyterLab on `notebook`, so that JupyterLab gets the signals and sets the exit code.

    notebook  path of the notebook
    browser   True to open a browser, False to print the address only
    """
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
