"""The minutes in a lesson's header are those that its page takes, by a rate of reading.

`pytest -s tests/notebooks/test_minutes.py` prints the parts, for whoever has to shorten a page. Prose is the Markdown,
folds included, and the sentences that the page computes from its results (lab.say); code is the lines of cells that are
not collapsed. A figure takes a minute, with its description and its data. The minutes on an exercise's card stand for
the card, the answer and the check. Tables are not counted.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course import notebooks
from course.notebooks import tags
from labkit.records import MIME

LESSONS = [pytest.param(path, id=path.stem) for path in notebooks.all_lessons()]
WORDS_PER_MINUTE = 180
LINES_PER_MINUTE = 10
FIGURES_PER_MINUTE = 1
CHALLENGE = 20
STEP = 5  # the header's minutes are a multiple of it, and at most as far from the computed ones
MARKUP = re.compile(r"<[^>]+>|\]\([^)]*\)")  # tags, and the addresses of links
WORD = re.compile(r"\S*\w\S*")


@dataclass(frozen=True)
class Minutes:
    """The parts of a lesson's minutes; run is the machine's, as the page was recorded."""

    prose: float
    code: float
    figures: float
    exercises: float
    challenge: float
    run: float

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def minutes(lesson: NotebookNode) -> Minutes:
    """The minutes of a recorded lesson."""
    record = record_of(lesson)
    of_exercises = exercise_cells(lesson)
    words, lines = 0, 0
    for cell in lesson.cells:
        if cell.id in of_exercises:
            continue
        if cell.cell_type == "markdown":
            words += count_words(cell.source)
        elif not is_collapsed(cell):
            lines += sum(bool(line.strip()) for line in cell.source.splitlines())
    for sentences in record["sentences"].values():
        words += count_words(" ".join(sentences))
    return Minutes(
        prose=words / WORDS_PER_MINUTE,
        code=lines / LINES_PER_MINUTE,
        figures=count_figures(lesson) / FIGURES_PER_MINUTE,
        exercises=sum(task.minutes for task in notebooks.exercises(lesson)),
        challenge=CHALLENGE if any("challenge" in tags(cell) for cell in lesson.cells) else 0,
        run=record["seconds"] / 60,
    )


def record_of(lesson: NotebookNode) -> dict:
    """The run that the page was recorded with, from its last cells."""
    outputs = [output for cell in lesson.cells for output in cell.get("outputs", [])]
    (record,) = [output.data[MIME] for output in outputs if MIME in output.get("data", {})]
    return record


def count_figures(lesson: NotebookNode) -> int:
    outputs = [output for cell in lesson.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def exercise_cells(lesson: NotebookNode) -> set[str]:
    """The ids of the cards, the answers and the checks."""
    ids = set()
    for card, answer, check in zip(lesson.cells, lesson.cells[1:], lesson.cells[2:], strict=False):
        if "exercise" in tags(answer):
            ids |= {card.id, answer.id, check.id}
    return ids


def is_collapsed(cell: NotebookNode) -> bool:
    return cell.metadata.get("jupyter", {}).get("source_hidden", False)


def count_words(text: str) -> int:
    return len(WORD.findall(MARKUP.sub(" ", text)))


def stated_minutes(lesson: NotebookNode) -> int:
    """The minutes that the header states, before any words on sittings."""
    return int(re.search(r"^\| Minutes \| (\d+)", lesson.cells[0].source, re.MULTILINE)[1])


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_header_states_the_minutes_that_the_page_takes(lesson: Path):
    notebook = notebooks.read(lesson)
    parts, stated = minutes(notebook), stated_minutes(notebook)
    rounded = STEP * round(parts.total / STEP)
    print(f"\n{lesson.stem}: {stated} stated, {parts.total:.0f} computed: {parts}")
    assert stated % STEP == 0 and abs(stated - parts.total) <= STEP, f"state {rounded} minutes, not {stated}: {parts}"


def page(*cells: NotebookNode) -> NotebookNode:
    """A lesson of the cells, recorded in six minutes with one sentence of 180 words."""
    record = {"preset": "class", "seconds": 360, "sentences": {"a figure": ["word " * 180]}}
    end = new_code_cell("lab.finish()", outputs=[new_output("display_data", data={MIME: record})])
    end.metadata.jupyter = {"source_hidden": True}
    return new_notebook(cells=[*cells, end])


FIGURE = new_output("display_data", data={"image/png": ""})


@pytest.mark.parametrize(
    ("cells", "part", "expected"),
    [
        ([], "run", 6),
        ([], "prose", 1),  # the computed sentence
        ([new_markdown_cell("word " * 360)], "prose", 3),
        ([new_markdown_cell("word " * 180 + "<details>" + "word " * 360 + "</details>")], "prose", 4),
        ([new_markdown_cell("word " * 179 + "[word](https://example.org) | - · |")], "prose", 2),
        ([new_code_cell("x = 1\n\n" * 20)], "code", 2),
        ([new_code_cell("x = 1\n" * 50, metadata={"jupyter": {"source_hidden": True}})], "code", 0),
        ([new_code_cell("lab.show(fig)", outputs=[FIGURE])] * 2, "figures", 2),
        ([new_code_cell("plan = None", metadata={"tags": ["challenge"]})], "challenge", 20),
    ],
)  # fmt: skip
def test_what_counts(cells: list[NotebookNode], part: str, expected: float):
    assert getattr(minutes(page(*cells)), part) == pytest.approx(expected)


def test_the_card_of_an_exercise_stands_for_its_answer_and_its_check():
    exercise = [
        new_markdown_cell("### Exercise 1 · Twice\n\n*Difficulty 2 of 5 · 10 minutes*\n\n" + "word " * 900),
        new_code_cell("x = 1\n" * 50, metadata={"tags": ["exercise"]}),
        new_code_cell('lab.check("01.1", double)', metadata={"tags": ["check"]}),
    ]
    assert minutes(page(*exercise)) == Minutes(prose=1, code=0, figures=0, exercises=10, challenge=0, run=6)
