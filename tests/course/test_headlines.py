"""The first pages show the recorded results, and pictures of the same numbers."""

import re

import pytest

from course import headlines
from labkit import files

RESULTS = headlines.headlines()


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
