"""Numbers of a recording's other processes, for the process whose page is kept.

`./lab run NN --record` runs a lesson in several processes. The last one is given the records of the others, in the
environment variable OTHERS, and then shows and records each of its timings as the median and the range over all
processes.
"""

import functools
import os
import statistics
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from labkit import show
from labkit.lesson import records
from labkit.lesson.records import RecordedTable, RecordedValue, RunRecord
from labkit.timing.race import Race
from labkit.timing.results import Comparison, Measurement
from labkit.timing.roofs import Ceilings

Timing = Measurement | Comparison | Race | dict[str, Any]


def over_processes(name: str, timing: Timing) -> Timing:
    """Return a timing with the median and the range over processes; unchanged if a process lacks the timing.

    name: name of the timing in the records. A comparison of a race is recorded as "<name of the call>, <name>".
    timing: the timing of this process; a dict holds the fields of a number to record (records.RecordedValue).
    """
    if isinstance(timing, Race):
        return timing.over_processes([_race(name, timing, record) for record in _others()])
    entries = [record.named(name) for record in _others()]
    if not all(isinstance(entry, RecordedValue) for entry in entries):
        return timing
    if isinstance(timing, dict):
        return _number(timing, [entry.value for entry in entries])
    return timing.over_processes([TypeAdapter(type(timing)).validate_python(entry.detail) for entry in entries])


def raised(ceilings: Ceilings, table: str) -> Ceilings:
    """Return ceilings raised by those that the other processes measured, the highest of each.

    table: name under which each process recorded its ceilings.
    """
    for record in _others():
        recorded = record.named(table)
        if isinstance(recorded, RecordedTable):
            ceilings = ceilings.raised(_ceilings(ceilings.device, recorded))
    return ceilings


def _ceilings(device: str, table: RecordedTable) -> Ceilings:
    """Return the ceilings of a recorded table, without ranges."""
    by_name = {row["ceiling"]: row for row in table.rows}
    bandwidth = by_name.pop("bandwidth")["B/s"]
    rates = {dtype: row["FLOP/s"] for dtype, row in by_name.items()}
    return Ceilings(device, rates, bandwidth)


def _number(fields: dict[str, Any], elsewhere: list[Any]) -> dict[str, Any]:
    """Return the fields of a number to record, over processes; unchanged if a value of any process is no number."""
    values = [fields["value"], *elsewhere]
    if any(show.number(value) is None for value in values):
        return fields
    return fields | {
        "value": statistics.median(values),
        "ci95": (min(values), max(values)),
        "processes": len(values),
        "process_value": fields["value"],
    }


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
