"""What lesson 01 says follows from what was measured: one ceiling, the slow batch, the losses of a step, the goal."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lesson_cells import executed, function
from torch.nn import functional

from labkit import show
from labkit.timing import machine


class Times:
    """A race whose times are known, with intervals of a width in proportion."""

    def __init__(self, times: dict[int, float], width: float = 0.02) -> None:
        self.times, self.width = times, width

    def over(self, baseline: str, candidate: str) -> SimpleNamespace:
        before, after = (self.times[int(name.removeprefix("batch "))] for name in (baseline, candidate))
        ratio = before / after
        low = 0.0 if self.width == math.inf else ratio / (1 + self.width)
        return SimpleNamespace(speedup=ratio, ci95=(low, ratio * (1 + self.width)))


class Page:
    """A session that notes what a page says and asks for."""

    def __init__(self) -> None:
        self.said = ""
        self.middle = 20.0  # median over processes of each number
        self.goals: dict[str, tuple] = {}
        self.references: list[dict] = []

    def say(self, _: str, *sentences: str | bool | None, any_preset: bool = False) -> None:
        self.said += " ".join(filter(None, sentences))

    def challenge(self, *_: Any, goals: dict[str, tuple], references: list[dict], **__: Any) -> None:
        self.goals, self.references = goals, references

    def record(self, *_: Any, **__: Any) -> None:
        pass

    table = record

    def result(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(value=self.middle)


# --- one ceiling ------------------------------------------------------------------------------------------------------


class Records:
    """A session that keeps numbers, and returns them with the range over the processes of a recording, if any."""

    def __init__(self, over_processes: tuple[float, float] | None) -> None:
        self.values: dict[str, float] = {}
        self.over_processes = over_processes

    def record(self, name: str, value: float, *_: Any, **__: Any) -> None:
        self.values[name] = value

    def result(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(value=self.values[name], ci95=self.over_processes)


@pytest.mark.parametrize(
    ("over_processes", "expected", "ends"),
    [(None, 50.3, (48.5, 50.3)), ((44.0, 61.9), 61.9, (44.0, 61.9)), ((50.3, 50.3), 50.3, (50.3, 50.3))],
    ids=["a run", "a recording", "equal processes"],
)
def test_the_ceiling_is_the_highest_rate_of_all_processes(
    over_processes: tuple[float, float] | None, expected: float, ends: tuple[float, float]
):
    lab = Records(over_processes)
    ceiling = function("01", "ceiling", lab=lab)
    highest, of_page = ceiling("bandwidth", "GB/s", [30.6e9, 37.3e9, 36.9e9, 48.5e9, 50.3e9])
    assert highest == pytest.approx(expected) and tuple(of_page) == pytest.approx(ends)
    assert lab.values == {"bandwidth": pytest.approx(50.3)}


@pytest.mark.parametrize(("cache_bytes", "expected"), [(2**24, 50.3), (2**25, 48.5), (300 * 2**20, 37.3)])
def test_arrays_of_eight_times_the_last_cache_raise_the_ceiling_and_smaller_ones_do_not(
    cache_bytes: int, expected: float
):
    sweep = [(2**26, 61.2e9), (2**27, 50.3e9), (2**28, 48.5e9)]
    roofs = machine.Ceilings("here", {"fp32": 2e11}, 37.3e9, streams={"read": 37.3e9})
    numbers = Records(None)
    lab = SimpleNamespace(
        by_preset=lambda smoke, class_, full: class_,
        ceilings=lambda: roofs,
        device="cpu",
        machine=SimpleNamespace(last_level_cache=cache_bytes),
        measure=lambda *_, **__: None,
        record=numbers.record,
        result=numbers.result,
    )
    measured = SimpleNamespace(bandwidth_sweep=lambda *_, **__: sweep, ceilings=lambda *_, **__: roofs)
    by_hand = {"our sum": 30.6e9, "our copy": 31e9}
    lesson = executed("01", "ceiling", "answer-measure", lab=lab, machine=measured, rates_by_hand=by_hand, decode=None)
    assert lesson["bandwidth"] == pytest.approx(expected)


def test_a_share_is_of_the_one_roof_and_its_range_is_that_of_the_time():
    def time_bound(flops: float, moved: float, peak: float, bandwidth: float) -> tuple[float, str]:
        return max(flops / peak, moved / bandwidth), ""

    ceilings = machine.Ceilings("here", {"fp32": 212e9}, 48.5e9)
    roof_share = function("01", "roof_share", ceilings=ceilings, kind="fp32", time_bound=time_bound)
    timing = SimpleNamespace(median_s=0.0623, ci95_s=(0.0604, 0.0644))
    share, ends = roof_share(0.278e9, 544e6, timing)
    assert (share, *ends) == pytest.approx((18.0, 17.4, 18.6), abs=0.1)
    without = SimpleNamespace(median_s=0.0623, ci95_s=(0.0, math.inf))
    assert show.interval(roof_share(0.278e9, 544e6, without)[1]) == "no interval"


@pytest.mark.parametrize(
    ("processes", "lowest", "is_said"),
    [((1.0,) * 5, 15.0, True), ((1.0,) * 5, 23.0, False), ((), 15.0, False)],
    ids=["processes apart", "processes alike", "a run"],
)
def test_the_slowest_process_is_named_where_it_lies_far_below_the_ceiling(
    processes: tuple[float, ...], lowest: float, is_said: bool
):
    page = Page()
    names = {"bandwidth": 24.0, "bandwidth_ends": (lowest, 24.0), "step_time": SimpleNamespace(processes=processes)}
    ends = (15.0, 22.0) if processes else None
    by_attempt = {"our sum": (20.0, ends), "our product": (19.0, None), "our copy": (18.0, None)}
    by_attempt["labkit's triad, before the step"] = (24.0, ends and (14.0, 24.0))
    by_hand = dict.fromkeys(("our sum", "our product", "our copy"), 1e9)
    executed("01", "answer-ceiling", lab=page, by_attempt=by_attempt, rates_by_hand=by_hand, **names)
    first = 22 if processes else 20
    assert f"By hand, at best: our sum {first}.0 GB/s, our product 19.0 GB/s, our copy 18.0 GB/s." in page.said
    assert "the ceiling of this page is 24.0 GB/s, by labkit's triad, before the step." in page.said
    assert ("One process reached no more than 15.0: a time" in page.said) == is_said


# --- the caches -------------------------------------------------------------------------------------------------------


def said_of_sizes(curve: list[tuple[int, float]], *, cache: int = 2**25, virtualised: bool = False) -> str:
    page = Page()
    page.machine = SimpleNamespace(last_level_cache=cache, virtualised=virtualised)
    executed(
        "01",
        "hierarchy-say",
        lab=page,
        on_gpu=False,
        bandwidth=30.0,
        binary=lambda size: f"{size // 2**20} MiB",
        curve=curve,
        bars=[(rate, rate) for _, rate in curve],
        together={"L2": 2**22, "L3": cache},
        sweep=curve,
    )
    return page.said


def test_a_small_array_shows_the_speed_of_a_cache_and_the_end_of_the_curve_is_compared_with_the_ceiling():
    said = said_of_sizes([(2**20, 300.0), (2**26, 28.0), (2**28, 22.6)])
    assert "An array of 1 MiB is read at 10.0 times the ceiling: a small array" in said
    assert "The largest array is read at 22.6 GB/s: this kind of read does not reach the ceiling." in said
    assert "still reaches" not in said and "right of the axis" not in said


def test_an_array_above_the_ceiling_that_a_cache_may_hold_in_part_is_named():
    said = said_of_sizes([(2**20, 300.0), (2**26, 45.0), (2**28, 30.0)])
    assert "An array of 64 MiB still reaches up to 45.0 GB/s, above the ceiling" in said and "largest" not in said


@pytest.mark.parametrize(
    ("virtualised", "words"), [(True, "the axis; a virtual machine may get only a part."), (False, "the axis.")]
)
def test_a_cache_larger_than_all_arrays_is_named(virtualised: bool, words: str):
    said = said_of_sizes([(2**20, 300.0), (2**28, 30.0)], cache=480 * 2**20, virtualised=virtualised)
    assert f"By the system's account L3 (480 MiB) would end right of {words}" in said


def test_without_an_effect_of_the_caches_none_is_claimed():
    assert "the caches do not show here" in said_of_sizes([(2**20, 31.0), (2**28, 30.0)])


# --- hot and cold -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hot_ends", "cold", "cold_ends", "words", "not_said"),
    [
        ((290, 399), 120.0, (104, 151), "the cold one reaches 80 %. More than 100 % is above the roof", "Why?"),
        ((290, 399), 67.5, (62, 90), "cold 68 %. More than 100 % is above the roof of main memory.", "Why?"),
        ((290, 399), 67.5, (62, math.inf), "What is wrong?", "reads alone"),
        ((90, 99), 67.5, (62, 80), "Why?", "What is wrong?"),
        ((70, 90), 67.5, (62, 80), "What else takes the time?", "What is wrong?"),
    ],
    ids=["both above", "hot above", "cold without an interval", "none above", "alike"],
)
def test_a_call_above_the_roof_is_named(hot_ends: tuple, cold: float, cold_ends: tuple, words: str, not_said: str):
    page = Page()
    names = {"hot": 354.0, "hot_ends": hot_ends, "cold": cold, "cold_ends": cold_ends}
    executed("01", "hot-say", lab=page, told=lambda value, _, form: f"{value:{form}} %", **names)
    assert words in page.said and not_said not in page.said


# --- the peak ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_recorded", "warnings"), [(True, ("busy",)), (False, ("busy",)), (False, ())], ids=["recorded", "busy", "quiet"]
)
def test_a_disturbed_run_has_doubtful_ceilings(is_recorded: bool, warnings: tuple[str, ...]):
    page = Page()
    names = {"kind": "fp32", "ridges": {"fp32": 11.7}, "rows": [], "ceilings": SimpleNamespace(device="here")}
    names |= {"peaks": {"fp32": (281.0, (217.0, 281.0))}, "is_recorded": is_recorded, "on_gpu": True}
    names |= {"first": SimpleNamespace(warnings=warnings), "second": SimpleNamespace(warnings=())}
    executed("01", "ceilings-shown", lab=page, **names)
    assert ("may be too low" in page.said) == (bool(warnings) and not is_recorded)


@pytest.mark.parametrize(
    ("peak", "words"),
    [(480.0, "480, was reached by our convolution."), (500.0, "500, was reached by a call of labkit's.")],
)
def test_the_call_that_reached_the_peak_is_named(peak: float, words: str):
    page = Page()
    executed(
        "01",
        "rates-by-hand",
        lab=page,
        kind="fp32",
        peaks={"fp32": (peak, (400.0, peak))},
        peaks_by_hand={"our product": 200e9, "our convolution": 450e9},
        over_processes=lambda name, value, unit: (value, (0.5 * value, 480.0) if "convolution" in name else None),
    )
    assert f"By hand, at best: our product 200 GFLOP/s, our convolution 480 GFLOP/s. The peak, {words}" in page.said


# --- the slow batch ---------------------------------------------------------------------------------------------------


def said_of_batches(ms: dict[int, float]) -> str:
    page = Page()
    level = [batch for batch in ms if 1 < batch < 24]
    grown = {batch: (time / ms[1], (0.9 * time / ms[1], 1.1 * time / ms[1])) for batch, time in ms.items()}
    names = {
        "batches": list(ms),
        "ceilings": SimpleNamespace(flops={"fp32": 1e12}),
        "grown": grown,
        "kind": "fp32",
        "layer_work": lambda batch: (1e8 * batch, 0),  # 0.1 ms a row at the peak
        "least": {batch: (1.0, "memory" if batch < 24 else "compute") for batch in ms},
        "level": level,
        "linear_shares": {batch: (50.0, (45.0, 55.0)) for batch in ms},
        "slowest": max(level, key=lambda batch: ms[batch], default=1),
        "told": lambda value, ends, form=".0f", unit=" %": f"{value:{form}}{unit}",
        "turn_rows": [{"batch": batch, "ms per layer": time} for batch, time in ms.items()],
    }
    executed("01", "turn-say", lab=page, **names)
    return page.said


def test_the_batch_that_the_bound_calls_free_and_that_costs_most_is_named_and_no_ceiling_is_blamed():
    said = said_of_batches({1: 1, 2: 1.03, 4: 2, 8: 3.5, 16: 2.5, 32: 2.8, 64: 4.1})
    assert "One row reaches 50 % of the roof of memory." in said
    assert "the same for all batches up to 16, yet batch 8 takes 3.50 times as long as one row." in said
    assert "would take 1.80 ms a layer, and batch 8 takes 3.50: neither ceiling explains that." in said


def test_a_batch_may_read_first_and_then_compute():
    said = said_of_batches({1: 1, 2: 1.1, 4: 1.3, 8: 1.85, 16: 1.8, 32: 2.8})
    assert "and batch 8 takes 1.85: the library may do one after the other." in said and "neither" not in said


def test_where_the_time_is_level_too_nothing_is_slow():
    said = said_of_batches({1: 1, 2: 1.0, 4: 1.05, 8: 1.1, 32: 2.8})
    assert "up to 8, and the time, too: even batch 8 takes 1.10 times as long as one row." in said
    assert "First reading" not in said


def test_without_a_batch_below_the_ridge_only_the_row_is_told():
    assert said_of_batches({1: 1, 32: 2.8}) == "One row reaches 50 % of the roof of memory."


# --- the goal of the challenge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_of_16", [1.0, 1.79, 1.81, 2.4])
@pytest.mark.parametrize("width", [0.0, 0.03, math.inf])
def test_the_batch_to_beat_is_the_same_however_long_the_others_take(step_of_16: float, width: float):
    page = on_the_plane(Times({1: 1.0, 2: 1.67, 4: 1.49, 8: 1.55, 16: step_of_16}, width))
    assert list(page.goals.values()) == [(None, 1.8, "x"), (2, None, "x")]
    _, throughput = page.goals
    (beaten,) = [row for row in page.references if row["plan"] == "batch 8, fp32"]
    assert len(page.references) == 5 and (beaten[throughput], beaten[f"{throughput} ci95"]) == (1.0, [1.0, 1.0])
    (largest,) = [row for row in page.references if row["plan"] == "batch 16, fp32"]
    assert largest[throughput] == pytest.approx(2 * 1.55 / step_of_16)


def test_the_page_says_what_its_own_batches_write():
    page = on_the_plane(Times({1: 1.0, 2: 1.67, 4: 1.64, 8: 1.6, 16: 2.0}, 0.03), "challenge-say")
    assert (
        "The goal is 10.0 times the tokens per second of batch 1." in page.said
        and "Section 7 reaches 8.0 times, with batch 16." in page.said
    )


def test_a_race_without_intervals_has_a_goal_all_the_same():
    page = on_the_plane(Times({1: 1.0, 2: 1.67, 4: 1.5, 8: 1.55, 16: 2.4}, math.inf), "challenge-say")
    assert "The goal is 10.3 times" in page.said


def on_the_plane(race: Times, *cells: str) -> Page:
    page = Page()
    names = {"lab": page, "planned": None, "by_batch": race, "over_one": race.times, "kind": "fp32"}
    names["over_first"] = function("01", "over_first")
    names["told"] = lambda value, _, form, unit: f"{value:{form}}{unit}"
    executed("01", "challenge-plane", *cells, **names)
    return page


def test_a_plan_that_breaks_a_single_sequence_does_not_count():
    alone = torch.zeros(16, 100, dtype=torch.int64)
    broken = alone.clone()
    broken[3, :20] = 1  # a fifth of one sequence; of all positions 1 in 80
    prompts = torch.arange(16)[:, None].expand(16, 100)

    def logits(tokens: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=functional.one_hot(tokens, 2))

    names = {"language_model": lambda p: logits(alone[p[0, :1]]), "torch": torch}
    keeps_tokens = executed("01", "challenge-tokens", **names)["keeps_tokens"]
    assert keeps_tokens(lambda _: logits(alone), prompts)
    assert not keeps_tokens(lambda _: logits(broken), prompts)


# --- one clock --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("agree", [True, False])
def test_no_diagnosis_where_the_race_and_section_1_do_not_agree_about_a_step(agree: bool):
    said = said_of_parts(agree=agree)
    losses = "Beyond their bytes the parts take: products 63.2 %, other calls 10.0 %, the rest 10.8 %."
    assert (f"moving the step's bytes takes 16.0 %. {losses}" in said) == agree
    assert ("nothing is said of its bytes" in said) != agree


def said_of_parts(*, agree: bool) -> str:
    page, ends = Page(), (1.0, 2.0)
    executed(
        "01",
        "profile-say",
        lab=page,
        agree=agree,
        parts={"products": (79.0, ends), "the rest": (11.0, ends)},
        lost={"products": 63.2, "other calls": 10.0, "the rest": 10.8},
        for_bytes=16.0,
        read_at=16.6,
        read_ends=ends,
        told=lambda value, _, form=".1f", unit=" %": f"{value:{form}}{unit}",
    )
    return page.said


@pytest.mark.parametrize("agree", [True, False])
def test_the_answer_names_the_losses_from_the_largest_where_the_measurements_agree(agree: bool):
    page = Page()
    executed(
        "01",
        "answer-again",
        lab=page,
        agree=agree,
        alone=SimpleNamespace(median_s=0.038),
        bandwidth=31.2,
        best={"batch": 16, "tokens/s": 175.5},
        for_bytes=47.2,
        here=26.0,
        kind="fp32",
        lost={"products": 17.6, "other calls": 13.8, "the rest": 21.4},
        raced=SimpleNamespace(median_s=0.037),
        step=SimpleNamespace(bytes=544e6),
    )
    assert "would write 57 tokens/s in fp32 for one user." in page.said
    assert "it writes 26.0 to 27.0; with 16 sequences together 175.5." in page.said
    assert ("of section 6's parts: the rest 21 %, products 18 %, other calls 14 %." in page.said) == agree


@pytest.mark.parametrize(
    ("clock", "step_s", "agree"),
    [("wall", 0.065, True), ("wall", 0.3, False), ("cpu", 0.065, False), ("wall", 0.03, False)],
)
def test_a_race_agrees_with_section_1_by_the_same_clock_and_about_the_same_time(clock: str, step_s: float, agree: bool):
    agrees = function("01", "agrees", step_time=SimpleNamespace(clock=clock, process_median_s=0.062))
    assert agrees(SimpleNamespace(clock="wall", process_median_s=step_s)) == agree
