"""Why the same call has two speeds: each suspected cause is switched on or off by itself, in fresh processes.

    python benchmarks/two_speeds.py                                  12 processes a condition, about 25 minutes
    python benchmarks/two_speeds.py --processes 3 --calls resnet     a first look
    python benchmarks/two_speeds.py --load --json two_speeds.json    with a busy process beside

A condition whose processes are all fast, where "as it is" has slow ones, names the cause. A process is slow if it takes
half as long again as the fastest of all conditions with as many threads. Each process also tells what may explain its
speed: the place of its input in memory (bytes past a multiple of 64), its huge pages, page faults and switches of a
thread in a call, and the kernels that oneDNN chose. Wants an idle machine.

On a Xeon with two virtual cores (30 November 2026, torch 2.13, 12 processes a condition, times are medians):

- With a busy process beside, eager ResNet-20 at batch 1 takes 6.0 ms on two threads and 1.9 ms on one. The barriers are
  the cause: threads that sleep while they wait take 2.3 ms. `bench` warns of it (`doubts.thread_warnings`).
- On the idle machine it takes 2.0 ms on two threads and 1.9 ms on one. Threads that sleep make every process slow; in
  every other condition, one thread bound to a core included, 1 to 4 of 12 processes are slow, so none is the cause.
  Slow ones follow each other (13 pairs in a row among 408 processes of two calls, 6.6 expected) and use as much CPU
  time as they take: the machine itself is slower for a while. No setting of a process prevents that, which is why
  intervals are taken over processes.
- A short spin is no way out. On two cores of an EPYC (1 December 2026, 6 processes a condition, means of a call) it
  costs nothing on an idle machine (1.4 ms; 1.2 as it is, 5.7 asleep). Beside a busy process it takes 10 ms; 7.7 as it
  is, 2.5 asleep, 1.5 on one thread. So a lesson races one thread against all when it begins (`thread_race`).
- Its convolutions are none of oneDNN's: torch gives a small 3x3 convolution of a single image to im2col and MKL
  (aten::_slow_conv2d_forward, 21 of 21), each of which waits for all threads.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from labkit.data.resnet import ResNet20

if TYPE_CHECKING:
    import pandas as pd

SLOW = 1.5  # times the fastest process
SLOWER = 1.3  # times the median process of the same condition
CALLS_S = 1.0  # seconds of timed calls in a process
ALIGNMENT = 64  # bytes of a cache line


class Condition(NamedTuple):
    """A suspected cause, switched on or off.

    threads: threads of torch.
    env: environment of the process.
    prefix: command before the interpreter.
    shift: elements of four bytes by which the input is moved in memory.
    denormals, onednn: settings of torch.
    """

    threads: int = 2
    env: Mapping[str, str] = MappingProxyType({})
    prefix: tuple[str, ...] = ()
    shift: int = 0
    denormals: bool = True
    onednn: bool = True


CONDITIONS = {
    "as it is": Condition(),
    "one thread": Condition(threads=1),
    # barriers: a thread that waits for its partner spins, and the partner may not be scheduled
    "waiting threads sleep": Condition(env={"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}),
    "waiting threads spin for 3000 turns": Condition(env={"GOMP_SPINCOUNT": "3000"}),  # libgomp's default is 300,000
    "waiting threads spin": Condition(env={"OMP_WAIT_POLICY": "active", "KMP_BLOCKTIME": "infinite"}),
    # placement
    "threads bound to cores": Condition(env={"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}),
    "both threads on core 0": Condition(prefix=("taskset", "-c", "0")),
    "one thread on core 0": Condition(threads=1, prefix=("taskset", "-c", "0")),
    "one thread on core 1": Condition(threads=1, prefix=("taskset", "-c", "1")),
    # memory
    "huge pages": Condition(env={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
    "memory stays mapped": Condition(env={"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "-1"}),
    "input 16 bytes off": Condition(shift=4),
    "one thread, input 16 bytes off": Condition(threads=1, shift=4),
    # kernels
    "denormals are zero": Condition(denormals=False),
    "one thread, denormals are zero": Condition(threads=1, denormals=False),
    "without oneDNN": Condition(onednn=False),
    "ATen without AVX-512": Condition(env={"ATEN_CPU_CAPABILITY": "avx2"}),
    "MKL without AVX-512": Condition(env={"MKL_ENABLE_INSTRUCTIONS": "AVX2"}),
}


# --- the work of a process ------------------------------------------------------------------------------------------


def images(shift: int) -> tuple[Callable[[], Tensor], Tensor]:
    """ResNet-20 in eager torch at batch 1, and its input."""
    x = moved(torch.randn(1, 1, 28, 28), shift)
    return partial(ResNet20().eval().requires_grad_(False), x), x


def rows(function: Callable[..., Tensor], shift: int, **options: int) -> tuple[Callable[[], Tensor], Tensor]:
    """A pointwise call on 16 rows of 1024 numbers, and its input."""
    x = moved(torch.randn(16, 1024), shift)
    return partial(function, x, **options), x


CALLS = {"resnet": images, "softmax": partial(rows, torch.softmax, dim=-1), "exp": partial(rows, torch.exp)}


def moved(x: Tensor, shift: int) -> Tensor:
    """The same numbers, `shift` elements further in memory of their own."""
    place = torch.empty(x.numel() + shift)[shift:].view_as(x)
    return place.copy_(x)


def work(name: str, condition: Condition) -> dict[str, Any]:
    """Time the call in this process, and tell what may explain its speed."""
    torch.set_num_threads(condition.threads)
    torch.set_flush_denormal(not condition.denormals)
    torch.backends.mkldnn.enabled = condition.onednn
    call, x = CALLS[name](condition.shift)
    with torch.inference_mode():
        for _ in range(20):
            call()
        before = resource.getrusage(resource.RUSAGE_SELF)
        seconds = timed(call)
        after = resource.getrusage(resource.RUSAGE_SELF)
    number = len(seconds)
    return {
        "us": 1e6 * statistics.median(seconds),
        "us, mean": 1e6 * statistics.mean(seconds),
        "us of the fastest call": 1e6 * min(seconds),
        "bytes past 64": x.data_ptr() % ALIGNMENT,
        "huge pages (kB)": huge_pages_kb(),
        "page faults a call": (after.ru_minflt - before.ru_minflt) / number,
        "waits a call": (after.ru_nvcsw - before.ru_nvcsw) / number,
        "evictions a call": (after.ru_nivcsw - before.ru_nivcsw) / number,
        "CPU over wall": cpu_seconds(after, before) / sum(seconds),
    }


def timed(call: Callable[[], Tensor]) -> list[float]:
    """Seconds of each call, for CALLS_S seconds."""
    seconds: list[float] = []
    end = time.perf_counter() + CALLS_S
    while time.perf_counter() < end:
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def cpu_seconds(after: resource.struct_rusage, before: resource.struct_rusage) -> float:
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def huge_pages_kb() -> int | None:
    with contextlib.suppress(OSError):
        match = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
        return int(match[1]) if match else None
    return None


# --- processes ------------------------------------------------------------------------------------------------------


def in_fresh_process(name: str, title: str, *, verbose: bool = False) -> dict[str, Any]:
    """Run `work` in a fresh process; with `verbose`, also list the kernels that oneDNN chose."""
    condition = CONDITIONS[title]
    environment = {**os.environ, "OMP_NUM_THREADS": str(condition.threads), **condition.env}
    if verbose:
        environment["ONEDNN_VERBOSE"] = "1"
    command = [*condition.prefix, sys.executable, __file__, "--child", name, title]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *log, answer = done.stdout.strip().splitlines()
    result = {"call": name, "condition": title, "threads": condition.threads, **json.loads(answer)}
    if verbose:
        result["kernels"] = kernels(log)
    return result


def kernels(log: Sequence[str]) -> str:
    """The implementations in oneDNN's log: onednn_verbose,v1,primitive,exec,cpu,convolution,brgconv:avx512_core,..."""
    fields = [line.split(",") for line in log if ",exec," in line]
    names = {line[line.index("exec") + 3] for line in fields}
    return " ".join(sorted(names)) or "none"


def summary(results: "pd.DataFrame") -> "pd.DataFrame":
    """A row per call and condition: the speeds of its processes, and how many are slow."""
    fastest = results.groupby(["call", "threads"])["us"].transform("min")
    results = results.assign(slow=results["us"] > SLOW * fastest)
    groups = results.groupby(["call", "condition"], sort=False)
    table = groups["us"].agg(processes="count", least="min", median="median", most="max")
    table["slow"] = groups["slow"].sum()
    for column in ("us, mean", "page faults a call", "waits a call", "evictions a call", "CPU over wall"):
        table[column] = groups[column].median()
    return table.reset_index()


def slow_pairs(results: "pd.DataFrame") -> str:
    """Tell whether slow processes come one after the other, as in a slow while of the machine."""
    medians = results.groupby(["call", "condition"])["us"].transform("median")
    slow = (results["us"] > SLOWER * medians).tolist()
    pairs = sum(earlier and later for earlier, later in itertools.pairwise(slow))
    expected = statistics.mean(slow) ** 2 * (len(slow) - 1)
    return (
        f"{sum(slow)} of {len(slow)} processes take {SLOWER} times the median of their condition; {pairs} pairs "
        f"follow each other, {expected:.1f} expected of scattered ones"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--processes", type=int, default=12, help="of each condition")
    parser.add_argument("--load", action="store_true", help="keep a process busy beside")
    parser.add_argument("--json", type=Path, help="file for every process")
    parser.add_argument("--child", nargs=2, metavar=("CALL", "CONDITION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, title = options.child
        print(json.dumps(work(name, CONDITIONS[title])))
        return
    compare_conditions(options)


def compare_conditions(options: argparse.Namespace) -> None:
    """Run all conditions in turn, print what came out, and write every process to a file if asked for."""
    import pandas as pd  # here: the processes that are timed do without
    from interval_coverage import load
    from tqdm import tqdm

    from labkit.lesson import records
    from labkit.timing.machine import fingerprint

    tasks = [(name, title) for name in options.calls for title in options.conditions]
    results = []
    with load("load" if options.load else "idle"):
        for _ in tqdm(range(options.processes), unit="round", disable=None):  # in turn: drift hits all alike
            results += [in_fresh_process(name, title) for name, title in tasks]
        chosen = [in_fresh_process(name, title, verbose=True) for name, title in tasks]
    table = pd.DataFrame(results)
    print(summary(table).to_string(index=False, float_format="{:.3g}".format))
    print(slow_pairs(table))
    for result in chosen:
        print(f"{result['call']:8} {result['condition']:32} {result['kernels']}")
    if options.json:
        rows_of_all = records.plain({"machine": fingerprint("cpu").to_dict(), "load": options.load, "rows": results})
        options.json.write_text(json.dumps(rows_of_all, indent=1) + "\n")


if __name__ == "__main__":
    main()
