"""Losses on features and relations, and on texts of the student, against their definitions in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from distillation import Matching, WithProjectors, attention_transfer, on_policy, value_relations
from families import batches, family
from llamas import greedy, llama, text
from torch import Tensor, nn

import labkit.distillation
from labkit.data import training
from labkit.data.resnet import ResNet8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_attention_maps_are_squares_summed_over_channels_and_scaled_to_length_one():
    student, teacher = normal(3, 4, 5, 6), normal(3, 7, 5, 6, seed=1)
    expected = 0.0
    for a, b in zip(student, teacher, strict=True):
        x, y = (a**2).sum(0).flatten(), (b**2).sum(0).flatten()
        expected += float((x / x.norm() - y / y.norm()).norm() ** 2) / 3
    assert float(attention_transfer(student, teacher)) == pytest.approx(expected, rel=1e-12)
    assert float(attention_transfer(student, 5 * student)) == pytest.approx(0, abs=1e-12)


def test_value_relations_are_those_of_the_paper_text_by_text_and_head_by_head():
    student, teacher, lengths = normal(2, 5, 6), normal(2, 5, 12, seed=1), (5, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    rows = []
    for i, length in enumerate(lengths):
        for head in range(3):
            s, t = (
                x[i, :length, head * w : (head + 1) * w] / w**0.25 for x, w in ((student, 2), (teacher, 4))
            )  # the root of sqrt(w) on either side
            p, q = (t @ t.T).softmax(-1), (s @ s.T).softmax(-1)
            rows.append((p * (p / q).log()).sum(-1))
    answer = value_relations(student, teacher, heads=3, mask=mask)
    assert float(answer) == pytest.approx(float(torch.cat(rows).mean()), rel=1e-12)
    student.masked_fill_(mask[..., None] == 0, 100)
    assert float(value_relations(student, teacher, heads=3, mask=mask)) == pytest.approx(float(answer), rel=1e-12)


def resnets() -> tuple[nn.Module, nn.Module, training.Batch]:
    torch.manual_seed(0)
    return ResNet8(), ResNet8().eval(), (torch.randn(6, 1, 28, 28), torch.arange(6))


def test_the_distance_of_matched_results_is_added():
    student, teacher, batch = resnets()
    matching = Matching(teacher, ("stage3", "stage3"), attention_transfer, 7.0, training.task_loss)
    results = []
    student.eval()
    with torch.no_grad():
        for model in (student, teacher):
            x = F.relu(model.bn(model.conv(batch[0])))
            results.append(model.stage3(model.stage2(model.stage1(x))))
        expected = float(training.task_loss(student, batch)) + 7 * float(attention_transfer(*results))
        assert float(matching(student, batch)) == pytest.approx(expected, rel=1e-4)


def test_projectors_are_trained_with_the_student_and_bring_it_to_the_teacher_s_width():
    student, _, (images, labels) = resnets()
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Conv2d(1, 24, 3, 2, 1), nn.Conv2d(24, 48, 3, 2, 1)).eval()
    model = WithProjectors(student, {"stage3": nn.Conv2d(32, 48, 1)})
    before = copy.deepcopy(model.state_dict())
    loss_fn = Matching(teacher, ("stage3", "1"), F.mse_loss, 1.0, training.task_loss)
    history = training.train_(model, [(images, labels)], epochs=10, max_lr=0.01, loss_fn=loss_fn)
    assert history.losses[-1] < history.losses[0]
    assert not torch.equal(before["projectors.stage3.weight"], model.projectors["stage3"].weight)
    assert torch.equal(model.eval()(images), student.eval()(images))


def test_the_mask_of_a_batch_reaches_the_distance():
    teacher, batch = family("bert"), batches("bert", 4)[0]
    name = "bert.encoder.layer.0.attention.self.value"
    model = labkit.distillation.shallow(teacher, 2)

    def sum_of_mask(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return mask.sum().float()

    with torch.no_grad():
        loss = Matching(teacher, (name, name), sum_of_mask, 1.0, training.task_loss)(model, batch)
        added = float(loss) - float(training.task_loss(model, batch))
    assert added == pytest.approx(float(batch["attention_mask"].sum()), rel=1e-4)


def test_after_one_new_token_on_policy_is_the_reverse_divergence_after_the_prompt():
    student, teacher, prompts = llama(0), llama(1), torch.cat([text(7), text(7, seed=1)])
    log_q, log_p = (model(prompts).logits[:, -1].double().log_softmax(-1) for model in (student, teacher))
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean().detach()
    loss = on_policy(teacher, new=1)(student, {"input_ids": prompts})
    assert loss.item() == pytest.approx(float(expected), rel=1e-4)


def test_the_teacher_judges_what_the_student_wrote():
    student, teacher, prompt = llama(0), llama(1), text(5)
    with torch.no_grad():
        student.model.norm.weight.mul_(1e3)  # as good as greedy
    read = []
    with teacher.model.embed_tokens.register_forward_pre_hook(lambda _, args: read.append(args[0])):
        on_policy(teacher, new=6)(student, {"input_ids": prompt})
    assert torch.equal(read[0], greedy(student, prompt, 6))
    assert not torch.equal(read[0], greedy(teacher, prompt, 6))
