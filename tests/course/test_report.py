import html.parser
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from course import report, rows
from labkit import files, records
from labkit.errors import InputError
from labkit.records import RunRecord

MACHINE = {"slug": "test-cpu-2c", "label": "Test CPU, 2 cores", "memory": 8 * 2**30, "threads": 2}
RECORD = RunRecord(
    lesson="01",
    title="A small lesson",
    preset="smoke",
    device="cpu",
    parameters={"PRESET": "smoke"},
    machine=MACHINE,
    measurements=[
        {"kind": "comparison", "name": "sparse", "value": 1.5, "unit": "x", "ci95": [1.4, 1.6], "verdict": "faster"},
        {"kind": "value", "name": "p99", "value": 0.0125, "unit": "s", "ci95": None, "simulated": True},
        {"kind": "table", "name": "sweep", "value": None, "unit": "", "rows": [{"batch": 1, "ms": 2.5}]},
    ],
    predictions=[{"name": "ridge", "question": "Where is the ridge?", "unit": "", "predicted": 20.0, "measured": 10.0}],
    claims=[{"id": "1.6", "value": 1.25, "ci95": [1.2, 1.3], "verdict": "confirmed"}],
    checks=[
        {"id": "1.count", "passed": True, "failures": []},
        {"id": "1.ridge", "passed": False, "failures": ["zero bytes"]},
    ],
    seconds=12.5,
    peak_memory=10**9,
    peak_device_memory=None,
    budget={"seconds": 90, "memory": 4 * 10**9, "within": True},
    created="2025-01-02T03:04:05+00:00",
    labkit="0",
    git=None,
)


class Page(html.parser.HTMLParser):
    """The words, tags and outside references of a page; a tag that is closed wrongly is an error."""

    def __init__(self, text: str):
        super().__init__()
        self.words, self.tags, self.links, self.open = "", [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words += data


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one finished run, and no recorded machines."""
    monkeypatch.setattr(files, "RECORDED", tmp_path / "recorded")
    folder = tmp_path / "runs" / "01_small" / "smoke-00000000"
    records.write(RECORD, folder / "record.json")
    (folder / "01_small.ipynb").write_text("{}")
    return tmp_path / "runs"


def page(runs: Path) -> Page:
    read = Page(report.write([runs], runs / "report.html").read_text(encoding="utf-8"))
    assert not read.open
    return read


def test_page_holds_what_was_measured(runs: Path):
    words = page(runs).words
    for expected in ("Test CPU, 2 cores", "1.50x", "1.40x to 1.60x", "faster", "12.5 ms", "12.5 s of 90 s", "1 of 2"):
        assert expected in words


def test_an_interval_without_an_end_is_said_in_words(runs: Path):
    few = {"kind": "measurement", "name": "slow", "value": 0.5, "unit": "s", "ci95": [0.0, float("inf")]}
    records.write(replace(RECORD, measurements=[few]), runs / "01_small" / "smoke-00000000" / "record.json")
    assert "500 ms (too few samples for an interval)" in page(runs).words


def test_a_simulated_value_is_badged(runs: Path):
    assert "p99 SIMULATED" in page(runs).words


def test_a_prediction_is_put_beside_its_measurement(runs: Path):
    assert "Where is the ridge?" in page(runs).words
    assert "2.00x too high" in page(runs).words


@pytest.mark.parametrize(
    ("predicted", "measured", "words"),
    [
        (10, 30, "3.00x too low"),
        (30, 10, "3.00x too high"),
        (7, 7, "right within 5 %"),
        (7, None, "–"),
        (0, 3, "–"),
        ("a", 1, "–"),
    ],
)
def test_off_by(predicted: object, measured: object, words: str):
    assert records.off_by(predicted, measured) == words


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([], ""),
        ([(10, 20), (1, None), (0, 3)], ""),
        (
            [(10, 20), (10, 10)],
            "Of 2 predictions half were off by a factor of 1.50 or less, 2 by no more than 2; too high: 0, too",
        ),
        ([(9, 3), (1, 5), (2, 2), (8, 2)], "factor of 3.50 or less, 1 by no more than 2; too high: 2, too low: 1."),
    ],
)
def test_calibration(pairs: list, words: str):
    predictions = [{"predicted": guess, "measured": found} for guess, found in pairs]
    said = records.calibration(predictions)
    assert words in said and bool(said) == bool(words)


def test_calibration_is_over_all_lessons(runs: Path):
    other = replace(RECORD, lesson="02", predictions=[{**RECORD.predictions[0], "predicted": 40.0}])
    records.write(other, runs / "02_other" / "record.json")
    assert "Of 2 predictions half were off by a factor of 3 or less, 1 by no more than 2" in page(runs).words


def test_claims_have_their_verdict_or_say_that_it_is_missing(runs: Path):
    words = page(runs).words
    assert "confirmed" in words
    assert "not yet measured" in words


def test_a_failed_exercise_names_its_failures(runs: Path):
    assert "not yetzero bytes" in page(runs).words


def test_the_page_needs_nothing_from_outside(runs: Path):
    read = page(runs)
    assert "script" not in read.tags
    outside = [link for link in read.links if ":" in link or link.startswith("/")]
    assert all(link.startswith("data:image/png;base64,") for link in outside)
    assert "url(" not in (runs / "report.html").read_text() and "@import" not in (runs / "report.html").read_text()


def test_links_to_the_notebook_resolve(runs: Path):
    links = page(runs).links
    files = [link for link in links if not link.startswith(("data:", "#"))]
    assert len(files) >= 3 and all((runs / link).exists() for link in files)


def test_what_records_say_is_escaped(runs: Path):
    hostile = replace(RECORD, title="<script>alert(1)</script>", created="2026-01-01T00:00:00+00:00")
    records.write(hostile, runs / "01_small" / "smoke-11111111" / "record.json")
    assert "script" not in page(runs).tags


def test_the_newest_run_of_a_lesson_counts(runs: Path):
    newer = replace(RECORD, title="Run again", created="2026-01-01T00:00:00+00:00")
    records.write(newer, runs / "01_small" / "smoke-11111111" / "record.json")
    words = page(runs).words
    assert "Run again" in words and "A small lesson" not in words


def test_a_recorded_machine_stands_beside_this_one(runs: Path):
    other = {**MACHINE, "slug": "other", "label": "Other GPU"}
    records.write(replace(RECORD, machine=other, preset="full"), files.RECORDED / "other" / "01.json")
    words = page(runs).words
    assert "Other GPUrecorded, full" in words and "Test CPU, 2 coresyour run, smoke" in words


def test_a_failed_run_has_its_row(runs: Path):
    failed = {"lesson": "02_other", "status": "failed", "created": "2026-01-01T00:00:00+00:00", "seconds": 3.0}
    failed["error"] = {"name": "DeadKernel", "message": "the kernel was killed", "cell": 4, "section": "Work"}
    (runs / "02_other" / "x").mkdir(parents=True)
    (runs / "02_other" / "x" / "run.json").write_text(json.dumps(failed))
    assert "DeadKernel: the kernel was killed (cell 4, Work)" in page(runs).words


def test_a_damaged_record_is_listed_and_the_others_shown(runs: Path):
    (runs / "bad").mkdir()
    (runs / "bad" / "record.json").write_text("{")
    words = page(runs).words
    assert "bad/record.json cannot be read" in words and "1.50x" in words


def test_a_run_under_way_is_left_out(runs: Path):
    records.write(replace(RECORD, title="Half"), runs / "01_small" / ".smoke-2-x" / "01" / "record.json")
    assert "Half" not in page(runs).words


def test_the_rows_are_written_beside_the_page(runs: Path):
    page(runs)
    csv, parquet = pd.read_csv(runs / "rows.csv"), pd.read_parquet(runs / "rows.parquet")
    assert list(csv.name) == list(parquet.name) and {"sparse", "p99", "sweep: ms"} <= set(csv.name)
    pd.testing.assert_frame_equal(parquet, rows.rows([runs]))


def test_contents_lead_to_every_section(runs: Path):
    text = report.write([runs], runs / "report.html").read_text()
    titles = re.findall(r"<section id=\"([^\"]+)\"><h2>", text)
    assert titles == re.findall(r'<li><a href="#([^"]+)">', text) and len(titles) == len(set(titles)) >= 5


def test_the_run_with_the_lessons_own_parameters_stands_beside_the_recorded(runs: Path):
    changed = replace(
        RECORD, measurements=[{**RECORD.measurements[0], "value": 7.0, "ci95": None}], created="2026-01-01"
    )
    folder = runs / "01_small" / "smoke-22222222"
    records.write(replace(changed, parameters={"RATIO": 0.7}), folder / "record.json")
    own = {
        "lesson": "01_small",
        "created": "2026-01-01",
        "status": "done",
        "parameters": {"PRESET": "smoke", "RATIO": 0.7},
    }
    (folder / "run.json").write_text(json.dumps(own))
    words = page(runs).words
    assert "your run, smoke" in words and "your run, smoke, RATIO 0.7" not in words
    shutil.rmtree(runs / "01_small" / "smoke-00000000")
    assert "your run, smoke, RATIO 0.7" in page(runs).words


def test_several_seeds_make_a_section(runs: Path):
    for seed in (1, 2):
        again = replace(RECORD, parameters={"SEED": seed}, created=f"2026-01-0{seed}T00:00:00+00:00")
        records.write(again, runs / "01_small" / f"smoke-{seed}" / "record.json")
    assert "Sweep of 01 A small lesson, smoke" in page(runs).words


def test_every_failed_run_of_a_sweep_is_listed(runs: Path):
    for ratio in (0.3, 0.5):
        error = {"name": "ValueError", "message": f"no such ratio {ratio}", "cell": 4, "section": "Work"}
        failed = {
            "lesson": "01_small",
            "status": "failed",
            "created": f"2026-01-01T00:00:0{int(10 * ratio)}",
            "error": error,
        }
        folder = runs / "01_small" / f"smoke-{ratio}-failed"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(failed))
    words = page(runs).words
    assert "no such ratio 0.3" in words and "no such ratio 0.5" in words


@pytest.mark.parametrize(
    "damage", [{"claims": [3]}, {"predictions": [{}]}, {"measurements": [{"kind": "table", "name": "x"}]}]
)
def test_a_record_with_a_damaged_part_is_listed(runs: Path, damage: dict):
    folder = runs / "02_bad"
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps({**RECORD.to_dict(), **damage}))
    words = page(runs).words
    assert "02_bad/record.json is damaged" in words and "1.50x" in words


def test_a_folder_of_failures_alone_makes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "RECORDED", tmp_path / "recorded")
    (tmp_path / "runs").mkdir()
    failed = {"lesson": "02_other", "status": "failed", "created": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "runs" / "run.json").write_text(json.dumps(failed))
    assert "02_other" in page(tmp_path / "runs").words
    assert pd.read_parquet(tmp_path / "runs" / "rows.parquet").empty


def test_an_older_page_stays_when_the_rows_cannot_be_written(runs: Path):
    (runs / "rows.csv").mkdir()
    with pytest.raises(InputError, match=r"The rows cannot be written to .*rows\.csv"):
        report.write([runs], runs / "report.html")


def test_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"There is no folder .*; run a lesson first"):
        report.write([tmp_path / "nowhere"], tmp_path / "report.html")


def test_an_empty_folder_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"There are no results in .*; run a lesson first"):
        report.write([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
