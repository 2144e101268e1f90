"""A lesson as a program: checked parameters in, a result folder out.

`prepare` checks the parameters and starts no process; `run` executes the lesson in a separate process (course.watch,
course.child) and hands the result to the store (course.store).

    >>> from pathlib import Path
    >>> from course import notebooks, run, store
    >>> job = run.prepare(notebooks.find("01"), {"PRESET": "smoke", "SEED": "7"}, out=Path("runs"))
    >>> job.parameters
    {'PRESET': 'smoke', 'SEED': 7, 'RESULTS_DIR': '.'}
    >>> result = store.finished(job) or run.run(job)  # doctest: +SKIP
    >>> result.notebook.name  # doctest: +SKIP
    '01_where_does_the_time_go.ipynb'

A run ended by a full disk, a killed process or Ctrl-C leaves no file and no process behind.
"""

import functools
import json
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from course import store, watch
from course.failure import Failure
from course.store import ALWAYS, Job, Run
from labkit import files
from labkit.errors import DataError, InputError
from labkit.lesson import parameters


def prepare(notebook: Path, values: Mapping[str, Any], out: Path = Path("runs"), label: str = "") -> Job:
    """Check the parameters of a lesson, without writing a file or starting a process.

    notebook  path of the lesson
    values    parameters by name, as values or as text (see `labkit.lesson.parameters.bind`)
    out       folder of all results
    label     name of the point in a sweep

    Returns the job, with the parameters PRESET and RESULTS_DIR, and all values different from the lesson's. Raises
    InputError for an unknown parameter, a value out of range or a missing device, DataError for a notebook missing or
    damaged.
    """
    source, declared = load(notebook)
    if values.get("RESULTS_DIR", ".") != ".":
        raise InputError("RESULTS_DIR is set for each run; choose the folder of all results with --out.")
    defaults = {name: parameter.default for name, parameter in declared.items()}
    asked = {"PRESET": defaults.get("PRESET"), **values, "RESULTS_DIR": "."}
    bound = parameters.bind(declared, asked)
    device = str(bound.get("DEVICE") or defaults.get("DEVICE") or "auto")
    _require_device(device)
    differing = {name: value for name, value in bound.items() if name in ALWAYS or value != defaults[name]}
    return Job(notebook.stem, source, differing, device, out.absolute(), label)


def takes_device(notebook: Path, device: str) -> bool:
    """Return False for a lesson that times one kind of device only, if `device` is another."""
    _, declared = load(notebook)
    allowed = declared["DEVICE"].allowed if "DEVICE" in declared else ()
    return not allowed or device in allowed


def _require_device(device: str) -> None:
    """Raise InputError if the machine lacks the device; torch, slow to import, is asked only if needed."""
    needs_no_torch = device == "cpu" or (device == "auto" and not os.environ.get("LABKIT_DEVICE"))
    if not needs_no_torch:
        from labkit.timing.machine import torch_device

        torch_device(device)


def load(notebook: Path) -> tuple[bytes, dict[str, parameters.Parameter]]:
    """Read a lesson's bytes and parameters; DataError if the notebook is missing, damaged, or of a different format."""
    try:
        return _parsed(notebook.read_bytes())
    except OSError as error:
        reason = error.strerror
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        reason = "it is damaged, or no notebook of nbformat 4"
    raise DataError(f"The lesson {notebook} cannot be read ({reason}); take it anew from the course's repository.")


@functools.lru_cache(maxsize=2)  # all points of a sweep share one
def _parsed(source: bytes) -> tuple[bytes, dict[str, parameters.Parameter]]:
    return source, parameters.read(json.loads(source))  # nbformat, whose import takes a second, adds nothing here


def run(
    job: Job,
    *,
    env: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
    progress: bool = False,
) -> Run:
    """Execute a lesson and keep the result: the executed notebook, record.json and run.json.

    job       the lesson, from `prepare`
    env       environment variables for the lesson, such as CUDA_VISIBLE_DEVICES; the variables are not part of the
              job's folder name, and the device asked for is looked for without them
    stop      an event by which a thread ends the run; KeyboardInterrupt is raised
    progress  True to show on stderr the cell under way

    Returns the run. An error of the lesson is not raised but returned in `.error`; a failed run never replaces a good
    run. Raises DataError if the disk takes no more. After any exception, KeyboardInterrupt included, no process is
    left, no part of the run is kept, and older results are whole. Safe in threads.
    """
    home = job.out / job.lesson
    with files.full_disk_told(home), store.partial_folder(home) as partial, ThreadPoolExecutor(1) as beside:
        place = beside.submit(job.folder)  # imports torch, while the kernel starts
        began = time.monotonic()
        execute = functools.partial(watch.execute, job, partial, env=env or {}, stop=stop, progress=progress)
        error, peak = execute()
        if error and _kernel_did_not_start(error):
            error, peak = execute()  # most often the kernel met a port in use
        good = place.result()
        folder = store.failed_folder(good) if error else good
        result = Run(job.lesson, folder, job.parameters, time.monotonic() - began, peak, error)
        store.keep(partial, result)
    return result


def _kernel_did_not_start(error: Failure) -> bool:
    return error.cell is None and error.name != "RunTimeout"
