"""Threads that make a call slower: all wait for the last at a barrier, and its core may serve another program."""

import torch

from labkit.timing.clocks import Call, Clock
from labkit.timing.rounds import fastest_s

CALLS = 5  # on one thread, of which the fastest counts
SHARE = 0.1  # of the budget, at most, for the calls on one thread
MULTIPLE = 2.0  # times the time of one thread that are worth a warning


def warnings(clock: Clock, call: Call, median_s: float, budget_s: float) -> tuple[str, ...]:
    """Return a warning if a call takes twice as long on torch's threads as on one thread.

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
    torch.set_num_threads(1)
    try:
        one_thread_s = fastest_s(call, clock, CALLS)
    finally:
        torch.set_num_threads(threads)
    multiple = median_s / one_thread_s
    if multiple < MULTIPLE:
        return ()
    return (f"{threads} threads take {multiple:.1f} times as long as one: torch.set_num_threads(1)",)
