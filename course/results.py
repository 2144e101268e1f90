"""Results of runs, read for reports: result folders of `./lab run` and `./lab sweep`, and all values as tidy rows.

A folder with damaged files becomes a sentence for the reader, and all undamaged results still count. The meaning of the
values was declared by the lesson (labkit.lesson.records). Result folders are made by course.store.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from labkit import files, show
from labkit.errors import DataError, InputError
from labkit.lesson.by_device import apart
from labkit.lesson.parameters import PRESETS
from labkit.lesson.records import Column, RecordedTable, RecordedValue, RunRecord, read

# how a page explains its intervals
RANGES = "A range in brackets is a 95 % interval. The range of a timing says if it is over processes or within a run."
WHERE = ("PRESET", "DEVICE", "RESULTS_DIR")  # parameters that say how large and where, not what
_RUN_COLUMNS = ("lesson", "preset", "machine", "device", "seed")
_NUMBER_COLUMNS = ("value", "low", "high")
_T = TypeVar("_T")


@dataclass(frozen=True)
class ResultFolder:
    """A result folder of a run.

    folder    path of the folder
    record    the lesson's record; None if the lesson did not finish
    run       content of run.json; empty for a lesson opened in an editor
    notebook  the executed notebook, if any
    """

    folder: Path
    record: RunRecord | None
    run: dict[str, Any]
    notebook: Path | None

    @property
    def changed(self) -> str:
        """The parameters with values different from the lesson's, for example "RATIO 0.7"; empty without run.json."""
        parameters = self.run.get("parameters") or {}
        return ", ".join(f"{name} {value}" for name, value in parameters.items() if name not in WHERE)

    @property
    def lesson(self) -> str:
        """The lesson's number, such as "03"."""
        return self.record.lesson if self.record else self.run["lesson"][:2]

    @property
    def created(self) -> str:
        """The time of the run, ISO 8601."""
        return self.record.created if self.record else self.run["created"]


def collect(folders: Iterable[Path]) -> tuple[list[ResultFolder], list[str]]:
    """Read the results in and below `folders`.

    Returns the results, oldest first, and a sentence for each unreadable result. Raises InputError if a folder is
    missing or no folder holds a result.
    """
    folders = list(folders)
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise InputError(f"There is no folder {missing[0]}; run a lesson first (./lab run 01), or name another folder.")
    homes: dict[Path, Path] = {}
    for folder in folders:
        homes |= {home.resolve(): home for home in _result_folders(folder)}  # folders may overlap
    if not homes:
        places = ", ".join(map(str, folders))
        raise InputError(f"There are no results in {places}; run a lesson first: ./lab run 01.")
    results, problems = _readable(_result, homes.values())
    return sorted(results, key=lambda result: result.created), problems


def recorded_runs() -> tuple[list[RunRecord], list[str]]:
    """Read the reference runs of all lessons and machines, and a sentence for each unreadable file."""
    return _readable(read, sorted(files.RECORDED.glob("*/[0-9][0-9].json")))


def _readable(reader: Callable[[Path], _T], paths: Iterable[Path]) -> tuple[list[_T], list[str]]:
    results, problems = [], []
    for path in paths:
        try:
            results.append(reader(path))
        except DataError as error:
            problems.append(str(error))
    return results, problems


def _result_folders(folder: Path) -> list[Path]:
    """List the folders with a result in and below `folder`, without hidden folders, which are of runs under way."""
    homes = set()
    for name in ("run.json", "record.json"):
        homes.update(file.parent for file in folder.rglob(name))
    return [home for home in sorted(homes) if not _is_hidden(home.relative_to(folder))]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _result(home: Path) -> ResultFolder:
    """Read a result folder; DataError if record.json or run.json is damaged."""
    record_file, run_file = home / "record.json", home / "run.json"
    record = read(record_file) if record_file.exists() else None
    try:
        run = json.loads(run_file.read_text(encoding="utf-8")) if run_file.exists() else {}
        if not record and not {"lesson", "created", "status"} <= set(run):
            raise ValueError
    except (OSError, ValueError):
        raise DataError(f"{run_file} cannot be read; remove its folder and run the lesson again.") from None
    notebook = next(home.glob("[0-9][0-9]_*.ipynb"), None)
    return ResultFolder(home, record, run, notebook)


# runs side by side ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RunColumn:
    """A record as a column of the page's tables.

    record   the record
    here     True for a run of the user, False for a recorded run
    changed  the parameters with values different from the lesson's, for example "RATIO 0.7"
    session  "in a session on a GPU" or the like, if the session's device is not the column's; else empty
    """

    record: RunRecord
    here: bool
    changed: str = ""
    session: str = ""

    @property
    def machine(self) -> str:
        """The machine's label, shortened to its first two parts: "AMD EPYC, 2 cores"."""
        label = self.record.machine.get("label", self.record.device)
        return ", ".join(label.split(", ")[:2])

    @property
    def run(self) -> str:
        """The run's owner, preset, changed parameters and session, for example "your run, class, RATIO 0.7"."""
        owner = "your run" if self.here else "recorded"
        return ", ".join(filter(None, [owner, self.record.preset, self.changed, self.session]))

    @property
    def whose(self) -> tuple[str, bool]:
        """The machine's slug, and True for a run of the user."""
        return str(self.record.machine.get("slug", "")), self.here

    @property
    def tries_the_code(self) -> bool:
        """True for a run at smoke, whose sizes say nothing about the results."""
        return self.record.preset == "smoke"

    @property
    def rank(self) -> int:
        """The place of the preset in PRESETS, larger for a larger preset; -1 for an unknown preset."""
        return PRESETS.index(self.record.preset) if self.record.preset in PRESETS else -1


def side_by_side(results: Iterable[ResultFolder], recorded: Iterable[RunRecord]) -> list[RunColumn]:
    """Make columns for each lesson, machine and preset of the user's results, and for each recorded run.

    The times of the CPU in a session on a GPU make a column of the CPU's, and the other way round. All columns of a
    session are of the same result.

    results   the user's results, oldest first
    recorded  recorded runs

    Of several results the newest with the lesson's own parameters counts, comparable with the recorded runs; if none
    has the lesson's own parameters, the newest of all. The user's results come first.
    """
    counting: dict[tuple, list[RunColumn]] = {}
    for result in results:
        record = result.record
        if record is None:
            continue
        key = (record.lesson, record.machine.get("slug"), record.preset)
        better_stands = key in counting and not counting[key][0].changed
        if not result.changed or not better_stands:
            counting[key] = _columns(record, True, result.changed)
    here = sorted(itertools.chain.from_iterable(counting.values()), key=lambda column: column.record.lesson)
    return here + [column for record in recorded for column in _columns(record, False)]


def _columns(record: RunRecord, here: bool, changed: str = "") -> list[RunColumn]:
    """Make a column for the session's device, then for each other device that the session timed."""
    of_session, *of_other_devices = apart(record)
    session = "in a session on the CPU" if record.device == "cpu" else "in a session on a GPU"
    columns = [RunColumn(of_session, here, changed)]
    return columns + [RunColumn(part, here, changed, session) for part in of_other_devices]


# tidy rows --------------------------------------------------------------------------------------------------------


def rows(folders: Iterable[Path]) -> pd.DataFrame:
    """Make rows (see `frame`) of all readable results in and below `folders`.

    Raises InputError if a folder is missing or no folder holds a result.
    """
    results, _ = collect(folders)
    return frame(result.record for result in results if result.record)


def frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """Make a data frame with a row per recorded value. The columns:

    lesson, preset, machine (slug) and device that the value was timed on, seed, then p.<NAME> for each further
    parameter of the lessons
    name       name of a single value, or "table: column"
    key        the row of the table, as "column=value; ..."; empty for single values
    value      a number, in `unit`, with the interval low..high if recorded: of a timing that several processes took the
               range over them, of any other number the 95 % interval; NaN for a text
    unit       unit of the value, such as "ms"
    role       "quality": more is better; "cost": less is better; "setting", "result": neutral
    text       the text, of a value with a text; the verdict, of a comparison
    simulated  True if the value was computed and no clock was read
    clock      True if a clock or memory counter made or chose the value, or named the row: a repetition differs
    """
    records = list(records)
    parameters: dict[str, None] = {}
    tidy = []
    for record in records:
        parameters |= dict.fromkeys(_parameter_columns(record))
        tidy += _rows(record)
    meaning = ("unit", "role", "text", "simulated", "clock")
    columns = [*_RUN_COLUMNS, *parameters, "name", "key", *_NUMBER_COLUMNS, *meaning]
    table = pd.DataFrame(tidy, columns=columns, dtype=object)
    for name in parameters:
        table[name] = _with_one_type(table[name])
    types: dict[str, Any] = dict.fromkeys(columns, str)
    types |= dict.fromkeys(_NUMBER_COLUMNS, float)
    types |= {"seed": "Int64", "simulated": bool, "clock": bool}
    for name in parameters:
        del types[name]
    return table.astype(types)


def _parameter_columns(record: RunRecord) -> dict[str, Any]:
    return {f"p.{name}": value for name, value in record.parameters.items() if name != "SEED"}


def _with_one_type(values: pd.Series) -> pd.Series:
    """Give a column a single type, as Parquet needs: numbers, truth values, or else texts.

    Lessons may use the same parameter's name for values of different types.
    """
    types = {type(value) for value in values.dropna()}
    if types <= {int, float} or types == {bool}:
        return values.convert_dtypes()
    return values.map(_as_text, na_action="ignore")


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _rows(record: RunRecord) -> Iterator[dict[str, Any]]:
    """Make the rows of a record, with the columns of `frame`; absent columns are left out."""
    run = {
        "lesson": record.lesson,
        "preset": record.preset,
        "machine": str(record.machine.get("slug", "")),
        "device": record.device,
        "seed": record.parameters.get("SEED"),
        **_parameter_columns(record),
    }
    for part in apart(record):
        where = {"machine": str(part.machine.get("slug", "")), "device": part.device}
        for entry in part.measurements:
            for row in _rows_of_entry(part, entry):
                yield run | where | row
    for row in _rows_of_run(record):
        yield run | row


def _rows_of_entry(record: RunRecord, entry: RecordedValue | RecordedTable) -> Iterable[dict[str, Any]]:
    if isinstance(entry, RecordedTable):
        return _rows_of_table(entry)
    return [_row_of_value(record, entry)]


def interval_of(record: RunRecord, entry: RecordedValue) -> tuple[Sequence[float] | None, str]:
    """Return the interval of a recorded number, and what it covers: of a timing in several processes their range.

    An interval that says nothing ("") is a 95 % interval over images, texts or seeds.
    """
    spread = record.spread(entry.name)
    if entry.clock and spread is not None and spread.processes > 1:
        return (spread.smallest, spread.largest), show.covers(spread.processes)
    return entry.ci95, entry.covers


def _row_of_value(record: RunRecord, entry: RecordedValue) -> dict[str, Any]:
    ci95, _ = interval_of(record, entry)
    row = _row(entry.name, entry.value, ci95, entry, simulated=entry.simulated)
    if entry.verdict:
        row["text"] = entry.verdict
    return row


def _rows_of_table(table: RecordedTable) -> Iterator[dict[str, Any]]:
    """Make a row for each measured value of a table; ends of intervals and settings get no row."""
    not_measured = set(table.by)
    for column in table.columns.values():
        not_measured |= {column.low, column.high}
    clock_named_rows = any(table.meaning(name).clock for name in table.by)
    for number, values in enumerate(table.rows, start=1):
        settings = [f"{name}={short(values[name])}" for name in table.by if name in values]
        key = "; ".join(settings) or f"row={number}"
        for column, value in values.items():
            if value is None or column in not_measured:
                continue
            meaning = table.meaning(column)
            name = f"{table.name}: {without_unit(column, meaning.unit)}"
            ci95 = (values.get(meaning.low), values.get(meaning.high))
            row = _row(name, value, ci95, meaning, key=key, simulated=table.simulated)
            if clock_named_rows:
                row["clock"] = True
            yield row


def _rows_of_run(record: RunRecord) -> Iterator[dict[str, Any]]:
    """Make the rows for the time and the memory of the whole run."""
    for name, unit in (("seconds", "s"), ("peak_memory", "B"), ("peak_device_memory", "B")):
        value = getattr(record, name)
        if value is not None:
            meaning = Column(role="cost", unit=unit, clock=True)
            yield _row(f"run: {name.replace('_', ' ')}", value, None, meaning)


def _row(
    name: str,
    value: Any,
    ci95: tuple[Any, Any] | None,
    meaning: Column | RecordedValue,
    *,
    key: str = "",
    simulated: bool = False,
) -> dict[str, Any]:
    number = as_number(value)
    low, high = ci95 or (None, None)
    return {
        "name": name,
        "key": key,
        "value": number,
        "low": as_number(low),
        "high": as_number(high),
        "text": str(value) if number is None else "",
        "unit": meaning.unit,
        "role": meaning.role,
        "clock": meaning.clock,
        "simulated": simulated,
    }


def as_number(value: Any) -> float | None:
    """Convert a number, a truth value, or "inf", "-inf" and "nan", as JSON lacks these, to float; None for the rest."""
    if isinstance(value, int | float) or value in ("inf", "-inf", "nan"):
        return float(value)
    return None


def short(value: Any) -> str:
    """Write a setting as text, the same text for values different only by rounding."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def without_unit(column: str, unit: str) -> str:
    """Remove the unit from a column's name: "p50 (ms)" -> "p50"."""
    return column.removesuffix(f" ({unit})")


def with_unit(column: str, unit: str) -> str:
    """Add the unit to a column's name, unless the unit needs no writing or is the name: "p50" -> "p50 (ms)"."""
    name = without_unit(column, unit)
    return name if unit in ("", *show.BARE, name) else f"{name} ({unit})"
