"""Numbers of a recording's other processes, for the process whose page is kept.

`./lab run NN --record` runs a lesson in several processes. The last one is given the records of the others, in the
environment variable OTHERS, and then shows and records each of its timings with the range over all processes.
"""

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from labkit import show
from labkit.lesson import records
from labkit.lesson.records import RecordedValue, RunRecord
from labkit.timing.race import Race
from labkit.timing.results import Comparison, Measurement

Timing = Measurement | Comparison | Race | dict[str, Any]


def with_range(name: str, timing: Timing) -> Timing:
    """Return a timing with the range over processes for its interval; unchanged if a process lacks the number.

    name: name of the timing in the records. A comparison of a race is recorded as "<name of the call>, <name>".
    timing: the timing of this process; a dict holds the fields of a number to record (records.RecordedValue).
    """
    if isinstance(timing, Race):
        return replace(timing, processes=tuple(_race(name, timing, record) for record in _others()))
    numbers = _numbers(name)
    if not numbers:
        return timing
    if isinstance(timing, dict):
        numbers.append(timing["value"])
        return timing | {"ci95": (min(numbers), max(numbers)), "processes": len(numbers)}
    return timing.over_processes(numbers)


def _numbers(name: str) -> list[float]:
    """Return the number called `name` of each other process; nothing if any of them lacks the number."""
    numbers = []
    for record in _others():
        entry = record.named(name)
        if not isinstance(entry, RecordedValue) or show.number(entry.value) is None:
            return []
        numbers.append(entry.value)
    return numbers


def _race(name: str, here: Race, record: RunRecord) -> Race:
    """Return a race as another process recorded it, with the sides that it recorded."""
    sides: dict[str, Measurement] = {}
    for call in here.sides:
        entry = record.named(f"{call}, {name}")
        if isinstance(entry, RecordedValue) and entry.kind == "comparison":
            for role in ("baseline", "candidate"):
                side = TypeAdapter(Measurement).validate_python(entry.detail[role])
                sides[side.name] = side
    first = next(iter(sides.values()), None)
    orders = (tuple(sides),) * (len(first.samples_s) // here.per_block if first else 0)
    return Race(sides, orders, here.per_block)


def _others() -> tuple[RunRecord, ...]:
    return _read(os.environ[records.OTHERS])


@functools.cache
def _read(paths: str) -> tuple[RunRecord, ...]:
    return tuple(records.read(Path(path)) for path in paths.split(os.pathsep))
