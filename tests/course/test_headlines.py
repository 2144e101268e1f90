"""The first pages show the recorded results, and pictures of the same numbers."""

import re

import pytest

from course import headlines
from labkit import files
from labkit.records import recorded

RESULTS = headlines.headlines()
RUNS = [pytest.param(run, id=run.machine["slug"]) for run in recorded("13")]
FASTEST = re.compile(r"channels (?:first|last), \d threads?, best (?:folded )?eager, ResNet-20")


@pytest.mark.parametrize("headline", RESULTS, ids=lambda headline: headline.lesson)
def test_a_committed_picture_shows_the_recorded_numbers(headline):
    assert headlines.description(headlines.PICTURES / headline.picture) == headlines.alt(headline), "run .ci/readme"


def test_the_readme_shows_the_recorded_results():
    text = (files.ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"(?s)<!-- results: .*?-->(.*?)<!-- /results -->", text)[1]
    assert shown.strip() == headlines.markdown("course/site/static", "notebooks"), "run .ci/readme"


@pytest.mark.parametrize("headline", RESULTS, ids=lambda headline: headline.lesson)
def test_the_ends_of_an_interval_lie_about_its_number(headline):
    assert all(bar.low <= bar.value <= bar.high for bar in headline.bars)


def test_a_drawn_picture_carries_its_description(tmp_path):
    headlines.draw(RESULTS[0], tmp_path)
    assert headlines.description(tmp_path / RESULTS[0].picture) == headlines.alt(RESULTS[0])


@pytest.mark.parametrize("run", RUNS)
def test_all_steps_stand_beside_the_fastest_eager_way_of_each_record(run):
    """Whether or not the record's eager network had its norms folded, which the sentence says."""
    headline = headlines.all_steps_together(run)
    eager = {entry.name: entry.value for entry in run.measurements if FASTEST.fullmatch(entry.name)}
    fastest = max(eager, key=eager.get)
    assert fastest.startswith("channels last, 2 threads")
    all_steps = run.named(f"all steps, {fastest.removeprefix('channels last, 2 threads, ')}")
    assert headline.bars[-1].value == pytest.approx(all_steps.value / eager[fastest], rel=0.05)
    assert ("eager PyTorch with folded norms" in headline.text) == ("folded" in fastest)
    assert ("would make eager" in headline.text) == ("folded" not in fastest)
