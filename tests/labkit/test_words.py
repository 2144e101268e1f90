"""Numbers in sentences: digits that tell two numbers apart, and verdicts that do not contradict themselves."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit import show

NUMBER = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)


@pytest.mark.parametrize(
    ("ci95", "options", "words"),
    [
        (None, {}, ""),
        ((0.931, 0.934), {"unit": "x"}, "0.931x to 0.934x"),
        ((0.93, 0.95), {"unit": "x"}, "0.93x to 0.95x"),
        ((0.0011, 0.0013), {"unit": "s"}, "1.10 ms to 1.30 ms"),
        ((2.0, 2.004), {"unit": "s"}, "2 s to 2.004 s"),
        ((0.2, 0.8), {"form": "+.1f"}, "+0.2 to +0.8"),
        ((0.9312, 0.9338), {"form": ".0%"}, "93.1% to 93.4%"),
        ((-0.004, 0.6), {"form": ".1f"}, "0.0 to 0.6"),  # no minus before a zero
        ((1.05, 1.05), {"unit": "x"}, "1.05x at both ends"),
        ((0.0, math.inf), {"unit": "x"}, "no interval"),
        ((-math.inf, math.inf), {"form": "+.1f"}, "no interval"),
        ((math.nan, 1.0), {}, "no interval"),
        ((250.0, math.inf), {}, "at least 250"),
        ((-math.inf, 3.0), {"form": ".1f"}, "at most 3.0"),
        ((math.inf, math.inf), {}, "∞ at both ends"),
        ((1.6, 2.0), {"form": ".1f", "processes": 1}, "1.6 to 2.0 within this run"),
        ((1.6, 2.0), {"form": ".1f", "processes": 5}, "1.6 to 2.0 over 5 processes"),
    ],
)
def test_an_interval_reads_as_a_person_writes_it(ci95, options, words):
    assert show.interval(ci95, **options) == words


@pytest.mark.parametrize("options", [{}, {"unit": "x"}, {"unit": "s"}, {"form": ".2f"}, {"form": ".0%"}])
@given(low=NUMBER, width=st.floats(min_value=1e-5, max_value=1e3))
def test_the_ends_of_an_interval_differ_in_print_if_they_differ_at_all(options, low, width):
    low, high = show.interval((low, low + width), **options).split(" to ")
    assert low != high


@pytest.mark.parametrize(
    ("ratio", "ci95", "words"),
    [
        (1.8, (1.6, 2.0), "1.8 times as fast (1.6 to 2.0 over 5 processes)"),
        (0.5, (0.4, 0.6), "0.50 times as fast (0.40 to 0.60 over 5 processes)"),
        (1.01, (0.97, 1.04), "no difference can be told (0.97 to 1.04 over 5 processes)"),
        (4.65, (0.4, 54.0), "no difference can be told (0.4 to 54.0 over 5 processes)"),
        (1.0, (0.995, 1.004), "equally fast within 1 % (0.995 to 1.004 over 5 processes)"),
        (1.0, (1.0, 1.0), "equally fast within 1 % (1.000 at both ends over 5 processes)"),
        (1.8, (0.0, math.inf), "1.8 times as fast (no interval)"),
        (math.nan, (math.nan, math.nan), "not measured"),
        (math.inf, (0.0, math.inf), "not measured"),
        (0.0, (0.0, 0.0), "not measured"),
    ],
)
def test_a_speed_up_has_one_verdict(ratio, ci95, words):
    assert show.speed(ratio, ci95, processes=5) == words


@given(low=st.floats(0.01, 100), middle=st.floats(1, 1.5), width=st.floats(1, 1.5))
def test_a_sentence_that_claims_a_speed_never_denies_a_difference(low, middle, width):
    words = show.speed(low * middle, (low, low * middle * width))
    claims, denies = "times as fast" in words, re.search("no difference|equally fast", words)
    assert claims != bool(denies)


def test_a_number_is_told_with_its_interval():
    assert show.told(-0.5, (-0.81, -0.2), "+.1f", " points") == "-0.5 points (-0.8 to -0.2)"
    assert show.told(1.8, (0.0, math.inf)) == "1.80 (no interval)"


def test_a_sentence_with_an_undefined_number_and_its_interval_is_not_said():
    (said,) = show.defined([f"It brings {show.told(math.nan, (math.nan, math.nan))} over labels."])
    assert said.startswith("A number of this result is undefined")


def test_a_change_from_a_number_to_the_same_number_says_so():
    assert show.change(93.2, 91.5, ".1f") == "from 93.2 to 91.5"
    assert show.change(0.9312, 0.9338, ".2f") == "from 0.931 to 0.934"
    assert show.change(93.2, 93.2, ".1f") == "from 93.2 to the same 93.2"


def test_a_sentence_with_an_undefined_or_infinite_number_is_left_out():
    sentences = ["It is nan times as fast.", "It takes 2 ms.", "Up to infx.", "The information is inferred from nano."]
    assert show.defined(sentences) == ["It takes 2 ms.", "The information is inferred from nano."]
    assert show.defined([f"From {show.quantity(math.inf, 's')} on."]) == [
        "A number of this result is undefined or infinite here, so nothing is said about it."
    ]


@pytest.mark.parametrize(
    ("values", "form", "words"),
    [
        ([0.25, 0.23, 0.24], ".0%", "23% to 25%"),
        ([0.9312, 0.9338], ".2f", "0.931 to 0.934"),
        ([224, 217], ",", "217 to 224"),
        ([1.5, 1.5], "+.1f", "+1.5"),
        ([-0.004, -0.004], ".1f", "0.0"),
        ([0.1 + 0.2, 0.3], ".1f", "0.3"),
        ([1.0, math.nan, 2.0], ".0f", "undefined"),
    ],
)
def test_a_span_of_equal_numbers_is_the_number(values, form, words):
    assert show.span(values, form) == words


@pytest.mark.parametrize(("number", "words"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows")])
def test_a_count_takes_the_singular_if_it_is_one(number, words):
    assert show.counted(number, "row") == words


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        ("Each adds -0.0 ms, in -0%.", "Each adds 0.0 ms, in 0%."),
        ("It fell by -0.", "It fell by 0."),
        ("It is -0.05 to -0.01 (10-0).", "It is -0.05 to -0.01 (10-0)."),
        ("Nothing else. ", "Nothing else."),
    ],
)
def test_what_is_said_has_no_minus_before_a_zero_and_no_space_at_its_end(sentence, said):
    assert show.defined([sentence]) == [said]
