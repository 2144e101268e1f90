"""The report: what stands on the page, the rows beside it; trade-offs, sweeps and claims, all by declared meaning."""

import html.parser
import itertools
import json
import math
import random
import re
import shutil
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from refusals import check_refusal
from run_records import MACHINE, RECORD, changed

from course import reference, report, report_sweeps
from course.results import RunColumn, frame
from labkit import files
from labkit.lesson import records
from labkit.lesson.claims import Claim
from labkit.lesson.records import RunRecord, cost, quality


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


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
            self.words += re.sub(r"\s+", " ", data)


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
    for expected in (
        "Test CPU, 2 cores", "1.50x", "1.40x to 1.60x", "faster", "12.5 ms", "12.5 s of 90 s", "1 of 2",
        "Where is the ridge?", "2.00x too high", "not yetzero bytes", "p99 SIMULATED", "1 confirmed, ",
        "No record of a GPU is here, so claims about one are not yet measured",
    ):  # fmt: skip
        assert expected in words


def test_an_interval_without_an_end_is_said_in_words(runs: Path):
    few = {"kind": "measurement", "name": "slow", "value": 0.5, "unit": "s", "ci95": [0.0, math.inf]}
    records.write(changed(measurements=[few]), runs / "01_small" / "smoke-00000000" / "record.json")
    assert "500 ms (no interval)" in page(runs).words


def test_the_interval_of_a_timing_says_whether_it_covers_processes_or_holds_within_its_run(runs: Path):
    ratio = {"kind": "comparison", "name": "ratio", "value": 1.5, "unit": "x", "ci95": [1.4, 1.6], "clock": True}
    share = {"kind": "value", "name": "accuracy", "value": 84, "unit": "%", "ci95": [82, 86]}
    alone = changed(measurements=[ratio, share])
    recorded = runs / "01_small" / "smoke-00000000" / "record.json"
    records.write(alone, recorded)
    assert "1.50x (1.40x to 1.60x within this run)" in page(runs).words
    assert "84 % (82 % to 86 %)" in page(runs).words
    processes = [alone.model_copy(update={"measurements": [entry]}) for entry in ratios(alone, 1.1, 2.3)]
    records.write(reference.together([*processes, alone]), recorded)
    assert "1.50x (1.10x to 2.30x over 3 processes)" in page(runs).words
    rows = frame([records.read(recorded)]).set_index("name")
    assert rows.loc["ratio", ["low", "high"]].tolist() == [1.1, 2.3]


def ratios(record: records.RunRecord, *values: float) -> list[records.RecordedValue]:
    return [record.named("ratio").model_copy(update={"value": value}) for value in values]


def test_calibration_is_over_all_lessons(runs: Path):
    other = changed(lesson="02", predictions=[{**dict(RECORD.predictions[0]), "predicted": 40.0}])
    records.write(other, runs / "02_other" / "record.json")
    assert "Half of all were off by a factor of 3 or less" in page(runs).words


def test_a_question_without_a_prediction_is_counted_and_not_scored(runs: Path):
    asked = [{**dict(RECORD.predictions[0]), "name": "asked", "question": "How far?", "predicted": None}]
    inside = {**dict(RECORD.predictions[0]), "name": "ratio", "question": "How fast?", "ci95": [9.0, 21.0]}
    records.write(changed(predictions=[*asked, inside]), runs / "01_small" / "smoke-00000000" / "record.json")
    words = page(runs).words
    assert "1 question had no prediction." in words and "How far?" not in words
    assert "inside the interval" in words


def test_a_class_sees_the_points_of_all_on_the_plane_of_the_challenge(runs: Path):
    goals = {"time": (None, 0.6, "x"), "accuracy": (84.0, None, "%")}
    points = {"ann": (0.55, 85.0), "bob": (0.7, 86.0), "cleo": None}
    for student, point in points.items():
        task = {"name": "MiniLM", "goal": "Faster, as good.", "goals": goals, "reached": None, "point": None}
        if point:
            task |= {"point": dict(zip(goals, point, strict=True)), "reached": student == "ann"}
        records.write(changed(challenges=[task]), runs / student / "01_small" / "smoke-00000000" / "record.json")
    words = page(runs).words
    assert "Challenge MiniLM: Faster, as good. 1 of 3 runs reached it." in words
    assert "The goal is time at most 0.60x, accuracy at least 84 %. Reached by: ann." in words
    assert "bob0.70086" in words.replace(" ", "") and "cleo" not in words


def test_a_challenge_without_any_plan_says_so(runs: Path):
    goals = {"time": (None, 0.6, "x"), "accuracy": (None, None, "%")}
    task = {"name": "MiniLM", "goal": "Faster.", "goals": goals, "reached": None, "point": None}
    records.write(changed(challenges=[task]), runs / "01_small" / "smoke-00000000" / "record.json")
    words = page(runs).words
    assert "The run has not reached it." in words and "Reached by: none yet." in words and "no plan yet" in words


def test_the_page_needs_nothing_from_outside(runs: Path):
    read, text = page(runs), (runs / "report.html").read_text()
    assert "script" not in read.tags and "url(" not in text and "@import" not in text
    outside = [link for link in read.links if ":" in link or link.startswith("/")]
    assert all(link.startswith("data:image/png;base64,") for link in outside)


def test_links_to_the_notebook_resolve(runs: Path):
    links = page(runs).links
    files = [link for link in links if not link.startswith(("data:", "#"))]
    assert len(files) >= 3 and all((runs / link).exists() for link in files)


def test_the_newest_run_of_a_lesson_counts(runs: Path):
    newer = changed(title="Run again", created="2026-01-01T00:00:00+00:00")
    records.write(newer, runs / "01_small" / "smoke-11111111" / "record.json")
    words = page(runs).words
    assert "Run again" in words and "A small lesson" not in words


def test_a_recorded_machine_stands_beside_this_one(runs: Path):
    other = {**MACHINE, "slug": "other", "label": "Other GPU"}
    records.write(changed(machine=other, preset="full"), files.RECORDED / "other" / "01.json")
    words = page(runs).words
    assert "Other GPUrecorded, full" in words and "Test CPU, 2 coresyour run, class" in words


def test_a_run_at_smoke_is_not_judged_and_the_recorded_results_are_shown_instead(runs: Path):
    goals = {"time": (None, 0.6, "x"), "accuracy": (84.0, None, "%")}
    point = {"time": 0.5, "accuracy": 85.0}
    task = {"name": "MiniLM", "goal": "Faster.", "goals": goals, "reached": True, "point": point}
    smoke = {"preset": "smoke", "challenges": [task]}
    records.write(changed(**smoke), runs / "01_small" / "smoke-00000000" / "record.json")
    alone = page(runs).words
    assert "Smoke tries the code; run class to see. No results are recorded for this lesson." in alone
    assert not any(words in alone for words in ("1.50x", "2.00x too high", "Where is the ridge?", "reached it"))
    assert "not judged" not in alone and "not yetzero bytes" in alone  # exercises are of code

    other = {**MACHINE, "slug": "other", "label": "Other CPU"}
    values = [{**RECORD.measurements[0].model_dump(), "value": 1.7, "ci95": (1.65, 1.75)}]
    records.write(changed(machine=other, measurements=values), files.RECORDED / "other" / "01.json")
    beside = page(runs).words
    assert "Smoke tries the code; run class to see. The recorded results are shown instead." in beside
    assert "1.70x" in beside and "1.50x" not in beside


def test_lessons_that_were_not_run_here_have_no_section(runs: Path):
    """Their recorded figures are on the site, and to draw them all takes twenty seconds."""
    records.write(changed(lesson="02", title="Never run here"), files.RECORDED / "other" / "02.json")
    titles = re.findall(r"<h2>([^<]+)", report.write([runs], runs / "report.html").read_text())
    assert any(title.startswith("01") for title in titles) and not any("Never run here" in title for title in titles)


def test_contents_lead_to_every_section(runs: Path):
    text = report.write([runs], runs / "report.html").read_text()
    titles = re.findall(r"<section id=\"([^\"]+)\"><h2>", text)
    assert titles == re.findall(r'<li><a href="#([^"]+)">', text) and len(titles) == len(set(titles)) >= 5


def test_the_run_with_the_lessons_own_parameters_stands_beside_the_recorded(runs: Path):
    folder = runs / "01_small" / "smoke-22222222"
    records.write(changed(parameters={"RATIO": 0.7}, created="2026-01-01T00:00:00+00:00"), folder / "record.json")
    run = {"lesson": "01_small", "created": "2026-01-01", "status": "done", "parameters": {"RATIO": 0.7}}
    (folder / "run.json").write_text(json.dumps(run))
    words = page(runs).words
    assert "your run, class" in words and "your run, class, RATIO 0.7" not in words
    shutil.rmtree(runs / "01_small" / "smoke-00000000")
    assert "your run, class, RATIO 0.7" in page(runs).words


def failed(folder: Path, lesson: str, second: int = 0, **more: object) -> None:
    """What a run leaves that failed."""
    run = {"lesson": lesson, "status": "failed", "created": f"2026-01-01T00:00:0{second}+00:00", **more}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run))


def test_every_failed_run_is_listed(runs: Path):
    for second in (3, 5):
        error = {"name": "ValueError", "message": f"no such ratio 0.{second}", "cell": 4, "section": "Work"}
        failed(runs / "01_small" / f"smoke-{second}-failed", "01_small", second, error=error)
    words = page(runs).words
    assert "ValueError: no such ratio 0.3 (cell 4, Work)" in words and "no such ratio 0.5" in words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        *(
            (json.dumps({**RECORD.to_dict(), **damage}), "is damaged")
            for damage in ({"claims": [3]}, {"predictions": [{}]}, {"measurements": [{"kind": "table", "name": "x"}]})
        ),
    ],
)
def test_a_damaged_record_is_listed_and_the_others_shown(runs: Path, text: str, words: str):
    (runs / "02_bad").mkdir()
    (runs / "02_bad" / "record.json").write_text(text)
    shown = page(runs).words
    assert f"02_bad/record.json {words}" in shown and "1.50x" in shown


def test_a_folder_of_failures_alone_makes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "RECORDED", tmp_path / "recorded")
    failed(tmp_path / "runs", "02_other")
    assert "02_other" in page(tmp_path / "runs").words
    assert pd.read_parquet(tmp_path / "runs" / "rows.parquet").empty


def test_an_older_page_stays_when_the_rows_cannot_be_written(runs: Path):
    (runs / "rows.csv").mkdir()
    check_refusal("rows.csv cannot be written", lambda: report.write([runs], runs / "report.html"))


@pytest.mark.parametrize(("name", "sentence"), [("nowhere", "There is no folder"), ("", "There are no results in")])
def test_a_folder_without_results_is_refused(tmp_path: Path, name: str, sentence: str):
    words = f"{sentence} ... ; run a lesson first"
    check_refusal(words, lambda: report.write([tmp_path / name], tmp_path / "report.html"))
    assert list(tmp_path.iterdir()) == []


# sweeps -----------------------------------------------------------------------------------------------------------

AXES = {"MACs left": cost("fraction"), "accuracy": quality("%", low="low", high="high")}
CUT = {"cut": "half", "MACs left": 0.5, "accuracy": 90.0, "low": 88.0, "high": 92.0}
WHOLE = {"cut": "whole", "MACs left": 1.0, "accuracy": 93.0, "low": 91.0, "high": 95.0}


def value(name: str, number: object, unit: str = "", role: str = "result", **more: object) -> dict:
    return {"kind": "value", "name": name, "value": number, "unit": unit, "role": role} | more


def ratio(number: float, low: float, high: float) -> dict:
    return value("pruned", number, "x", "quality", ci95=[low, high], clock=True, kind="comparison")


def swept(*entries: tuple) -> dict:
    """The section of runs given as (parameters, values...)."""
    runs = [changed(measurements=list(rest), parameters=parameters) for parameters, *rest in entries]
    (points,) = report_sweeps.sweeps(runs)
    return report_sweeps.swept(points)


def shown(section: dict) -> str:
    """The words of the section on the page, without its figures' numbers."""
    nothing = {"columns": [], "titles": [], "claims": [], "verdicts": {}}
    text = report.template().render(made=report.datetime.now(), sweeps=[section], **nothing)
    return words(text.split('<section id="sweep', 1)[1])


def test_runs_that_differ_only_in_the_seed_are_one_point_and_the_last_of_a_seed_counts():
    parameters = [{"SEED": seed, "K": k} for seed, k in ((0, 1), (1, 1), (0, 1), (0, 2))]
    runs = [changed(parameters=some, title=str(number)) for number, some in enumerate(parameters)]
    (points,) = report_sweeps.sweeps(runs)
    assert [[record.title for record in point.runs] for point in points] == [["2", "1"], ["3"]]


def test_sweeps_are_told_apart_by_lesson_machine_device_and_preset():
    one = changed(parameters={"K": 1}), changed(parameters={"K": 2})
    others = [{"lesson": "02"}, {"preset": "full"}, {"device": "cuda:0"}, {"machine": {**MACHINE, "slug": "other"}}]
    assert len(report_sweeps.sweeps([*one, *(changed(record, **other) for other in others for record in one)])) == 5
    assert report_sweeps.sweeps([RECORD]) == report_sweeps.sweeps([RECORD, changed(lesson="02")]) == []


def test_points_stand_in_the_order_of_their_parameters_numbers_before_texts():
    runs = [changed(parameters={"K": k}) for k in ("b", 10, 2, None, "a")]
    (points,) = report_sweeps.sweeps(runs)
    assert [point.parameters["K"] for point in points] == [2, 10, None, "a", "b"]


def test_combinations_have_mean_and_interval_over_seeds_and_the_best_is_marked():
    accuracy = {0.3: (90.0, 91.0, 92.0), 0.5: (80.0, 81.0, 82.0)}
    parameters = [{"SEED": seed, "RATIO": ratio} for ratio in accuracy for seed in range(3)]
    values = [value("accuracy", number, "%", "quality") for number in itertools.chain(*accuracy.values())]
    text = shown(swept(*zip(parameters, values, strict=True)))
    assert "6 runs at class on Test CPU, 2 cores: RATIO 0.3, 0.5." in text
    assert "Seeds 0, 1, 2: means with 95 % intervals over them." in text
    assert "0.3 3 91 % (88.5 % to 93.5 %) best" in text and "0.5 3 81 % (78.5 % to 83.5 %)" in text
    assert text.count(" best ") - text.count("the best is") == 1


@pytest.mark.parametrize(("role", "best"), [("quality", 1), ("cost", 0), ("result", None), ("setting", None)])
def test_which_way_is_better_comes_from_the_role(role: str, best: int | None):
    (moved,) = swept(*(({"K": k}, value("speed lost below", float(k), "s", role)) for k in (1, 2)))["moved"]
    assert moved.best == best


def network(theory: float) -> records.RecordedTable:
    return records.table("whole", [{"network": "a", "theory": theory}, {"network": "b", "theory": 3.0}], "network")


@pytest.mark.parametrize(
    ("values", "moved", "text"),
    [
        # what the parameters do not change is folded
        (
            lambda k: [value("accuracy", 90.0, "%"), value("seen", k)],
            "seen",
            "1 further value value K 0 K 1 accuracy 90 %",
        ),
        # a ratio moves when its intervals part by more than runs do
        (lambda k: [ratio(2.0 + k, 1.9 + k, 2.1 + k)], "pruned", "2.00x (1.90x to 2.10x) 1 1 3.00x"),
        (lambda k: [ratio(2.0 + 0.1 * k, 1.5, 2.5)], "", "2.00x (1.50x to 2.50x) 2.10x (1.50x to 2.50x)"),
        (lambda k: [ratio(2.0 + k, 0.0, math.inf)], "", "2.00x 3.00x"),
        (lambda k: [ratio(2.0 + 0.15 * k, 1.99 + 0.15 * k, 2.01 + 0.15 * k)], "", "2.15x"),
        # times of different runs are not compared
        (
            lambda k: [value("decode", 1.0 + k, "s", "cost", ci95=[0.9 + k, 1.1 + k], clock=True)],
            "",
            "decode 1 s (900 ms to 1.10 s) 2 s (1.90 s to 2.10 s)",
        ),
        # values of tables are named by their row; texts and what is no number are left out
        (lambda k: [network(1.0 + k)], "whole: theory, network=a", "whole: theory, network=b 3 3"),
        (lambda k: [value("method", "auto"), value("a", "nan"), value("good", k == 1)], "good", "K runs good 0 1"),
    ],
)
def test_only_what_the_parameters_change_is_in_the_table(values, moved: str, text: str):
    section = swept(*(({"K": k}, *values(k)) for k in (0, 1)))
    assert ", ".join(value.name for value in section["moved"]) == moved and text in shown(section)


def test_a_value_that_only_some_points_have_leaves_the_others_empty():
    runs = [({"K": 1}, value("a", 1.0)), ({"K": 2}, value("a", 2.0), value("b", 3.0)), ({"K": 3}, value("a", 2.0))]
    text = shown(swept(*runs))
    assert "K runs a 1 1 1 2 1 2 3 1 2" in text and "b – 3 –" in text


def test_seeds_alone_make_a_table_without_figures():
    section = swept(*(({"SEED": seed}, value("accuracy", 90.0 + seed, "%", "quality")) for seed in range(3)))
    assert section["figures"] == [] and "1 value value mean accuracy 91 % (88.5 % to 93.5 %)" in shown(section)


def test_a_figure_along_the_parameter_that_is_a_number():
    section = swept(*(
        ({"CRITERION": how, "RATIO": share}, value("accuracy", 90 + 10 * (how == "taylor") - share, "%", "quality"))
        for how in ("l1", "taylor") for share in (0.3, 0.5)))  # fmt: skip
    (picture,) = section["figures"]
    assert picture["alt"] == (
        "accuracy (%) against RATIO for 4 points of the sweep; the best is 99.7 % at RATIO 0.3, CRITERION taylor."
    )


def test_a_trade_off_that_the_parameters_change_is_drawn_and_one_that_they_do_not_is_not():
    def tables(k: int) -> list[records.RecordedTable]:
        rows = {"moved": [CUT | {"accuracy": 90.0 - k}, WHOLE], "still": [CUT, WHOLE]}
        return [records.table(name, some, "cut", AXES) for name, some in rows.items()]

    alts = [picture["alt"] for picture in swept(*(({"K": k}, *tables(k)) for k in (0, 1)))["figures"]]
    assert any("“moved”" in alt for alt in alts) and not any("“still”" in alt for alt in alts)


def test_what_records_say_is_escaped(runs: Path):
    hostile = "<script>alert(1)</script>"
    for k in (0, 1):
        values, parameters = [value(hostile, float(k), role="cost")], {"HOW": f"{hostile}{k}"}
        record = changed(title=hostile, measurements=values, parameters=parameters)
        records.write(record, runs / f"hostile-{k}" / "record.json")
    assert "script" not in page(runs).tags


# claims -----------------------------------------------------------------------------------------------------------


def claim(needs: str = "any", **more: object) -> Claim:
    about = {"text": "Text of 3.1.", "quantity": "a quantity", "unit": "x", "source": "section 3"} | more
    return Claim(id="3.1", section=3, expected=[1.0, 2.0], needs=needs, **about)


def column(
    verdict: str, *, here: bool = True, preset: str = "class", device: str = "cpu", slug: str = "cpu"
) -> RunColumn:
    settled = {"id": "3.1", "value": 1.5, "ci95": None, "verdict": verdict}
    machine = {**MACHINE, "slug": slug, "label": f"Machine {slug}"}
    return RunColumn(changed(lesson="03", preset=preset, device=device, machine=machine, claims=[settled]), here)


GPU = {"slug": "gpu", "device": "cuda"}


@pytest.mark.parametrize(
    ("columns", "needs", "verdict"),
    [
        ([column("confirmed")], "any", "confirmed"),
        ([column("contradicted")], "any", "contradicted"),
        ([column("inconclusive")], "any", "inconclusive"),
        ([], "any", "not yet measured"),
        ([column("confirmed"), column("contradicted", **GPU)], "any", "differs by machine"),
        ([column("not measurable here"), column("contradicted", **GPU)], "any", "contradicted"),
        ([column("not settled here")], "any", "not settled here"),
        ([column("not settled here"), column("contradicted", **GPU)], "any", "contradicted"),
        # of one machine the largest preset counts, then the user's own
        ([column("contradicted", preset="smoke"), column("confirmed", here=False)], "any", "confirmed"),
        ([column("confirmed", here=False), column("contradicted", preset="smoke")], "any", "confirmed"),
        ([column("contradicted", here=False), column("confirmed")], "any", "confirmed"),
        # without a GPU's record nobody knows about a GPU; what only a document settles no machine can
        ([column("not measurable here")], "gpu", "not yet measured"),
        ([column("not measurable here", device="cuda:0")], "gpu", "not measurable here"),
        ([column("not measurable here")], "document", "not measurable here"),
        ([], "document", "not measurable here"),
    ],
)
def test_all_machines_together_give_a_verdict(columns: list[RunColumn], needs: str, verdict: str):
    assert report.verdict(claim(needs), columns) == verdict


def exchanged(day: date) -> dict[str, object]:
    return {"changed": [{"date": day, "from": "the old quantity", "to": "a quantity", "why": "it was unfair"}]}


def test_a_record_from_before_the_quantity_was_exchanged_says_nothing():
    old = column("contradicted")
    made = date.fromisoformat(old.record.created[:10])
    verdicts = [report.verdict(claim(**exchanged(day)), [old]) for day in (made, made + timedelta(days=1))]
    assert verdicts == ["contradicted", "not yet measured"]


def test_the_row_of_a_claim_says_why_people_say_it_and_what_was_changed():
    about = {"recipe": {"steps": 1290}, "why": "Half is gone.", "right_when": "Half is stored."}
    text = words(report.template().module.claims_table([claim(**about, **exchanged(date(2026, 11, 26)))], []))
    parts = ("settled by any machine, after at least 1,290 steps", "Why people say it Half is gone.")
    parts += ("When they are right: Half is stored.", "2026-11-26 It was unfair. Before: the old quantity.")
    assert [part for part in parts if part not in text] == []


def test_the_row_of_a_claim_says_it_all_and_escapes_it():
    table = report.template().module.claims_table
    text = words(table([claim(needs="gpu")], [column("contradicted", **GPU)]))
    parts = ("Text of 3.1.", "settled by a GPU", "1 to 2 x", "section 3", "contradicted 1.50x", "Machine gpu")
    assert [part for part in parts if part not in text] == []
    hostile = table([claim(text="<script>", unit="<script>")], [column("contradicted", preset="smoke")])
    assert "contradicted at smoke 1.50" in words(hostile) and "<script" not in hostile


def test_a_claim_can_be_chosen_where_the_style_sheet_knows_its_verdict(runs: Path):
    text = report.write([runs], runs / "report.html").read_text()
    assert f"{len(report.claims.load())} claims: 1 confirmed, " in words(text)
    assert 'href="#claims-1"' in text and 'id="claims-1"' in text
    for verdict in report.VERDICTS:
        name = verdict.replace(" ", "-")
        assert f".claims:has(#only-{name}:checked) tr" in text and f":not(.{name})" in text


# in a browser -----------------------------------------------------------------------------------------------------

LOOK = """({
    width: document.scrollingElement.scrollWidth,
    outside: [...document.querySelectorAll("body *")].filter(one => !one.closest(".scroll") && one.checkVisibility())
        .filter(one => one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80)),
    images: [...document.images].map(one => [one.alt.length, one.naturalWidth, one.getBoundingClientRect().width]),
    figures: [...document.querySelectorAll("figure")].map(one => one.querySelectorAll("table tbody tr").length),
    unlabelled: [...document.querySelectorAll("svg:not([aria-label]), canvas, input:not([id])")].length,
    anchors: [...document.querySelectorAll("a[href^='#']")].map(one => one.hash.slice(1))
        .filter(id => !document.getElementById(id)),
    twice: [...document.querySelectorAll("[id]")].map(one => one.id).filter((id, at, all) => all.indexOf(id) != at),
    small: [...document.querySelectorAll("body *")].filter(one => parseFloat(getComputedStyle(one).fontSize) < 11)
        .map(one => one.outerHTML.slice(0, 80)),
    boxes: [...document.querySelectorAll(".scroll")].filter(one => one.checkVisibility())
        .map(one => [one.tabIndex, one.getAttribute("aria-label")]),
    headings: [...document.querySelectorAll("h1, h2, h3")].map(one => +one.tagName[1]),
})"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of recorded runs, and of a sweep made up of the record of lesson 03 with other numbers.

    Of some lessons: to draw the figures of one takes two seconds.
    """
    folder, noise = tmp_path_factory.mktemp("report"), random.Random(0)
    for path in files.RECORDED.glob("*/0[378].json"):
        records.write(records.read(path), folder / path.stem / "record.json")
    for ratio, criterion, seed in itertools.product((0.3, 0.7), ("l1", "fpgm"), (0, 1)):
        shift = 1 - 0.1 * ratio * (1 + (criterion == "fpgm")) + noise.gauss(0, 0.002)
        values = records.read(next(files.RECORDED.glob("*/03.json"))).to_dict()
        for entry in values["measurements"]:
            if entry["name"].startswith("accuracy lost"):
                entry["value"] *= shift
            for row in entry.get("rows", []):
                row |= {"accuracy": row["accuracy"] * shift} if "accuracy" in row else {}
        values |= {"preset": "smoke", "parameters": {"RATIO": ratio, "CRITERION": criterion, "SEED": seed}}
        records.write(RunRecord.from_dict(values), folder / f"03-{ratio}-{criterion}-{seed}" / "record.json")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "record.json").write_text("{")
    return report.write([folder], folder / "report.html")


@pytest.mark.slow
@pytest.mark.parametrize("screen", [390, 1400])
def test_the_page_can_be_read_on_a_phone_and_without_sight_mouse_or_network(screen: int, built: Path, chromium):
    chromium.resize(screen, 900)
    chromium.errors.clear()
    chromium.requests.clear()
    chromium.open(built.as_uri())
    seen = SimpleNamespace(**chromium.run(LOOK))
    assert seen.width <= screen and (seen.outside, seen.small) == ([], [])
    # every picture is loaded, described, fits, and has the table of its numbers, or the line that there are none yet
    assert len(seen.images) >= 10 and len(seen.figures) == len(seen.images) and min(seen.figures) >= 1
    assert all(alt >= 60 and natural > 0 and 250 < width <= screen for alt, natural, width in seen.images)
    # nothing is nameless, broken or there twice; what scrolls can be reached by keyboard; headings skip no level
    assert (seen.unlabelled, chromium.nameless(), seen.anchors, seen.twice) == (0, [], [], [])
    assert seen.boxes and all(tab == 0 and label for tab, label in seen.boxes)
    assert seen.headings[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(seen.headings))
    assert chromium.errors == [] and [url for url in chromium.requests if not url.startswith(("file:", "data:"))] == []


@pytest.mark.slow
def test_a_verdict_can_be_chosen_without_a_script(built: Path, chromium):
    chromium.resize(1400, 900)
    chromium.open(built.as_uri())
    rows = "[...document.querySelectorAll('tr.claim')]"
    choices = chromium.run("[...document.querySelectorAll('[id^=only-]')].map(one => one.id.slice(5))")
    assert len(choices) >= 4 and choices[0] == "all"
    for name in choices[1:]:
        count = chromium.run(f"{rows}.filter(row => row.classList.contains('{name}')).length")
        chromium.run(f"document.getElementById('only-{name}').click()")
        assert chromium.run(f"{rows}.filter(row => row.checkVisibility()).length") == count > 0
    chromium.run("document.getElementById('only-all').click()")
    assert chromium.run(f"{rows}.every(row => row.checkVisibility())")
