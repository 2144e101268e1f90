"""The process that a lesson runs in: the threads it may use, the time it spent running, the memory it took.

It reads counters of the system and of IPython, and changes nothing.
"""

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from labkit import machine, plots


class Stopwatch:
    """Seconds that the session ran: in a notebook the time in cells, since reading and thinking are no cost of it."""

    def __init__(self) -> None:
        self._before, self._since = 0.0, time.perf_counter()
        if plots.in_notebook():
            events = sys.modules["IPython"].get_ipython().events
            events.register("pre_run_cell", self._resume)
            events.register("post_run_cell", self._pause)

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def _resume(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def _pause(self, *_: Any) -> None:
        self._before, self._since = self.seconds, None


def threads() -> int:
    """Physical cores that this process may use, a container's quota included; OMP_NUM_THREADS, where set, is kept."""
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    cores = machine.fingerprint("cpu").cores
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        return cores


def peak_memory() -> int:
    """Peak resident bytes of this process. Linux's ru_maxrss would count in what the parent held when it started us."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
