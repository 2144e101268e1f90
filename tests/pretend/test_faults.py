"""The calls on the device show faults that the CPU does not: planted in a copy of labkit, 20 by a seed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from labkit.files import ROOT

NUMBER, SEEN_AT_LEAST = 20, 19


@pytest.mark.gpu
@pytest.mark.nightly
def test_planted_faults_are_seen(tmp_path: Path):
    shutil.copytree(ROOT / "labkit", tmp_path / "labkit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data", tmp_path / "data")
    command = [sys.executable, "-m", "pretend.trials", str(tmp_path), "0", str(NUMBER)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        print(row["fault"], "->", row["seen_by"], row["complaint"].partition("\n")[0])
    unseen = [row["fault"] for row in rows if row["seen_by"] is None]
    assert len(rows) == NUMBER
    assert len(rows) - len(unseen) >= SEEN_AT_LEAST, unseen
