"""A lesson's page shows the run that is recorded: the record inside the page is the record in data/recorded/."""

import math
from pathlib import Path
from typing import Any

import pytest
from lesson_cells import function
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

from course import notebooks
from labkit.files import RECORDED
from labkit.lesson import records
from labkit.lesson.records import MIME

# Their pages were run again after their recording, and wait for an idle machine: ./lab run NN --preset class --record
SHOW_ANOTHER_RUN: set[str] = set()


def as_on_a_page(record: dict[str, Any]) -> dict[str, Any]:
    """The record as a page keeps it: without samples, without rows, without the numbers of other processes."""
    alone = {name: value for name, value in record.items() if name != "runs"}
    output = new_output("display_data", {MIME: alone})
    page = new_notebook(cells=[new_code_cell("lab.finish()", execution_count=1, outputs=[output])])
    return records_on(notebooks.tidied(page))[0]


def records_on(page: NotebookNode) -> list[dict[str, Any]]:
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    data = [output.get("data", {}) for cell in code for output in cell.outputs]
    return [mime[MIME] for mime in data if MIME in mime]


def lessons() -> list:
    marked = []
    for path in notebooks.all_lessons():
        waits = path.stem[:2] in SHOW_ANOTHER_RUN
        marks = [pytest.mark.xfail(strict=True, reason="run again after its recording")] if waits else []
        marked.append(pytest.param(path, id=path.stem, marks=marks))
    return marked


@pytest.mark.parametrize("lesson", lessons())
def test_a_page_shows_the_run_that_is_recorded(lesson: Path):
    (shown,) = records_on(notebooks.read(lesson))
    recorded = records.read(RECORDED / shown["machine"]["slug"] / f"{lesson.stem[:2]}.json")
    assert shown["created"] == recorded.created
    assert shown == as_on_a_page(recorded.to_dict())


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((500.0, 480.0, 520.0), "500 (480 to 520)"),
        ((500.0, 500.0, 500.0), "500"),
        ((9e5, 6.6e5, math.inf), "660,000 at one end of the bracket, never at the other"),
        ((math.inf, 6.6e5, math.inf), "660,000 at one end of the bracket, never at the other"),
        ((math.inf, math.inf, math.inf), "never"),
    ],
)
def test_lesson_12_tells_after_how_many_images_an_engine_has_paid(ends: tuple[float, ...], words: str):
    count_words = function("12", "count_words")
    assert function("12", "in_words", count_words=count_words)(*ends) == words
