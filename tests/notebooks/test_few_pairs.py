"""Lessons meet comparisons of too few pairs for an interval, as a busy machine gives them."""

import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from commands import record_at_smoke
from lesson_cells import executed

from course import notebooks
from labkit.files import ROOT

NO_ENDS = (0.0, math.inf)
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
    verdicts = {row["verdict"] for row in record["measurements"] if row["kind"] == "comparison"}
    assert not verdicts or "inconclusive" in verdicts  # over builds there is an interval, of a block each
    assert all(check["passed"] for check in record["checks"])


@pytest.mark.parametrize(
    ("intervals", "words"),
    [
        ([(1.0, 1.1), (1.0, 1.2)], "by 0.0%. The interval of a single run spans 15.0% (median)."),
        ([(1.0, 1.1), NO_ENDS], "The interval of a single run spans 10.0% (median). Some runs made too few calls"),
        ([NO_ENDS, NO_ENDS], "of the fresh processes by 0.0%. Some runs made too few calls"),
    ],
)
def test_lesson_00_tells_of_processes_without_an_interval(intervals: list[tuple[float, float]], words: str):
    lab = mock.Mock()
    comparisons = [SimpleNamespace(process_speedup=1.05, within_run=interval) for interval in intervals]
    cold = SimpleNamespace(processes=(), ci95=NO_ENDS, within_run=NO_ENDS)
    measured = {
        "this": SimpleNamespace(verdict="faster", processes=()),
        "here": comparisons,
        "fresh": comparisons,
        "cold": cold,
    }
    executed("00", "processes-apart", "processes-say", lab=lab, **measured)
    _, *sentences = lab.say.call_args.args
    assert words in " ".join(sentence for sentence in sentences if sentence)
