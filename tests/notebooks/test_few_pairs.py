"""What the cells of a lesson do with comparisons of too few pairs for an interval, as a busy machine gives them."""

import math
import statistics
from types import SimpleNamespace
from unittest import mock

import pytest

from course import notebooks
from labkit import show

NO_ENDS = (0.0, math.inf)


@pytest.mark.parametrize(
    ("intervals", "words"),
    [
        ([(1.0, 1.1), (1.0, 1.2)], "the widest of the intervals spans 20.0%."),
        ([(1.0, 1.1), NO_ENDS], "the widest of the intervals spans 10.0%. Some of them made too few calls"),
        ([NO_ENDS, NO_ENDS], "Their speed-ups differ by 0.0%. Some of them made too few calls"),
    ],
)
def test_lesson_00_tells_of_processes_without_an_interval(intervals: list[tuple[float, float]], words: str):
    lesson = notebooks.read(notebooks.all_lessons()[0])
    (cell,) = [cell for cell in lesson.cells if cell.get("id") == "processes-say"]
    lab = mock.Mock()
    comparisons = [SimpleNamespace(speedup=1.05, within_run=interval) for interval in intervals]
    session = {
        "lab": lab,
        "show": show,
        "statistics": statistics,
        "fresh": comparisons,
        "speedups": [comparison.speedup for comparison in comparisons],
        "over": (1.05, 1.05),
        "this": SimpleNamespace(within_run=(1.0, 1.1), processes=[]),
        "runs": [],
    }
    exec(cell.source, session)
    _, *sentences = lab.say.call_args.args
    assert words in " ".join(sentence for sentence in sentences if sentence)
