"""A model in a process of its own, on one thread and one core: the worker of a service whose load is measured.

A worker in the process that sends the requests would share Python's lock and the cores with the sender, and its service
time would rise with the load. Here the worker has the last core, and the sender is asked to keep to the others.

>>> import numpy as np
>>> from labkit import models
>>> from labkit.deploy import worker
>>> with worker.Worker(models.resnet20) as compute:
...     compute(np.zeros((2, 1, 28, 28), dtype="float32")).shape
(2, 10)
"""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import nn

from labkit.errors import LabError

START_S = 120  # seconds to import torch and build the model
IDLE_LOOP = """import os, sys
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
os.sched_setaffinity(0, [int(sys.argv[1])])
while True:
    pass"""
AWAKE_S = 0.3  # seconds until the loops run


class Worker:
    """A process that answers arrays with arrays, in a `with` block: `with Worker(build) as compute: compute(x)`.

    build: function of a module without arguments that returns the model, such as `models.resnet20`.
    """

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        self._build = build

    def __enter__(self) -> "Worker":
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        core = _cores()[-1] if len(_cores()) > 1 else None
        self._process = context.Process(target=_work, args=(other_end, self._build, core), daemon=True)
        self._process.start()
        other_end.close()
        if not self._connection.poll(START_S) or self._connection.recv() != "ready":
            self.__exit__()
            raise LabError(f"The worker did not start within {START_S} s: look whether the machine is busy.")
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(5)
        self._process.kill()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Compute the model's answer [n, ...] to a batch [n, ...]."""
        self._connection.send(x)
        return self._connection.recv()


def leave_the_worker_its_core() -> None:
    """Keep the calling thread and the threads that it starts off the worker's core; nothing without a second core."""
    free = _cores()[:-1]
    if free and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, free)  # of the calling thread


@contextmanager
def cores_kept_awake() -> Iterator[None]:
    """Keep each core from sleeping in a `with` block: a loop that gives way to everything else runs on it.

    Without Linux's idle priority (SCHED_IDLE) nothing runs and nothing changes.
    """
    cores = _cores() if hasattr(os, "SCHED_IDLE") else []
    loops = [subprocess.Popen([sys.executable, "-c", IDLE_LOOP, str(core)]) for core in cores]
    try:
        time.sleep(AWAKE_S)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def _cores() -> list[int]:
    """Return the numbers of the cores that this process may use; none where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(os.getpid()))


@torch.inference_mode()
def _work(connection: Connection, build: Callable[[], nn.Module], core: int | None) -> None:
    """Answer until the other end of the connection is closed."""
    if core is not None:
        os.sched_setaffinity(0, [core])
    torch.set_num_threads(1)
    model = build()
    connection.send("ready")
    while True:
        try:
            x = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(model(torch.from_numpy(x)).numpy())
