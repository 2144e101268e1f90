"""All that runs recorded as one long table: a row for each single value and for each value of each recorded table.

A record does not say which columns of a table are settings and which are results, nor which numbers a clock made;
both are decided here, by one rule each (`_keys`, `CLOCK`). What the numbers mean is left to who reads the rows.
"""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course.results import collect
from labkit.errors import InputError
from labkit.files import replacing
from labkit.records import RunRecord

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("lesson", "preset", "machine", "device", "seed")
VALUES = ("name", "key", "value", "low", "high", "unit", "text", "simulated", "clock")
CLOCK_UNITS = {"s", "ms", "µs", "us", "ns", "x", "×", "FLOP/byte"}  # and whatever is per second
# Words of names and columns that speak of time, or of what a machine's measured ceilings decide.
CLOCK = re.compile(
    r"\b(time|seconds|speed|speed-up|speedup|faster|slower|latency|throughput|bandwidth|over main memory|prefill|decode"
    r"|p50|p9[059]|mean batch|roof|roofline|ridge|limited by|turn|turning|share of theory|verdict|peak)\b"
)
NAMED = re.compile(r"(?P<name>.+?) \((?P<unit>[^()]+)\)")  # a column such as "accuracy (%)"
MOST_KEYS = 5


def rows(folders: Iterable[Path]) -> "pd.DataFrame":
    """Every recorded value of the results in and below `folders` (see `frame`); what cannot be read is left out.

    InputError where a folder is missing or none of them holds a result.
    """
    results, _ = collect(folders)
    return frame(result.record for result in results if result.record)


def frame(records: Iterable[RunRecord]) -> "pd.DataFrame":
    """The values of the records, one a row.

    lesson, preset, machine (slug), device, seed, then p.<NAME> for each other parameter of the lessons
    name       of a single value, or "table: column"
    key        which row of the table, as "column=value; ..."; empty for single values
    value      a number, in `unit`, with the 95 % interval low..high where there is one; not a number for a `text`
    simulated  True where it was computed and no clock saw it
    clock      True where a clock or a memory counter made or decided it, so that a repetition differs; False where
               the same code, seed and machine give the same value
    """
    import pandas as pd

    listed = list(records)
    names = dict.fromkeys(f"p.{name}" for one in listed for name in one.parameters if name != "SEED")
    columns = [*COLUMNS, *names, *VALUES]
    table = pd.DataFrame([row for one in listed for row in of_record(one)], columns=columns, dtype=object)
    for name in names:
        table[name] = _one_type(table[name])
    kinds = dict.fromkeys((*COLUMNS, *VALUES), str) | {"seed": "Int64"}
    kinds |= dict.fromkeys(("value", "low", "high"), float) | dict.fromkeys(("simulated", "clock"), bool)
    return table.astype(kinds)


def of_record(record: RunRecord) -> Iterator[dict[str, Any]]:
    """The rows of one record as dicts; what the run itself took comes last."""
    whose = {
        "lesson": record.lesson,
        "preset": record.preset,
        "machine": str(record.machine.get("slug", "")),
        "device": record.device,
        "seed": record.parameters.get("SEED"),
        **{f"p.{name}": value for name, value in record.parameters.items() if name != "SEED"},
    }
    for entry in record.measurements:
        for row in _of_table(entry) if entry["kind"] == "table" else [_of_value(entry)]:
            yield whose | row
    spent = (("seconds", record.seconds, "s"), ("peak memory", record.peak_memory, "B"))
    for name, value, unit in (*spent, ("peak device memory", record.peak_device_memory, "B")):
        if value is not None:
            yield whose | _row(f"run: {name}", "", value, unit=unit, clock=True)


Layout = tuple[list[dict[str, Any]], tuple[str, ...], list[str], dict[str, tuple[str, str]]]


def layout(entry: Mapping[str, Any]) -> Layout:
    """A recorded table's rows, the columns that tell them apart, the others, and which columns hold whose interval."""
    listed = entry["rows"]
    columns = list(dict.fromkeys(column for row in listed for column in row))
    bounds = _bounds(columns, listed)
    columns = [column for column in columns if column not in set(itertools.chain(*bounds.values()))]
    keys = _keys(listed, columns)
    return listed, keys, [column for column in columns if column not in keys], bounds


def clocked(entry: Mapping[str, Any]) -> bool:
    """Whether a clock made or decided a single value."""
    timed = _timed(entry["name"], entry.get("unit") or "")
    return timed or entry["kind"] in ("measurement", "comparison")


def named(column: str) -> tuple[str, str]:
    """Name and unit of a column: "accuracy (%)" -> ("accuracy", "%"), "accuracy" -> ("accuracy", "")."""
    match = NAMED.fullmatch(column)
    return (match["name"], match["unit"]) if match else (column, "")


def write(table: "pd.DataFrame", folder: Path) -> list[Path]:
    """Write the rows as rows.csv and rows.parquet into `folder`, each whole or not at all, and return the paths."""
    written = [folder / "rows.csv", folder / "rows.parquet"]
    savers = (lambda path: table.to_csv(path, index=False), lambda path: table.to_parquet(path, index=False))
    for path, save in zip(written, savers, strict=True):
        try:
            with replacing(path) as partial:
                save(partial)
        except OSError as error:
            raise InputError(f"The rows cannot be written to {path} ({error.strerror}); mend that first.") from None
    return written


# one entry of a record ----------------------------------------------------------------------------


def _of_value(entry: Mapping[str, Any]) -> dict[str, Any]:
    name, unit = entry["name"], entry.get("unit") or ""
    row = _row(name, "", entry.get("value"), entry.get("ci95"), unit, bool(entry.get("simulated")), clocked(entry))
    return row | ({"text": entry["verdict"]} if entry.get("verdict") else {})


def _of_table(entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    listed, keys, results, bounds = layout(entry)
    for place, row in enumerate(listed, start=1):
        key = "; ".join(f"{column}={short(row[column])}" for column in keys if column in row) or f"row={place}"
        for column in results:
            if row.get(column) is None:
                continue
            name, unit = named(column)
            unit = unit or entry.get("unit") or ""
            low, high = bounds.get(column, ("", ""))
            ci95 = (row.get(low), row.get(high)) if low in row and high in row else None
            timed = _timed(name, unit) or any(_timed(str(row.get(one)), "") for one in keys)
            yield _row(f"{entry['name']}: {name}", key, row[column], ci95, unit, bool(entry.get("simulated")), timed)


def _row(
    name: str,
    key: str,
    value: Any,
    ci95: Sequence[Any] | None = None,
    unit: str = "",
    simulated: bool = False,
    clock: bool = False,
) -> dict[str, Any]:
    found = number(value)
    low, high = map(number, ci95 or (None, None))
    text = "" if found is not None or value is None else str(value)
    return {"name": name, "key": key, "value": found, "low": low, "high": high, "unit": unit, "text": text,
            "simulated": simulated, "clock": clock}  # fmt: skip


def _timed(name: str, unit: str) -> bool:
    return unit in CLOCK_UNITS or any(one.endswith("/s") for one in (unit, name)) or bool(CLOCK.search(name.lower()))


def _bounds(columns: Sequence[str], listed: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Whose interval two columns are the ends of: "y low" and "y high" of y, "low" and "high" of the number before."""
    found = {c: (f"{c} low", f"{c} high") for c in columns if {f"{c} low", f"{c} high"} <= set(columns)}
    if {"low", "high"} <= set(columns):
        before = [c for c in columns[: columns.index("low")] if all(number(row.get(c)) is not None for row in listed)]
        found |= {before[-1]: ("low", "high")} if before else {}
    return found


def _keys(listed: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that tell the rows apart: the first one, a seed, and those with the fewest values that it then takes.

    Settings repeat and results rarely do, so that in a grid the product of the numbers of values is least for the
    settings. Columns that a clock decides come last, so that a repetition has the same keys. () where the rows cannot
    be told apart, or where nothing but a key would be left.
    """
    if len(columns) < 2:
        return ()
    fixed = tuple(dict.fromkeys([columns[0], *(column for column in columns if column == "seed")]))
    values = {column: len({short(row.get(column)) for row in listed}) for column in columns}
    steady = [column for column in columns if not _timed(*named(column))]
    for usable in (steady, list(columns)):
        options = [
            (*fixed, *more)
            for count in range(min(MOST_KEYS, len(usable)))
            for more in itertools.combinations([c for c in usable if c not in fixed], count)
            if len({tuple(short(row.get(c)) for c in (*fixed, *more)) for row in listed}) == len(listed)
        ]
        if options:
            best = min(options, key=lambda one: (math.prod(values[c] for c in one), [columns.index(c) for c in one]))
            return tuple(sorted(best, key=columns.index))
    return ()


# cells --------------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A number, a truth value, or one of the texts that a record writes for what JSON lacks ("inf")."""
    if isinstance(value, int | float) or value in ("inf", "-inf", "nan"):
        return float(value)
    return None


def short(value: Any) -> str:
    """A setting as text, the same for values that differ by rounding."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _one_type(column: "pd.Series") -> "pd.Series":
    """The column with values of one type, as Parquet needs them; lessons may use one name for different things."""
    kinds = {type(value) for value in column.dropna()}
    if kinds <= {int}:
        return column.astype("Int64")
    if kinds <= {int, float}:
        return column.astype(float)
    if kinds <= {bool}:
        return column.astype("boolean")
    return column.map(lambda value: value if isinstance(value, str) else json.dumps(value), na_action="ignore")
