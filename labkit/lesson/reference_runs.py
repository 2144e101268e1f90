"""Reference runs of a lesson, committed under data/recorded: numbers of known machines beside our own."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import torch

from labkit import show
from labkit.lesson import claims, records
from labkit.lesson.claims import Claim
from labkit.lesson.records import RunRecord

DEVICE_KINDS = {"cpu": "a CPU", "cuda": "a GPU"}


def results(lesson: str, name: str) -> list[dict[str, Any]]:
    """Return the results called `name` of a lesson's reference runs: a dict for each machine.

    Keys: machine and device that the result was timed on, preset of the run, the fields of the result
    (records.RecordedValue or RecordedTable), created (ISO 8601), and spread over processes (records.Spread; None for a
    text or a table).
    """
    entries = []
    for run in _recorded(lesson):
        entry = run.named(name)
        if entry is not None:
            origin = {"machine": run.machine["label"], "device": run.device, "preset": run.preset}
            over_processes = {"created": run.created, "spread": run.spread(name)}
            entries.append({**entry.model_dump(), **origin, **over_processes})
    return entries


def beside(this_run: Mapping[str, Any], reference: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the rows of a table with a number of this run above the numbers of the reference runs.

    this_run: a dict as in `results`, without created and spread.
    reference: dicts as from `results`.
    A kind of device without any run gets a row "not recorded yet".
    """
    rows = [_row("this run", this_run)]
    for run in reference:
        rows.append(_row(f"recorded {day(run)}", run))
    kinds = {torch.device(run["device"]).type for run in (this_run, *reference)}
    for kind, words in DEVICE_KINDS.items():
        if kind not in kinds:
            empty = dict.fromkeys(rows[0], "")
            rows.append(empty | {"machine": words, "value": "not recorded yet"})
    return rows


def verdicts(lesson: str, claim: Claim) -> list[str]:
    """Return the verdicts of all reference runs able to settle a claim, each with value, preset, machine and day."""
    phrases = []
    for run in _recorded(lesson):
        for settled in run.claims:
            is_settled = settled.id == claim.id and "here" not in settled.verdict
            if is_settled and claims.is_current(claim, run.created, settled.trained):
                value = claims.measured(claim, settled.value, settled.ci95)
                phrases.append(f"{value}, {settled.verdict}, {_place(run)}")
    return phrases


def duration(lesson: str) -> str | None:
    """Return how long the newest reference run of a lesson took, with preset, machine and day; None without a run."""
    newest = max(records.recorded(lesson), key=lambda run: run.created, default=None)
    return newest and f"{newest.seconds:.0f} s {_place(newest)}"


def day(run: Mapping[str, Any]) -> str:
    """Return the day of a reference run, a dict as in `results`: 4 Nov 2026."""
    return datetime.fromisoformat(run["created"]).strftime("%d %b %Y").lstrip("0")


def _recorded(lesson: str) -> list[RunRecord]:
    """Read the reference runs of a lesson, the results of each device apart."""
    from labkit.lesson.by_device import apart  # loaded where a page looks at other machines

    return [part for run in records.recorded(lesson) for part in apart(run)]


def _place(run: RunRecord) -> str:
    return f"at {run.preset} on {run.machine['label']}, {run.created[:10]}"


def _row(title: str, run: Mapping[str, Any]) -> dict[str, str]:
    value, ends, kind = _range(run)
    return {
        "run": title,
        "machine": run["machine"],
        "preset": run["preset"],
        "value": show.quantity(value, run["unit"]),
        "range": show.interval(ends, run["unit"]),
        "kind of range": kind,
    }


def _range(run: Mapping[str, Any]) -> tuple[Any, Sequence[float] | None, str]:
    """Return a run's number, the ends of its range, and the kind of the range.

    An interval within a run tells how well the run knew its number; only several processes tell how runs differ.
    """
    spread = run.get("spread")
    if spread is not None and spread.processes > 1:
        kind = f"median, smallest to largest of {spread.processes} processes"
        return spread.median, (spread.smallest, spread.largest), kind
    if run["ci95"] is None:
        return run["value"], None, "1 process"
    if run["processes"]:
        return run["value"], run["ci95"], f"smallest to largest of {run['processes']} processes"
    kind = "95 % interval within this run"
    if spread is not None:
        kind += ", 1 process"
    return run["value"], run["ci95"], kind
