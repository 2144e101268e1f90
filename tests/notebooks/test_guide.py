"""The guide of lesson 13 cannot disagree with the lessons: each leaf names a measurement that its lesson has recorded.

A name that a lesson no longer records has to be mended in the cell "guide" of lesson 13, and nowhere else. A lesson
that is recorded again changes a number of the guide: then lesson 13 has to be recorded again, too.
"""

import pytest
from lesson_cells import executed

from labkit import records


def leaves() -> list[tuple[str, str]]:
    """(lesson, name) of each measurement in the guide."""
    guide = executed("13", "guide")["GUIDE"]
    rows = [row for answers in guide.values() for row in answers.values()]
    return [(lesson, leaf[0]) for _, lesson, *some in rows for leaf in some if not isinstance(leaf, str)]


def recorded(lesson: str, name: str) -> float | None:
    """The value of the first reference run that has the measurement, as the page looks it up."""
    found = [run.named(name) for run in records.recorded(lesson)]
    return next((entry.value for entry in found if entry is not None), None)


@pytest.mark.parametrize(("lesson", "name"), leaves())
def test_a_leaf_names_a_measurement_that_its_lesson_has_recorded(lesson: str, name: str):
    assert recorded(lesson, name) is not None


def test_the_numbers_on_the_page_are_those_of_the_records():
    newest = max(records.recorded("13"), key=lambda run: run.created)
    rows = newest.named("the guide").rows
    shown = {(row["lesson"], row["name"]): row["value"] for row in rows}
    assert shown == {leaf: recorded(*leaf) for leaf in leaves()}
