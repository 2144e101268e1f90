"""A lesson at every point of a grid: checked before the first run starts, resumed where it stopped, on three scales.

    labkit sweep 03 -g RATIO=0.3,0.5,0.7 -g CRITERION=l1,taylor --seeds 5          one machine, one run at a time
    labkit sweep 03 -g RATIO=0.3,0.5,0.7 --workers 2                               ... or several, or one a GPU

    dask scheduler                                                                 on one machine of a cluster, then
    CUDA_VISIBLE_DEVICES=0 dask worker tcp://host:8786 --nthreads 1 --resources GPU=1      one for each GPU, and
    labkit sweep 03 -g RATIO=0.3,0.5,0.7 --on dask://host:8786 --out /shared/runs  from anywhere that sees the folder

    on a login node of a cluster with Slurm, one job a run (see executors.slurm for what was tried):
    SBATCH_PARTITION=gpu labkit sweep 03 -g RATIO=0.3,0.5 -p DEVICE cuda --on slurm --out /shared/runs

Each point becomes a result folder as `labkit run` makes it; points that differ in SEED alone are repetitions. A cluster
needs the same labkit and the folder of results on every machine; the lesson is sent. A Dask worker sets OMP_NUM_THREADS
to 1 unless it is started with another value. Where runs take place is executors.py's; how results look, report.py's.
"""

import contextlib
import itertools
import json
import math
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from course import parameters, runs
from course.executors import TRIES, Place
from course.runs import Run
from labkit.errors import InputError, LabError

TICK_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """One point as it travels to a worker: the lesson itself, what differs (`point`), and all that is `given`."""

    lesson: str
    source: bytes
    point: Mapping[str, Any]
    given: Mapping[str, Any]
    out: Path
    code: str


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its run, or why there is none. `reused`: the run had been there before."""

    job: Job
    run: Run | None
    reused: bool = False
    lost: str = ""

    @property
    def failure(self) -> str:
        """Why the point has no good result; empty where it has one."""
        return self.lost or (str(self.run.error) if self.run and self.run.error else "")


# the points ---------------------------------------------------------------------------------------


def parse(texts: Iterable[str]) -> dict[str, list[str]]:
    """{"RATIO": ["0.3", "0.5"]} for ["RATIO=0.3,0.5"]; commas inside brackets part nothing. InputError otherwise."""
    grid: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = (part.strip() for part in text.partition("="))
        if not name or not equals:
            raise InputError(f"{text!r} is no part of a grid; give NAME=VALUE,VALUE, such as RATIO=0.3,0.5.")
        if name in grid:
            raise InputError(f"{name} is in the grid twice; give all of its values at once: -g {name}=...")
        grid[name] = [value.strip() for value in re.split(r",(?![^\[(]*[\])])", values)]
        if "" in grid[name]:
            raise InputError(f"{name} has an empty value in {text!r}; give NAME=VALUE,VALUE, such as RATIO=0.3,0.5.")
    return grid


def plan(
    notebook: Path, grid: Mapping[str, Sequence[Any]], given: Mapping[str, Any], *, seeds: int | None = None, out: Path
) -> list[Job]:
    """One job a point of `grid`, each with what is `given` to all; repeated for `seeds` values of SEED from its own on.

    The whole grid comes at the first seed, then at the next. InputError, before anything is written or run, where a
    name, a value, or the grid as a whole cannot be used.
    """
    source = runs.read_source(notebook)
    known = parameters.read(json.loads(source))
    axes = {name: _values(known, name, values) for name, values in grid.items()}
    shared = parameters.bind(known, given)
    if seeds is not None:
        if "SEED" in grid:
            raise InputError("SEED is in the grid, and --seeds sets it too; give one of them.")
        first = shared.get("SEED", known["SEED"].default if "SEED" in known else 0)
        axes = {"SEED": _values(known, "SEED", range(first, first + seeds)), **axes}
    if not axes:
        raise InputError("There is nothing to sweep over; give -g NAME=VALUE,VALUE or --seeds N.")
    for name in axes:
        if name in given and (name != "SEED" or seeds is None):
            raise InputError(f"{name} is in the grid and given for all points too; give it once.")
    code, jobs = runs.code_version(), []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        runs.bind(source, shared | point)
        jobs.append(Job(notebook.stem, source, point, shared | point, out.absolute(), code))
    device_of(jobs)
    return jobs


def _values(known: Mapping[str, parameters.Parameter], name: str, values: Iterable[Any]) -> list[Any]:
    """As the lesson will get them. InputError where there are none, one cannot be used, or one comes twice."""
    bound = [parameters.bind(known, {name: value})[name] for value in values]
    if not bound:
        raise InputError(f"{name} has no values; give NAME=VALUE,VALUE, such as RATIO=0.3,0.5.")
    for index, value in enumerate(bound):
        if value in bound[:index]:
            raise InputError(f"{name} has the value {value!r} twice; each point of a grid is run once.")
    return bound


def device_of(jobs: Sequence[Job]) -> str:
    """What the runs ask for: "cuda" where one does, "cpu" where all do, else "auto"."""
    known = parameters.read(json.loads(jobs[0].source))
    stated = known["DEVICE"].default if "DEVICE" in known else "auto"
    asked = {str(job.given.get("DEVICE", stated)) for job in jobs}
    if numbered := sorted(name for name in asked if name.startswith("cuda:")):
        raise InputError(f"DEVICE cannot be {numbered[0]} in a sweep, which hands out the GPUs itself; give cuda.")
    return "cuda" if "cuda" in asked else "cpu" if asked == {"cpu"} else "auto"


# one point, where the run takes place --------------------------------------------------------------


def one(job: Job, *, env: Mapping[str, str] | None = None, stop: threading.Event | None = None) -> Outcome:
    """The result of a point, run unless it is there; tried again where its process was lost, not where it failed.

    `env` is set for the run beside what is set. runs.Stopped, with nothing kept, where `stop` was set meanwhile.
    """
    if runs.code_version() != job.code:
        return Outcome(job, None, lost="labkit changed since the sweep began; give the same command again")
    with tempfile.TemporaryDirectory(prefix="labkit-") as folder:
        notebook = Path(folder) / f"{job.lesson}.ipynb"
        notebook.write_bytes(job.source)
        if there := runs.done(notebook, job.given, out=job.out):
            return Outcome(job, there, reused=True)
        for _ in range(TRIES):
            result = runs.run(notebook, job.given, out=job.out, env=env, stop=stop)
            if result.error is None or result.error.name != "ProcessEnded":
                break
    return Outcome(job, result)


def already(jobs: Sequence[Job]) -> int:
    """How many of the points have their result, on the machine that asks."""
    with tempfile.TemporaryDirectory(prefix="labkit-") as folder:
        notebook = Path(folder) / f"{jobs[0].lesson}.ipynb"
        notebook.write_bytes(jobs[0].source)
        return sum(runs.done(notebook, job.given, out=job.out) is not None for job in jobs)


# the whole sweep ----------------------------------------------------------------------------------


def run(
    jobs: Sequence[Job],
    place: Place,
    *,
    on_end: Callable[[Outcome], None] = lambda outcome: None,
    on_wait: Callable[[str], None] = lambda sentence: None,
) -> list[Outcome]:
    """Every job's outcome, as they end; each also goes to `on_end`, and a reason why nothing goes on to `on_wait`.

    KeyboardInterrupt and DataError (the place is gone) stop the rest; what is done stays, and is not done again.
    """
    outcomes = []
    _clear(jobs[0].out / jobs[0].lesson)
    try:
        waiting = {place.executor.submit(one, job): job for job in jobs}
        while waiting:
            ended, _ = wait(waiting, timeout=TICK_SECONDS, return_when=FIRST_COMPLETED)
            trouble = place.trouble()
            if not ended and trouble:
                on_wait(trouble)
            for future in ended:
                outcomes.append(_outcome(waiting.pop(future), future))
                on_end(outcomes[-1])
    except BaseException:
        place.stop()
        raise
    return outcomes


def _clear(home: Path) -> None:
    """Remove what is left of runs that were killed with their whole machine: a run that lives writes at every cell."""
    for preset, longest in runs.CELL_SECONDS.items():
        for folder in home.glob(f".{preset}-*"):
            with contextlib.suppress(FileNotFoundError):  # a run that ended just now
                newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
                if time.time() - newest > 2 * longest:
                    shutil.rmtree(folder, ignore_errors=True)


def _outcome(job: Job, future: Future) -> Outcome:
    if future.cancelled():
        return Outcome(job, None, lost="the run was dropped")
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, LabError):
        return Outcome(job, None, lost=str(error))
    return Outcome(job, None, lost=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


# what is said about it -----------------------------------------------------------------------------


def forecast(jobs: Sequence[Job], done: int, at_once: int | None) -> str:
    """How many runs there are and how long they take, from earlier runs of the lesson in the same folder, if any."""
    left = len(jobs) - done
    axes = " x ".join(f"{len({str(job.point[name]) for job in jobs})} {name}" for name in jobs[0].point)
    said = f"{jobs[0].lesson}: {_points(jobs)} ({axes})" + (f", {done} of them done" if done else "")
    if not left:
        return said
    rounds = math.ceil(left / (at_once or left))
    seconds, basis = _seconds(jobs)
    return f"{said}; {left} to run, {at_once or 'all'} at once: {basis} {_duration(rounds * seconds)}"


def _seconds(jobs: Sequence[Job]) -> tuple[float, str]:
    """Seconds of a run, and what they are: about what earlier ones took, or at most what the preset allows."""
    home, presets = jobs[0].out / jobs[0].lesson, {runs.bind(job.source, job.given)["PRESET"] for job in jobs}
    earlier = [runs.read(folder) for preset in presets for folder in home.glob(f"{preset}-*")]
    if took := [kept.seconds for kept in earlier if kept and not kept.error]:
        return statistics.median(took), "about"
    from labkit.session import BUDGETS  # imports torch

    return max(BUDGETS[preset].seconds for preset in presets), "at most"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Progress:
    """A bar with the runs done, failed and left, and the time they need by this sweep's pace; and a line for each."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._bar = tqdm(total=len(jobs), unit="run", desc=jobs[0].lesson[:2], smoothing=0, disable=None)
        self._ended = self._failed = 0
        self._said = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def end(self, outcome: Outcome) -> None:
        self._ended += 1
        self._failed += bool(outcome.failure)
        if not outcome.reused:
            state = "failed" if outcome.failure else "done"
            count = f"{self._ended}/{self._bar.total}"
            took = f"{outcome.run.seconds:.0f} s" if outcome.run else ""
            tqdm.write(f"{state:6}  {count:>9}  {took:>6}  {words(outcome.job.point)}")
        elif not self._bar.disable:
            self._bar.initial += 1  # it took no time, which says nothing of the others
        self._bar.set_postfix(failed=self._failed, refresh=False)
        self._bar.update()

    def wait(self, sentence: str) -> None:
        if sentence != self._said:
            tqdm.write(sentence, file=sys.stderr)
        self._said = sentence


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many points have a result, and for each that has none a line with the reason."""
    failed = [outcome for outcome in outcomes if outcome.failure]
    reused = sum(outcome.reused for outcome in outcomes)
    run = len(outcomes) - len(failed) - reused
    lines = [f"{_points(outcomes)}: {run} run, {reused} there before, {len(failed)} failed"]
    for outcome in failed:
        where = f"\n        see {outcome.run.notebook}" if outcome.run else ""
        lines.append(f"failed  {words(outcome.job.point)}: {outcome.failure}{where}")
    return "\n".join(lines)


def _points(things: Sequence[Any]) -> str:
    return f"{len(things)} point{'s' * (len(things) != 1)}"


def words(point: Mapping[str, Any]) -> str:
    """A point as text: "RATIO 0.3, CRITERION l1"."""
    return ", ".join(f"{name} {value}" for name, value in point.items())
