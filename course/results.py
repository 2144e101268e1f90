"""What runs left behind: result folders as `./lab run` and a sweep leave them, and all their values as tidy rows.

A folder that cannot be read is a sentence for the reader, not an error: the others still count. What the values mean
was declared when they were recorded (labkit.records).
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from labkit import files, show
from labkit.errors import DataError, InputError
from labkit.lesson.parameters import PRESETS
from labkit.lesson.records import Column, RecordedTable, RunRecord, read

WHERE = ("PRESET", "DEVICE", "RESULTS_DIR")  # parameters that say how large and where, not what


@dataclass(frozen=True)
class ResultFolder:
    """What a run left: its record (None where the lesson did not finish), run.json and executed notebook, if any."""

    folder: Path
    record: RunRecord | None
    run: dict[str, Any]
    notebook: Path | None

    @property
    def changed(self) -> str:
        """The parameters in which the run differed from what its lesson states, where run.json says so."""
        parameters = self.run.get("parameters") or {}
        return ", ".join(f"{name} {value}" for name, value in parameters.items() if name not in WHERE)

    @property
    def lesson(self) -> str:
        return self.record.lesson if self.record else self.run["lesson"][:2]

    @property
    def created(self) -> str:
        return self.record.created if self.record else self.run["created"]


def collect(folders: Iterable[Path]) -> tuple[list[ResultFolder], list[str]]:
    """The results in and below `folders`, oldest first, and a sentence for each that cannot be read.

    InputError where a folder is missing or none of them holds a result.
    """
    folders = list(folders)
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise InputError(f"There is no folder {missing[0]}; run a lesson first (./lab run 01), or name another folder.")
    homes = {home.resolve(): home for folder in folders for home in _homes(folder)}  # folders may overlap
    if not homes:
        raise InputError(f"There are no results in {', '.join(map(str, folders))}; run a lesson first: ./lab run 01.")
    results, problems = _readable(_result, homes.values())
    return sorted(results, key=lambda result: result.created), problems


def recorded_runs() -> tuple[list[RunRecord], list[str]]:
    """The reference runs of all lessons and machines, and a sentence for each that cannot be read."""
    return _readable(read, sorted(files.RECORDED.glob("*/[0-9][0-9].json")))


def _readable(reader: Callable[[Path], Any], paths: Iterable[Path]) -> tuple[list, list[str]]:
    results, problems = [], []
    for path in paths:
        try:
            results.append(reader(path))
        except DataError as error:
            problems.append(str(error))
    return results, problems


def _homes(folder: Path) -> list[Path]:
    homes = sorted({file.parent for name in ("run.json", "record.json") for file in folder.rglob(name)})
    return [home for home in homes if not any(part.startswith(".") for part in home.relative_to(folder).parts)]


def _result(home: Path) -> ResultFolder:
    record_file, run_file = home / "record.json", home / "run.json"
    record = read(record_file) if record_file.exists() else None
    try:
        run = json.loads(run_file.read_text(encoding="utf-8")) if run_file.exists() else {}
        if not record and not {"lesson", "created", "status"} <= set(run):
            raise ValueError
    except (OSError, ValueError):
        raise DataError(f"{run_file} cannot be read; remove its folder and run the lesson again.") from None
    return ResultFolder(home, record, run, next(home.glob("[0-9][0-9]_*.ipynb"), None))


# runs side by side ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RunColumn:
    """A record as one column of the page's tables. `here` tells the user's runs from the recorded ones, `changed` says
    how its parameters differ from the lesson's own ("RATIO 0.7")."""

    record: RunRecord
    here: bool
    changed: str = ""

    @property
    def machine(self) -> str:
        return ", ".join(self.record.machine.get("label", self.record.device).split(", ")[:2])

    @property
    def run(self) -> str:
        """Whose run it is, at what preset, with which parameters."""
        return ", ".join(filter(None, ["your run" if self.here else "recorded", self.record.preset, self.changed]))

    @property
    def whose(self) -> tuple[str, bool]:
        return str(self.record.machine.get("slug", "")), self.here

    @property
    def rank(self) -> int:
        return PRESETS.index(self.record.preset) if self.record.preset in PRESETS else -1


def side_by_side(results: Iterable[ResultFolder], recorded: Iterable[RunRecord]) -> list[RunColumn]:
    """One column for each lesson, machine and preset of the user's results (oldest first), then the recorded ones.

    The newest run with the lesson's own parameters counts, as the recorded ones have those; else the newest one.
    """
    columns: dict[tuple, RunColumn] = {}
    for result in results:
        if record := result.record:
            key = (record.lesson, record.machine.get("slug"), record.preset)
            if not result.changed or key not in columns or columns[key].changed:
                columns[key] = RunColumn(record, True, result.changed)
    here = sorted(columns.values(), key=lambda column: column.record.lesson)
    return [*here, *(RunColumn(record, False) for record in recorded)]


# tidy rows --------------------------------------------------------------------------------------------------------


def rows(folders: Iterable[Path]) -> pd.DataFrame:
    """Every recorded value of the results in and below `folders` (see `frame`); what cannot be read is left out.

    InputError where a folder is missing or none of them holds a result.
    """
    return frame(result.record for result in collect(folders)[0] if result.record)


def frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """The values of the records, one a row.

    lesson, preset, machine (slug), device, seed, then p.<NAME> for each other parameter of the lessons
    name       of a single value, or "table: column"
    key        which row of the table, as "column=value; ..."; empty for single values
    value      a number, in `unit`, with the 95 % interval low..high where there is one; not a number for a `text`
    role       "quality": more is better; "cost": less is better; "setting", "result": neither
    clock      whether a clock or a memory counter made or decided it, or a setting of its row: a repetition differs
    simulated  whether it was computed and no clock saw it
    """
    records = list(records)
    parameters = dict.fromkeys(f"p.{name}" for record in records for name in record.parameters if name != "SEED")
    run, value = ("lesson", "preset", "machine", "device", "seed"), ("value", "low", "high")
    columns = [*run, *parameters, "name", "key", *value, "unit", "role", "text", "simulated", "clock"]
    table = pd.DataFrame([row for record in records for row in _rows(record)], columns=columns, dtype=object)
    for name in parameters:  # Parquet needs one type a column; lessons may use one name for different things
        kinds = {type(item) for item in table[name].dropna()}
        if kinds <= {int, float} or kinds == {bool}:
            table[name] = table[name].convert_dtypes()
        else:
            table[name] = table[name].map(lambda item: item if isinstance(item, str) else json.dumps(item), "ignore")
    kinds = dict.fromkeys((*run, "name", "key", "unit", "role", "text"), str) | dict.fromkeys(value, float)
    return table.astype(kinds | {"seed": "Int64", "simulated": bool, "clock": bool})


def _rows(record: RunRecord) -> Iterator[dict[str, Any]]:
    run = {"lesson": record.lesson, "preset": record.preset, "machine": str(record.machine.get("slug", ""))}
    run |= {"device": record.device, "seed": record.parameters.get("SEED")}
    run |= {f"p.{name}": value for name, value in record.parameters.items() if name != "SEED"}
    for entry in record.measurements:
        if not isinstance(entry, RecordedTable):
            row = _row(entry.name, "", entry.value, entry.ci95, entry, entry.simulated)
            yield run | row | ({"text": entry.verdict} if entry.verdict else {})
            continue
        ends = {end for column in entry.columns.values() for end in (column.low, column.high)}
        clock_chose = any(entry.meaning(name).clock for name in entry.by)
        for place, values in enumerate(entry.rows, start=1):
            key = "; ".join(f"{name}={short(values[name])}" for name in entry.by if name in values) or f"row={place}"
            for column, value in values.items():
                if value is not None and column not in entry.by and column not in ends:
                    meaning = entry.meaning(column)
                    name = f"{entry.name}: {without_unit(column, meaning.unit)}"
                    ci95 = (values.get(meaning.low), values.get(meaning.high))
                    row = _row(name, key, value, ci95, meaning, entry.simulated)
                    yield run | row | ({"clock": True} if clock_chose else {})
    for name, unit in (("seconds", "s"), ("peak_memory", "B"), ("peak_device_memory", "B")):
        if (value := getattr(record, name)) is not None:
            meaning = Column(role="cost", unit=unit, clock=True)
            yield run | _row(f"run: {name.replace('_', ' ')}", "", value, None, meaning, False)


def _row(name: str, key: str, value: Any, ci95: Any, meaning: Any, simulated: bool) -> dict[str, Any]:
    parsed, low, high = map(as_number, (value, *(ci95 or (None, None))))
    text = "" if parsed is not None else str(value)
    about = {"unit": meaning.unit, "role": meaning.role, "clock": meaning.clock, "simulated": simulated}
    return {"name": name, "key": key, "value": parsed, "low": low, "high": high, "text": text, **about}


def as_number(value: Any) -> float | None:
    """A number, a truth value, or one of the texts that a record writes for what JSON lacks ("inf")."""
    return float(value) if isinstance(value, int | float) or value in ("inf", "-inf", "nan") else None


def short(value: Any) -> str:
    """A setting as text, the same for values that differ by rounding."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def without_unit(column: str, unit: str) -> str:
    return column.removesuffix(f" ({unit})")


def with_unit(column: str, unit: str) -> str:
    name = without_unit(column, unit)
    return name if unit in ("", *show.BARE, name) else f"{name} ({unit})"
