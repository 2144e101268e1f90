"""Sections of lessons that need a CUDA device: ways to compute one thing, raced beside the bounds of the roofline.

Without a device a section is one folded line, which opens on the bounds of a card of the catalogue, and on the tables
of the machines that have recorded the section.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from labkit import show
from labkit.errors import first_line
from labkit.lesson.records import cost, quality
from labkit.lesson.reference_runs import day
from labkit.lesson.session import Lab
from labkit.show import Rows
from labkit.timing import machine, roofline
from labkit.timing.race import Race
from labkit.timing.roofs import Ceilings
from labkit.timing.work import Work

CARD = "H100 SXM"  # of the catalogue, for the bounds where no card is
RACE_S = 6.0  # for all ways of a case
COLUMNS = {
    "ms": cost("ms", clock=True),
    "speed-up": quality("x", clock=True, low="low", high="high"),
    "bound, ms": cost("ms", clock=True),
    "of the roof": quality("fraction", clock=True),
}


@dataclass(frozen=True)
class Way:
    """A way to compute something on a GPU.

    work: least work of a call, on which the bound stands.
    dtype: type of the products, whose peak counts.
    build: makes the call without arguments, on the GPU; run only where a GPU is.
    """

    work: Work
    dtype: str
    build: Callable[[], Callable[[], Tensor]]


Cases = Mapping[str, Mapping[str, Way]]  # by case, such as a batch size, then by the name of the way


def missing(device: str | torch.device) -> str:
    """Return why nothing can be timed on `device`, as part of a sentence; "" if the device is a GPU that is here."""
    if not torch.cuda.is_available():
        return "here is no CUDA device"
    return "" if torch.device(device).type == "cuda" else "this session runs on the CPU"


def section(lab: Lab, name: str, cases: Cases, reason: str, *, within: float) -> list[dict[str, Any]]:
    """Race the ways of each case on the GPU, and record and show their times beside the bounds.

    name: name of the recorded table.
    cases: the first way of a case is the baseline of the others, whose results are compared with its before any race.
    reason: part of a sentence that says why the GPU cannot be used, such as that of `missing`; the section is then a
        folded line. "" if the GPU can be used.
    within: largest difference from the first way's result, as a share of that result's norm.
    Returns a row per case and way, with the columns case, way, ms, speed-up (over the first way), low, high, bound
    in ms and share of the roof (None without a ceiling for the type); none without a GPU. A way that this GPU or this
    torch lacks, or that gives another result, is not timed: a sentence says so.
    """
    recorded = [run for run in lab.reference_runs(name) if run["device"].startswith("cuda")]
    if reason:
        _show_folded(name, cases, reason, recorded)
        return []
    rows, refusals = [], []
    with lab.fold(f"{name}: the races"):
        for case, ways in cases.items():
            calls = _ready(case, ways, within, refusals)
            if len(calls) > 1:
                race = lab.race(f"{case}, {name}", calls, device="cuda", budget_s=RACE_S)
                rows += _rows(case, ways, race, lab.ceilings("cuda"))
    if rows:
        lab.record(name, rows, by=("case", "way"), columns=COLUMNS, device="cuda")
        lab.table([_in_words(row) for row in rows], caption=f"{name}: {torch.cuda.get_device_name()}")
    for refusal in refusals:
        show.emit(refusal)
    return rows


def _ready(case: str, ways: Mapping[str, Way], within: float, refusals: list[str]) -> dict[str, Callable[[], Tensor]]:
    """Build the calls of a case and compare each result with the first; `refusals` gets a sentence per way left out.

    Compilers, drivers and libraries raise errors of many types where a card or a build lacks a kernel.
    """
    (baseline, first_way), *candidates = ways.items()
    calls = {baseline: first_way.build()}
    reference = calls[baseline]().float()
    for name, way in candidates:
        try:
            call = way.build()
            result = call().float()
        except Exception as error:
            refusals.append(f"{case}: {name} is left out: {first_line(error)}")
            continue
        difference = float((result - reference).norm() / reference.norm())
        if difference <= within:
            calls[name] = call
        else:
            refusals.append(f"{case}: {name} is left out: it differs from {baseline} by {difference:.1%}.")
    return calls


def _rows(case: str, ways: Mapping[str, Way], race: Race, ceilings: Ceilings) -> list[dict[str, Any]]:
    baseline = next(iter(race.sides))
    rows = []
    for name, side in race.sides.items():
        speedup, low, high = 1.0, 1.0, 1.0
        if name != baseline:
            comparison = race.over(baseline, name)
            speedup, (low, high) = comparison.speedup, comparison.ci95
        placed = roofline.placed(side, ways[name].work, ceilings, ways[name].dtype)
        share = placed.roof_share
        rows.append({
            "case": case, "way": name, "ms": 1000 * side.median_s, "speed-up": speedup, "low": low, "high": high,
            "bound, ms": None if share is None else 1000 * share * side.median_s, "of the roof": share,
        })  # fmt: skip
    return rows


def _in_words(row: Mapping[str, Any]) -> dict[str, str]:
    low, high = float(row["low"]), float(row["high"])  # a record holds an infinite end as text
    is_baseline = low == high == 1
    return {
        "case": row["case"],
        "way": row["way"],
        "time": _time(row["ms"]),
        "speed-up": "1" if is_baseline else show.told(row["speed-up"], (low, high)),
        "at least": _time(row["bound, ms"]),
        "of the roof": "–" if row["of the roof"] is None else f"{row['of the roof']:.0%}",
    }


def _time(ms: float | None) -> str:
    return show.quantity(None if ms is None else ms / 1000, "s")


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a call as one CUDA graph, whose kernels Python launches all at once (lesson 12): for times of kernels."""
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        call()  # a first call compiles and allocates, which no graph may hold
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def listing(title: str, source: str) -> None:
    """Show a program's source, folded below a title."""
    summary, program = escape(title), escape(source)
    show.emit(f"{title}\n{source}", f"<details><summary>{summary}</summary><pre>{program}</pre></details>")


# --- without a GPU ----------------------------------------------------------------------------------------------------


def _show_folded(name: str, cases: Cases, reason: str, recorded: list[dict[str, Any]]) -> None:
    """Show a folded line; below it the bounds of a card of the catalogue, then each machine's recorded table."""
    places = [_place(run) for run in recorded]
    record = f"recorded on: {', '.join(places)}" if places else "not recorded yet"
    line = f"{name}: {reason}; {record}."
    bounds = [row for case, ways in cases.items() for row in _bounds(case, ways)]
    tables: list[tuple[str, Rows, bool]] = [(f"The bounds of one {CARD}, by the roofline", bounds, True)]
    for run, place in zip(recorded, places, strict=True):
        tables.append((place, [_in_words(row) for row in run["rows"]], False))
    texts, html = [line], ""
    for caption, rows, computed in tables:
        texts += [f"{'COMPUTED ' if computed else ''}{caption}", show.text_table(rows)]
        html += show.html_table(rows, caption=caption, badge=show.COMPUTED if computed else "")
    show.emit("\n".join(texts), f"<details><summary>{escape(line)}</summary>{html}</details>")


def _place(run: Mapping[str, Any]) -> str:
    return f"{run['machine']}, {day(run)}"


def _bounds(case: str, ways: Mapping[str, Way]) -> list[dict[str, str]]:
    """Return a row per bound of a case, with the ways that share it."""
    names: dict[roofline.Bound, list[str]] = {}
    for name, way in ways.items():
        bound = roofline.bound(way.work, machine.DEVICES[CARD], way.dtype)
        names.setdefault(bound, []).append(name)
    rows = []
    for bound, sharing in names.items():
        least = show.quantity(bound.seconds, "s")
        rows.append({"case": case, "way": "; ".join(sharing), "at least": least, "limited by": bound.limiter})
    return rows
