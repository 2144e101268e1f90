"""claims.toml and verdicts: the ranges decide, intervals count, a bad entry is named."""

import ast
import inspect
import math
from pathlib import Path

import nbformat
import pytest

from course import notebooks
from labkit import claims
from labkit.errors import DataError, InputError

ENTRY = {
    "id": '"3.1"',
    "section": "3",
    "text": '"Pruned channels make it faster."',
    "quantity": '"speed-up"',
    "unit": '"x"',
    "expected": "[1.5, 2.0]",
    "needs": '"any"',
    "source": '"guide section 3"',
}


def entry(**changes: str) -> str:
    fields = {name: value for name, value in {**ENTRY, **changes}.items() if value}
    return "[[claim]]\n" + "".join(f"{name} = {value}\n" for name, value in fields.items())


def load(folder: Path, text: str) -> dict[str, claims.Claim]:
    path = folder / "claims.toml"
    path.write_text(text, encoding="utf-8")
    return claims.load(path)


@pytest.fixture
def claim(tmp_path: Path) -> claims.Claim:
    return load(tmp_path, entry())["3.1"]


@pytest.mark.parametrize(
    ("value", "ci95", "verdict"),
    [
        (1.7, None, "confirmed"),
        (1.5, None, "confirmed"),
        (2.0 * (1 + 1e-12), None, "confirmed"),
        (1.49, None, "contradicted"),
        (2.1, None, "contradicted"),
        (1.7, (1.6, 1.8), "confirmed"),
        (1.7, (1.4, 1.8), "inconclusive"),
        (1.7, (1.4, 2.4), "inconclusive"),
        (1.45, (1.4, 1.55), "inconclusive"),
        (1.2, (1.1, 1.3), "contradicted"),
        (None, None, "not measurable here"),
        (math.inf, None, "contradicted"),
    ],
)
def test_verdict_follows_the_range_and_the_interval(claim, value, ci95, verdict):
    assert claims.verdict(claim, value, ci95) == verdict


def test_an_open_bound_confirms_any_value_beyond(tmp_path):
    claim = load(tmp_path, entry(expected="[1.0, inf]"))["3.1"]
    assert [claims.verdict(claim, value) for value in (0.9, 1.0, 1e9)] == ["contradicted", "confirmed", "confirmed"]


@pytest.mark.parametrize(
    ("expected", "unit", "words"),
    [
        ("[1.5, 2.0]", '"x"', "1.5 to 2 x"),
        ("[1.0, inf]", '"ratio"', "at least 1"),
        ("[-inf, 0.05]", '"USD"', "at most 0.05 USD"),
        ("[2, 2]", '"TOPS/W"', "exactly 2 TOPS/W"),
        ("[140000, 2000000]", '"USD"', "140,000 to 2,000,000 USD"),
    ],
)
def test_expected_range_reads_as_words(tmp_path, expected, unit, words):
    assert claims.expected(load(tmp_path, entry(expected=expected, unit=unit))["3.1"]) == words


@pytest.mark.parametrize("value", ["fast", True, math.nan])
def test_a_value_that_is_no_number_is_refused(claim, value):
    with pytest.raises(InputError, match=r"Claim 3\.1 takes a number, or None"):
        claims.verdict(claim, value)


@pytest.mark.parametrize("ci95", [(1.8, 1.9), (1.6,), (1.9, 1.6)])
def test_an_interval_that_does_not_hold_the_value_is_refused(claim, ci95):
    with pytest.raises(InputError, match=r"has to be \(low, high\) around the value"):
        claims.verdict(claim, 1.7, ci95)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"needs": ""}, "needs: Field required"),
        ({"needs": '"tpu"'}, "needs: Input should be 'any', 'cpu', 'gpu'"),
        ({"expected": "[2.0, 1.0]"}, r"expected is \[2.0, 1.0\]; give \[low, high\]"),
        ({"expected": "[nan, 1.0]"}, r"give \[low, high\]"),
        ({"expected": '["1", 2]'}, r"give \[low, high\]"),
        ({"expected": "[1.0]"}, r"expected is \[1.0\]; give \[low, high\]"),
        ({"expected": "[true, 2.0]"}, r"give \[low, high\]"),
        ({"section": '"3"'}, "section: Input should be a valid integer"),
        ({"id": '"4.1"'}, "the id has to be <section>.<n>"),
        ({"text": '" "'}, "text: String should match"),
        ({"verdict": '"confirmed"'}, "verdict: Extra inputs are not permitted"),
    ],
)
def test_a_bad_entry_is_named_with_what_is_wrong(tmp_path, changes, message):
    with pytest.raises(DataError, match=rf"claims\.toml, entry 2 .*{message}"):
        load(tmp_path, entry(id='"3.9"') + entry(**changes))


def test_a_claim_that_is_there_twice_is_named(tmp_path):
    with pytest.raises(DataError, match=r"entry 2: the id '3\.1' is there twice"):
        load(tmp_path, entry() + entry())


def test_a_file_that_is_missing_or_no_toml_is_said(tmp_path):
    with pytest.raises(DataError, match="is missing"):
        claims.load(tmp_path / "none.toml")
    with pytest.raises(DataError, match="is not TOML"):
        load(tmp_path, "[[claim]\n")


def test_the_course_s_own_claims_load():
    known = claims.load()
    assert next(iter(known)) == "1.1"
    assert all(claim.source for claim in known.values())


# the claims and the lessons -------------------------------------------------------------------------


def called(source: str) -> set[str]:
    """The ids that code hands to `claim(...)`: literals, and what a loop over literals or a dict's keys puts there."""
    tree = ast.parse(source)
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    found = set()
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or getattr(call.func, "attr", getattr(call.func, "id", "")) != "claim":
            continue
        first = call.args[0]
        if isinstance(first, ast.Constant):
            found.add(first.value)
        for loop in loops:
            if call in ast.walk(loop) and ast.unparse(first) in ast.unparse(loop.target).strip("()").split(", "):
                ids = loop.iter.func.value.keys if isinstance(loop.iter, ast.Call) else loop.iter.elts
                found |= {one.value for one in ids}
    return found


def used() -> dict[str, str]:
    """Each id that a lesson claims, and the lesson's name."""
    cells = [(path.stem, cell) for path in notebooks.all_lessons() for cell in nbformat.read(path, as_version=4).cells]
    return {id: stem for stem, cell in cells if cell.cell_type == "code" for id in called(cell.source)}


def test_ids_are_found_where_code_hands_them_over():
    code = """
    lab.claim("1.1", 2.0)
    claim("1.2", *ci)
    for name in ("1.3", "1.4"):
        lab.claim(name, None)
    for name, value in {"1.5": 1, "1.6": 2}.items():
        lab.claim(name, value)
    for other in ("2.1", "2.2"):
        print(other)
    def claim(id, value):
        lab.claim(id, value)
    check("1.7")
    """
    assert called(inspect.cleandoc(code)) == {f"1.{n}" for n in range(1, 7)}


def test_a_lesson_claims_only_what_there_is():
    assert set(used()) <= set(claims.load())


def test_every_claim_that_could_be_settled_is_put_to_the_test_by_a_lesson():
    settled_by_a_run = {claim.id for claim in claims.load().values() if claim.needs != "document"}
    assert settled_by_a_run - set(used()) == set()
