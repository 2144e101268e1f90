import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
from click.testing import CliRunner, Result

from course import run
from course.cli import main
from labkit import fetch, files


def labkit(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course without lessons, so that a test writes its own."""
    (tmp_path / "notebooks").mkdir()
    shutil.copy(files.NOTEBOOKS / "claims.toml", tmp_path / "notebooks")
    monkeypatch.setattr(files, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(files, "RECORDED", tmp_path / "recorded")
    monkeypatch.delenv("LABKIT_PRESET", raising=False)
    return tmp_path


def reported(result: Result) -> Path:
    """The file behind the address that the command printed last."""
    address = re.search(r"file://\S+", result.stdout.splitlines()[-1])
    return Path(url2pathname(urlparse(address[0]).path))


def test_help_does_not_wait_for_torch():
    code = "import sys, course.cli; sys.exit(bool({'torch', 'papermill', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_run_begins_before_what_only_its_end_needs_is_imported(course: Path, write_lesson):
    write_lesson(course / "notebooks", "1")
    code = (
        "import sys, pathlib, course.cli as c; from course import run;"
        "c.files.NOTEBOOKS = pathlib.Path(sys.argv.pop(1));"
        "run.run = lambda *_, **__: sys.exit(len({'torch', 'nbformat', 'pandas', 'matplotlib'} & set(sys.modules)));"
        "c.main()"
    )
    asked = [sys.executable, "-c", code, course / "notebooks", "run", "1"]
    assert subprocess.run(asked, timeout=60).returncode == 0


def test_the_module_is_the_command():
    asked = [sys.executable, "-m", "course.cli", "--help"]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout
    assert all(
        command in said for command in ("doctor", "run", "report", "start", "solution", "release", "grade", "data")
    )


@pytest.mark.slow
def test_all_lessons_run_although_one_fails(course: Path, write_lesson: Callable[..., Path]):
    write_lesson(course / "notebooks", "1 / 0", name="01_bad")
    write_lesson(course / "notebooks", "assert PRESET == 'smoke'", name="02_good")
    result = labkit("run", "--out", course / "runs")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines[-3:-1]] == [["failed", "01_bad"], ["done", "02_good"]]
    assert "01_bad stopped: ZeroDivisionError in cell 4 (Its work): division by zero" in result.stderr
    assert "Traceback" not in result.stderr
    assert "ZeroDivisionError" in reported(result).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "environment", "preset"),
    [((), None, "class"), (("--preset", "full"), "smoke", "full"), ((), "smoke", "smoke")],
)
def test_one_lesson_runs_at_class_unless_told_otherwise(
    course: Path, write_lesson, monkeypatch, options: tuple[str, ...], environment: str | None, preset: str
):
    if environment:
        monkeypatch.setenv("LABKIT_PRESET", environment)
    code = f"import os; assert PRESET == os.environ['LABKIT_PRESET'] == {preset!r} and RATIO == 0.25"
    write_lesson(course / "notebooks", code)
    result = labkit("run", "1", "--out", course / "runs", "-p", "RATIO", "0.25", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("done    01_small")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("run", "9"), "There is no lesson 9; give the number of one that exists: 01."),
        (("run", "1", "-p", "RATOI", "1"), "This lesson has no parameter RATOI; did you mean RATIO?"),
        (("run", "1", "-p", "SEED", "2.5"), "SEED cannot be '2.5'; give a whole number, like its default 0."),
        (("run", "--record"), "A smoke run is too small to be a reference; record one at --preset class or full."),
        (
            ("run", "1", "--record", "-p", "SEED", "7"),
            "A reference run keeps the lesson's own values; leave out -p SEED.",
        ),
        (("start", "9"), "There is no lesson 9; give the number of one that exists: 01."),
        (
            ("report", "nowhere"),
            "There is no folder nowhere; run a lesson first (./lab run 01), or name another folder.",
        ),
    ],
)
def test_a_mistake_gets_one_sentence_and_code_2(course: Path, write_lesson, arguments: tuple, sentence: str):
    write_lesson(course / "notebooks", "1")
    result = labkit(*arguments)
    assert (result.exit_code, result.stderr, result.stdout) == (2, f"Error: {sentence}\n", "")


def test_a_lesson_is_taken_left_and_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from course import notebooks

    opened = []
    monkeypatch.setattr(notebooks, "open_in_jupyterlab", lambda own, browser: opened.append((own.name, browser)) or 0)
    monkeypatch.setattr(notebooks, "WORKSPACE", tmp_path)
    first = labkit("start", "3", "--no-browser")
    assert first.exit_code == 0 and first.output.startswith(f"your copy: {tmp_path / '03_structured'}")
    own = tmp_path / "03_structured_pruning_cnns.ipynb"
    work = own.read_text().replace("raise NotImplementedError", "pass  # raise NotImplementedError")
    own.write_text(re.sub(r'"source": "\w{16}"', '"source": "0123456789abcdef"', work))  # an older lesson's copy
    again = labkit("start", "03")
    assert "lesson 03 has changed since this copy was made; your work stays as it is" in again.output
    assert "./lab start 03 --fresh" in again.output and "pass  # raise" in own.read_text()
    fresh = labkit("start", "03", "--fresh")
    kept = Path(re.search(r"the copy that you had: (.+)", fresh.output)[1])
    assert "pass  # raise" in kept.read_text() and "pass  # raise" not in own.read_text()
    assert "has changed" not in fresh.output and opened == [(own.name, False), (own.name, True), (own.name, True)]


def test_a_worked_answer_is_shown_to_who_asks():
    result = labkit("solution", "3.1")
    assert result.exit_code == 0 and result.output.startswith("def cut(") and "SOLUTION" not in result.output


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("3", "Error: '3' is no exercise; give lesson and number, like 03.1."),
        ("03.9", "Error: There is no exercise 03.9; lesson 03 has 03.1, 03.2, 03.3."),
        ("99.1", "Error: There is no lesson 99"),
    ],
)
def test_an_exercise_that_is_not_there(asked: str, sentence: str):
    result = labkit("solution", asked)
    assert result.exit_code == 2 and result.stderr.startswith(sentence)


def test_a_course_without_lessons_says_so(course: Path):
    result = labkit("run")
    assert result.exit_code == 2 and "There is no lesson to run" in result.stderr


def test_a_bug_keeps_its_traceback(course: Path, write_lesson, monkeypatch: pytest.MonkeyPatch):
    write_lesson(course / "notebooks", "1")
    monkeypatch.setattr(run, "prepare", lambda *_, **__: 1 / 0)
    assert isinstance(labkit("run", "1").exception, ZeroDivisionError)


@pytest.mark.slow
def test_a_terminated_command_says_what_was_kept_and_leaves_nothing(course: Path, write_lesson):
    flag = course / "started"
    write_lesson(course / "notebooks", f"open({str(flag)!r}, 'w'); import time; time.sleep(1000)")
    code = "import sys, pathlib, course.cli as c; c.files.NOTEBOOKS = pathlib.Path(sys.argv.pop(1)); c.main()"
    command = [sys.executable, "-c", code, course / "notebooks", "run", "1", "--out", course / "runs"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while not flag.exists():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; the lesson under way left nothing behind" in said and "Traceback" not in said
    assert list((course / "runs" / "01_small").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        ((), [("-n", "2", "not lesson and not timing"), ("lesson or timing",)]),
        (("--quick",), [("-n", "2", "not slow and not lesson and not timing")]),
        (("tests/labkit", "-x", "-k", "a"), [("tests/labkit", "-x", "-k", "a")]),
    ],
)
@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 5)])
def test_the_tests_run_in_parallel_unless_they_read_a_clock(monkeypatch, arguments: tuple, calls: list, codes: tuple):
    commands = []
    monkeypatch.setattr(subprocess, "call", lambda command, **_: commands.append(command) or codes[len(commands) - 1])
    result = labkit("test", *arguments)
    assert len(commands) == len(calls) and result.exit_code == max(codes[: len(calls)])
    assert all(set(call) <= set(command) for call, command in zip(calls, commands, strict=True))


def test_data_is_listed_with_its_state():
    rows = labkit("data", "list").stdout.splitlines()
    assert len(rows) == len(fetch.assets())
    assert all(row.split()[0] in ("ready", "missing", "damaged") for row in rows)


@pytest.mark.slow
def test_committed_data_verifies():
    committed = [name for name, entry in fetch.assets().items() if not entry.carrier]
    result = labkit("data", "verify", *committed)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("ready") == len(committed)


def test_verify_names_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    result = labkit("data", "verify", fetch.models()[0])
    assert result.exit_code == 2 and "is missing" in result.stderr and "data fetch" in result.stderr


def test_an_unknown_name_is_refused():
    result = labkit("data", "fetch", "no-such-model")
    assert result.exit_code == 2 and "'no-such-model'" in result.stderr


@pytest.mark.slow
def test_doctor_tells_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "none"))
    result = labkit("doctor")
    state = {line.split()[1]: line.split()[0] for line in result.stdout.splitlines()}
    assert {state[name] for name in ("python", "packages", "torch", "device", "threads", "kernel")} == {"OK"}
    assert state["data"] == "FAIL" and "run ./lab data fetch" in result.stdout
    assert result.exit_code == 1 and not (tmp_path / "none" / fetch.models()[0]).exists()
