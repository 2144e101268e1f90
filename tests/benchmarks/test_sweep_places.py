"""The comparison of a sweep in two places: it leaves out what a clock decided, by what the lesson declares."""

from pathlib import Path

import pytest
from run_records import changed

from labkit.lesson import records
from labkit.lesson.records import Column, cost, setting

pytest.importorskip("distributed")
import sweep_places


def result(folder: Path, slowest: str, accuracy: float, case: Column) -> Path:
    """A sweep of one run that names its slowest case, and measures an accuracy."""
    rows = [{"case": slowest, "work saved": 4.0, "ms": 2.5}]
    table = records.table("losers", rows, ("case",), {"case": case, "ms": cost("ms", clock=True)})
    accuracies = {"kind": "value", "name": "accuracy", "value": accuracy}
    records.write(changed(measurements=[table, accuracies]), folder / "03" / "record.json")
    return folder


@pytest.mark.parametrize(
    ("slowest", "accuracy", "case", "equal"),
    [
        ("64 channels", 90.0, setting(), True),
        ("32 channels", 90.0, setting(), False),  # nobody said that a clock chose this
        ("32 channels", 90.0, Column(role="setting", clock=True), True),
        ("32 channels", 91.0, Column(role="setting", clock=True), False),
    ],
)
def test_two_places_differ_where_something_differs_that_no_clock_decided(
    tmp_path: Path, slowest: str, accuracy: float, case: Column, equal: bool
):
    here = result(tmp_path / "local", "64 channels", 90.0, case)
    there = result(tmp_path / "dask", slowest, accuracy, case)
    assert sweep_places.compare(here, there) == equal
