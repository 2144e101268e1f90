"""Reference results: which runs can stand as one, and keeping them beside the others and in the lesson itself."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from course import parameters
from course.notebooks import tidied
from course.run import ALWAYS, Run
from labkit import files
from labkit.errors import InputError


def require(bound: Mapping[str, Any]) -> None:
    """InputError where a run with these parameters (`course.run.prepare`) could not stand as a reference."""
    if bound["PRESET"] == "smoke":
        raise InputError("A smoke run is too small to be a reference; record one at --preset class or full.")
    if other := sorted(set(bound) - {*ALWAYS, "DEVICE"}):
        raise InputError(f"A reference run keeps the lesson's own values; leave out -p {other[0]}.")


def keep(result: Run, notebook: Path, recorded: Path | None = None) -> list[Path]:
    """Store a good run as reference: its record beside the others, and its outputs in the lesson itself.

    The lesson is rewritten only where the run used the parameters that the lesson's cell states, so that what a reader
    sees is what the cell gives. Returns the files written; InputError where the run is no reference.
    """
    import nbformat  # takes a second, and the command asks `require` of every run

    if result.error or not result.record.exists():
        raise InputError(f"{result.lesson} did not finish, so there is nothing to record; mend it and run it again.")
    require(result.parameters)
    executed = nbformat.read(result.notebook, as_version=4)
    record = json.loads(result.record.read_text(encoding="utf-8"))
    written = [(recorded or files.RECORDED) / record["machine"]["slug"] / f"{record['lesson']}.json"]
    files.write_text(written[0], result.record.read_text(encoding="utf-8"))
    stated = parameters.read(executed)["PRESET"].default
    if set(result.parameters) == set(ALWAYS) and result.parameters["PRESET"] == stated:
        files.write_text(notebook, nbformat.writes(tidied(executed)) + "\n")
        written.append(notebook)
    return written
