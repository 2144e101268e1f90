"""The calls on the device show faults that the CPU does not: planted in a copy of labkit, 20 by a seed.

A fault with which a call raises on the CPU too is none of the 20: another of its kind is drawn in its place.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from labkit.files import ROOT
from pretend import device
from pretend.faults import Fault

NUMBER, SEEN_AT_LEAST = 20, 19
RAISES_ON_CPU = """
import json, sys
from pretend import trials
from pretend.faults import Fault
raises = [trials.raises_on_cpu(Fault(**fault), sys.argv[2:]) for fault in json.loads(sys.argv[1])]
print(json.dumps(raises))
"""


@pytest.fixture
def copy_of_labkit(tmp_path: Path) -> Path:
    """A folder with a copy of labkit, and its data."""
    shutil.copytree(ROOT / "labkit", tmp_path / "labkit", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").symlink_to(ROOT / "data", target_is_directory=True)
    return tmp_path


@pytest.mark.slow
def test_a_fault_that_raises_on_the_cpu_too_is_told_from_others(copy_of_labkit: Path):
    file = copy_of_labkit / "labkit" / "quantization" / "affine.py"
    source = file.read_text(encoding="utf-8")
    line = "    reference = reference.detach().double()\n"
    end = source.index(line) + len(line)
    faults = []
    for statement in ("reference.bfloat16().numpy()", "reference = reference.cpu()"):
        fault = Fault("by hand", str(file), source[:end].count("\n"), end, end, f"    {statement}\n")
        faults.append(asdict(fault))
    in_json = json.dumps(faults)
    command = [sys.executable, "-c", RAISES_ON_CPU, in_json, "affine.sqnr"]  # where labkit is not imported yet
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [True, False]
    assert file.read_text(encoding="utf-8") == source


def environment() -> dict[str, str]:
    folders = filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}


@pytest.mark.gpu
@pytest.mark.nightly
def test_planted_faults_are_seen(copy_of_labkit: Path):
    if torch.cuda.get_device_name() != device.NAME:
        pytest.skip("The faults are planted for the pretend device, and a card is here.")
    command = [sys.executable, "-m", "pretend.trials", str(copy_of_labkit), "0", str(NUMBER)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        print(row["fault"], "->", row["seen_by"], row["complaint"].partition("\n")[0])
    unseen = [row["fault"] for row in rows if row["seen_by"] is None]
    assert len(rows) == NUMBER
    assert len(rows) - len(unseen) >= SEEN_AT_LEAST, unseen
