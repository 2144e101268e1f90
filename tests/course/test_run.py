"""What a run leaves, and what can go wrong with it: what was done, what the person reads, what is left.

Disks are really full, processes really killed, Ctrl-C is a real SIGINT. After every mishap the earlier good result is
the same to the byte, no half-made folder and no process is left, and the lesson is as it was.
"""

import doctest
import errno
import hashlib
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
import pytest
from commands import labkit, started, wait_until
from nbformat.v4 import new_code_cell, new_notebook, new_output
from refusals import check_refusal
from run_records import changed

from course import cli, failure, notebooks, reference, run, store, watch
from labkit import files
from labkit.data import fetch
from labkit.errors import DataError
from labkit.lesson import records
from labkit.lesson.records import MIME
from labkit.timing.machine import DEVICES, fingerprint
from labkit.timing.shapes import ARCHITECTURES

slow = pytest.mark.slow  # starts a lesson
SMOKE = {"PRESET": "smoke"}
RUN = ("run", "1", "--preset", "smoke")
WORK = "import os\nexec(os.environ.get('MISHAP', ''))\nRATIO"  # whatever happens, it is the same lesson and result
FINISH = "os.mkdir('01')\nwith open('01/record.json', 'w') as file:\n    _ = file.write('{}')"
WHO = (
    "import sys; ballast = bytearray(300_000_000)\n"
    "print(sys.executable, os.environ['LABKIT_PRESET'], os.getcwd() == os.path.realpath('.'), RATIO, PRESET)"
)


@dataclass(frozen=True)
class Course:
    """A course of one lesson, run once with success: `good` is what that left."""

    notebook: Path
    out: Path
    good: Path
    mark: str

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code, and what the command says on its error stream."""
        result = labkit(*RUN, "--out", self.out, *arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stderr

    def processes(self) -> list[psutil.Process]:
        """Those that were started by this test."""
        processes = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MISTAKE") == self.mark:
                    processes.append(process)
            except (psutil.Error, OSError):
                pass
        return processes

    def assert_nothing_lost(self, before: str) -> None:
        """before: the state as `digest` gave it."""
        wait_until(lambda: not self.processes(), 30)
        assert digest(self.good, self.notebook) == before
        assert {*names_in(self.good.parent)} - {f"{self.good.name}-failed"} == {self.good.name}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def digest(*places: Path) -> str:
    """Of every name and byte in these files and folders."""
    state = hashlib.sha256()
    for place in places:
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            state.update(str(file.relative_to(place.parent)).encode() + (file.read_bytes() if file.is_file() else b""))
    return state.hexdigest()


def outputs(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def execute(notebook: Path, out: Path, **options: object) -> run.Run:
    return run.run(run.prepare(notebook, SMOKE, out), **options)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, write_lesson: Callable[..., Path]) -> tuple[Path, Path, run.Run]:
    """Home, lesson and result of a good run; a broken kernelspec called python3 was in the way."""
    home = tmp_path_factory.mktemp("good")
    kernel = home / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text('{"argv": ["/nowhere/python", "{connection_file}"], "display_name": "x", "language": "python"}')
    notebook = write_lesson(home / "notebooks", WORK, FINISH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(home / "jupyter"))
        patch.setenv("MISHAP", WHO)
        return home, notebook, execute(notebook, home / "runs")


@pytest.fixture
def course(good: tuple[Path, Path, run.Run], empty_course: Path, monkeypatch: pytest.MonkeyPatch) -> Course:
    (home, notebook, result), tmp_path = good, empty_course
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("MISTAKE", str(tmp_path))
    monkeypatch.setenv("FLAG", str(tmp_path / "flag"))
    copy = tmp_path / result.folder.relative_to(home)
    return Course(tmp_path / "notebooks" / notebook.name, tmp_path / "runs", copy, str(tmp_path))


def mishap(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """What the lesson's cell does from now on."""
    if "/dev/full" in code and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    monkeypatch.setenv("MISHAP", code)


def test_the_example_that_a_newcomer_reads_first_runs():
    result = doctest.testmod(run)
    assert result.attempted and not result.failed


# a good run ---------------------------------------------------------------------------------------------------------


@slow
def test_the_lesson_gets_this_interpreter_its_parameters_and_its_own_folder(good):
    _, notebook, result = good
    assert outputs(result.notebook) == f"{sys.executable} smoke True 0.5 smoke\n"
    assert str(result.folder.parent) not in result.notebook.read_text().replace(sys.executable, "")
    assert all(not cell.get("outputs") for cell in nbformat.read(notebook, as_version=4).cells)


@slow
def test_the_result_folder_is_complete_and_alone_and_says_what_ran(good):
    result = good[2]
    assert names_in(result.folder) == ["01_small.ipynb", "record.json", "run.json"]
    assert names_in(result.folder.parent) == [result.folder.name]
    summary = json.loads((result.folder / "run.json").read_text())
    assert (summary["status"], summary["error"], 0 < summary["seconds"] < 60) == ("done", None, True)
    assert summary["parameters"] == {"PRESET": "smoke", "RESULTS_DIR": "."}
    assert 300_000_000 < summary["peak_memory"] < 1_500_000_000


@slow
def test_a_result_is_read_again(good):
    home, notebook, result = good
    again = store.read(run.prepare(notebook, {"RATIO": "0.5", "SEED": 0, **SMOKE}, home / "runs").folder())
    assert (again.folder, again.parameters, again.error) == (result.folder, result.parameters, None)
    assert again.peak_memory == result.peak_memory and again.seconds == pytest.approx(result.seconds, abs=1e-3)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"lesson": "01"}'])
def test_what_is_no_result_is_none(tmp_path: Path, text: str | None):
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    assert store.read(tmp_path) is None


def test_the_same_run_has_the_same_name_and_another_has_another(tmp_path: Path, write_lesson, monkeypatch):
    lesson, changed = write_lesson(tmp_path / "a", "1"), write_lesson(tmp_path / "b", "2")

    def name(notebook: Path, **values: object) -> str:
        return run.prepare(notebook, {**SMOKE, **values}, tmp_path).folder().name

    names = [name(lesson, SEED=1, RATIO=2), name(lesson, SEED=3), name(changed, SEED=1, RATIO=2), name(lesson)]
    assert name(lesson, RATIO="2", SEED=1) == names[0] and len(set(names)) == 4
    assert name(lesson, SEED=0, RATIO=0.5) == name(lesson)  # a default given by hand is the same run
    monkeypatch.setattr(store, "code_version", lambda: "another")
    assert name(lesson) not in names


@pytest.mark.parametrize(
    ("file", "counts"), [("new.py", True), ("csrc/sparse.cpp", True), ("page.html", False), ("new.pyc", False)]
)
def test_the_version_of_the_code_is_that_of_its_sources_and_of_torch(tmp_path: Path, monkeypatch, file, counts: bool):
    monkeypatch.setattr(files, "PACKAGE", tmp_path / "labkit")
    (tmp_path / "labkit" / "csrc").mkdir(parents=True)
    before = store.code_version()
    (tmp_path / "labkit" / file).write_text("changed")
    assert (store.code_version() != before) == counts
    before = store.code_version()
    monkeypatch.setattr(store.metadata, "version", lambda package: "0.0")
    assert store.code_version() != before


@slow
def test_progress_is_a_line_a_section_and_nothing_is_imported_that_reads_notebooks_from_elsewhere(
    tmp_path: Path, write_lesson, monkeypatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    result = execute(write_lesson(tmp_path, "1", "2"), tmp_path / "r", progress=True)
    imported = (result.folder / store.LOG).read_text()
    assert "papermill.iorw" in imported and "pyarrow.lib" not in imported
    lines = [re.sub(" +[0-9]+ s ", "", line) for line in capfd.readouterr().err.splitlines()]
    assert lines == ["01  cell  0/5 A small lesson", "01  cell  3/5 Its work"]


@slow
def test_what_is_set_for_the_lesson_is_seen_there_and_makes_no_other_result(tmp_path: Path, write_lesson, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")  # as Dask does
    names = ("CUDA_VISIBLE_DEVICES", "LABKIT_PRESET", "MALLOC_TRIM_THRESHOLD_")
    code = f"import os; print(*[os.environ[name] for name in {names} if name in os.environ])"
    job = run.prepare(write_lesson(tmp_path, code), SMOKE, tmp_path / "r")
    result = run.run(job, env={"CUDA_VISIBLE_DEVICES": "3"})
    assert outputs(result.notebook) == "3 smoke\n"
    assert store.read(job.folder()).folder == result.folder


@pytest.mark.nightly
@pytest.mark.timing
def test_a_run_costs_less_than_a_second_over_papermill_alone(tmp_path: Path):
    overhead = runpy.run_path(str(files.ROOT / "benchmarks" / "run_overhead.py"))
    calls = overhead["ways"](tmp_path)
    del calls["labkit run"]
    median, _, _ = overhead["overhead"](overhead["measure"](calls, rounds=3), "run.run")  # one round may be disturbed
    assert median < 1.0


# a lesson that cannot be read, a place that cannot be written -------------------------------------------------------

NO_NOTEBOOK = "it is damaged, or no notebook of nbformat 4"
UNREADABLE = {
    "missing": (Path.unlink, "No such file or directory"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:200]), NO_NOTEBOOK),
    "of another kind": (lambda file: file.write_text("[]"), NO_NOTEBOOK),
    "of no text": (lambda file: file.write_bytes(b"\xff" * 9), NO_NOTEBOOK),
    "of an old format": (lambda file: file.write_text('{"nbformat": 3, "worksheets": []}'), NO_NOTEBOOK),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_lesson_that_cannot_be_read_is_refused(tmp_path: Path, write_lesson, what: str):
    damage, reason = UNREADABLE[what]
    notebook = write_lesson(tmp_path, "1")
    damage(notebook)
    sentence = f"The lesson {notebook} cannot be read ( ... {reason}); take it anew from the course's repository."
    check_refusal(sentence, lambda: run.prepare(notebook, SMOKE, tmp_path / "runs"), DataError)
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """small_disk("size=64k"): a disk of its own, with these mount options; needs the right to mount."""
    place = tmp_path / "disk"

    def mount(options: str) -> Path:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a disk is not permitted here")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", place], check=True)


@slow
@pytest.mark.parametrize("what", ["Read-only file system", "Not a directory"])
def test_a_folder_that_cannot_be_made_is_refused(course: Course, small_disk, what: str):
    place = small_disk("ro") if "Read" in what else course.notebook
    sentence = f"Results cannot be written to {place / '01_small'} ({what}); choose another --out."
    assert course.run("--out", str(place)) == (2, f"Error: {sentence}\n")


@slow
@pytest.mark.parametrize("kilobytes", [0, 4, 8])
def test_a_disk_that_is_full_at_some_moment_keeps_the_earlier_result(course: Course, small_disk, kilobytes: int):
    """Room for no lesson, for no kernel's output, for no run.json: whatever comes first ends the run."""
    disk = small_disk("size=1m")
    shutil.copytree(course.out, disk, dirs_exist_ok=True)
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 1024 * kilobytes))
    on_disk = Course(course.notebook, disk, disk / course.good.relative_to(course.out), course.mark)
    before = digest(on_disk.good, on_disk.notebook)
    code, error = on_disk.run()
    sentence = r"Error: \S+ could not be written \(No space left on device\) and was left as it was; free some space"
    assert code == 2 and re.match(sentence, error.splitlines()[-1]), error
    on_disk.assert_nothing_lost(before)


@slow
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import resource; print('x' * 3_000_000)", "File too large"),  # while the notebook is saved
        ("os.symlink('/dev/full', 'run.json')", "No space left on device"),  # while run.json is written
    ],
)
def test_a_result_that_cannot_be_written_keeps_the_earlier_one(course: Course, monkeypatch, code: str, reason: str):
    mishap(monkeypatch, code)
    before = digest(course.good, course.notebook)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # as a quota would, the system refuses larger files
    try:
        exit_code, error = course.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    sentence = rf"Error: \S+ could not be written \({reason}\) and was left as it was; .*choose another folder\."
    assert exit_code == 2 and re.fullmatch(sentence, error.splitlines()[-1]), error
    course.assert_nothing_lost(before)


# a lesson that ends in the middle: told at once, kept beside the good result as "-failed" ---------------------------

_TELL = "open(os.environ['FLAG'], 'w').close()"  # that the lesson has come so far
_HUGE = "'CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.11 GiB.'"
ENDED = {
    "a mistake in a cell": ("1 / 0", "ZeroDivisionError in cell 4 (Its work): division by zero"),
    "GPU out of memory": (
        f"raise type('OutOfMemoryError', (RuntimeError,), {{}})({_HUGE})",  # torch's own, without importing torch
        "OutOfMemoryError in cell 4 (Its work): CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.11 GiB; "
        "take a smaller --preset or smaller parameters (-p), or end what else uses the GPU",
    ),
    "kernel killed": (
        f"{_TELL}; import signal; os.kill(os.getpid(), signal.SIGKILL)",
        "DeadKernel in cell 4 (Its work): the kernel was killed, most often because memory ran out; take a smaller "
        "--preset or smaller parameters (-p), or end what else uses memory (the run had reached ",
    ),
    "process of the run killed": (
        f"{_TELL}; import signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(100)",
        "ProcessEnded in cell 4 (Its work): the run's process was killed by SIGKILL before it could report; run it "
        "again, and see log.txt if it recurs",
    ),
    "files used up": (  # the kernel cannot even open what it needs to show the error
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4)); open('log')",
        "OSError in cell 4 (Its work): [Errno 24] Too many open files: ",
    ),
    "model missing": (
        "from labkit import fetch; fetch.path(fetch.models()[0])",
        "DataError in cell 4 (Its work): {model} in {cache}/{model} is missing; run `./lab data fetch {model}`",
    ),
}


@slow
@pytest.mark.parametrize("what", ENDED)
def test_a_run_that_ends_in_the_middle_keeps_the_earlier_result(course: Course, monkeypatch, what: str, tmp_path: Path):
    code, sentence = ENDED[what]
    sentence = sentence.format(model=fetch.models()[0], cache=tmp_path / "cache")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    mishap(monkeypatch, code)
    before = digest(course.good, course.notebook)
    exit_code, error = course.run()
    assert exit_code == 1 and f"labkit: 01_small stopped: {sentence}" in error and "Traceback" not in error, error
    failed = store.read(course.good.with_name(f"{course.good.name}-failed"))
    assert str(failed.error).startswith(sentence) and failed.notebook.exists()
    summary = failed.folder / "run.json"
    assert json.loads(summary.read_text())["status"] == "failed"
    if "killed" in what:  # noticed at once: neither a cell's limit nor a heartbeat of half a minute is waited for
        assert summary.stat().st_mtime - (tmp_path / "flag").stat().st_mtime < 10
    course.assert_nothing_lost(before)


@pytest.mark.parametrize(
    ("error", "uses_up"),
    [
        ("MemoryError: no message", "else uses memory"),
        ("RuntimeError: DefaultCPUAllocator: can't allocate memory", "else uses memory"),
        ("OSError: [Errno 24] Too many open files: 'log'", "ulimit -n 1024"),
        ("OSError: [Errno 28] No space left on device", "free some space on the disk"),
    ],
)
def test_what_was_used_up_is_told_with_what_to_do(error: str, uses_up: str):
    (advice,) = [what for sign, what in failure.ADVICE.items() if re.search(sign, error)]
    assert uses_up in advice


@slow
def test_a_good_run_clears_what_failed_before(course: Course):
    course.good.rename(course.good.with_name(f"{course.good.name}-failed"))
    assert execute(course.notebook, course.out).folder == course.good
    assert names_in(course.good.parent) == [course.good.name]


@pytest.mark.gpu(pretended=False)
def test_a_gpu_that_is_really_full_is_told(course: Course, monkeypatch: pytest.MonkeyPatch):
    mishap(monkeypatch, "import torch; torch.empty(2**46, dtype=torch.uint8, device='cuda')")
    before = digest(course.good, course.notebook)
    exit_code, error = course.run()
    assert exit_code == 1 and "OutOfMemoryError in cell 4" in error and "or end what else uses the GPU" in error
    course.assert_nothing_lost(before)


HANG = """
import os, sys, time
if "ipykernel_launcher" in str(sys.orig_argv):
    open(os.environ["FLAG"], "w").close()
    time.sleep(1000)
"""


def _hang_at_start(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Every kernel that starts from now on stands still before it does anything."""
    (folder / "hang").mkdir()
    (folder / "hang" / "sitecustomize.py").write_text(HANG)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "hang"), os.environ.get("PYTHONPATH", "")]))


@slow
def test_a_kernel_that_does_not_start_is_given_up(course: Course, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    _hang_at_start(monkeypatch, tmp_path)
    monkeypatch.setattr(watch, "START_SECONDS", 1)
    before = digest(course.good, course.notebook)
    exit_code, error = course.run()
    sentence = "in the start: Kernel didn't respond in 1 seconds; try again when the machine has less to do"
    assert exit_code == 1 and sentence in error, error
    course.assert_nothing_lost(before)


@slow
@pytest.mark.parametrize(
    ("limits", "code", "message"),
    [
        ({"IDLE_SECONDS": 4, "IDLE_CPU_SECONDS": 0.4}, "import time; time.sleep(1000)", "there was no output, and the"),
        (
            {"LONGEST_SECONDS": 6, "IDLE_SECONDS": 4, "IDLE_CPU_SECONDS": 0.1},
            "import time\nwhile True: time.sleep(0.02); sum(range(10**5))",
            "the run took more than 0.1 min",
        ),
    ],
)
def test_a_run_that_hangs_ends_and_keeps_what_it_had(tmp_path: Path, write_lesson, monkeypatch, limits, code, message):
    for name, value in limits.items():
        monkeypatch.setattr(watch, name, value)
    result = execute(write_lesson(tmp_path, "print('so far')", code), tmp_path / "r")
    assert str(result.error).startswith(f"RunTimeout in cell 5 (Its work): {message}")
    assert "look for what the cell waits for" in result.error.message and outputs(result.notebook) == "so far\n"
    assert result.seconds < 40


@slow
def test_a_slow_run_that_works_or_prints_is_not_ended(tmp_path: Path, write_lesson, monkeypatch):
    works = "import time\nend = time.time() + 5\nwhile time.time() < end: time.sleep(0.05); sum(range(10**6))"
    prints = "for _ in range(5): time.sleep(1); print('still here', flush=True)"
    monkeypatch.setattr(watch, "IDLE_SECONDS", 3)
    monkeypatch.setattr(watch, "IDLE_CPU_SECONDS", 0.3)
    assert execute(write_lesson(tmp_path, works, prints), tmp_path / "r").error is None


# Ctrl-C ------------------------------------------------------------------------------------------------------------

_WAIT = f"import subprocess; child = subprocess.Popen(['sleep', '1000']); {_TELL}; child.wait()"
INTERRUPTED = {
    "before the kernel starts": (signal.SIGINT, ""),
    "while the kernel starts": (signal.SIGINT, ""),
    "in a cell, and again and again": (signal.SIGINT, _WAIT),
    "in a cell, terminated": (signal.SIGTERM, _WAIT),
    "in a cell, killed": (signal.SIGKILL, _WAIT),
    "while the notebook is saved": (
        signal.SIGINT,
        f"os.mkfifo('saved'); os.replace('saved', 'executed.ipynb'); {_TELL}",
    ),
    "while the result is put in its place": (signal.SIGINT, f"os.mkfifo('run.json'); {_TELL}"),
}


@slow
@pytest.mark.parametrize("moment", INTERRUPTED)
def test_ctrl_c_leaves_nothing_behind(course: Course, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str):
    end, code = INTERRUPTED[moment]
    mishap(monkeypatch, code)
    if moment == "while the kernel starts":
        _hang_at_start(monkeypatch, tmp_path)
    if moment == "before the kernel starts":  # who reads the lesson waits for ever
        course.notebook.unlink()
        os.mkfifo(course.notebook)
    before = digest(course.good, course.notebook)
    with started(course.notebook.parent, *RUN, "--out", course.out) as command:
        if moment == "before the kernel starts":
            wait_until(lambda: _is_read(course.notebook))
        else:
            wait_until((tmp_path / "flag").exists)
        if moment == "while the result is put in its place":
            wait_until(lambda: len(course.processes()) == 1)  # kernel and runner have ended, and the pipe is in the way
        if moment == "while the notebook is saved":
            time.sleep(1.0)  # the cell has told; what comes next is the saving, and the pipe is in the way
        command.send_signal(end)
        while "again" in moment and command.poll() is None:
            time.sleep(0.02)
            command.send_signal(end)
        _, error = command.communicate(timeout=30)
    if end != signal.SIGKILL:
        last = "labkit: interrupted; the lesson under way left nothing behind, earlier results are as they were.\n"
        assert command.returncode == 130 and "Traceback" not in error and error.endswith(last), error
    course.assert_nothing_lost(before)


def _is_read(pipe: Path) -> bool:
    """Whether somebody has opened the pipe for reading."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        assert error.errno == errno.ENXIO
        return False
    return True


@slow
@pytest.mark.parametrize("call", [1, 2])
def test_ctrl_c_between_the_two_renames_keeps_one_whole_result(course: Course, monkeypatch, call: int):
    """Too short a moment to meet with a signal, so it is raised at each of the two calls."""
    calls, replace = [], os.replace

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == call:
            raise KeyboardInterrupt
        replace(source, target)

    before = digest(course.good)
    partial = course.good.parent / ".smoke-new"
    shutil.copytree(course.good, partial)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store._replace(course.good, partial)
    shutil.rmtree(partial)
    assert digest(course.good) == before and names_in(course.good.parent) == [course.good.name]


# what of a notebook is kept, and what of a run as reference ---------------------------------------------------------


@slow
def test_a_tidied_notebook_has_no_trace_of_papermill(good):
    _, notebook, result = good
    tidied = notebooks.tidied(nbformat.read(result.notebook, as_version=4))
    source = nbformat.read(notebook, as_version=4)
    assert [(cell.id, cell.source) for cell in tidied.cells] == [(cell.id, cell.source) for cell in source.cells]
    assert [cell.execution_count for cell in tidied.cells if cell.cell_type == "code"] == [1, 2, 3]
    assert [output.execution_count for output in tidied.cells[3].outputs if "execution_count" in output] == [2]
    assert "papermill" not in nbformat.writes(tidied) and "iopub" not in nbformat.writes(tidied)
    assert nbformat.writes(notebooks.tidied(tidied)) == nbformat.writes(tidied)
    nbformat.validate(tidied)


def test_a_tidied_notebook_leaves_samples_and_rows_to_the_record_s_own_file():
    timing = {"kind": "comparison", "name": "a", "value": 2.0, "detail": {"samples_s": [0.1] * 50}}
    table = {"kind": "table", "name": "b", "rows": [{"x": 1}] * 50}
    output = new_output("display_data", data={MIME: {"measurements": [timing, table], "lesson": "01"}})
    notebook = new_notebook(cells=[new_code_cell("lab.finish()", outputs=[output], execution_count=1)])
    short = [{"kind": "comparison", "name": "a", "value": 2.0}, {"kind": "table", "name": "b"}]
    assert notebooks.tidied(notebook).cells[0].outputs[0].data[MIME] == {"measurements": short, "lesson": "01"}
    assert notebook.cells[0].outputs[0].data[MIME]["measurements"] == [timing, table]


def test_a_tidied_notebook_has_no_widgets_which_only_a_running_kernel_can_draw():
    of_slider = {notebooks.WIDGET: {"model_id": "a1"}, "text/plain": "interactive(children=...)"}
    outputs = [new_output("display_data", data=data) for data in (of_slider, {"text/plain": "a table"})]
    notebook = new_notebook(cells=[new_code_cell("interact(draw)", outputs=outputs, execution_count=1)])
    assert notebooks.tidied(notebook).cells[0].outputs == outputs[1:]
    assert notebook.cells[0].outputs == outputs


@pytest.mark.parametrize(
    ("bound", "in_lesson"),
    [({"PRESET": "class"}, True), ({"PRESET": "full"}, False), ({"PRESET": "class", "DEVICE": "cuda"}, False)],
)
def test_a_reference_keeps_its_outputs_in_the_lesson_only_at_the_lesson_s_own_values(
    tmp_path: Path, write_lesson, monkeypatch, bound: dict, in_lesson: bool
):
    monkeypatch.setattr(files, "RECORDED", tmp_path / "recorded")
    results = []
    for seconds in (3.0, 1.0, 2.0, 5.0, 4.0):
        results.append(run.Run("01_small", tmp_path / f"{seconds}", {"RESULTS_DIR": ".", **bound}, seconds, 1, None))
        write_lesson(results[-1].folder, f"{seconds}")
        records.write(record_of(seconds), results[-1].folder / "record.json")
    record, lesson = tmp_path / "recorded" / "test-cpu-2c" / "01.json", tmp_path / "01_small.ipynb"
    reference.require(results[0].parameters)
    job = store.Job("01_small", write_lesson(tmp_path / "source", "1").read_bytes(), bound, "auto", tmp_path)
    assert reference.keep(results, job, lesson) == [record, lesson][: 1 + in_lesson]
    assert records.read(record).runs.seconds == [3.0, 1.0, 2.0, 5.0, 4.0] and records.read(record).seconds == 4.0
    assert lesson.exists() == in_lesson
    assert not in_lesson or nbformat.read(lesson, as_version=4).cells[-1].source == "4.0"  # of the same run


def record_of(seconds: float) -> records.RunRecord:
    return changed(preset="class", measurements=[], seconds=seconds, created=f"2026-11-2{seconds:.0f}T10:00:00+00:00")


@slow
def test_a_recording_that_was_interrupted_goes_on(empty_course: Path, tmp_path: Path, write_lesson, monkeypatch):
    """The lesson counts its processes in a folder outside; the second one breaks. The last one finds the others."""
    monkeypatch.setenv("COUNTED", str(tmp_path / "counted"))
    (tmp_path / "counted").mkdir()
    for number in range(4):
        (tmp_path / f"{number}.json").write_text(json.dumps(record_of(9.0 - number).to_dict()))
    work = """
    import os, pathlib, shutil
    counted = pathlib.Path(os.environ["COUNTED"])
    number = len(list(counted.iterdir()))
    (counted / str(number)).write_text(os.environ.get("LABKIT_OTHER_PROCESSES", ""))
    assert number != 1
    os.mkdir("01")
    shutil.copy(counted.parent / f"{number}.json", "01/record.json")
    """
    notebook = write_lesson(tmp_path / "notebooks", textwrap.dedent(work))
    asked = ("run", "1", "--preset", "full", "--record", "--processes", 3, "--out", tmp_path / "runs")
    first = labkit(*asked)
    assert first.exit_code == 1 and not (tmp_path / "recorded").exists(), first.output
    assert "process 2 of 3 of 01_small" in first.stdout and "process 3" not in first.stdout
    second = labkit(*asked)
    assert second.exit_code == 0, second.output
    assert len(names_in(tmp_path / "counted")) == 4  # the first process is not run again
    told = [(tmp_path / "counted" / str(number)).read_text() for number in range(4)]
    assert told[:3] == [""] * 3
    others = [records.read(Path(path)).seconds for path in told[3].split(os.pathsep)]
    assert others == [9.0, 7.0]
    recorded = records.read(tmp_path / "recorded" / "test-cpu-2c" / "01.json")
    assert recorded.runs.seconds == [9.0, 7.0, 6.0] and recorded.seconds == 6.0
    job = run.prepare(notebook, {"PRESET": "full"}, tmp_path / "runs")
    assert [bool(before) for _, before in reference.processes(job, 3, resume=True)] == [True] * 3
    assert not any(before for _, before in reference.processes(job, 3, resume=False))  # what is complete begins afresh


def test_a_recording_that_resumes_leaves_out_what_is_recorded_by_the_same_code(
    empty_course: Path, tmp_path: Path, write_lesson
):
    """Wherever it was recorded: only the record is here, and no result of its runs."""
    notebook = write_lesson(tmp_path / "notebooks", "1")
    job = run.prepare(notebook, {"PRESET": "full"}, tmp_path / "runs")
    assert reference.recorded(job) == 0
    processes = [changed(preset="full", machine=fingerprint("cpu").to_dict(), measurements=[])] * 2
    for code in ("", reference.code(job)):
        record = reference.together(processes, code)
        records.write(record, files.RECORDED / record.machine["slug"] / "01.json")
        assert reference.recorded(job) == (2 if code else 0)
    asked = ("run", "1", "--preset", "full", "--record", "--processes", 2, "--out", tmp_path / "runs")
    resumed = labkit(*asked, "--resume")
    assert resumed.exit_code == 0 and resumed.output == "note    recorded in 2 processes: 01\n", resumed.output
    write_lesson(tmp_path / "notebooks", "2")
    assert reference.recorded(run.prepare(notebook, {"PRESET": "full"}, tmp_path / "runs")) == 0
    (files.RECORDED / record.machine["slug"] / "01.json").write_text("{")
    assert reference.recorded(job) == 0


def test_a_number_of_processes_is_of_a_recording(empty_course: Path, tmp_path: Path, write_lesson):
    write_lesson(tmp_path / "notebooks", "1")
    refused = labkit("run", "1", "--processes", 2, "--out", tmp_path / "runs")
    assert refused.exit_code == 2 and "--processes is of a recording; give --record too" in refused.output


# the lessons' own ranges -------------------------------------------------------------------------------------------


def test_the_names_that_lesson_01_takes_are_the_catalogue_s():
    _, declared = run.load(notebooks.find("01"))
    assert set(declared["ARCHITECTURE"].allowed) == {name for name, row in ARCHITECTURES.items() if row.decoder}
    assert set(declared["GPU"].allowed) == {name for name, device in DEVICES.items() if "fp16" in device.flops}


def test_a_lesson_that_times_the_cpu_alone_takes_no_gpu_and_says_so():
    on_the_cpu, on_any = notebooks.find("13"), notebooks.find("03")
    assert run.takes_device(on_the_cpu, "cpu") and run.takes_device(on_the_cpu, "auto")
    assert run.takes_device(on_any, "cuda") and not run.takes_device(on_the_cpu, "cuda:1")
    assert run.prepare(on_the_cpu, {}).device == "cpu"
    words = "DEVICE cannot be 'cuda'; choose one of cpu, auto."
    check_refusal(words, lambda: run.prepare(on_the_cpu, {"DEVICE": "cuda"}))


def test_all_lessons_on_a_gpu_are_those_with_work_for_it(capsys):
    assert cli._all_on(None) == cli._all_on("cpu") == notebooks.all_lessons()
    assert capsys.readouterr().out == ""
    assert {path.stem[:2] for path in cli._all_on("cuda")}.isdisjoint({"00", "02", "06", "12", "13"})
    assert capsys.readouterr().out == "note    without 00, 02, 06, 12, 13, which take no cuda\n"


@pytest.mark.parametrize("lesson", notebooks.all_lessons(), ids=lambda path: path.stem[:2])
def test_every_parameter_of_a_lesson_is_bounded_and_its_default_within(lesson: Path):
    _, declared = run.load(lesson)
    assert {name for name, row in declared.items() if not row.allowed} <= {"DEVICE", "RESULTS_DIR", "MODEL"}
    run.prepare(lesson, {name: row.default for name, row in declared.items() if name != "RESULTS_DIR"})
