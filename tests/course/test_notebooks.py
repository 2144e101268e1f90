"""Lessons are found, read and copied without their answers; work that exists is never overwritten."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nbformat
import pytest
from commands import accepts_connections, wait_until
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from refusals import check_refusal

from course import notebooks
from course.notebooks import BEGIN, END, without_solution
from labkit import files
from labkit.errors import DataError
from labkit.lesson import check as checks

STUB = '''def double(x: float) -> float:
    """Twice x."""
    if x:
        ### BEGIN SOLUTION
        y = 2 * x
        return y
        ### END SOLUTION
    return 0.0'''


def small() -> nbformat.NotebookNode:
    printed = new_output("stream", text="4\n")
    return new_notebook(
        cells=[
            new_markdown_cell("# Lesson"),
            new_code_cell(STUB, metadata={"tags": ["exercise"]}, execution_count=1),
            new_code_cell("print(double(2))", metadata={"tags": ["check"]}, execution_count=2, outputs=[printed]),
        ]
    )


def test_the_answer_becomes_a_raise_at_its_own_indentation():
    lines = without_solution(STUB).splitlines()
    assert lines[3].startswith("        raise NotImplementedError(")
    assert [*lines[:3], *lines[4:]] == [*STUB.splitlines()[:3], STUB.splitlines()[-1]]


def test_two_blocks_and_a_cell_without_any():
    two = f"{BEGIN}\na = 1\n{END}\nb = 2\n{BEGIN}\nc = 3\n{END}"
    lines = re.sub(r"\(.*\)", "", without_solution(two)).splitlines()
    assert lines == ["raise NotImplementedError", "b = 2", "raise NotImplementedError"]
    assert without_solution("a = 1\n\nb = 2") == "a = 1\n\nb = 2"


@pytest.mark.parametrize("source", [BEGIN, END, f"{BEGIN}\n{BEGIN}\n{END}", f"{END}\n{BEGIN}"])
def test_an_unpaired_marker_is_refused(source: str):
    words = "stands alone in an exercise; each `### BEGIN SOLUTION` needs one"
    check_refusal(words, lambda: without_solution(source))


def test_the_copy_has_no_answers_and_no_outputs_and_the_lesson_keeps_its_own():
    source = small()
    copy = notebooks.student_copy(source)
    assert "SOLUTION" not in nbformat.writes(copy) and "2 * x" not in nbformat.writes(copy)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in copy.cells if cell.cell_type == "code")
    assert [cell.id for cell in copy.cells] == [cell.id for cell in source.cells]
    assert source.cells[1].source == STUB and source.cells[2].outputs
    nbformat.validate(copy)


def an_exercise() -> nbformat.NotebookNode:
    card = new_markdown_cell("### Exercise 1 · Twice\n\n*Difficulty 2 of 5 · 10 minutes · skip it in a hurry*")
    answer = new_code_cell(STUB, metadata={"tags": ["exercise"]}, id="exercise-1")
    check = new_code_cell('lab.check("01.1", double)', metadata={"tags": ["check"]})
    return new_notebook(cells=[card, answer, check])


def test_an_exercise_is_read_from_its_card_its_cell_and_its_check():
    (task,) = notebooks.exercises(an_exercise())
    assert (task.id, task.title, task.points, task.minutes, task.function) == ("01.1", "Twice", 2, 10, "double")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda cells: cells.pop(0), "exercise-1 has no card above it"),
        (lambda cells: cells[0].update(source="### Exercise 1 · Twice"), "exercise-1 has no card above it"),
        (lambda cells: cells.pop(2), "exercise-1 has no check below it"),
        (lambda cells: cells[2].update(source="print(double(2))"), "exercise-1 has no check below it"),
    ],
)
def test_an_exercise_without_card_or_check_is_refused(change: Callable, words: str):
    book = an_exercise()
    change(book.cells)
    check_refusal(words, lambda: notebooks.exercises(book))


@pytest.fixture
def lesson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one lesson of a small course, whose learner works in tmp_path/workspace."""
    path = tmp_path / "notebooks" / "01_small.ipynb"
    path.parent.mkdir()
    nbformat.write(small(), path)
    monkeypatch.setattr(files, "NOTEBOOKS", path.parent)
    monkeypatch.setattr(notebooks, "WORKSPACE", tmp_path / "workspace")
    return path


def test_a_lesson_is_found_by_number_or_name(lesson: Path):
    assert {notebooks.find(name) for name in ("1", "01", "01_small", "01_small.ipynb")} == {lesson}


@pytest.mark.parametrize("name", ["7", "small", "", "../01_small", "²"])
def test_an_unknown_lesson_is_refused_with_those_that_exist(lesson: Path, name: str):
    check_refusal("There is no lesson ... ; give the number of one that exists: 01", lambda: notebooks.find(name))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *[(name, "is no exercise; give lesson and number") for name in ("3", "²", "²1")],
        *[(name, "There is no exercise") for name in ("03.9", "03.²")],
        *[(name, "There is no lesson") for name in ("99.1", "²01.1")],
    ],
)
def test_an_unknown_exercise_is_refused(name: str, words: str):
    check_refusal(words, lambda: notebooks.exercise(name))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"cells": [', '{"nbformat": 4, "cells": 3}', "\0"])
def test_a_damaged_lesson_hinders_no_other(tmp_path: Path, lesson: Path, text: str):
    lesson.with_name("02_damaged.ipynb").write_text(text)
    assert not notebooks.has_changed(notebooks.prepare("1"))
    words = "02_damaged.ipynb is not a notebook that can be read; get it from"
    check_refusal(words, lambda: notebooks.prepare("2"), DataError)


def test_a_lesson_that_changed_is_noticed_and_the_copy_left_as_it_is(tmp_path: Path, lesson: Path):
    own = notebooks.prepare("1")
    assert own == tmp_path / "workspace" / "01_small.ipynb" and not notebooks.has_changed(own)
    run_again = nbformat.read(lesson, as_version=4)
    run_again.cells[2].outputs = [new_output("stream", text="5\n")]
    nbformat.write(run_again, lesson)
    assert not notebooks.has_changed(own)
    work = nbformat.read(own, as_version=4)
    work.cells[1].source = "def double(x): return 2 * x"
    nbformat.write(work, own)
    assert not notebooks.has_changed(own)

    changed = nbformat.read(lesson, as_version=4)
    changed.cells[0].source = "# Lesson, better told"
    nbformat.write(changed, lesson)
    before = own.read_bytes()
    assert notebooks.prepare("1") == own
    assert notebooks.has_changed(own) and own.read_bytes() == before

    kept = notebooks.put_aside("1")
    assert re.fullmatch(r"01_small\.\d{4}-\d\d-\d\d\.ipynb", kept.name) and kept.read_bytes() == before
    notebooks.prepare("1")
    assert not notebooks.has_changed(own)
    assert notebooks.put_aside("1").name == kept.stem + ".2.ipynb" and kept.read_bytes() == before
    assert notebooks.put_aside("1") is None


@pytest.mark.parametrize("text", ["", "{}", '{"metadata": {"labkit": {}}}', '{"metadata": []}'])
def test_a_copy_that_has_lost_its_metadata_is_not_reported(tmp_path: Path, text: str):
    (tmp_path / "01_small.ipynb").write_text(text)
    assert not notebooks.has_changed(tmp_path / "01_small.ipynb")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, lesson: Path):
    (tmp_path / "workspace").write_text("")
    check_refusal("The copy cannot be written to ... ; fix that, then try again", lambda: notebooks.prepare("1"))


@pytest.mark.slow
def test_jupyterlab_opens_on_the_copy(tmp_path: Path, lesson: Path, offline: dict[str, str]):
    script = (
        "import sys, pathlib, course.notebooks as c; c.open_in_jupyterlab(pathlib.Path(sys.argv[1]), browser=False)"
    )
    environment = {**offline, "JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    log = tmp_path / "log"
    with open(log, "w") as stream:
        command = [sys.executable, "-c", script, lesson]
        server = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)
    try:
        address = re.compile(r"http://localhost:(\d+)/lab/tree/01_small.ipynb\?token=\w+\s")
        wait_until(lambda: address.search(log.read_text()) or server.poll() is not None)
        printed = address.search(log.read_text())
        assert printed, log.read_text()
        wait_until(lambda: accepts_connections(int(printed[1])))  # JupyterLab tells the address a moment earlier
        page = urllib.request.urlopen(printed[0].strip(), timeout=20).read().decode()
        assert "JupyterLab" in page
        assert re.search(r'"disabledExtensions": \[[^\]]*"@jupyterlab/apputils-extension:announcements"', page)
        assert "Error" not in log.read_text()
    finally:
        os.killpg(server.pid, 9)
        server.wait()


# a class -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("school") / "class"
    notebooks.release(folder)
    return folder


def test_a_release_holds_every_lesson_without_its_answers(released: Path):
    assert {path.name for path in released.glob("*.ipynb")} == {path.name for path in notebooks.all_lessons()}
    assert [path for path in released.parent.iterdir()] == [released]
    assert (released / "glossary.md").read_text() == (files.NOTEBOOKS / "glossary.md").read_text()
    for path in released.rglob("*.ipynb"):
        copy = nbformat.read(path, as_version=4)
        nbformat.validate(copy)
        source = nbformat.read(files.NOTEBOOKS / path.name, as_version=4)
        assert "SOLUTION" not in path.read_text()
        assert not any(cell.get("outputs") for cell in copy.cells)
        sources = {cell.id: cell.source for cell in copy.cells}
        assert list(sources) == [cell.id for cell in source.cells]
        for cell in copy.cells:
            assert cell.cell_type != "code" or compile(cell.source, cell.id, "exec")
        for task in notebooks.exercises(source):
            solution = task.source.partition(BEGIN)[2].partition(END)[0].strip()
            assert sources[task.cell_id] == task.stub and not any(solution in text for text in sources.values())
        assert path.name in (released / "README.md").read_text()


def test_a_released_lesson_goes_on_with_worked_answers_that_nobody_reads_by_accident(released: Path):
    code = """
from labkit.lesson import worked
from labkit.lesson.check import check
def time_bound(*_): raise NotImplementedError
print(check("01.2", worked.answer("01.2", time_bound)).passed, worked.answer("01.9", time_bound))"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-c", code], cwd=released, env=environment, capture_output=True, text=True)
    assert run.stdout.split() == ["True", "None"], run.stderr
    text = (released / "notebooks" / "answers.json").read_text()
    assert set(json.loads(text)) == set(checks.ids()) and "return" not in text and "def " not in text


def test_a_released_notebook_uses_the_labkit_beside_it(released: Path):
    code = "import labkit, labkit.claims as c, labkit.fetch as f; print(labkit.__file__, len(c.load()), f.assets())"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run([sys.executable, "-c", code], cwd=released, env=environment, capture_output=True, text=True)
    assert said.stdout.startswith(str(released / "labkit" / "__init__.py")), said.stderr


@pytest.mark.parametrize("name", ["notes.txt", ".hidden"])
def test_a_folder_that_holds_something_is_not_released_into(tmp_path: Path, name: str):
    (tmp_path / name).write_text("work")
    for folder in (tmp_path, tmp_path / name):
        words = "is not empty, and handed-in work is never overwritten; give a new"
        check_refusal(words, partial(notebooks.release, folder))
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "work"


@pytest.mark.parametrize("part", notebooks.RELEASED)
def test_a_release_does_not_copy_into_itself(part: str):
    check_refusal("lies inside what is released", lambda: notebooks.release(files.ROOT / part / "deep" / "class"))
    assert not (files.ROOT / part / "deep").exists()


def test_a_release_of_a_damaged_lesson_leaves_nothing_behind(tmp_path: Path, lesson: Path):
    (tmp_path / "class").mkdir()
    check_refusal("has no card", lambda: notebooks.release(tmp_path / "class"))
    assert list((tmp_path / "class").iterdir()) == [] and not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_release_onto_a_disk_that_is_full_leaves_nothing_behind(tmp_path: Path):
    code = """
import pathlib, resource, signal, sys
from course import notebooks
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # the lessons are smaller, some data is not
notebooks.release(pathlib.Path(sys.argv[1]))"""
    command = [sys.executable, "-c", code, tmp_path / "new" / "class"]
    error = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True).stderr.splitlines()[-1]
    assert re.search(r"InputError: The release cannot be written to .*File too large.*; free some", error), error
    assert list(tmp_path.iterdir()) == []
