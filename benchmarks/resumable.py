"""Experiments of many runs that can be interrupted: each finished run is a file, and the same command goes on.

A script that uses this module is called in three ways:

    python benchmarks/NAME.py --folder DIR               does all runs, and writes the record
    python benchmarks/NAME.py --folder DIR --minutes 10  starts no run after ten minutes; the same command goes on
    python benchmarks/NAME.py --quick                    does a few small runs in a temporary folder; writes nothing
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

Outcome = dict[str, Any]


class Run(Hashable, Protocol):
    """A run of an experiment; `file` is its name in the folder."""

    @property
    def file(self) -> str: ...


class NamedByFields:
    """A run, as a frozen dataclass, whose file is named by the values of its fields; None is left out."""

    @property
    def file(self) -> str:
        values = [str(value) for value in asdict(self).values() if value is not None]
        return ", ".join(values) + ".pt"


R = TypeVar("R", bound=Run)
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """The options of a call.

    folder: keeps the outcomes of finished runs.
    minutes: no run starts later.
    quick: a few small runs, and no record.
    """

    folder: Path
    minutes: float
    quick: bool


def options(description: str | None) -> Options:
    """Read the options from the command line, and make the folder.

    description: the script's docstring, shown by --help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps the outcomes of finished runs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no run starts later")
    parser.add_argument("--quick", action="store_true", help="a few small runs; nothing is written")
    given = parser.parse_args()
    if given.folder is None and not given.quick:
        parser.error("give --folder, or --quick")
    folder = Path(tempfile.mkdtemp()) if given.quick else given.folder
    folder.mkdir(parents=True, exist_ok=True)
    return Options(folder, given.minutes, given.quick)


def finished(runs: Sequence[R], chosen: Options, do: Callable[[R], Outcome]) -> dict[R, Outcome]:
    """Do the runs that have no file yet, and return the outcomes of all that are finished.

    The seconds of a run are added to its outcome as "seconds".

    do: does a run; the outcome can be saved by torch.save.
    """
    start = time.perf_counter()
    outcomes: dict[R, Outcome] = {}
    for run in tqdm(runs, desc="runs", unit="run"):
        file = chosen.folder / run.file
        too_late = time.perf_counter() - start > 60 * chosen.minutes
        if too_late and not file.exists():
            continue
        outcomes[run] = once(file, lambda run=run: timed(lambda: do(run)))
    return outcomes


def once(file: Path, compute: Callable[[], T]) -> T:
    """Return what a file holds, computed and saved first where there is no such file.

    The file appears when it is whole: an interrupted call leaves no half file.

    compute: its value can be saved by torch.save.
    """
    if not file.exists():
        part = file.with_suffix(".part")
        torch.save(compute(), part)
        part.replace(file)
    return torch.load(file)


def timed(compute: Callable[[], Outcome]) -> Outcome:
    """Return the outcome of a computation, and its seconds as "seconds"."""
    begin = time.perf_counter()
    outcome = compute()
    return {**outcome, "seconds": time.perf_counter() - begin}
