"""The distillation loss against its definition, and healing that mends what pruning broke."""

import pytest
import torch
from families import batches, family, inputs, mean_loss
from torch import nn

from labkit import distillation
from labkit.errors import InputError
from labkit.pruning import depth


def test_loss_is_t_squared_times_the_divergence_of_the_softened():
    torch.manual_seed(0)
    student, teacher, t = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64), 3.0
    p, q = (teacher / t).softmax(-1), (student / t).softmax(-1)
    expected = t**2 * (p * (p / q).log()).sum(-1).mean()
    found = distillation.distillation_loss(student, teacher, temperature=t)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert float(distillation.distillation_loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_masked_predictions_do_not_count():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    found = distillation.distillation_loss(student, teacher, mask=mask)
    assert float(found) == pytest.approx(
        float(distillation.distillation_loss(student[mask.bool()], teacher[mask.bool()])), rel=1e-5
    )
    student[~mask.bool()] = 100
    assert torch.equal(found, distillation.distillation_loss(student, teacher, mask=mask))


def mixed_loss(model: nn.Module, teacher: nn.Module, data) -> float:
    with torch.no_grad():
        return sum(
            float(distillation.distilling(teacher, alpha=0.5, temperature=2.0)(model.eval(), batch)) for batch in data
        ) / len(data)


@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("taught", [False, True])
def test_healing_mends_a_pruned_model_and_leaves_the_teacher(name, taught):
    teacher, data = family(name), batches(name, 3)
    weights = {key: x.clone() for key, x in teacher.state_dict().items()}
    pruned = depth.prune_layers(teacher, [1]).model
    before = mean_loss(pruned.eval(), data), mixed_loss(pruned, teacher, data)
    history = distillation.heal_(pruned, data, teacher=teacher if taught else None, max_lr=3e-3, steps=20)
    after = mean_loss(pruned.eval(), data), mixed_loss(pruned, teacher, data)
    assert len(history.losses) == 20 and after[int(taught)] < 0.8 * before[int(taught)]
    assert all(torch.equal(x, weights[key]) for key, x in teacher.state_dict().items())
    assert not any(p.grad is not None for p in teacher.parameters()) and not teacher.training


def test_healing_repeats_by_seed():
    found = []
    for _ in range(2):
        pruned = depth.prune_layers(family("bert"), [1]).model
        found.append(distillation.heal_(pruned, batches("bert"), max_lr=1e-3, steps=3, seed=4).losses)
    assert found[0] == found[1]


def test_alpha_mixes_the_two_losses():
    teacher, batch = family("bert"), batches("bert", 6)[0]
    student = family("bert")
    with torch.no_grad():
        student.classifier.weight.mul_(-1)
        parts = [
            float(distillation.distilling(teacher, alpha=a, temperature=2.0)(student, batch)) for a in (0.0, 1.0, 0.25)
        ]
    assert parts[2] == pytest.approx(0.75 * parts[0] + 0.25 * parts[1], rel=1e-5)
    unlabelled = {key: x for key, x in batch.items() if key != "labels"}
    with torch.no_grad():
        assert float(
            distillation.distilling(teacher, alpha=1.0, temperature=2.0)(student, unlabelled)
        ) == pytest.approx(parts[1])


def test_tuples_of_inputs_and_labels():
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(4)]
    history = distillation.heal_(student, data, teacher=teacher, steps=80, max_lr=0.05)
    assert history.losses[-1] < history.losses[0]


def test_errors():
    with pytest.raises(InputError, match="both need the same vocabulary"):
        distillation.distillation_loss(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(InputError, match="temperature must be a number above 0"):
        distillation.distillation_loss(torch.ones(2, 3), torch.ones(2, 3), temperature=0)
    with pytest.raises(InputError, match="alpha must be a number from 0 to 1"):
        distillation.distilling(nn.Linear(2, 2), alpha=2, temperature=2.0)
    with pytest.raises(InputError, match="needs labels"):
        distillation.distilling(family("bert"), alpha=0.5, temperature=2.0)(family("bert"), inputs("bert"))
