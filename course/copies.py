"""Copies of the lessons without answers: a learner's own in workspace/, opened in JupyterLab; a class's in a folder.

A copy that exists is somebody's work: it is opened and never written to. It carries a hash of the lesson that it was
made of, so that a lesson that changed since is noticed. Grading is in course.grading, what an exercise is in exercises.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import date
from pathlib import Path

import nbformat

from course import exercises, lessons
from course.exercises import without_solution
from labkit import files
from labkit.errors import InputError

WORKSPACE = files.ROOT / "workspace"


def student_copy(notebook: nbformat.NotebookNode, name: str = "") -> nbformat.NotebookNode:
    """A new notebook for the learner of lesson `name`: stubs for answers, no outputs; ids and tags stay."""
    copy = lessons.tidied(notebook)
    for cell in copy.cells:
        if cell.cell_type != "code":
            continue
        cell.source = without_solution(cell.source)
        cell.outputs, cell.execution_count = [], None
    copy.metadata.labkit = {"lesson": name, "source": _source_hash(copy)}
    return copy


def prepare(name: str, *, folder: Path = WORKSPACE, notebooks: Path | None = None) -> Path:
    """The learner's copy of lesson `name` in `folder`, made where there is none yet."""
    lesson = lessons.find(name, notebooks)
    own = folder / lesson.name
    if not own.exists():
        text = nbformat.writes(student_copy(nbformat.read(lesson, as_version=4), lesson.stem))
        try:
            lessons.write(own, text + "\n")
        except OSError as error:
            raise InputError(
                f"The copy cannot be written to {folder} ({error.strerror}); mend that, then again."
            ) from None
    return own


def has_changed(own: Path, *, notebooks: Path | None = None) -> bool:
    """Whether the lesson has other cells now than when the copy was made; False where the copy does not say of what."""
    try:
        made_of = json.loads(own.read_text(encoding="utf-8"))["metadata"]["labkit"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return False  # damaged, or saved by an editor that drops metadata
    lesson = lessons.find(own.stem, notebooks)
    return made_of != student_copy(nbformat.read(lesson, as_version=4)).metadata.labkit.source


def put_aside(name: str, *, folder: Path = WORKSPACE, notebooks: Path | None = None) -> Path | None:
    """Rename the copy of lesson `name`, if there is one, to <lesson>.<today>.ipynb, so that a new one can be made."""
    own = folder / lessons.find(name, notebooks).name
    if not own.exists():
        return None
    stem = f"{own.stem}.{date.today().isoformat()}"
    names = (f"{stem}{number}.ipynb" for number in ("", *(f".{n}" for n in range(2, 1000))))
    kept = next(place for one in names if not (place := own.with_name(one)).exists())
    try:
        own.rename(kept)
    except OSError as error:
        raise InputError(f"{own} cannot be renamed ({error.strerror}); mend that, then again.") from None
    return kept


def release(folder: Path, *, notebooks: Path | None = None) -> list[Path]:
    """Fill an empty or new `folder` for a class: every lesson without answers, an index, labkit and its data.

    The folder stands by itself: a notebook in it imports the labkit beside it, in JupyterLab as on a hosted service.
    Returns the lessons' copies. InputError where the folder holds something; it appears whole or not at all.
    """
    found = lessons.all_lessons(notebooks)
    if not found:
        raise InputError(f"There is no lesson to release in {notebooks or files.NOTEBOOKS}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty, and handed-in work is never overwritten; give a new folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"Nothing can be written to {folder.parent} ({error.strerror}); give another folder."
        ) from None
    try:
        sources = {path.name: nbformat.read(path, as_version=4) for path in found}
        for name, source in sources.items():
            lessons.write(partial / name, nbformat.writes(student_copy(source, Path(name).stem)) + "\n")
        lessons.write(partial / "README.md", _index(sources))
        _add_what_lessons_import(partial)
        partial.chmod(0o755)  # mkdtemp's folders are private
        with suppress(FileNotFoundError):
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [folder / path.name for path in found]


def open_in_jupyterlab(notebook: Path, *, browser: bool = True) -> int:
    """Run JupyterLab on `notebook` until it is closed; its exit code."""
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={notebook.parent}"]
    command.append(f"--LabApp.default_url=/lab/tree/{notebook.name}")
    command.append("--LabApp.extension_manager=readonly")  # the other one asks a registry
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # in a container there is often no other user
        command.append("--allow-root")
    quiet = [str(Path(__file__).with_name("jupyter")), os.environ.get("JUPYTER_CONFIG_PATH")]  # asks for no news
    environment = {**os.environ, "JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, quiet))}
    return subprocess.call(command, cwd=notebook.parent, env=environment)


def _source_hash(copy: nbformat.NotebookNode) -> str:
    """Sixteen digits of what a learner would see differ: the cells' kinds and sources, in order."""
    seen = [(cell.cell_type, cell.source) for cell in copy.cells]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _add_what_lessons_import(folder: Path) -> None:
    """labkit, its data, the guide's claims and what pip needs, laid out so that labkit finds them from its place."""
    litter = shutil.ignore_patterns("__pycache__", "*.pyc", ".ipynb_checkpoints")
    for part in (files.ROOT / "labkit", files.ROOT / "course", files.DATA):
        shutil.copytree(part, folder / part.name, ignore=litter)
    (folder / "notebooks").mkdir()
    shutil.copy(files.NOTEBOOKS / "claims.toml", folder / "notebooks")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(files.ROOT / name, folder)


def _index(sources: dict[str, nbformat.NotebookNode]) -> str:
    rows = []
    for name, source in sources.items():
        tasks = exercises.read(source)
        title = source.cells[0].source.partition("\n")[0].lstrip("# ")
        points = f"{len(tasks)}, {sum(task.points for task in tasks)} points"
        rows.append(f"| [{title}]({name}) | {points} | {sum(task.minutes for task in tasks)} |")
    return _INDEX.format(rows="\n".join(rows))


_INDEX = """# Inference optimisation, measured: lessons to work on

| lesson | exercises | their minutes |
|---|---|---|
{rows}

**To begin**, in this folder, once: `pip install -e .[course]` installs what the lessons import, and `labkit data fetch`
brings the small models; nothing after that needs a network. Then `jupyter lab`. On a hosted service upload the whole
folder, run `%pip install -e .[course]` and `!labkit data fetch` in a notebook, and restart the kernel.

**To answer** an exercise, replace the line `raise NotImplementedError(...)` and run the cell and the check below it. A
check says everything that is wrong, as often as you like, and does not tell the answer. You may add cells: an answer
may use the functions and imports of added cells, but not values that other cells of the lesson computed.

**To hand in**, send the notebooks under the names that they have. Only sources are graded, so outputs may be cleared.
"""
