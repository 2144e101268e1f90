"""One run of a lesson seen from inside its own process: papermill, what ended it, and the end of all when nobody waits.

`course.runs` starts it as `python -m course.runner PIPE JOB` in the folder of the result to be, and reads from the pipe
one line a cell and a last one. A run is judged by the exception that ended it: papermill's metadata calls a dead kernel
"completed". The kernel is this interpreter, whatever kernelspecs are installed.
"""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from course import descendants
from labkit.files import UNWRITABLE

OUTPUT = "executed.ipynb"
LONGEST = 2000  # characters of a message: the whole one stands in the notebook
_SMALLER = "take a smaller --preset or smaller parameters (-p), or end what else uses"
ADVICE = {  # what a message or its exception's name holds -> what to do
    r"\bOutOfMemoryError\b|CUDA out of memory": f"{_SMALLER} the GPU",
    r"\bMemoryError\b|DefaultCPUAllocator": f"{_SMALLER} memory",
    r"\[Errno 28\]|No space left on device": "free some space on the disk, or choose another --out",
    r"\bCellTimeout\b": "take a smaller --preset, or look for what the cell waits for",
    r"\bDeadKernel\b": f"{_SMALLER} memory",
    r"Kernel (didn't respond|died before)": "try again when the machine has less to do, and see ./lab doctor",
}

Cell = dict[str, Any]  # the fields of course.runs.Step


def main(pipe: int, job: Mapping[str, Any]) -> None:
    """Execute job["notebook"], which lies in the working folder, telling each cell and at last how it ended."""
    threading.Thread(target=_end_with, args=(job["parent"], job["token"]), daemon=True).start()
    last: list[Cell] = []
    try:
        with os.fdopen(pipe, "w", encoding="utf-8", buffering=1) as events:

            def on_cell(cell: Cell) -> None:
                last[:] = [cell]
                print(json.dumps(cell), file=events)

            end = _end(job, on_cell, last)
            print(json.dumps({"end": {**end, "largest_process": _largest_process()}}), file=events)
    except BrokenPipeError:  # nobody waits for the result
        _leave_nothing(job["token"])


def _end(job: Mapping[str, Any], on_cell: Callable[[Cell], None], last: list[Cell]) -> dict[str, Any]:
    """How the run ended: its error, or what could not be written; both None where it ran through."""
    try:
        error = _execute(job, on_cell)
        if error and not last:  # a kernel that cannot start has most often met a port in use: once more
            error = _execute(job, on_cell)
    except BrokenPipeError:
        raise
    except OSError as error:  # a disk that is full: the lesson is not at fault, and its notebook is not whole
        return {"error": None, "unwritable": [error.errno, error.filename]}
    place = {"cell": last[0]["cell"], "section": last[0]["section"]} if last else {"cell": None, "section": ""}
    return {"error": error and {**failure(*error), **place}, "unwritable": None}


def failure(name: str, message: str) -> dict[str, str]:
    """Name and message of an exception for who reads them: not too long, and with what to do where that is known."""
    advice = next((what for sign, what in ADVICE.items() if re.search(sign, f"{name} {message}")), None)
    short = message if len(message) <= LONGEST else f"{message[:LONGEST]} ..."
    return {"name": name, "message": f"{short.rstrip('. ')}; {advice}" if advice else short}


def _execute(job: Mapping[str, Any], on_cell: Callable[[Cell], None]) -> tuple[str, str] | None:
    """Name and message of what ended the run, None if it ran through. The notebook is replaced when it is whole."""
    import nbformat
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    from course.notebooks import sections

    try:
        source = nbformat.read(job["notebook"], as_version=4)
        cells = len(source.cells)
        place = {
            id_: {"cell": number, "cells": cells, "section": title}
            for number, (id_, title) in enumerate(sections(source), start=1)
        }

        def on_cell_start(cell: nbformat.NotebookNode, cell_index: int) -> None:
            if step := place.get(cell.get("id")):  # the cell that papermill injects has no place in the source
                on_cell(step)

        papermill.execute_notebook(
            job["notebook"],
            OUTPUT,
            job["parameters"],
            kernel_name="python3",
            language="python",
            progress_bar=False,
            start_timeout=job["start_seconds"],
            execution_timeout=job["cell_seconds"],
            kernel_manager_class=this_interpreter(),
            # all outputs have come by then, and one ipykernel in twelve takes 3 s over ending by itself
            shutdown_kernel="immediate",
            on_cell_start=on_cell_start,
            # ipykernel 7 warns of each kernel that talks over plain TCP
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),
        )
    except papermill.exceptions.PapermillExecutionError as error:
        return error.ename, error.evalue.strip() or "no message"
    except DeadKernelError:
        return "DeadKernel", "the kernel was killed, most often because memory ran out"
    except CellTimeoutError:
        return "CellTimeout", f"the cell ran for more than {job['cell_seconds']} s"
    except Exception as error:
        if isinstance(error, BrokenPipeError) or getattr(error, "errno", None) in UNWRITABLE:
            raise
        return type(error).__name__, str(error)
    finally:
        keep_output(job["notebook"])
    return None


def keep_output(notebook: str | os.PathLike) -> None:
    """Put papermill's output, which it does not write atomically, in the place of its source if it is whole."""
    output = os.path.join(os.path.dirname(notebook), OUTPUT)
    try:
        with open(output, encoding="utf-8") as file:
            json.load(file)
        os.replace(output, notebook)
    except (OSError, ValueError):
        with suppress(OSError):
            os.unlink(output)


def this_interpreter(*, blocking: bool = False) -> type:
    """A class of kernel managers whose `python3` is sys.executable, whatever kernelspecs are installed or missing."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager, KernelManager
    from traitlets import default

    class ThisInterpreter(KernelManager if blocking else AsyncKernelManager):
        @default("kernel_spec_manager")
        def _only_the_native_kernel(self) -> KernelSpecManager:
            return KernelSpecManager(kernel_dirs=[])

    return ThisInterpreter


def _largest_process() -> int:
    """Peak resident bytes of the largest process that ended below this one, which is the kernel."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _end_with(parent: int, token: str) -> None:
    """End everything when the process that waits for the result is gone: no kernel, no half result stays behind."""
    while os.getppid() == parent:
        time.sleep(1.0)
    _leave_nothing(token)


def _leave_nothing(token: str) -> None:
    descendants.end(token, but=os.getpid())
    shutil.rmtree(os.getcwd(), ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is said and written; taking papermill's modules down again would cost most of a second
