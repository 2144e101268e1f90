"""The parent of a run's process: starts course.child, watches for a hang, and tells how the run ended.

A lesson is never ended for slowness, only for hanging: no output and no CPU use for IDLE_SECONDS. Whatever happens, no
process of the run is left.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from course import child, failure, process_tree
from course.failure import Failure
from course.store import LOG, Job
from labkit import files

START_SECONDS = 120  # for a kernel to start
IDLE_SECONDS, IDLE_CPU_SECONDS = 300, 3  # a run hangs that has no output in so long, and uses no more of a CPU
LONGEST_SECONDS = 3600  # for a run that has output, or uses the CPU, all along
LOOK_SECONDS = 0.5  # between two looks at the child
# Dask sets this for its workers, and glibc then gives memory back to the system after every tensor, which makes what a
# lesson times slower than it is elsewhere.
DROPPED = "MALLOC_TRIM_THRESHOLD_"


def execute(
    job: Job, folder: Path, *, env: Mapping[str, str], stop: threading.Event | None, progress: bool
) -> tuple[Failure | None, int]:
    """Run a job once, in a separate process and session, with all files in `folder`.

    job       the lesson and its parameters
    folder    an empty folder, for the executed notebook, the lesson's results and LOG
    env       additional environment variables
    stop      an event by which a thread ends the run
    progress  True to show progress on stderr

    Returns the failure, None for a good run, and the peak memory in bytes. Raises KeyboardInterrupt if `stop` is set,
    OSError if the disk takes no more.
    """
    notebook = folder / f"{job.lesson}.ipynb"
    notebook.write_bytes(job.source)
    process = _start(job, folder, notebook.name, env, progress)
    timeout = _wait(process, folder / child.OUTPUT, stop)
    if stop and stop.is_set():
        raise KeyboardInterrupt
    if process.returncode in files.UNWRITABLE:
        raise OSError(process.returncode, os.strerror(process.returncode), str(notebook))
    _keep_executed(folder / child.OUTPUT, notebook)
    if timeout:
        error, peak = ("RunTimeout", timeout), 0
    elif process.returncode:
        error, peak = ("ProcessEnded", _how_it_ended(process.returncode)), 0
    else:
        error, peak = _reported_end(folder / child.END)
    if error is None:
        return None, peak
    name, message = error
    return failure.explain(job.source, notebook, name, message, peak), peak


def _start(job: Job, folder: Path, notebook: str, env: Mapping[str, str], progress: bool) -> subprocess.Popen:
    environment = {**os.environ, **env, "LABKIT_PRESET": job.parameters["PRESET"]}
    environment.pop(DROPPED, None)
    limits = {"start_timeout": START_SECONDS, "autosave_cell_every": IDLE_SECONDS / 10}  # saving is a sign of life
    with open(folder / LOG, "ab") as log, os.fdopen(os.dup(2)) as terminal:
        terminals = [terminal.fileno()] if progress else []
        arguments = [json.dumps(value) for value in (job.parameters, limits, terminals)]
        return subprocess.Popen(
            [sys.executable, "-m", "course.child", notebook, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=terminals,
            start_new_session=True,  # a Ctrl-C in the terminal reaches us alone, and we end the rest
        )


def _wait(process: subprocess.Popen, output: Path, stop: threading.Event | None) -> str:
    """Wait for the child and end all processes below.

    process  the child
    output   file with the executed cells; a change of the file is a sign of life
    stop     event by which a thread ends the run

    Returns the reason for ending the child, "" for a child ended without help.
    """
    began = time.monotonic()
    signs = _SignsOfLife(output)
    processes: list[psutil.Process] = []
    try:
        while not _ends_within(process, LOOK_SECONDS):
            processes = process_tree.with_descendants(process.pid)
            if signs.seconds_since_last(processes) > IDLE_SECONDS:
                return f"there was no output, and the CPU was not used, for {IDLE_SECONDS / 60:.3g} min"
            if time.monotonic() - began > LONGEST_SECONDS:
                return f"the run took more than {LONGEST_SECONDS / 60:.3g} min"
            if stop and stop.is_set():
                return "stopped"
        return ""
    finally:
        # those seen last, too: they outlive a child that was killed
        process_tree.kill([*process_tree.with_descendants(process.pid), *processes])
        process.wait()


def _ends_within(process: subprocess.Popen, seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return True
    return False


class _SignsOfLife:
    """The signs of progress of a run: its notebook was saved, or IDLE_CPU_SECONDS of CPU time were used."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.last_state: tuple[float, float] | None = None
        self.last_sign = time.monotonic()

    def seconds_since_last(self, processes: Sequence[psutil.Process]) -> float:
        """Look for a new sign of life in the output and in the run's processes; returns seconds since the last."""
        saved = self.output.stat().st_mtime if self.output.exists() else 0.0
        spans_of_cpu = process_tree.cpu_seconds(processes) // IDLE_CPU_SECONDS
        now = time.monotonic()
        if (saved, spans_of_cpu) != self.last_state:
            self.last_state = saved, spans_of_cpu
            self.last_sign = now
        return now - self.last_sign


def _keep_executed(output: Path, notebook: Path) -> None:
    """Replace the notebook by the executed notebook, if whole: papermill does not write atomically."""
    with suppress(OSError, ValueError):
        json.loads(output.read_bytes())
        os.replace(output, notebook)
    output.unlink(missing_ok=True)


def _how_it_ended(code: int) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return f"the run's process {how} before it could report; run it again, and see {LOG} if it recurs"


def _reported_end(report: Path) -> tuple[tuple[str, str] | None, int]:
    """Read and remove the child's report: name and message of the exception, if any, and peak memory in bytes."""
    end = json.loads(report.read_bytes())
    report.unlink()
    return end["error"], end["peak"]
