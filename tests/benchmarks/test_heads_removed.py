"""The recorded experiment on heads of lesson 04: its scores are labkit's, and the record has every run."""

import heads_removed
import pytest
import torch

from labkit import models, stats
from labkit.lesson import experiments
from labkit.pruning import heads

TEXTS = 4


@pytest.fixture(scope="module")
def classifier():
    return models.minilm_finetuned()


@pytest.fixture(scope="module")
def batches():
    return heads_removed.scoring_texts(0, TEXTS)


def test_the_mean_of_the_measured_changes_is_ablation(classifier, batches):
    changes = heads_removed.measured_changes(classifier, batches)
    assert changes.shape == (72, TEXTS)
    expected = heads.head_importance(classifier, batches, "ablation").flatten()
    torch.testing.assert_close(changes.mean(1), expected, rtol=1e-3, atol=1e-5)


def test_the_mean_magnitude_of_the_estimated_changes_is_taylors_score(classifier, batches):
    changes = heads_removed.estimated_changes(classifier, batches)
    expected = heads.head_importance(classifier, batches, "taylor").flatten()
    torch.testing.assert_close(changes.abs().mean(1), expected, rtol=1e-3, atol=1e-5)


def test_sets_of_scoring_texts_share_no_text():
    sets = [heads_removed.scoring_texts(number) for number in range(heads_removed.SETS)]
    texts = [tuple(ids.tolist()) for batches in sets for batch in batches for ids in batch["input_ids"]]
    assert len(texts) == heads_removed.SETS * heads_removed.TEXTS
    assert len({tuple(token for token in text if token) for text in texts}) == len(texts)  # 0 is padding


@pytest.mark.parametrize("spread", [heads_removed.ANYWHERE, heads_removed.IN_LAYERS])
def test_36_heads_go_and_in_each_layer_six(spread: str):
    run = heads_removed.Run("random", spread, 3)
    gates = heads_removed.gates_of(run, torch.rand(6, 12, generator=torch.Generator().manual_seed(3)))
    assert int(gates.sum()) == 36
    if spread == heads_removed.IN_LAYERS:
        assert gates.sum(1).tolist() == [6] * 6


def test_a_score_of_one_set_counts_as_the_same_in_every_set():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2

    def kept() -> dict:
        return {"logits": torch.randn(100, 2, generator=generator), "labels": labels}

    whole, size = heads_removed.Run(heads_removed.WHOLE, "anywhere", 0), heads_removed.Run("size", "anywhere", 0)
    drawn = [heads_removed.Run("random", "anywhere", number) for number in range(heads_removed.SETS)]
    runs = {run: kept() for run in (whole, size, *drawn)}
    rows = heads_removed.changes(runs)
    (row,) = [row for row in rows if {row["after"][0], row["before"][0]} == {"size", "random"}]
    right = {run: heads_removed.right(answers) for run, answers in runs.items()}
    stacked = torch.stack([right[run] for run in drawn])
    expected = stats.accuracy_change_over_seeds(right[size].expand_as(stacked), stacked)
    assert (row["change"], row["low"], row["high"]) == pytest.approx(expected)


def test_the_record_has_every_run():
    record = experiments.read("heads_removed")
    expected = {(run.score, run.spread, run.set) for run in heads_removed.all_runs()}
    assert {(row["score"], row["spread"], row["set"]) for row in record.rows} == expected
