"""A process with all descendants: finding, measuring and ending processes, although each may be gone at any moment."""

from collections.abc import Iterable
from contextlib import suppress

import psutil


def with_descendants(pid: int) -> list[psutil.Process]:
    """List the process `pid`, first, and its descendants; an empty list if the process is gone."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """Sum the CPU seconds, user and system, of processes and of ended children; a process already gone adds 0."""
    total = 0.0
    for process in processes:
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += sum(times[:4])  # user, system, and both of children that ended
    return total


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill processes with all descendants."""
    for process in processes:
        with suppress(psutil.Error):
            for member in (process, *process.children(recursive=True)):
                member.kill()
