"""The record of pruning criteria: accuracies by seed, and changes paired over seeds and images."""

import pruning_criteria
import pytest
import torch

from labkit import stats

SEEDS, IMAGES = 3, 200


def answers(seed: int, shares: dict[str, float]) -> dict[str, pruning_criteria.Answers]:
    """Draw answers to the images: each way has the same share of right ones at every stage."""
    generator = torch.Generator().manual_seed(seed)
    right = {}
    for way in pruning_criteria.WAYS:
        share = shares.get(way, 0.8)
        right[way] = {stage: torch.rand(IMAGES, generator=generator) < share for stage in pruning_criteria.STAGES}
    return right


def test_a_change_has_the_interval_over_seeds_and_images():
    of_seeds = [answers(seed, {"random": 0.5}) for seed in range(SEEDS)]
    dense = torch.rand(IMAGES, generator=torch.Generator().manual_seed(9)) < 0.9
    table = {(row["way"], row["stage"]): row for row in pruning_criteria.rows(dense, of_seeds)}
    row = table["random", "recovered"]
    after, base = (torch.stack([one[way]["recovered"] for one in of_seeds]) for way in ("random", "magnitude"))
    assert [row["over magnitude"], row["low"], row["high"]] == list(stats.accuracy_change_over_seeds(after, base))
    from_dense = stats.accuracy_change_over_seeds(after, dense.expand_as(after))
    assert [row["from dense"], row["dense low"], row["dense high"]] == list(from_dense)
    assert row["high"] < 0 and row["dense high"] < 0


def test_the_accuracies_are_those_of_the_seeds():
    of_seeds = [answers(seed, {}) for seed in range(SEEDS)]
    for row in pruning_criteria.rows(torch.ones(IMAGES, dtype=torch.bool), of_seeds):
        shares = [float(one[row["way"]][row["stage"]].double().mean()) for one in of_seeds]
        assert [row[f"seed {seed}"] for seed in range(SEEDS)] == shares
        assert row["mean"] == pytest.approx(sum(shares) / SEEDS)
    assert row["from dense"] == pytest.approx(row["mean"] - 1)


def test_magnitude_is_not_compared_with_itself():
    of_seeds = [answers(seed, {}) for seed in range(SEEDS)]
    rows = pruning_criteria.rows(torch.ones(IMAGES, dtype=torch.bool), of_seeds)
    assert {row["over magnitude"] for row in rows if row["way"] == "magnitude"} == {None}
    assert all(row["over magnitude"] is not None for row in rows if row["way"] != "magnitude")
