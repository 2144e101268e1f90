"""The frame of the checks: collects all failures, names the input, hides the answer, tells a stub from an error."""

import re
import sys
import types
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from refusals import Refusals, check_refusal, refused

from labkit.errors import InputError
from labkit.lesson import check as checks
from labkit.lesson.failures import Failures


def area(fn: Callable, failures: Failures, *, sides: tuple = ((2, 3), (4, 5), (7, 1))) -> None:
    for width, height in sides:
        with failures.given(width=width, height=height):
            got = fn(width, height)
            failures.close(got, width * height, "the area is off")
            failures.expect(got > 0, "an area is positive")


@pytest.fixture(autouse=True)
def lesson(monkeypatch) -> Iterator[None]:
    module = types.ModuleType("lesson98")
    module.CHECKS = {"98.1": area, "98.2": lambda fn, failures: None}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield


def close(got: object, want: object, **tolerance: float) -> tuple[str, ...]:
    failures = Failures()
    failures.close(got, want, "wrong", **tolerance)
    return failures.messages


def test_a_right_answer_passes():
    assert checks.check("98.1", lambda w, h: w * h) == checks.CheckResult("98.1", True, (), 6)


def test_every_thing_that_is_wrong_is_said_once_with_its_first_input():
    result = checks.check("98.1", lambda w, h: -w * h)
    assert not result.passed
    assert result.failures == (
        "With width=2, height=3: the area is off (expected 6, got -6); the same with 2 other inputs",
        "With width=2, height=3: an area is positive; the same with 2 other inputs",
    )


def test_an_exception_names_the_input_that_caused_it():
    result = checks.check("98.1", lambda w, h: w * h if h > 1 else [][0])
    assert result.failures == ("With width=7, height=1: it raised IndexError: list index out of range",)


def test_nothing_more_is_looked_at_where_what_is_needed_is_missing():
    failures = Failures()
    with failures.given(settings={}, x=1e12, n=10**9, exact=123456789.0):
        failures.need(False, "return two values")
        raise AssertionError("looked at")
    assert failures.messages == ("With x=1e12, n=1e9, exact=123,456,789: return two values",)


def test_an_exception_outside_the_blocks_of_a_check_is_a_failure_too(monkeypatch):
    monkeypatch.setitem(sys.modules["lesson98"].CHECKS, "98.3", lambda fn, failures: fn())
    assert checks.check("98.3", lambda: [][0]).failures == ("it raised IndexError: list index out of range",)


def test_an_answer_that_only_passes_gets_one_sentence():
    (sentence,) = checks.check("01.1", lambda *_: None).failures
    assert "return two values, in the order of the card; the same with 4 other inputs" in sentence


def test_context_reaches_the_check():
    assert checks.check("98.1", lambda w, h: w * h, sides=((1, 1),)).tried == 2


def test_a_stub_passes_through():
    def stub(width, height):
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        checks.check("98.1", stub)


def test_torch_s_not_implemented_is_no_stub():
    def unsupported(width, height):
        raise NotImplementedError("\"eye\" not implemented for 'Float8'")

    (said,) = checks.check("98.1", unsupported).failures
    assert "it raised NotImplementedError: \"eye\" not implemented for 'Float8'" in said


def test_a_check_that_examines_nothing_is_a_bug():
    with pytest.raises(RuntimeError, match=r"98\.2 examined nothing"):
        checks.check("98.2", print)


def test_every_check_says_beforehand_what_it_tries():
    for check_id in checks.ids():
        assert 5 <= len(checks.tries(check_id).split()) <= 25, check_id
    for lesson in {check_id[:2] for check_id in checks.ids()}:
        assert sys.modules[f"lesson{lesson}"].TRIES.keys() == checks.load(lesson).keys()


def test_a_check_of_an_unknown_lesson_names_those_of_all():
    with pytest.raises(InputError, match=r"no check '77\.1'"):  # a sentence as long as the course
        checks.check("77.1", print)


REFUSALS: Refusals = {
    "no check '98.7'; the checks are 98.1, 98.2": lambda: checks.check("98.7", print),
    "takes your function itself, not 6; leave out the brackets": lambda: checks.check("98.1", 6),
}


@refused(REFUSALS)
def test_what_is_no_check_or_no_function_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (6, 6.0),
        (np.float32(0.5), 0.5),
        (torch.tensor([1.0, 2.0]), [1.0, 2.0]),
        ([1, 2], torch.tensor([1.0, 2.0])),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
        (float("inf"), float("inf")),
    ],
)
def test_close_accepts_numbers_arrays_and_tensors(got, want):
    assert close(got, want) == ()


@pytest.mark.parametrize(
    ("got", "said"),
    [
        (None, "does it end in `return`"),
        ("12", "returned a str, not a number"),
        (True, "returned a bool, not a number"),
        ({"a": 1}, "returned a dict, not a number"),
        (float("nan"), "expected 12, got nan"),
        (torch.ones(2), r"has shape \(2,\), which is not the shape asked for"),
    ],
)
def test_close_says_what_came_out(got, said):
    (message,) = close(got, 12.0)
    assert re.search(said, message)


def test_close_names_the_first_entry_that_is_off():
    assert close(17.0, 8191.0) == ("wrong (expected 8191, got 17)",)
    assert close(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [[1.0, 2.0], [3.5, 5.0]]) == (
        "wrong (at [1, 0] expected 3.5, got 3)",
    )


def test_close_compares_in_float64_whatever_holds_the_numbers():
    third = 1 / 3
    for hold in (float, np.float64, lambda number: torch.tensor(number, dtype=torch.float64)):
        assert close(hold(third), third, rtol=1e-12) == ()
        assert close(hold(third + 1e-9), third, rtol=1e-12) != ()


def test_close_keeps_to_its_tolerance():
    assert close(1.009, 1.0, rtol=1e-2) == ()
    assert close(1.011, 1.0, rtol=1e-2) != ()
    assert close(0.009, 0.0, atol=1e-2) == ()
    assert close(1e-9, 0.0) != ()


def test_expect_outside_given_names_no_input():
    failures = Failures()
    assert failures.expect(True, "fine") and not failures.expect([], "empty")
    assert failures.messages == ("empty",)


def test_every_check_of_the_course_is_known_by_its_lesson():
    assert all(check_id[:2].isdigit() and check_id[2] == "." for check_id in checks.ids())
