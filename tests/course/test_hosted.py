"""Lessons outside JupyterLab on one's own machine: on a hosted service, for many users, in an editor."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from commands import labkit
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell
from run_records import RECORD

from course import cli, hosted, notebooks
from labkit import files
from labkit.data import fetch
from labkit.lesson import records

HOSTED = files.ROOT / "course" / "hosted.py"
LESSON = """
import labkit
from labkit import datasets, fetch, models
lab = labkit.start("00", preset="smoke", device="cpu")
lab.record("words", len(datasets.handbook().split()), "words")
lab.record("models", len([fetch.path(name) for name in fetch.models()]), "models")
lab.finish()
"""


def test_a_server_gets_what_the_lessons_import_and_keeps_its_own_packages():
    needed = hosted.requirements()
    assert {"torch", "transformers", "seaborn"} <= set(needed) and needed["torch"].startswith("torch>=")
    assert not {"ipykernel", "jupyterlab", "ipywidgets", "pytest", "openvino"} & set(needed)


def test_it_begins_where_no_package_is_installed():
    code = f"import runpy; print(*runpy.run_path({str(HOSTED)!r})['requirements']())"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert "torch" in done.stdout.split(), done.stderr


def test_pip_is_asked_only_where_a_package_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch):
    lines = list(hosted.requirements().values())
    assert hosted.missing([*lines, "no-such-package>=1", "numpy>=999"]) == ["no-such-package>=1", "numpy>=999"]
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)  # nobody to ask
    assert hosted.missing(lines) == lines


def test_what_pip_installs_for_the_user_alone_is_imported_without_a_restart(tmp_path: Path):
    """Where the server's own folder cannot be written, pip makes one for the user, which Python had not seen."""
    code = f"""
import pathlib, runpy, site
space = runpy.run_path({str(HOSTED)!r})
folder = pathlib.Path(site.getusersitepackages())
folder.mkdir(parents=True)
(folder / "brought_by_pip.py").write_text("")
space["see_what_is_new"]()
import brought_by_pip"""
    environment = {"PYTHONUSERBASE": str(tmp_path)}
    python = sys._base_executable  # outside an environment, which has no such folder
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [("WARNING: retrying\nERROR: No matching distribution found for gguf>=0.10\n", "No matching"), ("", "no reason")],
)
def test_what_cannot_be_installed_is_told_in_a_sentence(tmp_path: Path, monkeypatch, stderr: str, reason: str):
    pip = tmp_path / "python"  # that has a pip which fails
    pip.write_text(f"#!/bin/sh\nprintf '{stderr}' >&2\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(
        SystemExit, match=rf"^What the lessons need cannot be installed \({reason}.*\); is this notebook"
    ):
        hosted.install(["gguf>=0.10"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's folder that users share: a course, as a class gets it, and the models."""
    folder = tmp_path_factory.mktemp("srv")
    notebooks.release(folder / "course")
    (folder / "models").mkdir()
    for name in fetch.models():
        (folder / "models" / name).symlink_to(fetch.path(name))
    return folder


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the files in `folder`, but for Python's own cache."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.slow
def test_users_of_one_course_work_at_once_and_leave_their_results_at_home(
    tmp_path: Path, shared: Path, offline: dict[str, str]
):
    """Without the internet: all is installed and fetched, and the first cell finds that out by itself."""
    before, users = state(shared), [tmp_path / name for name in ("ann", "bob")]
    script = str(shared / "course" / "course" / "hosted.py")
    code = f"import runpy; runpy.run_path({script!r}, run_name='__main__')\n{LESSON}\nprint(labkit.__file__)"
    processes = []
    for home in users:
        home.mkdir()
        environment = {**offline, "HOME": str(home), "LABKIT_CACHE": str(shared / "models")}
        environment["PIP_CONSTRAINT"] = "/nowhere"  # pip would fail, but all is there and it is not asked
        command = [sys.executable, "-c", code]
        processes.append(subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, text=True))
    for home, process in zip(users, processes, strict=True):
        words = process.communicate(timeout=300)[0]
        assert process.returncode == 0 and f"results go to {home / 'runs'}" in words, words
        assert words.splitlines()[-1] == str(shared / "course" / "labkit" / "__init__.py")
        record = json.loads((home / "runs" / "00" / "record.json").read_text())
        assert {"words", "models"} <= {entry["name"] for entry in record["measurements"]}
    assert state(shared) == before


@pytest.mark.slow
def test_a_copy_names_a_kernel_of_the_course_s_environment_and_runs_in_it_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As an editor does it: the kernel is started by the name in the copy, in the copy's folder, and cells run."""
    monkeypatch.setattr(notebooks, "WORKSPACE", tmp_path / "workspace")
    monkeypatch.setenv("LABKIT_PRESET", "smoke")
    path = notebooks.prepare("00")
    copy = nbformat.read(path, as_version=4)
    assert copy.metadata.kernelspec == {
        "display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"
    }  # fmt: skip
    end = next(place for place, cell in enumerate(copy.cells) if "setup" in notebooks.tags(cell)) + 1
    copy.cells = [*copy.cells[:end], new_code_cell("import sys; print(sys.prefix); lab.finish()")]
    NotebookClient(copy, kernel_name="", resources={"metadata": {"path": path.parent}}).execute()
    assert copy.cells[-1].outputs[0].text.strip() == sys.prefix
    assert (path.parent / "runs" / "00" / "record.json").exists()


@pytest.mark.parametrize("place", ["runs", "workspace/runs", "notebooks/runs"])
def test_the_report_is_of_all_places_where_a_lesson_leaves_results_and_git_ignores_them(
    empty_course: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    """By ./lab run, by a learner's copy, and by a lesson that somebody opened in the repository."""
    monkeypatch.setattr(cli, "RUNS", empty_course / "runs")
    monkeypatch.setattr(notebooks, "WORKSPACE", empty_course / "workspace")
    records.write(RECORD, empty_course / place / "01" / "record.json")
    result = labkit("report")
    assert result.exit_code == 0 and RECORD.title in (empty_course / place / "report.html").read_text(), result.output
    ignored = subprocess.run(
        ["git", "check-ignore", "--quiet", "--no-index", f"{place}/01/record.json"], cwd=files.ROOT
    )
    assert ignored.returncode in (0, 128)  # 128: not a git repository
