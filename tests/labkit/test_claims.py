"""claims.toml and verdicts: the ranges decide, intervals count, a bad entry is named."""

import math
from pathlib import Path

import pytest

from labkit import claims, files, records
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
        (2.1, None, "contradicted"),
        (1.7, (1.6, 1.8), "confirmed"),
        (1.7, (1.4, 1.8), "inconclusive"),
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


def test_every_claim_that_could_be_settled_was_put_to_the_test_by_a_recorded_lesson():
    runs = [records.read(path) for path in files.RECORDED.glob("*/[0-9][0-9].json")]
    tested = {claim.id for run in runs for claim in run.claims}
    assert {claim.id for claim in claims.load().values() if claim.needs != "document"} <= tested <= set(claims.load())
