"""What lesson 01 says follows from what was measured: one ceiling, the odd batch, kept memory, the goal."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lesson_cells import cells, executed

from labkit import show
from labkit.timing import machine

# A linear layer on a two-core EPYC, ms by batch, as recorded on 26 November 2026.
RECORDED_MS = {1: 3.53, 2: 7.52, 4: 8.19, 8: 6.66, 16: 26.6, 32: 12.8, 64: 19.4, 128: 34.7}


class Page:
    """A session that notes what a page says and asks for."""

    def __init__(self) -> None:
        self.said = ""
        self.goals: dict[str, tuple] = {}
        self.references: list[dict] = []

    def say(self, _: str, *sentences: str | bool | None, any_preset: bool = False) -> None:
        self.said += " ".join(filter(None, sentences))

    def challenge(self, *_: Any, goals: dict[str, tuple], references: list[dict], **__: Any) -> None:
        self.goals, self.references = goals, references

    def record(self, *_: Any, **__: Any) -> None:
        pass

    table = record


# --- one ceiling ------------------------------------------------------------------------------------------------------


def test_the_ceiling_is_the_highest_attempt_with_a_range_on_both_sides():
    best, (low, high) = executed("01", "highest")["highest"]([30.6, 37.3, 36.9, 48.5, 50.3])
    assert (best, low, high) == pytest.approx((50.3, 48.5, 52.1))


def test_a_limit_of_even_attempts_lies_beyond_the_upper_end_about_as_often_as_not():
    highest, generator = executed("01", "highest")["highest"], np.random.default_rng(0)
    beyond = [highest(attempts)[1][1] < 1.0 for attempts in generator.random((4000, 5))]
    assert np.mean(beyond) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("cache_bytes", "ceiling"), [(2**25, 50.3e9), (300 * 2**20, 37.3e9)])
def test_arrays_of_four_times_the_last_cache_raise_the_ceiling_and_smaller_ones_do_not(
    cache_bytes: int, ceiling: float
):
    sweep = [(2**26, 61.2e9), (2**27, 50.3e9), (2**28, 48.5e9)]
    roofs = machine.Ceilings("here", {"fp32": 2e11}, 37.3e9)
    lab = SimpleNamespace(
        by_preset=lambda smoke, class_, full: class_,
        ceilings=lambda: roofs,
        device="cpu",
        machine=SimpleNamespace(last_level_cache=cache_bytes),
        measure=lambda *_, **__: None,
    )
    measured = SimpleNamespace(bandwidth_sweep=lambda *_, **__: sweep, ceilings=lambda *_, **__: roofs)
    by_hand = {"a read by hand": 30.6e9, "a copy by hand": 31e9}
    lesson = executed("01", "highest", "answer-measure", lab=lab, machine=measured, rates_by_hand=by_hand, decode=None)
    assert lesson["memory_ceiling"] == ceiling


def test_a_share_of_the_roof_has_a_range_on_both_sides():
    ranges = {"flops_range": {"fp32": (201e9, 223e9)}, "bandwidth_range": (37e9, 60e9)}
    ceilings = machine.Ceilings("here", {"fp32": 212e9}, 48.5e9, **ranges)

    def time_bound(flops: float, moved: float, peak: float, bandwidth: float) -> tuple[float, str]:
        return max(flops / peak, moved / bandwidth), ""

    roof_share = executed("01", "roof-share", ceilings=ceilings, kind="fp32", time_bound=time_bound)["roof_share"]
    timing = SimpleNamespace(median_s=0.0623, ci95_s=(0.0604, 0.0644))
    assert roof_share(0.278e9, 544e6, timing) == pytest.approx((18.0, 14.1, 24.3), abs=0.1)
    without = SimpleNamespace(median_s=0.0623, ci95_s=(0.0, math.inf))
    assert show.interval(roof_share(0.278e9, 544e6, without)[1:]) == "no interval"


# --- the odd batch ----------------------------------------------------------------------------------------------------


def said_of_batches(ms: dict[int, float], width: float = 0.05) -> dict[str, Any]:
    rows = [
        {"batch": batch, "ms per layer": time_ms, "share of the roof (%)": 50.0}
        | {"low": (1 - width) * time_ms, "high": (1 + width) * time_ms}
        for batch, time_ms in ms.items()
    ]
    page = Page()
    return executed("01", "turn-say", lab=page, turn_rows=rows) | {"said": page.said}


def test_the_batch_that_takes_longer_than_a_larger_one_is_named():
    lesson = said_of_batches(RECORDED_MS)
    assert (lesson["fewer"]["batch"], lesson["more"]["batch"]) == (16, 32)
    assert "16 rows take 2.08 times as long as 32" in lesson["said"]


def test_batches_in_order_have_no_outlier():
    assert "no batch is out of order" in said_of_batches({1: 1, 2: 2, 4: 2.1, 8: 2.0, 16: 4})["said"]


@pytest.mark.parametrize("width", [0.5, math.inf])
def test_a_batch_is_not_out_of_order_within_its_interval_or_without_any(width: float):
    assert "no batch is out of order" in said_of_batches(RECORDED_MS, width)["said"]


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("faster", "what was slow is the kernel for that number of rows"),
        ("slower", "the outlier at batch 16 has another cause"),
        ("equivalent", "the outlier at batch 16 has another cause"),
        ("inconclusive", "This run does not settle what padding does."),
    ],
)
def test_only_padding_that_is_faster_blames_the_kernel(verdict: str, words: str):
    page, pair = Page(), SimpleNamespace(speedup=1.9, ci95=(1.8, 2.0), verdict="faster")
    padding = SimpleNamespace(speedup=1.9, ci95=(1.8, 2.0), verdict=verdict)
    executed("01", "two-rows-say", lab=page, rows_apart=pair, padding=padding, few=16, many=32, odd=2.1, told=str)
    assert words in page.said


# --- kept memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("small", "large", "words"),
    [
        ("slower", "faster", "At 4 MB keeping the memory loses"),
        ("equivalent", "faster", "Small results gain nothing"),
        ("slower", "faster", "The price of the gain"),
        ("equivalent", "equivalent", "nothing to gain"),
    ],
)
def test_the_loss_of_kept_memory_is_told_as_well_as_its_gain(small: str, large: str, words: str):
    page, rows = Page(), [{"new memory": 0}, {"new memory": 15_626}]
    keeping = {
        megabytes: SimpleNamespace(speedup=1.0, ci95=(0.9, 1.1), verdict=verdict)
        for megabytes, verdict in ((4, small), (64, large))
    }
    executed("01", "faults-table", lab=page, rows=rows, keeping=keeping, told=lambda pair: pair.verdict)
    assert words in page.said


# --- the goal of the challenge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_of_16", [1.0, 1.4, 1.88])
def test_no_batch_of_the_page_reaches_the_goal_of_the_challenge(step_of_16: float):
    times = {1: 1.0, 2: 1.67, 4: 1.49, 8: 1.28, 16: step_of_16}
    over_one = {batch: (ratio, ratio, ratio) for batch, ratio in times.items()}
    page = Page()
    executed("01", "challenge-threads", "challenge-plane", lab=page, over_one=over_one, kind="fp32", point=None)
    _, longest, _ = page.goals["step time"]
    least, _, _ = page.goals["throughput"]
    reached = [row["step time"] <= longest and row["throughput"] >= least for row in page.references]
    assert len(reached) == 5 and not any(reached)


# --- one clock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agree", "words"), [(True, "54 % of the step is lost"), (False, "nothing is said here about")]
)
def test_no_diagnosis_where_the_race_and_section_1_do_not_agree_about_a_step(agree: bool, words: str):
    page, pair = Page(), SimpleNamespace(ci95=(1.2, 1.4))
    executed(
        "01",
        "profile-say",
        lab=page,
        agree=agree,
        over_step={"products": pair, "calls": pair},
        share_of_step={"calls": 24.0},
        in_products=76.0,
        in_calls=13.0,
        for_bytes=22.0,
        parts={"other computing": 11.0},
        turn_shares=[0.51],
    )
    assert words in page.said


@pytest.mark.parametrize(
    ("clock", "step_s", "agree"),
    [("wall", 0.065, True), ("wall", 0.3, False), ("cpu", 0.065, False), ("wall", 0.03, False)],
)
def test_a_race_agrees_with_section_1_by_the_same_clock_and_about_the_same_time(clock: str, step_s: float, agree: bool):
    (line,) = [line for line in cells("01")["profile-figure"].splitlines() if line.startswith("agree = ")]
    space = {
        "raced": SimpleNamespace(clock="wall", median_s=step_s),
        "step_time": SimpleNamespace(clock=clock, median_s=0.062),
    }
    exec(line, space)
    assert space["agree"] == agree
