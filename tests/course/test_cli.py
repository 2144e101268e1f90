import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import psutil
import pytest
import torch
from click.testing import Result
from commands import accepts_connections, labkit, wait_until
from run_records import RECORD

from course import notebooks, run
from labkit.data import fetch
from labkit.lesson import records


def reported(result: Result) -> Path:
    """The file behind the address that the command printed last."""
    address = re.search(r"file://\S+", result.stdout.splitlines()[-1])
    return Path(url2pathname(urlparse(address[0]).path))


HEAVY = {"torch", "nbformat", "papermill", "pandas", "scipy", "matplotlib"}


def test_help_imports_nothing_that_takes_time():
    command = [sys.executable, "-X", "importtime", "-m", "course.cli", "run", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("Usage: ") and "NN is a lesson's number" in done.stdout
    assert not HEAVY & {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_a_run_begins_before_what_only_its_end_needs_is_imported(empty_course: Path, write_lesson):
    write_lesson(empty_course / "notebooks", "1")
    code = (
        "import sys, pathlib, course.cli as c; from course import run;"
        "c.files.NOTEBOOKS = pathlib.Path(sys.argv.pop(1));"
        f"run.run = lambda *_, **__: sys.exit(len({HEAVY} & set(sys.modules)));"
        "c.main()"
    )
    command = [sys.executable, "-c", code, empty_course / "notebooks", "run", "1"]
    assert subprocess.run(command, timeout=60).returncode == 0


@pytest.mark.slow
def test_all_lessons_run_although_one_fails(empty_course: Path, write_lesson: Callable[..., Path]):
    write_lesson(empty_course / "notebooks", "1 / 0", name="01_bad")
    write_lesson(empty_course / "notebooks", "assert PRESET == 'smoke'", name="02_good")
    result = labkit("run", "--out", empty_course / "it's a tür")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert [line.split()[:2] for line in lines[-4:-2]] == [["failed", "01_bad"], ["done", "02_good"]]
    assert lines[-2].startswith("note    smoke tries the code; run class to see.")
    assert "01_bad stopped: ZeroDivisionError in cell 4 (Its work): division by zero" in result.stderr
    assert "Traceback" not in result.stderr
    assert "ZeroDivisionError" in reported(result).read_text()


@pytest.mark.parametrize(
    ("options", "environment", "preset"),
    [
        (("1",), None, "class"),
        (("1", "--preset", "full"), "smoke", "full"),
        (("1",), "full", "full"),
        ((), "", "smoke"),
    ],
)
def test_one_lesson_runs_at_class_and_all_at_smoke_unless_told_otherwise(
    empty_course: Path, write_lesson, monkeypatch, options: tuple[str, ...], environment: str | None, preset: str
):
    asked = []
    monkeypatch.setattr(run, "prepare", lambda path, values, out: asked.append(values) or sys.exit(9))
    monkeypatch.setenv("LABKIT_PRESET", environment or "")
    write_lesson(empty_course / "notebooks", "1")
    assert labkit("run", *options, "-p", "RATIO", "0.25").exit_code == 9
    assert asked == [{"PRESET": preset, "RATIO": "0.25"}]


@pytest.mark.slow
def test_a_good_result_is_run_again_unless_it_is_resumed_and_smoke_says_in_a_line_what_it_is(
    empty_course: Path, write_lesson
):
    write_lesson(
        empty_course / "notebooks", "import os; assert PRESET == os.environ['LABKIT_PRESET'] and RATIO == 0.25"
    )

    def asked(preset: str, *options: str) -> list[str]:
        """Run the lesson, and return the notes."""
        words = ("run", "1", "--preset", preset, "-p", "RATIO", "0.25", "--out", empty_course / "runs", *options)
        result = labkit(*words)
        assert result.exit_code == 0 and result.stdout.startswith("done    01_small"), result.output
        return [line for line in result.stdout.splitlines() if line.startswith("note")]

    def created() -> int:
        [folder] = (empty_course / "runs" / "01_small").glob("smoke-*")
        return (folder / "run.json").stat().st_mtime_ns

    alone = "note    smoke tries the code; run class to see."
    assert asked("smoke") == [alone]
    first = created()
    records.write(RECORD, empty_course / "recorded" / "a machine" / "01.json")
    beside = f"{alone} The report shows the recorded results instead, of 01."
    assert asked("smoke", "--resume") == [beside] and created() == first
    assert asked("class") == []
    assert asked("smoke") == [beside] and created() > first


NO_GPU = r"is not there \(torch sees .*\); choose auto or cpu, or fix the driver."
REFUSED = [
    (("run", "9"), "There is no lesson 9; give the number of one that exists: 01, 02."),
    (("run", "1", "-p", "RATOI", "0.3"), r"This lesson has no parameter RATOI; did you mean RATIO\?"),
    (("run", "1", "-p", "RATIO", "2"), r"RATIO cannot be 2; give a number from 0\.0 to 1\.0\."),
    (("run", "1", "-p", "DEVICE", "gpu"), "device is 'gpu'; choose auto, cpu, cuda or cuda:N."),
    (("run", "1", "--device", "cuda:99"), f"The device cuda:99 {NO_GPU}"),
    (("run", "1", "-p", "RATIO", "0.3", "-p", "RATIO", "1"), "RATIO is given twice, as 0.3 and as 1; give it once."),
    (
        ("run", "1", "--preset", "smoke", "-p", "PRESET", "full"),
        "PRESET is given twice, as smoke and as full; give it once.",
    ),
    (
        ("run", "1", "-p", "RESULTS_DIR", "x"),
        "RESULTS_DIR is set for each run; choose the folder of all results with --out.",
    ),
    (
        ("run", "all", "-p", "RATIO", "1"),
        "This lesson has no parameter RATIO; it has PRESET, RESULTS_DIR.",
    ),  # the second of them
    (("run", "--record"), "A smoke run is too small to be a reference; record one at --preset class or full."),
    (("run", "1", "--record", "-p", "SEED", "7"), "A reference run keeps the lesson's own values; leave out -p SEED."),
    (("start", "9"), "There is no lesson 9; give the number of one that exists: 01, 02."),
    (
        ("report", "nowhere"),
        r"There is no folder nowhere; run a lesson first \(./lab run 01\), or name another folder.",
    ),
    (("solution", "3"), "'3' is no exercise; give lesson and number, like 03.1."),
    (("solution", "99.1"), "There is no lesson 99; give the number of one that exists: 01, 02."),
    (("data", "fetch", "no-such-model"), ".*'no-such-model'.*"),
    (("rnu",), r"There is no command rnu; did you mean run\?"),
    (("data", "verfy"), r"There is no command verfy; did you mean verify\?"),
    (("data", "x"), r"There is no command x; there are list, fetch, verify."),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_a_mistake_gets_one_sentence_and_code_2_before_anything_runs(
    empty_course: Path, write_lesson, arguments: tuple, sentence: str
):
    write_lesson(empty_course / "notebooks", "1", ranges={"RATIO": [0.0, 1.0]})
    write_lesson(empty_course / "notebooks", "1", name="02_other", parameters='PRESET = "class"\nRESULTS_DIR = "."')
    result = labkit(*arguments, *(["--out", empty_course / "runs"] if arguments[0] == "run" else []))
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(f"Error: {sentence}\n", result.stderr), result.stderr
    assert not (empty_course / "runs").exists()


def test_an_exercise_that_does_not_exist_is_refused_with_those_that_do():
    known = ", ".join(task.id for task in notebooks.exercises(notebooks.read(notebooks.find("03"))))
    assert labkit("solution", "03.9").stderr == f"Error: There is no exercise 03.9; lesson 03 has {known}.\n"


def test_a_device_from_the_environment_is_checked_too(
    empty_course: Path, write_lesson, monkeypatch: pytest.MonkeyPatch
):
    write_lesson(empty_course / "notebooks", "1")
    monkeypatch.setenv("LABKIT_DEVICE", "tpu")
    assert labkit("run", "1").stderr == "Error: LABKIT_DEVICE is 'tpu'; choose auto, cpu, cuda or cuda:N.\n"


def test_a_course_without_lessons_says_so(empty_course: Path):
    result = labkit("run")
    assert result.exit_code == 2 and "There is no lesson to run" in result.stderr


def test_a_bug_keeps_its_traceback(empty_course: Path, write_lesson, monkeypatch: pytest.MonkeyPatch):
    write_lesson(empty_course / "notebooks", "1")
    monkeypatch.setattr(run, "prepare", lambda *_, **__: 1 / 0)
    assert isinstance(labkit("run", "1").exception, ZeroDivisionError)


def test_a_lesson_is_taken_left_and_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = []
    monkeypatch.setattr(notebooks, "open_in_jupyterlab", lambda copy, browser: opened.append((copy.name, browser)) or 0)
    monkeypatch.setattr(notebooks, "WORKSPACE", tmp_path)
    first = labkit("start", "3", "--no-browser")
    assert first.exit_code == 0 and first.output.startswith(f"your copy: {tmp_path / '03_structured'}")
    assert labkit("start", "3", "--copy").output == first.output
    copy = tmp_path / "03_structured_pruning_cnns.ipynb"
    work = copy.read_text().replace("raise NotImplementedError", "pass  # raise NotImplementedError")
    copy.write_text(re.sub(r'"source": "\w{16}"', '"source": "0123456789abcdef"', work))  # an older lesson's copy
    again = labkit("start", "03")
    assert "lesson 03 has changed since this copy was made; your work stays as it is" in again.output
    assert "./lab start 03 --fresh" in again.output and "pass  # raise" in copy.read_text()
    fresh = labkit("start", "03", "--fresh")
    older = Path(re.search(r"the copy that you had: (.+)", fresh.output)[1])
    assert "pass  # raise" in older.read_text() and "pass  # raise" not in copy.read_text()
    assert "has changed" not in fresh.output and opened == [(copy.name, False), (copy.name, True), (copy.name, True)]


@pytest.mark.slow
def test_who_ends_the_command_ends_jupyterlab_which_had_nothing_to_warn_of(tmp_path: Path, offline: dict[str, str]):
    code = (
        "import sys, pathlib; from course import notebooks as n, cli; n.WORKSPACE = pathlib.Path(sys.argv.pop(1));"
        "cli.main()"
    )
    command = [sys.executable, "-c", code, tmp_path / "workspace", "start", "00", "--no-browser"]
    environment = {**offline, "JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    log = tmp_path / "log"
    with open(log, "w") as stream:
        server = psutil.Popen(list(map(str, command)), stdout=stream, stderr=stream, env=environment)
    try:
        address = re.compile(r"http://localhost:(\d+)/\S*token=(\w+)")
        wait_until(lambda: address.search(log.read_text()) or server.poll() is not None, 180)
        port, token = address.search(log.read_text()).groups()
        wait_until(lambda: accepts_connections(int(port)))  # JupyterLab tells the address a moment earlier
        kernels = f"http://localhost:{port}/api/kernels?token={token}"
        asked = urllib.request.Request(kernels, data=b'{"name": "python3"}', method="POST")
        kernel = json.load(urllib.request.urlopen(asked, timeout=60))["id"]
        wait_until(lambda: kernel in log.read_text() and server.children())
        below = server.children(recursive=True)
        server.terminate()
        assert server.wait(60) == 0
        wait_until(lambda: not any(process.is_running() for process in below))
        assert "encrypt" not in log.read_text().lower()
    finally:
        if server.is_running():
            server.kill()


def test_a_worked_answer_is_shown_to_who_asks():
    result = labkit("solution", "3.1")
    assert result.exit_code == 0 and result.output.startswith("def cut(") and "SOLUTION" not in result.output


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        (
            (),
            [
                ("-n", "3", "not timing and not nightly"),
                ("timing and not nightly",),
                ("-n", "3", "--pretend-gpu", "gpu and not lesson and not nightly"),
            ],
        ),
        (("--pretend-gpu",), [("-n", "3", "--pretend-gpu", "gpu and not nightly")]),
        (("--pretend-gpu", "tests/labkit", "-x"), [("--pretend-gpu", "tests/labkit", "-x")]),
        (("--quick",), [("-n", "3", "not slow and not lesson and not timing and not nightly")]),
        (("tests/labkit", "-x", "-k", "a"), [("tests/labkit", "-x", "-k", "a")]),
    ],
)
@pytest.mark.parametrize("codes", [(0, 0, 0), (1, 0, 0), (0, 5, 0), (0, 0, 1)])
def test_the_tests_run_in_parallel_unless_they_read_a_clock(monkeypatch, arguments: tuple, calls: list, codes: tuple):
    commands = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(subprocess, "call", lambda command, **_: commands.append(command) or codes[len(commands) - 1])
    result = labkit("test", *arguments)
    assert len(commands) == len(calls) and result.exit_code == max(codes[: len(calls)])
    assert all(set(call) <= set(command) for call, command in zip(calls, commands, strict=True))


def test_no_gpu_is_pretended_by_the_cpu_build_of_torch(monkeypatch):
    commands = []
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(subprocess, "call", lambda command, **_: commands.append(command) or 0)
    assert labkit("test").exit_code == 0 and len(commands) == 2


@pytest.mark.slow
def test_data_is_listed_and_what_is_committed_verifies():
    rows = labkit("data", "list").stdout.splitlines()
    assert len(rows) == len(fetch.assets())
    assert all(row.split()[0] in ("ready", "missing", "damaged") for row in rows)
    committed = [name for name, asset in fetch.assets().items() if not asset.carrier]
    result = labkit("data", "verify", *committed)
    assert result.exit_code == 0 and result.stdout.count("ready") == len(committed), result.output


def test_verify_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    result = labkit("data", "verify", fetch.models()[0])
    assert result.exit_code == 2 and "is missing" in result.stderr and "data fetch" in result.stderr


@pytest.mark.slow
def test_doctor_tells_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "none"))
    result = labkit("doctor")
    state = {line.split()[1]: line.split()[0] for line in result.stdout.splitlines()}
    assert {state[name] for name in ("python", "packages", "torch", "device", "threads", "kernel")} == {"OK"}
    assert state["data"] == "FAIL" and "run ./lab data fetch" in result.stdout
    assert result.exit_code == 1 and not (tmp_path / "none" / fetch.models()[0]).exists()
