"""What lesson 01 says follows from what was measured: one ceiling, shares of a process, the odd batch, the goal."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lesson_cells import executed, function
from torch.nn import functional

from labkit import show
from labkit.timing import machine

# A linear layer on a two-core EPYC, ms by batch, as recorded on 26 November 2026.
RECORDED_MS = {1: 3.53, 2: 7.52, 4: 8.19, 8: 6.66, 16: 26.6, 32: 12.8, 64: 19.4, 128: 34.7}


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
    own: dict[str, float] = {}
    ceiling = function("01", "ceiling", lab=lab, own=own)
    highest, of_page = ceiling("bandwidth", "GB/s", [30.6e9, 37.3e9, 36.9e9, 48.5e9, 50.3e9])
    assert highest == pytest.approx(expected) and tuple(of_page) == pytest.approx(ends)
    assert lab.values == {"bandwidth": pytest.approx(50.3)} and own == {"bandwidth": 50.3e9}


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
    by_hand = {"a read by hand": 30.6e9, "a copy by hand": 31e9}
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


@pytest.mark.parametrize(("peak", "expected"), [(212e9, 25.0), (4e9, 50.0), (None, 25.0)])
def test_a_share_of_a_process_is_of_the_roof_that_the_same_process_reached(peak: float | None, expected: float):
    own = {"bandwidth": 40e9} | ({"fp32 peak": peak} if peak else {})
    numbers = {"own": own, "kind": "fp32", "over_processes": lambda name, value, unit, rough: (value, rough)}
    own_share = function("01", "own_share", **numbers)
    timing = SimpleNamespace(process_median_s=0.04, within_run_s=(0.02, 0.05))
    share, ends = own_share("a call", 8e7, 4e8, timing)
    assert (share, *ends) == pytest.approx((expected, 0.8 * expected, 2 * expected))
    without = SimpleNamespace(process_median_s=0.04, within_run_s=(0.0, math.inf))
    assert show.interval(own_share("a call", 8e7, 4e8, without)[1]) == "no interval"


@pytest.mark.parametrize(
    ("processes", "lowest", "is_said"),
    [((1.0,) * 5, 15.0, True), ((1.0,) * 5, 23.0, False), ((), 15.0, False)],
    ids=["processes apart", "processes alike", "a run"],
)
def test_the_middle_and_the_slowest_process_are_named_where_they_lie_far_below_the_ceiling(
    processes: tuple[float, ...], lowest: float, is_said: bool
):
    page = Page()
    names = {"bandwidth": 24.0, "bandwidth_ends": (lowest, 24.0), "step_time": SimpleNamespace(processes=processes)}
    ends = (15.0, 22.0) if processes else None
    names["by_attempt"] = {
        "labkit's copy, before the step": (24.0, ends and (14.0, 24.0)),
        "a read by hand": (20.0, ends),
    }
    executed("01", "answer-ceiling", lab=page, **names)
    assert "the ceiling of this page is 24.0 GB/s, reached by labkit's copy, before the step." in page.said
    assert f"No read passed {22 if processes else 20}.0 GB/s" in page.said
    assert ("In the middle process nothing passed 20.0 GB/s, in the slowest 15.0;" in page.said) == is_said


def test_a_ceiling_that_a_read_reached_is_not_doubted():
    page = Page()
    by_attempt = {"a copy by hand": (72.0, None), "labkit's read, after the step": (90.0, None)}
    names = {"bandwidth": 90.0, "bandwidth_ends": (80.0, 90.0), "step_time": SimpleNamespace(processes=())}
    executed("01", "answer-ceiling", lab=page, by_attempt=by_attempt, **names)
    assert "90.0 GB/s, reached by labkit's read, after the step." in page.said and "No read" not in page.said


@pytest.mark.parametrize(
    ("hot_ends", "cold_ends", "words", "not_said"),
    [
        ((290, 399), (104, 151), "main memory: the hot call is above it, and so is the cold one. What", "fastest"),
        (
            (290, 399),
            (62, 111),
            "the hot call is above it, and in the fastest process so is the cold one. What",
            "Why?",
        ),
        ((290, 399), (62, 90), "main memory: the hot call is above it. What is wrong?", "so is"),
        ((290, 399), (62, math.inf), "main memory: the hot call is above it. What is wrong?", "so is"),
        ((90, 99), (62, 80), "Why?", "What is wrong?"),
        ((70, 90), (62, 80), "What else takes the time?", "What is wrong?"),
    ],
    ids=["both above", "one process above", "hot above", "cold without an interval", "none above", "alike"],
)
def test_a_cold_call_above_the_roof_is_named(hot_ends: tuple, cold_ends: tuple, words: str, not_said: str):
    page = Page()
    names = {"hot": 354.0, "hot_ends": hot_ends, "cold": 67.5, "cold_ends": cold_ends, "is_recorded": True}
    executed("01", "hot-say", lab=page, told=lambda value, _, form: f"{value:{form}} %", **names)
    assert words in page.said and not_said not in page.said
    assert "Counting the two reads alone, the cold one reaches 45 %." in page.said


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


@pytest.mark.parametrize(("product", "is_said"), [(200e9, True), (470e9, False)])
def test_a_product_slower_than_the_convolution_is_tested_later(product: float, is_said: bool):
    assert ("section 6 tests why" in said_of_rates(product)) == is_said


def said_of_rates(product: float) -> str:
    page = Page()
    executed(
        "01",
        "rates-by-hand",
        lab=page,
        on_gpu=False,
        peaks_by_hand={"a product": product, "a convolution": 480e9},
        over_processes=lambda name, value, unit: (value, None),
        told=lambda value, ends, form, unit: f"{value:{form}}{unit}",
    )
    return page.said


# --- the odd batch ----------------------------------------------------------------------------------------------------


def said_of_batches(ms: dict[int, float], width: float = 0.02, *, memory_varies: bool = False) -> str:
    page, race = Page(), Times(ms, width)
    names = {
        "linear": race,
        "batches": list(ms),
        "grown": {batch: (time / ms[1], (0.9 * time / ms[1], 1.1 * time / ms[1])) for batch, time in ms.items()},
        "least": {batch: (1.0, "memory" if batch < 24 else "compute") for batch in ms},
        "memory_varies": memory_varies,
        "own_row": (75.0, (70.0, 80.0)),
        "linear_shares": {batch: (50.0, (45.0, 55.0)) for batch in ms},
        "told": lambda value, ends, form=".0f", unit=" %": f"{value:{form}}{unit}",
    }
    executed("01", "turn-say", lab=page, **names)
    return page.said


def test_the_batch_that_takes_longer_than_a_larger_one_is_named_and_neither_memory_nor_arithmetic_is_blamed():
    said = said_of_batches(RECORDED_MS)
    assert "Batch 16 even takes 2.08 times as long as batch 32" in said
    assert "which reads the same weights and does more arithmetic." in said


@pytest.mark.parametrize(
    ("memory_varies", "words"),
    [
        (False, "One row reaches 50 % of the roof of memory."),
        (True, "One row reaches 50 % of the roof of memory, and 75 % of each process's own."),
    ],
)
def test_a_row_has_a_share_of_its_own_process_where_the_memory_varies(memory_varies: bool, words: str):
    assert words in said_of_batches(RECORDED_MS, memory_varies=memory_varies)


def test_the_batch_that_the_bound_calls_free_and_that_costs_most_is_named():
    said = said_of_batches({1: 1, 2: 1.03, 4: 2, 8: 3.5, 16: 2.5, 32: 2.8, 64: 4.1})
    assert "the same for all batches up to 16, yet batch 8 takes 3.50 times as long as one row." in said


@pytest.mark.parametrize(
    ("parts", "said", "not_said"),
    [
        (0.62, "In parts, 2 threads take 0.62 times as long as one: the whole product uses one thread.", "nothing"),
        (1.0, "In parts, 2 threads take 1.00 times as long as one.", "uses one thread"),
    ],
    ids=["parts are faster", "parts are not"],
)
def test_a_row_uses_one_thread_where_a_second_does_not_help_and_parts_do(parts: float, said: str, not_said: str):
    ratios = {"1 row": 0.98, "1 row, in parts": parts}
    rates = {"a sum": 36.1, "1 row": 23.6}
    page = Page()
    executed(
        "01",
        "few-say",
        lab=page,
        few=True,
        n_threads=2,
        threads="2 threads",
        over_first=lambda *_: (2.1, (2.0, 2.2)),
        rows=[{"call": name, "1 thread (GB/s)": rate} for name, rate in rates.items()],
        against=lambda _, name, *__: (ratios[name], (0.98 * ratios[name], 1.02 * ratios[name])),
        told=lambda value, _, form, unit: f"{value:{form}}{unit}",
    )
    assert said in page.said and not_said not in page.said
    assert "Two rows take 2.10 times as long as one. The bound is the same; section 6 tests the library." in page.said
    assert "a sum reads the weights at 36.1 GB/s, one row at 23.6: the memory allows more." in page.said


def test_without_the_race_of_few_rows_the_page_says_that_it_was_not_run():
    page = Page()
    executed("01", "few-say", lab=page, few=None, rows=[], n_threads=1, threads="1 thread")
    assert page.said == "This race is the CPU's and was not run here."


def test_batches_in_order_have_no_outlier():
    assert "even takes" not in said_of_batches({1: 1, 2: 2, 4: 2.1, 8: 2.2, 16: 4})


@pytest.mark.parametrize("width", [1.5, math.inf])
def test_a_batch_is_not_out_of_order_within_the_interval_of_the_ratio_or_without_any(width: float):
    assert "even takes" not in said_of_batches(RECORDED_MS, width)


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
    assert ("moving the step's bytes takes 16.0 %" in said) == agree
    assert ("nothing is said of its bytes" in said) != agree


@pytest.mark.parametrize("memory_varies", [True, False])
def test_the_bytes_are_given_by_each_processs_own_bandwidth_too_where_the_memory_varies(memory_varies: bool):
    said = said_of_parts(memory_varies=memory_varies)
    assert ("or 27.1 % by each process's own" in said) == memory_varies


@pytest.mark.parametrize(
    ("products", "alone", "control", "cause"),
    [
        (0.5, 0.5, 1.02, "slower code"),
        (0.5, 1.0, 1.02, "fewer threads"),
        (0.4, 0.7, 1.02, "slower code and fewer threads"),
        (0.85, 0.93, 1.02, "slower code or fewer threads"),
        (0.5, 0.5, 0.7, ""),
        (0.97, 1.0, 1.0, ""),
    ],
)
def test_the_library_is_a_cause_only_where_the_products_change_and_the_control_does_not(
    products: float, alone: float, control: float, cause: str
):
    told = {"2": by_call(products, control), "1": by_call(alone, control)}
    said = said_of_library({"told: Intel": told, "as it is": dict.fromkeys("21", by_call(1.0, 1.0))}, cause)
    assert (f"So MKL takes {cause} here: a cause" in said) == bool(cause)
    assert ("slower code of MKL is not shown here" in said) != bool(cause)
    assert f"SmolLM2 writes {100 / products:.1f} tokens/s instead of 100.0." in said


def test_without_a_way_to_tell_the_library_the_page_says_that_it_was_not_run():
    assert "it was not run" in said_of_library({}, "")


def by_call(products: float, control: float) -> dict[str, float]:
    calls = "a step of SmolLM2", "its products", "1 row", "2 rows", "section 4's product"
    return dict.fromkeys(calls, 10 * products) | {"a sum": 10 * control}


def said_of_library(ms_of: dict[str, dict[str, dict[str, float]]], cause: str) -> str:
    page = Page()
    told = lambda value, ends, form, unit: f"{value:{form}}{unit}"  # noqa: E731
    names = {"over_processes": lambda name, value, unit: (value, None), "told": told, "n_layers": 2, "ms_of": ms_of}
    names |= {"n_threads": 2, "threads": "2 threads"}
    lesson = executed("01", "library-say", "library-verdict", lab=page, **names)
    assert lesson["cause"] == cause
    return page.said


def said_of_parts(
    *,
    agree: bool = True,
    memory_varies: bool = True,
) -> str:
    page, ends = Page(), (1.0, 2.0)
    executed(
        "01",
        "profile-say",
        lab=page,
        agree=agree,
        parts={"products": (79.0, ends), "the rest": (11.0, ends)},
        for_bytes=16.0,
        own_bytes=(27.1, ends),
        read_at=16.6,
        read_ends=ends,
        memory_varies=memory_varies,
        told=lambda value, _, form=".1f", unit=" %": f"{value:{form}}{unit}",
    )
    return page.said


@pytest.mark.parametrize(
    ("clock", "step_s", "agree"),
    [("wall", 0.065, True), ("wall", 0.3, False), ("cpu", 0.065, False), ("wall", 0.03, False)],
)
def test_a_race_agrees_with_section_1_by_the_same_clock_and_about_the_same_time(clock: str, step_s: float, agree: bool):
    agrees = function("01", "agrees", step_time=SimpleNamespace(clock=clock, process_median_s=0.062))
    assert agrees(SimpleNamespace(clock="wall", process_median_s=step_s)) == agree
