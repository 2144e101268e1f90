"""Rank correlation: its value against definitions, its interval against what must hold, its refusals."""

import numpy as np
import pytest

from labkit import ranks
from labkit.errors import InputError


def test_only_the_order_counts():
    a = np.array([0.3, 5.0, -2.0, 1.0, 9.0])
    assert ranks.spearman(a, np.exp(a))[0] == pytest.approx(1.0)
    assert ranks.spearman(a, -(a**3))[0] == pytest.approx(-1.0)


def test_value_is_that_of_the_textbook_formula_without_ties():
    generator = np.random.default_rng(3)
    a, b = generator.permutation(20), generator.permutation(20)
    assert ranks.spearman(a, b)[0] == pytest.approx(1 - 6 * ((a - b) ** 2).sum() / (20 * (20**2 - 1)))


def test_ties_share_their_mean_rank():
    assert ranks.spearman([1, 2, 2, 3], [1, 2.5, 2.5, 4])[0] == pytest.approx(1.0)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    generator, rho, inside = np.random.default_rng(0), 0.6, 0
    truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's of a normal pair with Pearson's rho
    for _ in range(100):
        a, noise = generator.normal(size=(2, 72))
        _, low, high = ranks.spearman(a, rho * a + np.sqrt(1 - rho**2) * noise, draws=200)
        inside += low <= truth <= high
    assert inside >= 86  # of 100 at 95 %: fewer has a probability below 1 in 1000


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([1, 2, 3, 4], [1, 2, 3], "of one length"), ([1, 2, 3], [1, 2, 3], "four or more"), ([1] * 5, range(5), "same")],
)
def test_what_cannot_be_ranked_is_refused(a, b, message):
    with pytest.raises(InputError, match=message):
        ranks.spearman(a, b)
