"""The run record: strict JSON, written whole, read back equal, free of folders, refused when damaged."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from labkit import files, records
from labkit.errors import DataError, InputError
from labkit.records import MIME, RunRecord

RECORD = RunRecord(
    lesson="01",
    title="The inference challenge",
    preset="smoke",
    device="cpu",
    parameters={"SEED": 0, "BATCHES": [1, 8]},
    machine={"slug": "a-cpu-2c", "label": "A CPU, 2 cores"},
    measurements=[
        {"kind": "value", "name": "ridge", "value": 20.5, "unit": "FLOP/B", "ci95": [19.0, 22.0], "simulated": False}
    ],
    predictions=[{"name": "ridge", "question": "", "unit": "FLOP/B", "predicted": 10, "measured": 20.5}],
    claims=[{"id": "1.11", "value": 20.5, "ci95": None, "verdict": "contradicted"}],
    checks=[{"id": "01.1", "passed": True, "failures": []}],
    seconds=1.5,
    peak_memory=10**9,
    peak_device_memory=None,
    budget={"seconds": 90, "memory": 4e9, "within": True},
)


def notebook(folder: Path, *outputs: dict) -> Path:
    path = folder / "lesson.ipynb"
    cells = [{"cell_type": "markdown"}, *({"cell_type": "code", "outputs": [{"data": data}]} for data in outputs)]
    path.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    return path


def test_a_record_is_read_back_equal(tmp_path):
    records.write(RECORD, tmp_path / "new" / "record.json")
    assert records.read(tmp_path / "new" / "record.json") == RECORD


def test_a_record_says_when_and_with_what_it_was_made():
    assert RECORD.created.endswith("+00:00")
    assert RECORD.schema == "labkit.record/1"
    assert RECORD.labkit[0].isdigit()


def test_git_is_none_outside_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert records._git() is None


def test_numbers_of_numpy_and_torch_become_plain():
    value = {"a": np.float32(0.5), "b": torch.tensor(3), "c": np.array([1, 2]), "d": (True, None), 1: np.int64(7)}
    assert records.plain(value) == {"a": 0.5, "b": 3, "c": [1, 2], "d": [True, None], "1": 7}


def test_what_is_not_finite_is_kept_as_text_and_the_file_stays_strict_json(tmp_path):
    values = [{"kind": "value", "name": "loss", "value": math.nan, "ci95": [-math.inf, math.inf]}]
    records.write(replace(RECORD, measurements=values), tmp_path / "record.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    kept = json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)["measurements"][0]
    assert (kept["value"], kept["ci95"]) == ("nan", ["-inf", "inf"])


def test_what_json_cannot_hold_is_refused_before_writing(tmp_path):
    with pytest.raises(InputError, match="not a Linear; record what you measured of it"):
        records.write(replace(RECORD, parameters={"layer": torch.nn.Linear(1, 1)}), tmp_path / "record.json")
    assert list(tmp_path.iterdir()) == []


def test_no_folder_of_the_user_gets_into_the_file(tmp_path, monkeypatch):
    home = "/".join(["", "home", "jane"])
    monkeypatch.setenv("HOME", home)
    failures = [f"FileNotFoundError: {files.ROOT}/data/x and {home}/y"]
    changed = replace(
        RECORD,
        parameters={"MODEL": "/srv/models/small.bin", "HUB": "org/name", "WINDOWS": r"C:\Users\jane\m.bin"},
        checks=[{"id": "01.1", "passed": False, "failures": failures}],
    )
    records.write(changed, tmp_path / "record.json")
    kept = json.loads((tmp_path / "record.json").read_text())
    assert kept["parameters"]["MODEL"] == "small.bin"
    assert kept["parameters"]["HUB"] == "org/name"
    assert kept["checks"][0]["failures"] == ["FileNotFoundError: <course>/data/x and ~/y"]


def test_an_older_record_stays_whole_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    records.write(RECORD, path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match=r"cannot be written to .* \(No space left on device\)"):
        records.write(replace(RECORD, seconds=9.0), path)
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]
    assert records.read(path) == RECORD


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match="choose another results_dir"):
        records.write(RECORD, tmp_path / "runs" / "record.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "labkit.record/0"}, "is of version 'labkit.record/0', this labkit reads 'labkit.record/1'"),
        ({"lesson": 1}, "`lesson` is missing or malformed"),
        ({"seconds": None}, "`seconds` is missing or malformed"),
        ({"measurements": {}}, "`measurements` is missing or malformed"),
        ({"measurements": [{"name": "x"}]}, "one of its measurements has no kind or name"),
        ({"measurements": [3]}, "one of its measurements has no kind or name"),
        ({"measurements": [{"kind": "table", "name": "x"}]}, "'x' has no rows or value"),
        ({"measurements": [{"kind": "table", "name": "x", "rows": [3]}]}, "'x' has no rows or value"),
        ({"measurements": [{"kind": "value", "name": "x"}]}, "'x' has no rows or value"),
        ({"measurements": [{"kind": "value", "name": "x", "value": 1, "ci95": [1]}]}, "'x' has no rows or value"),
        ({"claims": [{"id": "1.1"}]}, "one of its claims has no id or value or verdict"),
        ({"checks": ["01.1"]}, "one of its checks has no id or passed"),
    ],
)
def test_a_damaged_record_is_named_with_its_fault(tmp_path, change, message):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**RECORD.to_dict(), **change}))
    with pytest.raises(DataError, match=rf"record\.json (is damaged: )?{message}"):
        records.read(path)


def test_a_record_without_a_field_is_refused(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({name: value for name, value in RECORD.to_dict().items() if name != "git"}))
    with pytest.raises(DataError, match="`git` is missing"):
        records.read(path)


@pytest.mark.parametrize("text", ["{", "[]", "\x00", '"labkit.record/1"'])
def test_a_file_that_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(DataError, match="run the lesson again"):
        records.read(tmp_path / "record.json")


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(DataError, match=r"There is no .*record\.json; run the lesson to its last cell"):
        records.read(tmp_path / "record.json")


def test_the_last_record_of_a_notebook_is_read(tmp_path):
    older = replace(RECORD, seconds=1.0).to_dict()
    path = notebook(tmp_path, {"text/plain": "1"}, {MIME: older}, {MIME: RECORD.to_dict(), "text/plain": "done"})
    assert records.from_notebook(path) == RECORD


def test_a_notebook_without_a_record_is_refused(tmp_path):
    with pytest.raises(DataError, match="carries no run record; run the notebook to its last cell"):
        records.from_notebook(notebook(tmp_path, {"text/plain": "1"}))


def test_recorded_reads_one_record_a_machine_in_order(tmp_path):
    for slug in ("nvidia-h100", "amd-epyc-2c"):
        records.write(replace(RECORD, machine={"slug": slug}), tmp_path / slug / "01.json")
    records.write(replace(RECORD, lesson="02"), tmp_path / "amd-epyc-2c" / "02.json")
    found = records.recorded("01", tmp_path)
    assert [one.machine["slug"] for one in found] == ["amd-epyc-2c", "nvidia-h100"]
    assert records.recorded("03", tmp_path) == []


def test_a_record_prints_on_one_line():
    assert repr(RECORD) == "RunRecord(lesson 01, smoke, A CPU, 2 cores: 1 measurements, 1 claims, 1 checks)"
