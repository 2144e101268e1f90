"""The record of a run: what was asked, on which machine, what came out, and what each number means.

One JSON file, also embedded in the notebook, so that an executed notebook carries its own results. It keeps samples,
intervals and meanings, never a path or a host name; how runs are compared is left to course.report.
"""

import json
import math
import numbers
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from labkit import files, show
from labkit.errors import DataError, InputError
from labkit.lesson import challenge, claims

VERSION = "labkit.record/2"
MIME = "application/vnd.labkit.record+json"
SEED = "seed"  # rows of a table that differ only in this column are repetitions

Role = Literal["setting", "quality", "cost", "result"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Column(_Strict, frozen=True):
    """What the numbers of a table's column mean.

    role   "setting": chosen, not measured; "quality": more is better; "cost": less is better; "result": neither
    unit   of the numbers, such as "ms"; empty where they have none
    clock  whether a clock or a memory counter made or decided them, so that a repetition differs; where it decided a
           column of `by`, such as the name of the slowest case, a repetition has other rows
    low, high  the columns that hold the ends of their 95 % interval, if any
    """

    role: Role = "result"
    unit: str = ""
    clock: bool = False
    low: str | None = None
    high: str | None = None


def quality(unit: str = "", *, clock: bool = False, low: str | None = None, high: str | None = None) -> Column:
    """A column of which more is better, such as an accuracy or a speed-up; see `Column`."""
    return Column(role="quality", unit=unit, clock=clock, low=low, high=high)


def cost(unit: str = "", *, clock: bool = False, low: str | None = None, high: str | None = None) -> Column:
    """A column of which less is better, such as a time, a size or an error; see `Column`."""
    return Column(role="cost", unit=unit, clock=clock, low=low, high=high)


def result(unit: str = "", *, clock: bool = False, low: str | None = None, high: str | None = None) -> Column:
    """A column that came out and is neither better nor worse when it is more, such as a ridge point; see `Column`."""
    return Column(role="result", unit=unit, clock=clock, low=low, high=high)


def setting(unit: str = "", *, clock: bool = False) -> Column:
    """A column that was chosen; those of `by` are settings anyway, and need this for a unit, or where a clock chose."""
    return Column(role="setting", unit=unit, clock=clock)


class RecordedValue(_Strict):
    """A number or a text. "measurement" (s) and "comparison" (x) carry what labkit.bench wrote, samples included."""

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


class RecordedTable(_Strict):
    """Rows of one table. `by` names the columns that tell them apart; `columns` says what the others mean.

    A column that `columns` does not name is a plain result without a unit.
    """

    kind: Literal["table"]
    name: str
    rows: list[Annotated[dict[str, Any], Field(min_length=1)]]
    by: tuple[str, ...] = ()
    columns: dict[str, Column] = {}
    simulated: bool = False

    def meaning(self, column: str) -> Column:
        """What the numbers of `column` mean."""
        return self.columns.get(column, Column(role="setting") if column in self.by else Column())


class Prediction(_Strict):
    """A guess (None: the question was asked and not answered) and the number that came out, in the guess's unit.

    measured: None where it was not measured. ci95: the 95 % interval of what was measured, where it has one.
    """

    name: str
    question: str
    unit: str
    predicted: int | float | None
    measured: int | float | None
    ci95: tuple[float, float] | None = None


class SettledClaim(_Strict):
    """What a run says about a claim; trained: what the value rests on, where the claim has a recipe."""

    id: str
    value: int | float | None
    ci95: tuple[float, float] | None = None
    trained: dict[str, int | float] | None = None
    verdict: claims.Verdict


class CheckedExercise(_Strict):
    """Whether an answer passed its check, what was wrong with it, and whose answer the lesson went on with."""

    id: str
    passed: bool
    failures: list[str] = []
    used: Literal["learner", "worked"] | None = None


class Challenge(_Strict):
    """A lesson's challenge: its goals (see labkit.challenge), the learner's point, whether it is in; None: no plan."""

    name: str
    goal: str
    point: dict[str, float | tuple[float, float]] | None
    goals: dict[str, tuple[float | None, float | None, str]]
    reached: bool | None


class Processes(_Strict):
    """What one lesson gave in several processes, one after the other; all lists are in the order of the processes.

    created  when each ended; seconds: what each took
    values   the numbers that were recorded by name; a process that did not record one is left out of its list
    """

    created: list[str]
    seconds: list[float]
    values: dict[str, list[int | float]]


class Spread(NamedTuple):
    """A number over processes: median, smallest, largest, and how many processes there were."""

    median: float
    smallest: float
    largest: float
    processes: int


class RunRecord(_Strict):
    """One finished run of a lesson.

    runs: of a reference run, what it and the other processes gave that were recorded with it; None: there was one.
    sentences: what the run said about its results, computed from them, by the name of the figure or the table.
    budget: {seconds, memory, within}, what the preset allows (None: no limit) and whether that was kept. seconds counts
    the time in which cells ran; peak_memory and peak_device_memory are bytes.
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
        """Strict JSON values; what has its default is left out, NaN and infinities are "nan", "inf", "-inf"."""
        return plain(self.model_dump(exclude_defaults=True) | {"parameters": _without_folders(self.parameters)})

    @classmethod
    def from_dict(cls, values: Any, source: str = "The record") -> "RunRecord":
        """Read what to_dict gave; DataError, naming `source`, where the version or a field is wrong."""
        stated = values.get("version") if isinstance(values, dict) else None
        if stated != VERSION:
            raise DataError(f"{source} is of version {stated!r}, this labkit reads {VERSION!r}; run the lesson again.")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise DataError(f"{source} is damaged: `{where}`: {first['msg']}; run the lesson again.") from None

    def named(self, name: str) -> RecordedValue | RecordedTable | None:
        """The measurement called `name`, None where there is none."""
        return next((entry for entry in self.measurements if entry.name == name), None)

    def spread(self, name: str) -> Spread | None:
        """Over the processes, the number recorded as `name`, or what a run took ("seconds"); None without a number."""
        if self.runs is None:
            entry = self.seconds if name == "seconds" else getattr(self.named(name), "value", None)
            values = [] if show.number(entry) is None else [entry]
        else:
            values = self.runs.seconds if name == "seconds" else self.runs.values.get(name, [])
        return Spread(statistics.median(values), min(values), max(values), len(values)) if values else None

    def __repr__(self) -> str:
        what = f"{len(self.measurements)} measurements, {len(self.claims)} claims, {len(self.checks)} checks"
        return f"RunRecord(lesson {self.lesson}, {self.preset}, {self.machine.get('label', self.device)}: {what})"

    __str__ = __repr__


def table(
    name: str,
    rows: Any,
    by: Sequence[str] = (),
    columns: Mapping[str, Column] | None = None,
    *,
    simulated: bool = False,
) -> RecordedTable:
    """Rows (a list of dicts) with what their columns mean, to be recorded.

    InputError for what is no list of rows, a column in `by` or `columns` that no row has, and a `by` that does not tell
    the rows apart.
    """
    rows, columns = plain(show.checked_rows(rows)), dict(columns or {})
    by = (by,) if isinstance(by, str) else tuple(by)
    present = dict.fromkeys(column for row in rows for column in row)
    ends = [end for column in columns.values() for end in (column.low, column.high) if end is not None]
    if missing := [column for column in (*by, *columns, *ends) if column not in present]:
        raise InputError(f"{name!r} has no column {missing[0]!r}; its columns are {', '.join(present)}.")
    keys = [tuple(str(row.get(column)) for column in by) for row in rows]
    if by and (twice := next((key for key in keys if keys.count(key) > 1), None)):
        which = ", ".join(f"{column}={value}" for column, value in zip(by, twice, strict=True))
        raise InputError(
            f"by={by} does not tell the rows of {name!r} apart: {which} is there twice; name more columns."
        )
    return RecordedTable(kind="table", name=name, rows=rows, by=by, columns=columns, simulated=simulated)


def together(processes: Sequence[RunRecord]) -> RunRecord:
    """The record of the process that took the median time, with the numbers of all: what a reference holds."""
    middle = sorted(processes, key=lambda record: record.seconds)[len(processes) // 2]
    values: dict[str, list[int | float]] = {}
    for entry in (entry for record in processes for entry in record.measurements):
        if isinstance(entry, RecordedValue) and show.number(entry.value) is not None:
            values.setdefault(entry.name, []).append(entry.value)
    times = {"created": [record.created for record in processes], "seconds": [record.seconds for record in processes]}
    return middle.model_copy(update={"runs": Processes(**times, values=values)})


def write(record: RunRecord, path: Path) -> None:
    """Write the record as JSON, whole or not at all, with its folder; InputError where the folder cannot be written."""
    text = json.dumps(record.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    with files.refused(f"The record cannot be written to {path}", "choose another results_dir"):
        files.write_text(path, text)


def read(path: Path) -> RunRecord:
    """Read a record file; DataError where it is missing, damaged or of another version."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"There is no {path}; run the lesson to its last cell, lab.finish(), to make it.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); run the lesson again.") from None
    return RunRecord.from_dict(values, f"The record {path}")


def recorded(lesson: str) -> list[RunRecord]:
    """The reference runs of a lesson, one a machine, in the order of the machines' folder names."""
    return [read(path) for path in sorted(files.RECORDED.glob(f"*/{lesson}.json"))]


def plain(value: Any) -> Any:
    """`value` in JSON's own types; InputError for what JSON cannot hold. NaN and infinities become texts.

    Series of floats (samples) keep six significant digits, far below what any clock resolves, which halves a record.
    """
    if value is None or isinstance(value, bool | str):
        return _anonymous(value) if isinstance(value, str) else value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if len(value) > 4 and all(isinstance(item, float) and math.isfinite(item) for item in value):
            return [float(f"{item:.6g}") for item in value]
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's and torch's scalars and arrays
        return plain(value.tolist())
    raise InputError(
        f"A record holds numbers, texts, lists and dicts, not a {type(value).__name__}; record what you measured of it."
    )


def origin() -> dict[str, Any]:
    """When, by which labkit and from which commit of the course a record is made."""
    try:
        labkit = version(files.DISTRIBUTION)
    except PackageNotFoundError:
        labkit = "unknown"
    return {"created": datetime.now(UTC).isoformat(timespec="seconds"), "labkit": labkit, "git": _git()}


def _anonymous(text: str) -> str:
    """Text without the folders of who ran it, which stand in messages of errors."""
    for folder, name in ((str(files.ROOT), "<course>"), (str(Path.home()), "~")):
        if len(folder) > 1:
            text = text.replace(folder, name)
    return text


def _without_folders(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter that is an absolute path keeps its last part."""
    texts = {name: value for name, value in parameters.items() if isinstance(value, str)}
    absolute = {name: PureWindowsPath(text) for name, text in texts.items() if PureWindowsPath(text).root}
    return {**parameters, **{name: path.name for name, path in absolute.items()}}


def _git() -> dict[str, Any] | None:
    """Commit of the course and whether files differ from it; None without git or outside a clone."""
    if files.IN_WHEEL:  # the environment may lie in a clone of something else
        return None
    try:
        commit, status = (
            subprocess.run(["git", *arguments], cwd=files.ROOT, capture_output=True, text=True, timeout=10, check=True)
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


# what a run takes -------------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds that the session ran: in a notebook the time in cells, since reading and thinking are no cost of it."""

    def __init__(self) -> None:
        self._before, self._since = 0.0, time.perf_counter()
        if show.in_notebook():
            events = sys.modules["IPython"].get_ipython().events
            events.register("pre_run_cell", self._resume)
            events.register("post_run_cell", self._pause)

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def _resume(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def _pause(self, *_: Any) -> None:
        self._before, self._since = self.seconds, None


def peak_memory() -> int:
    """Peak resident bytes of this process. Linux's ru_maxrss would count in what the parent held when it started us."""
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    except (OSError, TypeError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


# a finished run in a few lines ------------------------------------------------------------------------------------

NONE = "–"


def summary(record: RunRecord) -> tuple[str, str]:
    """What was predicted and came out, the exercises, the challenge and the cost, as text and as HTML."""
    budget = record.budget
    tables = {
        "Predicted and measured": [
            {
                "quantity": guess.name,
                "predicted": "no prediction" if guess.predicted is None else show.quantity(guess.predicted, guess.unit),
                "measured": "not measured" if guess.measured is None else show.quantity(guess.measured, guess.unit),
                "95 % interval": show.interval(guess.ci95, guess.unit),
                "the prediction was": off_by(guess),
            }
            for guess in record.predictions
        ],
        "Exercises": [
            {
                "exercise": check.id,
                "result": "passed" if check.passed else "; ".join(check.failures),
                "used below": {"learner": "yours", "worked": "the worked answer", None: NONE}[check.used],
            }
            for check in record.checks
        ],
        "Challenge": [
            {
                "challenge": task.name,
                "asked for": challenge.asked(task.goals),
                "result": {True: "reached", False: "not reached yet", None: "no plan yet"}[task.reached],
            }
            for task in record.challenges
        ],
    }
    tables = {title: rows for title, rows in tables.items() if rows}
    limit = f" of {show.quantity(budget['memory'], 'B')}" if budget["memory"] else ""
    cost = (
        f"{record.seconds:.0f} s of {budget['seconds']:.0f} s, peak memory "
        f"{show.quantity(record.peak_memory, 'B')}{limit}: "
        f"{'within' if budget['within'] else 'OVER'} the budget of preset {record.preset}."
    )
    counts = {"result": record.measurements, "claim": record.claims}
    counted = " and ".join(f"{len(some)} {name}{'s' * (len(some) != 1)}" for name, some in counts.items())
    stored = f"{counted} are in {record.lesson}/record.json in the results folder."
    last = " ".join(filter(None, [calibration(record.predictions), stored]))
    first = f"Lesson {record.lesson} finished"
    text = [f"{first}: {cost}", *(f"{title}\n{show.text_table(rows)}" for title, rows in tables.items()), last]
    html = [show.html_table(rows, caption=title) for title, rows in tables.items()]
    return "\n\n".join(text), "".join([f"<p><b>{first}.</b> {escape(cost)}</p>", *html, f"<p>{escape(last)}</p>"])


def off_by(guess: Prediction) -> str:
    """How far a prediction was off, as in "above the interval: 1.80x too high"; "–" where no factor can be given."""
    low, high = _ends(guess)
    if guess.predicted is not None and low <= guess.predicted <= high:
        return "inside the 95 % interval"
    if not _has_factor(guess):
        return NONE
    ratio = guess.predicted / guess.measured
    where = "" if low > high else "above the interval: " if guess.predicted > high else "below the interval: "
    if not where and abs(ratio - 1) < 0.05:
        return "right within 5 %"
    return where + (
        f"{show.quantity(ratio, 'x')} too high" if ratio > 1 else f"{show.quantity(1 / ratio, 'x')} too low"
    )


def calibration(predictions: Sequence[Prediction]) -> str:
    """How good several guesses were together, in a sentence; "" where fewer than two were made and measured.

    Guesses are off by factors, so the middle one is the median of max(predicted / measured, measured / predicted).
    """
    usable = [guess for guess in predictions if _has_factor(guess)]
    if len(usable) < 2:
        return ""
    factors = [max(guess.predicted / guess.measured, guess.measured / guess.predicted) for guess in usable]
    words = [off_by(guess) for guess in usable]
    inside, high, low = (sum(end in word for word in words) for end in ("inside", "too high", "too low"))
    return (
        f"Of {len(usable)} predictions {inside} lay inside the measured interval; half were off by a factor of "
        f"{show.quantity(statistics.median(factors), '')} or less. Too high: {high}, too low: {low}."
    )


def _ends(guess: Prediction) -> tuple[float, float]:
    """The measured interval, empty where there is none or where too few samples leave it open."""
    finite = guess.ci95 and all(map(math.isfinite, guess.ci95))
    return guess.ci95 if finite else (math.inf, -math.inf)


def _has_factor(guess: Prediction) -> bool:
    return None not in (guess.predicted, guess.measured) and guess.predicted * guess.measured > 0
