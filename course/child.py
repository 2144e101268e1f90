"""The process of a run: executes a notebook with papermill in the working folder, and tells how the run ended.

Started by course.watch as `python -m course.child NOTEBOOK PARAMETERS LIMITS TERMINALS`, the last three as JSON. The
process leaves the executed notebook in OUTPUT, and {"error": [name, message] or null, "peak": bytes} in END.
"""

import json
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course import process_tree
from labkit import files

if TYPE_CHECKING:
    from nbformat import NotebookNode

OUTPUT, END = "executed.ipynb", "end.json"


def main(notebook: str, values: Mapping[str, Any], limits: Mapping[str, int], terminals: Sequence[int]) -> None:
    """Execute a notebook in the working folder, and write to END how the run ended.

    notebook   file name of the notebook
    values     parameters set in the notebook
    limits     options of papermill: start_timeout, autosave_cell_every, seconds
    terminals  file descriptors to show progress on

    If the disk takes no more, the lesson is not at fault: the process ends with the error's number as exit code.
    """
    threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()
    try:
        error = _execute(notebook, values, limits, terminals)
        end = json.dumps({"error": error, "peak": _peak_memory_of_kernel()})
        Path(END).write_text(end, encoding="utf-8")
    except OSError as error:
        os._exit(error.errno if error.errno in files.UNWRITABLE else 1)


def _peak_memory_of_kernel() -> int:
    """Peak resident bytes of the largest process already ended, the kernel."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _end_with_parent(parent: int) -> None:
    """End the kernel, the folder and the process itself, once the parent waiting for the result is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    this, *descendants = process_tree.with_descendants(os.getpid())
    process_tree.kill(descendants)
    shutil.rmtree(os.getcwd(), ignore_errors=True)
    this.kill()


def _execute(
    notebook: str, values: Mapping[str, Any], limits: Mapping[str, int], terminals: Sequence[int]
) -> tuple[str, str] | None:
    """Execute the notebook.

    Returns name and message of the exception at the end of the run, None for a run without. Raises OSError if the disk
    takes no more. The exception decides: papermill's metadata calls a dead kernel "completed".
    """
    sys.modules.setdefault("pyarrow.fs", None)  # papermill would import it, to read notebooks from Hadoop
    import papermill
    from nbclient.exceptions import DeadKernelError

    try:
        _run_papermill(notebook, values, limits, terminals)
    except papermill.exceptions.PapermillExecutionError as error:
        return error.ename, error.evalue.strip()
    except DeadKernelError:
        return "DeadKernel", "the kernel was killed, most often because memory ran out"
    except Exception as error:
        if getattr(error, "errno", None) in files.UNWRITABLE:
            raise
        return type(error).__name__, str(error)
    return None


def _run_papermill(
    notebook: str, values: Mapping[str, Any], limits: Mapping[str, int], terminals: Sequence[int]
) -> None:
    import nbformat
    import papermill
    from traitlets.config import Config

    from course.notebooks import sections

    progress = _Progress(notebook[:2], dict(sections(nbformat.read(notebook, as_version=4))), terminals)
    papermill.engines.papermill_engines.register("course", _engine())
    papermill.execute_notebook(
        notebook,
        OUTPUT,
        values,
        engine_name="course",
        kernel_name="python3",
        language="python",
        progress_bar=False,
        **limits,
        kernel_manager_class=kernel_manager_class(),
        # all outputs have come by then, and one ipykernel in twelve takes 3 s over ending by itself
        shutdown_kernel="immediate",
        on_cell_start=progress.cell_started,
        # ipykernel 7 warns of each kernel that talks over plain TCP
        config=Config({"KernelManager": {"transport_encryption": "auto"}}),
    )


class _Progress:
    """A line on each terminal with the cell under way; a stream without a terminal gets a line per section."""

    def __init__(self, lesson: str, sections: Mapping[str, str], terminals: Sequence[int]) -> None:
        """Arguments: the lesson's number, cell id -> section, file descriptors to write to."""
        self.lesson = lesson
        self.sections = sections
        self.terminals = terminals
        self.began = time.monotonic()
        self.section = ""

    def cell_started(self, cell: "NotebookNode", cell_index: int) -> None:
        """Show a cell. The cell injected by papermill counts, and belongs to the section before."""
        section = self.sections.get(cell.get("id"), self.section)
        seconds = time.monotonic() - self.began
        cell_number = f"cell {cell_index:2}/{len(self.sections)}"
        line = f"{self.lesson}  {cell_number}  {seconds:4.0f} s  {section}"
        for terminal in self.terminals:
            if os.isatty(terminal):
                width = os.get_terminal_size(terminal).columns
                os.write(terminal, f"\r\033[K{line[: width - 1]}".encode())
            elif section != self.section:
                os.write(terminal, f"{line}\n".encode())
        self.section = section


def _engine() -> type:
    """Make the engine for papermill that saves once per code cell.

    papermill saves before and after each cell, a tenth of a short lesson's time. A notebook saved when a code cell
    starts holds all outputs so far, and names the cell if the kernel dies in the cell.
    """
    from papermill.engines import NBClientEngine, NotebookExecutionManager

    class SavesAtCellStart(NotebookExecutionManager):
        _saving = True

        def cell_start(self, cell: Any, *args: Any, **kwargs: Any) -> None:
            with self._without_saving():
                super().cell_start(cell, *args, **kwargs)
            if cell.cell_type == "code":
                self.save()

        def cell_complete(self, *args: Any, **kwargs: Any) -> None:
            with self._without_saving():
                super().cell_complete(*args, **kwargs)

        def save(self, **kwargs: Any) -> None:
            if self._saving:
                super().save(**kwargs)

        @contextmanager
        def _without_saving(self) -> Iterator[None]:
            self._saving = False
            try:
                yield
            finally:
                self._saving = True

    class CourseEngine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: NotebookExecutionManager, *args: Any, **kwargs: Any) -> Any:
            nb_man.__class__ = SavesAtCellStart  # papermill makes the manager itself, and asks nobody of which class
            return super().execute_managed_notebook(nb_man, *args, **kwargs)

    return CourseEngine


def kernel_manager_class(*, blocking: bool = False) -> type:
    """Make a class of kernel managers with the current interpreter as `python3`, ignoring installed kernelspecs.

    blocking  True for jupyter_client's blocking manager, False for the asynchronous manager
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager, KernelManager
    from traitlets import default

    class ThisInterpreter(KernelManager if blocking else AsyncKernelManager):
        @default("kernel_spec_manager")
        def _only_the_native_kernel(self) -> KernelSpecManager:
            return KernelSpecManager(kernel_dirs=[])

    return ThisInterpreter


if __name__ == "__main__":
    main(sys.argv[1], *map(json.loads, sys.argv[2:]))
    os._exit(0)  # all is said and written; taking papermill's modules down again would cost most of a second
