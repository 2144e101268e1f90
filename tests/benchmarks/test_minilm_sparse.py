"""The recorded recovery of lesson 02: both students are cut as the record says, and every run of its plan is in it."""

import minilm_sparse as experiment
import pytest
import torch

from labkit import models
from labkit.lesson import experiments
from labkit.modules.weights import prunable


@pytest.fixture(scope="module")
def whole() -> torch.nn.Module:
    return models.minilm_finetuned()


def test_the_sparse_student_lacks_nine_of_ten_weights_in_each_row_of_the_encoder(whole: torch.nn.Module):
    sparse = experiment.cut(whole, experiment.SPARSE)
    sparse(input_ids=torch.ones(1, 4, dtype=torch.long))  # the masks act in the call
    weights = {name: weight for name, weight in prunable(sparse).items() if name.startswith("bert.encoder")}
    assert len(weights) == 36
    for weight in weights.values():
        zeros = (weight.parameter == 0).double().mean(1)
        assert zeros.sub(experiment.SPARSITY).abs().max() < 1 / weight.parameter.shape[1]


def test_the_shallow_student_has_half_of_the_layers(whole: torch.nn.Module):
    shallow = experiment.cut(whole, experiment.SHALLOW)
    assert len(shallow.bert.encoder.layer) == experiment.LAYERS == len(whole.bert.encoder.layer) / 2


def test_the_record_has_every_run_of_the_plan_and_compares_the_students():
    record = experiments.read("minilm_sparse")
    runs = {(row["student"], row["steps"], row["seed"]) for row in record.rows}
    assert runs >= {(run.student, run.steps, run.seed) for run in experiment.wanted(quick=False)}
    compared = {(*row["after"], *row["before"]) for row in record.settings["changes"]}
    for steps in (0, *experiment.SEEDS):
        assert (experiment.SPARSE, steps, experiment.SHALLOW, steps) in compared
        assert (experiment.SPARSE, steps, experiment.WHOLE, 0) in compared
