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
def test_all_steps_stand_beside_the_fastest_eager_way_of_each_process(run):
    """Also a record's whose eager network had norms, which the sentence says."""
    headline = headlines.all_steps_together(run)
    eager = [entry.name for entry in run.measurements if FASTEST.fullmatch(entry.name)]
    race = "best folded eager, ResNet-20" if "folded" in eager[0] else "best eager, ResNet-20"
    assert ("eager PyTorch with folded norms" in headline.text) == ("folded" in race)
    assert ("would make eager" in headline.text) == ("folded" not in race)
    if run.named(headlines.TOGETHER) is not None:
        of_lesson = run.spread(headlines.TOGETHER)
        assert headline.bars[-1] == headlines.Bar("all three", of_lesson.median, of_lesson.smallest, of_lesson.largest)
        return
    together = run.over_processes(f"all steps, {race}")
    for process, all_steps in enumerate(together):
        ways = [run.over_processes(name)[process] for name in eager]
        beside_fastest = min(all_steps / way for way in [1.0, *ways])
        assert headline.bars[-1].low <= beside_fastest * (1 + 1e-9)
        assert headline.bars[-1].high >= beside_fastest * (1 - 1e-9)
    assert headline.bars[-1].high <= max(together)
