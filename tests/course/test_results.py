"""Result folders and their values as tidy rows, with the meaning that was declared when they were recorded."""

import math
from pathlib import Path

import pandas as pd
import pytest
from run_records import RECORD, changed

from course import report, results
from labkit import files
from labkit.lesson import records
from labkit.lesson.records import Column, cost, quality, setting

CUTS = [
    {"cut": "a", "batch": 1, "accuracy (%)": 90.0, "low": 88.0, "high": 92.0, "p50 (ms)": 5.0, "part": "x"},
    {"cut": "a", "batch": 8, "accuracy (%)": 80.0, "low": 78.0, "high": 82.0, "p50 (ms)": 4.0, "part": "y"},
]
MEANING = {"accuracy (%)": quality("%", low="low", high="high"), "p50 (ms)": cost("ms", clock=True)}
TIDY = changed(
    lesson="03",
    parameters={"SEED": 4, "RATIO": 0.5, "CRITERION": "l1"},
    measurements=[
        {"kind": "value", "name": "lost", "value": 1.5, "unit": "points", "ci95": [1.0, 2.0], "role": "cost"},
        {"kind": "comparison", "name": "pruned", "value": 2.0, "unit": "x", "ci95": [1.8, "inf"], "verdict": "faster",
         "role": "quality", "clock": True},
        records.table("cuts", CUTS, ("cut", "batch"), MEANING, simulated=True),
    ],
)  # fmt: skip


def row(frame: pd.DataFrame, name: str, key: str = "") -> pd.Series:
    rows = frame[(frame["name"] == name) & (frame["key"] == key)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_columns_say_whose_the_values_are():
    frame = results.frame([TIDY])
    assert [*frame.columns] == [
        "lesson", "preset", "machine", "device", "seed", "p.RATIO", "p.CRITERION",
        "name", "key", "value", "low", "high", "unit", "role", "text", "simulated", "clock",
    ]  # fmt: skip
    run = ["lesson", "preset", "machine", "device", "seed", "p.RATIO", "p.CRITERION"]
    assert set(map(tuple, frame[run].values)) == {("03", "class", "test-cpu-2c", "cpu", 4, 0.5, "l1")}


def test_a_single_value_is_one_row_with_its_meaning():
    lost = row(results.frame([TIDY]), "lost")
    assert (lost.value, lost.low, lost.high, lost.unit, lost.role) == (1.5, 1.0, 2.0, "points", "cost")
    assert not lost.simulated and not lost.clock
    pruned = row(results.frame([TIDY]), "pruned")
    assert (pruned.value, pruned.high, pruned.text, pruned.clock) == (2.0, math.inf, "faster", True)


def test_a_table_gives_a_row_for_each_value_under_its_declared_keys():
    frame = results.frame([TIDY])
    accuracy = row(frame, "cuts: accuracy", "cut=a; batch=8")
    assert (accuracy.value, accuracy.low, accuracy.high, accuracy.unit) == (80.0, 78.0, 82.0, "%")
    assert accuracy.role == "quality" and accuracy.simulated and not accuracy.clock
    assert row(frame, "cuts: p50", "cut=a; batch=8").clock
    assert row(frame, "cuts: part", "cut=a; batch=8").text == "y"
    assert not set(frame["name"]) & {"cuts: low", "cuts: high", "cuts: cut", "cuts: batch"}


def test_rows_that_a_clock_named_are_of_the_clock_whole():
    """Another run may have another slowest case, so that neither its name nor its exact numbers come again."""
    rows = [{"case": "the slowest, 64 channels", "batch": 1, "work saved": 4.0}]
    for declared, clock in (
        ({"case": Column(role="setting", clock=True)}, True),
        ({"case": setting()}, False),
        ({}, False),
    ):
        table = records.table("losers", rows, ("case", "batch"), declared)
        saved = row(
            results.frame([changed(measurements=[table])]), "losers: work saved", f"case={rows[0]['case']}; batch=1"
        )
        assert saved.clock == clock


def test_rows_without_keys_are_numbered():
    frame = results.frame([changed(measurements=[records.table("t", [{"a": 1}, {"a": 1}])])])
    assert list(frame[frame["name"] == "t: a"]["key"]) == ["row=1", "row=2"]


def test_what_the_run_took_is_there():
    frame = results.frame([changed(peak_device_memory=7)])
    assert row(frame, "run: seconds").value == 12.5
    assert row(frame, "run: peak memory").unit == "B"
    assert row(frame, "run: peak device memory").value == 7
    assert frame[frame["name"].str.startswith("run: ")]["clock"].all()


def test_every_recorded_value_has_a_key_of_its_own():
    runs, problems = results.recorded_runs()
    frame = results.frame(runs)
    assert not problems and not frame.duplicated(["lesson", "machine", "name", "key"]).any()


def test_files_hold_the_same_rows_whatever_parameters_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "RECORDED", tmp_path / "recorded")
    parameters = {"SEED": 5, "TOKENS": 128, "RATIO": 1, "CRITERION": ["a"], "FAST": True}
    records.write(TIDY, tmp_path / "03_a" / "record.json")
    records.write(changed(TIDY, lesson="04", parameters=parameters), tmp_path / "04_a" / "record.json")
    report.write([tmp_path], tmp_path / "report.html")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "rows.parquet"), results.rows([tmp_path]))
    csv = pd.read_csv(tmp_path / "rows.csv")
    assert list(csv["value"].dropna()) == pytest.approx(list(results.rows([tmp_path])["value"].dropna()))
    assert set(csv["p.CRITERION"].dropna()) == {"l1", '["a"]'} and set(csv["p.TOKENS"].dropna()) == {128}


def test_folders_are_searched_once_and_damaged_records_left_out(tmp_path: Path):
    for name in ("smoke-1", ".smoke-2"):  # the second is of a run under way
        records.write(RECORD, tmp_path / "01_small" / name / "record.json")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "record.json").write_text("{")
    assert len(results.rows([tmp_path, tmp_path / "01_small"])) == len(results.frame([RECORD]))
