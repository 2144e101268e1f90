"""The lessons run at `smoke` without a network, each once, by nbval; one also as a program and as a learner's copy."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nbclient import NotebookClient

from course import notebooks

LESSONS = [  # a lesson's tests share one run, so one worker does them all
    pytest.param(path, id=path.stem, marks=pytest.mark.xdist_group(path.stem)) for path in notebooks.all_lessons()
]
SHORTEST = notebooks.find("01")


@pytest.fixture(scope="module", params=LESSONS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, offline: dict[str, str]):
    """What nbval said of a lesson, and the record that its last cell wrote."""
    folder = tmp_path_factory.mktemp("nbval")
    lesson = shutil.copy(request.param, folder)  # nbval works in the notebook's folder
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=3600", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", *options, f"--rootdir={folder}", lesson]
    environment = {**offline, "LABKIT_PRESET": "smoke"}
    if "PYTEST_XDIST_WORKER" in os.environ:
        environment["OMP_NUM_THREADS"] = "1"  # another lesson runs beside it
    nbval = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    records = list(folder.glob("runs/*/record.json"))
    return nbval, json.loads(records[0].read_text()) if records else None


@pytest.mark.lesson
def test_it_runs_and_its_stable_cells_print_what_is_stored(run):
    nbval, _ = run
    assert nbval.returncode == 0, nbval.stdout[-5000:]


@pytest.mark.lesson
def test_it_passes_its_checks_within_its_budget(run):
    _, record = run
    assert record["preset"] == "smoke" and record["checks"]
    assert all(check["passed"] for check in record["checks"])
    assert record["budget"]["within"], (record["seconds"], record["peak_memory"], record["budget"])


@pytest.mark.lesson
@pytest.mark.xdist_group(SHORTEST.stem)
def test_a_lesson_runs_as_a_program(tmp_path: Path, offline: dict[str, str]):
    command = [sys.executable, "-m", "course.cli", "run", SHORTEST.stem, "--preset", "smoke", "--out", tmp_path]
    program = subprocess.run(command, env=offline, capture_output=True, text=True)
    assert program.returncode == 0, program.stderr
    assert len(list(tmp_path.glob("*/*/record.json"))) == 1 and (tmp_path / "report.html").exists()


@pytest.mark.lesson
@pytest.mark.xdist_group(SHORTEST.stem)
@pytest.mark.parametrize("answer", ["a stub", "return None"])
def test_a_learner_s_copy_runs_to_its_end(tmp_path: Path, offline: dict[str, str], answer: str):
    copy = notebooks.student_copy(notebooks.read(SHORTEST))
    if not any("challenge" in notebooks.tags(cell) for cell in copy.cells):
        pytest.xfail("not rewritten yet: its cells call the exercises' functions themselves, or none")
    for cell in copy.cells:
        if "exercise" in notebooks.tags(cell) and answer != "a stub":
            cell.source = re.sub(r"raise NotImplementedError\(.*\)", answer, cell.source)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(copy, timeout=None, kernel_name="python3", resources=resources).execute(
        env={**offline, "LABKIT_PRESET": "smoke"}
    )
    (record,) = tmp_path.glob("runs/*/record.json")
    checks = json.loads(record.read_text())["checks"]
    assert [check.get("used") for check in checks] == ["worked"] * len(notebooks.exercises(copy))


# the blocked network -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)",
        "import socket; socket.getaddrinfo('example.org', 80)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        "import urllib.request; urllib.request.urlopen('http://example.org', timeout=5)",
    ],
)
def test_the_network_is_blocked(code: str, offline: dict[str, str]):
    said = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, timeout=60).stderr
    assert "the network is blocked" in said


def test_loopback_is_open(offline: dict[str, str]):
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())"
    assert subprocess.run([sys.executable, "-c", code], env=offline, timeout=60).returncode == 0
