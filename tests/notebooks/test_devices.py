"""What a lesson says about the device that it times, read in its source: nothing runs here."""

import ast
import re
from collections.abc import Iterator

import pytest
from grain import code
from nbformat import NotebookNode

from course import notebooks, run
from course.notebooks import tags
from labkit.lesson import claims

LESSONS = {path.stem[:2]: path for path in notebooks.all_lessons()}
ON_THE_CPU = ["00", "02", "06", "12", "13"]
ABOUT_THE_CPU = {claim.id for claim in claims.load().values() if claim.needs == "cpu"}
TIMED_ON_THE_CPU = re.compile(r"""device["']?\s*[=:]\s*"cpu\"""")
ASKS_FOR_CUDA = re.compile(r"""device\.type == "cuda"|cuda\.is_available\(\)|if on_gpu""")

each_lesson = pytest.mark.parametrize("number", LESSONS)


def cells(number: str) -> list[NotebookNode]:
    return code(notebooks.read(LESSONS[number]))


def takes_a_gpu(number: str) -> bool:
    _, declared = run.load(LESSONS[number])
    return not declared["DEVICE"].allowed


def calls(cell: NotebookNode, method: str) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(cell.source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method:
            yield node


def test_the_lessons_that_time_the_cpu_alone_offer_no_gpu():
    assert [number for number in LESSONS if not takes_a_gpu(number)] == ON_THE_CPU


@each_lesson
def test_a_lesson_offers_a_gpu_if_and_only_if_it_works_on_the_session_s_device(number: str):
    works_there = any("lab.device" in cell.source for cell in cells(number))
    assert works_there == takes_a_gpu(number)


@each_lesson
def test_a_lesson_s_session_is_on_the_device_that_its_parameter_says(number: str):
    (setup,) = (cell for cell in cells(number) if "setup" in tags(cell))
    (start,) = calls(setup, "start")
    devices = [keyword.value for keyword in start.keywords if keyword.arg == "device"]
    in_options = '"device": DEVICE' in setup.source
    assert in_options or [ast.unparse(device) for device in devices] == ["DEVICE"]


@each_lesson
def test_a_claim_about_the_cpu_says_where_its_value_was_timed(number: str):
    """In a lesson that may run on a GPU and times the CPU beside it, the session's device says nothing."""
    times_the_cpu = any(TIMED_ON_THE_CPU.search(cell.source) and any(calls(cell, "compare")) for cell in cells(number))
    if not (takes_a_gpu(number) and times_the_cpu):
        return
    for cell in cells(number):
        texts = {node.value for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Constant)}
        if any(calls(cell, "claim")):
            states_a_device = TIMED_ON_THE_CPU.search(cell.source) is not None
            assert states_a_device or not texts & ABOUT_THE_CPU, f"{cell.id} leaves it to the session"


@each_lesson
def test_a_cell_that_trains_by_the_clock_waits_for_the_device(number: str):
    for cell in cells(number):
        reads_the_clock_itself = any(calls(cell, "perf_counter"))
        assert not (reads_the_clock_itself and any(calls(cell, "backward"))), f"{cell.id}: read labkit.clocks.now()"


@each_lesson
def test_what_only_a_gpu_measures_has_the_size_of_the_preset(number: str):
    for cell in cells(number):
        if "measure" in tags(cell) and ASKS_FOR_CUDA.search(cell.source):
            assert any(calls(cell, "by_preset")), f"{cell.id} is as long at smoke as at full"
