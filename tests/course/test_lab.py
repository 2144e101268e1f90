"""The entry point, with a stand-in for Python that notes what it is asked: what it makes, passes on and says."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from labkit import files

STAND_IN = """#!/bin/sh
case "$*" in
    "-c import sys;"*) exit {supported} ;;
    "-c import venv"*) exit {venv} ;;
    "-c import torch"*) exit {torch} ;;
    --version) echo "Python 3.12.1"; exit 0 ;;
    "-m pip --version") exit 0 ;;
esac
printf '%s\\n' "$*" >>"{log}"
case "$*" in
    "-m venv"*) mkdir -p "{course}/.venv/bin" && cp "$0" "{course}/.venv/bin/python" ;;
    "-m pip install --editable"* | "-m pip install --quiet --editable"*) exit {pip} ;;
    "-m course.cli data fetch"*) exit {fetch} ;;
esac
"""


class Course:
    """A copy of ./lab in a folder with a space, a stand-in for Python, and the calls that it got."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "my course"
        (self.folder / "data").mkdir(parents=True)
        shutil.copy(files.ROOT / "lab", self.folder / "lab")
        (self.folder / "pyproject.toml").write_text("one")
        (self.folder / "data" / "manifest.toml").write_text("one")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.log, self.python = folder / "calls", folder / "python"
        self.behave()

    def behave(self, supported: int = 0, venv: int = 0, pip: int = 0, fetch: int = 0, torch: int = 1) -> None:
        codes = {"supported": supported, "venv": venv, "pip": pip, "fetch": fetch, "torch": torch}
        script = STAND_IN.format(log=self.log, course=self.folder, **codes)
        for place in (self.python, self.folder / ".venv" / "bin" / "python"):
            if place == self.python or place.exists():
                place.write_text(script)
                place.chmod(0o755)

    def lab(self, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess:
        environment = {**os.environ, "LABKIT_PYTHON": str(self.python)} | ({"PATH": path} if path else {})
        return subprocess.run(
            ["/bin/sh", str(self.folder / "lab"), *arguments],
            cwd=self.elsewhere, env=environment, capture_output=True, text=True,
        )  # fmt: skip

    def calls(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def course(tmp_path: Path) -> Course:
    return Course(tmp_path)


def test_first_call_sets_up_and_passes_its_words_on(course):
    done = course.lab("run", "01", "-p", "GPU", "H200 SXM")
    assert done.returncode == 0, done.stderr
    assert [call.split("/")[0] for call in course.calls()] == [
        "-m venv --clear ",
        "-m pip install --editable ",
        "-m course.cli data fetch",
        "-m course.cli run 01 -p GPU H200 SXM",
    ]


def test_second_call_installs_and_fetches_nothing(course):
    course.lab("setup")
    course.calls()
    course.lab("doctor")
    course.lab("run")
    assert course.calls() == ["-m course.cli doctor", "-m course.cli run"]


def test_changed_pyproject_installs_again_without_a_new_environment(course):
    course.lab("setup")
    course.calls()
    (course.folder / "pyproject.toml").write_text("two")
    course.lab("doctor")
    assert [call[:25] for call in course.calls()] == ["-m pip install --editable", "-m course.cli doctor"]


def test_changed_manifest_fetches_again(course):
    course.lab("setup")
    course.calls()
    (course.folder / "data" / "manifest.toml").write_text("two")
    course.lab("run")
    assert course.calls() == ["-m course.cli data fetch", "-m course.cli run"]


def test_interrupted_install_goes_on_at_the_next_call(course):
    course.behave(pip=1)
    failed = course.lab("doctor")
    assert failed.returncode == 2
    assert "run the same command again: it goes on" in failed.stderr
    course.behave()
    course.calls()
    assert course.lab("doctor").returncode == 0
    assert [call[:25] for call in course.calls()] == ["-m pip install --editable", "-m course.cli doctor"]


def test_failed_fetch_is_tried_again(course):
    course.behave(fetch=2)
    assert course.lab("run").returncode == 2
    course.behave()
    course.calls()
    course.lab("run")
    assert course.calls() == ["-m course.cli data fetch", "-m course.cli run"]


def test_site_installs_what_it_needs_once(course):
    course.lab("setup")
    course.calls()
    course.behave(pip=1)
    failed = course.lab("site")
    assert failed.returncode == 2 and "what the site needs could not be had" in failed.stderr
    course.behave()
    course.calls()
    course.lab("site", "--no-serve")
    course.lab("site")
    installed, *others = course.calls()
    assert installed.startswith("-m pip install --quiet --editable ") and installed.endswith("my course[site]")
    assert others == ["-m course.cli site --no-serve", "-m course.cli site"]


def test_missing_python_is_said_with_what_to_install(course, tmp_path):
    course.behave(supported=1)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("dirname", "cksum", "cat"):
        (tools / tool).symlink_to(shutil.which(tool))
    failed = course.lab("run", path=str(tools))
    assert failed.returncode == 2
    assert "no Python 3.11, 3.12 or 3.13 found; install one" in failed.stderr
    assert not (course.folder / ".venv").exists()


def test_missing_venv_module_is_said_with_what_to_install(course):
    course.behave(venv=1)
    failed = course.lab("run")
    assert failed.returncode == 2
    assert "apt install python3-venv" in failed.stderr


def test_no_word_gives_the_usage(course):
    failed = course.lab()
    assert failed.returncode == 2
    assert "./lab run [NN] | test | start NN" in failed.stderr
    assert course.calls() == []


@pytest.mark.parametrize("words", [("--cpu", "setup"), ("setup", "--cpu"), ("--cpu",)])
def test_cpu_build_is_put_in_before_the_course(course, words):
    assert course.lab(*words).returncode == 0
    calls = [call[:22] for call in course.calls()]
    assert calls[1:4] == ["-m pip install --quiet", "-m uv pip install --py", "-m pip install --edita"]
