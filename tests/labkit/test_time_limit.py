"""The time limit of a check: a loop without an end is stopped and named, slow checks and busy machines stop nobody."""

import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from labkit.lesson import check as checks
from labkit.lesson import time_limit
from labkit.lesson.failures import TOO_LONG, Failures

LONG_S = 0.6  # of computing, when the limit is LIMIT_S
LIMIT_S = 0.3
STOPPED = (f"With n=2: {TOO_LONG}",)


def doubles(fn: Callable, failures: Failures) -> None:
    for n in (1, 2, 3):
        with failures.given(n=n):
            failures.close(fn(n), 2 * n, "not the double")


def slow_check(fn: Callable, failures: Failures) -> None:
    compute_for(LONG_S)
    failures.close(fn(1), 2, "not the double")


def of_a_class(fn: Callable, failures: Failures) -> None:
    with failures.given(n=2):
        failures.close(fn.apply(2), 4, "not the double")


def compute_for(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def loops_at_2(n: int) -> int:
    while n == 2:
        pass
    return 2 * n


def loops_and_catches_exceptions(n: int) -> int:
    while n == 2:
        with suppress(Exception):
            compute_for(0.01)
    return 2 * n


def sleeps_at_2(n: int) -> int:
    while n == 2:
        time.sleep(0.02)
    return 2 * n


@pytest.fixture(autouse=True)
def lesson(monkeypatch) -> Iterator[None]:
    module = types.ModuleType("lesson98")
    module.CHECKS = {"98.1": doubles, "98.2": slow_check, "98.3": of_a_class}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(time_limit, "COMPUTING_S", LIMIT_S)
    monkeypatch.setattr(time_limit, "TICK_S", 0.05)
    yield


@pytest.fixture
def in_a_thread() -> Callable:
    """Run a check outside the main thread, where no signal arrives."""

    def run(check_id: str, fn: Callable) -> checks.CheckResult:
        results = []
        thread = threading.Thread(target=lambda: results.append(checks.check(check_id, fn)))
        thread.start()
        thread.join()
        return results[0]

    return run


@pytest.mark.parametrize("fn", [loops_at_2, loops_and_catches_exceptions])
def test_a_loop_without_an_end_is_stopped_and_its_input_named(fn):
    result = checks.check("98.1", fn)
    assert result.failures == STOPPED


def test_a_loop_is_stopped_outside_the_main_thread_too(in_a_thread):
    assert in_a_thread("98.1", loops_at_2).failures == STOPPED


def test_a_function_that_waits_is_stopped(monkeypatch):
    monkeypatch.setattr(time_limit, "WAITING_S", 0.5)
    assert checks.check("98.1", sleeps_at_2).failures == STOPPED


def test_a_class_is_stopped_as_well():
    class Estimator:
        apply = staticmethod(loops_at_2)

    assert checks.check("98.3", Estimator).failures == STOPPED


def test_the_time_of_the_check_itself_does_not_count():
    assert checks.check("98.2", lambda n: 2 * n).passed


def test_many_short_calls_count_together():
    def slow(n: int) -> int:
        compute_for(0.6 * LIMIT_S)
        return 2 * n

    assert checks.check("98.1", slow).failures == STOPPED


def test_other_work_of_the_machine_does_not_count():
    """A right answer that waits twice the limit for its core, asleep here, goes on."""

    def waits(n: int) -> int:
        time.sleep(0.25 * LONG_S)
        return 2 * n

    assert checks.check("98.1", waits).passed
