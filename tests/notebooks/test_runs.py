"""The lessons run at `smoke` without a network, once each, by nbval; one is a learner's copy and a program too."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from commands import record_at_smoke

from course import notebooks, run

FIRST = notebooks.all_lessons()[0]
# Budgets are a laptop's. To empty half a gigabyte of a server's cache before a call takes 0.07 s and 1.2 GB.
LAPTOP_CACHE = 64 * 2**20
# glibc keeps the pages of a freed tensor for the next: to have them anew from the kernel takes 0.06 s for 100 MB.
KEPT_PAGES = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}


@pytest.mark.lesson
@pytest.mark.parametrize("lesson", notebooks.all_lessons(), ids=lambda path: path.stem)
def test_a_lesson_runs_passes_its_checks_and_keeps_to_its_budget(lesson: Path, tmp_path: Path, offline: dict[str, str]):
    """Its stable cells print what is stored. Seconds count as CPU time on one thread: what runs beside adds none."""
    environment = {**offline, **KEPT_PAGES, "OMP_NUM_THREADS": "1"}
    before = cpu_seconds_of_children()
    record = record_at_smoke(lesson, tmp_path, environment)
    seconds = cpu_seconds_of_children() - before
    assert record["preset"] == "smoke" and record["checks"]
    assert all(check["passed"] for check in record["checks"])
    if record["machine"]["last_level_cache"] <= LAPTOP_CACHE:
        assert seconds <= record["budget"]["seconds"] and record["peak_memory"] <= record["budget"]["memory"], record


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)  # theirs too: nbval waits for its kernel
    return used.ru_utime + used.ru_stime


@pytest.mark.lesson
def test_a_learner_s_copy_runs_as_a_program_to_its_end(tmp_path: Path, offline: dict[str, str]):
    """Every second exercise is skipped, and the others are answered wrongly: the worked answers carry the lesson."""
    copy = notebooks.student_copy(notebooks.read(FIRST))
    for cell in [cell for cell in copy.cells if "exercise" in notebooks.tags(cell)][::2]:
        cell.source = re.sub(r"raise NotImplementedError\(.*\)", "return None", cell.source)
    nbformat.write(copy, tmp_path / FIRST.name)
    job = run.prepare(tmp_path / FIRST.name, {"PRESET": "smoke"}, tmp_path / "runs")
    result = run.run(job, env=offline | KEPT_PAGES)
    assert result.error is None
    checks = json.loads((result.folder / "record.json").read_text())["checks"]
    assert [check.get("used") for check in checks] == ["worked"] * len(notebooks.exercises(copy))


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
