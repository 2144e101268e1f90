"""The recorded recovery of lesson 04: its cuts have equal bytes, and the record has every cut of every seed."""

import cuts_recovered
import pytest
import torch

from labkit import models, stats
from labkit.lesson import experiments

SIXTH = ("half of the heads", "a quarter of the neurons", "one layer")
THIRD = ("half of the heads, a quarter of the neurons", "half of the neurons", "two layers")


@pytest.mark.parametrize(("names", "share"), [(SIXTH, 5 / 6), (THIRD, 2 / 3)])
def test_cuts_of_a_group_leave_as_many_parameters(names: tuple[str, ...], share: float, monkeypatch):
    monkeypatch.setattr(cuts_recovered, "SCORING", 4)
    model = models.minilm_finetuned()
    scores = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    ready = {"layers": {1: (3,), 2: (2, 4)}, "heads": scores}
    whole = sum(parameter.numel() for parameter in model.bert.encoder.parameters())
    for name in names:
        small = cuts_recovered.pruned(model, cuts_recovered.CUTS[name], ready)
        left = sum(parameter.numel() for parameter in small.bert.encoder.parameters())
        assert left / whole == pytest.approx(share, abs=2e-3)


def test_a_cut_without_training_is_compared_with_every_seed_of_a_trained_cut():
    generator = torch.Generator().manual_seed(0)
    trained = [torch.rand(100, generator=generator) < 0.8 for _ in range(3)]
    untrained = torch.rand(100, generator=generator) < 0.7
    *found, seeds = cuts_recovered.compared(trained, [untrained])
    stacked = torch.stack(trained)
    assert seeds == 3
    assert found == pytest.approx(stats.accuracy_change_over_seeds(stacked, untrained.expand_as(stacked)))
    assert cuts_recovered.compared([untrained], [untrained])[3] == 1


def test_the_record_has_every_cut_of_every_seed():
    record = experiments.read("cuts_recovered")
    steps, seeds = cuts_recovered.STEPS, range(record.settings["seeds"])
    runs = {(row["removed"], row["steps"], row["seed"]) for row in record.rows}
    assert runs >= {(name, steps, seed) for name in cuts_recovered.CUTS for seed in seeds}
    assert runs >= {(name, 0, 0) for name in cuts_recovered.CUTS}
