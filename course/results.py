"""Result folders as `labkit run` and a sweep leave them: finding and reading them, and the reference runs beside them.

A folder that cannot be read is a sentence for the reader, not an error: the others still count.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit import files
from labkit.errors import DataError, InputError
from labkit.records import RunRecord, read

WHERE = ("PRESET", "DEVICE", "RESULTS_DIR")  # parameters that say how large and where, not what


@dataclass(frozen=True)
class Result:
    """A result folder: its record (None where the lesson did not finish), run.json and executed notebook, if any."""

    folder: Path
    record: RunRecord | None
    run: dict[str, Any]
    notebook: Path | None

    @property
    def changed(self) -> dict[str, Any]:
        """The parameters with which the run differed from what its lesson states, where run.json says so."""
        given = self.run.get("parameters")
        return {name: given[name] for name in given if name not in WHERE} if isinstance(given, dict) else {}

    @property
    def lesson(self) -> str:
        return self.record.lesson if self.record else self.run["lesson"][:2]

    @property
    def created(self) -> str:
        return self.record.created if self.record else self.run["created"]


def collect(folders: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """The results in and below `folders`, oldest first, and a sentence for each that cannot be read.

    InputError where a folder is missing or none of them holds a result.
    """
    folders = list(folders)
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise InputError(f"There is no folder {missing[0]}; run a lesson first (./lab run 01), or name another folder.")
    homes = {home.resolve(): home for folder in folders for home in _homes(folder)}  # folders may overlap
    results, problems = [], []
    for home in homes.values():
        try:
            results.append(_result(home))
        except DataError as error:
            problems.append(str(error))
    if not homes:
        raise InputError(f"There are no results in {', '.join(map(str, folders))}; run a lesson first: ./lab run 01.")
    return sorted(results, key=lambda one: one.created), problems


def recorded_runs() -> tuple[list[RunRecord], list[str]]:
    """The reference runs of all lessons and machines, and a sentence for each that cannot be read."""
    records, problems = [], []
    for path in sorted(files.RECORDED.glob("*/[0-9][0-9].json")):
        try:
            records.append(read(path))
        except DataError as error:
            problems.append(str(error))
    return records, problems


def _homes(folder: Path) -> Sequence[Path]:
    found = sorted({file.parent for name in ("run.json", "record.json") for file in folder.rglob(name)})
    return [home for home in found if not any(part.startswith(".") for part in home.relative_to(folder).parts)]


def _result(home: Path) -> Result:
    record_file, run_file = home / "record.json", home / "run.json"
    record = read(record_file) if record_file.exists() else None
    try:
        run = json.loads(run_file.read_text(encoding="utf-8")) if run_file.exists() else {}
        if not record and not {"lesson", "created", "status"} <= set(run):
            raise ValueError
    except (OSError, ValueError):
        raise DataError(f"{run_file} cannot be read; remove its folder and run the lesson again.") from None
    return Result(home, record, run, next(home.glob("[0-9][0-9]_*.ipynb"), None))
