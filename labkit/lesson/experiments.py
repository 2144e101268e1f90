"""Long experiments: a script of benchmarks/ runs once, and pages show the record by name.

A record lies in data/recorded/experiments/<name>.json, where <name> is the script's. `save` is the last line of a
script, and `lab.recorded(name)` of a page reads the record and shows the origin: machine, date and commit.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from labkit import files, show
from labkit.errors import DataError, InputError
from labkit.lesson import records
from labkit.lesson.origin import origin
from labkit.lesson.records import Column, RecordedTable
from labkit.timing import machine

VERSION = "labkit.experiment/1"


class Experiment(BaseModel):
    """The record of a long experiment.

    question: the question that the experiment answers, in a sentence.
    settings: the sizes of the experiment, such as the number of images.
    machine: fields of labkit.machine.fingerprint, with the software's versions.
    table: the samples, a row for each run, and the meaning of the columns.
    seconds: duration of the script.
    created: the end of the script, ISO 8601.
    git: {"commit", "dirty"} of the script's repository; dirty if files differed from the commit.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal["labkit.experiment/1"] = VERSION
    name: str
    question: str
    settings: dict[str, Any]
    machine: dict[str, Any]
    table: RecordedTable
    seconds: float
    created: str
    labkit: str
    git: dict[str, Any] | None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The samples, a dict for each run."""
        return self.table.rows

    @property
    def origin(self) -> str:
        """The script, the machine, the date and the commit in words, for a caption."""
        date = datetime.fromisoformat(self.created).strftime("%d %b %Y").lstrip("0")  # 4 Nov 2026
        script = f"benchmarks/{self.name}.py, {self.seconds / 60:.0f} min"
        return f"{script} on {self.machine['label']}, {date}, {_commit(self.git)}"


def save(
    name: str,
    question: str,
    rows: show.Rows,
    *,
    by: Sequence[str],
    columns: Mapping[str, Column],
    settings: Mapping[str, Any],
    seconds: float,
) -> Path:
    """Write the record of a long experiment, whole or not at all, and return the path.

    name: name of the script in benchmarks/, without ".py".
    rows, by, columns: the samples as in labkit.records.table, a dict for each run.
    question, settings, seconds: see `Experiment`.
    Raises InputError as labkit.records.table does, and for a folder that cannot be written.
    """
    experiment = Experiment(
        name=name,
        question=question,
        settings=records.plain(settings),
        machine=records.plain(machine.fingerprint("cpu").to_dict()),
        table=records.table(name, rows, by, columns),
        seconds=round(seconds, 1),
        **origin(),
    )
    text = json.dumps(records.plain(experiment.model_dump()), indent=1, allow_nan=False, ensure_ascii=False)
    path = _folder() / f"{name}.json"
    with files.refused(f"The record cannot be written to {path}"):
        files.write_text(path, text + "\n")
    return path


def read(name: str) -> Experiment:
    """Read a recorded experiment; InputError for an unknown name, with the list of names; DataError for damage."""
    names = sorted(path.stem for path in _folder().glob("*.json"))
    if name not in names:
        listed = ", ".join(names) or "none yet"
        raise InputError(f"There is no recorded experiment {name!r}; give the name of a recorded one: {listed}.")
    path = _folder() / f"{name}.json"
    try:
        return Experiment.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        restore = files.restore([f"recorded/{path.parent.name}/{path.name}"])
        raise DataError(f"The record {path.name} is damaged; get the file back with `{restore}`.") from None


def shown(name: str) -> Experiment:
    """Return a recorded experiment; show the question, the origin of the record, and the file of the samples.

    Raises InputError and DataError as `read` does.
    """
    experiment = read(name)
    heading = f"Recorded: {experiment.question}"
    origin = f"{experiment.origin}; samples: data/recorded/experiments/{name}.json"
    html = f"<p><b>{escape(heading)}</b><br>{escape(origin)}</p>"
    show.emit(f"{heading}\n{origin}", html)
    return experiment


def _folder() -> Path:
    return files.RECORDED / "experiments"


def _commit(git: Mapping[str, Any] | None) -> str:
    if git is None:
        return "outside a repository"
    changed = " with changes" if git["dirty"] else ""
    return f"commit {git['commit'][:9]}{changed}"
