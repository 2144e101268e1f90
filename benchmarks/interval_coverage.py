"""How well intervals hold: each case in fresh processes, and how many of their intervals hold the median of all.

    python benchmarks/interval_coverage.py                            20 processes a case, about an hour
    python benchmarks/interval_coverage.py --quick                    6 processes a case, 3 cases, about five minutes
    python benchmarks/interval_coverage.py --json coverage.json       with every process's ratio and interval
    python benchmarks/interval_coverage.py --cases "softmax over exp" --threads 2 --loads idle

Two intervals are judged. "Within a run" is what `bench.compare` gives in a single process. "Over five" is the range of
five processes that ran one after another: with 20 processes there are 16 such fives, which overlap. The truth is taken
to be the median of all processes of the case; cases of a known ratio are held against the known ratio too. With "load",
a process computes beside on one core all the time. Wants an idle machine.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from labkit.data.resnet import ResNet20
from labkit.lesson import records
from labkit.timing import processes
from labkit.timing.machine import fingerprint
from labkit.timing.results import Comparison

FIVE = processes.LEAST
BUSY = "while True: pass"  # a process beside, on one core

Build = Callable[[], Callable[[], Tensor]]


# --- sides, each built in a fresh process ---------------------------------------------------------------------------


def products(number: int) -> Callable[[], Tensor]:
    """So many products of a matrix with itself: `number` units of work."""
    x = torch.randn(192, 192)

    def call() -> Tensor:
        for _ in range(number):
            out = x @ x
        return out

    return call


def resnet(images: int, *, half: bool) -> Callable[[], Tensor]:
    """ResNet-20, whole or with half of its channels."""
    x = torch.randn(images, 1, 28, 28)
    model = ResNet20().eval().requires_grad_(False)
    if half:
        from labkit.pruning import channels  # its imports take a second of every process

        model = channels.prune(model, (x,), ratio=0.5).model
    return partial(model, x)


def linear(dtype: torch.dtype) -> Callable[[], Tensor]:
    layer = nn.Linear(1024, 4096).to(dtype).requires_grad_(False)
    return partial(layer, torch.randn(16, 1024, dtype=dtype))


def pointwise(function: Callable[..., Tensor], **options: int) -> Callable[[], Tensor]:
    return partial(function, torch.randn(16, 1024), **options)


class Case(NamedTuple):
    """Two sides to compare, and the ratio of their times where it is known."""

    baseline: Build
    candidate: Build
    known: float | None = None


CASES = {
    "equal work": Case(partial(products, 4), partial(products, 4), 1.0),
    "6 units over 2": Case(partial(products, 6), partial(products, 2), 3.0),
    "softmax over exp": Case(partial(pointwise, torch.softmax, dim=-1), partial(pointwise, torch.exp)),
    "Linear, fp32 over bf16": Case(partial(linear, torch.float32), partial(linear, torch.bfloat16)),
    "ResNet-20, 32 images, over half": Case(partial(resnet, 32, half=False), partial(resnet, 32, half=True)),
    "ResNet-20, 1 image, over half": Case(partial(resnet, 1, half=False), partial(resnet, 1, half=True)),
}
QUICK = ("equal work", "softmax over exp", "ResNet-20, 1 image, over half")


# --- conditions -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def load(kind: str) -> Iterator[None]:
    """Keep a core busy by another process while the block runs, or leave the machine as it is ("idle")."""
    if kind == "idle":
        yield
        return
    beside = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        beside.kill()
        beside.wait()


# --- judgements -----------------------------------------------------------------------------------------------------


def over_five(ratios: Sequence[float]) -> list[tuple[float, float]]:
    """The range of each five processes that ran one after another."""
    starts = range(len(ratios) - FIVE + 1)
    fives = [ratios[start : start + FIVE] for start in starts]
    return [(min(five), max(five)) for five in fives]


def holding(intervals: Sequence[tuple[float, float]], truth: float | None) -> float | None:
    """The share of intervals that hold a number; None for an unknown number."""
    if truth is None:
        return None
    return statistics.fmean(low <= truth <= high for low, high in intervals)


def judged(ratios: Sequence[float], within: Sequence[tuple[float, float]], known: float | None) -> dict[str, object]:
    """The coverage of both kinds of intervals, and the range of the ratios."""
    median = statistics.median(ratios)
    fives = over_five(ratios)
    return {
        "median": median,
        "least": min(ratios),
        "most": max(ratios),
        "within a run": holding(within, median),
        "over five": holding(fives, median),
        "within a run, known": holding(within, known),
        "over five, known": holding(fives, known),
    }


def row(name: str, threads: int, kind: str, comparisons: Sequence[Comparison]) -> dict[str, object]:
    ratios = [comparison.speedup for comparison in comparisons]
    within = [comparison.within_run for comparison in comparisons]
    setting = {"case": name, "threads": threads, "load": kind, "processes": len(ratios)}
    return {**setting, **judged(ratios, within, CASES[name].known), "ratios": ratios, "intervals": within}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--loads", nargs="+", choices=("idle", "load"), default=["idle", "load"])
    parser.add_argument("--processes", type=int, help="a case; default: 20")
    parser.add_argument("--budget", type=float, help="seconds of a comparison; default: 2")
    parser.add_argument("--quick", action="store_true", help="6 processes, 0.5 s, 3 cases")
    parser.add_argument("--json", type=Path, help="file for every ratio and interval")
    options = parser.parse_args()
    options.cases = options.cases or list(QUICK if options.quick else CASES)
    options.processes = options.processes or (6 if options.quick else 20)
    options.budget = options.budget or (0.5 if options.quick else 2.0)
    return options


def main() -> None:
    options = arguments()
    settings = [
        (name, threads, kind) for name in options.cases for threads in options.threads for kind in options.loads
    ]
    rows = []
    for name, threads, kind in tqdm(settings, unit="case", disable=None):
        case = CASES[name]
        torch.set_num_threads(threads)
        sides = here(case.baseline), here(case.candidate)
        with load(kind):
            comparisons = processes.each_process(*sides, processes=options.processes, budget_s=options.budget)
        rows.append(row(name, threads, kind, comparisons))
    table = pd.DataFrame(rows).drop(columns=["ratios", "intervals"])
    print(table.to_string(index=False, float_format="{:.3g}".format, na_rep="-"))
    for column in ("within a run", "over five"):
        print(f"{column}: {table[column].mean():.1%} hold the median of all, {table[column].min():.0%} at worst")
    if options.json:
        result = {"machine": fingerprint("cpu").to_dict(), "budget_s": options.budget, "rows": rows}
        options.json.write_text(json.dumps(records.plain(result), indent=1) + "\n")


def here(build: partial) -> partial:
    """The same side as a function of the module `interval_coverage`: other processes have another __main__."""
    import interval_coverage

    return partial(getattr(interval_coverage, build.func.__name__), *build.args, **build.keywords)


if __name__ == "__main__":
    main()
