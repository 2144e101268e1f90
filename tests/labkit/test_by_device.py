"""A session on a GPU that times the CPU too: claims, records and tables name the machine that was timed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refusals import check_refusal

import labkit
from course import report, results
from labkit import files
from labkit.lesson import claims, records, reference_runs
from labkit.lesson.by_device import apart
from labkit.lesson.claim_tests import ClaimTests
from labkit.lesson.records import RecordedTable, RunRecord, cost
from labkit.lesson.session import Lab
from labkit.timing.machine import Gpu, fingerprint

H100 = Gpu("NVIDIA H100 80GB HBM3", 1, 85_520_809_984, 52_428_800, 132, "9.0", "580.159.04", "13.0")
CLAIM = """
[[claim]]
id = "6.{number}"
section = 6
text = "It is twice as fast."
quantity = "speed-up"
unit = "x"
expected = [1.8, 2.2]
needs = "{needs}"
source = "guide section 6"
"""


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No reference runs, and a claim for each kind of device: 6.1 is about the CPU, 6.2 about a GPU."""
    for variable in ("LABKIT_PRESET", "LABKIT_DEVICE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(files, "RECORDED", tmp_path / "recorded")
    monkeypatch.setattr(files, "NOTEBOOKS", tmp_path)
    both = CLAIM.format(number=1, needs="cpu") + CLAIM.format(number=2, needs="gpu")
    (tmp_path / "claims.toml").write_text(both, encoding="utf-8")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A session that says that it runs on a GPU, with the GPU's facts made by hand: each clock in it is the CPU's."""
    lab = labkit.start("06", preset="class", device="cpu", results_dir=tmp_path / "runs")
    lab.machine = replace(lab.machine, device="cuda", gpu=H100)
    lab.device = torch.device("cuda:0")
    return lab


@pytest.fixture
def record(lab: Lab) -> RunRecord:
    """A record of the session with a timing, a number, a table and a claim of each device."""
    for name in ("share", "share of the GPU"):
        lab.predict(name, 0.4)
    lab.compare("gain", sum_of_ten, sum_of_ten, device="cpu", budget_s=0.02)
    lab.measure("call", sum_of_ten, device="cpu", budget_s=0.02)
    lab.record("share", 0.5, clock=True, device="cpu")
    lab.record("sweep", [{"batch": 1, "ms": 2.0}], by="batch", columns={"ms": cost("ms", clock=True)}, device="cpu")
    lab.record("share of the GPU", 0.25, clock=True)
    lab.record("bytes", 100)
    lab.claim("6.1", 2.0, (1.9, 2.1), device=torch.device("cpu"))
    lab.claim("6.2", 3.0, (2.9, 3.1))
    return lab.finish()


def sum_of_ten() -> int:
    return sum(range(10))


CPU = fingerprint("cpu").label
OF_THE_CPU = ["gain", "call", "share", "sweep"]


def test_a_claim_is_settled_by_the_device_that_was_timed_not_by_the_session_s(record: RunRecord):
    of_the_cpu, of_the_gpu = record.claims
    assert (of_the_cpu.verdict, of_the_cpu.value, of_the_cpu.device) == ("confirmed", 2.0, "cpu")
    assert (of_the_gpu.verdict, of_the_gpu.value, of_the_gpu.device) == ("contradicted", 3.0, None)


@pytest.mark.parametrize(
    ("session", "timed_on", "claim", "verdict"),
    [
        ("cuda", "cpu", "6.1", "confirmed"),
        ("cuda", None, "6.1", "not measurable here"),
        ("cuda", "cpu", "6.2", "not measurable here"),
        ("cpu", "cuda:0", "6.2", "confirmed"),
        ("cpu", None, "6.2", "not measurable here"),
        ("cpu", "cuda:0", "6.1", "not measurable here"),
    ],
)
def test_a_number_of_the_wrong_device_settles_nothing(session: str, timed_on: str | None, claim: str, verdict: str):
    tests = ClaimTests("06", session, judges=True)
    tests.test(claim, 2.0, (1.9, 2.1), None, timed_on)
    assert tests.settled[0].verdict == verdict


def test_a_record_comes_apart_by_the_device_that_was_timed(record: RunRecord):
    on_gpu, on_cpu = apart(record)
    assert (on_gpu.device, on_gpu.machine["label"], on_gpu.machine["slug"]) == (
        "cuda:0", H100.label, "nvidia-h100-80gb-hbm3",
    )  # fmt: skip
    assert [entry.name for entry in on_gpu.measurements] == ["share of the GPU", "bytes"]
    assert [claim.id for claim in on_gpu.claims] == ["6.2"]
    assert (on_cpu.device, on_cpu.machine["label"], on_cpu.machine["slug"]) == ("cpu", CPU, fingerprint("cpu").slug)
    assert [entry.name for entry in on_cpu.measurements] == OF_THE_CPU
    assert [claim.id for claim in on_cpu.claims] == ["6.1"]
    assert [[guess.name for guess in part.predictions] for part in (on_gpu, on_cpu)] == [
        ["share of the GPU"],
        ["share"],
    ]


@pytest.mark.parametrize("name", ["CPU", "gpu0", ""])
def test_a_name_that_is_no_device_s_is_refused(lab: Lab, name: str):
    check_refusal('give "cpu", "cuda:0" or', lambda: lab.claim("6.1", 2.0, (1.9, 2.1), device=name))
    check_refusal('give "cpu", "cuda:0" or', lambda: lab.record("share", 0.5, clock=True, device=name))


def test_a_record_of_one_device_stays_whole(tmp_path: Path):
    lab = labkit.start("06", preset="class", device="cpu", results_dir=tmp_path / "runs")
    lab.measure("call", sum_of_ten, budget_s=0.02)
    record = lab.finish()
    assert apart(record) == [record]


def test_the_cpu_s_numbers_of_a_gpu_s_record_stand_beside_with_the_cpu_s_name(record: RunRecord, lab: Lab, capsys):
    written = record.model_copy(update={"created": "2026-11-27T10:00:00+00:00"})
    records.write(written, files.RECORDED / "nvidia-h100-80gb-hbm3" / "06.json")
    for name in OF_THE_CPU:
        (run,) = lab.reference_runs(name)
        assert (run["machine"], run["device"]) == (CPU, "cpu")
    (run,) = lab.reference_runs("share of the GPU")
    assert (run["machine"], run["device"]) == (H100.label, "cuda:0")

    capsys.readouterr()
    lab.beside("gain")
    this_run, recorded, no_gpu = capsys.readouterr().out.splitlines()[-3:]
    assert CPU in this_run and "this run" in this_run and H100.name not in this_run
    assert CPU in recorded and "recorded 27 Nov 2026" in recorded
    assert "a GPU" in no_gpu and "not recorded yet" in no_gpu
    lab.beside("share of the GPU")
    this_run = capsys.readouterr().out.splitlines()[-3]
    assert H100.name in this_run

    (phrase,) = reference_runs.verdicts("06", claims.entry("6.1"))
    assert phrase == f"2.00x (1.90x to 2.10x), confirmed, at class on {CPU}, 2026-11-27"


def test_the_ceilings_of_the_cpu_are_the_cpu_s_in_any_session(lab: Lab):
    lab.by_preset = lambda *_: 0.01  # seconds for the ceilings
    lab.ceilings("cpu")
    table = lab.finish().measurements[0]
    assert isinstance(table, RecordedTable) and table.device == "cpu"


def test_reports_file_each_time_under_the_device_that_was_timed(record: RunRecord):
    gpu, cpu = results.side_by_side([], [record])
    assert gpu.machine.startswith("NVIDIA H100") and cpu.machine.startswith(CPU.partition(",")[0])
    table = results.frame([record])
    devices = dict(zip(table["name"], table["device"], strict=True))
    assert (devices["gain"], devices["share"], devices["sweep: ms"]) == ("cpu", "cpu", "cpu")
    assert (devices["share of the GPU"], devices["run: seconds"]) == ("cuda:0", "cuda:0")
    machines = dict(zip(table["name"], table["machine"], strict=True))
    assert machines["gain"] == fingerprint("cpu").slug and machines["bytes"] == "nvidia-h100-80gb-hbm3"
    assert list(table["name"]).count("run: seconds") == 1


def test_a_claim_about_the_cpu_counts_for_the_cpu_in_the_report(record: RunRecord):
    columns = results.side_by_side([], [record])
    settled = report.settled(claims.entry("6.1"), columns)
    assert [machine for machine, _ in settled] == [fingerprint("cpu").slug]
    assert report.verdict(claims.entry("6.1"), columns) == "confirmed"


def test_the_cpu_s_part_of_a_gpu_s_session_has_a_heading_of_its_own(record: RunRecord):
    _, on_cpu = apart(record)
    session_on_cpu = on_cpu.model_copy(update={"machine": fingerprint("cpu").to_dict()})
    columns = results.side_by_side([result(session_on_cpu), result(record)], [session_on_cpu, record])
    headings = [(column.machine, column.run) for column in columns]
    assert len(set(headings)) == len(headings) == 6
    assert [run for _, run in headings if "session" in run] == [
        "your run, class, in a session on a GPU", "recorded, class, in a session on a GPU",
    ]  # fmt: skip


def test_a_newer_result_of_a_session_s_machine_replaces_all_parts_of_the_older(record: RunRecord):
    on_gpu, _ = apart(record)
    newer = record.model_copy(update={"measurements": on_gpu.measurements, "claims": on_gpu.claims})
    (column,) = results.side_by_side([result(record), result(newer)], [])
    assert column.record == newer
    other_preset = newer.model_copy(update={"preset": "full"})
    assert len(results.side_by_side([result(record), result(other_preset)], [])) == 3


def result(record: RunRecord) -> results.ResultFolder:
    return results.ResultFolder(Path(), record, {}, None)
