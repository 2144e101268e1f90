"""Reference runs: a lesson run in several processes and kept in data/recorded/, and its outputs in the lesson itself.

Used by `./lab run --record`. A value measured well in a process may be different in the next process, so a reference is
made of RECORDED_RUNS processes. The range of five holds the median of all processes in 15 cases of 16. The last process
is given the records of the others: its page shows each timing with the range over all, and is kept.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from course import store
from course.store import ALWAYS, Job, Run
from labkit import files
from labkit.errors import InputError
from labkit.lesson import parameters

RECORDED_RUNS = 5


def require(bound: Mapping[str, Any]) -> None:
    """Raise InputError if a run with the parameters `bound` (`Job.parameters`) could not stand as a reference."""
    if bound["PRESET"] == "smoke":
        raise InputError("A smoke run is too small to be a reference; record one at --preset class or full.")
    changed = sorted(set(bound) - {*ALWAYS, "DEVICE"})
    if changed:
        raise InputError(f"A reference run keeps the lesson's own values; leave out -p {changed[0]}.")


def processes(job: Job, *, resume: bool) -> list[tuple[Job, Run | None]]:
    """List the processes of a reference, each with the result of an earlier run, if finished.

    job     the lesson to record
    resume  True to reuse the results of a complete recording; an interrupted recording always goes on

    A process after a missing one has no result that counts: the last process shows the numbers of all before it.
    """
    jobs = [replace(job, process=number) for number in range(1, RECORDED_RUNS + 1)]
    results = list(itertools.takewhile(bool, map(store.finished, jobs)))
    is_complete = len(results) == len(jobs)
    if is_complete and not resume:
        results = []
    return list(itertools.zip_longest(jobs, results))


def environment(earlier: Sequence[Run]) -> dict[str, str]:
    """Return the environment variables of a process: the last one finds the records of the earlier processes.

    earlier   the runs of the processes before
    """
    if len(earlier) < RECORDED_RUNS - 1:
        return {}
    from labkit.lesson.records import OTHERS

    paths = [str((run.folder / store.RECORD).absolute()) for run in earlier]
    return {OTHERS: os.pathsep.join(paths)}


def keep(results: Sequence[Run], notebook: Path) -> list[Path]:
    """Store the good runs of a lesson as the lesson's reference.

    results   the runs of all processes
    notebook  path of the lesson

    Returns the files written. The record in data/recorded/ is of the last run, and holds the numbers of all runs. The
    executed cells of the same run become the lesson's, if the runs used the values stated in the lesson's cell: a
    reader sees the outputs of the cells shown.
    """
    import nbformat  # takes a second

    from course.notebooks import tidied
    from labkit.lesson import records

    records_of_runs = [records.read(run.folder / store.RECORD) for run in results]
    reference = records.together(records_of_runs)
    shown = results[-1]
    executed = nbformat.read(shown.notebook, as_version=4)

    path = files.RECORDED / reference.machine["slug"] / f"{reference.lesson}.json"
    records.write(reference, path)
    written = [path]
    stated_preset = parameters.read(executed)["PRESET"].default
    only_stated_values = set(shown.parameters) == set(ALWAYS)
    if only_stated_values and shown.parameters["PRESET"] == stated_preset:
        files.write_text(notebook, nbformat.writes(tidied(executed)) + "\n")
        written.append(notebook)
    return written
