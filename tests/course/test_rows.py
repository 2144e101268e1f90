from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from course import results, rows
from labkit import records
from labkit.errors import InputError
from labkit.records import RunRecord

RECORD = RunRecord(
    lesson="03",
    title="A lesson",
    preset="smoke",
    device="cpu",
    parameters={"SEED": 4, "RATIO": 0.5, "CRITERION": "l1"},
    machine={"slug": "test-cpu"},
    measurements=[
        {"kind": "value", "name": "lost", "value": 1.5, "unit": "points", "ci95": [1.0, 2.0], "simulated": False},
        {"kind": "comparison", "name": "pruned", "value": 2.0, "unit": "x", "ci95": [1.8, "inf"], "verdict": "faster"},
        {
            "kind": "table",
            "name": "cuts",
            "unit": "",
            "simulated": True,
            "rows": [
                {"cut": "a", "batch": 1, "accuracy (%)": 90.0, "low": 88.0, "high": 92.0, "p50 (ms)": 5.0, "part": "x"},
                {"cut": "a", "batch": 8, "accuracy (%)": 80.0, "low": 78.0, "high": 82.0, "p50 (ms)": 4.0, "part": "y"},
            ],
        },
    ],
    predictions=[],
    claims=[],
    checks=[],
    seconds=12.5,
    peak_memory=10**9,
    peak_device_memory=None,
    budget={},
    created="2025-01-02T03:04:05+00:00",
    labkit="0",
    git=None,
)


def table(*entries: dict, name: str = "t") -> RunRecord:
    """RECORD with one table of these rows."""
    return replace(RECORD, measurements=[{"kind": "table", "name": name, "rows": list(entries), "unit": ""}])


def one(frame: pd.DataFrame, name: str, key: str = "") -> pd.Series:
    found = frame[(frame.name == name) & (frame.key == key)]
    assert len(found) == 1
    return found.iloc[0]


def test_columns_say_whose_the_values_are():
    frame = rows.frame([RECORD])
    assert [*frame.columns] == [
        "lesson", "preset", "machine", "device", "seed", "p.RATIO", "p.CRITERION",
        "name", "key", "value", "low", "high", "unit", "text", "simulated", "clock",
    ]  # fmt: skip
    assert set(
        map(tuple, frame[["lesson", "preset", "machine", "device", "seed", "p.RATIO", "p.CRITERION"]].values)
    ) == {("03", "smoke", "test-cpu", "cpu", 4, 0.5, "l1")}


def test_a_single_value_is_one_row():
    lost = one(rows.frame([RECORD]), "lost")
    assert (lost.value, lost.low, lost.high, lost.unit, lost.simulated, lost.clock) == (
        1.5,
        1.0,
        2.0,
        "points",
        False,
        False,
    )


def test_a_comparison_keeps_verdict_and_infinite_end():
    pruned = one(rows.frame([RECORD]), "pruned")
    assert (pruned.value, pruned.high, pruned.text, pruned.clock) == (2.0, float("inf"), "faster", True)


def test_a_table_gives_a_row_for_each_value():
    frame = rows.frame([RECORD])
    accuracy = one(frame, "cuts: accuracy", "cut=a; batch=8")
    assert (accuracy.value, accuracy.low, accuracy.high, accuracy.unit) == (80.0, 78.0, 82.0, "%")
    assert accuracy.simulated and not accuracy.clock
    assert one(frame, "cuts: p50", "cut=a; batch=8").clock
    assert one(frame, "cuts: part", "cut=a; batch=8").text == "y"


def test_what_the_run_took_is_there():
    frame = rows.frame([replace(RECORD, peak_device_memory=7)])
    assert one(frame, "run: seconds").value == 12.5
    assert one(frame, "run: peak memory").unit == "B"
    assert one(frame, "run: peak device memory").value == 7
    assert frame[frame.name.str.startswith("run: ")].clock.all()


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ([{"p": 1, "q": 0.123}, {"p": 2, "q": 0.123}], ["p=1", "p=2"]),
        # results that happen to differ everywhere are no key, wherever their column stands
        (
            [{"p": p, "left": p * 3.1 + n, "what": w} for p in (1, 2, 3) for n, w in enumerate("ab")],
            [f"p={p}; what={w}" for p in (1, 2, 3) for w in "ab"],
        ),
        # a grid with holes
        (
            [
                {"how": h, "at": a, "share": s}
                for h, a, s in (("x", 0.1, 1), ("y", 0.1, 2), ("y", 0.2, 3), ("z", 0.3, 4))
            ],
            ["how=x; at=0.1", "how=y; at=0.1", "how=y; at=0.2", "how=z; at=0.3"],
        ),
        ([{"only": 1}, {"only": 2}], ["row=1", "row=2"]),
        ([{"same": 1, "too": 2}, {"same": 1, "too": 2}], ["row=1", "row=2"]),
    ],
)
def test_settings_are_told_from_results(listed: list[dict], expected: list[str]):
    frame = rows.frame([table(*listed)])
    assert list(dict.fromkeys(frame[frame.name.str.startswith("t: ")].key)) == expected


def test_every_recorded_value_has_a_key_of_its_own():
    records, problems = results.recorded_runs()
    frame = rows.frame(records)
    assert not problems and not frame.duplicated(["lesson", "machine", "name", "key"]).any()


def test_a_clock_decides_what_speaks_of_time():
    timed = {
        "decode speed",
        "latency and throughput: sentences/s",
        "latency price of throughput",
        "turning batch",
        "share of the roof at the turn",
    }
    records, _ = results.recorded_runs()
    found = rows.frame(records).groupby("name").clock.agg(["min", "max"])
    assert found.loc[[*timed, "accuracy and time: time left", "losing cases: verdict"], "min"].all()
    steady = [
        "accuracy and time: accuracy",
        "accuracy and time: MACs left",
        "criteria, small cut: accuracy",
        "whole networks: theory",
    ]
    assert not found.loc[[*steady, "MiniLM pruned: bitmask", "lottery tickets: accuracy"], "max"].any()


def test_the_keys_of_a_row_can_make_it_one_of_the_clock():
    found = rows.frame([table({"p": 0, "what": "time", "left": 1.0}, {"p": 0, "what": "MACs", "left": 0.5})])
    assert found[found.name == "t: left"].set_index("key").clock.to_dict() == {
        "p=0; what=time": True,
        "p=0; what=MACs": False,
    }


def test_files_hold_the_same_rows(tmp_path: Path):
    other = replace(RECORD, parameters={"SEED": 5, "TOKENS": 128, "RATIO": 1, "CRITERION": ["a"]}, lesson="04")
    frame = rows.frame([RECORD, other])
    csv, parquet = rows.write(frame, tmp_path)
    text = {
        column: str
        for column in ("lesson", "preset", "machine", "device", "name", "key", "unit", "text", "p.CRITERION")
    }
    from_csv = pd.read_csv(csv, dtype=text | {"seed": "Int64", "p.TOKENS": "Int64"}, keep_default_na=False, na_values={
        column: [""] for column in ("value", "low", "high", "p.TOKENS", "p.RATIO")})  # fmt: skip
    from_parquet = pd.read_parquet(parquet)
    pd.testing.assert_frame_equal(from_parquet, frame)
    pd.testing.assert_frame_equal(from_csv, frame, check_dtype=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.parquet"]


def test_files_that_cannot_be_written_are_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"The rows cannot be written to .*rows.csv \("):
        rows.write(rows.frame([RECORD]), tmp_path / "file")


def test_folders_are_searched_once_and_damaged_records_left_out(tmp_path: Path):
    records.write(RECORD, tmp_path / "03_a" / "smoke-1" / "record.json")
    records.write(RECORD, tmp_path / "03_a" / ".smoke-2" / "record.json")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "record.json").write_text("{")
    frame = rows.rows([tmp_path, tmp_path / "03_a"])
    assert len(frame) == len(rows.frame([RECORD]))


def test_a_folder_without_results_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="There are no results in"):
        rows.rows([tmp_path])


def test_no_record_gives_no_row():
    assert rows.frame([]).empty
