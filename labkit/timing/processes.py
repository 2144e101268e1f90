"""Comparisons over processes: fresh processes compare the same two sides one after another.

A process settles at a speed of its own, by where memory and threads lie, and all its calls share it. An interval over
calls can't see that, and other processes leave it. The range over five fresh processes holds the median of all
processes in 15 cases of 16, whatever the distribution: only if all five lie on one side of the median does it miss.

A fresh process has to build both sides by itself, so a side is a factory that can be imported: a function of a module,
"module:function", or functools.partial of such a function.
"""

import functools
import os
import pickle
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from labkit.errors import InputError, check_whole
from labkit.timing.bench import compare
from labkit.timing.clocks import Call
from labkit.timing.results import Comparison

LEAST = 5  # the range over fewer processes holds the median of all processes in less than 15 cases of 16

Factory = Callable[[], Call]


def compare_in_processes(
    baseline: Factory | str,
    candidate: Factory | str,
    *,
    processes: int = LEAST,
    **options: Any,
) -> Comparison:
    """Time two callables in pairs in each of several fresh processes, and judge the range of the speed-ups.

    baseline, candidate: factories that can be imported; each returns a callable without arguments.
    processes: number of processes, run one after another, each with the threads of this process.
    options: arguments of `bench.compare`, for each process; with `builds`, each process builds the sides so many times.
    Returns the comparison of the process with the median speed-up, with the medians and ranges over all processes.
    Raises InputError for a side that another process cannot import, and for a process that ends with an error.
    """
    check_whole(processes, "processes", LEAST)
    comparisons = each_process(baseline, candidate, processes=processes, **options)
    ascending = sorted(comparisons, key=lambda comparison: comparison.speedup)
    middle = ascending.pop((processes - 1) // 2)
    return middle.over_processes(ascending)


def each_process(
    baseline: Factory | str, candidate: Factory | str, *, processes: int, **options: Any
) -> list[Comparison]:
    """Return the comparisons of fresh processes, in the order of the processes; arguments as `compare_in_processes`."""
    sides = _importable("baseline", baseline), _importable("candidate", candidate)
    job = _pickled(sides, options)
    return [_in_fresh_process(job, number) for number in range(1, processes + 1)]


def _importable(role: str, side: Factory | str) -> Factory:
    """Return a side as a function that other processes can import; InputError otherwise."""
    if isinstance(side, str):
        try:
            side = pkgutil.resolve_name(side)
        except (ValueError, ImportError, AttributeError) as error:
            raise InputError(
                f'{role} is {side!r}, which cannot be imported ({error}): give "module:function".'
            ) from None
    function = side.func if isinstance(side, functools.partial) else side
    if not callable(function) or not _has_place(function):
        raise InputError(
            f"{role} cannot be imported by another process, as it was made in this session: write the function that "
            f'builds the side into a file, such as sides.py, and give "sides:function".'
        )
    return side


def _has_place(function: Callable) -> bool:
    """Return True if a function's module and name lead to it in any process."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__"):
        return False
    try:
        return pkgutil.resolve_name(f"{module}:{name}") is function
    except (ValueError, ImportError, AttributeError):  # a lambda, or a function inside a function
        return False


def _pickled(sides: tuple[Factory, Factory], options: dict[str, Any]) -> bytes:
    """Pack what a process needs; InputError for arguments that cannot be sent to another process."""
    try:
        return pickle.dumps((sides, options))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise InputError(
            f"An argument cannot be sent to another process ({error}): give functions of a module, and plain values."
        ) from None


def _in_fresh_process(job: bytes, number: int) -> Comparison:
    """Compare in a fresh process, which finds the same modules as this process and uses as many threads."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "comparison"
        command = [sys.executable, "-m", __spec__.name, str(answer), str(torch.get_num_threads())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        done = subprocess.run(command, input=job, env=environment, capture_output=True)
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
            raise InputError(
                f"Process {number} could not compare ({last[-1]}): call both sides in this session to see where."
            )
        return pickle.loads(answer.read_bytes())


def _compare_here(answer: Path, threads: int) -> None:
    """Do the work of a fresh process: read the job from stdin, and write the comparison to the file `answer`."""
    torch.set_num_threads(threads)
    (baseline, candidate), options = pickle.load(sys.stdin.buffer)
    if options.get("builds") is None:
        baseline, candidate = baseline(), candidate()
    answer.write_bytes(pickle.dumps(compare(baseline, candidate, **options)))


if __name__ == "__main__":
    _compare_here(Path(sys.argv[1]), int(sys.argv[2]))
