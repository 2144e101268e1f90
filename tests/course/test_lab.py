"""The entry point, with a stand-in for Python that notes what it is asked: what it makes, passes on and says."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from course.cli import main
from labkit import files

STAND_IN = """#!/bin/sh
case "$*" in
    "-c import sys;"*) exit {supported} ;;
    "-c import venv"*) exit {venv} ;;
    "-c import difflib"*) exec "{real}" "$@" ;;
    "-c import torch"*) exit {torch} ;;
    "-c import sys, torch"*) exit {cuda} ;;
    -) echo "papermill "; exit 0 ;;
    --version) echo "Python 3.12.1"; exit 0 ;;
    "-m pip --version") exit 0 ;;
esac
printf '%s\\n' "$*" >>"{log}"
case "$*" in
    "-m venv"*) mkdir -p "{course}/.venv/bin" && cp "$0" "{course}/.venv/bin/python" ;;
    "-m pip install --editable"*) echo "the end of pip's log"; exit {pip} ;;
    "-m course.cli data fetch"*) exit {fetch} ;;
    "-m course.cli doctor") echo "caches in ${{XDG_CACHE_HOME:-the usual place}}" ;;
    "-m course.cli run all"*) exit {lessons} ;;
esac
"""


PROJECT = """[project]
license-files = ["LICENSE"]
[project.optional-dependencies]
course = [
    "torchvision>=0.24",
]
engines = ["onnx"]
serving = ["mosec"]
site = ["sphinx"]
[project.scripts]
labkit = "course.__main__:main"
"""


HAS_DRIVER = shutil.which("nvidia-smi") is not None
USUAL = "course,test" + ",gpu" * HAS_DRIVER  # extras that are always installed


class Course:
    """A copy of ./lab in a folder with a quote, spaces and an umlaut, a stand-in for Python, and the calls it got."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "it's a tür"
        for part in ("data", "course", ".ci"):
            (self.folder / part).mkdir(parents=True)
        for file in ("lab", "course/help.txt", ".ci/gpu"):
            shutil.copy(files.ROOT / file, self.folder / file)
        (self.folder / "pyproject.toml").write_text(PROJECT)
        (self.folder / "data" / "manifest.toml").write_text("one")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.log, self.python = folder / "calls", folder / "python"
        self.behave()

    def behave(self, **codes: int) -> None:
        """The stand-in's exit codes: it can do everything, but has no torch and sees no GPU, unless said otherwise."""
        usual = {"supported": 0, "venv": 0, "pip": 0, "fetch": 0, "lessons": 0, "torch": 1, "cuda": 1}
        script = STAND_IN.format(log=self.log, course=self.folder, real=sys.executable, **{**usual, **codes})
        for place in (self.python, self.folder / ".venv" / "bin" / "python"):
            if place == self.python or place.exists():
                place.write_text(script)
                place.chmod(0o755)

    def lab(self, *arguments: str, path: str | None = None, script: Path | None = None) -> subprocess.CompletedProcess:
        environment = {**os.environ, "LABKIT_PYTHON": str(self.python)} | ({"PATH": path} if path else {})
        return subprocess.run(
            ["/bin/sh", str(script or self.folder / "lab"), *arguments],
            cwd=self.elsewhere, env=environment, capture_output=True, text=True,
        )  # fmt: skip

    def calls(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def course(tmp_path: Path) -> Course:
    return Course(tmp_path)


@pytest.fixture
def ready(course: Course) -> Course:
    """The course after ./lab setup."""
    course.lab("setup")
    course.calls()
    return course


def test_first_call_sets_up_and_passes_its_words_on(course):
    done = course.lab("run", "01", "-p", "GPU", "H200 SXM")
    assert done.returncode == 0, done.stderr
    assert [call.split("/")[0] for call in course.calls()] == [
        "-m venv --clear ",
        "-m pip install --quiet --upgrade pip",
        "-m pip install --editable ",
        "-m course.cli data fetch",
        "-m course.cli run 01 -p GPU H200 SXM",
    ]
    assert done.stderr.splitlines()[1:] == [
        f"lab: installing the course{' with gpu' * HAS_DRIVER} and what it needs; this takes some minutes, once"
    ]


def test_second_call_installs_and_fetches_nothing(ready):
    ready.lab("doctor")
    ready.lab("run")
    assert ready.calls() == ["-m course.cli doctor", "-m course.cli run"]


@pytest.mark.parametrize(
    ("changed", "does"),
    [
        ("pyproject.toml", f"-m pip install --editable {{root}}[{USUAL}]"),  # without a new environment
        ("data/manifest.toml", "-m course.cli data fetch"),
    ],
)
def test_what_has_changed_is_done_again(ready, changed: str, does: str):
    (ready.folder / changed).write_text("two")
    ready.lab("run")
    assert ready.calls() == [does.format(root=ready.folder), "-m course.cli run"]


@pytest.mark.parametrize("step", ["pip", "fetch"])
def test_what_was_interrupted_goes_on_at_the_next_call(course, step: str):
    course.behave(**{step: 2})
    failed = course.lab("run")
    assert failed.returncode == 2
    assert step != "pip" or ("the end of pip's log\n" in failed.stderr and "it goes on" in failed.stderr)
    course.behave()
    course.calls()
    assert course.lab("run").returncode == 0
    assert [call[:24] for call in course.calls()][-2:] == ["-m course.cli data fetch", "-m course.cli run"]


@pytest.fixture
def with_driver(tmp_path: Path) -> str:
    """A PATH with the program of an NVIDIA driver."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\n")
    (tools / "nvidia-smi").chmod(0o755)
    return f"{tools}{os.pathsep}{os.environ['PATH']}"


def test_setup_takes_the_clocks_of_a_gpu_along_where_there_is_a_driver(course, with_driver: str):
    assert course.lab("setup", path=with_driver).returncode == 0
    assert f"-m pip install --editable {course.folder}[course,test,gpu]" in course.calls()
    for path in (with_driver, os.environ["PATH"]):
        course.lab("doctor", path=path)
        assert course.calls() == ["-m course.cli doctor"]


def test_a_driver_that_comes_later_installs_nothing_since_the_network_may_be_gone(ready, with_driver: str):
    ready.lab("doctor", path=with_driver)
    assert ready.calls() == ["-m course.cli doctor"]


def installs(ready: Course, extras: str) -> str:
    return f"-m pip install --editable {ready.folder}[{extras.replace('course,test', USUAL)}]"


def test_site_installs_what_it_needs_once(ready):
    ready.behave(pip=1)
    failed = ready.lab("site")
    assert failed.returncode == 2 and "the installation did not finish; check the network" in failed.stderr
    ready.behave()
    ready.calls()
    assert ready.lab("run").returncode == 0 and ready.calls() == ["-m course.cli run"]  # which does not need it
    ready.lab("site", "--no-serve")
    ready.lab("site")
    assert ready.calls() == [
        installs(ready, "course,test,site"), "-m course.cli site --no-serve", "-m course.cli site",
    ]  # fmt: skip


@pytest.mark.parametrize("words", [("--with", "engines,serving"), ("--with=engines", "--with=serving")])
def test_extras_are_installed_once_and_again_when_what_they_need_has_changed(ready, words: tuple[str, ...]):
    done = ready.lab("setup", *words)
    assert done.returncode == 0 and "installing the course with engines,serving and what it needs" in done.stderr
    ready.lab("setup", "--with", "engines")
    ready.lab("run")
    everything = installs(ready, "course,test,engines,serving")
    assert ready.calls() == [everything, "-m course.cli setup", "-m course.cli setup", "-m course.cli run"]
    (ready.folder / "pyproject.toml").write_text(PROJECT + "# changed")
    ready.lab("run")
    assert ready.calls() == [everything, "-m course.cli run"]
    ready.lab("site")
    assert ready.calls() == [installs(ready, "course,test,engines,serving,site"), "-m course.cli site"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--with", "engine"), "there is no extra engine; choose of course engines serving site."),
        (("--with", "engines,*"), "there is no extra *; choose of course engines serving site."),
        (("--with",), "name extras after --with, of course engines serving site."),
        (("--wiht", "engines"), "setup takes --cpu and --with EXTRA,..., not --wiht."),
    ],
)
def test_a_mistake_in_setup_is_said_before_anything_is_installed(course, words: tuple[str, ...], sentence: str):
    failed = course.lab("setup", *words)
    assert (failed.returncode, failed.stderr) == (2, f"lab: {sentence}\n")
    assert course.calls() == [] and not (course.folder / ".venv").exists()


def test_missing_python_is_said_with_what_to_install(course, tmp_path):
    course.behave(supported=1)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("dirname", "cksum", "cat", "grep"):
        (tools / tool).symlink_to(shutil.which(tool))
    failed = course.lab("run", path=str(tools))
    assert failed.returncode == 2 and "no Python 3.11, 3.12 or 3.13 found; install one" in failed.stderr
    assert not (course.folder / ".venv").exists()
    course.behave(venv=1)
    failed = course.lab("run")
    assert failed.returncode == 2 and "apt install python3-venv" in failed.stderr


def test_cpu_build_is_put_in_before_the_course(course):
    assert course.lab("setup", "--cpu").returncode == 0
    calls = [call[:22] for call in course.calls()]
    assert calls[2:5] == ["-m pip install --quiet", "-m uv pip install --py", "-m pip install --edita"]


@pytest.mark.parametrize("relative", [True, False])
def test_a_symbolic_link_to_it_is_followed(ready, relative: bool):
    link = ready.elsewhere / "lab"
    link.symlink_to(Path("../it's a tür/lab") if relative else ready.folder / "lab")
    assert ready.lab("doctor", script=link).returncode == 0
    assert ready.calls() == ["-m course.cli doctor"]


def test_a_checkout_that_is_set_up_needs_no_writing(course):
    course.lab("setup")
    state = {path: path.stat().st_mtime_ns for path in course.folder.rglob("*")}
    (course.folder / ".venv.lock").unlink(missing_ok=True)
    assert course.lab("solution", "01.1").returncode == 0
    assert not (course.folder / ".venv.lock").exists()
    assert all(path.stat().st_mtime_ns == when for path, when in state.items() if path.is_file() and path.exists())


# help ---------------------------------------------------------------------------------------------------------------


def help_text() -> str:
    """What course/help.txt has to hold: a section for each command, with those of its own commands."""

    def page(command: click.Command, above: click.Context | None, name: str) -> tuple[click.Context, str]:
        wide = {"terminal_width": 100, "max_content_width": 100}
        context = click.Context(command, parent=above, info_name=name, help_option_names=["-h", "--help"], **wide)
        return context, command.get_help(context)

    top, text = page(main, None, "./lab")
    sections = {"lab": [text]}
    for name, command in main.commands.items():
        context, text = page(command, top, name)
        sections[name] = [text, *(page(sub, context, at)[1] for at, sub in getattr(command, "commands", {}).items())]
    return "\n".join(f"== {name}\n" + "\n\n".join(parts) for name, parts in sections.items()) + "\n"


def test_the_help_that_needs_nothing_installed_is_that_of_the_commands(pytestconfig: pytest.Config):
    file = files.ROOT / "course" / "help.txt"
    if pytestconfig.getoption("--fix"):
        file.write_text(help_text(), encoding="utf-8")
    assert file.read_text(encoding="utf-8").split() == help_text().split(), (
        "give: ./lab test tests/course/test_lab.py --fix"
    )


def test_all_commands_have_help_at_once(course):
    for name, command in main.commands.items():
        done = course.lab(name, "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"Usage: ./lab {name} ")
        assert all(option in done.stdout for parameter in command.params for option in parameter.opts if "-" in option)
    fixed = "run test start solution sweep report release grade site doctor data gpu setup"
    assert all(f"\n  {name} " in course.lab("--help").stdout for name in fixed.split())
    assert course.calls() == [] and not (course.folder / ".venv").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "Usage: ./lab "),
        (("rnu",), "lab: there is no command rnu; did you mean run? there are:"),
        (("help", "rnu"), "lab: there is no command rnu; did you mean run? there are:"),
        (("-x",), "lab: there is no command -x; there are:"),
        (("ru.",), "lab: there is no command ru.; did you mean run? there are:"),
    ],
)
def test_without_a_command_that_there_is_the_commands_are_listed(course, words, says: str):
    failed = course.lab(*words)
    assert failed.returncode == 2 and "\n  run " in failed.stderr and failed.stdout == ""
    assert failed.stderr.startswith(says)
    assert course.calls() == [] and not (course.folder / ".venv").exists()


def test_help_with_a_command_is_the_command_s_help(course):
    assert course.lab("help", "run").stdout == course.lab("run", "--help").stdout != ""
    assert course.lab("help").stdout == course.lab("help", "--help").stdout == course.lab("--help").stdout != ""


def test_a_relative_xdg_cache_home_is_ignored(ready, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    assert ready.lab("doctor").stdout == "caches in the usual place\n"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert ready.lab("doctor").stdout == "caches in /caches\n"


# ./lab gpu ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(course, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """./lab gpu on a machine whose own Python has torch and, after `behave(cuda=0)`, a CUDA device."""
    for part in ("labkit", "tests", "benchmarks", "notebooks"):
        (course.folder / part).mkdir()
    (course.folder / "labkit" / "a.py").write_text("one")
    (tmp_path / "tools").mkdir()
    smi = tmp_path / "tools" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho a GPU\n")
    smi.chmod(0o755)
    return lambda *options: course.lab("gpu", *options, path=f"{smi.parent}{os.pathsep}{os.environ['PATH']}")


STEPS = [
    "-m pytest -m gpu and not lesson",
    *["benchmarks/nm_gpu.py"] * 3,
    "-m course.cli run all",
    "-m course.cli run 06",
    "-m course.cli run 12",
    "-m pytest -m gpu and lesson",
]
LESSONS = STEPS.index("-m course.cli run all")


def test_gpu_uses_the_machine_s_own_python_and_goes_on_where_it_stopped(course, gpu):
    course.behave(torch=0, cuda=0, lessons=1)
    failed = gpu()
    calls = course.calls()
    assert failed.returncode == 1 and "a GPU" in failed.stdout and "failed  lessons" in failed.stdout
    assert "missing here: papermill (what needs them fails; to install them: " in failed.stdout
    assert len(calls) == len(STEPS) and all(map(str.startswith, calls, STEPS)), calls
    assert "--preset class --device cuda --record --processes 1 --resume" in calls[LESSONS]
    assert not (course.folder / ".venv").exists()
    course.behave(torch=0, cuda=0)
    assert gpu().returncode == 0 and [call[:21] for call in course.calls()] == [STEPS[LESSONS]]
    assert gpu().returncode == 0 and course.calls() == []
    (course.folder / "labkit" / "a.py").write_text("two")
    assert gpu().returncode == 0 and len(course.calls()) == len(STEPS)


@pytest.mark.parametrize("options", [("--minutes", "1"), ("--minutes=1",)])
def test_gpu_ends_after_its_minutes_and_says_what_is_left(course, gpu, tmp_path: Path, options: tuple):
    course.behave(torch=0, cuda=0)
    clock = tmp_path / "tools" / "date"  # half a minute passes between two looks at it
    clock.write_text(f'#!/bin/sh\necho . >>"{tmp_path}/looks"; echo $((30 * $(wc -l <"{tmp_path}/looks")))\n')
    clock.chmod(0o755)
    done = gpu(*options)
    assert done.returncode == 1 and "Given again, ./lab gpu goes on from here." in done.stdout
    assert len(course.calls()) == 1 and "done    tests" in done.stdout
    assert "late    lessons: the 1 minutes are over" in done.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--minutes", "0"), "--minutes takes a whole number from 1 on."),
        (("--minutes", "soon"), "--minutes takes a whole number from 1 on."),
        (("--minutes",), "--minutes takes a whole number from 1 on."),
        (("--hours", "1"), "gpu takes --minutes N, not --hours."),
    ],
)
def test_gpu_refuses_what_is_no_number_of_minutes(course, gpu, options: tuple, sentence: str):
    course.behave(torch=0, cuda=0)
    refused = gpu(*options)
    assert (refused.returncode, refused.stderr) == (2, f"{sentence}\n") and course.calls() == []


def test_gpu_runs_nothing_where_torch_sees_no_device(course, gpu):
    course.behave(torch=0)
    failed = gpu()
    assert failed.returncode == 2 and "torch sees no CUDA device here, and nothing was run" in failed.stderr
    assert course.calls() == []


def test_gpu_sets_up_where_no_python_has_torch(course, gpu):
    course.behave()
    gpu()
    assert [call.split("/")[0] for call in course.calls()][-1] == "-m course.cli gpu"
