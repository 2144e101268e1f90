"""Lessons run on the device at `smoke`, with what nbval compares equal to what is stored."""

import os
from pathlib import Path

import pytest
import torch
from commands import record_at_smoke

from course import notebooks
from labkit.files import ROOT
from pretend import device

LESSONS = ("03", "07")
IN_CHILDREN = Path(__file__).with_name("in_children")


@pytest.mark.gpu
@pytest.mark.lesson
@pytest.mark.parametrize("number", LESSONS)
def test_a_lesson_runs_on_the_device(number: str, tmp_path: Path):
    lesson = notebooks.find(number)
    name = torch.cuda.get_device_name()
    pretended = [IN_CHILDREN] if name == device.NAME else []
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, [*pretended, ROOT, ROOT / "tests"])),
        "LABKIT_DEVICE": "cuda",
    }
    record = record_at_smoke(lesson, tmp_path, os.environ | settings)
    assert record["machine"]["gpu"]["name"] == name
    assert record["checks"] and all(check["passed"] for check in record["checks"])
