"""Losses against their definitions in float64 and torch's own; a teacher that stays as it was; healing that mends."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from families import batches, family, inputs, mean_loss
from refusals import Refusals, check_refusal, refused
from torch import Tensor, nn

from labkit import distillation
from labkit.data import training
from labkit.data.resnet import ResNet8
from labkit.distillation import (
    distillation_loss,
    distilling,
    relation_loss,
)
from labkit.modules.batches import IGNORED
from labkit.pruning import depth


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- answers ----------------------------------------------------------------------------------------------------------


def test_loss_is_t_squared_times_the_divergence_of_the_softened():
    torch.manual_seed(0)
    student, teacher, t = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64), 3.0
    p, q = (teacher / t).softmax(-1), (student / t).softmax(-1)
    expected = t**2 * (p * (p / q).log()).sum(-1).mean()
    found = distillation_loss(student, teacher, temperature=t)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert float(distillation_loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_masked_predictions_do_not_count():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    found = distillation_loss(student, teacher, mask=mask)
    assert float(found) == pytest.approx(float(distillation_loss(student[mask.bool()], teacher[mask.bool()])), rel=1e-5)
    student[~mask.bool()] = 100
    assert torch.equal(found, distillation_loss(student, teacher, mask=mask))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_beta_goes_from_forward_kl_over_the_mixture_to_reverse_kl(beta: float):
    student, teacher, t = normal(5, 7), normal(5, 7, seed=1), 3.0
    p, q = (teacher / t).softmax(-1), (student / t).softmax(-1)
    m = beta * p + (1 - beta) * q

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b.log(), a, reduction="batchmean")  # torch's

    expected = {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
    answer = distillation_loss(student, teacher, temperature=t, beta=beta)
    assert float(answer) == pytest.approx(9 * float(expected), rel=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_gradient_is_that_of_finite_differences_and_none_reaches_the_teacher(beta: float):
    student, teacher = normal(3, 5).requires_grad_(), normal(3, 5, seed=1).requires_grad_()
    mask = torch.tensor([1, 0, 1])
    torch.autograd.gradcheck(lambda x: distillation_loss(x, teacher, beta=beta, mask=mask), student)
    distillation_loss(student, teacher, beta=beta, mask=mask).backward()
    assert teacher.grad is None and not student.grad[1].any() and student.grad[0].any()


def test_at_a_high_temperature_it_is_the_distance_of_centred_logits():
    student, teacher = normal(6, 10), normal(6, 10, seed=1)
    gap = (student - student.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    limit = gap.square().sum(-1).mean() / 20
    assert float(distillation_loss(student, teacher, temperature=1e4)) == pytest.approx(float(limit), rel=1e-3)


def test_half_precision_is_computed_in_float32():
    student, teacher = normal(4, 1000).half(), normal(4, 1000, seed=1).half()
    exact = distillation_loss(student.double(), teacher.double())
    assert float(distillation_loss(student, teacher)) == pytest.approx(float(exact), rel=1e-5)


# --- features and relations -------------------------------------------------------------------------------------------


def test_distances_between_examples_are_compared_pair_by_pair():
    student, teacher = normal(6, 4), normal(6, 9, seed=1)
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    s, t = (torch.stack([(x[i] - x[j]).norm() for i, j in pairs]) for x in (student, teacher))
    gap = (s / s.mean() - t / t.mean()).abs()
    expected = torch.where(gap <= 1, gap**2 / 2, gap - 0.5).mean()
    assert float(relation_loss(student, teacher)) == pytest.approx(float(expected), rel=1e-12)


def test_distances_do_not_change_with_a_turn_a_shift_or_a_scale_and_two_equal_examples_give_no_nan():
    teacher = normal(6, 4)
    turn, _ = torch.linalg.qr(normal(4, 4, seed=1))
    assert float(relation_loss(3 * teacher @ turn + 1, teacher)) == pytest.approx(0, abs=1e-12)
    student = normal(2, 4, seed=2).repeat(3, 1).requires_grad_()
    relation_loss(student, teacher).backward()
    assert student.grad.isfinite().all() and student.grad.any()


def test_relations_have_the_gradient_of_finite_differences():
    student, teacher = normal(3, 4, 2, 2).requires_grad_(), normal(3, 4, 2, 2, seed=1).requires_grad_()
    torch.autograd.gradcheck(lambda x: relation_loss(x, teacher), student)
    relation_loss(student, teacher).backward()
    assert teacher.grad is None


# --- training ---------------------------------------------------------------------------------------------------------


def resnets() -> tuple[nn.Module, nn.Module, training.Batch]:
    torch.manual_seed(0)
    return ResNet8(), ResNet8().eval(), (torch.randn(6, 1, 28, 28), torch.arange(6))


def test_the_teacher_answers_each_image_as_if_it_were_alone():
    """Batch statistics would mix the images; a teacher that holds the student in train mode must not use them."""
    student, teacher, (images, labels) = resnets()
    loss_fn = distilling(teacher, alpha=1.0, temperature=2.0)
    teacher.train()  # as a wrapper's train() would
    student.eval()
    halves = [float(loss_fn(student, (x, y))) for x, y in zip(images.split(3), labels.split(3), strict=True)]
    assert float(loss_fn(student, (images, labels))) == pytest.approx(sum(halves) / 2, rel=1e-4)
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    assert not any(float(m.num_batches_tracked) for m in teacher.modules() if isinstance(m, nn.BatchNorm2d))


def test_stored_answers_train_like_a_teacher_that_is_run():
    student, teacher, (images, labels) = resnets()
    with torch.no_grad():
        stored = teacher(images)
    pairs = ((teacher, (images, labels)), (None, (images, labels, stored)))
    losses = [float(distilling(t, alpha=0.9, temperature=4.0)(student.eval(), batch)) for t, batch in pairs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    bert, batch = family("bert"), batches("bert", 4)[0]
    with torch.no_grad():
        logits = bert(**{key: x for key, x in batch.items() if key != "labels"}).logits
    pairs = ((bert, batch), (None, batch | {"teacher_logits": logits}))
    other = distillation.shallow(bert, 1)
    losses = [float(distilling(t, alpha=0.5, temperature=4.0)(other, batch)) for t, batch in pairs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_decoder_distils_the_tokens_that_have_a_label():
    """Position t predicts token t + 1: a prompt's labels are ignored, and so is what follows the last token."""
    teacher, batch = family("llama"), batches("llama", 2)[0]
    student = distillation.shallow(teacher, 1)
    ids = batch["input_ids"]
    labels = ids.clone()
    labels[:, :2] = IGNORED
    batch = {"input_ids": ids, "labels": labels}
    with torch.no_grad():
        answer = distilling(teacher, alpha=1.0, temperature=2.0)(student, batch)
        logits = [model(input_ids=ids).logits[:, 1:-1] for model in (student, teacher)]
    assert float(answer) == pytest.approx(float(distillation_loss(*logits)), rel=1e-5)


@pytest.mark.parametrize(("layers", "stays"), [(1, [0]), (2, [0, 2])])
def test_a_shallow_student_has_its_teacher_s_layers_evenly_spaced(layers: int, stays: list[int]):
    teacher = family("bert")
    student = distillation.shallow(teacher, layers)
    pairs = zip(student.bert.encoder.layer, [teacher.bert.encoder.layer[i] for i in stays], strict=True)
    assert all(torch.equal(a.output.dense.weight, b.output.dense.weight) for a, b in pairs)
    assert student.config.num_hidden_layers == layers and len(teacher.bert.encoder.layer) == 3


def mixed_loss(model: nn.Module, teacher: nn.Module, data) -> float:
    with torch.no_grad():
        return sum(float(distilling(teacher, alpha=0.5, temperature=2.0)(model.eval(), batch)) for batch in data) / len(
            data
        )


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
        parts = [float(distilling(teacher, alpha=a, temperature=2.0)(student, batch)) for a in (0.0, 1.0, 0.25)]
    assert parts[2] == pytest.approx(0.75 * parts[0] + 0.25 * parts[1], rel=1e-5)
    unlabelled = {key: x for key, x in batch.items() if key != "labels"}
    with torch.no_grad():
        assert float(distilling(teacher, alpha=1.0, temperature=2.0)(student, unlabelled)) == pytest.approx(parts[1])


def test_tuples_of_inputs_and_labels():
    torch.manual_seed(0)
    teacher, student = nn.Linear(4, 3).eval(), nn.Linear(4, 3)
    data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(4)]
    history = distillation.heal_(student, data, teacher=teacher, steps=80, max_lr=0.05)
    assert history.losses[-1] < history.losses[0]


# --- labels, and what has no probability -----------------------------------------------------------------------------


def other_labels(labels: Tensor) -> Tensor:
    return (labels + 1) % 2


@pytest.mark.parametrize("taught", [False, True])
def test_labels_of_a_tuple_reach_a_classifier_of_transformers(taught: bool):
    """Two sets of labels give two losses, and a tuple gives what the dict gives."""
    teacher = family("bert") if taught else None
    (batch,) = batches("bert", 6)
    ids, labels = batch["input_ids"], batch["labels"]
    forms = [{"input_ids": ids, "labels": labels}, (ids, labels), (ids, other_labels(labels))]
    losses = []
    for form in forms:
        pruned = depth.prune_layers(family("bert"), [1]).model
        history = distillation.heal_(pruned, [form], teacher=teacher, max_lr=1e-3, steps=3)
        losses.append(history.losses)
    assert losses[0] == losses[1] and losses[0][0] != losses[2][0]


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("step", ["heal_", "train_"])
def test_labels_of_a_tuple_are_no_mask_of_a_decoder(taught: bool, step: str):
    model, ids = family("llama"), inputs("llama")["input_ids"]
    teacher = family("llama") if taught else None
    loss_fn = distilling(teacher, alpha=0.5, temperature=2.0) if taught else training.task_loss
    call = {
        "heal_": lambda: distillation.heal_(model, [(ids, ids)], teacher=teacher, max_lr=1e-3, steps=2),
        "train_": lambda: training.train_(model, [(ids, ids)], max_lr=1e-3, loss_fn=loss_fn),
    }[step]
    words = "may be the labels or the attention_mask of LlamaForCausalLM: give a dict"
    check_refusal(words, call, leaves=model)


def test_a_decoder_heals_on_bare_tensors_of_its_tokens():
    ids = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(0))
    losses = [
        distillation.heal_(family("llama"), [form], max_lr=1e-3, steps=2).losses for form in (ids, {"input_ids": ids})
    ]
    assert losses[0] == losses[1]


def test_a_teacher_of_images_with_its_labels_in_a_tuple():
    vit, images, labels = family("vit"), torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
    history = distillation.heal_(family("vit"), [(images, labels)], teacher=vit, max_lr=1e-3, steps=20)
    assert history.losses[-1] < history.losses[0]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_class_that_both_exclude_adds_nothing_and_has_a_gradient(beta: float):
    student, teacher = normal(3, 5), normal(3, 5, seed=1)
    excluded = torch.full((3, 2), -math.inf, dtype=torch.float64)
    longer = [torch.cat([x, excluded], -1).requires_grad_() for x in (student, teacher)]
    loss = distillation_loss(*longer, beta=beta)
    loss.backward()
    short = student.clone().requires_grad_()
    expected = distillation_loss(short, teacher, beta=beta)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(longer[0].grad[:, :5], short.grad)
    assert not longer[0].grad[:, 5:].any()


def test_what_one_side_excludes_costs_what_the_definition_says():
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -math.inf]])
    forward, reverse, middle = (distillation_loss(student, teacher, temperature=1.0, beta=b) for b in (0.0, 1.0, 0.5))
    assert float(forward) == pytest.approx(math.log(1.5), rel=1e-6)  # each of two classes: 1/2 against 1/3
    assert float(reverse) == math.inf  # the student gives 1/3 to what the teacher excludes
    kl_p = math.log(0.5 / (5 / 12))
    kl_q = 2 / 3 * math.log((1 / 3) / (5 / 12)) + 1 / 3 * math.log((1 / 3) / (1 / 6))
    assert float(middle) == pytest.approx(0.5 * kl_p + 0.5 * kl_q, rel=1e-5)


def test_healing_ends_at_a_loss_that_is_not_finite_with_the_model_as_it_was():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), torch.randn(8, 4)
    x[0, 0] = math.nan
    state = torch.get_rng_state()
    data = [(torch.randn(8, 4), torch.arange(8) % 3), (x, torch.arange(8) % 3)]
    drawn = torch.get_rng_state()
    call = partial(distillation.heal_, model, data, max_lr=0.01, steps=4)
    check_refusal("The loss of step 2 is nan", call, leaves=model)
    assert torch.equal(torch.get_rng_state(), drawn) and not torch.equal(state, drawn)


# --- refusals ---------------------------------------------------------------------------------------------------------

TWO, TEACHER = torch.ones(2, 3), nn.Linear(2, 2).eval()
PAIR = (torch.ones(2, 2), torch.tensor([0, 1]))


def heal(**options: object) -> object:
    return distillation.heal_(**{"model": nn.Linear(2, 2), "batches": [PAIR], "max_lr": 0.1, "steps": 2, **options})


def distil(**options: object):
    return distilling(**{"teacher": TEACHER, "alpha": 0.5, "temperature": 2.0, **options})


REFUSALS: Refusals = {
    "both need the same vocabulary": lambda: distillation_loss(TWO, torch.ones(2, 4)),
    "temperature is 0, but it must be a finite number above 0": lambda: distillation_loss(TWO, TWO, temperature=0),
    "beta is 1.5, but it must be a finite number from 0 to 1": lambda: distillation_loss(TWO, TWO, beta=1.5),
    "at least two": lambda: relation_loss(TWO[:1], TWO[:1]),
    "alpha is 2, but it must be a finite number from 0 to 1": lambda: distil(alpha=2),
    "teacher is in train mode": lambda: distil(teacher=nn.Linear(2, 2)),
    "needs labels": lambda: distil(teacher=family("bert"))(family("bert"), inputs("bert")),
    "needs its logits": lambda: distil(teacher=None)(TEACHER, PAIR),
    "trains parameters of its teacher": lambda: distil(alpha=1)(TEACHER, (torch.ones(2, 2), TWO)),
    "layers is 3, but": lambda: distillation.shallow(family("bert"), 3),
    "student is a list": lambda: distillation_loss([1.0, 2.0], TWO),
    "teacher is None": lambda: distillation_loss(TWO, None),
    "student is torch.int64 [2, 3]": lambda: distillation_loss(TWO.long(), TWO),
    "student is torch.float32 [0, 3]": lambda: distillation_loss(TWO[:0], TWO[:0]),
    "teacher is on the meta device": lambda: distillation_loss(TWO, TWO.to("meta")),
    "student has logits of shape [], teacher []": lambda: distillation_loss(torch.tensor(1.0), torch.tensor(1.0)),
    "temperature is '2'": lambda: distillation_loss(TWO, TWO, temperature="2"),
    "temperature is nan": lambda: distillation_loss(TWO, TWO, temperature=math.nan),
    "temperature is inf": lambda: distillation_loss(TWO, TWO, temperature=math.inf),
    "beta is None": lambda: distillation_loss(TWO, TWO, beta=None),
    "mask has shape [3], but it must have [2]": lambda: distillation_loss(TWO, TWO, mask=torch.ones(3)),
    "mask is a list": lambda: distillation_loss(TWO, TWO, mask=[1, 0]),
    "not [] and []": lambda: relation_loss(torch.tensor(1.0), torch.tensor(1.0)),
    "student is a str": lambda: relation_loss("a", TWO),
    "alpha is '0.5'": lambda: distil(alpha="0.5"),
    "temperature is 0,": lambda: distil(temperature=0),
    "teacher is a str": lambda: distil(teacher="llama"),
    "Without a teacher each batch needs its logits": lambda: distil(teacher=None)(TEACHER, {"x": TWO}),
    "student has logits of shape [2, 2], teacher [2, 3]": lambda: distil(teacher=None)(TEACHER, (*PAIR, TWO)),
    "teacher is a list": lambda: distil(teacher=None)(TEACHER, (*PAIR, [0.5, 0.5])),
    "Cross-entropy takes scores": lambda: distil()(nn.Linear(2, 2), (PAIR[0], PAIR[1].float())),
    "The task loss needs labels": lambda: distil()(nn.Linear(2, 2), PAIR[0]),
    "layers is '2'": lambda: distillation.shallow(family("bert"), "2"),
    "steps is 0, but": lambda: heal(steps=0),
    "steps is '5'": lambda: heal(steps="5"),
    "steps is 2.5": lambda: heal(steps=2.5),
    "seed is -1": lambda: heal(seed=-1),
    "seed is 'a'": lambda: heal(seed="a"),
    "max_lr is '1e-3'": lambda: heal(max_lr="1e-3"),
    "max_lr is -1": lambda: heal(max_lr=-1),
    "model is a dict": lambda: heal(model={}),
    "teacher is a dict": lambda: heal(teacher={}),
    "batches must have a length": lambda: heal(batches=iter([PAIR])),
    "at least one batch": lambda: heal(batches=[]),
    "but the batches have no labels": lambda: heal(batches=[PAIR[0]]),
    "A batch is a str": lambda: heal(batches=["text"]),
    "more than Linear takes": lambda: heal(batches=[(*PAIR, PAIR[1], PAIR[1])]),
    "The teacher is in train mode": lambda: heal(teacher=nn.Linear(2, 2)),
    "no parameter that requires a gradient": lambda: heal(model=nn.ReLU()),
    "Inside torch.inference_mode()": lambda: torch.inference_mode()(heal)(),
}  # fmt: skip


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words: str, call):
    check_refusal(words, call)
