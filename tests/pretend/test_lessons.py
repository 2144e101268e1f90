"""Every lesson runs at `smoke` with the device there, and its challenge with a plan; stable cells print what is stored.

A learner runs a lesson to its end and then tries plans. So the challenge and all below it run twice more after the end.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from commands import record_at_smoke
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

import labkit
from course import notebooks, run
from course.notebooks import tags
from labkit import bench
from labkit.files import ROOT
from labkit.lesson.by_device import apart, kind_of
from labkit.lesson.records import RunRecord
from labkit.timing.machine import Gpu
from pretend import device

IN_CHILDREN = Path(__file__).with_name("in_children")
CLOCKS = {"cuda": ("cuda_event",), "cpu": ("wall", "cpu")}  # CPU time where other programs compete for the cores
NO_PLAN = re.compile(r"^plan = None.*$", re.MULTILINE)
PLANS = {  # for each challenge, as a learner would write it
    "00": "def plan(a, b, clock, seed): return paired_speedup(a, b, 30, seed, clock)[0]",
    "01": 'plan = {"batch": 2, "dtype": "float32", "threads": 1}',
    "02": 'plan = {"conv": 0, "stage1": 0.5, "stage2": 0.6, "stage3": 0.8, "stage3.2": 0.9}',
    "03": 'plan = {"stage1.0.conv1.weight": 8, "conv.weight": 12}',
    "04": 'plan = {"heads": 12, "neurons": 0.2, "layers": [4], "steps": 2}',
    "05": 'plan = {"stage3.2.conv1": (1, 4), "stage3.2.conv2": (2, 4)}',
    "06": 'plan = {"stage3.2.conv1": (2, 144, 0.9), "stage3.2.conv2": (3, None, 1.0)}',
    "07": 'plan = {"stage3.2.conv1": 4, "stage3.2.conv2": 4}',
    "08": 'plan = {"stage1": 4, "stage2": 4, "stage3": 4}',
    "09": 'plan = {"bits": 4, "parts": {"k_proj": 3}, "group_size": 192, "method": "rtn", "symmetric": "signed"}',
    "10": 'plan = {"images": 2000, "answered": 500, "steps": 3, "temperature": 4.0, "alpha": 0.9, "lr": 0.3}',
    "11": 'plan = {"key_bits": 8, "value_bits": 8, "window": 32}',
    "12": 'plan = dict.fromkeys((3_000, 100_000), {"engine": "onnxruntime", "int8": False, "batch": 1})',
    "13": 'plan = {"steps": ["cut", "heal", "int8"], "ratio": 0.4}',
}


def with_plan(lesson: NotebookNode, plan: str) -> NotebookNode:
    """The lesson, and below its end the challenge with a plan and all that follows, twice."""
    cells = [cell for cell in lesson.cells if cell.cell_type == "code"]
    (at,) = [place for place, cell in enumerate(cells) if "challenge" in tags(cell)]
    for number in (1, 2):
        for cell in cells[at:]:
            again = NotebookNode(cell, id=f"{cell.id}-{number}")
            lesson.cells.append(again)
            if cell is cells[at]:
                again.source = NO_PLAN.sub(plan, cell.source)
                assert again.source != cell.source
        lesson.cells.append(new_code_cell('assert point is not None, "the plan was not placed"'))
    return lesson


def filed_wrongly(record: RunRecord, gpu: str) -> list[str]:
    """The timings that a record files under a machine other than that of their clock."""
    wrong = []
    for part in apart(record):
        kind = kind_of(part.device)
        names_the_gpu = gpu in part.machine["label"]
        for entry in part.measurements:
            detail = getattr(entry, "detail", None) or {}
            clock = detail.get("baseline", detail).get("clock")  # of a comparison, whose sides share a clock
            if clock and (clock not in CLOCKS[kind] or names_the_gpu != (kind == "cuda")):
                wrong.append(f"{entry.name}, on {part.machine['label']} by {clock}")
    return wrong


@pytest.mark.gpu
@pytest.mark.lesson
@pytest.mark.parametrize("number", PLANS)
def test_a_lesson_runs_on_the_device(number: str, tmp_path: Path):
    lesson = notebooks.find(number)
    copy = tmp_path / "lesson" / lesson.name
    copy.parent.mkdir()
    nbformat.write(with_plan(notebooks.read(lesson), PLANS[number]), copy)
    name = torch.cuda.get_device_name()
    pretended = [IN_CHILDREN] if name == device.NAME else []
    folders = filter(None, [*pretended, ROOT, ROOT / "tests", os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    if run.takes_device(lesson, "cuda"):
        environment["LABKIT_DEVICE"] = "cuda"
    record = RunRecord.from_dict(record_at_smoke(copy, tmp_path, environment))
    assert record.checks and all(check.passed for check in record.checks)
    assert not filed_wrongly(record, name)


def test_each_lesson_has_a_plan():
    assert [path.stem[:2] for path in notebooks.all_lessons()] == list(PLANS)


def test_a_time_of_the_cpu_under_the_name_of_the_gpu_is_seen(tmp_path: Path):
    lab = labkit.start("03", preset="smoke", device="cpu", results_dir=tmp_path)
    lab.machine = replace(lab.machine, device="cuda", gpu=Gpu("a card", 1, 2**34, 2**20, 1, "9.0", "580", "13.0"))
    lab.device = torch.device("cuda:0")  # each clock is the CPU's all the same
    lab.measure("a sum", lambda: sum(range(9)), device="cpu")
    record = lab.finish()
    assert filed_wrongly(record, "a card") == []
    (entry,) = record.measurements
    entry.detail["device"] = "cuda:0"
    assert filed_wrongly(record, "a card") == [f"a sum, on {lab.machine.label} by {entry.detail['clock']}"]


@pytest.mark.gpu
def test_a_time_by_the_device_s_clock_of_work_that_it_did_not_do_is_refused():
    if torch.cuda.get_device_name() != device.NAME:
        pytest.skip("A card takes the time.")
    x = torch.ones(4)
    bench.measure(x.cuda().sum, budget_s=0.01)
    with pytest.raises(RuntimeError, match="the device was given nothing"):
        bench.measure(x.sum, device="cuda", budget_s=0.01)
