"""Lessons meet comparisons of too few pairs for an interval, as a busy machine gives them."""

import os
import shutil
from pathlib import Path

import pytest
from commands import record_at_smoke

from course import notebooks
from labkit.files import ROOT

JUDGED = "    _check_comparison(names, check, builds, seed)\n"
SPENT = "    budget_s = budget_s if clock else 1e-6\n"  # simulated clocks are never late


@pytest.fixture
def hurried(tmp_path: Path, offline: dict[str, str]) -> dict[str, str]:
    """An environment with a copy of labkit in which the time of a comparison is over after a block of pairs."""
    shutil.copytree(ROOT / "labkit", tmp_path / "labkit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("data", "notebooks"):
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    bench = tmp_path / "labkit" / "timing" / "bench.py"
    source = bench.read_text(encoding="utf-8")
    assert source.count(JUDGED) == 1
    bench.write_text(source.replace(JUDGED, JUDGED + SPENT), encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT), offline["PYTHONPATH"]])
    return {**offline, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.nightly
@pytest.mark.parametrize("lesson", notebooks.all_lessons(), ids=lambda path: path.stem)
def test_a_lesson_stands_without_an_interval(lesson: Path, tmp_path: Path, hurried: dict[str, str]):
    (tmp_path / "run").mkdir()
    record = record_at_smoke(lesson, tmp_path / "run", hurried)
    compared = [row for row in record["measurements"] if row["kind"] == "comparison"]
    # over builds there is an interval, of a block each
    verdicts = {row["verdict"] for row in compared if not row["detail"].get("pairs_per_build")}
    assert not verdicts or "inconclusive" in verdicts
    assert all(check["passed"] for check in record["checks"])
