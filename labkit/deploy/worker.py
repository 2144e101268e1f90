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
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import nn

from labkit.errors import LabError

START_S = 120  # seconds to import torch and build the model


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

    def look_without_pause(self, without_pause: bool) -> None:
        """Let the worker look for work without a pause, so that its core never sleeps; False: it sleeps until then."""
        self._connection.send(without_pause)


def leave_the_worker_its_core() -> None:
    """Keep the calling thread and the threads that it starts off the worker's core; nothing without a second core."""
    free = _cores()[:-1]
    if free and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, free)  # of the calling thread


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
    without_pause = False
    while True:
        try:
            while without_pause and not connection.poll(0):
                pass
            x = connection.recv()
        except (EOFError, OSError):
            return
        if isinstance(x, bool):
            without_pause = x
            continue
        connection.send(model(torch.from_numpy(x)).numpy())
