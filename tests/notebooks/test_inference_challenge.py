"""What lesson 01 says follows from what was measured: one ceiling, the goal, the answer."""

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
    ("over_processes", "ends"),
    [(None, (48.5, 50.3)), ((44.0, 61.9), (44.0, 61.9)), ((50.3, 50.3), (50.3, 50.3))],
    ids=["a run", "a recording", "equal processes"],
)
def test_the_ceiling_is_the_highest_rate_of_all_processes(
    over_processes: tuple[float, float] | None, ends: tuple[float, float]
):
    lab = Records(over_processes)
    ceiling = function("01", "ceiling", lab=lab, over_processes=function("01", "over_processes", lab=lab))
    highest, of_processes = ceiling("bandwidth", "GB/s", [30.6e9, 37.3e9, 36.9e9, 48.5e9, 50.3e9])
    assert highest == pytest.approx(max(ends)) and tuple(of_processes) == pytest.approx(ends)
    assert lab.values == {"bandwidth": pytest.approx(50.3)}


def test_each_way_to_use_the_memory_may_set_the_ceiling():
    roofs = machine.Ceilings("here", {"fp32": 2e11}, 37.3e9, streams={"read": 36.9e9, "triad": 37.3e9})
    numbers = Records(None)
    lab = SimpleNamespace(
        by_preset=lambda smoke, class_, full: class_,
        ceilings=lambda: roofs,
        device="cpu",
        machine=SimpleNamespace(caches_in_all={"L1d": 2**16, "L3": 2**25}),
        measure=lambda *_, **__: None,
        record=numbers.record,
        result=numbers.result,
    )
    for our_sum, largest, expected in ((30.6e9, 30e9, 37.3), (41e9, 30e9, 41.0), (30.6e9, 38e9, 38.0)):
        sweep = [(2**20, 300e9), (2**27, 90e9), (2**28, largest), (2**29, 30e9)]  # beyond four times the cache
        measured = SimpleNamespace(ceilings=lambda *_, **__: roofs, bandwidth_sweep=lambda *_, sweep=sweep, **__: sweep)
        names = {"lab": lab, "machine": measured, "rates_by_hand": {"our sum": our_sum}, "decode": None}
        names["on_gpu"] = False
        assert executed("01", "answer-attempts", "answer-measure", **names)["bandwidth"] == pytest.approx(expected)


def test_a_share_is_the_bound_by_the_ceilings_over_the_time():
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
@pytest.mark.parametrize(("slowest", "our_sum"), [(21.0, 22e9), (12.0, 15e9)])
def test_the_speed_stands_beside_its_bound(processes: tuple[float, ...], slowest: float, our_sum: float):
    page = Page()
    page.beside = lambda _: None
    timing = SimpleNamespace(processes=processes, within_run_s=(0.04, 0.05), process_median_s=0.0435)
    names = {"bandwidth": 24.0, "bandwidth_ends": (slowest, 24.0)}
    roofs = SimpleNamespace(streams={"read": 23e9})
    names |= {"step_time": timing, "step": SimpleNamespace(bytes=544e6), "rates_by_hand": {"our sum": our_sum}}
    names |= {"first": roofs, "second": roofs}
    names["over_processes"] = lambda _, value, *__: (value, None)
    names["told"] = lambda value, _, form=".1f", unit=" %": f"{value:{form}}{unit}"
    executed("01", "answer-ceiling", lab=page, **names)
    evidence = f"; the slowest of five processes reached {slowest:.1f}" if processes else ""
    assert page.said.startswith("In this process labkit read at 23.0 GB/s before the steps and at 23.0 after them.")
    assert f"the ceiling is 24.0 GB/s{evidence}." in page.said
    assert ("not equally fast at all times" in page.said) == (bool(processes) and slowest < 20)
    assert ("our sum reads more slowly" in page.said) == (our_sum < 16e9)
    assert "the ceiling allows 44 tokens per second. With cold caches SmolLM2 writes 23.0 tokens" in page.said
    assert page.said.endswith("52.1 % of that.")


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
    page = on_the_plane(Times({1: 1.0, 2: 1.67, 4: 1.64, 8: 1.6, 16: 2.0}, 0.03))
    assert (
        "The goal is 10.0 times the tokens per second of batch 1." in page.said
        and "Section 7 reaches 8.0 times, with batch 16." in page.said
    )


def test_a_race_without_intervals_has_a_goal_all_the_same():
    page = on_the_plane(Times({1: 1.0, 2: 1.67, 4: 1.5, 8: 1.55, 16: 2.4}, math.inf))
    assert "The goal is 10.3 times" in page.said


def on_the_plane(race: Times) -> Page:
    page = Page()
    names = {"lab": page, "planned": None, "by_batch": race, "over_one": race.times, "kind": "fp32"}
    names["over_first"] = function("01", "over_first")
    names["told"] = lambda value, _, form, unit: f"{value:{form}}{unit}"
    executed("01", "challenge-plane", "challenge-say", **names)
    return page


def test_a_plan_that_breaks_a_single_sequence_does_not_count():
    alone = torch.zeros(16, 100, dtype=torch.int64)
    broken = alone.clone()
    broken[3, :20] = 1  # a fifth of one sequence; of all positions 1 in 80
    prompts = torch.arange(16)[:, None].expand(16, 100)

    def logits(tokens: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=functional.one_hot(tokens, 2))

    names = {"language_model": lambda p: logits(alone[p[0, :1]])}
    tokens_kept = function("01", "tokens_kept", **names)
    assert tokens_kept(lambda _: logits(alone), prompts) == 100
    assert tokens_kept(lambda _: logits(broken), prompts) < 90


# --- the answer ------------------------------------------------------------------------------------------------------


def test_the_answer_names_the_state_of_the_caches():
    page = Page()
    executed(
        "01",
        "answer-again",
        lab=page,
        bandwidth=28.3,
        here=11.3,
        kind="fp32",
        step=SimpleNamespace(bytes=544e6),
    )
    assert "would write 52 tokens/s in fp32 for one user." in page.said
    assert "With cold caches it writes 11.3." in page.said
