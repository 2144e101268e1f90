"""A lesson as a program: papermill in a child process, with checked parameters, time limits, an atomic result folder.

Nothing is left behind by what ends a run: a full disk, a killed process, Ctrl-C. What happens inside the child is
runner.py's, many runs at once are sweep.py's.
"""

import functools
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from course import descendants, parameters, runner
from labkit import files
from labkit.errors import DataError, InputError, LabError
from labkit.files import full_disk_told

SCHEMA = "labkit.run/1"
SOURCES = (".py", ".cpp", ".cu", ".h")
LOG = "log.txt"
ALWAYS = ("PRESET", "RESULTS_DIR")  # what every result states, whether it differs from the cell or not
CELL_SECONDS = {"smoke": 300, "class": 1200, "full": 1800}  # for cells that hang; the budgets are lab.finish()'s
START_SECONDS = 60  # for a kernel to start, which is tried twice
# Not handed on to a lesson: Dask sets it for its workers, and glibc then gives memory back to the system after every
# tensor, which makes whatever a lesson times slower than it is elsewhere.
DROPPED = ("MALLOC_TRIM_THRESHOLD_",)


class Stopped(LabError):
    """A run that was ended from another thread."""


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


# one run -------------------------------------------------------------------------------------------


def bind(source: bytes, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the notebook `source` will get for `given`: the preset, where results go, and what differs from its cell."""
    known = _parameters(source)
    if given.get("RESULTS_DIR", ".") != ".":
        raise InputError("RESULTS_DIR is set for each run; choose the folder of all results with --out.")
    bound = parameters.bind(known, {"PRESET": _stated(known, "PRESET"), **given, "RESULTS_DIR": "."})
    return {name: value for name, value in bound.items() if name in ALWAYS or value != known[name].default}


def check(notebook: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What `run` would give the lesson; raises what it raises before anything runs."""
    bound = bind(source := read_source(notebook), given)
    _require_device(source, bound)
    return bound


def _require_device(source: bytes, bound: Mapping[str, Any]) -> None:
    """InputError where the device that a run with these parameters asks for is not on this machine."""
    asked = _device(source, bound)
    if asked != "cpu" and (asked != "auto" or os.environ.get("LABKIT_DEVICE")):  # those two need no torch to be known
        from labkit.machine import torch_device

        torch_device(asked)


def read_source(notebook: Path) -> bytes:
    """The notebook's bytes; DataError where it is missing, damaged, or no notebook."""
    try:
        source = notebook.read_bytes()
        if json.loads(source)["nbformat"] >= 4:
            return source
        reason = "it is older than nbformat 4"
    except OSError as error:
        reason = error.strerror
    except (ValueError, KeyError, TypeError):
        reason = "it is damaged, or no notebook"
    raise DataError(f"The lesson {notebook} cannot be read ({reason}); take it anew from the course's repository.")


def done(notebook: Path, given: Mapping[str, Any], *, out: Path = Path("runs")) -> Run | None:
    """The good result that `run` with these arguments left under `out`, for the code as it stands now; else None.

    The machine is part of a result's name: ask where the run would take place.
    """
    source = read_source(notebook)
    bound = bind(source, given)
    return read(out.absolute() / notebook.stem / _name(source, bound, code_version()))


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
    seconds: float | None = None,
    stop: threading.Event | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Run:
    """Execute a lesson with the parameters `given` (see `course.parameters.bind`) and keep the result.

    The result folder is out/<lesson>/<preset>-<hash of lesson, parameters, code and machine>/ with the executed
    notebook, record.json (where the lesson finished) and run.json. It appears whole or not at all. A failed run is kept
    under the same name with "-failed" and never replaces a good one.

    env       is set for the lesson beside what is set here, such as CUDA_VISIBLE_DEVICES; it does not count as another
              machine, and the device asked for is looked for without it
    seconds   limit for the whole run, beside the limit of each cell (CELL_SECONDS)
    stop      an event that ends the run from another thread, which raises Stopped

    InputError for a parameter and DataError for the lesson before anything runs; DataError as well where the disk takes
    no more. A lesson's own error is not raised but returned in `.error`. After any exception, KeyboardInterrupt and
    Stopped included, no process is left, nothing of the run is kept, and older results are whole. Safe in threads.
    """
    source = read_source(notebook)
    bound = bind(source, given)
    _require_device(source, bound)
    version = code_version()
    home = out.absolute() / notebook.stem
    with full_disk_told(home), _partial(home, bound["PRESET"]) as partial, ThreadPoolExecutor(1) as beside:
        name = beside.submit(_name, source, bound, version)  # imports torch, while the kernel starts
        (partial / notebook.name).write_bytes(source)
        began = time.monotonic()
        limits = {"cell_seconds": CELL_SECONDS[bound["PRESET"]], "start_seconds": START_SECONDS}
        job = {"notebook": notebook.name, "parameters": bound, **limits}
        inherited = {name: value for name, value in os.environ.items() if name not in DROPPED}
        error, peak = _in_child(job, partial, inherited | dict(env or {}), _Limit(began, seconds, stop), on_step)
        folder = home / (f"{name.result()}-failed" if error else name.result())
        result = Run(notebook.stem, folder, bound, time.monotonic() - began, peak, error)
        _complete(partial, result)
        _swap(partial, folder)
        if error is None:
            shutil.rmtree(home / f"{name.result()}-failed", ignore_errors=True)
    return result


def code_version() -> str:
    """Eight hex digits of what computes: labkit's sources as they stand on the disk, and the version of torch."""
    digest = hashlib.sha256(metadata.version("torch").encode())
    here = files.ROOT / "labkit"
    for file in sorted(here.rglob("*")):
        if file.suffix in SOURCES:
            digest.update(str(file.relative_to(here)).encode() + file.read_bytes())
    return digest.hexdigest()[:8]


@functools.lru_cache(maxsize=8)
def _parameters(source: bytes) -> dict[str, parameters.Parameter]:
    return parameters.read(json.loads(source))  # nbformat, whose import takes a second, adds nothing here


def _stated(known: Mapping[str, parameters.Parameter], name: str) -> Any:
    return known[name].default if name in known else None


def _device(source: bytes, bound: Mapping[str, Any]) -> str:
    return str(bound.get("DEVICE") or _stated(_parameters(source), "DEVICE") or "auto")


def _name(source: bytes, bound: Mapping[str, Any], version: str) -> str:
    """<preset>-<eight hex digits of what a result depends on: the lesson, the parameters, labkit, the machine>."""
    from labkit.machine import fingerprint, torch_device

    machine = fingerprint(torch_device(_device(source, bound))).slug
    facts = json.dumps([dict(bound), version, machine], sort_keys=True)
    return f"{bound['PRESET']}-{hashlib.sha256(source + facts.encode()).hexdigest()[:8]}"


# its process --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Limit:
    """When a run has to end before its lesson does: after `seconds` from `began`, or when `stop` is set."""

    began: float
    seconds: float | None
    stop: threading.Event | None

    @property
    def over(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.began > self.seconds

    @property
    def stopped(self) -> bool:
        return self.stop is not None and self.stop.is_set()

    def reached(self) -> bool:
        return self.over or self.stopped


def _in_child(
    job: dict, folder: Path, env: Mapping[str, str], limit: _Limit, on_step: Callable[[Step], None]
) -> tuple[Failure | None, int]:
    """Run `job` in its own process and session: what ended it, and its peak bytes. No process of it is left."""
    token, last, end = folder.name, Step(0, 0, ""), None
    try:
        with (
            _started(job, folder, env, token) as (child, events),
            descendants.watched(child.pid, token, until=limit.reached) as peak,
        ):
            for event in map(json.loads, events):
                if "end" in event:
                    end = event["end"]
                else:
                    last = Step(**event)
                    on_step(last)
            code = _wait(child)
    finally:
        descendants.end(token)
    if end is None and limit.stopped:
        raise Stopped("The run was stopped; nothing of it was kept.")
    if end is None:
        runner.keep_output(folder / job["notebook"])
        lost = ("RunTimeout", f"the run took more than {limit.seconds:g} s") if limit.over else _lost(code)
        return Failure(*lost, last.cell or None, last.section), peak[0]
    if end["unwritable"]:
        number, file = end["unwritable"]
        raise OSError(number, os.strerror(number), file)
    most = max(peak[0], end["largest_process"])
    if end["error"] and end["error"]["name"] == "DeadKernel":
        from labkit.machine import memory_bytes

        end["error"]["message"] += f" (the run had reached {most / 1e9:.1f} GB of {memory_bytes() / 1e9:.1f} GB)"
    return end["error"] and Failure(**end["error"]), most


@contextmanager
def _started(job: dict, folder: Path, env: Mapping[str, str], token: str) -> Iterator[tuple[subprocess.Popen, TextIO]]:
    """The child and its events, which come through a pipe that no other process can write to."""
    told = {**job, "parent": os.getpid(), "token": token}
    read, write = os.pipe()
    with open(folder / LOG, "wb") as log, os.fdopen(read, encoding="utf-8") as events:
        try:
            child = subprocess.Popen(
                [sys.executable, "-m", "course.runner", str(write), json.dumps(told)],
                cwd=folder,
                env={**env, "LABKIT_PRESET": job["parameters"]["PRESET"], descendants.TOKEN: token},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[write],
                start_new_session=True,  # a Ctrl-C in the terminal reaches us alone, and we end the rest
            )
        finally:
            os.close(write)
        try:
            yield child, events
        except BaseException:
            child.kill()
            child.wait()
            raise


def _wait(child: subprocess.Popen) -> int:
    """Its exit code. It has said all that it will say, so one that hangs in ending itself is ended."""
    try:
        return child.wait(descendants.END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _lost(code: int) -> tuple[str, str]:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return "ProcessEnded", f"the run's process {how} before it could report; run it again, and see {LOG} if it recurs"


# its folder ---------------------------------------------------------------------------------------


@contextmanager
def _partial(home: Path, preset: str) -> Iterator[Path]:
    """A folder in `home` for a result that is being made; what is left of it goes at the end."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{preset}-", dir=home))
    except OSError as error:
        raise InputError(f"Results cannot be written to {home} ({error.strerror}); choose another --out.") from None
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


def _swap(partial: Path, folder: Path) -> None:
    """Put the finished folder in its place; an older result of the same name goes only when the new one stands."""
    partial.chmod(0o755)  # mkdtemp's folders are private
    older = partial.with_name(f"{partial.name}-older")
    try:
        while True:  # another process may put the same result there between the two renames
            with suppress(FileNotFoundError):
                folder.rename(older)
            try:
                partial.rename(folder)
                return
            except OSError:
                if not folder.exists():
                    raise
                shutil.rmtree(older, ignore_errors=True)
    finally:
        if older.exists() and not folder.exists():
            older.rename(folder)
        shutil.rmtree(older, ignore_errors=True)
