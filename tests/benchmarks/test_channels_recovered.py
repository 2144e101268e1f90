"""The recorded recovery of lesson 03: what its script chooses and compares, and that the record has every run."""

import channels_recovered
import pytest
import torch

from labkit import models, stats
from labkit.lesson import experiments
from labkit.pruning import coupling

EXAMPLE = torch.zeros(1, 1, 28, 28)


def test_half_of_all_channels_go_by_raw_sums_and_every_group_keeps_a_channel():
    left = channels_recovered.ranked_by_raw_sums(models.resnet20(), EXAMPLE)
    assert len(left) == 12 and min(left.values()) == 1
    emptied = sum(width == 1 for width in left.values())
    assert 448 // 2 <= sum(left.values()) <= 448 // 2 + emptied


def test_a_plan_leaves_the_widths_that_it_names_by_any_criterion():
    model = models.resnet20()
    left = {group.name: group.units - number for number, group in enumerate(coupling.trace(model, EXAMPLE))}
    plan = channels_recovered.planned(model, EXAMPLE, left, "random", seed=3)
    assert {unit.name: unit.left for unit in plan.units} == left


def test_every_two_cuts_are_compared_image_by_image_over_the_seeds():
    generator = torch.Generator().manual_seed(0)
    seeds = range(channels_recovered.SEEDS)
    runs = [channels_recovered.Run("a", "l1", steps, seed) for steps in (0, 129) for seed in seeds]
    right = {run: torch.rand(100, generator=generator) < 0.8 for run in runs}
    dense = torch.rand(100, generator=generator) < 0.9
    rows = channels_recovered.changes(right, dense)
    assert len(rows) == 3  # two cuts, and each with the dense network
    untrained, trained = (torch.stack([right[run] for run in runs if run.steps == steps]) for steps in (0, 129))
    expected = stats.accuracy_change_over_seeds(untrained, trained)
    assert (rows[0]["change"], rows[0]["low"], rows[0]["high"]) == pytest.approx(expected)


def test_the_record_has_every_run_of_every_seed():
    record = experiments.read("channels_recovered")
    runs = channels_recovered.all_runs(record.settings["plans"])
    expected = {(run.plan, run.criterion, run.steps, run.seed) for run in runs}
    assert {(row["plan"], row["criterion"], row["steps"], row["seed"]) for row in record.rows} == expected
