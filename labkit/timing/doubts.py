"""Reasons to doubt a timing: too few samples, drift, threads that make a call slower. `bench` adds them as warnings.

Interference by other programs is judged in interference.py.
"""

import math
from collections.abc import Sequence

import torch

from labkit.show import counted
from labkit.timing import stats
from labkit.timing.clocks import Call, Clock
from labkit.timing.fingerprint import on_threads
from labkit.timing.results import Measurement
from labkit.timing.rounds import BLOCKS, fastest_s

CALLS = 5  # on one thread, of which the fastest counts
SHARE = 0.1  # of the budget, at most, for the calls on one thread
MULTIPLE = 2.0  # times the time of one thread that are worth a warning


def thread_warnings(clock: Clock, call: Call, median_s: float, budget_s: float) -> tuple[str, ...]:
    """Return a warning if a call takes twice as long on torch's threads as on one thread.

    Threads wait for the last of them at each barrier, and its core may serve another program meanwhile.
    The call is timed on one thread a few times, and then torch has its threads again. Nothing is timed on a GPU, with
    an injected clock, and for calls that are long in proportion to the budget.

    clock: times the call.
    median_s: median seconds of the call on torch's threads.
    budget_s: seconds of the whole measurement.
    """
    threads = torch.get_num_threads()
    is_long = (CALLS + 1) * median_s > SHARE * budget_s
    if threads == 1 or is_long or clock.name == "injected" or clock.device.type != "cpu":
        return ()
    with on_threads(1):
        one_thread_s = fastest_s(call, clock, CALLS)
    multiple = median_s / one_thread_s
    if multiple < MULTIPLE:
        return ()
    return (f"{threads} threads take {multiple:.1f} times as long as one: torch.set_num_threads(1)",)


def sample_warnings(seconds: Sequence[float]) -> tuple[str, ...]:
    """Return the warnings about the samples of a callable: too few samples, or drift."""
    warnings = []
    if len(seconds) < BLOCKS:
        warnings.append(f"only {counted(len(seconds), 'sample')}, and {BLOCKS} are needed: raise budget_s")
    change = stats.drift(seconds)
    if change is not None:
        warnings.append(_drifted(change))
    return tuple(warnings)


def pair_warnings(baseline: Measurement, candidate: Measurement, per_block: int) -> tuple[str, ...]:
    """Return the warnings about the pairs of a comparison: too few blocks, or drift of the whole machine."""
    baseline_s, candidate_s = (stats.block_minima(side.samples_s, per_block) for side in (baseline, candidate))
    blocks = len(baseline_s)
    warnings = []
    if blocks < stats.LEAST:
        warnings.append(
            f"budget_s was spent after {counted(blocks, 'block')} of pairs, and an interval takes {stats.LEAST}: "
            "close other programs, or raise budget_s"
        )
    elif blocks < BLOCKS:
        warnings.append(f"only {counted(blocks, 'block')} of pairs, and {BLOCKS} are needed: raise budget_s")
    levels = [math.sqrt(x * y) for x, y in zip(baseline_s, candidate_s, strict=True)]  # of the machine, per block
    change = stats.drift(levels)
    if change is not None:
        warnings.append(f"{_drifted(change)}, alike for both")
    return tuple(warnings)


def _drifted(change: float) -> str:
    return f"speed drifted: {change:+.0%} time from the first half of the run to the second"
