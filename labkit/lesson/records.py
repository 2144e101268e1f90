"""Records of runs: the questions, the machine, the results, and the meaning of each number.

A record is a JSON file, also embedded in the notebook, so that an executed notebook carries the results along. A record
keeps samples, intervals and meanings, never a path or a host name. Comparing runs is left to course.report.
"""

import json
import math
import numbers
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from labkit import files, show
from labkit.errors import DataError, InputError
from labkit.lesson import claims

VERSION = "labkit.record/2"
MIME = "application/vnd.labkit.record+json"
SEED = "seed"  # rows of a table that differ only in this column are repetitions
OTHERS = "LABKIT_OTHER_PROCESSES"  # in the environment of a recording's last process: paths of the others' records

Role = Literal["setting", "quality", "cost", "result"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Column(_Strict, frozen=True):
    """The meaning of the numbers in a column of a table.

    role: "setting": chosen, not measured; "quality": more is better; "cost": less is better; "result": neither.
    unit: unit of the numbers, such as "ms"; empty for numbers without a unit.
    clock: True if a clock or a memory counter made or decided the numbers, so that a repetition differs. A repetition
        has different rows if a clock decided a column of `by`, like the name of the slowest case.
    low, high: names of the columns with the ends of the 95 % interval, if any.
    """

    role: Role = "result"
    unit: str = ""
    clock: bool = False
    low: str | None = None
    high: str | None = None


def quality(unit: str = "", *, clock: bool = False, low: str | None = None, high: str | None = None) -> Column:
    """Make a column of results to maximise: accuracies, speed-ups; arguments as in `Column`."""
    return Column(role="quality", unit=unit, clock=clock, low=low, high=high)


def cost(unit: str = "", *, clock: bool = False, low: str | None = None, high: str | None = None) -> Column:
    """Make a column of results to minimise: times, sizes, errors; arguments as in `Column`."""
    return Column(role="cost", unit=unit, clock=clock, low=low, high=high)


def result(unit: str = "", *, clock: bool = False, low: str | None = None, high: str | None = None) -> Column:
    """Make a column of results that are neither good nor bad, such as ridge points; arguments as in `Column`."""
    return Column(role="result", unit=unit, clock=clock, low=low, high=high)


def setting(unit: str = "") -> Column:
    """Make a column of chosen values. A column of `by` is a setting anyway: declare only a unit."""
    return Column(role="setting", unit=unit)


class RecordedValue(_Strict):
    """A number or a text; in `detail`, a "measurement" (s) or "comparison" (x) holds labkit.bench's samples.

    processes: number of processes that `value` is the median and `ci95` the range of; 0 for a number of this process.
    process_value: number of this process, if `value` is a median over several; None otherwise.
    device: device of the clock; None for the session's device, and for a timing, whose detail names the device.
    """

    kind: Literal["value", "measurement", "comparison"]
    name: str
    value: bool | int | float | str
    unit: str = ""
    ci95: tuple[float, float] | None = None
    role: Role = "result"
    clock: bool = False
    simulated: bool = False
    verdict: str | None = None
    detail: dict[str, Any] | None = None
    processes: int = 0
    process_value: int | float | None = None
    device: str | None = None

    @property
    def covers(self) -> str:
        """Say what the interval covers; "" without an interval, and for a number that no clock made."""
        if self.ci95 is None or not self.clock:
            return ""
        return show.covers(self.processes)


class RecordedTable(_Strict):
    """Rows of a table: `by` names the columns that tell rows apart, `columns` the meaning of the rest.

    A column without a declaration is a plain result without a unit. device: as in `RecordedValue`.
    """

    kind: Literal["table"]
    name: str
    rows: list[Annotated[dict[str, Any], Field(min_length=1)]]
    by: tuple[str, ...] = ()
    columns: dict[str, Column] = {}
    simulated: bool = False
    device: str | None = None

    def meaning(self, column: str) -> Column:
        """Return the meaning of a column's numbers."""
        if column in self.columns:
            return self.columns[column]
        return Column(role="setting") if column in self.by else Column()


class Prediction(_Strict):
    """A guess and the measured number in the same unit.

    predicted: the guess; None for a question without an answer.
    measured: the measured number; None before the measurement.
    ci95: the interval of the measured number, if any.
    covers: what the interval of a timing covers, such as "within this run"; "" for any other 95 % interval.
    """

    name: str
    question: str
    unit: str
    predicted: int | float | None
    measured: int | float | None
    ci95: tuple[float, float] | None = None
    covers: str = ""


class SettledClaim(_Strict):
    """The verdict of a run's value on a claim.

    trained: the training behind the value, if the claim has a recipe.
    device: device that the value was timed on; None for the session's.
    """

    id: str
    value: int | float | None
    ci95: tuple[float, float] | None = None
    trained: dict[str, int | float] | None = None
    verdict: claims.Verdict
    device: str | None = None


class CheckedExercise(_Strict):
    """The outcome of an answer's check: every failure, and the answer in use for the rest of the lesson."""

    id: str
    passed: bool
    failures: list[str] = []
    used: Literal["learner", "worked"] | None = None


class Challenge(_Strict):
    """A lesson's challenge: the goals (labkit.lesson.challenge), the learner's point, and if the point lies inside.

    point: numbers of the plan; None without a plan.
    reached: True if the plan reaches the goal; None without a plan.
    """

    name: str
    goal: str
    point: dict[str, float | tuple[float, float]] | None
    goals: dict[str, tuple[float | None, float | None, str]]
    reached: bool | None


class Processes(_Strict):
    """The results of a lesson in several processes, run in turn; all lists are in the order of the processes.

    created: end of each process, ISO 8601.
    seconds: duration of each process.
    values: the recorded numbers by name; a process without the number is left out of the list.
    code: hash of what was run (course.reference); "" in older records.
    """

    created: list[str]
    seconds: list[float]
    values: dict[str, list[int | float]]
    code: str = ""


class Spread(NamedTuple):
    """A number over several processes: median, smallest, largest, and the number of processes."""

    median: float
    smallest: float
    largest: float
    processes: int


class RunRecord(_Strict):
    """A finished run of a lesson.

    sentences: the messages of figures and tables by name.
    seconds: duration of all running cells.
    peak_memory, peak_device_memory: largest memory in use, in bytes.
    budget: {seconds, memory, within}: the preset's limits (memory None: no limit), and if the run kept both.
    runs: results of all processes of a reference run, recorded together; None for a single process.
    """

    version: Literal["labkit.record/2"]
    lesson: str
    title: str
    preset: str
    device: str
    parameters: dict[str, Any]
    machine: dict[str, Any]
    measurements: list[Annotated[RecordedValue | RecordedTable, Field(discriminator="kind")]]
    predictions: list[Prediction]
    claims: list[SettledClaim]
    checks: list[CheckedExercise]
    sentences: dict[str, list[str]] = {}
    challenges: list[Challenge] = []
    seconds: float
    peak_memory: int
    peak_device_memory: int | None
    budget: dict[str, Any]
    created: str
    labkit: str
    git: dict[str, Any] | None
    runs: Processes | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return strict JSON values without defaults; NaN and infinities are "nan", "inf" and "-inf"."""
        fields = self.model_dump(exclude_defaults=True)
        return plain(fields | {"parameters": _without_folders(self.parameters)})

    @classmethod
    def from_dict(cls, values: Any, source: str = "The record") -> "RunRecord":
        """Read the values of to_dict; DataError, naming `source`, for an unknown version or a wrong field."""
        stated = values.get("version") if isinstance(values, dict) else None
        if stated != VERSION:
            raise DataError(f"{source} is of version {stated!r}, this labkit reads {VERSION!r}; run the lesson again.")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{source} is damaged: `{field}`: {first['msg']}; run the lesson again.") from None

    def named(self, name: str) -> RecordedValue | RecordedTable | None:
        """Return the result called `name`, None if the run has none."""
        for entry in self.measurements:
            if entry.name == name:
                return entry
        return None

    def spread(self, name: str) -> Spread | None:
        """Return the spread over processes of the number recorded as `name`, or of a run's duration ("seconds").

        None if the run has no number of the name.
        """
        values = self.over_processes(name)
        if not values:
            return None
        return Spread(statistics.median(values), min(values), max(values), len(values))

    def over_processes(self, name: str) -> list[int | float]:
        """Return the numbers called `name` of all processes that have one."""
        if self.runs is not None:
            return self.runs.seconds if name == "seconds" else self.runs.values.get(name, [])
        value = self.seconds if name == "seconds" else getattr(self.named(name), "value", None)
        return [] if show.number(value) is None else [value]

    def __repr__(self) -> str:
        run = f"lesson {self.lesson}, {self.preset}, {self.machine.get('label', self.device)}"
        counts = f"{len(self.measurements)} measurements, {len(self.claims)} claims"
        return f"RunRecord({run}: {counts}, {len(self.checks)} checks)"

    __str__ = __repr__


def table(
    name: str,
    rows: Any,
    by: Sequence[str] = (),
    columns: Mapping[str, Column] | None = None,
    *,
    simulated: bool = False,
    device: str | None = None,
) -> RecordedTable:
    """Make a table to record.

    name: name of the table.
    rows: a list of dicts, one a row.
    by: the columns that tell rows apart; rows that differ only in SEED are repetitions.
    columns: the meaning of the rest, as in {"ms": cost("ms", clock=True)}.
    simulated: True for computed rows, False for measured rows.
    device: device of the clock behind the rows; None for the session's.
    Raises InputError for `rows` that are no list of dicts, a column in `by` or `columns` missing from all rows, and
    two rows alike in all columns of `by`.
    """
    rows = plain(show.checked_rows(rows))
    columns = dict(columns or {})
    by = (by,) if isinstance(by, str) else tuple(by)
    _check_columns(name, rows, by, columns)
    if by:
        _check_distinct(name, rows, by)
    return RecordedTable(kind="table", name=name, rows=rows, by=by, columns=columns, simulated=simulated, device=device)


def _check_columns(
    name: str, rows: Sequence[Mapping[str, Any]], by: Sequence[str], columns: Mapping[str, Column]
) -> None:
    present = dict.fromkeys(column for row in rows for column in row)
    ends = [end for column in columns.values() for end in (column.low, column.high) if end is not None]
    for column in (*by, *columns, *ends):
        if column not in present:
            raise InputError(f"{name!r} has no column {column!r}; its columns are {', '.join(present)}.")


def _check_distinct(name: str, rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> None:
    keys = [tuple(str(row.get(column)) for column in by) for row in rows]
    counts = Counter(keys)
    for key in keys:
        if counts[key] > 1:
            values = ", ".join(f"{column}={value}" for column, value in zip(by, key, strict=True))
            raise InputError(
                f"by={by} does not tell the rows of {name!r} apart: {values} is there twice; name more columns."
            )


def write(record: RunRecord, path: Path) -> None:
    """Write the record as JSON, whole or not at all, and make the folder; InputError for a folder that refuses."""
    text = json.dumps(record.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with files.refused(f"The record cannot be written to {path}", "choose another results_dir"):
        files.write_text(path, text)


def read(path: Path) -> RunRecord:
    """Read a record file; DataError for a missing or damaged file, and for a version unknown to labkit."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"There is no {path}; run the lesson to its last cell, lab.finish(), to make it.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); run the lesson again.") from None
    return RunRecord.from_dict(values, f"The record {path}")


def recorded(lesson: str) -> list[RunRecord]:
    """Read the reference runs of a lesson, a run for each machine, in the order of the machines' folder names."""
    return [read(path) for path in sorted(files.RECORDED.glob(f"*/{lesson}.json"))]


def plain(value: Any) -> Any:
    """Convert a value to the types of JSON. NaN and infinities become texts, arrays and tensors become lists.

    Series of floats (samples) keep six significant digits, far finer than any clock, to halve the size of a record.
    Raises InputError for a value that JSON cannot hold.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _anonymous(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if _is_series(value):
            return [float(f"{item:.6g}") for item in value]
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's and torch's scalars and arrays
        return plain(value.tolist())
    raise InputError(
        f"A record holds numbers, texts, lists and dicts, not a {type(value).__name__}; record what you measured of it."
    )


def _is_series(values: Sequence[Any]) -> bool:
    if len(values) <= 4 or not all(isinstance(value, float) for value in values):
        return False
    return all(math.isfinite(value) for value in values)


def _anonymous(text: str) -> str:
    """Replace the folders of the course and of the user, as error messages name them, by "<course>" and "~"."""
    for folder, name in ((str(files.ROOT), "<course>"), (str(Path.home()), "~")):
        if len(folder) > 1:  # a home of "/" would be replaced everywhere
            text = text.replace(folder, name)
    return text


def _without_folders(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Cut each absolute path, of any system, among the parameters to the last part."""
    shortened = dict(parameters)
    for name, value in parameters.items():
        if isinstance(value, str):
            path = PureWindowsPath(value)  # which knows the separators of all systems
            if path.root:
                shortened[name] = path.name
    return shortened


# what a run takes -------------------------------------------------------------------------------------------------


class Stopwatch:
    """A clock of the session. In a notebook only running cells count, since reading and thinking are no cost."""

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = time.perf_counter()
        if show.in_notebook():
            events = sys.modules["IPython"].get_ipython().events
            events.register("pre_run_cell", self._resume)
            events.register("post_run_cell", self._pause)

    @property
    def seconds(self) -> float:
        """Seconds counted so far."""
        if self._since is None:
            return self._before
        return self._before + (time.perf_counter() - self._since)

    def _resume(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def _pause(self, *_: Any) -> None:
        self._before = self.seconds
        self._since = None
