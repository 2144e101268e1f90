"""The record of a run: what was asked, on which machine, what came out. One JSON file, also embedded in the notebook.

The MIME output survives papermill, nbconvert and nbval, so that an executed notebook carries its own results. It keeps
samples and intervals, never a path or a host name; how results are drawn is left to report.py.
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
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from labkit import claims, files, show
from labkit.errors import DataError, InputError
from labkit.files import replacing

SCHEMA = "labkit.record/1"
MIME = "application/vnd.labkit.record+json"


@dataclass(frozen=True, repr=False)
class RunRecord:
    """One finished run of a lesson. All fields hold plain JSON values.

    measurements  {kind, name, value, unit, ci95, simulated, ...}: "measurement" (s) and "comparison" (x, with verdict)
                  carry what labkit.bench wrote, samples included, as `detail`; "value" is a number or a text; "table"
                  has `rows` in place of a value
    predictions   {name, question, unit, predicted, measured}     measured in the prediction's unit, or None
    claims        {id, value, ci95, verdict}      checks  {id, passed, failures}
    budget        {seconds, memory, within}       what the preset allows (None: no limit), and whether it was kept
    seconds counts the time in which cells ran; peak_memory and peak_device_memory are bytes.
    """

    lesson: str
    title: str
    preset: str
    device: str
    parameters: dict[str, Any]
    machine: dict[str, Any]
    measurements: list[dict[str, Any]]
    predictions: list[dict[str, Any]]
    claims: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    seconds: float
    peak_memory: int
    peak_device_memory: int | None
    budget: dict[str, Any]
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    labkit: str = field(default_factory=lambda: _version())
    git: dict[str, Any] | None = field(default_factory=lambda: _git())
    schema: str = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON values: numpy and torch scalars made plain, NaN and infinities as "nan", "inf", "-inf"."""
        return plain({**asdict(self), "parameters": _without_folders(self.parameters)})

    @classmethod
    def from_dict(cls, values: Any, source: str = "The record") -> "RunRecord":
        """Read what to_dict gave; DataError, naming `source`, where the version or a field is wrong."""
        found = values.get("schema") if isinstance(values, dict) else None
        if found != SCHEMA:
            raise DataError(f"{source} is of version {found!r}, this labkit reads {SCHEMA!r}; run the lesson again.")
        known = {f.name: _KINDS[f.name] for f in fields(cls)}
        for name, kind in known.items():
            if not isinstance(values.get(name), kind) or (name not in values):
                raise DataError(f"{source} is damaged: `{name}` is missing or malformed; run the lesson again.")
        for name, needed in _ENTRIES.items():
            if not all(isinstance(entry, dict) and needed <= set(entry) for entry in values[name]):
                listed = " or ".join(sorted(needed))
                raise DataError(f"{source} is damaged: one of its {name} has no {listed}; run the lesson again.")
        if wrong := [entry["name"] for entry in values["measurements"] if not _is_sound(entry)]:
            raise DataError(f"{source} is damaged: {wrong[0]!r} has no rows or value; run the lesson again.")
        return cls(**{name: values[name] for name in known})

    def named(self, name: str) -> dict[str, Any] | None:
        """The measurement called `name`, None where there is none."""
        return next((entry for entry in self.measurements if entry["name"] == name), None)

    def __repr__(self) -> str:
        what = f"{len(self.measurements)} measurements, {len(self.claims)} claims, {len(self.checks)} checks"
        return f"RunRecord(lesson {self.lesson}, {self.preset}, {self.machine.get('label', self.device)}: {what})"


def write(record: RunRecord, path: Path) -> None:
    """Write the record as JSON, whole or not at all, with its folder; InputError where the folder cannot be written."""
    text = json.dumps(record.to_dict(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"The record cannot be written to {path} ({error.strerror}); choose another results_dir."
        ) from error


def read(path: Path) -> RunRecord:
    """Read a record file; DataError where it is missing, damaged or of another version."""
    return RunRecord.from_dict(_json(path), f"The record {path}")


def embed(record: RunRecord, text: str, html: str | None = None) -> None:
    """Put the record into the cell's output, shown as `html` or `text`; outside a notebook print the text."""
    show.emit(text, html, data={MIME: record.to_dict()})


def from_notebook(path: Path) -> RunRecord:
    """The record that an executed notebook carries, the last one of several; DataError where there is none."""
    notebook = _json(path)
    cells = notebook.get("cells", []) if isinstance(notebook, dict) else []
    found = [out["data"][MIME] for cell in cells for out in cell.get("outputs", []) if MIME in out.get("data", {})]
    if not found:
        raise DataError(f"{path} carries no run record; run the notebook to its last cell, lab.finish().")
    return RunRecord.from_dict(found[-1], f"The record in {path}")


def recorded(lesson: str, folder: Path | None = None) -> list[RunRecord]:
    """The reference runs of a lesson, one a machine, in the order of the machines' folder names."""
    return [read(path) for path in sorted((folder or files.RECORDED).glob(f"*/{lesson}.json"))]


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
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        if len(value) > 4 and all(isinstance(one, float) and math.isfinite(one) for one in value):
            return [float(f"{one:.6g}") for one in value]
        return [plain(one) for one in value]
    if hasattr(value, "tolist"):  # numpy's and torch's scalars and arrays
        return plain(value.tolist())
    raise InputError(
        f"A record holds numbers, texts, lists and dicts, not a {type(value).__name__}; record what you measured of it."
    )


def _is_sound(entry: Mapping[str, Any]) -> bool:
    """A table with its rows, or a value whose interval, if any, has two ends."""
    if entry["kind"] == "table":
        return isinstance(entry.get("rows"), list) and all(isinstance(row, dict) and row for row in entry["rows"])
    ends = entry.get("ci95")
    return "value" in entry and (ends is None or (isinstance(ends, list | tuple) and len(ends) == 2))


def _json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"There is no {path}; run the lesson to its last cell, lab.finish(), to make it.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); run the lesson again.") from None


def _anonymous(text: str) -> str:
    """Text without the folders of who ran it, which stand in messages of errors."""
    for folder, name in ((str(files.ROOT), "<course>"), (str(Path.home()), "~")):
        if len(folder) > 1:
            text = text.replace(folder, name)
    return text


def _without_folders(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter that is an absolute path keeps its last part."""
    absolute = {
        name: PurePath(value).name
        for name, value in parameters.items()
        if isinstance(value, str) and (PurePath(value).is_absolute() or PureWindowsPath(value).is_absolute())
    }
    return {**parameters, **absolute}


def _version() -> str:
    try:
        return version("labkit")
    except PackageNotFoundError:
        return "unknown"


def _git() -> dict[str, Any] | None:
    """Commit of the course and whether files differ from it; None without git or outside a clone."""
    try:
        commit, status = (
            subprocess.run(["git", *arguments], cwd=files.ROOT, capture_output=True, text=True, timeout=10, check=True)
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("lesson", "title", "preset", "device", "created", "labkit", "schema"), str),
    **dict.fromkeys(("parameters", "machine", "budget"), dict),
    **dict.fromkeys(("measurements", "predictions", "claims", "checks"), list),
    "seconds": int | float,
    "peak_memory": int,
    "peak_device_memory": int | None,
    "git": dict | None,
}
_ENTRIES = {
    "measurements": {"kind", "name"},
    "predictions": {"name", "question", "unit", "predicted", "measured"},
    "claims": {"id", "value", "verdict"},
    "checks": {"id", "passed"},
}


# a finished run in a few lines

NO_FACTOR = "–"


def summary(done: RunRecord) -> tuple[str, str]:
    """The record as text and as HTML."""
    budget, known = done.budget, claims.load() if done.claims else {}
    tables = {
        "Predicted and measured": [
            {
                "quantity": p["name"],
                "predicted": show.quantity(p["predicted"], p["unit"]),
                "measured": show.quantity(p["measured"], p["unit"]) if p["measured"] is not None else "not measured",
                "prediction was": off_by(p["predicted"], p["measured"]),
            }
            for p in done.predictions
        ],
        "The guide's claims": [
            {
                "claim": f"{c['id']}  {known[c['id']].text}",
                "expected": claims.expected(known[c["id"]]),
                "here": show.quantity(c["value"], known[c["id"]].unit),
                "verdict": c["verdict"],
            }
            for c in done.claims
        ],
        "Exercises": [
            {"exercise": c["id"], "result": "passed" if c["passed"] else "; ".join(c["failures"])} for c in done.checks
        ],
    }
    limit = f" of {show.quantity(budget['memory'], 'B')}" if budget["memory"] else ""
    cost = (
        f"{done.seconds:.0f} s of {budget['seconds']:.0f} s, peak memory {show.quantity(done.peak_memory, 'B')}"
        f"{limit}: "
        f"{'within' if budget['within'] else 'OVER'} the budget of preset {done.preset}."
    )
    kept = f"{len(done.measurements)} results are in {done.lesson}/record.json in the results folder."
    shown = {title: rows for title, rows in tables.items() if rows}
    title = f"Lesson {done.lesson} finished"
    kept = " ".join(filter(None, [calibration(done.predictions), kept]))
    text = "\n\n".join(
        [f"{title}: {cost}", *(f"{name}\n{show.text_table(rows)}" for name, rows in shown.items()), kept]
    )
    html = f"<p><b>{title}.</b> {escape(cost)}</p>" + "".join(
        show.html_table(rows, caption=name) for name, rows in shown.items()
    )
    return text, f"{html}<p>{escape(kept)}</p>"


def off_by(predicted: Any, measured: Any) -> str:
    """How far a prediction was off, as a factor: "1.80x too high"; "–" where no factor can be given."""
    if not all(isinstance(one, int | float) for one in (predicted, measured)) or predicted * measured <= 0:
        return NO_FACTOR
    ratio = predicted / measured
    if abs(ratio - 1) < 0.05:
        return "right within 5 %"
    return f"{show.quantity(ratio, 'x')} too high" if ratio > 1 else f"{show.quantity(1 / ratio, 'x')} too low"


def calibration(predictions: Sequence[Mapping[str, Any]]) -> str:
    """How good several guesses were together, in a sentence; "" where fewer than two were measured.

    Guesses are off by factors, so the middle one is the median of max(predicted / measured, measured / predicted).
    """
    pairs = [(one["predicted"], one["measured"]) for one in predictions]
    ratios = [guess / found for guess, found in pairs if off_by(guess, found) != NO_FACTOR]
    if len(ratios) < 2:
        return ""
    factors = [max(ratio, 1 / ratio) for ratio in ratios]
    high, low = (sum(one > 1.05 for one in side) for side in (ratios, [1 / ratio for ratio in ratios]))
    return (
        f"Of {len(ratios)} predictions half were off by a factor of {show.quantity(statistics.median(factors), '')} "
        f"or less, {sum(factor <= 2 for factor in factors)} by no more than 2; too high: {high}, too low: {low}."
    )


# what a run takes


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
