"""Checks of lesson 13: do gains multiply, is a loss excluded, what does a report hide.

Tables of times are made from parts whose answer is known; limits lie beside the ends of an exact interval; faulty
reports come with every other number changed.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from labkit import stats
from labkit.lesson.failures import Failures

# ----------------------------------------------------------------------------------------------------- interactions

Times = dict[frozenset, float]


def _times(parts: Mapping[str, float], effects: Mapping[str, Mapping[str, float]]) -> Times:
    """The time of every combination of steps that scale parts: effects {step: {part: factor}}."""
    table = {}
    for n in range(len(effects) + 1):
        for steps in itertools.combinations(effects, n):
            factors = {part: math.prod(effects[step].get(part, 1.0) for step in steps) for part in parts}
            table[frozenset(steps)] = sum(time * factors[part] for part, time in parts.items())
    return table


def _tables() -> dict[str, Times]:
    halves = {"cut": {"work": 0.5}, "int8": {"work": 0.25}}
    engine = {"engine": {"work": 0.8, "calls": 0.1}}
    whole = _times({"work": 3.0}, halves | {"engine": {"work": 0.7}})
    some = _times({"work": 3.0, "calls": 2.0}, halves | engine)
    del some[frozenset({"cut", "engine"})]
    backwards = dict(reversed(_times({"work": 5.0, "calls": 3.0}, halves | engine).items()))
    return {
        "one part, every step scales all of it": whole,
        "two steps that shrink the same part": _times({"work": 6.0, "calls": 4.0}, halves),
        "steps that shrink different parts": _times({"work": 6.0, "calls": 4.0}, {**engine, "cut": {"work": 0.5}}),
        "three steps, one pair not measured": some,
        "three steps, the time without any at the end of the table": backwards,
        "four steps": _times({"work": 5.0, "calls": 3.0}, halves | engine | {"batch": {"calls": 0.2}}),
        "one step alone": _times({"work": 1.0}, {"cut": {"work": 0.5}}),
        "a step that makes it slower": _times(
            {"work": 2.0, "calls": 1.0}, {"int8": {"work": 1.5}, "cut": {"calls": 0.5}}
        ),
    }


def interactions(fn: Callable, failures: Failures) -> None:
    """interactions(times) -> {combination of two or more steps: its gain over the product of its steps' gains}."""
    for name, times in _tables().items():
        with failures.given(times=name):
            answer = failures.call(fn, times, changed="the table was changed: work on it without writing to it")
            failures.need(isinstance(answer, dict), "return a dict {combination: number}")
            expected = {}
            for steps, time in times.items():
                if len(steps) > 1:
                    product = math.prod(times[frozenset()] / times[frozenset({step})] for step in steps)
                    expected[steps] = times[frozenset()] / time / product
            failures.need(
                set(answer) == set(expected),
                "the combinations are not those of the table that have two steps or more",
                detail=f"expected {len(expected)}, got {len(answer)}",
            )
            for steps, value in expected.items():
                failures.close(
                    answer[steps],
                    value,
                    "a value is off; the gain of a combination is the time without any step over its own time, and it "
                    "is divided by the gains of its steps alone, all multiplied",
                )


# ------------------------------------------------------------------------------------------------------------- gate


def _answers(n: int, right: int, lost: int, won: int) -> tuple[Tensor, Tensor]:
    """Right or wrong before and after, bool [n]: `lost` turned wrong, `won` turned right."""
    before = torch.arange(n) < right
    after = before.clone()
    after[:lost] = False
    after[right : right + won] = True
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n + lost))
    return before[order], after[order]


CHANGES = (  # examples, right before, turned wrong, turned right
    (10_000, 9200, 120, 60), (10_000, 9200, 300, 60), (5000, 4000, 600, 640), (1000, 900, 20, 4), (1000, 900, 2, 1),
    (400, 300, 40, 60), (400, 300, 0, 40), (300, 270, 1, 0), (200, 170, 3, 2), (100, 80, 10, 8), (1000, 900, 0, 0),
    (64, 40, 0, 0), (30, 20, 0, 0), (30, 20, 10, 3), (20, 12, 8, 2), (12, 8, 3, 0), (12, 8, 0, 1),
)  # fmt: skip
BESIDE = (0.99, 1.01)  # limits just inside and just beyond an end of the interval, of which they are these shares
EDGES = ((5, 5, 5, 0, 100.0), (400, 300, 0, 40, 0.0), (400, 300, 3, 3, 0.0))  # at the ends of what a limit can be


def _gates() -> Iterator[tuple[int, int, int, int, float]]:
    """Yield the numbers of CHANGES and points that may be lost, with limits beside both ends of the interval."""
    for counts in CHANGES:
        before, after = _answers(*counts)
        _, *ends = stats.accuracy_change(after, before)
        for end, share in itertools.product(ends, BESIDE):
            if end < 0:
                yield *counts, round(-100 * end * share, 4)
    yield from EDGES


def gate(fn: Callable, failures: Failures) -> None:
    """gate(before, after, points) -> "passes", "fails" or "open"."""
    for n, right, lost, won, points in _gates():
        with failures.given(examples=n, turned_wrong=lost, turned_right=won, points=points):
            before, after = _answers(n, right, lost, won)
            answer = failures.call(fn, before, after, points, changed="the answers were changed: copy before writing")
            failures.need(answer in ("passes", "fails", "open"), 'return "passes", "fails" or "open"')
            _, low, high = (100 * share for share in stats.accuracy_change(after, before))
            expected = "open"
            if low >= -points:
                expected = "passes"
            elif high < -points:
                expected = "fails"
            failures.expect(
                answer == expected,
                "the verdict is off; take the interval of stats.accuracy_change(after, before), in points, and see "
                "whether all of it is at the limit or above, all of it below, or neither",
                detail=f"expected {expected!r} for an interval from {low:+.2f} to {high:+.2f}, got {answer!r}",
            )


# ----------------------------------------------------------------------------------------------------------- faults

FAULTS = {  # name -> the fields of a report that show the fault
    "no interval": ("interval",),
    "threads": ("threads",),
    "baseline batch": ("batches", "baseline ms"),
    "no quality": ("points",),
    "few requests": ("quantile", "requests"),
    "first call": ("first call",),
}


AT_THE_EDGE = (  # fields of a report, and its faults
    ({"threads": (4, 1)}, ()),  # to the candidate's disadvantage
    ({"quantile": 0.9, "requests": 100}, ()),
    ({"quantile": 0.9, "requests": 99}, ("few requests",)),
    ({"batches": (1, 1), "baseline ms": {1: 20.0, 4: 79.6, 8: 160.0}}, ("baseline batch",)),  # hardly faster with 4
)


def _report(seed: int, faults: frozenset) -> dict[str, Any]:
    """A report with these faults and no other; all numbers are drawn."""
    draw = random.Random(seed)
    speed = draw.choice([1.0, 1.5, 4.0, 60.0])
    each = {size: round(draw.uniform(10, 20), 2) for size in (1, 4, 8, 32)}  # ms an item
    best = min(each, key=each.get)
    batch = best if "baseline batch" not in faults else draw.choice([size for size in each if size != best])
    quantile = draw.choice([0.9, 0.99, 0.999]) if "few requests" in faults or draw.random() < 0.5 else None
    enough = math.ceil(10 / (1 - (quantile or 0.5)) - 1e-6)
    requests = enough + draw.choice([0, 0, 5, 500])
    if "few requests" in faults:
        requests = enough - draw.choice([1, 5])
    elif quantile is None:
        requests = draw.choice([0, 3, 500])  # nothing is asked of them
    threads = draw.choice([(1, 4), (2, 4)]) if "threads" in faults else draw.choice([(1, 1), (4, 4), (4, 1)])
    points = draw.choice([(-0.3, 0.2), (0.0, 0.0), (-0.8, -0.1)])
    return {
        "speed-up": speed,
        "interval": None if "no interval" in faults else (0.9 * speed, 1.1 * speed),
        "batches": (batch, draw.choice([1, 8, 32])),
        "threads": threads,
        "baseline ms": {size: size * value for size, value in each.items()},
        "points": None if "no quality" in faults else points,
        "quantile": quantile,
        "requests": requests,
        "first call": "first call" in faults,
    }


def faults(fn: Callable, failures: Failures) -> None:
    """faults(report) -> the set of what is wrong with it."""
    several = [frozenset(some) for n in (0, 1, 2, 6) for some in itertools.combinations(FAULTS, n)]
    reports = [(_report(seed, some), some) for seed, some in enumerate([*several, *several[:7]])]
    fair = _report(0, frozenset())
    reports += [(fair | fields, frozenset(names)) for fields, names in AT_THE_EDGE]
    for number, (report, expected) in enumerate(reports, start=1):
        with failures.given(report=f"number {number}"):
            answer = failures.call(fn, report, changed="the report was changed: only read it")
            failures.need(isinstance(answer, set | frozenset), "return a set of names, an empty one for a fair report")
            failures.need(set(answer) <= set(FAULTS), "a name is not one of the card's")
            for fault, fields in FAULTS.items():
                detail = ", ".join(f"{field}: {report[field]}" for field in fields)
                failures.expect(
                    fault not in expected or fault in answer,
                    f"{fault!r} is not found in a report that has it; look at its hint",
                    detail=detail,
                )
                failures.expect(
                    fault in expected or fault not in answer,
                    f"{fault!r} is found in a report that does not have it; look at its hint",
                    detail=detail,
                )


CHECKS = {
    "13.1": interactions,
    "13.2": gate,
    "13.3": faults,
}

TRIES = {
    "13.1": f"{len(_tables())} tables of times, among them one with a pair that was not measured",
    "13.2": f"{len(CHANGES)} pairs of results, few examples and no change among them, with limits beside both ends",
    "13.3": "reports with no fault, with one, with two and with all of them, and every other number changed",
}
