"""A lesson at every point of a grid: checked before the first run starts, resumed where it stopped, here or on Dask.

    ./lab sweep 03 -g RATIO=0.3,0.5,0.7 -g CRITERION=l1,taylor --seeds 5               one machine, one run at a time
    ./lab sweep 03 -g RATIO=0.3,0.5,0.7 --workers 2                                    ... or several, or one a GPU

    dask scheduler                                                                     on one machine of a cluster,
    CUDA_VISIBLE_DEVICES=0 dask worker tcp://host:8786 --nthreads 1                    one for each GPU, and
    ./lab sweep 03 -g RATIO=0.3,0.5,0.7 --on dask://host:8786 --out /shared/runs       from where the folder is seen

A cluster needs the same labkit and the folder of results on every machine; the lesson is sent. Slurm, PBS and others
through dask-jobqueue, Kubernetes through dask-kubernetes, each of which starts a scheduler whose address --on takes:

    from dask_jobqueue import SLURMCluster
    cluster = SLURMCluster(queue="gpu", cores=1, processes=1, memory="32GB", job_extra_directives=["--gres=gpu:1"])
    cluster.scale(jobs=4); print(cluster.scheduler_address); input("Enter ends it")
"""

import itertools
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from course import run
from labkit import files
from labkit.errors import DataError, InputError, LabError
from labkit.lesson import parameters

CONNECT_SECONDS = 5
Submit = Callable[[run.Job], "Future[Outcome]"]


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its run, or why there is none (`lost`). reused: the run had been there before."""

    job: run.Job
    run: run.Run | None
    reused: bool = False
    lost: str = ""

    @property
    def failure(self) -> str:
        """Why the point has no good result; empty where it has one."""
        return self.lost or (str(self.run.error) if self.run and self.run.error else "")


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
    notebook: Path, grid: Mapping[str, Sequence[Any]], values: Mapping[str, Any], *, seeds: int | None = None, out: Path
) -> list[run.Job]:
    """One job for each point of `grid`, checked before anything is written or run.

    values  parameters of every point
    seeds   how many values of SEED to repeat the grid for, from the lesson's own on; the whole grid comes at each
    out     folder of all results

    InputError where a name, a value, or the grid as a whole cannot be used.
    """
    if seeds and "SEED" in grid:
        raise InputError("SEED is in the grid, and --seeds sets it too; give one of them.")
    if both := sorted(set(grid) & set(values)):
        raise InputError(f"{both[0]} is in the grid and given for all points too; give it once.")
    if not grid and not seeds:
        raise InputError("There is nothing to sweep over; give -g NAME=VALUE,VALUE or --seeds N.")
    _, declared = run.load(notebook)
    shared = parameters.bind(declared, values)
    axes: dict[str, Sequence[Any]] = dict(grid)
    if seeds:
        first = shared.get("SEED", declared["SEED"].default if "SEED" in declared else 0)
        axes = {"SEED": range(first, first + seeds), **axes}
    jobs: dict[str, run.Job] = {}
    for combination in itertools.product(*axes.values()):
        point = dict(zip(axes, combination, strict=True))
        label = ", ".join(f"{name} {value}" for name, value in point.items())
        job = run.prepare(notebook, shared | point, out, label)
        if job.device.startswith("cuda:"):
            raise InputError(f"DEVICE cannot be {job.device} in a sweep, which hands out the GPUs itself; give cuda.")
        if jobs.setdefault(repr(sorted(job.parameters.items())), job) is not job:
            raise InputError(f"The grid has the point {label} twice; each point is run once.")
    return list(jobs.values())


def run_point(job: run.Job, env: Mapping[str, str] | None = None, stop: threading.Event | None = None) -> Outcome:
    """The result of a point, where it takes place: run unless it exists, and once more where its process was lost."""
    if done := run.read(job.folder()):
        return Outcome(job, done, reused=True)
    result = run.run(job, env=env, stop=stop)
    if result.error and result.error.name == "ProcessEnded":
        result = run.run(job, env=env, stop=stop)
    return Outcome(job, result)


def outcomes(jobs: Sequence[run.Job], submit: Submit, alive: Callable[[], bool]) -> Iterator[Outcome]:
    """Every job's outcome, as they end; DataError where the scheduler is gone. What is done is not done again."""
    waiting = {submit(job): job for job in jobs}
    while waiting:
        ended, _ = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
        if not alive():
            raise DataError(
                "The Dask scheduler is gone; start it and its workers again, then give the same command: it goes on "
                "with what is not done."
            )
        for future in ended:
            job, error = waiting.pop(future), future.exception()
            name = "" if isinstance(error, LabError) else f"{type(error).__name__}: "
            yield Outcome(job, None, lost=f"{name}{error}") if error else future.result()


# where ----------------------------------------------------------------------------------------------


@contextmanager
def workers(on: str, jobs: Sequence[run.Job], count: int | None) -> Iterator[tuple[Submit, Callable[[], bool], int]]:
    """What takes a job, whether it is still alive, and how many runs there are at once.

    on     "local" or "dask://host:port"
    count  how many runs at once (default: one on this machine's CPU, or one a GPU)

    InputError where the place does not exist, or results cannot be written. At an exception what waits is dropped, and
    what runs here is ended.
    """
    address = on.replace("dask://", "tcp://")
    if on != "local" and not re.match(r"tcp://.", address):
        raise InputError(f"A sweep cannot run on {on!r}; give local or dask://host:port.")
    if on != "local" and count:
        raise InputError("A Dask cluster has the workers that were started for it; leave out --workers.")
    place = _here(_environments(jobs, count)) if on == "local" else _on_dask(address)
    with run.partial_folder(jobs[0].out):
        pass  # a folder that cannot be written is told once, not at each point
    with place as submit_alive_and_count:
        yield submit_alive_and_count


@contextmanager
def _here(environments: Sequence[dict[str, str]]) -> Iterator[tuple[Submit, Callable[[], bool], int]]:
    """Threads that each run a job in one of the environments, so that no two have the same GPU."""
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for environment in environments:
        free.put(environment)
    stop = threading.Event()

    def call(job: run.Job) -> Outcome:
        environment = free.get()
        try:
            return run_point(job, environment, stop)
        finally:
            free.put(environment)

    pool = ThreadPoolExecutor(len(environments))
    try:
        yield lambda job: pool.submit(call, job), lambda: True, len(environments)
    finally:
        stop.set()  # a Ctrl-C in the main thread does not reach the runs under way
        pool.shutdown(cancel_futures=True)


def _environments(jobs: Sequence[run.Job], count: int | None) -> list[dict[str, str]]:
    """For each of the runs at once its GPU, if there are any, and its share of the cores."""
    from labkit.timing import machine

    devices = {os.environ.get("LABKIT_DEVICE") or job.device if job.device == "auto" else job.device for job in jobs}
    gpus = _visible_gpus() if devices != {"cpu"} else []
    if "cuda" in devices and not gpus:
        raise InputError("torch sees no GPU on this machine; leave DEVICE out, or sweep where one is: --on dask://...")
    if gpus and count and count > len(gpus):
        raise InputError(f"There are {len(gpus)} GPUs, and no two runs share one; give --workers at most {len(gpus)}.")
    count, share = count or len(gpus) or 1, {}
    if count > 1 and not os.environ.get("OMP_NUM_THREADS"):
        cores = machine.threads()
        if count > cores:
            raise InputError(f"This machine has {cores} cores to run on; give --workers at most {cores}.")
        share = {"OMP_NUM_THREADS": str(cores // count)}
    return [share | ({"CUDA_VISIBLE_DEVICES": gpus[index]} if gpus else {}) for index in range(count)]


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES would name each."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(index) for index in range(count)])[:count]


@contextmanager
def _on_dask(address: str) -> Iterator[tuple[Submit, Callable[[], bool], int]]:
    """The workers of a Dask scheduler, which sends a job to another one where a worker is lost."""
    try:
        from distributed import Client
    except ImportError:
        raise InputError(f"Dask is not installed: {files.set_up_with('cluster')}.") from None
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # its tracebacks; what is lost gets a sentence here
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, MemoryError):  # the last where the answer is no Dask's, and its length is nonsense
        raise InputError(
            f"There is no Dask scheduler at {address}; start one (dask scheduler) or correct the address."
        ) from None
    try:
        pool = client.get_executor(pure=False)
        yield (
            lambda job: pool.submit(run_point, job),
            lambda: client.status == "running",
            sum(client.nthreads().values()),
        )
    finally:
        with suppress(Exception):  # closing a lost scheduler fails
            client.close(timeout=CONNECT_SECONDS)


def summary(ended: Sequence[Outcome]) -> str:
    """How many points have a result, and for each that has none a line with the reason."""
    failed = [outcome for outcome in ended if outcome.failure]
    reused = sum(outcome.reused for outcome in ended)
    count = len(ended) - len(failed) - reused
    lines = [f"{len(ended)} points: {count} run, {reused} there before, {len(failed)} failed"]
    for outcome in failed:
        where = f"\n        see {outcome.run.notebook}" if outcome.run else ""
        lines.append(f"failed  {outcome.job.label}: {outcome.failure}{where}")
    return "\n".join(lines)
