"""The run record: strict JSON, written whole, read back equal, free of folders, refused when damaged."""

import json
import math

import numpy as np
import pytest
import run_records
import torch
from refusals import Refusals, check_refusal, refused

from course import reference
from labkit import files
from labkit.errors import DataError
from labkit.lesson import calibration, records
from labkit.lesson.origin import origin
from labkit.lesson.records import Column, RunRecord, cost, quality

TABLE = records.table(
    "cuts",
    [{"cut": "a", "seed": seed, "accuracy": 90.0 + seed, "low": 88.0, "high": 92.0, "ms": 1.5} for seed in (0, 1)],
    by=("cut", "seed"),
    columns={"accuracy": quality("%", low="low", high="high"), "ms": cost("ms", clock=True)},
)
RECORD = run_records.changed(
    parameters={"SEED": 0, "BATCHES": [1, 8]},
    measurements=[{"kind": "value", "name": "ridge", "value": 20.5, "unit": "FLOP/B", "ci95": [19.0, 22.0]}, TABLE],
    checks=[{"id": "01.1", "passed": True, "failures": []}],
    **origin(),
)


def changed(**fields: object) -> RunRecord:
    return run_records.changed(RECORD, **fields)


# what columns mean --------------------------------------------------------------------------------------------------


def test_a_declared_column_keeps_its_meaning_on_the_disk(tmp_path):
    records.write(RECORD, tmp_path / "record.json")
    table = records.read(tmp_path / "record.json").named("cuts")
    assert table.by == ("cut", "seed")
    assert table.meaning("accuracy") == Column(role="quality", unit="%", low="low", high="high")
    assert table.meaning("ms") == Column(role="cost", unit="ms", clock=True)


def test_what_is_not_declared_is_a_setting_in_by_and_a_plain_result_elsewhere():
    table = records.table("t", [{"batch": 1, "limit": "memory"}], by="batch")
    assert (table.meaning("batch").role, table.meaning("limit")) == ("setting", Column())


ROWS = [{"a": 1, "b": 1, "x": 0.5}, {"a": 1, "b": 2, "x": 0.5}]


TABLES: Refusals = {
    "'t' has no column 'c'; its columns are a, b, x.": lambda: records.table("t", ROWS, ("c",)),
    "'t' has no column 'y'": lambda: records.table("t", ROWS, ("b",), {"y": cost()}),
    "'t' has no column 'least'": lambda: records.table("t", ROWS, ("b",), {"x": cost(low="least")}),
    "by=('a',) does not tell the rows of 't' apart: a=1 is there twice; name more columns.": lambda: records.table(
        "t", ROWS, ("a",)
    ),
    "non-empty list of dicts": lambda: records.table("t", []),
    "not a ReLU": lambda: records.table("t", [{"a": torch.nn.ReLU()}]),
}


@refused(TABLES)
def test_a_table_whose_meaning_cannot_be_is_refused(words, call):
    check_refusal(words, call)


def test_a_column_that_only_some_rows_have_can_be_declared():
    assert records.table("t", [{"a": 1}, {"a": 2, "x": 3.0}], by="a", columns={"x": cost()}).rows[0] == {"a": 1}


def recorded_columns() -> list[tuple[records.RecordedTable, str]]:
    runs = [records.read(path) for path in files.RECORDED.glob("*/[0-9][0-9].json")]
    tables = [entry for run in runs for entry in run.measurements if isinstance(entry, records.RecordedTable)]
    return [(table, column) for table in tables for column in dict.fromkeys(name for row in table.rows for name in row)]


def test_every_number_in_the_recorded_tables_was_declared():
    for table, column in recorded_columns():
        ends = {end for meaning in table.columns.values() for end in (meaning.low, meaning.high)}
        numbers = any(isinstance(row.get(column), int | float) for row in table.rows)
        assert not numbers or column in {*table.by, *table.columns, *ends}, (table.name, column)


@pytest.mark.parametrize(
    ("name", "column", "role"),
    [
        ("latency and throughput", "throughput over batch 1", "quality"),
        ("latency and throughput", "step over batch 1", "cost"),
        ("models on the roofline", "share of the roof (%)", "quality"),
        ("accuracy and time", "work left", "cost"),
        ("equal bytes", "recovered", "quality"),
        ("equal bytes", "time left", "cost"),
    ],
)
def test_the_recorded_tables_know_which_way_is_better(name, column, role):
    tables = [table for table, other in recorded_columns() if (table.name, other) == (name, column)]
    assert {table.meaning(column).role for table in tables} == {role}


# the file -----------------------------------------------------------------------------------------------------------


def test_a_record_is_read_back_equal(tmp_path):
    records.write(RECORD, tmp_path / "new" / "record.json")
    assert records.read(tmp_path / "new" / "record.json") == RECORD


def test_a_record_from_before_sentences_intervals_and_used_answers_is_read(tmp_path):
    values = RECORD.to_dict()
    assert "sentences" not in values and "ci95" not in values["predictions"][0] and "used" not in values["checks"][0]
    assert RunRecord.from_dict(values) == RECORD
    asked = {"name": "x", "question": "", "unit": "", "predicted": None, "measured": 1.5, "ci95": [1.0, 2.0]}
    check = {"id": "01.1", "passed": False, "failures": ["not done yet"], "used": "worked"}
    records.write(changed(predictions=[asked], checks=[check], sentences={"x": ["So."]}), tmp_path / "record.json")
    again = records.read(tmp_path / "record.json")
    assert (again.predictions[0].predicted, again.checks[0].used, again.sentences) == (None, "worked", {"x": ["So."]})


def test_a_record_says_when_and_with_what_it_was_made():
    assert RECORD.created.endswith("+00:00")
    assert RECORD.labkit[0].isdigit()


def test_git_is_none_outside_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert origin()["git"] is None


def test_numbers_of_numpy_and_torch_become_plain():
    value = {"a": np.float32(0.5), "b": torch.tensor(3), "c": np.array([1, 2]), "d": (True, None), 1: np.int64(7)}
    assert records.plain(value) == {"a": 0.5, "b": 3, "c": [1, 2], "d": [True, None], "1": 7}


@pytest.mark.parametrize(
    ("series", "stored"),
    [
        ([1.23456789] * 5, [1.23457] * 5),
        ([1.23456789] * 4, [1.23456789] * 4),
        ([1.23456789] * 5 + [math.inf], [1.23456789] * 5 + ["inf"]),
        ([1234567] * 6, [1234567] * 6),
    ],
)
def test_only_series_of_five_floats_or_more_are_rounded(series, stored):
    assert records.plain(series) == stored


def test_what_is_not_finite_is_kept_as_text_and_the_file_stays_strict_json(tmp_path):
    values = [{"kind": "value", "name": "loss", "value": math.nan, "ci95": [-math.inf, math.inf]}]
    records.write(changed(measurements=values), tmp_path / "record.json")
    assert records.read(tmp_path / "record.json").named("loss").ci95 == (-math.inf, math.inf)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    kept = json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)["measurements"][0]
    assert (kept["value"], kept["ci95"]) == ("nan", ["-inf", "inf"])


def test_what_json_cannot_hold_is_refused_before_writing(tmp_path):
    run = changed(parameters={"layer": torch.nn.Linear(1, 1)})
    check_refusal("not a Linear; record what you measured of it", lambda: records.write(run, tmp_path / "record.json"))
    assert list(tmp_path.iterdir()) == []


def test_no_folder_of_the_user_gets_into_the_file(tmp_path, monkeypatch):
    home = "/".join(["", "home", "jane"])
    monkeypatch.setenv("HOME", home)
    failures = [f"FileNotFoundError: {files.ROOT}/data/x and {home}/y"]
    run = changed(
        parameters={"MODEL": "/srv/models/small.bin", "HUB": "org/name", "WINDOWS": r"C:\Users\jane\m.bin"},
        checks=[{"id": "01.1", "passed": False, "failures": failures}],
    )
    records.write(run, tmp_path / "record.json")
    kept = json.loads((tmp_path / "record.json").read_text())
    assert kept["parameters"] == {"MODEL": "small.bin", "HUB": "org/name", "WINDOWS": "m.bin"}
    assert kept["checks"][0]["failures"] == ["FileNotFoundError: <course>/data/x and ~/y"]


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    check_refusal("choose another results_dir", lambda: records.write(RECORD, tmp_path / "runs" / "record.json"))


VALUE = {"kind": "value", "name": "x", "value": 1}


def holding(**change: object) -> str:
    return json.dumps({**RECORD.to_dict(), **change})


DAMAGED = {  # words of the sentence -> what the file holds
    "record.json is of version 'labkit.record/1', this labkit reads 'labkit.record/2'; run": holding(
        version="labkit.record/1"
    ),
    "record.json is damaged: `lesson`: ": holding(lesson=1),
    "record.json is damaged: `measurements.0`: ": holding(measurements=[{"name": "x"}]),
    "is damaged: `measurements.0`: ": holding(measurements=[3]),
    "record.json is damaged: `measurements.0.table.rows.0`: ": holding(
        measurements=[{"kind": "table", "name": "x", "rows": [3]}]
    ),
    "record.json is damaged: `measurements.0.value.role`: ": holding(measurements=[VALUE | {"role": "best"}]),
    "record.json is damaged: `claims.0.verdict`: ": holding(claims=[{"id": "1.1", "value": 1, "verdict": "true"}]),
    "record.json is damaged: `checks.0`: ": holding(checks=["01.1"]),
    "record.json is damaged: `colour`: ": holding(colour="red"),
    "is damaged: `git`: ": json.dumps({name: x for name, x in RECORD.to_dict().items() if name != "git"}),
}


@pytest.mark.parametrize(("words", "text"), DAMAGED.items(), ids=DAMAGED)
def test_a_damaged_record_is_named_with_its_fault(tmp_path, words, text):
    (tmp_path / "record.json").write_text(text)
    check_refusal(words, lambda: records.read(tmp_path / "record.json"), DataError)


@pytest.mark.parametrize("text", ["{", "[]", "\x00", '"labkit.record/2"'])
def test_a_file_that_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    check_refusal("run the lesson again", lambda: records.read(tmp_path / "record.json"), DataError)


def test_a_missing_file_says_how_to_make_it(tmp_path):
    words = "There is no ... record.json; run the lesson to its last cell"
    check_refusal(words, lambda: records.read(tmp_path / "record.json"), DataError)


def test_recorded_reads_one_record_a_machine_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RECORDED", tmp_path)
    for slug in ("nvidia-h100", "amd-epyc-2c"):
        records.write(changed(machine={"slug": slug}), tmp_path / slug / "01.json")
    records.write(changed(lesson="02"), tmp_path / "amd-epyc-2c" / "02.json")
    found = records.recorded("01")
    assert [one.machine["slug"] for one in found] == ["amd-epyc-2c", "nvidia-h100"]
    assert records.recorded("03") == []


def test_a_reference_is_the_last_run_whose_page_is_kept_with_the_numbers_of_all(tmp_path):
    def process(seconds: float, **values: object) -> RunRecord:
        entries = [{"kind": "value", "name": name, "value": value} for name, value in values.items()]
        return changed(seconds=seconds, measurements=entries, created=f"2026-11-2{seconds:.0f}T10:00:00+00:00")

    runs = [process(1, ratio=2.0, who="a"), process(2, ratio=4.0, who="b"), process(3, ratio=4.0, who="c", rare=7)]
    runs[-1].measurements[0].process_value = 9.0  # the last process records the median of all
    records.write(reference.together(runs), tmp_path / "01.json")
    whole = records.read(tmp_path / "01.json")
    assert (whole.seconds, whole.named("ratio").value, whole.named("who").value) == (3, 4.0, "c")
    assert whole.runs.created == [f"2026-11-2{day}T10:00:00+00:00" for day in (1, 2, 3)]
    assert whole.runs.values == {"ratio": [2.0, 4.0, 9.0], "rare": [7]}
    assert whole.spread("ratio") == (4.0, 2.0, 9.0, 3)
    assert whole.spread("rare") == (7, 7, 7, 1)
    assert whole.spread("seconds") == (2, 1, 3, 3)
    assert whole.spread("who") is None and whole.spread("missing") is None


def test_a_record_of_one_process_spreads_over_one():
    assert RECORD.runs is None
    assert RECORD.spread("ridge") == (20.5, 20.5, 20.5, 1)
    assert RECORD.spread("seconds").processes == 1
    assert RECORD.spread("cuts") is None  # a table


def test_a_record_prints_on_one_line():
    words = "RunRecord(lesson 01, class, Test CPU, 2 cores: 2 measurements, 1 claims, 1 checks)"
    assert str(RECORD) == repr(RECORD) == words


# predictions ----------------------------------------------------------------------------------------------------------


def guess(predicted: object, measured: object, ci95: object = None) -> records.Prediction:
    return records.Prediction(name="", question="", unit="", predicted=predicted, measured=measured, ci95=ci95)


@pytest.mark.parametrize(
    ("prediction", "words"),
    [
        (guess(10, 30), "3.00x too low"),
        (guess(7, 7), "right within 5 %"),
        (guess(7, None), "–"),
        (guess(7, math.nan), "–"),
        (guess(0, 3), "3 too low"),  # a difference, where there is no factor
        (guess(1.5, 0), "1.50 too high"),
        (guess(0, 0), "right within 5 %"),
        (guess(1.5, 0, (-0.5, 0.5)), "above the interval: 1.50 too high"),
        (guess(0, 0, (0, 0)), "inside the interval"),
        (guess(None, 3, (2, 4)), "–"),
        (guess(2, 3, (2, 4)), "inside the interval"),
        (guess(0, 0.1, (-1, 1)), "inside the interval"),
        (guess(6, 3, (2, 4)), "above the interval: 2.00x too high"),
        (guess(2.99, 3, (2.995, 3.005)), "below the interval: 1.003x too low"),
        (guess(6, 3, (0, math.inf)), "not to be judged: no interval"),
        (guess(6, 3, (-math.inf, math.inf)), "not to be judged: no interval"),
        (guess(100, math.inf, (120, math.inf)), "below the interval: ∞ too low"),
    ],
)
def test_a_prediction_is_held_against_the_interval(prediction: records.Prediction, words: str):
    assert calibration.off_by(prediction) == words


@pytest.mark.parametrize(
    ("guesses", "words"),
    [
        ([guess(10, 20), guess(1, None), guess(None, 3)], ""),
        (
            [guess(9, 3), guess(1, 5), guess(2, 2), guess(8, 2), guess(2.5, 2, (1, 3))],
            "Of 5 predictions: 2 inside the measured interval or right, 2 too high, 1 too low. "
            "Half of all were off by a factor of 3 or less.",
        ),
        (  # a measured zero, and an interval that excludes nothing, are counted too
            [guess(0, 0, (0, 0)), guess(2, 0, (-1, 1)), guess(6, 3, (0, math.inf)), guess(1, 4, (3, 5))],
            "Of 4 predictions: 1 inside the measured interval or right, 1 too high, 1 too low, 1 not to be judged. "
            "Half of the 2 with a factor were off by a factor of 3 or less.",
        ),
    ],
)
def test_calibration(guesses: list, words: str):
    assert calibration.calibration(guesses) == words
