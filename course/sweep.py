"""A lesson at every point of a grid: checked before the first run starts, resumed where it stopped, here or on Dask.

    ./lab sweep 03 -g RATIO=0.3,0.5,0.7 -g CRITERION=l1,taylor --seeds 5               one machine, one run at a time
    ./lab sweep 03 -g RATIO=0.3,0.5,0.7 --workers 2                                    ... or several, or one a GPU

    dask scheduler                                                                     on one machine of a cluster,
    CUDA_VISIBLE_DEVICES=0 dask worker tcp://host:8786 --nthreads 1                    one for each GPU, and
    ./lab sweep 03 -g RATIO=0.3,0.5,0.7 --on dask://host:8786 --out /shared/runs       from where the folder is seen

A cluster needs the same labkit and the folder of results on every machine; the lesson is sent. For Slurm and PBS,
dask-jobqueue starts a scheduler with an address for --on; for Kubernetes, dask-kubernetes:

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
from typing import Any, NamedTuple

from course import run, store
from course.store import Job, Run
from labkit import files
from labkit.errors import DataError, InputError, LabError
from labkit.lesson import parameters

CONNECT_SECONDS = 5
_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[(]*[\])])")


@dataclass(frozen=True)
class Outcome:
    """The end of a job.

    job     the job
    run     the run, good or failed; None if the job was lost
    reused  True if the run was finished before
    lost    why there is no run; "" if there is a run
    """

    job: Job
    run: Run | None
    reused: bool = False
    lost: str = ""

    @property
    def failure(self) -> str:
        """The reason for a point without a good result; "" for a good result."""
        if self.run and self.run.error:
            return str(self.run.error)
        return self.lost


class Workers(NamedTuple):
    """The workers of a sweep, on the same machine or in a cluster.

    submit  function of a job: hands the job to a worker, returns a future of an Outcome
    alive   function without arguments: False once the workers are out of reach
    count   runs at once
    """

    submit: Callable[[Job], "Future[Outcome]"]
    alive: Callable[[], bool]
    count: int


# points -----------------------------------------------------------------------------------------------


def parse(texts: Iterable[str]) -> dict[str, list[str]]:
    """Read a grid from the command line: ["RATIO=0.3,0.5"] -> {"RATIO": ["0.3", "0.5"]}.

    Commas inside brackets are part of a value. Raises InputError for a text of a different form.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = (part.strip() for part in text.partition("="))
        if not name or not equals:
            raise InputError(f"{text!r} is no part of a grid; give NAME=VALUE,VALUE, such as RATIO=0.3,0.5.")
        if name in grid:
            raise InputError(f"{name} is in the grid twice; give all of its values at once: -g {name}=...")
        grid[name] = [value.strip() for value in _COMMA_OUTSIDE_BRACKETS.split(values)]
        if "" in grid[name]:
            raise InputError(f"{name} has an empty value in {text!r}; give NAME=VALUE,VALUE, such as RATIO=0.3,0.5.")
    return grid


def plan(
    notebook: Path, grid: Mapping[str, Sequence[Any]], values: Mapping[str, Any], *, seeds: int | None = None, out: Path
) -> list[Job]:
    """Make a job for each point of a grid, checked before the first run.

    notebook  path of the lesson
    grid      values by parameter
    values    parameters of every point
    seeds     number of values of SEED, from the lesson's own on; the whole grid is repeated at each
    out       folder of all results

    Raises InputError for an unknown name, a value out of range, or a grid with a point twice or without points.
    """
    _require_grid(grid, values, seeds)
    _, declared = run.load(notebook)
    shared = parameters.bind(declared, values)
    axes: dict[str, Sequence[Any]] = dict(grid)
    if seeds:
        lesson_seed = declared["SEED"].default if "SEED" in declared else 0
        first = shared.get("SEED", lesson_seed)
        axes = {"SEED": range(first, first + seeds), **axes}

    jobs: dict[str, Job] = {}
    for combination in itertools.product(*axes.values()):
        point = dict(zip(axes, combination, strict=True))
        label = ", ".join(f"{name} {value}" for name, value in point.items())
        job = run.prepare(notebook, shared | point, out, label)
        if job.device.startswith("cuda:"):
            raise InputError(f"DEVICE cannot be {job.device} in a sweep, which hands out the GPUs itself; give cuda.")
        identity = repr(sorted(job.parameters.items()))
        if identity in jobs:
            raise InputError(f"The grid has the point {label} twice; each point is run once.")
        jobs[identity] = job
    return list(jobs.values())


def _require_grid(grid: Mapping[str, Sequence[Any]], values: Mapping[str, Any], seeds: int | None) -> None:
    if seeds and "SEED" in grid:
        raise InputError("SEED is in the grid, and --seeds sets it too; give one of them.")
    both = sorted(set(grid) & set(values))
    if both:
        raise InputError(f"{both[0]} is in the grid and given for all points too; give it once.")
    if not grid and not seeds:
        raise InputError("There is nothing to sweep over; give -g NAME=VALUE,VALUE or --seeds N.")


def run_point(job: Job, env: Mapping[str, str] | None = None, stop: threading.Event | None = None) -> Outcome:
    """Run a point where the function is called, unless finished before; run a second time after a lost process.

    job   the point
    env   environment variables for the run
    stop  event by which a thread ends the run
    """
    finished = store.finished(job)
    if finished:
        return Outcome(job, finished, reused=True)
    result = run.run(job, env=env, stop=stop)
    if result.error and result.error.name == "ProcessEnded":
        result = run.run(job, env=env, stop=stop)
    return Outcome(job, result)


def outcomes(jobs: Sequence[Job], crew: Workers) -> Iterator[Outcome]:
    """Hand all jobs to the workers and yield the outcomes, the first to end first.

    Raises DataError if the scheduler is gone; results finished by then are kept.
    """
    waiting = {crew.submit(job): job for job in jobs}
    while waiting:
        ended, _ = wait(waiting, timeout=2, return_when=FIRST_COMPLETED)
        if not crew.alive():
            raise DataError(
                "The Dask scheduler is gone; start it and its workers again, then give the same command: it goes on "
                "with what is not done."
            )
        for future in ended:
            yield _outcome(waiting.pop(future), future)


def _outcome(job: Job, future: "Future[Outcome]") -> Outcome:
    error = future.exception()
    if error is None:
        return future.result()
    reason = str(error) if isinstance(error, LabError) else f"{type(error).__name__}: {error}"
    return Outcome(job, None, lost=reason)


# workers ----------------------------------------------------------------------------------------------


@contextmanager
def workers(on: str, jobs: Sequence[Job], count: int | None) -> Iterator[Workers]:
    """Start the workers of a sweep, or connect to a cluster, and let go of the workers at the end.

    on     "local" or "dask://host:port"
    jobs   the points of the sweep
    count  runs at once; by default 1 on this machine's CPU, or 1 per GPU

    Raises InputError if there are no such workers or results cannot be written. After an exception waiting jobs are
    dropped, and runs on this machine are ended.
    """
    address = on.replace("dask://", "tcp://")
    if on != "local" and not re.match(r"tcp://.", address):
        raise InputError(f"A sweep cannot run on {on!r}; give local or dask://host:port.")
    if on != "local" and count:
        raise InputError("A Dask cluster has the workers that were started for it; leave out --workers.")
    opening = _on_this_machine(_environments(jobs, count)) if on == "local" else _on_dask(address)
    with store.partial_folder(jobs[0].out):
        pass  # a folder that cannot be written is told once, not at each point
    with opening as crew:
        yield crew


@contextmanager
def _on_this_machine(environments: Sequence[dict[str, str]]) -> Iterator[Workers]:
    """Start a thread per environment. A run takes a free environment, so that each run has a GPU alone."""
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for environment in environments:
        free.put(environment)
    stop = threading.Event()

    def run_in_free_environment(job: Job) -> Outcome:
        environment = free.get()
        try:
            return run_point(job, environment, stop)
        finally:
            free.put(environment)

    pool = ThreadPoolExecutor(len(environments))
    try:
        yield Workers(
            submit=lambda job: pool.submit(run_in_free_environment, job),
            alive=lambda: True,
            count=len(environments),
        )
    finally:
        stop.set()  # a Ctrl-C in the main thread does not reach the runs under way
        pool.shutdown(cancel_futures=True)


def _environments(jobs: Sequence[Job], count: int | None) -> list[dict[str, str]]:
    """Make the environment variables of each run at once: a GPU, if any, and a share of the cores."""
    gpus = _gpus(jobs)
    if gpus and count and count > len(gpus):
        raise InputError(f"There are {len(gpus)} GPUs, and no two runs share one; give --workers at most {len(gpus)}.")
    count = count or len(gpus) or 1
    environments = [_share_of_cores(count) for _ in range(count)]
    if gpus:
        for environment, gpu in zip(environments, gpus, strict=False):
            environment["CUDA_VISIBLE_DEVICES"] = gpu
    return environments


def _gpus(jobs: Sequence[Job]) -> list[str]:
    """List the GPUs for the jobs, empty for jobs on the CPU; InputError if a job needs a GPU and there is none."""
    devices = {_device(job) for job in jobs}
    if devices == {"cpu"}:
        return []
    gpus = _visible_gpus()
    if "cuda" in devices and not gpus:
        raise InputError("torch sees no GPU on this machine; leave DEVICE out, or sweep where one is: --on dask://...")
    return gpus


def _device(job: Job) -> str:
    if job.device == "auto":
        return os.environ.get("LABKIT_DEVICE") or "auto"
    return job.device


def _share_of_cores(count: int) -> dict[str, str]:
    """Set the threads of each of `count` runs at once, unless the user has set the number."""
    from labkit.timing import machine

    if count == 1 or os.environ.get("OMP_NUM_THREADS"):
        return {}
    cores = machine.threads()
    if count > cores:
        raise InputError(f"This machine has {cores} cores to run on; give --workers at most {cores}.")
    return {"OMP_NUM_THREADS": str(cores // count)}


def _visible_gpus() -> list[str]:
    """List the GPUs visible to the process, in the words of CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = named or [str(index) for index in range(count)]
    return names[:count]


@contextmanager
def _on_dask(address: str) -> Iterator[Workers]:
    """Connect to a Dask scheduler, which gives the job of a lost worker to the next worker."""
    try:
        from distributed import Client
    except ImportError:
        raise InputError(f"Dask is not installed: {files.set_up_with('cluster')}.") from None
    _silence_dask()
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, MemoryError):  # the last where the answer is no Dask's, and its length is nonsense
        raise InputError(
            f"There is no Dask scheduler at {address}; start one (dask scheduler) or correct the address."
        ) from None
    try:
        pool = client.get_executor(pure=False)
        yield Workers(
            submit=lambda job: pool.submit(run_point, job),
            alive=lambda: client.status == "running",
            count=sum(client.nthreads().values()),
        )
    finally:
        with suppress(Exception):  # closing a lost scheduler fails
            client.close(timeout=CONNECT_SECONDS)


def _silence_dask() -> None:
    """Keep Dask's tracebacks off the terminal: a lost job gets a sentence in `summary`."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def summary(ended: Sequence[Outcome]) -> str:
    """Count the points of a sweep, run, reused and failed; a line with the reason follows for each failed point."""
    failed = [outcome for outcome in ended if outcome.failure]
    reused = sum(outcome.reused for outcome in ended)
    new = len(ended) - len(failed) - reused
    lines = [f"{len(ended)} points: {new} run, {reused} there before, {len(failed)} failed"]
    for outcome in failed:
        line = f"failed  {outcome.job.label}: {outcome.failure}"
        if outcome.run:
            line += f"\n        see {outcome.run.notebook}"
        lines.append(line)
    return "\n".join(lines)
