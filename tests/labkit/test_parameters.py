import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from refusals import Refusals, check_refusal, refused

from labkit.lesson import parameters


def notebook(source: str, ranges: dict | None = None) -> nbformat.NotebookNode:
    metadata = {"tags": ["parameters"], "labkit": {"ranges": ranges or {}}}
    return new_notebook(cells=[new_code_cell(source, metadata=metadata)])


def bind(source: str, name: str, value: object, ranges: dict | None = None) -> object:
    return parameters.bind(parameters.read(notebook(source, ranges)), {name: value})[name]


def test_reads_what_a_line_wise_reader_misses():
    source = "# a comment\nA = 3; B = 'x # y'\nC: float = (\n  0.5\n)\nD = [1, 2]"
    assert {name: p.default for name, p in parameters.read(notebook(source)).items()} == {
        "A": 3,
        "B": "x # y",
        "C": 0.5,
        "D": [1, 2],
    }


@pytest.mark.parametrize(
    "source", ["A = len('x')", "import os", "A = B = 1", "A, B = 1, 2", "A += 1", "A: int", "f(1)"]
)
def test_refuses_what_is_no_literal(source: str):
    check_refusal("write each of its lines as NAME = literal", lambda: parameters.read(notebook(source)))


def test_refuses_a_cell_that_is_no_python():
    check_refusal("not Python", lambda: parameters.read(notebook("A = =")))


@pytest.mark.parametrize("cells", [0, 2])
def test_refuses_no_or_two_parameter_cells(cells: int):
    book = new_notebook(cells=[new_code_cell("A = 1", metadata={"tags": ["parameters"]}) for _ in range(cells)])
    check_refusal(f"has {cells} cells tagged `parameters`", lambda: parameters.read(book))


@pytest.mark.parametrize(
    ("default", "given", "bound"),
    [
        ("1", "2", 2),
        ("1", " -3 ", -3),
        ("1", "1_000", 1000),
        ("0.5", "1e-3", 1e-3),
        ("0.5", 1, 1.0),
        ("True", "false", False),
        ("True", "True", True),
        ("'a'", "007", "007"),
        ("[1]", "[2, 3]", [2, 3]),
        ("[0.5]", "[1, 2]", [1.0, 2.0]),
        ("(1,)", (4, 5), [4, 5]),
        ("None", "3", 3),
        ("None", "resnet", "resnet"),
    ],
)
def test_a_value_takes_its_default_s_type(default: str, given: object, bound: object):
    result = bind(f"A = {default}", "A", given)
    assert (result, type(result)) == (bound, type(bound))


@pytest.mark.parametrize(
    ("default", "given"),
    [
        ("1", "2.5"),
        ("1", 2.0),
        ("1", True),
        ("1", "many"),
        ("0.5", "nan"),
        ("0.5", "inf"),
        ("0.5", True),
        ("0.5", 10**309),
        ("0.5", "1e999"),
        ("1", "²"),
        ("None", "{1, 2}"),
        ("None", float("nan")),
        ("True", "yes"),
        ("True", 1),
        ("'a'", 3),
        ("[1]", "1"),
        ("[1]", "[0.5]"),
        ("[1]", "[1"),
        ("None", object()),
    ],
)
def test_a_value_of_another_type_is_refused(default: str, given: object):
    check_refusal("A cannot be ... ; give ... , like its default ... .", lambda: bind(f"A = {default}", "A", given))


def binding(source: str, name: str, given: object, **ranges: list):
    return lambda: bind(source, name, given, ranges)


REFUSALS: Refusals = {
    "no parameter ratios; did you mean RATIO": binding("RATIO = 0.5\nSEED = 0", "ratios", 1),
    "it has RATIO, SEED": binding("RATIO = 0.5\nSEED = 0", "XYZZY", 1),
    "0.05; give a number from 0.1 to 0.9": binding("A = 0.5", "A", "0.05", A=[0.1, 0.9]),
    "-1; give a number from 0.1 to 0.9": binding("A = 0.5", "A", -1, A=[0.1, 0.9]),
    "A cannot be 9": binding("A = [1]", "A", "[1, 9]", A=[1, 8]),
    "choose one of l1, taylor": binding("A = 'l1'", "A", "l2", A=["l1", "taylor"]),
    "choose one of 1, 2, 4": binding("A = 1", "A", 3, A=[1, 2, 4]),  # lies between the choices
    "choose one of 1, 4": binding("A = '1'", "A", "3", A=["1", "4"]),
    "choose one of smoke, class, full": binding("PRESET = 'class'", "PRESET", "large"),
    "no parameter B": binding("A = 1", "A", 1, B=[0, 1]),  # the range's fault
}


@refused(REFUSALS)
def test_an_unknown_name_and_a_value_out_of_range_are_refused(words, call):
    check_refusal(words, call)


@pytest.mark.parametrize(("value", "allowed"), [(0.1, [0.1, 0.9]), (0.9, [0.1, 0.9]), (4, [1, 2, 4])])
def test_bounds_belong_to_the_range(value: float, allowed: list):
    assert bind(f"A = {allowed[0]}", "A", value, {"A": allowed}) == value
