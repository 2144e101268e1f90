"""A class of made-up hand-ins: each gets its right grade, whatever the others are, and none harms anything."""

import ast
import csv
import io
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutants
import nbformat
import psutil
import pytest
from commands import labkit, wait_until
from handins import BOUND, CONV, FULL, LESSON, USERS, solved, with_first_line, write
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from course import answers, grade, notebooks
from course.grade import Grade, Gradebook
from labkit import files
from labkit.errors import InputError
from labkit.storage import native

SOURCE = notebooks.read(files.NOTEBOOKS / f"{LESSON}.ipynb")
SECONDS = 5


def anonymous(copy: NotebookNode) -> dict:
    """What another editor may leave of a notebook: sources, and no more."""
    kinds = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    bare = [kinds[cell.cell_type == "markdown"](cell.source) for cell in copy.cells]
    for cell in bare:
        cell.pop("id")
    return {"cells": bare, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}


def with_cells(copy: NotebookNode, *sources: str) -> NotebookNode:
    copy.cells += [new_code_cell(source) for source in sources]
    return copy


def damaged(change: Callable[[dict], object]) -> dict:
    """A solved notebook as JSON, changed in place."""
    notebook = json.loads(SOLVED)
    change(notebook)
    return notebook


def returning(expression: str, before: str = "") -> NotebookNode:
    return with_first_line(CONV, f"return {expression}", before=before)


SOLVED = nbformat.writes(solved())


ODD = """
import torch
class Odd(float):
    def __eq__(self, other): raise SystemExit
    def __str__(self): raise KeyboardInterrupt
    def __getattr__(self, name): raise MemoryError
class Worse(Exception):
    def __str__(self): return chr(0xD800)
class Worst(Exception):
    def __str__(self): raise self
"""
USES = "torch.ones(1); conv_work(1, 1, 1, 1, 1, 1, 1, 1); helped(1); SIZE, PRESET"
ADDED = "import itertools as i\n%matplotlib inline\ndef helped(x): return i.count(x)\nSIZE = 4 * 1024\n1 / 0"
CHAIN = "\n".join(f"def f{k}(): return f{k + 1}()" for k in range(5_000))
CHOKING = ("x = " + "+".join(["1"] * 20_000), CHAIN, "(" * 5_000, "x = " + "-" * 100_000 + "1", "\ud800")
CHEAT = "import labkit.lesson.check as c\nc.check = lambda *a: 1 / 0\n"
MOODLE = "Ann Smith_1327627_assignsubmission_file_"  # a folder as Moodle names it
DELETED = ("setup", "exercise-4", "check-4", "users-words")
FIRST = {**FULL, "01.1": 0}
CLASS = {  # student -> what is handed in, and the points that it gets; None: which they are is not promised
    "right": (solved(), FULL),
    "partly right": (returning("1, 2"), FIRST),
    "untouched": (notebooks.student_copy(SOURCE), dict.fromkeys(FULL, 0)),
    "deleted cells": (
        damaged(lambda n: n.update(cells=[cell for cell in n["cells"] if cell["id"] not in DELETED])),
        {**FULL, "01.3": 0},
    ),
    "endless loop": (with_first_line(BOUND, "while True: pass"), {**FULL, "01.2": 0}),
    "memory hog": (with_first_line(CONV, "held = []", "while True: held.append(bytearray(1 << 26))"), FIRST),
    "forks": (with_first_line(USERS, "import os", "while True: os.fork()"), {**FULL, "01.3": 0}),
    "network": (
        with_first_line(USERS, "import socket; socket.create_connection(('127.0.0.1', 9))"),
        {**FULL, "01.3": 0},
    ),
    "leaves": (with_first_line(CONV, "import os", "os._exit(0)"), FIRST),
    "kills": (with_first_line(CONV, "import os", "os.kill(os.getppid(), 9)"), FIRST),
    "segfault": (with_first_line(CONV, "import ctypes", "ctypes.string_at(0)"), FIRST),
    "talks": (with_first_line(CONV, "print('x' * 200_000_000)"), None),
    "replies": (with_first_line(CONV, "import os", "[os.write(n, b'passed' * 10**6) for n in range(3, 64)]"), None),
    "breaks the check": (with_first_line(CONV, "return 1, 2", before=CHEAT), FIRST),
    "odd": (returning("Odd(1), Odd(2)", ODD), None),
    "cyclic": (returning("x", "x = []\nx.append(x)\n"), FIRST),
    "generator": (returning("(i for i in iter(int, 1))"), FIRST),
    "huge": (returning("10 ** 10_000, float('nan')"), FIRST),
    "tensor": (returning("torch.empty(1 << 20).to_sparse(), torch.empty(2, device='meta')", "import torch\n"), FIRST),
    "surrogate": (with_first_line(CONV, "raise ValueError('\\ud800 \\0 \\x1b[31m')"), FIRST),
    "worse": (with_first_line(CONV, "raise Worse", before=ODD), FIRST),
    "worst": (with_first_line(CONV, "raise Worst", before=ODD), None),
    "exits": (with_first_line(CONV, "raise SystemExit"), FIRST),
    "no python": (returning("(", before="\ud800"), FIRST),
    "metadata list": (damaged(lambda n: n.update(metadata=[])), FULL),
    "metadata number": (damaged(lambda n: n["metadata"]["labkit"].update(lesson=[1])), FULL),
    "sources dicts": (damaged(lambda n: [cell.update(source={"x": 1}) for cell in n["cells"]]), None),
    "source of null": (damaged(lambda n: n["cells"][-1].update(source=[None, 1])), FULL),
    "cells null": (damaged(lambda n: n["cells"].extend([None, 3, [], {}, {"cell_type": "code"}])), FULL),
    "ids lists": (damaged(lambda n: [cell.update(id=[]) for cell in n["cells"]]), FULL),
    "no cells": ({"metadata": {"labkit": {"lesson": LESSON}}}, dict.fromkeys(FULL, 0)),
    b"n\xffame": (solved(), FULL),
    b"n\xfeame": (returning("0"), FIRST),
    "=cmd()<b>": (solved(), FULL),
    "uses what is above and added": (with_cells(with_first_line(USERS, USES), ADDED), FULL),
    "uses what was computed": (with_first_line(USERS, "lab.finish()"), {**FULL, "01.3": 0}),
    "chokes a reader": (with_cells(with_first_line(USERS, "f0"), *CHOKING), FULL),
    MOODLE: (solved(), FULL),
}


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, dict]], str]:
    """The class's folder after `./lab grade`, its rows by student and exercise, and what the command printed."""
    folder = tmp_path_factory.mktemp("school") / "class"
    folder.mkdir()
    for student, (notebook, _) in CLASS.items():
        write(folder, student, notebook)
    renamed = solved()
    renamed.metadata.pop("labkit")
    write(folder, "renamed", renamed, "homework (2) final")
    os.rename(write(folder, "named in bytes", renamed, "x"), os.fsencode(folder) + b"/named in bytes/\xff.ipynb")
    write(folder, "metadata lost", anonymous(solved()), "homework")
    (folder / "nothing").mkdir()
    (folder / "linked file").mkdir()
    (folder / "linked file" / f"{LESSON}.ipynb").symlink_to(folder / "right" / f"{LESSON}.ipynb")
    (folder / "linked folder").symlink_to(folder / "right")
    os.mkfifo(folder / "nothing" / f"{LESSON}.ipynb")
    (folder / "not to be entered").mkdir(mode=0)
    command = [sys.executable, "-m", "course.cli", "grade", folder, "--seconds", str(SECONDS)]
    command += ["--totals", "moodle", folder / "points.csv"]
    environment = {**os.environ, "PYTHONPATH": str(files.ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    rows: dict[str, dict[str, dict]] = {}
    for row in csv.DictReader((folder / "grades.csv").open(encoding="utf-8")):
        rows.setdefault(row["student"], {})[row["exercise"]] = row
    return folder, rows, process.stdout


SHOWN = {b"n\xffame": r"n\udcffame", b"n\xfeame": r"n\udcfeame", "=cmd()<b>": "'=cmd()<b>"}
POINTS = {SHOWN.get(student, student): points for student, (_, points) in CLASS.items()} | {
    **dict.fromkeys(("renamed", "metadata lost", "named in bytes"), FULL),
    **dict.fromkeys(("nothing", "linked file", "linked folder", "not to be entered"), dict.fromkeys(FULL, 0)),
}


@pytest.mark.slow
def test_everybody_gets_the_points_of_their_own_work(graded):
    points = {
        student: {exercise: int(row["points"]) for exercise, row in rows.items() if exercise in FULL}
        for student, rows in graded[1].items()
    }
    promised = {
        student: of_student or {**FULL, "01.1": points[student]["01.1"]}
        for student, of_student in POINTS.items()
        if student != "sources dicts"
    }
    assert promised == {student: of_student for student, of_student in points.items() if student in promised}


@pytest.mark.slow
def test_the_reason_says_what_happened(graded):
    reasons = [
        ("partly right", "01.1", "wrong", "With batch=1"),
        ("untouched", "01.1", "not done", "not done yet"),
        ("endless loop", "01.2", "stopped", "stopped after 5 s: an endless loop"),
        ("deleted cells", "01.3", "missing", "the exercise's cell is not in the notebook"),
        ("forks", "01.3", "wrong", "PermissionError"),
        ("leaves", "01.1", "stopped", "code 0"),
        ("segfault", "01.1", "stopped", "SIGSEGV"),
        ("network", "01.3", "wrong", "PermissionError"),
        ("surrogate", "01.1", "wrong", r"ValueError: \ud800 \x00 \x1b[31m"),
        ("no python", "01.1", "broken", "the cell raised"),
        ("no cells", "01.1", "missing", "cannot be read as a notebook"),
        ("nothing", "01.1", "missing", "no file of at most 20 MB"),
        ("linked file", "01.1", "missing", "is a link; hand in the file itself"),
        ("linked folder", "01.1", "missing", "no notebook of this lesson was handed in"),
        ("metadata lost", "01.1", "passed", "found by its function's name"),
    ]
    rows = [(case, graded[1][case[0]][case[1]]) for case in reasons]
    assert [(case, row) for case, row in rows if row["result"] != case[2] or case[3] not in row["reason"]] == []


@pytest.mark.slow
def test_nothing_is_harmed_and_nothing_is_left_behind(graded):
    folder, rows, _ = graded
    assert rows.keys() == POINTS.keys() and all(by_exercise.keys() == FULL.keys() for by_exercise in rows.values())
    assert [path.name for path in folder.parent.iterdir()] == ["class"]
    assert [path.name for path in (folder / "right").iterdir()] == [f"{LESSON}.ipynb"]
    wait_until(
        lambda: not [p for p in psutil.process_iter(["uids"]) if p.info["uids"] and p.info["uids"].real > 1 << 30]
    )


@pytest.mark.slow
def test_the_page_says_it_all_without_help(graded):
    text = (graded[0] / "grades.html").read_text(encoding="utf-8")
    assert all(name in text for name in POINTS if "cmd" not in name)
    assert "an endless loop" in text and "links are not followed" in text
    assert "no network" in text and "<script" not in text and "http" not in text and "<b>x" not in text


@pytest.mark.slow
def test_the_command_writes_the_totals_beside_both_tables(graded):
    folder, _, printed = graded
    names = (*grade.FILES, "points.csv")
    assert printed.splitlines() == [(folder / name).resolve().as_uri() for name in names]
    rows = {row["Identifier"]: row for row in csv.DictReader((folder / "points.csv").open(encoding="utf-8"))}
    assert rows["Participant 1327627"]["Grade"] == str(sum(FULL.values()))


def all_wrong(lesson: Path) -> NotebookNode:
    """The learner's copy of a lesson with the first wrong answer to each exercise in tests/mutants."""
    copy = solved(lesson)
    wrong = tomllib.loads((mutants.FOLDER / f"lesson{lesson.stem[:2]}.toml").read_text(encoding="utf-8"))
    for task in notebooks.exercises(notebooks.read(lesson)):
        (cell,) = (cell for cell in copy.cells if cell.id == task.cell_id)
        lines = task.solution.splitlines(keepends=True)
        end = mutants.end_of_docstring(task.solution)
        body = "".join(lines[end:])
        for old, new in next(iter(wrong[task.id].values())):
            body = body.replace(old, new)
        cell.source = "".join(lines[:end]) + body
    return copy


@pytest.fixture(scope="module")
def of_all_lessons(tmp_path_factory: pytest.TempPathFactory) -> Gradebook:
    """The grades of three: all right, all wrong in a plausible way, and lesson 02 with one of its two formats."""
    folder, second = tmp_path_factory.mktemp("class"), notebooks.find("02")
    for path in notebooks.all_lessons():
        write(folder, "all right", solved(path), path.stem)
        write(folder, "all wrong", all_wrong(path), path.stem)
    write(folder, "csr only", with_first_line("fair_sides", 'assert format == "csr"', lesson=second), second.stem)
    return grade.grade(folder)


@pytest.mark.slow
def test_every_worked_answer_passes(of_all_lessons: Gradebook):
    right = [row for row in of_all_lessons.grades if row.student == "all right"]
    assert {row.exercise.id: row.reason for row in right if row.result != "passed"} == {}
    assert len(right) > 15 and of_all_lessons.remarks == []


@pytest.mark.slow
def test_each_plausible_wrong_answer_is_wrong_as_in_its_notebook(of_all_lessons: Gradebook):
    """tests/notebooks/test_mutants.py says that there; nothing that the sandbox refuses is a reason."""
    wrong = [row for row in of_all_lessons.grades if row.student == "all wrong"]
    assert {row.exercise.id: row.result for row in wrong if row.result != "wrong"} == {}
    assert [row.reason for row in wrong if "PermissionError" in row.reason or "no thread" in row.reason] == []


@pytest.mark.slow
@pytest.mark.skipif(not all(map(native.load, native.ARGUMENTS)), reason="needs a C++ compiler")
def test_the_kernels_are_examined_as_in_the_notebook(of_all_lessons: Gradebook):
    results = {row.student: (row.result, row.reason) for row in of_all_lessons.grades if row.exercise.id == "02.3"}
    assert results["all right"] == ("passed", "")
    assert results["csr only"][0] == "wrong" and "kernel" in results["csr only"][1]


# reading what was handed in -----------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=5), some, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged_notebooks(draw: st.DrawFn) -> Any:
    """A solved notebook in which a few values, anywhere, have become something else or are gone."""
    notebook = json.loads(SOLVED)
    for _ in range(draw(st.integers(1, 4))):
        inside, key = {"": notebook}, ""
        while isinstance(inside[key], list | dict) and inside[key] and draw(st.integers(0, 4)):
            inside = inside[key]
            keys = range(len(inside)) if isinstance(inside, list) else list(inside)
            key = draw(st.sampled_from(keys))
        if inside is not notebook and key == "":
            return draw(JSON)
        inside[key] = draw(JSON)
    return notebook


LESSONS, _ = grade.read_lessons()


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(damaged_notebooks(), st.binary(min_size=1, max_size=8).filter(lambda name: not set(name) & {0, 47, 46}))
def test_a_damaged_hand_in_costs_nobody_else_anything(tmp_path_factory: pytest.TempPathFactory, notebook: Any, name):
    folder = tmp_path_factory.mktemp("class")
    write(folder, "ann", json.loads(SOLVED))
    write(folder, b"b" + name, notebook)
    entries, _ = grade.collect(folder, LESSONS)
    right = [(row, answer) for row, answer in entries if row.student == "ann"]
    assert [row.exercise.id for row, answer in right if answer] == list(FULL)
    assert len(entries) == 2 * len(FULL)
    book = Gradebook([row for row, _ in entries], [], "")
    grade.write(book, folder)
    assert (folder / "grades.csv").read_text(encoding="utf-8").count("\nann,") == len(FULL)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"cells": 1}', '{"nbformat": 4}', "\0", "[" * 10**5, "1" * 10**5])
def test_what_is_no_notebook_is_refused(tmp_path: Path, text: str):
    (tmp_path / "a.ipynb").write_text(text)
    with pytest.raises(InputError, match=r"^a\.ipynb cannot be read as a notebook$"):
        grade.read(tmp_path / "a.ipynb")


def answer(notebook: NotebookNode, exercise: str, folder: Path) -> answers.Answer:
    write(folder, "ann", notebook)
    (entry,) = (entry for row, entry in grade.collect(folder, LESSONS)[0] if row.exercise.id == exercise)
    return entry


def test_the_answer_counts_wherever_it_was_written(tmp_path: Path):
    copy = notebooks.student_copy(SOURCE, LESSON)
    copy.cells += [new_code_cell("def time_bound(*a): return 1"), new_code_cell("def time_bound(*a):\n    return (")]
    assert answer(copy, "01.2", tmp_path).source.endswith("return (")


def test_what_lab_answer_binds_is_the_worked_answer_for_the_cells_below():
    source = 'import math\nchoose = lab.answer("03.2", pick)\nx = lab.record("y", pick)\n%matplotlib inline'
    assert [ast.unparse(node) for node in answers.definitions(source)] == ["import math", "choose = pick"]
    cells = ["def pick(a, b, c, d): return a / c, 'compute'", 'choose = lab.answer("03.2", pick)']
    uses = "def time_bound(*a): return (8e12 / 2e12, 'compute') if a[0] == 8e12 else choose(*a)"
    result, _, reason = answers.checked(answers.Answer("01.2", BOUND, cells, uses)).partition("\n")
    assert result == "wrong" and "NameError" not in reason


def test_a_notebook_of_too_much_source_is_refused(tmp_path: Path):
    path = write(tmp_path, "ann", new_notebook(cells=[new_code_cell("a = 1\n" * 200_000)]))
    with pytest.raises(InputError, match="1,200,000 characters of source, more than anybody writes"):
        grade.read(path)


def test_a_damaged_lesson_of_the_course_is_a_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "NOTEBOOKS", tmp_path)
    nbformat.write(SOURCE, tmp_path / f"{LESSON}.ipynb")
    (tmp_path / "02_cut_short.ipynb").write_text('{"cells": [')
    lessons, remarks = grade.read_lessons()
    assert [lesson.name for lesson in lessons] == [LESSON] and "02_cut_short.ipynb is not a notebook" in remarks[0]


def test_other_files_get_a_remark(tmp_path: Path):
    write(tmp_path, "ann", solved())
    write(tmp_path, "ann", solved(), "a second")
    write(tmp_path, "ann", new_notebook(cells=[new_code_cell("a = 1")]), "mine")
    _, remarks = grade.collect(tmp_path, LESSONS)
    assert "ann: mine.ipynb belongs to no lesson" in remarks
    assert f"ann: of several notebooks for {LESSON}, {LESSON}.ipynb was graded" in remarks


# the gradebook ------------------------------------------------------------------------------------


def test_a_reason_is_no_formula_of_a_spreadsheet_and_no_html():
    row = Grade("=cmd()", LESSON, LESSONS[0].exercises[0], "wrong", '=HYPERLINK("<script>")')
    book = Gradebook([row], ["<i>"], "")
    cells = next(csv.DictReader(io.StringIO(grade.table(book))))
    assert cells["student"] == "'=cmd()" and cells["reason"].startswith("'=HYPERLINK") and cells["points"] == "0"
    assert "<script>" not in grade.html(book) and "<i>" not in grade.html(book)


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (lambda folder: folder.rmdir(), (), "There is no folder"),
        (lambda folder: None, (), "holds no folders; put each student's notebooks into one"),
        (lambda folder: (folder / "ann").mkdir(), (), "No notebook in"),
        (lambda folder: (folder / "grades.csv").mkdir(), (), "grades.csv cannot be written; fix that first"),
        (lambda folder: write(folder, "ann", solved()), ("--seconds", "inf"), "is inf seconds; give 1 to 86,400"),
        (lambda folder: write(folder, "ann", solved()), ("--seconds", "nan"), "is nan seconds; give 1 to 86,400"),
    ],
)
def test_what_cannot_be_graded_is_refused_before_anything_runs(tmp_path: Path, make, options: tuple, sentence: str):
    folder = tmp_path / "class"
    folder.mkdir()
    make(folder)
    before = sorted(tmp_path.rglob("*"))
    result = labkit("grade", folder, *options)
    assert result.exit_code == 2 and sentence in result.stderr and sorted(tmp_path.rglob("*")) == before
