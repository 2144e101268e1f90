"""What can go wrong with `labkit run`, as tables: what was done, what the person reads, the proof that nothing is lost.

Disks are really full, processes really killed, Ctrl-C is a real SIGINT. After every row the earlier good result is the
same to the byte, no half-made folder and no process is left, and the lesson is as it was.
"""

import errno
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from course import notebooks, run
from course.cli import main
from labkit import fetch, files
from labkit.errors import DataError
from labkit.machine import DEVICES
from labkit.shapes import ARCHITECTURES

pytestmark = pytest.mark.slow  # each starts a lesson

RANGES = {"RATIO": [0, 1], "CRITERION": ["l1", "taylor"]}
PARAMETERS = 'PRESET = "class"\nDEVICE = "auto"\nSEED = 0\nRATIO = 0.5\nCRITERION = "l1"\nRESULTS_DIR = "runs"'
WORK = "import os\nexec(os.environ.get('MISHAP', ''))"  # whatever happens, it is the same lesson, and the same result
FINISH = "import os\nos.mkdir('01')\nwith open('01/record.json', 'w') as file:\n    _ = file.write('{}')"
RUN = ("run", "1", "--preset", "smoke")


@dataclass(frozen=True)
class Course:
    """A course of one lesson, run once with success: `good` is what that left."""

    notebook: Path
    out: Path
    good: Path
    mark: str

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit code, and what the command says on its error stream."""
        result = CliRunner().invoke(main, [*RUN, "--out", str(self.out), *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stderr

    def start(self) -> subprocess.Popen:
        """The command as a process of its own."""
        code = "import sys, pathlib, course.cli as c; c.files.NOTEBOOKS = pathlib.Path(sys.argv.pop(1)); c.main()"
        asked = [sys.executable, "-c", code, self.notebook.parent, *RUN, "--out", self.out]
        return subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def processes(self) -> list[psutil.Process]:
        """Those that were started by this test."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("MISTAKE") == self.mark:
                    found.append(process)
            except (psutil.Error, OSError):
                pass
        return found

    def assert_nothing_lost(self, before: str) -> None:
        """`before`: the state as `digest` gave it."""
        assert digest(self.good, self.notebook) == before
        left = {path.name for path in self.good.parent.iterdir()} - {self.good.name, f"{self.good.name}-failed"}
        assert not left
        wait_until(lambda: not self.processes(), 20)


def mishap(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """What the lesson's cell does from now on."""
    if "/dev/full" in code and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    monkeypatch.setenv("MISHAP", code)


def digest(*places: Path) -> str:
    """Of every name and byte in these files and folders."""
    state = hashlib.sha256()
    for place in places:
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            state.update(str(file.relative_to(place.parent)).encode() + (file.read_bytes() if file.is_file() else b""))
    return state.hexdigest()


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"still waiting after {seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, write_lesson: Callable[..., Path]) -> tuple[Path, run.Run]:
    home = tmp_path_factory.mktemp("finished")
    (home / "notebooks").mkdir()
    shutil.copy(files.NOTEBOOKS / "claims.toml", home / "notebooks")  # the report asks for it
    notebook = write_lesson(home / "notebooks", WORK, FINISH, parameters=PARAMETERS, ranges=RANGES)
    result = run.run(run.prepare(notebook, {"PRESET": "smoke"}, home / "runs"))
    assert result.error is None and result.record.exists()
    return home, result


@pytest.fixture
def course(finished: tuple[Path, run.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Course:
    home, result = finished
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    for variable in ("LABKIT_PRESET", "LABKIT_DEVICE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MISTAKE", str(tmp_path))
    monkeypatch.setenv("FLAG", str(tmp_path / "flag"))
    monkeypatch.setattr(files, "NOTEBOOKS", tmp_path / "notebooks")
    good = tmp_path / result.folder.relative_to(home)
    return Course(tmp_path / "notebooks" / "01_small.ipynb", tmp_path / "runs", good, str(tmp_path))


# asked for what cannot be had: refused within seconds, before anything is written or started -----------------------

REFUSED = {
    "unknown name": (("-p", "RATOI", "0.3"), "This lesson has no parameter RATOI; did you mean RATIO\\?"),
    "wrong type": (("-p", "RATIO", "half"), "RATIO cannot be 'half'; give a finite number, like its default 0.5."),
    "not finite": (("-p", "RATIO", "nan"), "RATIO cannot be 'nan'; give a finite number, like its default 0.5."),
    "half a seed": (("-p", "SEED", "2.5"), "SEED cannot be '2.5'; give a whole number, like its default 0."),
    "seed below 0": (("-p", "SEED", "-1"), "SEED cannot be -1; give a number from 0 to 4294967295."),
    "out of range": (("-p", "RATIO", "2"), "RATIO cannot be 2.0; give a number from 0 to 1."),
    "no such choice": (("-p", "CRITERION", "l3"), "CRITERION cannot be 'l3'; choose one of l1, taylor."),
    "given twice": (
        ("-p", "RATIO", "0.3", "-p", "RATIO", "0.5"),
        "RATIO is given twice, as 0.3 and as 0.5; give it once.",
    ),
    "given in two ways": (("-p", "PRESET", "full"), "PRESET is given twice, as smoke and as full; give it once."),
    "a folder of its own": (
        ("-p", "RESULTS_DIR", "x"),
        "RESULTS_DIR is set for each run; choose the folder of all results with --out.",
    ),
    "no such device": (("--device", "gpu"), "device is 'gpu'; choose auto, cpu, cuda or cuda:N."),
    "no such GPU": (
        ("--device", "cuda:99"),
        r"The device cuda:99 is not there \(torch sees .*\); choose auto or cpu, or fix the driver.",
    ),
    "no GPU": (
        ("-p", "DEVICE", "cuda"),
        r"The device cuda is not there \(torch sees no CUDA device here\); choose auto or cpu, or fix the driver.",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_wrong_parameter_is_refused(course: Course, what: str):
    if what == "no GPU" and _has_gpu():
        pytest.skip("this machine has a GPU")
    arguments, sentence = REFUSED[what]
    before = digest(course.out, course.notebook)
    code, said = course.run(*arguments)
    assert code == 2 and re.fullmatch(f"Error: {sentence}\n", said), said
    assert digest(course.out, course.notebook) == before and not course.processes()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def test_a_wrong_parameter_stops_all_lessons_before_the_first(course: Course, write_lesson):
    write_lesson(course.notebook.parent, WORK, name="02_other")  # has no CRITERION
    result = CliRunner().invoke(main, ["run", "all", "--out", str(course.out), "-p", "CRITERION", "taylor"])
    assert result.exit_code == 2 and "This lesson has no parameter CRITERION" in result.stderr
    assert [path.name for path in course.out.iterdir()] == ["01_small"]


def test_a_device_from_the_environment_is_checked_too(course: Course, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LABKIT_DEVICE", "tpu")
    assert course.run() == (2, "Error: LABKIT_DEVICE is 'tpu'; choose auto, cpu, cuda or cuda:N.\n")


NO_NOTEBOOK = "it is damaged, or no notebook of nbformat 4"
UNREADABLE = {
    "missing": (Path.unlink, "No such file or directory"),
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:200]), NO_NOTEBOOK),
    "of another kind": (lambda file: file.write_text("[]"), NO_NOTEBOOK),
    "of no text": (lambda file: file.write_bytes(b"\xff" * 9), NO_NOTEBOOK),
    "of an old format": (lambda file: file.write_text('{"nbformat": 3, "worksheets": []}'), NO_NOTEBOOK),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_lesson_that_cannot_be_read_is_refused(course: Course, what: str):
    damage, reason = UNREADABLE[what]
    damage(course.notebook)
    before = digest(course.out)
    sentence = rf"^The lesson \S+ cannot be read \(.*{reason}\); take it anew from the course's repository\.$"
    with pytest.raises(DataError, match=sentence):
        run.prepare(course.notebook, {"PRESET": "smoke"}, course.out)
    assert digest(course.out) == before


def test_a_lesson_that_is_not_there_is_refused_with_those_that_are(course: Course):
    result = CliRunner().invoke(main, ["run", "9"])
    assert (result.exit_code, result.stderr) == (
        2,
        "Error: There is no lesson 9; give the number of one that exists: 01.\n",
    )


# a place that cannot be written -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """small_disk("size=64k"): a disk of its own, with these mount options; needs the right to mount."""
    mounted = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        asked = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place]
        if not shutil.which("mount") or subprocess.run(asked, capture_output=True).returncode:
            pytest.skip("mounting a disk is not permitted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def test_a_read_only_disk_is_refused(course: Course, small_disk):
    place = small_disk("ro")
    code, said = course.run("--out", str(place))
    assert (code, said) == (
        2,
        f"Error: Results cannot be written to {place / '01_small'} (Read-only file system); choose another --out.\n",
    )


def test_a_file_in_the_place_of_the_folder_is_refused(course: Course):
    code, said = course.run("--out", str(course.notebook))
    place = course.notebook / "01_small"
    sentence = f"Results cannot be written to {place} (Not a directory); choose another --out."
    assert (code, said) == (2, f"Error: {sentence}\n")


@pytest.mark.parametrize("kilobytes", [0, 4, 8])
def test_a_disk_that_is_full_at_some_moment_keeps_the_earlier_result(course: Course, small_disk, kilobytes: int):
    """Room for no lesson, for no kernel's output, for no run.json: whatever comes first ends the run."""
    disk = small_disk("size=1m")
    shutil.copytree(course.out, disk, dirs_exist_ok=True)
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - 1024 * kilobytes))
    kept = Course(course.notebook, disk, disk / course.good.relative_to(course.out), course.mark)
    before = digest(kept.good, kept.notebook)
    code, said = kept.run()
    sentence = r"Error: \S+ could not be written \(No space left on device\) and was left as it was; free some space"
    assert code == 2 and re.match(sentence, said.splitlines()[-1]), said
    kept.assert_nothing_lost(before)


FULL = {
    "while the notebook is saved": "import resource; print('x' * 3_000_000)",
    "while run.json is written": "os.symlink('/dev/full', 'run.json')",
}


@pytest.mark.parametrize("what", FULL)
def test_a_result_that_cannot_be_written_keeps_the_earlier_one(course: Course, monkeypatch, what: str):
    mishap(monkeypatch, FULL[what])
    before = digest(course.good, course.notebook)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # as a quota would, the system refuses larger files
    try:
        code, said = course.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    reason = "File too large" if "notebook" in what else "No space left on device"
    last = said.splitlines()[-1]
    assert code == 2 and re.fullmatch(
        rf"Error: \S+ could not be written \({reason}\) and was left as it was; .*choose another folder\.", last
    ), said
    course.assert_nothing_lost(before)


# a lesson that ends in the middle: told at once, kept beside the good result as "-failed" ---------------------------

_TELL = "open(os.environ['FLAG'], 'w').close()"  # that the lesson has come so far
_HUGE = "torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.11 GiB.')"
ENDED = {
    "a mistake in a cell": ("1 / 0", "ZeroDivisionError in cell 4 (Its work): division by zero"),
    "GPU out of memory": (
        f"import torch; raise {_HUGE}",
        "OutOfMemoryError in cell 4 (Its work): CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.11 GiB; "
        "take a smaller --preset or smaller parameters (-p), or end what else uses the GPU",
    ),
    "memory refused": (
        "bytearray(10**18)",
        "MemoryError in cell 4 (Its work): no message; take a smaller --preset or smaller parameters (-p), or end "
        "what else uses memory",
    ),
    "kernel killed": (
        f"{_TELL}; import signal; os.kill(os.getpid(), signal.SIGKILL)",
        "DeadKernel in cell 4 (Its work): the kernel was killed, most often because memory ran out; take a smaller "
        r"--preset or smaller parameters (-p), or end what else uses memory (the run had reached ",
    ),
    "process of the run killed": (
        f"{_TELL}; import signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(100)",
        "ProcessEnded in cell 4 (Its work): the run's process was killed by SIGKILL before it could report; run it "
        "again, and see log.txt if it recurs",
    ),
    "disk full for the lesson": (
        "with open('/dev/full', 'w') as file: file.write('x')",
        "OSError in cell 4 (Its work): [Errno 28] No space left on device; free some space on the disk, or choose "
        "another --out",
    ),
    "model missing": (
        "from labkit import fetch; fetch.path(fetch.models()[0])",
        "DataError in cell 4 (Its work): {model}: {cache}/{model}/{file} is not there; run `./lab data fetch {model}`",
    ),
    "model damaged": (
        "from labkit import fetch; fetch.path(fetch.models()[0])",
        "DataError in cell 4 (Its work): {model}: {cache}/{model}/{file} is damaged (size or SHA-256 differs from "
        "data/manifest.toml); run `./lab data fetch {model}`",
    ),
}


@pytest.mark.parametrize("what", ENDED)
def test_a_run_that_ends_in_the_middle_keeps_the_earlier_result(
    course: Course, monkeypatch: pytest.MonkeyPatch, what: str, tmp_path: Path
):
    code, sentence = ENDED[what]
    model = fetch.assets()[fetch.models()[0]]
    names = {"model": model.name, "cache": tmp_path / "cache", "file": model.files[0].path}
    if what == "model damaged":
        for file in model.files:
            (tmp_path / "cache" / model.name / file.path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cache" / model.name / file.path).write_text("damaged")
    if "model" in what:
        sentence = sentence.format(**names)
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    mishap(monkeypatch, code)
    before = digest(course.good, course.notebook)
    exit_code, said = course.run()
    assert exit_code == 1 and f"labkit: 01_small stopped: {sentence}" in said, said
    assert "Traceback" not in said
    failed = run.read(course.good.with_name(f"{course.good.name}-failed"))
    assert str(failed.error).startswith(sentence) and failed.notebook.exists()
    if "killed" in what:  # noticed at once: neither a cell's limit nor a heartbeat of half a minute is waited for
        ended = (failed.folder / "run.json").stat().st_mtime
        assert ended - (tmp_path / "flag").stat().st_mtime < 10
    course.assert_nothing_lost(before)


@pytest.mark.gpu
def test_a_gpu_that_is_really_full_is_told(course: Course, monkeypatch: pytest.MonkeyPatch):
    mishap(monkeypatch, "import torch; torch.empty(2**46, dtype=torch.uint8, device='cuda')")
    before = digest(course.good, course.notebook)
    exit_code, said = course.run()
    assert exit_code == 1 and "OutOfMemoryError in cell 4" in said and "or end what else uses the GPU" in said
    course.assert_nothing_lost(before)


HANG = """
import os, sys, time
if "ipykernel_launcher" in str(sys.orig_argv):
    open(os.environ["FLAG"], "w").close()
    time.sleep(1000)
"""


def test_a_kernel_that_does_not_start_is_given_up(course: Course, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    _hang_at_start(monkeypatch, tmp_path)
    monkeypatch.setattr(run, "START_SECONDS", 1)
    before = digest(course.good, course.notebook)
    exit_code, said = course.run()
    sentence = "in the start: Kernel didn't respond in 1 seconds; try again when the machine has less to do"
    assert exit_code == 1 and sentence in said, said
    course.assert_nothing_lost(before)


def _hang_at_start(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Every kernel that starts from now on stands still before it does anything."""
    (folder / "hang").mkdir()
    (folder / "hang" / "sitecustomize.py").write_text(HANG)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "hang"), os.environ.get("PYTHONPATH", "")]))


# Ctrl-C ------------------------------------------------------------------------------------------------------------

INTERRUPTED = {
    "before the kernel starts": "",
    "while the kernel starts": "",
    "in a cell": f"{_TELL}; import time; time.sleep(1000)",
    "in a cell, and again and again": f"{_TELL}; import time; time.sleep(1000)",
    "while the notebook is saved": f"os.mkfifo('saved'); os.replace('saved', 'executed.ipynb'); {_TELL}",
    "while the result is put in its place": f"os.mkfifo('run.json'); {_TELL}",
}


@pytest.mark.parametrize("moment", INTERRUPTED)
def test_ctrl_c_leaves_nothing_behind(course: Course, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str):
    mishap(monkeypatch, INTERRUPTED[moment])
    flag = tmp_path / "flag"
    if moment == "while the kernel starts":
        _hang_at_start(monkeypatch, tmp_path)
    if moment == "before the kernel starts":  # who reads the lesson waits for ever
        course.notebook.unlink()
        os.mkfifo(course.notebook)
    before = digest(course.good, course.notebook)
    with course.start() as command:
        if moment == "before the kernel starts":
            wait_until(lambda: _is_read(course.notebook))
        else:
            wait_until(flag.exists)
        if moment == "while the result is put in its place":
            wait_until(lambda: len(course.processes()) == 1)  # kernel and runner have ended, and the pipe is in the way
        if moment == "while the notebook is saved":
            time.sleep(1.0)  # the cell has told; what comes next is the saving, and the pipe is in the way
        command.send_signal(signal.SIGINT)
        while "again" in moment and command.poll() is None:
            time.sleep(0.02)
            command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=30)
    assert command.returncode == 130 and "Traceback" not in said, said
    assert said.endswith(
        "labkit: interrupted; the lesson under way left nothing behind, earlier results are as they were.\n"
    )
    course.assert_nothing_lost(before)


def _is_read(pipe: Path) -> bool:
    """Whether somebody has opened the pipe for reading."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        assert error.errno == errno.ENXIO
        return False
    return True


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
        run._replace(course.good, partial)
    shutil.rmtree(partial)
    assert digest(course.good) == before
    assert [path.name for path in course.good.parent.iterdir()] == [course.good.name]


# the lessons' own ranges -------------------------------------------------------------------------------------------


def test_the_names_that_lesson_01_takes_are_the_catalogue_s():
    _, known = run.load(notebooks.find("01"))
    assert set(known["ARCHITECTURE"].allowed) == {name for name, row in ARCHITECTURES.items() if row.decoder}
    assert set(known["GPU"].allowed) == {name for name, device in DEVICES.items() if "fp16" in device.flops}


@pytest.mark.parametrize("lesson", notebooks.all_lessons(), ids=lambda path: path.stem[:2])
def test_every_parameter_of_a_lesson_is_bounded_and_its_default_within(lesson: Path):
    _, known = run.load(lesson)
    unbounded = {name for name, one in known.items() if not one.allowed} - {"DEVICE", "RESULTS_DIR"}
    assert not unbounded
    run.prepare(lesson, {name: one.default for name, one in known.items() if name != "RESULTS_DIR"})
