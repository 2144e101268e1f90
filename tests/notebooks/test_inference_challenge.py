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


def test_each_way_to_use_the_memory_may_set_the_ceiling():
    roofs = machine.Ceilings("here", {"fp32": 2e11}, 37.3e9, streams={"read": 36.9e9, "triad": 37.3e9})
    numbers = Records(None)
    lab = SimpleNamespace(
        by_preset=lambda smoke, class_, full: class_,
        ceilings=lambda: roofs,
        device="cpu",
        measure=lambda *_, **__: None,
        record=numbers.record,
        result=numbers.result,
    )
    measured = SimpleNamespace(ceilings=lambda *_, **__: roofs)
    for our_sum, expected in ((30.6e9, 37.3), (41e9, 41.0)):
        names = {"lab": lab, "machine": measured, "rates_by_hand": {"our sum": our_sum}, "decode": None}
        assert executed("01", "ceiling", "answer-measure", **names)["bandwidth"] == pytest.approx(expected)


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


@pytest.mark.parametrize("processes", [(1.0,) * 5, ()], ids=["a recording", "a run"])
def test_the_attempt_that_set_the_ceiling_is_named(processes: tuple[float, ...]):
    page = Page()
    names = {"bandwidth": 24.0, "step_time": SimpleNamespace(processes=processes)}
    ends = (15.0, 22.0) if processes else None
    by_attempt = {"our sum": (20.0, ends), "our product": (19.0, None), "our copy": (18.0, None)}
    by_attempt["labkit's triad, before the step"] = (24.0, ends and (14.0, 24.0))
    by_hand = dict.fromkeys(("our sum", "our product", "our copy"), 1e9)
    executed("01", "answer-ceiling", lab=page, by_attempt=by_attempt, rates_by_hand=by_hand, **names)
    first = 22 if processes else 20
    assert f"By hand, at best: our sum {first}.0 GB/s, our product 19.0 GB/s, our copy 18.0 GB/s." in page.said
    assert "the ceiling of this page is 24.0 GB/s, by labkit's triad, before the step." in page.said


# --- hot and cold -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caches", "words"),
    [({"L1d": 65536, "L2": 4 * 2**20}, "the caches hold: L1d 65.5 kB, L2 4.19 MB."), ({}, "the ceiling is 28.")],
    ids=["caches told", "caches unknown"],
)
def test_the_times_of_a_hot_and_a_cold_call_stand_beside_that_of_their_bytes(caches: dict[str, int], words: str):
    page = Page()
    page.machine = SimpleNamespace(caches_in_all=caches)
    addition = {"hot": SimpleNamespace(median_s=9.19e-6), "cold": SimpleNamespace(median_s=389e-6)}
    addition["cold, 1 thread"] = SimpleNamespace(median_s=66e-6)
    names = {"hot": 604.0, "hot_ends": (556, 648), "cold": 14.0, "cold_ends": (14, 29), "addition": addition}
    names |= {"single": 84.0, "single_ends": (80, 88)}
    names |= {"moved": 1_572_864, "ceilings": SimpleNamespace(bandwidth=28.3e9), "on_gpu": False}
    array = SimpleNamespace(nbytes=524_288)
    names |= {"x": array, "y": array, "sweep": [(2**16, 286e9), (2**20, 170e9), (2**28, 15e9)], "bandwidth": 28.3}
    names |= {"over_processes": lambda _, rate, __: (rate, None), "setting": str, "quality": lambda *_, **__: ""}
    executed("01", "hot-say", lab=page, told=lambda value, _, form: f"{value:{form}} %", **names)
    assert "Hot, the addition reaches 604 % of the roof, cold 14 %, cold with one thread 84 %." in page.said
    assert "At the ceiling its bytes take 55.6 µs; it takes 9.19 µs, 389 µs and 66.0 µs." in page.said
    assert "An array of 1.05 MB, read over and over, comes at 170 GB/s; the ceiling is 28." in page.said
    assert page.said.endswith(words)


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


# --- the parts of a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("for_bytes", "rest", "doubts"),
    [
        (28.0, 23.6, ()),
        (120.0, 23.6, ("The ceiling is too low for this step.",)),
        (28.0, -9.0, ("The parts add up to more than the whole: the machine was disturbed.",)),
    ],
    ids=["in order", "faster than the ceiling", "disturbed"],
)
def test_the_share_of_the_bytes_in_a_step_is_always_told(for_bytes: float, rest: float, doubts: tuple[str, ...]):
    page, ends = Page(), (1.0, 2.0)
    executed(
        "01",
        "profile-say",
        lab=page,
        parts={"products": (59.1, ends), "the rest": (rest, ends)},
        for_bytes=for_bytes,
        bytes_ends=ends,
        raced=SimpleNamespace(median_s=0.0686),
        read_at=13.1,
        read_ends=ends,
        told=lambda value, _, form=".1f", unit=" %": f"{value:{form}}{unit}",
    )
    assert f"A step takes 68.6 ms. At the ceiling its bytes would take {for_bytes:.1f} % of that." in page.said
    assert "The products take 59.1 % of the step, and read their weights at 13.1 GB/s." in page.said
    assert all(words in page.said for words in doubts)
    assert ("too low" in page.said, "disturbed" in page.said) == (for_bytes > 102, rest < -5)


@pytest.mark.parametrize(("of_batch_1", "warm"), [(0.0734, "13.6 and 14.6"), (0.0686, "14.6")], ids=["two", "equal"])
def test_the_answer_names_the_state_of_the_caches(of_batch_1: float, warm: str):
    page = Page()
    executed(
        "01",
        "answer-again",
        lab=page,
        alone=SimpleNamespace(median_s=of_batch_1),
        bandwidth=28.3,
        best={"batch": 16, "tokens/s": 95.9},
        here=11.3,
        kind="fp32",
        raced=SimpleNamespace(median_s=0.0686),
        step=SimpleNamespace(bytes=544e6),
    )
    assert "would write 52 tokens/s in fp32 for one user." in page.said
    assert f"It writes 11.3 with cold caches, {warm} with the caches left as they are." in page.said
    assert "With 16 sequences together it writes 95.9." in page.said
