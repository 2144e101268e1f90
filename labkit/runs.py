"""A lesson as a program: papermill in a child process, with checked parameters, a time limit, an atomic result folder.

What papermill leaves out stands here: a run is judged by the exception that ended it (its metadata calls a dead kernel
"completed"), nothing survives Ctrl-C, and the kernel is this interpreter. Many runs at once are left to others.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import psutil

from labkit import parameters, paths
from labkit.errors import InputError
from labkit.lessons import sections, tidied, write

SCHEMA = "labkit.run/1"
SOURCES = (".py", ".cpp", ".cu", ".h")
_ALWAYS = ("PRESET", "RESULTS_DIR")
CELL_SECONDS = {"smoke": 300, "class": 1200, "full": 1800}  # for cells that hang; the budgets are lab.finish()'s


@dataclass(frozen=True)
class Step:
    """Where a run is: the cell that starts (from 1, as in the source notebook), how many there are, its section."""

    cell: int
    cells: int
    section: str


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
    """A run that ended: its result folder, parameters, wall seconds, and the peak resident bytes of its processes."""

    lesson: str
    folder: Path
    parameters: dict[str, Any]
    seconds: float
    peak_memory: int
    error: Failure | None

    @property
    def notebook(self) -> Path:
        return self.folder / f"{self.lesson}.ipynb"

    @property
    def record(self) -> Path:
        return self.folder / "record.json"


# one run, seen from outside -----------------------------------------------------------------------


def bind(source: bytes, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the notebook `source` will get for `given`: the preset, where results go, and what differs from its cell."""
    known = parameters.read(nbformat.reads(source, as_version=4))
    stated = known["PRESET"].default if "PRESET" in known else None
    bound = parameters.bind(known, {"PRESET": stated, **given, "RESULTS_DIR": "."})
    return {name: value for name, value in bound.items() if name in _ALWAYS or value != known[name].default}


def done(notebook: Path, given: Mapping[str, Any], *, out: Path = Path("runs")) -> Run | None:
    """The good result that `run` with these arguments left under `out`, for the code as it stands now; else None.

    The machine is part of a result's name: ask where the run would take place.
    """
    source = notebook.read_bytes()
    bound = bind(source, given)
    return read(out.absolute() / notebook.stem / f"{bound['PRESET']}-{_identity(source, bound)}")


def read(folder: Path) -> Run | None:
    """The run that a result folder holds, failed ones included; None where run.json is missing or not ours."""
    try:
        kept = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        error = Failure(**kept["error"]) if kept["error"] else None
        return Run(kept["lesson"], folder, kept["parameters"], kept["seconds"], kept["peak_memory"], error)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run(
    notebook: Path,
    given: Mapping[str, Any],
    *,
    out: Path = Path("runs"),
    env: Mapping[str, str] | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Run:
    """Execute a lesson with the parameters `given` (see `labkit.parameters.bind`) and keep the result.

    The result folder is out/<lesson>/<preset>-<hash of lesson, parameters, code and machine>/ with the executed
    notebook, record.json (where the lesson finished) and run.json. It appears whole or not at all. A failed run is kept
    under the same name with "-failed" and never replaces a good one. `env` is set for the lesson beside what is set
    here, such as CUDA_VISIBLE_DEVICES; it does not count as another machine. Safe in threads; no signal is caught.

    InputError before anything runs; a lesson's own error is not raised but returned in `.error`. KeyboardInterrupt ends
    every process of the run and keeps nothing.
    """
    source = notebook.read_bytes()
    bound = bind(source, given)
    name = f"{bound['PRESET']}-{_identity(source, bound)}"
    home = out.absolute() / notebook.stem
    try:
        home.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=home))
    except OSError as error:
        raise InputError(f"Results cannot be written to {home} ({error.strerror}); choose another --out.") from None
    try:
        (partial / notebook.name).write_bytes(source)
        began = time.monotonic()
        job = {"notebook": notebook.name, "parameters": bound, "cell_seconds": CELL_SECONDS[bound["PRESET"]]}
        end = _in_child(job, partial, {**os.environ, **(env or {})}, on_step)
        error = Failure(**end["error"]) if end["error"] else None
        folder = home / (f"{name}-failed" if error else name)
        result = Run(notebook.stem, folder, bound, time.monotonic() - began, end["peak_memory"], error)
        _complete(partial, result)
        _swap(partial, folder)
        if error is None:
            shutil.rmtree(home / f"{name}-failed", ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return result


def _identity(source: bytes, bound: Mapping[str, Any]) -> str:
    """Eight hex digits of what a result depends on: the lesson, labkit as it stands, the parameters, the machine."""
    from labkit.machine import fingerprint  # imports torch, which `labkit --help` must not wait for

    digest = hashlib.sha256(source)
    digest.update(json.dumps([dict(bound), code_version(), fingerprint().slug], sort_keys=True).encode())
    return digest.hexdigest()[:8]


def code_version() -> str:
    """Eight hex digits of what computes: labkit's sources as they stand on the disk, and the version of torch."""
    digest = hashlib.sha256(metadata.version("torch").encode())
    here = Path(__file__).parent
    for file in sorted(here.rglob("*")):
        if file.suffix in SOURCES:
            digest.update(str(file.relative_to(here)).encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def _in_child(job: dict, folder: Path, env: Mapping[str, str], on_step: Callable[[Step], None]) -> dict:
    """Run `job` in its own process and session; the events come through a pipe that no other process can write to."""
    read, write = os.pipe()
    with open(folder / "log.txt", "wb") as log, os.fdopen(read, encoding="utf-8") as events:
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "labkit.runs", str(write), json.dumps(job)],
                cwd=folder,
                env={**env, "LABKIT_PRESET": job["parameters"]["PRESET"]},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[write],
                start_new_session=True,  # a Ctrl-C in the terminal reaches us alone, and we end the rest
            )
        finally:
            os.close(write)
        end = None
        try:
            with _peak_memory(child.pid) as peak:
                for event in map(json.loads, events):
                    if "end" in event:
                        end = event["end"]
                    else:
                        on_step(Step(**event))
                child.wait()
        except BaseException:
            _kill_tree(child)
            raise
    if end is None:
        message = f"the run's process ended with code {child.returncode} before it could report"
        return {"error": asdict(Failure("ProcessEnded", message, None, "")), "peak_memory": peak[0]}
    return {"error": end["error"], "peak_memory": max(peak[0], end["largest_process"])}


@contextmanager
def _peak_memory(pid: int) -> Iterator[list[int]]:
    """Yields [bytes]: the largest sum of resident memory over the process tree, seen once a second (timings go on)."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            with suppress(psutil.NoSuchProcess):
                root = psutil.Process(pid)
                peak[0] = max(peak[0], sum(_resident(one) for one in [root, *root.children(recursive=True)]))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _resident(process: psutil.Process) -> int:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.memory_info().rss
    return 0


def _kill_tree(child: subprocess.Popen) -> None:
    """End the child and all below it. Stopped first, so that it starts no kernel while its children are listed."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(child.pid)
        root.suspend()
        tree = [*root.children(recursive=True), root]
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree[:-1], timeout=5)
    child.wait()


def _complete(partial: Path, result: Run) -> None:
    """Bring the lesson's record to the top of its folder and write run.json."""
    for record in partial.glob("*/record.json"):
        os.replace(record, partial / "record.json")
        with suppress(OSError):
            record.parent.rmdir()
    if not (partial / "log.txt").stat().st_size:
        (partial / "log.txt").unlink()
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


def _swap(partial: Path, folder: Path) -> None:
    """Put the finished folder in its place; an older result of the same name goes only when the new one stands."""
    partial.chmod(0o755)  # mkdtemp's folders are private
    older = partial.with_name(partial.name + "-older")
    if folder.exists():
        folder.rename(older)
    partial.rename(folder)
    shutil.rmtree(older, ignore_errors=True)


# reference results --------------------------------------------------------------------------------


def require_reference(bound: Mapping[str, Any]) -> None:
    """InputError where a run with these parameters could not stand as a reference."""
    if bound["PRESET"] == "smoke":
        raise InputError("A smoke run is too small to be a reference; record one at --preset class or full.")
    if other := sorted(set(bound) - {*_ALWAYS, "DEVICE"}):
        raise InputError(f"A reference run keeps the lesson's own values; leave out -p {other[0]}.")


def keep_as_reference(result: Run, notebook: Path, recorded: Path | None = None) -> list[Path]:
    """Store a good run as reference: its record beside the others, and its outputs in the lesson itself.

    The lesson is rewritten only where the run used the parameters that the lesson's cell states, so that what a reader
    sees is what the cell gives. Returns the files written; InputError where the run is no reference.
    """
    if result.error or not result.record.exists():
        raise InputError(f"{result.lesson} did not finish, so there is nothing to record; mend it and run it again.")
    require_reference(result.parameters)
    executed = nbformat.read(result.notebook, as_version=4)
    record = json.loads(result.record.read_text(encoding="utf-8"))
    written = [(recorded or paths.RECORDED) / record["machine"]["slug"] / f"{record['lesson']}.json"]
    write(written[0], result.record.read_text(encoding="utf-8"))
    stated = parameters.read(executed)["PRESET"].default
    if set(result.parameters) == set(_ALWAYS) and result.parameters["PRESET"] == stated:
        write(notebook, nbformat.writes(tidied(executed)) + "\n")
        written.append(notebook)
    return written


# one run, seen from inside the child --------------------------------------------------------------


def _child(pipe: int, job: dict) -> None:
    """Execute the notebook that lies in the working folder, telling each step and at last how it ended."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    source = nbformat.read(job["notebook"], as_version=4)
    place = {
        id_: Step(number, len(source.cells), title) for number, (id_, title) in enumerate(sections(source), start=1)
    }
    last: list[Step] = []

    with os.fdopen(pipe, "w", encoding="utf-8", buffering=1) as events:

        def on_cell_start(cell: nbformat.NotebookNode, cell_index: int) -> None:
            if step := place.get(cell.get("id")):  # the cell that papermill injects has no place in the source
                last[:] = [step]
                print(json.dumps(asdict(step)), file=events)

        error = _execute(job, on_cell_start)
        if error and not last:  # a kernel that cannot start has most often met a port in use: once more
            error = _execute(job, on_cell_start)
        here = last[0] if last else Step(0, 0, "")
        failure = error and asdict(Failure(*error, here.cell or None, here.section))
        print(json.dumps({"end": {"error": failure, "largest_process": _largest_process()}}), file=events)


def _execute(job: dict, on_cell_start: Callable) -> tuple[str, str] | None:
    """Name and message of what ended the run, None if it ran through."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    try:
        papermill.execute_notebook(
            job["notebook"],
            job["notebook"],
            job["parameters"],
            kernel_name="python3",
            language="python",
            progress_bar=False,
            execution_timeout=job["cell_seconds"],
            kernel_manager_class=this_interpreter(),
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
        return type(error).__name__, str(error)
    return None


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


def _end_with(parent: int) -> None:
    """End this process when its parent is gone; the kernel, which watches this one, follows."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _child(int(sys.argv[1]), json.loads(sys.argv[2]))
