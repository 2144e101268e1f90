"""The processes that belong to one run: how much memory they took together, and the end of them all.

They are known by a token in their environment, which every process inherits from the one that started it, so that one
whose parent has died is found as well.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

TOKEN = "LABKIT_RUN"
END_SECONDS = 10.0


def living(token: str, but: int | None = None) -> list[psutil.Process]:
    """The processes whose environment holds `token`, less the one with the id `but`."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != but and process.environ().get(TOKEN) == token:
                found.append(process)
    return found


def end(token: str, but: int | None = None) -> None:
    """Kill them, again until none is left: one may have started another while they were listed."""
    until = time.monotonic() + END_SECONDS
    while (found := living(token, but)) and time.monotonic() < until:
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=1)


@contextmanager
def watched(pid: int, token: str, until: Callable[[], bool]) -> Iterator[list[int]]:
    """Yields [bytes]: the largest sum of resident memory below `pid`, seen once a second (timings go on).

    Ends them all when `until()`, which is asked five times a second, from another thread.
    """
    peak, over = [0], threading.Event()

    def watch() -> None:
        ticks, ended = 0, False
        while not over.wait(0.2):
            if not ended and until():
                ended = True
                end(token)
            if (ticks := ticks + 1) % 5 == 0:
                peak[0] = max(peak[0], _resident(pid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _resident(pid: int) -> int:
    """Bytes in memory of the process and all below it; 0 where it is gone."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_info().rss
    return total
