import re
from dataclasses import replace

import pytest
from test_report import MACHINE, RECORD

from course import claims_table
from course.columns import Column
from labkit.claims import Claim

SAID = {"ci95": None}


def claim(id: str = "3.1", needs: str = "any", unit: str = "x") -> Claim:
    return Claim(id, int(id[0]), f"Text of {id}.", "a quantity", unit, (1.0, 2.0), needs, "guide section 3")


def column(
    verdict: str,
    *,
    here: bool = True,
    preset: str = "class",
    device: str = "cpu",
    slug: str = "cpu",
    value: float | None = 1.5,
) -> Column:
    said = {"id": "3.1", "value": value, "ci95": None, "verdict": verdict}
    machine = {**MACHINE, "slug": slug, "label": f"Machine {slug}"}
    return Column(replace(RECORD, lesson="03", preset=preset, device=device, machine=machine, claims=[said]), here)


def overall(*columns: Column, needs: str = "any") -> str:
    one = claim(needs=needs)
    return claims_table.verdict(one, claims_table._found(one, columns))


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


@pytest.mark.parametrize("verdict", ["confirmed", "contradicted", "inconclusive"])
def test_one_machine_decides(verdict: str):
    assert overall(column(verdict)) == verdict


def test_nobody_measured_it():
    assert overall() == "not yet measured"


def test_machines_that_disagree_are_said_so():
    assert overall(column("confirmed"), column("contradicted", slug="gpu", device="cuda")) == "differs by machine"


def test_a_machine_that_cannot_say_leaves_it_to_the_other():
    assert overall(column("not measurable here"), column("contradicted", slug="gpu", device="cuda")) == "contradicted"


def test_of_one_machine_the_largest_preset_counts():
    smoke, full = column("contradicted", preset="smoke"), column("confirmed", preset="class", here=False)
    assert overall(smoke, full) == overall(full, smoke) == "confirmed"


def test_of_equal_presets_the_users_own_counts():
    assert overall(column("contradicted", here=False), column("confirmed")) == "confirmed"


def test_a_claim_about_a_gpu_without_a_gpus_record_is_not_yet_measured():
    assert overall(column("not measurable here"), needs="gpu") == "not yet measured"
    assert overall(column("not measurable here", device="cuda:0"), needs="gpu") == "not measurable here"


def test_what_only_a_document_settles_is_not_measurable():
    assert overall(column("not measurable here", value=None), needs="document") == "not measurable here"
    assert overall(needs="document") == "not measurable here"


def test_the_row_holds_text_condition_range_source_value_and_verdict():
    said = words(claims_table.claims_table([claim(needs="gpu")], [column("contradicted", slug="gpu", device="cuda")]))
    for expected in (
        "Text of 3.1.",
        "settled by a GPU",
        "1 to 2 x",
        "guide section 3",
        "contradicted 1.50x",
        "Machine gpu",
    ):
        assert expected in said


def test_a_smoke_run_is_named_as_such():
    assert "contradicted at smoke 1.50x" in words(
        claims_table.claims_table([claim()], [column("contradicted", preset="smoke")])
    )


def test_sections_are_counted_and_linked():
    html = claims_table.claims_section([claim(), claim("3.2"), claim("4.1")], [column("confirmed")])
    said = words(html)
    assert "3 claims: 1 confirmed, 2 not yet measured." in said
    assert "No record of a GPU is here" in said
    for section in (3, 4):
        assert f'href="#claims-{section}"' in html and f'id="claims-{section}"' in html
    assert html.count("<details open>") == 2


def test_verdicts_can_be_chosen_where_the_style_sheet_knows_them():
    from course import page

    frame = page.whole("", "", "")
    for verdict in claims_table.VERDICTS:
        name = verdict.replace(" ", "-")
        assert f".claims:has(#only-{name}:checked) tr" in frame and f":not(.{name})" in frame


def test_what_claims_say_is_escaped():
    hostile = replace(claim(), text="<script>", source="<script>", unit="<script>")
    assert "<script" not in claims_table.claims_section([hostile], [column("confirmed")])
