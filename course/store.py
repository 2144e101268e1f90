"""The store of results: where the result of a run lies, whether a good result is there, and how a new one gets there.

Only this module decides whether an older result still counts. A result folder is called
OUT/<lesson>/<preset>-<eight digits>[-N]. The digits are a hash of everything with an influence on the result: the
lesson, the parameters, the code of labkit, the machine. `finished(job)` looks for the folder; so `./lab run --resume`,
sweeps and recordings never do the same run twice, and never reuse a result of different code.

A result folder appears whole or not at all. A failed run lies beside the good run, in a folder named "...-failed".
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from course.failure import Failure
from labkit import files

SCHEMA = "labkit.run/1"
SOURCES = (".py", ".cpp", ".cu", ".h", ".toml")
ALWAYS = ("PRESET", "RESULTS_DIR")  # parameters that every result states, whether they differ from the lesson's or not
LOG = "log.txt"
RECORD, SUMMARY = "record.json", "run.json"


@dataclass(frozen=True)
class Job:
    """A run to be done.

    lesson      name of the lesson, such as "03_structured_pruning_cnns"
    source      bytes of the lesson's notebook
    parameters  PRESET, RESULTS_DIR, and all parameters different from the lesson's own values
    device      the device asked for, such as "auto" or "cuda"
    out         folder of all results
    label       name of the point in a sweep
    process     number, from 1, among several processes recorded together; 0 for a single run
    """

    lesson: str
    source: bytes
    parameters: dict[str, Any]
    device: str
    out: Path
    label: str = ""
    process: int = 0

    def folder(self) -> Path:
        """Name the folder for a good result of the job, from the current code and machine."""
        from labkit.timing.machine import fingerprint, torch_device  # imports torch

        machine = fingerprint(torch_device(self.device)).slug
        facts = json.dumps([self.parameters, code_version(), machine], sort_keys=True)
        digits = hashlib.sha256(self.source + facts.encode()).hexdigest()[:8]
        process = f"-{self.process}" if self.process else ""
        return self.out / self.lesson / f"{self.parameters['PRESET']}-{digits}{process}"


@dataclass(frozen=True)
class Run:
    """A run that ended.

    lesson       name of the lesson
    folder       result folder
    parameters   parameters of the job
    seconds      wall time
    peak_memory  peak resident bytes of the largest process
    error        reason of a failed run, None for a good run
    """

    lesson: str
    folder: Path
    parameters: dict[str, Any]
    seconds: float
    peak_memory: int
    error: Failure | None

    @property
    def notebook(self) -> Path:
        """Path of the executed notebook."""
        return self.folder / f"{self.lesson}.ipynb"

    def __str__(self) -> str:
        state = "failed" if self.error else "done"
        cost = f"{self.seconds:6.0f} s  {self.peak_memory / 1e9:5.1f} GB"
        return f"{state:6}  {self.lesson:36}{cost}  {self.notebook}"


def code_version() -> str:
    """Hash the code behind results: the sources of labkit and of the checks, and torch's version; eight digits."""
    digest = hashlib.sha256(metadata.version("torch").encode())
    for folder in (files.PACKAGE, files.CHECKS):
        for file in sorted(folder.rglob("*")):
            if file.suffix in SOURCES:
                name = str(file.relative_to(folder))
                digest.update(name.encode() + file.read_bytes())
    return digest.hexdigest()[:8]


# reading ------------------------------------------------------------------------------------------------------------


def finished(job: Job) -> Run | None:
    """Find the good result of a job from an earlier run: of the same lesson, parameters, code and machine."""
    return read(job.folder())


def read(folder: Path) -> Run | None:
    """Read a run, good or failed, from a result folder; None if run.json is missing or not of the course."""
    try:
        saved = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        error = Failure(**saved["error"]) if saved["error"] else None
        return Run(saved["lesson"], folder, saved["parameters"], saved["seconds"], saved["peak_memory"], error)
    except (OSError, ValueError, KeyError, TypeError):
        return None


# writing ------------------------------------------------------------------------------------------------------------


@contextmanager
def partial_folder(home: Path) -> Iterator[Path]:
    """Make a hidden folder in `home` for a result under way, and remove the folder at the end.

    Raises InputError if the folder cannot be made.
    """
    with files.refused(f"Results cannot be written to {home}", "choose another --out"):
        home.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".run-", dir=home))
        partial.chmod(0o755)  # mkdtemp's folders are private
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def failed_folder(good: Path) -> Path:
    """Name the folder for a failed run of a job, beside the folder for a good run."""
    return good.with_name(f"{good.name}-failed")


def keep(partial: Path, run: Run) -> None:
    """Put a finished result into run.folder, in place of an older result. A good run replaces a failed run too.

    partial  the folder with the executed notebook, the lesson's results and the log
    """
    _complete(partial, run)
    _replace(run.folder, partial)
    if run.error is None:
        shutil.rmtree(failed_folder(run.folder), ignore_errors=True)


def _complete(partial: Path, run: Run) -> None:
    """Bring the lesson's record to the top of the folder, remove an empty log, and write run.json."""
    for record in partial.glob(f"*/{RECORD}"):
        os.replace(record, partial / RECORD)
        with suppress(OSError):
            record.parent.rmdir()
    if not (partial / LOG).stat().st_size:
        (partial / LOG).unlink()
    summary = {
        "schema": SCHEMA,
        "lesson": run.lesson,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "status": "failed" if run.error else "done",
        "error": asdict(run.error) if run.error else None,
        "parameters": run.parameters,
        "seconds": round(run.seconds, 3),
        "peak_memory": run.peak_memory,
    }
    (partial / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _replace(folder: Path, partial: Path) -> None:
    """Move the finished folder into place; an older result of the same name is removed after the move succeeded."""
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
