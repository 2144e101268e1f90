"""Where the runs of a sweep take place: worker threads of this machine, a Dask cluster, or Slurm's queue.

Each place is a `concurrent.futures` executor with what a sweep needs to know of it. A place decides how many runs there
are at once and which GPU each one gets; what is run and what becomes of it is sweep.py's. No place runs two on one GPU.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from course import runs
from labkit.errors import DataError, InputError

if TYPE_CHECKING:
    from distributed import Client, Worker

TRIES = 3  # of a run whose worker was lost
CONNECT_SECONDS = 5
SHARED = (
    "{} runs at once share the cores of one machine: what a clock measured is not comparable with a run that was alone"
)
START_A_WORKER = "CUDA_VISIBLE_DEVICES=0 dask worker {} --nthreads 1 --resources GPU=1"


@dataclass(frozen=True)
class Place:
    """An executor, how many runs it does at once (None: its queue decides), and what the user should know of it.

    stop() drops what waits and ends what runs here. ask(fn, *args) calls fn where the runs will be. trouble() is a
    sentence on why nothing goes on at the moment, or empty; it raises DataError where nothing ever will.
    """

    executor: Executor
    at_once: int | None
    notes: Sequence[str]
    stop: Callable[[], None]
    ask: Callable[..., Any] = lambda fn, *args: fn(*args)
    trouble: Callable[[], str] = lambda: ""


def enter(on: str, *, workers: int | None, device: str, out: Path) -> AbstractContextManager[Place]:
    """The place called "local", "dask://host:port" or "slurm"; InputError where it is not there or cannot be used.

    workers: how many runs at once (default: one on this machine's CPU, one a GPU, and all that a cluster takes).
    device: what the runs ask for: "cpu", "cuda" or "auto". out: the results' folder, which every worker has to see.
    """
    if on == "local":
        return local(workers, device, out)
    if on == "slurm":
        return slurm(workers, device, out)
    if on.startswith(("dask://", "tcp://")) and len(on.partition("://")[2]) > 0:
        if workers:
            raise InputError("A Dask cluster has the workers that were started for it; leave out --workers.")
        return dask(on.replace("dask://", "tcp://"), device, out)
    raise InputError(f"A sweep cannot run on {on!r}; give local, dask://host:port or slurm.")


# this machine -------------------------------------------------------------------------------------


class _Threads(ThreadPoolExecutor):
    """Threads that call fn(job, env=..., stop=...), each with one of the environments: no two have the same GPU."""

    def __init__(self, environments: Sequence[dict[str, str]]) -> None:
        super().__init__(len(environments))
        self._stop = threading.Event()
        self._free: SimpleQueue[dict[str, str]] = SimpleQueue()
        for environment in environments:
            self._free.put(environment)

    def submit(self, fn: Callable, /, job: Any) -> Future:
        return super().submit(self._with_environment, fn, job)

    def _with_environment(self, fn: Callable, job: Any) -> Any:
        environment = self._free.get()
        try:
            return fn(job, env=environment, stop=self._stop)
        finally:
            self._free.put(environment)

    def stop(self) -> None:
        """Drop what waits, and end the runs under way, which a Ctrl-C in the main thread does not reach."""
        self._stop.set()
        self.shutdown(wait=True, cancel_futures=True)


@contextmanager
def local(workers: int | None, device: str, out: Path) -> Iterator[Place]:
    """One run at a time on a CPU unless `workers` says more, or one a GPU through CUDA_VISIBLE_DEVICES."""
    device = os.environ.get("LABKIT_DEVICE") or device if device == "auto" else device
    gpus = _visible_gpus() if device != "cpu" else []
    if device == "cuda" and not gpus:
        raise InputError("torch sees no GPU on this machine; leave DEVICE out, or sweep where one is: --on dask://...")
    if gpus and workers and workers > len(gpus):
        raise InputError(f"There are {len(gpus)} GPUs, and no two runs share one; give --workers at most {len(gpus)}.")
    with _reserved(gpus, workers or len(gpus)) as reserved:
        if gpus and not reserved:
            raise InputError("Another sweep has all GPUs of this machine; give the same command when it has ended.")
        count = len(reserved) or workers or 1
        shares = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in reserved] or [{}] * count
        threads = _threads_each(count)
        _require_writable(out)
        pool = _Threads([{**share, **threads} for share in shares])
        try:
            yield Place(pool, count, [SHARED.format(count)] if count > 1 and not gpus else [], pool.stop)
        finally:
            pool.stop()


@contextmanager
def _reserved(gpus: Sequence[str], most: int) -> Iterator[list[str]]:
    """Up to `most` GPUs that no other sweep of this user has; held until the block, or the process, ends."""
    free, folder = [], Path(tempfile.gettempdir())
    with contextlib.ExitStack() as held:
        for gpu in gpus:
            if len(free) < most:
                file = held.enter_context(open(folder / f"labkit-gpu-{gpu}-{os.getuid()}.lock", "a"))
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    free.append(gpu)
        yield free


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES would name each."""
    import torch

    count = torch.cuda.device_count()
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return (named or [str(index) for index in range(count)])[:count]


def _threads_each(count: int) -> dict[str, str]:
    """An equal share of the cores for each of `count` runs at once, unless OMP_NUM_THREADS is set already."""
    from labkit import machine

    if count == 1 or os.environ.get("OMP_NUM_THREADS"):
        return {}
    cores = machine.threads()
    if count > cores:
        raise InputError(f"This machine has {cores} cores to run on; give --workers at most {cores}.")
    return {"OMP_NUM_THREADS": str(cores // count)}


# a Dask cluster -----------------------------------------------------------------------------------


@contextmanager
def dask(address: str, device: str, out: Path) -> Iterator[Place]:
    """The workers of the scheduler at `address`: one run a thread of a worker, or one a GPU that a worker offers.

    Checked at once: that there are workers, that they have this labkit and see `out`, that GPUs are offered where the
    runs need them and each by one worker alone.
    """
    client = _connected(address)
    try:
        cards = _cards(client, address, out)
        resources = _resources(cards, device, address)
        takers = [card for card in cards if not resources or card["gpus"]]
        at_once = sum(1 if resources else card["nthreads"] for card in takers)
        first = takers[0]["address"]
        pool = client.get_executor(pure=False, retries=TRIES - 1, **({"resources": resources} if resources else {}))
        yield Place(
            pool,
            at_once,
            _cluster_notes(takers, bool(resources)),
            stop=lambda: pool.shutdown(wait=False),
            ask=lambda fn, *args: client.run(fn, *args, workers=[first])[first],
            trouble=lambda: _dask_trouble(client, address),
        )
    finally:
        with contextlib.suppress(Exception):  # a scheduler that is gone cannot be told goodbye
            client.close(timeout=CONNECT_SECONDS)


def _connected(address: str) -> "Client":
    try:
        from distributed import Client
        from distributed.comm import connect
    except ImportError:
        raise InputError(_not_installed("Dask")) from None
    for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "distributed"]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # its tracebacks; what is lost gets a sentence here

    async def answers() -> None:
        await (await connect(address, timeout=CONNECT_SECONDS)).close()

    try:
        asyncio.run(answers())  # first, as a Client that finds nobody takes ten seconds more to say so
        return Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, MemoryError):  # the last where the answer is no Dask's, and its length is nonsense
        raise InputError(
            f"There is no Dask scheduler at {address}; start one (dask scheduler) or mend the address."
        ) from None


def _cards(client: "Client", address: str, out: Path) -> list[dict[str, Any]]:
    """What each worker says of itself; InputError where there is none, or one could not do a run as it is done here."""
    nobody = f"The scheduler at {address} has no worker; start one: {START_A_WORKER.format(address)}"
    if not client.nthreads():
        raise InputError(nobody)
    _require_writable(out)
    with tempfile.NamedTemporaryFile(prefix=".sweep-", dir=out) as sign:
        said = client.run(_card, sign.name, on_error="return")
    cards = {worker: card for worker, card in said.items() if not isinstance(card, OSError)}  # others were just lost
    if not cards:
        raise InputError(nobody)
    for worker, card in cards.items():
        if isinstance(card, Exception):
            raise InputError(f"The worker {worker} cannot use this labkit ({card}); install the same one there.")
        if card["code"] != runs.code_version():
            raise InputError(f"The worker {worker} has another version of labkit; bring the same code to all machines.")
        if not card["sees_out"]:
            raise InputError(f"The worker {worker} does not see {out}; choose an --out that all machines share.")
    return [{**card, "address": worker} for worker, card in cards.items()]


def _card(sign: str, dask_worker: "Worker") -> dict[str, Any]:
    import torch

    from labkit.machine import fingerprint

    return {
        "code": runs.code_version(),
        "sees_out": Path(sign).exists(),
        "machine": fingerprint().slug,
        "host": dask_worker.address.rpartition(":")[0],
        "nthreads": dask_worker.state.nthreads,
        "gpus": dask_worker.state.total_resources.get("GPU", 0),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "cuda": torch.cuda.is_available(),
    }


def _resources(cards: Sequence[dict[str, Any]], device: str, address: str) -> dict[str, int]:
    """What a run asks of a worker: one GPU where GPUs are offered and the runs may use one, else nothing."""
    offers = [card for card in cards if card["gpus"]]
    if device == "cpu" or (device == "auto" and not offers and not any(card["cuda"] for card in cards)):
        return {}
    how = f"start one a GPU: {START_A_WORKER.format(address)}"
    if not offers:
        raise InputError(f"No worker of {address} offers a GPU to count; {how}, or set DEVICE to cpu.")
    places = Counter((card["host"], card["visible"]) for card in offers)
    if any(card["gpus"] != 1 or not card["visible"] or "," in card["visible"] for card in offers):
        raise InputError(f"A worker of {address} offers GPUs without one of its own; {how}.")
    if twice := [f"GPU {visible} of {host}" for (host, visible), count in places.items() if count > 1]:
        raise InputError(f"Two workers of {address} share {twice[0]}; {how}, each with a number of its own.")
    return {"GPU": 1}


def _cluster_notes(cards: Sequence[dict[str, Any]], on_gpus: bool) -> list[str]:
    machines = sorted({card["machine"] for card in cards})
    notes = [f"the workers are different machines ({', '.join(machines)}): compare times only within one"]
    notes = notes if len(machines) > 1 else []
    together = Counter()
    for card in cards:
        together[card["host"]] += card["nthreads"]
    if not on_gpus and max(together.values()) > 1:
        notes.append(SHARED.format(max(together.values())))
    return notes


def _dask_trouble(client: "Client", address: str) -> str:
    if client.status != "running":
        raise DataError(
            f"The Dask scheduler at {address} is gone; start it and its workers again, then give the same command: it "
            "goes on with what is not done."
        )
    with contextlib.suppress(OSError):  # lost this very moment, which the next call says
        return "" if client.nthreads() else f"{address} has no worker any more; the sweep waits for one"
    return ""


# Slurm --------------------------------------------------------------------------------------------


class _Queue(ThreadPoolExecutor):
    """Threads that each hand one run at a time to submitit's executor and wait for it."""

    def __init__(self, jobs: Any, at_most: int) -> None:
        super().__init__(at_most)
        self._jobs = jobs
        self._queued: set[Any] = set()
        self._stopped = False

    def submit(self, fn: Callable, /, job: Any) -> Future:
        return super().submit(self._wait_for, fn, job)

    def _wait_for(self, fn: Callable, job: Any) -> Any:
        from submitit.core.utils import UncompletedJobError

        for attempt in range(1, TRIES + 1):
            queued = self._jobs.submit(fn, job)
            self._queued.add(queued)
            try:
                return queued.result()
            except UncompletedJobError:  # its node was lost, or its time was over
                if self._stopped or attempt == TRIES:
                    raise
            finally:
                self._queued.discard(queued)

    def stop(self) -> None:
        self._stopped = True
        self.shutdown(wait=False, cancel_futures=True)
        for queued in list(self._queued):
            queued.cancel(check=False)
        self.shutdown(wait=True)


@contextmanager
def slurm(workers: int | None, device: str, out: Path, *, cluster: str = "slurm") -> Iterator[Place]:
    """Slurm's queue through submitit, one job a run, at most `workers` in the queue (default: 100).

    A job gets an hour, OMP_NUM_THREADS cores (4 where it is not set), and one GPU where DEVICE is cuda; partition and
    account are Slurm's own SBATCH_PARTITION and SBATCH_ACCOUNT. `out` has to be on a disk that the nodes share.
    Written to submitit's interface and tried with its local executor (cluster="local"); no Slurm was at hand.
    """
    if device == "auto":
        raise InputError("Slurm has to know what to reserve; give -p DEVICE cuda for a GPU a run, or -p DEVICE cpu.")
    try:
        from submitit import AutoExecutor
    except ImportError:
        raise InputError(_not_installed("submitit")) from None
    if cluster == "slurm" and not shutil.which("sbatch"):
        raise InputError("There is no Slurm on this machine (no sbatch); sweep from a login node of the cluster.")
    _require_writable(out)
    logs = Path(tempfile.mkdtemp(prefix=".slurm-", dir=out))
    jobs = AutoExecutor(folder=logs, cluster=cluster)
    jobs.update_parameters(
        name="labkit",
        timeout_min=60,
        cpus_per_task=int(os.environ.get("OMP_NUM_THREADS") or 4),
        gpus_per_node=int(device == "cuda"),
    )
    queue = _Queue(jobs, workers or 100)
    try:
        yield Place(queue, workers, [], queue.stop)
    finally:
        queue.stop()
        shutil.rmtree(logs, ignore_errors=True)


def _require_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise InputError(f"Results cannot be written to {out} ({error.strerror}); choose another --out.") from None


def _not_installed(what: str) -> str:
    return f"{what} is not installed here; install it with: .venv/bin/python -m pip install -e '.[cluster]'"
