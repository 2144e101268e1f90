"""A wrong value is refused where it is typed, by the set-up cell, with the sentence of the command line."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from refusals import check_refusal

from course import notebooks, run
from course.notebooks import tags
from labkit.errors import InputError
from labkit.lesson.parameters import Parameter

LESSONS = notebooks.all_lessons()
BOUNDED = [
    pytest.param(lesson, parameter, id=f"{lesson.stem[:2]}-{parameter.name}")
    for lesson in LESSONS
    for parameter in run.load(lesson)[1].values()
    if parameter.allowed
]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty working folder, and nothing that the environment sets instead of the cell."""
    monkeypatch.chdir(tmp_path)
    for variable in ("LABKIT_PRESET", "LABKIT_DEVICE"):
        monkeypatch.delenv(variable, raising=False)


def set_up(lesson: Path, **typed: Any) -> None:
    """Execute the lesson's set-up cell after its parameters cell, in which somebody typed other values."""
    space = {"__name__": "__main__"}
    for cell in notebooks.read(lesson).cells:
        if "parameters" in tags(cell):
            exec(cell.source, space)
            space |= typed
        if "setup" in tags(cell):
            exec(cell.source, space)


def wrong_values(parameter: Parameter) -> list[Any]:
    """Values of the wrong type and out of range that can be given on the command line too."""
    if isinstance(parameter.default, str):
        return ["no such choice", parameter.default.swapcase() + "_"]
    lowest, highest = parameter.allowed
    values = ["many", math.nan, highest + 1, lowest - 1]
    return [*values, lowest + 0.5] if isinstance(parameter.default, int) else values


@pytest.mark.parametrize(("lesson", "parameter"), BOUNDED)
def test_a_wrong_value_is_refused_in_the_notebook_as_on_the_command_line(lesson: Path, parameter: Parameter):
    for value in wrong_values(parameter):
        with pytest.raises(InputError) as asked:
            run.prepare(lesson, {parameter.name: str(value)})
        assert str(asked.value).startswith(f"{parameter.name} cannot be {value!r}; ")
        check_refusal(str(asked.value), partial(set_up, lesson, **{parameter.name: value}))


@pytest.mark.parametrize(("lesson", "parameter"), BOUNDED)
def test_the_text_of_a_number_and_nothing_at_all_are_refused_in_the_notebook(lesson: Path, parameter: Parameter):
    text = str(parameter.default) if not isinstance(parameter.default, str) else 1
    for value in (text, None, [parameter.default]):
        words = f"{parameter.name} cannot be {value!r}; {'choose' if isinstance(parameter.default, str) else 'give'} "
        check_refusal(words, partial(set_up, lesson, **{parameter.name: value}))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem[:2])
def test_a_device_and_a_folder_that_cannot_be_are_refused_in_the_notebook(lesson: Path, tmp_path: Path):
    _, declared = run.load(lesson)
    words = "device is 'tpu'; choose auto, cpu, cuda or cuda:N."
    if declared["DEVICE"].allowed:  # a lesson that times one kind of device only
        words = "DEVICE cannot be 'tpu'; choose one of cpu, auto."
    check_refusal(words, lambda: set_up(lesson, DEVICE="tpu"))
    check_refusal("RESULTS_DIR cannot be 7; give the name of a folder, as text.", lambda: set_up(lesson, RESULTS_DIR=7))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("lesson", "parameter"), BOUNDED)
def test_what_bounds_a_parameter_has_the_type_of_its_default(lesson: Path, parameter: Parameter):
    assert {type(bound) for bound in parameter.allowed} == {type(parameter.default)}
