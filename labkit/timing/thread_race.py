"""A race of one thread and several at the start of a run, because another program may keep a core busy.

Threads wait at the end of each parallel loop for the last of them. If its core serves another program, they wait as
long as the scheduler lets that program run, several milliseconds a loop, and a network of a millisecond takes tens.
`benchmarks/two_speeds.py --load` measures it, and shows that no way of waiting avoids the loss.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from labkit.timing.fingerprint import on_threads

ROUNDS = 60  # a third of a second on an idle machine: longer than a program beside keeps a core without a break
LIMIT_S = 2.0  # no round begins later
LOOPS = 32  # parallel loops of a call, each of some tens of microseconds, as in a small network
MULTIPLE = 1.25  # times the time of one thread; two idle cores had 0.6 to 0.8, and 1.8 to 1.9 beside a busy program


@dataclass(frozen=True)
class ThreadRace:
    """The outcome of a race.

    several: threads that raced against one.
    multiple: median seconds of a call on several threads, divided by those on one.
    """

    several: int
    multiple: float

    @property
    def threads(self) -> int:
        """Number of threads to compute with."""
        return 1 if self.multiple > MULTIPLE else self.several


def race(several: int, call: Callable[[], object] | None = None) -> ThreadRace:
    """Race one thread against `several` in turn, for two seconds at most; without a race for a single thread.

    several: threads of torch, 1 or more.
    call: the work of a turn; by default small products of matrices, one after the other.
    """
    if several == 1:
        return ThreadRace(several, 1.0)
    call = call or _products()
    seconds: dict[int, list[float]] = {1: [], several: []}
    deadline = time.perf_counter() + LIMIT_S
    for number in seconds:
        _timed(call, number)  # untimed: starts the threads
    for _ in range(ROUNDS):
        for number, of_number in seconds.items():
            of_number.append(_timed(call, number))
        if time.perf_counter() > deadline:
            break
    return ThreadRace(several, statistics.median(seconds[several]) / statistics.median(seconds[1]))


def _products() -> Callable[[], None]:
    rows, weight = torch.randn(64, 256), torch.randn(256, 256)

    def call() -> None:
        with torch.inference_mode():
            for _ in range(LOOPS):
                torch.mm(rows, weight)

    return call


def _timed(call: Callable[[], object], number: int) -> float:
    with on_threads(number):
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
