"""What the clocks count and refuse, and what else they see on the machine; what is made of it is bench's."""

import functools
import itertools
import mmap
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from refusals import check_refusal

from labkit.timing import clocks, interference
from labkit.timing.interference import Snapshot


def test_warm_up_takes_a_tenth_to_a_half_of_the_budget_whatever_went_before():
    """A call that settles at once, and one that never does: every call is 5 % faster than the last."""
    costs = {"even": iter(lambda: 1e-3, None), "faster": (0.95**i for i in itertools.count())}
    run = clocks.choose(torch.device("cpu"), injected=lambda fn, number: next(costs[fn]))
    for fn, budget_s, share, fastest in (("even", 1.0, 0.1, 1e-3), ("faster", 20.0, 0.5, 0.95**13)):
        before = run.now()
        (least,) = clocks.warm_up(run, [fn], budget_s)
        assert share <= (run.now() - before) / budget_s < share + 0.06
        assert least == pytest.approx(fastest)


def test_emptying_the_caches_reads_and_writes_half_as_much_again_as_they_hold():
    last_level_cache = 48 * 2**20
    evict = clocks.evictor(last_level_cache)
    everything = dict(zip(evict.__code__.co_freevars, evict.__closure__, strict=True))["everything"].cell_contents
    evict()
    evict()
    assert everything.nbytes >= 1.5 * last_level_cache and (everything == 3).all()


def test_an_evicting_clock_empties_the_caches_before_a_sample_and_not_while_it_warms_up():
    events = []
    run = clocks.choose(
        torch.device("cpu"), "cold", lambda fn, number: events.append(number) or 0.5, lambda: events.append("evict")
    )
    clocks.warm_up(run, [len], budget_s=2.0)
    assert clocks.repeats(run, len, seconds=1e-9) == 1
    assert events.count("evict") == 1  # to see how long it takes
    events.clear()
    assert run.sample(len, 1)[:2] == (0.5, 0.5)
    assert events == ["evict", 1]


def test_page_faults_are_those_of_memory_that_is_touched_for_the_first_time():
    pages = 2**24 // mmap.PAGESIZE
    fresh = np.frombuffer(mmap.mmap(-1, 2**24), np.uint8)
    before = clocks.page_faults()
    fresh[:: mmap.PAGESIZE] = 1
    touched = clocks.page_faults() - before
    fresh[:: mmap.PAGESIZE] = 2
    assert 0 < touched <= 1.1 * pages  # fewer where the system maps huge pages
    assert clocks.page_faults() - before <= 1.1 * touched
    assert 1e-8 < clocks.fault_s() < 1e-3


async def coroutine():
    return 1


LAZY = {
    "generator": lambda: (x for x in range(3)),
    "map": lambda: map(abs, range(3)),
    "coroutine": coroutine,
    "Future": lambda: ThreadPoolExecutor(1).submit(abs, 1),
    "list of futures": lambda: [1, {"a": (torch.futures.Future(),)}],
    "function": lambda: coroutine,
    "partial": lambda: functools.partial(abs, 1),
}


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_work_that_is_not_done_when_the_call_ends_is_refused(lazy):
    check_refusal("returns a ... , whose work is not done when the call ends", lambda: clocks.first_call(LAZY[lazy]))


@pytest.mark.parametrize("output", [torch.ones(2), [1, "a"], {"x": None}, torch.nn.Linear(1, 1), range(3), open])
def test_results_are_not_taken_for_work_to_be_done(output):
    assert clocks.first_call(lambda: output) is output


@pytest.mark.parametrize(
    ("output", "device"),
    [(torch.ones(1), "cpu"), ({"a": [1, torch.ones(1, device="meta")]}, "meta"), ((), None), (None, None), (3, None)],
)
def test_device_of_an_output(output, device):
    assert getattr(clocks.device_of(output), "type", None) == device


def test_foreign_load_is_busy_time_less_our_own():
    before, after = Snapshot(wall_s=10, process_s=1, busy_s=50), Snapshot(wall_s=12, process_s=2.5, busy_s=54.5)
    assert interference.foreign_cores(before, after) == pytest.approx((4.5 - 1.5) / 2)
    assert interference.foreign_cores(before, Snapshot(10.1, 1.1, 50.2)) is None


def test_throttling_is_named():
    cool, hot = Snapshot(0, 0, 0, 1980), Snapshot(1, 0, 0, 1500, ("power cap",))
    assert interference.throttling([cool, hot]) == "the GPU was throttled (power cap; SM clock 1500-1980 MHz)"
    assert interference.throttling([cool, Snapshot(1, 0, 0, 1700)]) == "the GPU's clock moved (SM clock 1700-1980 MHz)"
    assert interference.throttling([cool, cool]) is None
    assert interference.throttling([Snapshot(0, 0, 0)]) is None


def test_now_is_the_wall_s_time():
    before, now, after = time.perf_counter(), clocks.now(), time.perf_counter()
    assert before <= now <= after


@pytest.mark.gpu
def test_now_waits_for_what_a_gpu_was_asked_to_do():
    matrix = torch.randn(4096, 4096, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began = clocks.now()
    start.record()
    for _ in range(20):
        matrix @ matrix
    end.record()
    seconds = clocks.now() - began
    assert end.query() and seconds >= start.elapsed_time(end) / 1e3
