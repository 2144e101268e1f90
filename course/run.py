"""A lesson as a program: one papermill call in a child process, with checked parameters and an atomic result folder.

Nothing is left behind by what ends a run: a full disk, a killed process, Ctrl-C. A lesson is never ended for being
slow, only for hanging. Many runs at once are sweep.py's; this file is also what the child executes.
"""

import functools
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from labkit import files
from labkit.errors import DataError, InputError
from labkit.lesson import parameters

if TYPE_CHECKING:
    from nbformat import NotebookNode

SCHEMA = "labkit.run/1"
SOURCES = (".py", ".cpp", ".cu", ".h", ".toml")
LOG, OUTPUT, END = "log.txt", "executed.ipynb", "end.json"
ALWAYS = ("PRESET", "RESULTS_DIR")  # what every result states, whether it differs from the cell or not
RECORDED_RUNS = (
    3  # processes of which a reference is made: what one process measures well, another may measure otherwise
)
START_SECONDS = 120  # for a kernel to start, which is tried twice
IDLE_SECONDS, IDLE_CPU_SECONDS = 300, 3  # a run hangs that has no output in so long, and uses no more of a CPU
LONGEST_SECONDS = 3600  # for a run that has output, or uses the CPU, all along
UNTOLD = "CellExecutionError"  # papermill's word where the kernel could not even show the exception
# Dask sets this for its workers, and glibc then gives memory back to the system after every tensor, which makes what a
# lesson times slower than it is elsewhere.
DROPPED = "MALLOC_TRIM_THRESHOLD_"
_SMALLER = "take a smaller --preset or smaller parameters (-p), or end what else uses"
ADVICE = {  # what a message or its exception's name holds -> what to do
    r"\bOutOfMemoryError\b|CUDA out of memory": f"{_SMALLER} the GPU",
    r"\bMemoryError\b|DefaultCPUAllocator|\bDeadKernel\b": f"{_SMALLER} memory",
    r"\[Errno 28\]|No space left on device": "free some space on the disk, or choose another --out",
    r"\[Errno 24\]|Too many open files": "allow more of them in this shell, then run it again: ulimit -n 1024",
    r"\bRunTimeout\b": "take a smaller --preset, or look for what the cell waits for",
    r"Kernel (didn't respond|died before)": "try again when the machine has less to do, and see ./lab doctor",
}


@dataclass(frozen=True)
class Job:
    """What is to be run: a lesson as it stood, the parameters that it gets, and the folder of all results.

    device  the device that the lesson asks for, "auto" included
    label   the name of the point in a sweep
    process which of several that are recorded together, from 1 on; 0 for a run by itself
    """

    lesson: str
    source: bytes
    parameters: dict[str, Any]
    device: str
    out: Path
    label: str = ""
    process: int = 0

    def folder(self) -> Path:
        """OUT/<lesson>/<preset>-<eight digits of what a result depends on: lesson, parameters, labkit, machine>[-N]."""
        from labkit.timing.machine import fingerprint, torch_device  # imports torch

        machine = fingerprint(torch_device(self.device)).slug
        facts = json.dumps([self.parameters, code_version(), machine], sort_keys=True)
        digits = hashlib.sha256(self.source + facts.encode()).hexdigest()[:8]
        process = f"-{self.process}" if self.process else ""
        return self.out / self.lesson / f"{self.parameters['PRESET']}-{digits}{process}"


@dataclass(frozen=True)
class Failure:
    """What ended a run, and in which cell (None where no cell had started)."""

    name: str
    message: str
    cell: int | None
    section: str

    def __str__(self) -> str:
        where = f"cell {self.cell} ({self.section})" if self.cell else "the start"
        return f"{self.name} in {where}: {self.message}"


@dataclass(frozen=True)
class Run:
    """A run that ended: its result folder, parameters, wall seconds, peak resident bytes of its largest process."""

    lesson: str
    folder: Path
    parameters: dict[str, Any]
    seconds: float
    peak_memory: int
    error: Failure | None

    @property
    def notebook(self) -> Path:
        return self.folder / f"{self.lesson}.ipynb"

    def __str__(self) -> str:
        state = "failed" if self.error else "done"
        return f"{state:6}  {self.lesson:36}{self.seconds:6.0f} s  {self.peak_memory / 1e9:5.1f} GB  {self.notebook}"


def prepare(notebook: Path, values: Mapping[str, Any], out: Path = Path("runs"), label: str = "") -> Job:
    """A lesson with the parameters in `values` (see `labkit.parameters.bind`), checked; nothing is written or started.

    The job states the preset, where results go, and what differs from the lesson's cell. InputError for a parameter or
    a device that does not exist, DataError where the notebook is missing, damaged, or no notebook.
    """
    source, declared = load(notebook)
    if values.get("RESULTS_DIR", ".") != ".":
        raise InputError("RESULTS_DIR is set for each run; choose the folder of all results with --out.")
    defaults = {name: parameter.default for name, parameter in declared.items()}
    bound = parameters.bind(declared, {"PRESET": defaults.get("PRESET"), **values, "RESULTS_DIR": "."})
    device = str(bound.get("DEVICE") or defaults.get("DEVICE") or "auto")
    if device != "cpu" and (device != "auto" or os.environ.get("LABKIT_DEVICE")):  # those two need no torch
        from labkit.timing.machine import torch_device

        torch_device(device)
    differing = {name: value for name, value in bound.items() if name in ALWAYS or value != defaults[name]}
    return Job(notebook.stem, source, differing, device, out.absolute(), label)


def load(notebook: Path) -> tuple[bytes, dict[str, parameters.Parameter]]:
    """A lesson's bytes and its parameters; DataError where the notebook is missing, damaged, or no notebook."""
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


def read(folder: Path) -> Run | None:
    """The run that a result folder holds, failed ones included; None where run.json is missing or not ours.

    read(job.folder()) is the good result that `run(job)` left on this machine, for the code as it stands now.
    """
    try:
        saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        error = Failure(**saved["error"]) if saved["error"] else None
        return Run(saved["lesson"], folder, saved["parameters"], saved["seconds"], saved["peak_memory"], error)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def code_version() -> str:
    """Eight hex digits of what computes: the sources of labkit and the checks, and the version of torch."""
    digest = hashlib.sha256(metadata.version("torch").encode())
    for folder in (files.PACKAGE, files.CHECKS):
        for file in sorted(folder.rglob("*")):
            if file.suffix in SOURCES:
                digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def run(
    job: Job,
    *,
    env: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
    progress: bool = False,
) -> Run:
    """Execute a lesson and keep the result in job.folder(): the executed notebook, record.json and run.json.

    The folder appears whole or not at all. A failed run is kept under the same name with "-failed" and never replaces
    a good one.

    env       is set for the lesson beside what is set here, such as CUDA_VISIBLE_DEVICES; it does not count as another
              machine, and the device asked for is looked for without it
    stop      an event by which another thread ends the run; KeyboardInterrupt is raised here
    progress  shows on stderr which cell runs

    DataError where the disk takes no more. A lesson's own error is not raised but returned in `.error`. After any
    exception, KeyboardInterrupt included, no process is left, nothing of the run is kept, and older results are whole.
    Safe in threads.
    """
    home = job.out / job.lesson
    with files.full_disk_told(home), partial_folder(home) as partial, ThreadPoolExecutor(1) as beside:
        target = beside.submit(job.folder)  # imports torch, while the kernel starts
        began = time.monotonic()
        error, peak = _in_child(job, partial, env or {}, stop, progress)
        # a kernel that cannot start has most often met a port in use: once more
        if error and not error.cell and error.name != "RunTimeout":
            error, peak = _in_child(job, partial, env or {}, stop, progress)
        good = target.result()
        failed = good.with_name(f"{good.name}-failed")
        result = Run(job.lesson, failed if error else good, job.parameters, time.monotonic() - began, peak, error)
        _complete(partial, result)
        _replace(result.folder, partial)
        if error is None:
            shutil.rmtree(failed, ignore_errors=True)
    return result


@contextmanager
def partial_folder(home: Path) -> Iterator[Path]:
    """A folder in `home` for a result that is being made, removed at the end; InputError where it cannot be made."""
    with files.refused(f"Results cannot be written to {home}", "choose another --out"):
        home.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".run-", dir=home))
        partial.chmod(0o755)  # mkdtemp's folders are private
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _complete(partial: Path, result: Run) -> None:
    """Bring the lesson's record to the top of its folder and write run.json."""
    for record in partial.glob("*/record.json"):
        os.replace(record, partial / "record.json")
        with suppress(OSError):
            record.parent.rmdir()
    if not (partial / LOG).stat().st_size:
        (partial / LOG).unlink()
    summary = {
        "schema": SCHEMA,
        "lesson": result.lesson,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "failed" if result.error else "done",
        "error": asdict(result.error) if result.error else None,
        "parameters": result.parameters,
        "seconds": round(result.seconds, 3),
        "peak_memory": result.peak_memory,
    }
    (partial / "run.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _replace(folder: Path, partial: Path) -> None:
    """Put the finished folder in its place; an older result of the same name goes only when the new one stands."""
    older = partial.with_name(f"{partial.name}-older")
    try:
        with suppress(FileNotFoundError):
            os.replace(folder, older)
        os.replace(partial, folder)
    except OSError:
        if not folder.exists():  # where another process put the same result there meanwhile, that one is as good
            raise
    finally:
        if older.exists() and not folder.exists():
            os.replace(older, folder)
        shutil.rmtree(older, ignore_errors=True)


def require_reference(bound: Mapping[str, Any]) -> None:
    """InputError where a run with these parameters (`Job.parameters`) could not stand as a reference."""
    if bound["PRESET"] == "smoke":
        raise InputError("A smoke run is too small to be a reference; record one at --preset class or full.")
    if changed := sorted(set(bound) - {*ALWAYS, "DEVICE"}):
        raise InputError(f"A reference run keeps the lesson's own values; leave out -p {changed[0]}.")


def processes(job: Job, *, resume: bool) -> list[tuple[Job, Run | None]]:
    """The processes of which a reference is made, each with its result where it was finished before.

    Where some are missing, an interrupted recording goes on; where none is, only `resume` reuses them.
    """
    jobs = [replace(job, process=number) for number in range(1, RECORDED_RUNS + 1)]
    results = [read(process.folder()) for process in jobs]
    return list(zip(jobs, results if resume or None in results else [None] * len(jobs), strict=True))


def keep_reference(results: Sequence[Run], notebook: Path) -> list[Path]:
    """Store good runs of one lesson as its reference, and the outputs of one in the lesson itself.

    The record, beside the others, and the outputs are those of the run that took the median time; the record also holds
    the numbers of all. The lesson is rewritten only where the runs used the parameters that the lesson's cell states,
    so that what a reader sees is what the cell gives. Returns the files written.
    """
    import nbformat  # takes a second

    from course.notebooks import tidied
    from labkit.lesson import records

    of_processes = [records.read(result.folder / "record.json") for result in results]
    reference = records.together(of_processes)
    result = next(run for run, record in zip(results, of_processes, strict=True) if record.created == reference.created)
    executed = nbformat.read(result.notebook, as_version=4)
    written = [files.RECORDED / reference.machine["slug"] / f"{reference.lesson}.json"]
    records.write(reference, written[0])
    stated = parameters.read(executed)["PRESET"].default
    if set(result.parameters) == set(ALWAYS) and result.parameters["PRESET"] == stated:
        files.write_text(notebook, nbformat.writes(tidied(executed)) + "\n")
        written.append(notebook)
    return written


# the child, seen from outside -----------------------------------------------------------------------


def _in_child(
    job: Job, folder: Path, env: Mapping[str, str], stop: threading.Event | None, progress: bool
) -> tuple[Failure | None, int]:
    """Run `job` in its own process and session: what ended it, and its peak bytes. No process of it is left."""
    notebook = folder / f"{job.lesson}.ipynb"
    notebook.write_bytes(job.source)
    env = {**os.environ, **env, "LABKIT_PRESET": job.parameters["PRESET"]}
    env.pop(DROPPED, None)
    with open(folder / LOG, "ab") as log, os.fdopen(os.dup(2)) as terminal:
        shown = [terminal.fileno()] if progress else []
        limits = {"start_timeout": START_SECONDS, "autosave_cell_every": IDLE_SECONDS / 10}  # saving is a sign of life
        child = subprocess.Popen(
            [sys.executable, "-m", "course.run", notebook.name, *map(json.dumps, (job.parameters, limits, shown))],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=shown,
            start_new_session=True,  # a Ctrl-C in the terminal reaches us alone, and we end the rest
        )
    reason = _wait(child, folder / OUTPUT, stop)
    code, end = child.returncode, {"error": None, "peak": 0}
    if stop and stop.is_set():
        raise KeyboardInterrupt
    if code in files.UNWRITABLE:
        raise OSError(code, os.strerror(code), str(notebook))
    with suppress(OSError, ValueError):  # papermill does not write atomically
        json.loads((folder / OUTPUT).read_bytes())
        os.replace(folder / OUTPUT, notebook)
    (folder / OUTPUT).unlink(missing_ok=True)
    if reason:
        end["error"] = "RunTimeout", reason
    elif code:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        how = f"the run's process {how} before it could report; run it again, and see {LOG} if it recurs"
        end["error"] = "ProcessEnded", how
    else:
        end = json.loads((folder / END).read_bytes())
        (folder / END).unlink()
    return end["error"] and _failure(job.source, notebook, *end["error"], end["peak"]), end["peak"]


def _wait(child: subprocess.Popen, output: Path, stop: threading.Event | None) -> str:
    """Wait for the child and leave no process of it: why it had to be ended, "" where it ended by itself."""
    began = sign = time.monotonic()
    last, below = None, []
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                child.wait(0.5)
                return ""
            below, now = _below(child.pid), time.monotonic()
            state = (output.stat().st_mtime if output.exists() else 0, _cpu_seconds(below) // IDLE_CPU_SECONDS)
            if state != last:
                last, sign = state, now
            if now - sign > IDLE_SECONDS:
                return f"there was no output, and the CPU was not used, for {IDLE_SECONDS / 60:.3g} min"
            if now - began > LONGEST_SECONDS:
                return f"the run took more than {LONGEST_SECONDS / 60:.3g} min"
            if stop and stop.is_set():
                return "stopped"
    finally:
        _kill([*_below(child.pid), *below])  # those seen last, too: they outlive a child that was killed
        child.wait()


def _below(pid: int) -> list[psutil.Process]:
    """The process and all below it; none where it is gone."""
    with suppress(psutil.Error):
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return []


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])  # its own and those of children that ended, user and system
    return total


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            for each in (process, *process.children(recursive=True)):
                each.kill()


def _failure(source: bytes, notebook: Path, name: str, message: str, peak: int) -> Failure:
    """An exception for who reads it: in which cell, not too long, and with what to do where that is known."""
    import nbformat

    from course.notebooks import sections

    source = nbformat.reads(source.decode(), as_version=4)
    places = {id_: (number, title) for number, (id_, title) in enumerate(sections(source), start=1)}
    cells = nbformat.read(notebook, as_version=4).cells
    started = [
        cell for cell in cells if cell.get("id") in places and cell.metadata.get("papermill", {}).get("start_time")
    ]
    number, section = places[started[-1].id] if started else (None, "")
    if name == UNTOLD and started:
        name, message = _printed_error(started[-1])
    message = message or "no message"
    message = message if len(message) <= 2000 else f"{message[:2000]} ..."  # the whole one stands in the notebook
    advice = next((what for sign, what in ADVICE.items() if re.search(sign, f"{name} {message}")), "")
    message = f"{message.rstrip('. ')}; {advice}" if advice else message
    if name == "DeadKernel":
        from labkit.timing.machine import memory_bytes

        message += f" (the run had reached {peak / 1e9:.1f} GB of {memory_bytes() / 1e9:.1f} GB)"
    return Failure(name, message, number, section)


def _printed_error(cell: "NotebookNode") -> tuple[str, str]:
    """Name and message of the exception at the end of the cell's error stream, UNTOLD and nothing if there is none."""
    printed = "".join(output.text for output in cell.outputs if output.get("name") == "stderr").strip()
    error = re.search(r"^(\w+): (.+)\Z", printed, re.MULTILINE)
    return (error[1], error[2]) if error else (UNTOLD, "")


# the child, seen from inside ------------------------------------------------------------------------


def main(notebook: str, values: Mapping[str, Any], limits: Mapping[str, int], terminals: Sequence[int]) -> None:
    """Execute a notebook in the working folder, and write how it ended to END.

    Where the disk takes no more the lesson is not at fault, and the error's number is the exit code.
    """
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    try:
        error = _execute(notebook, values, limits, terminals)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of the largest process that ended: the kernel
        end = {"error": error, "peak": peak if sys.platform == "darwin" else peak * 1024}
        Path(END).write_text(json.dumps(end), encoding="utf-8")
    except OSError as error:
        os._exit(error.errno if error.errno in files.UNWRITABLE else 1)


def _execute(
    notebook: str, values: Mapping[str, Any], limits: Mapping[str, int], terminals: Sequence[int]
) -> tuple[str, str] | None:
    """Name and message of what ended the run, None if it ran through; OSError where nothing can be written.

    The exception decides: papermill's metadata calls a dead kernel "completed".
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    from course.notebooks import sections

    try:
        titles = dict(sections(nbformat.read(notebook, as_version=4)))
        began, shown = time.monotonic(), [""]

        def show(cell: nbformat.NotebookNode, cell_index: int) -> None:  # the cell that papermill injects counts
            title = titles.get(cell.get("id"), shown[-1])
            line = f"{notebook[:2]}  cell {cell_index:2}/{len(titles)}  {time.monotonic() - began:4.0f} s  {title}"
            for terminal in terminals:
                if os.isatty(terminal):
                    os.write(terminal, f"\r\033[K{line[: os.get_terminal_size(terminal).columns - 1]}".encode())
                elif title != shown[-1]:
                    os.write(terminal, f"{line}\n".encode())
            shown.append(title)

        papermill.engines.papermill_engines.register(OUTPUT, _engine())
        papermill.execute_notebook(
            notebook,
            OUTPUT,
            values,
            engine_name=OUTPUT,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            **limits,
            kernel_manager_class=this_interpreter(),
            # all outputs have come by then, and one ipykernel in twelve takes 3 s over ending by itself
            shutdown_kernel="immediate",
            on_cell_start=show,
            # ipykernel 7 warns of each kernel that talks over plain TCP
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),
        )
    except papermill.exceptions.PapermillExecutionError as error:
        return error.ename, error.evalue.strip()
    except DeadKernelError:
        return "DeadKernel", "the kernel was killed, most often because memory ran out"
    except Exception as error:
        if getattr(error, "errno", None) in files.UNWRITABLE:
            raise
        return type(error).__name__, str(error)
    return None


def _engine() -> type:
    """papermill's engine, saving when a code cell starts; before and after each cell took a tenth of the time."""
    from papermill.engines import NBClientEngine, NotebookExecutionManager

    class SavesAtEachStart(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: NotebookExecutionManager, *args: Any, **kwargs: Any) -> Any:
            save, start, complete = nb_man.save, nb_man.cell_start, nb_man.cell_complete

            def without_saving(method: Callable[..., None], *args: Any, **kwargs: Any) -> None:
                nb_man.save = lambda: None
                try:
                    method(*args, **kwargs)
                finally:
                    nb_man.save = save

            def cell_start(cell: Any, *args: Any, **kwargs: Any) -> None:
                without_saving(start, cell, *args, **kwargs)
                if cell.cell_type == "code":
                    save()

            nb_man.cell_start, nb_man.cell_complete = cell_start, functools.partial(without_saving, complete)
            return super().execute_managed_notebook(nb_man, *args, **kwargs)

    return SavesAtEachStart


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


def _end_with(parent: int) -> None:
    """End everything when the process that waits for the result is gone: no kernel, no half result stays behind."""
    while os.getppid() == parent:
        time.sleep(1.0)
    this, *below = _below(os.getpid())
    _kill(below)
    shutil.rmtree(os.getcwd(), ignore_errors=True)
    this.kill()


if __name__ == "__main__":
    main(sys.argv[1], *map(json.loads, sys.argv[2:]))
    os._exit(0)  # all is said and written; taking papermill's modules down again would cost most of a second
