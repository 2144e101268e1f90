"""The recorded students of lesson 10: what they learn from, and a record in which every group has all seeds."""

import distilled_students
import pytest
import torch
from distilled_students import IMAGES, LABELS, SEEDS, STEPS, TEACHER, Run

from labkit.data.resnet import ResNet8, ResNet20, WideResNet8
from labkit.lesson import experiments

T = 4.0


@pytest.fixture
def answers() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [20, 10] of a teacher, and labels."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(20, 10, generator=generator, dtype=torch.float64)
    return logits, torch.randint(10, (20,), generator=generator)


def test_even_answers_keep_the_label_s_probability_and_share_the_rest(answers):
    logits, labels = answers
    p, q = (logits / T).softmax(1), (distilled_students.evened(logits, labels, T) / T).softmax(1)
    rows = range(len(labels))
    assert torch.allclose(q[rows, labels], p[rows, labels])
    others = q[~torch.nn.functional.one_hot(labels, 10).bool()].view(-1, 9)
    assert torch.allclose(others, others[:, :1].expand(-1, 9))


def test_smoothed_labels_are_as_soft_as_the_answers_on_average_and_alike_for_all_images(answers):
    logits, labels = answers
    p, q = (logits / T).softmax(1), (distilled_students.smoothed(logits, labels, T) / T).softmax(1)
    rows = range(len(labels))
    assert torch.allclose(q[rows, labels], p[rows, labels].mean().expand(20))
    assert torch.allclose(q.sort(1).values, q.sort(1).values[:1].expand(20, -1))


def test_the_answers_of_a_teacher_cost_as_many_flops_as_the_further_steps():
    teacher, student = (distilled_students.flops(model()) for model in (ResNet20, ResNet8))
    further = distilled_students.further_steps(IMAGES, ResNet20())
    assert further * 3 * 64 * student == pytest.approx(IMAGES * teacher, rel=2e-3)


def test_a_teacher_of_middle_size_lies_between_the_two():
    small, middle, large = (sum(x.numel() for x in model().parameters()) for model in (ResNet8, WideResNet8, ResNet20))
    assert small < middle < large and middle == 77_754


def test_a_further_group_counts_with_all_its_seeds_only():
    runs = list(distilled_students.all_runs())
    without = {run: None for run in runs if run != Run("hint", IMAGES, STEPS, SEEDS - 1)}
    assert distilled_students.is_whole(Run(LABELS, IMAGES, STEPS, 0), without)
    assert not distilled_students.is_whole(Run("hint", IMAGES, STEPS, 0), without)


def test_the_record_has_the_controls_of_every_seed():
    record = experiments.read("distilled_students")
    seeds = range(record.settings["seeds"])
    runs = {(row["learns from"], row["steps"], row["seed"]) for row in record.rows if row["images"] == IMAGES}
    names = (LABELS, TEACHER, distilled_students.LONGER, distilled_students.SMOOTHED, distilled_students.EVEN)
    assert runs >= {(name, STEPS, seed) for name in names for seed in seeds}
