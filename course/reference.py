"""Reference runs: a lesson run in several processes and kept in data/recorded/, and its outputs in the lesson itself.

Used by `./lab run --record`. A value measured well in a process may be different in the next process, so a reference is
made of RECORDED_RUNS processes, or of as many as are asked for; a page says of how many. The range of five holds the
median of all processes in 15 cases of 16. The last process is given the records of the others: its page shows each
timing as the median and the range over all, and is kept.
"""

import hashlib
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course import store
from course.store import ALWAYS, Job, Run
from labkit import files
from labkit.errors import DataError, InputError
from labkit.lesson import parameters

if TYPE_CHECKING:
    from labkit.lesson.records import RunRecord

RECORDED_RUNS = 5


def require(bound: Mapping[str, Any]) -> None:
    """Raise InputError if a run with the parameters `bound` (`Job.parameters`) could not stand as a reference."""
    if bound["PRESET"] == "smoke":
        raise InputError("A smoke run is too small to be a reference; record one at --preset class or full.")
    changed = sorted(set(bound) - {*ALWAYS, "DEVICE"})
    if changed:
        raise InputError(f"A reference run keeps the lesson's own values; leave out -p {changed[0]}.")


def recorded(job: Job) -> int:
    """Return in how many processes data/recorded/ holds the job on this machine; 0 for no record by the job's code."""
    from labkit.lesson import records
    from labkit.timing.machine import fingerprint, torch_device

    try:
        runs = records.read(_path(fingerprint(torch_device(job.device)).slug, job.lesson[:2])).runs
    except DataError:  # there is none, or what is there is to be recorded anew
        return 0
    return len(runs.created) if runs is not None and runs.code == code(job) else 0


def code(job: Job) -> str:
    """Hash what a job runs: the lesson's code cells, the parameters, labkit and torch; eight digits."""
    cells = [cell["source"] for cell in json.loads(job.source)["cells"] if cell["cell_type"] == "code"]
    facts = json.dumps([cells, job.parameters, store.code_version()], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


def processes(job: Job, count: int, *, resume: bool) -> list[tuple[Job, Run | None]]:
    """List the processes of a reference, each with the result of an earlier run, if finished.

    job     the lesson to record
    count   number of processes
    resume  True to reuse the results of a complete recording; an interrupted recording always goes on

    A process after a missing one has no result that counts: the last process shows the numbers of all before it.
    """
    jobs = [replace(job, process=number) for number in range(1, count + 1)]
    results = list(itertools.takewhile(bool, map(store.finished, jobs)))
    is_complete = len(results) == len(jobs)
    if is_complete and not resume:
        results = []
    return list(itertools.zip_longest(jobs, results))


def environment(earlier: Sequence[Run], count: int) -> dict[str, str]:
    """Return the environment variables of a process: the last one finds the records of the earlier processes.

    earlier  the runs of the processes before
    count    number of processes
    """
    if not earlier or len(earlier) < count - 1:
        return {}
    from labkit.lesson.records import OTHERS

    paths = [str((run.folder / store.RECORD).absolute()) for run in earlier]
    return {OTHERS: os.pathsep.join(paths)}


def keep(results: Sequence[Run], job: Job, notebook: Path) -> list[Path]:
    """Store the good runs of a lesson as the lesson's reference.

    results   the runs of all processes
    job       the lesson as it was run
    notebook  path of the lesson

    Returns the files written. The record in data/recorded/ is of the last run, and holds the numbers of all runs. The
    executed cells of the same run become the lesson's, if the runs used the values stated in the lesson's cell: a
    reader sees the outputs of the cells shown.
    """
    import nbformat  # takes a second

    from course.notebooks import tidied
    from labkit.lesson import records

    records_of_runs = [records.read(run.folder / store.RECORD) for run in results]
    reference = together(records_of_runs, code(job))
    shown = results[-1]
    executed = nbformat.read(shown.notebook, as_version=4)

    path = _path(reference.machine["slug"], reference.lesson)
    records.write(reference, path)
    written = [path]
    stated_preset = parameters.read(executed)["PRESET"].default
    only_stated_values = set(shown.parameters) == set(ALWAYS)
    if only_stated_values and shown.parameters["PRESET"] == stated_preset:
        files.write_text(notebook, nbformat.writes(tidied(executed)) + "\n")
        written.append(notebook)
    return written


def together(processes: "Sequence[RunRecord]", code: str = "") -> "RunRecord":
    """Return the record of the last process, whose page is kept, with the numbers of all.

    code: as in `labkit.lesson.records.Processes`.
    """
    from labkit import show
    from labkit.lesson.records import Processes, RecordedValue

    values: dict[str, list[int | float]] = defaultdict(list)
    for record in processes:
        for entry in record.measurements:
            if isinstance(entry, RecordedValue) and show.number(entry.value) is not None:
                values[entry.name].append(entry.value if entry.process_value is None else entry.process_value)
    runs = Processes(
        created=[record.created for record in processes],
        seconds=[record.seconds for record in processes],
        values=values,
        code=code,
    )
    return processes[-1].model_copy(update={"runs": runs})


def _path(slug: str, lesson: str) -> Path:
    return files.RECORDED / slug / f"{lesson}.json"
