"""The learner's own copy of a lesson: the notebook without answers and outputs, in workspace/, opened in JupyterLab.

The markers are nbgrader's, so that its tools read the same source. A copy that exists is the learner's work: it is
opened and never written to. Nothing here grades it.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat

from labkit import lessons, paths
from labkit.errors import InputError
from labkit.exercises import without_solution

WORKSPACE = paths.ROOT / "workspace"


def student_copy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A new notebook for the learner: stubs for answers, no outputs, worked solutions folded; ids and tags stay."""
    copy = lessons.tidied(notebook)
    for cell in copy.cells:
        if cell.cell_type != "code":
            continue
        cell.source = without_solution(cell.source)
        cell.outputs, cell.execution_count = [], None
        if "solution" in cell.metadata.get("tags", []):
            cell.metadata.jupyter = {**cell.metadata.get("jupyter", {}), "source_hidden": True}
    return copy


def prepare(name: str, *, folder: Path = WORKSPACE, notebooks: Path | None = None) -> Path:
    """The learner's copy of lesson `name` in `folder`, made where there is none yet."""
    lesson = lessons.find(name, notebooks)
    own = folder / lesson.name
    if not own.exists():
        text = nbformat.writes(student_copy(nbformat.read(lesson, as_version=4)))
        try:
            lessons.write(own, text + "\n")
        except OSError as error:
            raise InputError(
                f"The copy cannot be written to {folder} ({error.strerror}); mend that, then again."
            ) from None
    return own


def open_in_jupyterlab(notebook: Path, *, browser: bool = True) -> int:
    """Run JupyterLab on `notebook` until it is closed; its exit code."""
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={notebook.parent}"]
    command.append(f"--LabApp.default_url=/lab/tree/{notebook.name}")
    # JupyterLab itself would ask the network for updates and news
    command += [
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
    ]
    if not browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # in a container there is often no other user
        command.append("--allow-root")
    return subprocess.call(command, cwd=notebook.parent)
