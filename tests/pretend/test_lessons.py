"""Lessons run on the device at `smoke`, with what nbval compares equal to what is stored."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    shutil.copy(lesson, tmp_path)  # nbval works in the notebook's folder
    options = [
        "-p",
        "course",
        "-p",
        "nbval.plugin",
        "--nbval-lax",
        "--nbval-current-env",
        "--nbval-cell-timeout=3600",
        "-q",
    ]
    command = [sys.executable, "-m", "pytest", *options, f"--rootdir={tmp_path}", tmp_path / lesson.name]
    name = torch.cuda.get_device_name()
    pretended = [IN_CHILDREN] if name == device.NAME else []
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, [*pretended, ROOT, ROOT / "tests"])),
        "LABKIT_PRESET": "smoke",
        "LABKIT_DEVICE": "cuda",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    nbval = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
    assert nbval.returncode == 0, nbval.stdout[-5000:]
    record = json.loads(next(tmp_path.glob("runs/*/record.json")).read_text(encoding="utf-8"))
    assert record["machine"]["gpu"]["name"] == name
    assert record["checks"] and all(check["passed"] for check in record["checks"])
