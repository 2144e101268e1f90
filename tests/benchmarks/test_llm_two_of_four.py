"""The record of SmolLM2 at 2:4: bits per weight, and ratios of perplexities over windows and draws."""

import llm_two_of_four
import numpy as np
import pytest
from llm_two_of_four import WAYS, Way

from labkit import stats

WINDOWS, TOKENS = 12, 511


def losses(draws: int, shift: float, seed: int) -> np.ndarray:
    """Draw losses [draws, windows] of 3 nats and a shift."""
    return 3 + shift + 0.05 * np.random.default_rng(seed).standard_normal((draws, WINDOWS))


@pytest.mark.parametrize(
    ("way", "bits"),
    [
        (Way(), 16),
        (WAYS["2:4, SparseGPT"], 9),
        (WAYS["half, SparseGPT"], 9),
        (WAYS["2:4 of 4 bits"], 3 + 20 / 64),
        (WAYS["3 bits"], 3 + 19 / 64),
        (WAYS["8 bits"], 8 + 24 / 64),
    ],
)
def test_bits_per_weight_count_values_positions_scales_and_zero_points(way: Way, bits: float):
    assert way.bits_per_weight == bits


def test_every_two_ways_are_compared_draw_by_draw():
    of_ways = {"dense": losses(1, 0.0, 1).tolist(), "a": losses(3, 0.2, 2).tolist(), "b": losses(3, 0.5, 3).tolist()}
    table = {(row["after"], row["before"]): row for row in llm_two_of_four.compared(of_ways, TOKENS)}
    assert list(table) == [("a", "dense"), ("b", "dense"), ("b", "a")]
    assert {row["draws"] for row in table.values()} == {3}
    value, low, high = stats.perplexity_ratio(of_ways["b"], of_ways["a"], TOKENS)
    assert {"ratio": value, "low": low, "high": high}.items() <= table["b", "a"].items()


def test_ways_that_read_no_text_run_once():
    runs = llm_two_of_four.all_runs(draws=3)
    counts = {name: sum(run.way == name for run in runs) for name in WAYS}
    assert counts == {name: 3 if way.reads_text else 1 for name, way in WAYS.items()}
    assert len({run.file for run in runs}) == len(runs)
