"""A model in a process of its own, on one thread and one core: the worker of a service whose load is measured.

A worker in the process that sends the requests would share Python's lock and the cores with the sender, and its service
time would rise with the load. Here the worker has the last core, and the sender is asked to keep to the others.

The process that sends and queues has a garbage collector of its own. A full collection looks through all objects, in a
notebook with several engines for a third of a second, and everything waits meanwhile. So in the `with` block the
objects that were there before are set aside.

>>> import numpy as np
>>> from labkit import models
>>> from labkit.deploy import worker
>>> with worker.Worker(models.resnet20) as compute:
...     compute(np.zeros((2, 1, 28, 28), dtype="float32")).shape
(2, 10)
"""

import contextlib
import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import nn

from labkit.errors import LabError

START_S = 120  # seconds to import torch and build the model
_open_blocks: list[None] = []  # an entry for each block of `objects_set_aside`, of which the last to end lets go


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
        self._set_aside = contextlib.ExitStack()
        self._set_aside.enter_context(objects_set_aside())
        if not self._connection.poll(START_S) or self._connection.recv() != "ready":
            self.__exit__()
            raise LabError(f"The worker did not start within {START_S} s: look whether the machine is busy.")
        return self

    def __exit__(self, *_: object) -> None:
        self._set_aside.close()
        self._connection.close()
        self._process.join(5)
        self._process.kill()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Compute the model's answer [n, ...] to a batch [n, ...]."""
        self._connection.send(x)
        return self._connection.recv()


@contextlib.contextmanager
def objects_set_aside() -> Iterator[None]:
    """Collect garbage now, and keep the objects that are left out of all collections until the end of the block.

    A full collection within the block then looks through the block's own objects only, and pauses nobody.
    """
    gc.collect()
    gc.freeze()
    _open_blocks.append(None)
    try:
        yield
    finally:
        _open_blocks.pop()
        if not _open_blocks:
            gc.unfreeze()


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
    while True:
        try:
            x = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(model(torch.from_numpy(x)).numpy())
