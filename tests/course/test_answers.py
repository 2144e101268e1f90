"""An answer gets the verdict that its notebook gives it, in a process that holds nobody else's; and an end is told."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from click.testing import Result
from commands import labkit, wait_until
from handins import CONV, FULL, solved, with_first_line, write

from course import answers
from course.answers import Answer, Runner
from labkit import files

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the processes are looked for in /proc"),
    pytest.mark.slow,
]
STUB = Answer("01.2", "time_bound", [], "def time_bound(*a): raise NotImplementedError")
SLEEPS = Answer("01.2", "time_bound", [], "import time\ntime.sleep(600)")
EVERY_MUTANT = """
import json
import mutants
from course import answers, grade, sandbox
from labkit.lesson import check as checks

lessons, _ = grade.read_lessons()
for statement in grade._imports(lessons, [lesson.name for lesson in lessons]):
    exec(statement, {})
answers._load_kernels()
for number in sorted({id.partition(".")[0] for id in checks.ids()}):
    bank = mutants.bank(number)
    right = [(id, "right", fn) for id, some in bank.right.items() for fn in some]
    wrong = [(id, name, fn) for id, some in bank.wrong.items() for name, fn in some.items()]
    for id, name, fn in right + wrong:
        def work():
            result = checks.check(id, fn)
            return json.dumps([result.passed, result.failures])
        try:
            _, reply = sandbox.run(work, seconds=120)
        except sandbox.Stopped as error:
            reply = json.dumps([None, [str(error)]])
        print(json.dumps([id, name, *json.loads(reply)]), flush=True)
"""


def warm_processes() -> list[psutil.Process]:
    """The warm processes that this process, or one that it started, has now, and their forks."""
    started = psutil.Process().children(recursive=True)
    return [process for process in started if "course.answers" in command_of(process) and process.ppid() != 1]


def command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def forked(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def when(condition: Callable[[], list], act: Callable[[list], object]) -> threading.Thread:
    """A thread that waits until the condition gives something, and then acts on it."""

    def wait_and_act() -> None:
        wait_until(condition)
        act(condition())

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


def keepers_at_work() -> list[psutil.Process]:
    """Keepers whose answer runs: children of the warm process that have a child of their own.

    Of one look at all processes, since this is asked many times: psutil reads them all for the children of one.
    """
    parents = {process: parent_of(process) for process in warm_processes()}
    pids = {process.pid for process in parents}
    return [process for process, parent in parents.items() if parent in pids and process.pid in parents.values()]


def ancestors(process: psutil.Process) -> list[int]:
    try:
        return [parent.pid for parent in process.parents()]
    except psutil.NoSuchProcess:
        return []


def parent_of(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    """One warm process for both tests of it; the second ends it."""
    with answers.runner(
        ["import labkit.lesson.settings", "from labkit.lesson import check; check.load('01')"], seconds=60
    ) as opened:
        yield opened


def test_a_keeper_that_is_killed_costs_no_other_answer_its_verdict(runner: Runner):
    killer = when(keepers_at_work, lambda keepers: [keeper.kill() for keeper in keepers])
    assert dict(runner.run({0: SLEEPS})) == {0: None}
    killer.join()
    assert dict(runner.run({1: STUB}))[1].result == "not done"
    wait_until(lambda: not [keeper for warm in warm_processes() for keeper in forked(warm)])  # its answer ended with it


def test_without_the_warm_process_nothing_has_a_verdict(runner: Runner):
    for warm in warm_processes():
        warm.kill()
    assert dict(runner.run({number: STUB for number in range(20)})) == dict.fromkeys(range(20))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A class's folder, graded without a compiler until the warm process was killed, and how the command ended."""
    folder = tmp_path_factory.mktemp("class")
    write(folder, "ann", with_first_line(CONV, "import time; time.sleep(600)"))
    write(folder, "bob", solved())
    killer = when(keepers_at_work, lambda keepers: [warm.kill() for warm in warm_processes()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        result = labkit("grade", folder)
    killer.join()
    return folder, result


def test_an_ended_grading_is_told_on_the_terminal_on_the_page_and_by_the_exit_code(ended: tuple[Path, Result]):
    folder, result = ended
    assert result.exit_code == 1
    assert "exercises were not graded" in result.stderr and "grade again" in result.stderr
    rows = (folder / "grades.csv").read_text().splitlines()[1:]
    assert len(rows) == 2 * len(FULL)
    cut_short = [row for row in rows if "not graded" in row]
    assert cut_short and all(",0," in row and "ended from outside" in row for row in cut_short)
    assert "Not all was graded." in (folder / "grades.html").read_text()


def test_where_no_kernel_can_be_compiled_the_page_says_what_was_left_out(ended: tuple[Path, Result]):
    assert "checks left out what needs it" in (ended[0] / "grades.html").read_text()


def test_ctrl_c_ends_all_at_once(tmp_path: Path):
    write(tmp_path, "ann", with_first_line(CONV, "import time; time.sleep(600)"))
    command = [sys.executable, "-m", "course.cli", "grade", str(tmp_path), "--seconds", "600"]
    # A shell starts what stands in its background, as `./lab test &`, without Ctrl-C: here it is given back.
    heeding = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    grader = subprocess.Popen(command, cwd=files.ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    wait_until(lambda: any(grader.pid in ancestors(keeper) for keeper in keepers_at_work()))  # not another test's
    asked = time.monotonic()
    grader.send_signal(signal.SIGINT)
    assert "labkit: interrupted." in grader.communicate(timeout=120)[1] and grader.returncode == 130
    assert time.monotonic() - asked < 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ann"]


@pytest.mark.nightly
def test_all_right_and_wrong_answers_get_the_verdict_that_their_notebook_gives():
    """tests/notebooks/test_mutants.py says what that is: right ones pass, wrong ones do not.

    tests/course/test_grade.py hands in a right and a wrong answer to each exercise.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": f"{files.ROOT}{os.pathsep}{files.ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", EVERY_MUTANT]
    process = subprocess.run(command, env=environment, cwd=files.ROOT, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in process.stdout.splitlines()]
    assert [row for row in rows if row[2] != (row[1] == "right")] == []
    assert [row for row in rows if "PermissionError" in str(row[3]) or "no thread" in str(row[3])] == []
    assert len(rows) > 500
