import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from course import notebooks, run
from labkit import files
from labkit.errors import InputError
from labkit.records import MIME

pytestmark = pytest.mark.slow  # each starts a lesson

SMOKE = {"PRESET": "smoke"}
FINISH = """
import json, pathlib
record = {"lesson": "01", "machine": {"slug": "test-cpu-2c"}, "ratio": RATIO}
home = pathlib.Path(RESULTS_DIR) / "01"
home.mkdir()
_ = (home / "record.json").write_text(json.dumps(record))
"""
WHO = """
import os, sys
ballast = bytearray(300_000_000)
print(sys.executable, os.environ["LABKIT_PRESET"], os.getcwd() == os.path.realpath("."), RATIO, PRESET)
RATIO
"""


def execute(notebook: Path, given: dict, out: Path, **options: object) -> run.Run:
    return run.run(run.prepare(notebook, given, out), **options)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, write_lesson: Callable[..., Path]) -> tuple[run.Run, Path]:
    """One good run at a changed parameter; a broken kernelspec called python3 is in the way."""
    home = tmp_path_factory.mktemp("good")
    kernel = home / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text('{"argv": ["/nowhere/python", "{connection_file}"], "display_name": "x", "language": "python"}')
    notebook = write_lesson(home / "notebooks", WHO, FINISH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(home / "jupyter"))
        return execute(notebook, {**SMOKE, "RATIO": "0.25"}, home / "runs"), notebook


def outputs(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_lesson_gets_this_interpreter_its_parameters_and_its_own_folder(good):
    assert outputs(good[0].notebook) == f"{sys.executable} smoke True 0.25 smoke\n"


def test_the_result_folder_is_complete_and_alone(good):
    result, _ = good
    assert left_in(result.folder) == ["01_small.ipynb", "record.json", "run.json"]
    assert left_in(result.folder.parent) == [result.folder.name]
    assert json.loads(result.record.read_text())["ratio"] == 0.25


def test_run_json_says_what_ran(good):
    summary = json.loads((good[0].folder / "run.json").read_text())
    assert (summary["status"], summary["error"]) == ("done", None)
    assert summary["parameters"] == {"PRESET": "smoke", "RATIO": 0.25, "RESULTS_DIR": "."}
    assert 0 < summary["seconds"] < 60


def test_peak_memory_holds_what_the_lesson_took(good):
    assert 300_000_000 < good[0].peak_memory < 1_500_000_000


def test_running_leaves_the_lesson_as_it_was(good):
    assert all(not cell.get("outputs") for cell in nbformat.read(good[1], as_version=4).cells)


def test_no_machine_path_stands_in_the_executed_notebook(good):
    assert str(good[0].folder.parent) not in good[0].notebook.read_text().replace(sys.executable, "")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"RATI0": 1}, "no parameter RATI0; did you mean RATIO"),
        ({"RATIO": 2}, "give a number from 0 to 1"),
    ],
)
def test_bad_parameters_are_refused_before_anything_is_written(tmp_path: Path, write_lesson, given, sentence):
    notebook = write_lesson(tmp_path / "notebooks", "1", ranges={"RATIO": [0, 1]})
    with pytest.raises(InputError, match=sentence):
        execute(notebook, given, tmp_path / "runs")
    assert left_in(tmp_path) == ["notebooks"]


def test_the_same_run_has_the_same_name_and_another_has_another(tmp_path: Path, write_lesson, monkeypatch):
    lesson, changed = write_lesson(tmp_path / "a", "1"), write_lesson(tmp_path / "b", "2")

    def name(notebook: Path, **given: object) -> str:
        return run.prepare(notebook, {**SMOKE, **given}, tmp_path).folder().name

    names = [name(lesson, SEED=1, RATIO=2), name(lesson, SEED=3), name(changed, SEED=1, RATIO=2), name(lesson)]
    assert name(lesson, RATIO="2", SEED=1) == names[0] and len(set(names)) == 4
    assert name(lesson, SEED=0, RATIO=0.5) == name(lesson)  # a default given by hand is the same run
    monkeypatch.setattr(run, "code_version", lambda: "another")
    assert name(lesson) not in names


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("1 / 0", "ZeroDivisionError", "division by zero"),
        ("import os; os._exit(1)", "DeadKernel", "the kernel was killed, most often because memory ran out; take a "),
    ],
)
def test_a_failure_is_told_with_its_cell(tmp_path: Path, write_lesson, code: str, name: str, message: str):
    began = time.monotonic()
    result = execute(write_lesson(tmp_path, "1", code), SMOKE, tmp_path / "runs")
    assert result.error == run.Failure(name, result.error.message, 5, "Its work")
    assert result.error.message.startswith(message)
    assert time.monotonic() - began < 40  # at once, not after a time limit of minutes
    assert json.loads((result.folder / "run.json").read_text())["status"] == "failed"
    assert result.folder.name.endswith("-failed")


def test_a_failed_run_does_not_replace_a_good_one_and_a_good_one_clears_it(tmp_path: Path, write_lesson):
    flag = tmp_path / "fail"
    notebook = write_lesson(tmp_path, f"import os; assert not os.path.exists({str(flag)!r}), 'as told'")
    good = execute(notebook, SMOKE, tmp_path / "runs")
    flag.touch()
    failed = execute(notebook, SMOKE, tmp_path / "runs")
    assert failed.error and left_in(good.folder.parent) == [good.folder.name, failed.folder.name]
    flag.unlink()
    execute(notebook, SMOKE, tmp_path / "runs")
    assert left_in(good.folder.parent) == [good.folder.name]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_and_no_half_result(tmp_path: Path, write_lesson, end: signal.Signals):
    pids = tmp_path / "pids"
    notebook = write_lesson(
        tmp_path,
        f"import os, subprocess, pathlib\nchild = subprocess.Popen(['sleep', '1000'])\n"
        f"_ = pathlib.Path({str(pids)!r}).write_text(f'{{os.getpid()}} {{child.pid}}\\n')\nchild.wait()",
    )
    script = (
        f"from pathlib import Path; from course.run import *; run(prepare(Path({str(notebook)!r}), {{}}, Path('r')))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL)
    _wait_until(lambda: pids.exists() and pids.read_text().endswith("\n"), 60)
    kernel, sleeper = map(int, pids.read_text().split())
    started = [kernel, sleeper, psutil.Process(kernel).ppid()]
    parent.send_signal(end)
    parent.wait(20)
    _wait_until(lambda: not any(_runs(pid) for pid in started), 20)
    _wait_until(lambda: left_in(tmp_path / "r" / "01_small") == [], 5)


def test_a_run_is_stopped_from_another_thread(tmp_path: Path, write_lesson):
    stop, flag = threading.Event(), tmp_path / "flag"
    notebook = write_lesson(tmp_path, f"open({str(flag)!r}, 'w').close(); import time; time.sleep(1000)")
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(execute, notebook, SMOKE, tmp_path / "r", stop=stop)
        _wait_until(flag.exists, 60)
        stop.set()
        with pytest.raises(run.Stopped, match="nothing of it was kept"):
            running.result(60)
    assert left_in(tmp_path / "r" / "01_small") == []


BUSY = "import time\nwhile True: sum(range(10**6))"


@pytest.mark.parametrize(
    ("limits", "code", "message"),
    [
        ({"IDLE_SECONDS": 6, "IDLE_CPU_SECONDS": 0.5}, "import time; time.sleep(1000)", "there was no output, and the"),
        ({"LONGEST_SECONDS": 9}, BUSY, "the run took more than 0.15 min"),
    ],
)
def test_a_run_that_hangs_ends_and_keeps_what_it_had(tmp_path: Path, write_lesson, monkeypatch, limits, code, message):
    for name, value in limits.items():
        monkeypatch.setattr(run, name, value)
    result = execute(write_lesson(tmp_path, "print('so far')", code), SMOKE, tmp_path / "r")
    assert str(result.error).startswith(f"RunTimeout in cell 5 (Its work): {message}")
    assert "look for what the cell waits for" in result.error.message and outputs(result.notebook) == "so far\n"
    assert result.seconds < 40


@pytest.mark.parametrize(
    "code",
    [
        "import time\nend = time.time() + 12\nwhile time.time() < end: sum(range(10**6))",
        "import time\nfor _ in range(6): time.sleep(2); print('still here', flush=True)",
    ],
)
def test_a_slow_run_that_works_or_prints_is_not_ended(tmp_path: Path, write_lesson, monkeypatch, code: str):
    monkeypatch.setattr(run, "IDLE_SECONDS", 8)
    monkeypatch.setattr(run, "IDLE_CPU_SECONDS", 2)
    assert execute(write_lesson(tmp_path, code), SMOKE, tmp_path / "r").error is None


def test_progress_is_a_line_a_section(tmp_path: Path, write_lesson, capfd: pytest.CaptureFixture):
    execute(write_lesson(tmp_path, "1", "2"), SMOKE, tmp_path / "r", progress=True)
    lines = capfd.readouterr().err.splitlines()
    assert [re.sub(" +[0-9]+ s ", "", line) for line in lines] == [
        "01  cell  0/5 A small lesson",
        "01  cell  3/5 Its work",
    ]


def test_what_is_set_for_the_lesson_is_seen_there_and_makes_no_other_result(tmp_path: Path, write_lesson, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")  # as Dask does
    asked = ("CUDA_VISIBLE_DEVICES", "LABKIT_PRESET", "MALLOC_TRIM_THRESHOLD_")
    notebook = write_lesson(
        tmp_path, f"import os; print(*[os.environ[name] for name in {asked} if name in os.environ])"
    )
    job = run.prepare(notebook, SMOKE, tmp_path / "r")
    result = run.run(job, env={"CUDA_VISIBLE_DEVICES": "3"})
    assert outputs(result.notebook) == "3 smoke\n"
    assert run.read(job.folder()).folder == result.folder


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"still waiting after {seconds} s"
        time.sleep(0.1)


@pytest.mark.timing
def test_a_run_costs_less_than_a_second_over_papermill_alone(tmp_path: Path):
    overhead = runpy.run_path(str(files.ROOT / "benchmarks" / "run_overhead.py"))
    calls = overhead["ways"](tmp_path)
    del calls["labkit run"]
    _, _, most = overhead["overhead"](overhead["measure"](calls, rounds=9), "run.run")  # one round may be disturbed
    assert most < 1.0


# what of a notebook is kept


def test_a_tidied_notebook_has_no_trace_of_papermill(good):
    kept = notebooks.tidied(nbformat.read(good[0].notebook, as_version=4))
    source = nbformat.read(good[1], as_version=4)
    assert [cell.id for cell in kept.cells] == [cell.id for cell in source.cells]
    assert [cell.source for cell in kept.cells] == [cell.source for cell in source.cells]
    assert [cell.execution_count for cell in kept.cells if cell.cell_type == "code"] == [1, 2, 3]
    assert [output.execution_count for output in kept.cells[3].outputs if "execution_count" in output] == [2]
    assert "papermill" not in nbformat.writes(kept) and "iopub" not in nbformat.writes(kept)
    nbformat.validate(kept)


def test_a_tidied_notebook_leaves_samples_and_rows_to_the_record_s_own_file():
    timing = {"kind": "comparison", "name": "a", "value": 2.0, "detail": {"samples_s": [0.1] * 50}}
    table = {"kind": "table", "name": "b", "rows": [{"x": 1}] * 50}
    output = new_output("display_data", data={MIME: {"measurements": [timing, table], "lesson": "01"}})
    notebook = new_notebook(cells=[new_code_cell("lab.finish()", outputs=[output], execution_count=1)])
    kept = notebooks.tidied(notebook).cells[0].outputs[0].data[MIME]
    short = [{"kind": "comparison", "name": "a", "value": 2.0}, {"kind": "table", "name": "b"}]
    assert kept == {"measurements": short, "lesson": "01"}
    assert notebook.cells[0].outputs[0].data[MIME]["measurements"] == [timing, table]


def test_tidying_twice_changes_nothing(good):
    once = notebooks.tidied(nbformat.read(good[0].notebook, as_version=4))
    assert nbformat.writes(notebooks.tidied(once)) == nbformat.writes(once)


# finding results


def test_a_result_is_read_again(good):
    result, notebook = good
    job = run.prepare(notebook, {"RATIO": "0.25", "SEED": 0, **SMOKE}, result.folder.parent.parent)
    again = run.read(job.folder())
    assert (again.folder, again.parameters, again.error) == (result.folder, result.parameters, None)
    assert again.peak_memory == result.peak_memory and again.seconds == pytest.approx(result.seconds, abs=1e-3)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"lesson": "01"}'])
def test_what_is_no_result_is_none(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert run.read(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "counts"),
    [("new.py", True), ("pruning/csrc/sparse_linear.cpp", True), ("page.html", False), ("__pycache__/new.pyc", False)],
)
def test_the_version_of_the_code_is_that_of_its_sources(tmp_path: Path, monkeypatch, file: str, counts: bool):
    package = tmp_path / "labkit"
    shutil.copytree(files.ROOT / "labkit", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(files, "ROOT", tmp_path)
    before = run.code_version()
    (package / file).parent.mkdir(exist_ok=True)
    (package / file).open("a").write("changed")
    assert (run.code_version() != before) == counts


def test_another_version_of_torch_is_another_code(monkeypatch: pytest.MonkeyPatch):
    before = run.code_version()
    monkeypatch.setattr(run.metadata, "version", lambda package: "0.0")
    assert run.code_version() != before
