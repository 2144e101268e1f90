"""Generated parts of the README and of the syllabi: lessons with measured run times, one result, the set-up times.

Everything comes from the notebooks' headers and from data/recorded/, so that no number in them is typed.
`labkit run --record` rewrites both; a test compares.
"""

import json
import re
from pathlib import Path
from typing import Any

import nbformat

from course import notebooks
from labkit import files
from labkit.errors import DataError
from labkit.records import RunRecord, recorded
from labkit.show import quantity

BEGIN, END = "<!-- lessons: written by `labkit run --record` -->", "<!-- /lessons -->"
RESULT = ("01", "depthwise over dense")  # the lesson and the name of the comparison shown on the first screen
NOTHING = "not recorded yet"


def pages() -> dict[Path, str]:
    """The pages with a generated part, and that part."""
    return {files.ROOT / "README.md": generated(), files.NOTEBOOKS / "syllabi" / "README.md": timetable()}


def update() -> list[Path]:
    """Rewrite the generated part of each page; DataError where a page has lost its markers."""
    return [write(path, part) for path, part in pages().items()]


def write(path: Path, part: str) -> Path:
    """Rewrite what stands between the two markers of a page; DataError where a marker is missing."""
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise DataError(f"{path.name} has lost its markers; put {BEGIN} and {END} on lines of their own.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    files.write_text(path, f"{before}{BEGIN}\n{part}\n{END}{after}")
    return path


def generated() -> str:
    """The lessons' table, one recorded result and the set-up times, as Markdown."""
    rows = ["| lesson | question | minutes | measured run time | needs |", "|---|---|---|---|---|"]
    rows += [_row(path) for path in notebooks.all_lessons()]
    return "\n".join([*rows, "", _result(), "", *_newcomers()])


def timetable() -> str:
    """What a teacher plans with: a learner's minutes, the exercises' share of them, and how long the machine runs."""
    rows = [
        "| lesson | minutes | of them exercises | points | measured run time | prepare |",
        "|---|---|---|---|---|---|",
    ]
    for path in notebooks.all_lessons():
        notebook = notebooks.read(path)
        name, facts, times = _header(path, notebook)
        tasks = notebooks.exercises(notebook)
        minutes, points = (sum(getattr(task, name) for task in tasks) for name in ("minutes", "points"))
        link, count = f"[{name}](../{path.name})", f"{minutes} ({len(tasks)} exercises)"
        rows.append(f"| {link} | {facts['Minutes']} | {count} | {points} | {times} | {facts['Needs']} |")
    return "\n".join(rows)


def _header(path: Path, notebook: nbformat.NotebookNode) -> tuple[str, dict[str, str], str]:
    """Title, facts of the header's table, and recorded run times of a lesson."""
    text = notebook.cells[0].source
    times = [f"{one.seconds:.0f} s at `{one.preset}` on {_machine(one)}" for one in recorded(path.stem[:2])]
    facts = dict(re.findall(r"^\| (Minutes|Needs) \| (.+) \|$", text, re.MULTILINE))
    return notebooks.title(notebook), facts, "; ".join(times) or NOTHING


def _row(path: Path) -> str:
    notebook = notebooks.read(path)
    name, facts, times = _header(path, notebook)
    text = notebook.cells[0].source
    question = re.search(r"^\*\*(.+)\*\*$", text, re.MULTILINE)[1]
    link = f"[{name}](notebooks/{path.name})"
    return f"| {link} | {question} | {facts['Minutes']} | {times} | {facts['Needs']} |"


def _result() -> str:
    lesson, name = RESULT
    found = [(one, entry) for one in recorded(lesson) if (entry := one.named(name))]
    if not found:
        return f"One result, {name}: {NOTHING}."
    shown = [
        f"**{quantity(entry.value, 'x')}** (95 % interval {entry.ci95[0]:.2f} to {entry.ci95[1]:.2f}) on "
        f"{_machine(one)}"
        for one, entry in found
    ]
    flops = found[0][0].named("FLOPs saved by depthwise")
    return (
        f"One result of lesson {lesson}: a depthwise 3x3 convolution has {quantity(flops.value, 'x')} fewer "
        f"FLOPs than the dense one, and is faster by {'; '.join(shown)}."
    )


def _newcomers() -> list[str]:
    """What a first visit took, from an empty folder, home and cache, by `.ci/newcomer`."""
    lines = []
    for path in sorted(files.RECORDED.glob("*/newcomer.json")):
        one: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lines.append(
            f"From an empty folder, home and cache on {one['machine']}: `./lab run` had everything installed and "
            f"fetched after {_minutes(one['ready_s'])}, the first lesson done after {_minutes(one['first_lesson_s'])} "
            f"and the report after {_minutes(one['run_s'])}; `./lab test`"
            f"{' without a network' if one['test_offline'] else ''} took {_minutes(one['test_s'])}."
        )
    return lines or [f"Time of a first visit: {NOTHING}."]


def _machine(one: RunRecord) -> str:
    return ", ".join(one.machine["label"].split(", ")[:2])


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
