"""Intervals of quality hold a known truth as often as they say, or as their docstrings admit: SIMULATED data."""

import functools
import math

import pytest
from quality_intervals import INTERVALS, Coverage, Setting, coverage


def settings(interval: str) -> dict[str, Setting]:
    return {setting.name: setting for setting in INTERVALS[interval]()}


def least(nominal: float, draws: int) -> float:
    """The share that an interval of this coverage falls short of once in a thousand times."""
    return nominal - 3.1 * math.sqrt(nominal * (1 - nominal) / draws)


@functools.cache
def of_accuracy(name: str) -> Coverage:
    """The same for both tests that read it."""
    return coverage(settings("accuracy")[name], draws=2000)


@pytest.mark.parametrize("name", ["50 images, 2.0% turn right, 2.0% wrong", "300 images, 0.0% turn right, 1.0% wrong"])
def test_changes_of_accuracy_are_covered_on_both_sides(name):
    row = of_accuracy(name)
    print(name, row)
    assert row.holds >= least(0.95, 2000) and max(row.below, row.above) <= 1 - least(0.975, 2000)


def often(name: str) -> tuple:
    """Many changes of many answers take long, and each night."""
    many = name.startswith("2000") and not name.startswith("2000 images, 0.")
    return (pytest.mark.slow, pytest.mark.nightly) if many else (pytest.mark.slow,)


@pytest.mark.parametrize("name", [pytest.param(name, marks=often(name)) for name in settings("accuracy")])
def test_every_change_of_accuracy_is_covered(name):
    assert of_accuracy(name).holds >= least(0.95, 2000)


@pytest.mark.parametrize("shared", ["by image 90%, by seed 0%", "by image 50%, by seed 20%"])
def test_changes_over_seeds_are_covered_whether_images_or_seeds_decide(shared):
    row = coverage(settings("seeds")[f"3 seeds, 300 images; shared {shared}"], draws=200)
    print(shared, row)
    assert row.holds >= least(0.95, 200)


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("6 texts of equal length, normal changes", 0.945),
        ("12 texts of unequal length, normal changes", 0.935),
        ("8 texts of equal length, skewed changes", 0.90),
        ("6 texts of unequal length, skewed changes", 0.89),
    ],
)
def test_perplexities_over_few_texts_are_covered_as_their_docstring_says(name, holds):
    row = coverage(settings("perplexity")[name], draws=2000)
    print(name, row)
    assert abs(row.holds - holds) <= 3.1 * math.sqrt(holds * (1 - holds) / 2000)


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("6 parts, 72 normal items, noise the same for all, reliability (0.4,)", 0.95),
        ("12 parts, 72 skewed items, noise larger for large scores, reliability (0.4,)", 0.95),
        ("6 parts, 72 normal items, noise the same for all, reliability (0.6, 0.8)", 0.95),
        ("12 parts, 16 skewed items, noise heavy-tailed, reliability (0.9,)", 0.85),
    ],
)
def test_ceilings_are_covered_as_their_docstring_says(name, holds):
    row = coverage(settings("ceiling")[name], draws=1000)
    print(name, row)
    assert row.holds >= least(holds, 1000)
