"""A class of made-up submissions is graded with the right score for each, and none of them harms anything."""

import csv
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from click.testing import CliRunner
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from course import grading, notebooks
from course.cli import main
from course.grading import gradebook, submissions
from labkit import files
from labkit.errors import InputError

LESSON = "01_inference_challenge"
SECONDS = 5
CONV, BOUND, DECODE, MILLION = "conv_work", "time_bound", "decode_limit", "million_requests"


def solved() -> NotebookNode:
    """The learner's copy of lesson 01 with every answer right."""
    source = nbformat.read(files.NOTEBOOKS / f"{LESSON}.ipynb", as_version=4)
    copy = notebooks.student_copy(source, LESSON)
    answers = {cell.id: cell.source for cell in source.cells}
    for cell in copy.cells:
        if "exercise" in notebooks.tags(cell):
            kept = [line for line in answers[cell.id].splitlines() if line.strip() not in notebooks.MARKERS]
            cell.source = "\n".join(kept)
    return copy


def with_first_line(function: str, *lines: str, before: str = "") -> NotebookNode:
    """As solved(), with `lines` at the beginning of one function's body and `before` above it."""
    copy = solved()
    for cell in copy.cells:
        if f"def {function}(" in cell.source and "exercise" in notebooks.tags(cell):
            docstring = next(line for line in cell.source.splitlines() if line.strip().startswith('"""'))
            indented = "\n".join("    " + line for line in "\n".join(lines).splitlines())
            cell.source = before + cell.source.replace(docstring, f"{docstring}\n{indented}")
    return copy


def anonymous(copy: NotebookNode) -> NotebookNode:
    """What another editor may leave of a notebook: sources, and no more."""
    kinds = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    bare = [kinds[cell.cell_type == "markdown"](cell.source) for cell in copy.cells]
    for cell in bare:
        cell.pop("id")
    notebook = new_notebook(cells=bare)
    notebook.nbformat_minor = 4  # the last without ids
    return notebook


def without(copy: NotebookNode, *ids: str) -> NotebookNode:
    copy.cells = [cell for cell in copy.cells if cell.id not in ids]
    return copy


CHEAT = """
import builtins, sys, torch
import labkit.checks as c
c.check = lambda *a, **k: c.Result("01.1", True, (), 1)
c.Failures.expect = lambda *a, **k: True
c.Failures.close = lambda *a, **k: True
torch.isclose = lambda *a, **k: torch.tensor(True)
sys.modules["labkit.checks.lesson01"] = None
"""
EQUAL = """
class Any(float):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0.0
    def __reduce__(self): return (exec, ("import labkit.checks as c; c.Failures.expect = lambda *a, **k: True",))
"""


def write(folder: Path, student: str, notebook: NotebookNode, name: str = LESSON) -> None:
    (folder / student).mkdir(exist_ok=True)
    (folder / student / f"{name}.ipynb").write_text(json.dumps(notebook))


@pytest.fixture(scope="module")
def listener() -> Iterator[tuple[int, list]]:
    """A port of this machine that an answer must not reach, and who did."""
    server, reached = socket.create_server(("127.0.0.1", 0)), []

    def listen() -> None:
        while True:
            try:
                reached.append(server.accept())
            except OSError:
                return

    threading.Thread(target=listen, daemon=True).start()
    yield server.getsockname()[1], reached
    server.close()


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory, listener) -> tuple[Path, dict[str, dict[str, dict]], float]:
    """The class's folder after `labkit grade`, its rows by student and exercise, and the seconds that it took."""
    top = tmp_path_factory.mktemp("school")
    folder = top / "class"
    folder.mkdir()
    connect = f'import socket; socket.create_connection(("127.0.0.1", {listener[0]}), timeout=2)'
    write(folder, "right", solved())
    write(folder, "partly right", with_first_line(CONV, "return 1, 2"))
    write(folder, "untouched", notebooks.student_copy(nbformat.read(files.NOTEBOOKS / f"{LESSON}.ipynb", as_version=4)))
    renamed = solved()
    renamed.metadata.pop("labkit")
    write(folder, "renamed", renamed, "homework (2) final")
    write(folder, "metadata lost", anonymous(solved()), "homework")
    write(folder, "endless loop", with_first_line(BOUND, "while True: pass"))
    write(folder, "memory hog", with_first_line(CONV, "held = []", "while True: held.append(bytearray(1 << 26))"))
    write(folder, "deleted cells", without(solved(), "setup", "exercise-3", "check-3", "exercise-4-card"))
    write(folder, "redefines the check", with_first_line(CONV, "return 1, 2", before=CHEAT))
    write(folder, "equals everything", with_first_line(CONV, "return Any(1), Any(2)", before=EQUAL))
    write(folder, "network", with_first_line(MILLION, connect))
    write(folder, "forks", with_first_line(DECODE, "import os", "while True: os.fork()"))
    elsewhere = [f"open({str(top / name)!r}, 'w')" for name in ("outside", "class/grades.csv", "class/right/x")]
    tries = "\n".join(f"try: {one}.write('x')\nexcept OSError: pass" for one in [*elsewhere, "open('/tmp/x-out', 'w')"])
    write(folder, "writes outside", with_first_line(CONV, tries))
    write(
        folder, "reads others", with_first_line(CONV, f"open({str(folder / 'right' / (LESSON + '.ipynb'))!r}).read()")
    )
    write(
        folder, "reads answers", with_first_line(CONV, f"open({str(files.NOTEBOOKS / (LESSON + '.ipynb'))!r}).read()")
    )
    write(folder, "leaves", with_first_line(CONV, "import os", "os._exit(0)"))
    write(folder, "kills", with_first_line(CONV, "import os", "os.kill(os.getppid(), 9)"))
    (folder / "damaged").mkdir()
    (folder / "damaged" / f"{LESSON}.ipynb").write_text('{"cells": [')
    (folder / "nothing").mkdir()
    began = time.monotonic()
    command = [sys.executable, "-m", "course.cli", "grade", folder, "--seconds", str(SECONDS)]
    said = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(files.ROOT)})
    assert said.returncode == 0, said.stderr
    rows: dict[str, dict[str, dict]] = {}
    for row in csv.DictReader((folder / "grades.csv").open()):
        rows.setdefault(row["student"], {})[row["exercise"]] = row
    return folder, rows, time.monotonic() - began


FULL = {"01.1": 2, "01.2": 1, "01.3": 2, "01.4": 1}
SCORES = {
    "right": FULL,
    "renamed": FULL,
    "metadata lost": FULL,
    "writes outside": FULL,  # what it computes is right; that nothing was written is tested below
    "untouched": dict.fromkeys(FULL, 0),
    "damaged": dict.fromkeys(FULL, 0),
    "nothing": dict.fromkeys(FULL, 0),
    "partly right": {**FULL, "01.1": 0},
    "memory hog": {**FULL, "01.1": 0},
    "redefines the check": {**FULL, "01.1": 0},
    "equals everything": {**FULL, "01.1": 0},
    "leaves": {**FULL, "01.1": 0},
    "kills": {**FULL, "01.1": 0},
    "reads others": {**FULL, "01.1": 0},
    "reads answers": {**FULL, "01.1": 0},
    "endless loop": {**FULL, "01.2": 0},
    "deleted cells": {**FULL, "01.3": 0},
    "forks": {**FULL, "01.3": 0},
    "network": {**FULL, "01.4": 0},
}


@pytest.mark.parametrize("student", SCORES)
def test_score(student: str, graded):
    _, rows, _ = graded
    assert {exercise: int(row["points"]) for exercise, row in rows[student].items()} == SCORES[student]


@pytest.mark.parametrize(
    ("student", "exercise", "result", "reason"),
    [
        ("partly right", "01.1", "wrong", "With batch=1"),
        ("untouched", "01.1", "not done", "not done yet"),
        ("endless loop", "01.2", "stopped", "stopped after 5 s: an endless loop"),
        ("deleted cells", "01.3", "missing", "the exercise's cell is not in the notebook"),
        ("forks", "01.3", "wrong", "BlockingIOError"),
        ("leaves", "01.1", "stopped", "code 0"),
        ("reads others", "01.1", "wrong", "PermissionError"),
        ("reads answers", "01.1", "wrong", "PermissionError"),
        ("redefines the check", "01.1", "wrong", "With batch=1"),
        ("equals everything", "01.1", "wrong", "something else than numbers, texts, tensors"),
        ("network", "01.4", "wrong", "PermissionError"),
        ("damaged", "01.1", "missing", "cannot be read as a notebook"),
        ("nothing", "01.1", "missing", "no notebook of this lesson was handed in"),
        ("metadata lost", "01.1", "passed", "found by its function's name"),
    ],
)
def test_reason(student: str, exercise: str, result: str, reason: str, graded):
    row = graded[1][student][exercise]
    assert row["result"] == result and reason in row["reason"]


def test_memory_is_limited(graded):
    row = graded[1]["memory hog"]["01.1"]
    assert (
        "MemoryError" in row["reason"] or "stopped after" in row["reason"]
    )  # where the machine is slow to hand it out


def test_nothing_is_harmed(graded, listener):
    folder, rows, _ = graded
    assert len(rows) == len(SCORES) and all(len(own) == len(FULL) for own in rows.values())
    assert sorted(path.name for path in folder.parent.iterdir()) == ["class"]
    assert sorted(path.name for path in (folder / "right").iterdir()) == [f"{LESSON}.ipynb"]
    assert not Path("/tmp/x-out").exists()
    assert listener[1] == []
    assert not [one for one in psutil.process_iter(["uids"]) if one.info["uids"] and one.info["uids"].real > 1 << 30]


@pytest.mark.timing
def test_it_is_quick(graded):
    assert graded[2] < 60


def test_the_page_says_it_all_without_help(graded):
    text = (graded[0] / "grades.html").read_text()
    assert all(name in text for name in SCORES) and "an endless loop" in text
    assert "no network" in text and "<script" not in text and "http" not in text


# reading submissions ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lesson() -> submissions.Lesson:
    return submissions.Lesson.read(files.NOTEBOOKS / f"{LESSON}.ipynb")


def needed(lesson: submissions.Lesson, notebook: NotebookNode, exercise_id: str) -> str:
    (task,) = [task for task in lesson.exercises if task.id == exercise_id]
    answer = submissions.answers(notebook, lesson)[exercise_id]
    return "\n".join(submissions.needs(task, answer.source, notebook, lesson))


def test_the_answer_counts_wherever_it_was_written(lesson):
    copy = notebooks.student_copy(lesson.notebook, LESSON)
    copy.cells += [new_code_cell("def time_bound(*a): return 1"), new_code_cell("def time_bound(*a): return 2")]
    answer = submissions.answers(copy, lesson)["01.2"]
    assert answer.source.endswith("return 2") and answer.note


def test_an_answer_that_is_no_python_is_still_the_answer(lesson):
    broken = "def time_bound(a, b):\n    return ("
    copy = notebooks.student_copy(lesson.notebook, LESSON)
    copy.cells.append(new_code_cell(broken))
    assert submissions.answers(copy, lesson)["01.2"].source == broken


def test_an_answer_gets_the_imports_and_definitions_that_its_names_need(lesson):
    notebook = with_first_line(DECODE, "torch.ones(conv_work(1, 1, 1, 1, 1, 1, 1, 1)[0])")
    said = needed(lesson, notebook, "01.3")
    assert "import torch" in said and "def conv_work" in said and "matplotlib" not in said and "lab" not in said
    assert "BEGIN" not in said and "NotImplementedError" not in said  # the worked answer of an earlier exercise
    assert needed(lesson, solved(), "01.2") == ""


def test_an_answer_may_use_functions_and_imports_of_added_cells(lesson):
    notebook = with_first_line(DECODE, "helped(1)")
    notebook.cells.append(new_code_cell("import itertools as i\n%matplotlib inline\ndef helped(x): return i.count(x)"))
    assert needed(lesson, notebook, "01.3").splitlines()[0] == "import itertools as i"


@pytest.mark.parametrize("text", ["", "[]", "3", '{"cells": 1}', '{"nbformat": 4}', "\0", "[" * 10**5])
def test_what_is_no_notebook_is_refused(tmp_path: Path, text: str, lesson):
    (tmp_path / "a.ipynb").write_text(text)
    with pytest.raises(InputError, match=r"^a\.ipynb cannot be read as a notebook$"):
        submissions.read(tmp_path / "a.ipynb")


def test_a_pipe_or_a_folder_is_no_notebook(tmp_path: Path):
    os.mkfifo(tmp_path / "a.ipynb")
    with pytest.raises(InputError, match=r"no file of at most 20 MB"):
        submissions.read(tmp_path / "a.ipynb")


def test_a_notebook_made_to_choke_its_reader_is_graded_or_refused(tmp_path: Path, lesson):
    deep = "x = " + "+".join(["1"] * 20_000)
    chain = "\n".join(f"def f{k}(): return f{k + 1}()" for k in range(5_000))
    notebook = with_first_line(DECODE, "f0()")
    notebook.cells += [new_code_cell(deep), new_code_cell(chain), new_code_cell("(" * 5_000)]
    assert needed(lesson, notebook, "01.3").count("def ") == 5_000
    write(tmp_path, "ann", new_notebook(cells=[new_code_cell("a = 1\n" * 200_000)]))
    with pytest.raises(InputError, match="1,200,000 characters of source, more than anybody writes"):
        submissions.read(tmp_path / "ann" / f"{LESSON}.ipynb")


def test_a_notebook_of_something_else_belongs_to_no_lesson(lesson):
    assert submissions.lesson_of(new_notebook(cells=[new_code_cell("a = 1")]), "mine", [lesson]) is None


def test_a_reason_is_no_formula_of_a_spreadsheet(lesson):
    row = grading.Row("=cmd()", LESSON, lesson.exercises[0], "wrong", '=HYPERLINK("x")')
    cells = next(csv.DictReader(io.StringIO(gradebook.table(grading.Book((row,), (), ())))))
    assert cells["student"] == "'=cmd()" and cells["reason"] == '\'=HYPERLINK("x")' and cells["points"] == "0"


def test_a_name_on_the_page_is_text(lesson):
    row = grading.Row("<b>x", LESSON, lesson.exercises[0], "wrong", "<script>")
    assert "<b>x" not in gradebook.html(grading.Book((row,), ("<i>",), ())) and "<script>" not in gradebook.html(
        grading.Book((row,), ("<i>",), ())
    )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder.rmdir(), "There is no folder"),
        (lambda folder: None, "holds no folders; put each student's notebooks into one"),
        (lambda folder: (folder / "ann").mkdir(), "No notebook in"),
    ],
)
def test_a_folder_without_submissions_is_refused(tmp_path: Path, make, sentence: str):
    folder = tmp_path / "class"
    folder.mkdir()
    make(folder)
    result = CliRunner().invoke(main, ["grade", str(folder)])
    assert result.exit_code == 2 and sentence in result.stderr and not list(tmp_path.rglob("grades*"))
