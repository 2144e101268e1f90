"""The report in a real browser, on a wide screen and on a phone: made of the recorded runs, and of a sweep that is test
data only, the record of lesson 03 with other parameters and other numbers."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from course import report
from course.report import VERDICTS
from labkit import files, records

WIDTHS = (390, 1400)
LOOK = """({
    width: document.scrollingElement.scrollWidth,
    outside: [...document.querySelectorAll("body *")].filter(one => !one.closest(".scroll") && one.checkVisibility())
        .filter(one => one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80)),
    images: [...document.images].map(one => [one.alt.length, one.naturalWidth, one.getBoundingClientRect().width]),
    figures: [...document.querySelectorAll("figure")].map(one => one.querySelectorAll("table tbody tr").length),
    unlabelled: [...document.querySelectorAll("svg:not([aria-label]), canvas, input:not([id])")].length,
    anchors: [...document.querySelectorAll("a[href^='#']")].map(one => one.hash.slice(1))
        .filter(id => !document.getElementById(id)),
    twice: [...document.querySelectorAll("[id]")].map(one => one.id).filter((id, at, all) => all.indexOf(id) != at),
    small: [...document.querySelectorAll("body *")].filter(one => parseFloat(getComputedStyle(one).fontSize) < 11)
        .map(one => one.outerHTML.slice(0, 80)),
    boxes: [...document.querySelectorAll(".scroll")].filter(one => one.checkVisibility())
        .map(one => [one.tabIndex, one.getAttribute("aria-label")]),
    headings: [...document.querySelectorAll("h1, h2, h3")].map(one => +one.tagName[1]),
})"""


def sweep(folder: Path) -> None:
    """Test data: the record of lesson 03 as if it had been run with other ratios, criteria and seeds."""
    noise = random.Random(0)
    original = records.read(next(files.RECORDED.glob("*/03.json")))
    for ratio in (0.3, 0.5, 0.7):
        for number, criterion in enumerate(("l1", "fpgm")):
            for seed in range(2):
                shift = 1 - 0.1 * ratio * (1 + number) + noise.gauss(0, 0.002)
                values = original.to_dict()
                for entry in values["measurements"]:
                    if entry["name"].startswith("accuracy lost"):
                        entry["value"] *= shift
                    for row in entry.get("rows", []):
                        row |= {"accuracy": row["accuracy"] * shift} if "accuracy" in row else {}
                values |= {"preset": "smoke", "parameters": {"RATIO": ratio, "CRITERION": criterion, "SEED": seed}}
                run = records.RunRecord.from_dict(values)
                records.write(run, folder / f"smoke-{ratio}-{criterion}-{seed}" / "record.json")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    sweep(folder / "03_swept")
    for path in files.RECORDED.glob("*/[0-9][0-9].json"):
        records.write(records.read(path), folder / path.stem / "record.json")
    (folder / "damaged").mkdir()
    (folder / "damaged" / "record.json").write_text("{")
    return report.write([folder], folder / "report.html")


@pytest.fixture(scope="module", params=WIDTHS)
def seen(request: pytest.FixtureRequest, built: Path, chromium) -> SimpleNamespace:
    chromium.resize(request.param, 900)
    chromium.errors.clear()
    chromium.requests.clear()
    chromium.open(built.as_uri())
    look = chromium.run(LOOK)
    return SimpleNamespace(
        **look,
        screen=request.param,
        nameless=chromium.nameless(),
        errors=[*chromium.errors],
        asked=[*chromium.requests],
    )


def test_the_page_does_not_scroll_sideways(seen: SimpleNamespace):
    assert seen.width <= seen.screen and seen.outside == []


def test_every_picture_is_loaded_described_and_fits(seen: SimpleNamespace):
    assert len(seen.images) >= 10
    assert all(alt >= 60 and natural > 0 and 250 < width <= seen.screen for alt, natural, width in seen.images)
    assert seen.unlabelled == 0


def test_every_picture_has_the_table_of_its_numbers(seen: SimpleNamespace):
    assert len(seen.figures) == len(seen.images) and min(seen.figures) >= 2


def test_nothing_is_nameless_broken_or_twice(seen: SimpleNamespace):
    assert (seen.nameless, seen.anchors, seen.twice) == ([], [], [])


def test_text_can_be_read(seen: SimpleNamespace):
    assert seen.small == []


def test_what_scrolls_can_be_reached_by_keyboard(seen: SimpleNamespace):
    assert seen.boxes and all(tab == 0 and label for tab, label in seen.boxes)


def test_headings_skip_no_level(seen: SimpleNamespace):
    assert seen.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(seen.headings, seen.headings[1:], strict=False))


def test_no_request_leaves_the_page(seen: SimpleNamespace):
    assert seen.errors == []
    assert [one for one in seen.asked if not one.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("verdict", VERDICTS)
def test_a_verdict_can_be_chosen_without_a_script(built: Path, chromium, verdict: str):
    name = verdict.replace(" ", "-")
    chromium.resize(1400, 900)
    chromium.open(built.as_uri())
    if not chromium.run(f"Boolean(document.getElementById('only-{name}'))"):
        pytest.skip("no claim has this verdict")
    rows = "[...document.querySelectorAll('tr.claim')]"
    wanted = chromium.run(f"{rows}.filter(row => row.classList.contains('{name}')).length")
    chromium.run(f"document.getElementById('only-{name}').click()")
    assert chromium.run(f"{rows}.filter(row => row.checkVisibility()).length") == wanted > 0
    chromium.run("document.getElementById('only-all').click()")
    assert chromium.run(f"{rows}.every(row => row.checkVisibility())")
