"""The failure of a run, told to the reader: the cell in which the lesson stopped, the reason, and a remedy."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from course.notebooks import sections

if TYPE_CHECKING:
    from nbformat import NotebookNode

PAPERMILL_UNTOLD = "CellExecutionError"  # papermill's word where the kernel could not even show the exception
LONGEST_MESSAGE = 2000  # characters; the whole message stands in the notebook
_SMALLER = "take a smaller --preset or smaller parameters (-p), or end what else uses"
ADVICE = {  # what a message or its exception's name holds -> what to do
    r"\bOutOfMemoryError\b|CUDA out of memory": f"{_SMALLER} the GPU",
    r"\bMemoryError\b|DefaultCPUAllocator|\bDeadKernel\b": f"{_SMALLER} memory",
    r"\[Errno 28\]|No space left on device": "free some space on the disk, or choose another --out",
    r"\[Errno 24\]|Too many open files": "allow more of them in this shell, then run it again: ulimit -n 1024",
    r"\bRunTimeout\b": "take a smaller --preset, or look for what the cell waits for",
    r"Kernel (didn't respond|died before)": "try again when the machine has less to do, and see ./lab doctor",
}


@dataclass(frozen=True)
class Failure:
    """The end of a failed run.

    name     name of the exception, or "DeadKernel", "RunTimeout", "ProcessEnded"
    message  the exception's message, with advice
    cell     number of the last cell started, counted from 1 in the lesson; None if no cell had started
    section  nearest heading above the cell
    """

    name: str
    message: str
    cell: int | None
    section: str

    def __str__(self) -> str:
        place = f"cell {self.cell} ({self.section})" if self.cell else "the start"
        return f"{self.name} in {place}: {self.message}"


def explain(source: bytes, executed: Path, name: str, message: str, peak: int) -> Failure:
    """Complete an exception with the cell, a message of readable length, and advice.

    source    the lesson's notebook, before the run
    executed  path of the executed notebook
    name      name of the exception
    message   message of the exception
    peak      peak memory of the run, bytes
    """
    import nbformat

    lesson = nbformat.reads(source.decode(), as_version=4)
    number_and_section = {}
    for number, (cell_id, section) in enumerate(sections(lesson), start=1):
        number_and_section[cell_id] = number, section
    cells = nbformat.read(executed, as_version=4).cells
    started = [cell for cell in cells if cell.get("id") in number_and_section and _has_started(cell)]

    number, section = number_and_section[started[-1].id] if started else (None, "")
    if name == PAPERMILL_UNTOLD and started:
        name, message = _printed_error(started[-1])
    message = message or "no message"
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]} ..."
    advice = _advice(f"{name} {message}")
    if advice:
        message = f"{message.rstrip('. ')}; {advice}"
    if name == "DeadKernel":
        from labkit.timing.machine import memory_bytes

        message += f" (the run had reached {peak / 1e9:.1f} GB of {memory_bytes() / 1e9:.1f} GB)"
    return Failure(name, message, number, section)


def _has_started(cell: "NotebookNode") -> bool:
    return bool(cell.metadata.get("papermill", {}).get("start_time"))


def _advice(error: str) -> str:
    for pattern, advice in ADVICE.items():
        if re.search(pattern, error):
            return advice
    return ""


def _printed_error(cell: "NotebookNode") -> tuple[str, str]:
    """Read name and message of the exception at the end of the error stream; (PAPERMILL_UNTOLD, "") if absent."""
    streams = [output.text for output in cell.outputs if output.get("name") == "stderr"]
    error = re.search(r"^(\w+): (.+)\Z", "".join(streams).strip(), re.MULTILINE)
    if error is None:
        return PAPERMILL_UNTOLD, ""
    return error[1], error[2]
