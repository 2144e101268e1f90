"""The training loop learns, repeats, leaves the mode as it was; its measures agree with hand counts."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from labkit import training
from labkit.errors import InputError
from labkit.training import Batches


def blobs(n: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Two well separated clouds in the plane."""
    labels = torch.arange(n) % 2
    points = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)) + 4.0 * labels[:, None]
    return points, labels


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(2, 2).eval()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_separates_what_can_be_separated(optimizer: str) -> None:
    model = linear()
    training.train_(model, Batches(blobs(), 32, seed=0), epochs=10, max_lr=0.5, optimizer=optimizer)
    assert training.accuracy(model, Batches(blobs(), 100)) > 0.98


def test_training_repeats_with_the_same_seed() -> None:
    runs = []
    for _ in range(2):
        model = linear()
        history = training.train_(model, Batches(blobs(), 32, seed=3), epochs=2, max_lr=0.1)
        runs.append((history.losses, model.weight))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


def test_steps_end_training_within_an_epoch_and_bound_several() -> None:
    for steps in (1, 7, 11):  # 4 batches an epoch
        history = training.train_(linear(), Batches(blobs(128), 32), epochs=3, max_lr=0.1, steps=steps)
        assert len(history.losses) == steps


def test_training_is_the_plain_torch_loop() -> None:
    model, plain, data = linear(), linear(), blobs(128)
    training.train_(model, Batches(data, 32), epochs=2, max_lr=0.1, weight_decay=0.01, precision="fp32")
    descent = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(descent, 0.1, total_steps=8)
    for step in range(8):
        inputs, labels = (tensor[step % 4 * 32 : step % 4 * 32 + 32] for tensor in data)
        descent.zero_grad()
        nn.functional.cross_entropy(plain(inputs), labels).backward()
        descent.step()
        schedule.step()
    assert torch.allclose(model.weight, plain.weight, atol=1e-6)


def test_modes_and_frozen_parameters_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model.eval()
    model[2].train()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    training.train_(model, Batches(blobs(), 64), max_lr=0.1)
    assert [layer.training for layer in model] == [False, False, True]
    assert torch.equal(model[0].weight, before)
    assert model[1].num_batches_tracked == 4


def test_convolutions_come_back_contiguous() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    training.train_(model, [(torch.randn(4, 3, 3, 3), torch.tensor([0, 1, 0, 1]))], max_lr=0.1)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("seed", [None, 0])
def test_an_epoch_holds_every_example_once(seed: int | None) -> None:
    batches = Batches((torch.arange(10), torch.arange(10)), 4, seed=seed)
    for _ in range(2):
        seen = torch.cat([inputs for inputs, _ in batches])
        assert sorted(seen.tolist()) == list(range(10))
    assert len(batches) == 3


def test_epochs_differ_in_order_and_a_new_object_starts_again() -> None:
    first = Batches((torch.arange(100), torch.arange(100)), 100, seed=0)
    orders = [next(iter(first))[0].tolist() for _ in range(2)]
    assert orders[0] != orders[1]
    assert next(iter(Batches(first.data, 100, seed=0)))[0].tolist() == orders[0]


def test_batches_of_a_dict_go_through_collate() -> None:
    batches = Batches({"x": torch.arange(6).view(3, 2)}, 2, collate=lambda batch: {"x": batch["x"][:, :1]})
    assert [batch["x"].tolist() for batch in batches] == [[[0], [2]], [[4]]]


def test_a_model_of_integers_without_parameters_is_judged_like_any_other() -> None:
    model = nn.Linear(2, 2, bias=False)
    del model.weight
    model.register_buffer("weight", torch.eye(2))
    x, y = torch.tensor([[2.0, 1.0], [1.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 1, 1])
    assert not list(model.parameters())
    assert training.correct(model, [(x, y)]).tolist() == [True, True, False]


def test_accuracy_counts_right_answers() -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.eye(2)
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert training.accuracy(model, [(inputs, torch.tensor([0, 1, 1]))]) == pytest.approx(2 / 3)
    assert training.correct(model, [(inputs, torch.tensor([0, 1, 1]))]).tolist().count(True) == 2


class Uniform(nn.Module):
    """A language model that finds every one of 7 tokens equally likely."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.weight.expand(*input_ids.shape, 7))


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    assert training.perplexity(Uniform(), torch.arange(35) % 7, window=10) == pytest.approx(7)


def test_bf16_is_used_only_where_the_device_has_it() -> None:
    history = training.train_(linear(), Batches(blobs(64), 32), max_lr=0.1)
    assert history.precision == ("bf16" if training.has_bf16("cpu") else "fp32")
    assert not training.has_bf16("meta")


@pytest.mark.parametrize(("width", "is_contiguous"), [(4, True), (16, False)])
def test_a_thin_shortcut_is_not_trained_in_the_order_that_corrupts_memory(width: int, is_contiguous: bool) -> None:
    shortcut = nn.Conv2d(width, 8, 1, stride=2)
    model = nn.Sequential(nn.Conv2d(3, width, 3), shortcut, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    seen: list[bool] = []
    shortcut.register_forward_pre_hook(lambda module, x: seen.append(x[0].is_contiguous()))
    images = torch.randn(8, 3, 12, 12)
    training.train_(model, Batches((images, torch.arange(8) % 2), 8), max_lr=0.1, precision="fp32")
    assert seen == [is_contiguous]


@pytest.mark.gpu
def test_training_runs_on_the_models_device() -> None:
    model = linear().cuda()
    training.train_(model, Batches(blobs(), 32, seed=0), epochs=10, max_lr=0.5)
    assert model.weight.device.type == "cuda"
    assert training.accuracy(model, Batches(blobs(), 100)) > 0.98


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"epochs": 0}, "epochs is 0, but it must be a whole number from 1."),
        ({"steps": 0}, "steps is 0, but it must be a whole number from 1."),
        ({"steps": 1.5}, "steps is 1.5, but it must be a whole number from 1."),
        ({"max_lr": 0}, "max_lr must be a positive number; it is 0."),
        ({"max_lr": math.nan}, "max_lr must be a positive number; it is nan."),
        ({"optimizer": "adam"}, "There is no optimizer 'adam': choose one of sgd, adamw."),
        ({"warmup": 1}, "warmup is a share of the steps from 0 to below 1; it is 1."),
        ({"precision": "fp16"}, "There is no precision 'fp16': choose one of auto, bf16, fp32."),
    ],
)
def test_wrong_recipe_is_refused_and_the_model_untouched(wrong: dict, sentence: str) -> None:
    model = linear()
    before = model.weight.clone()
    with pytest.raises(InputError) as caught:
        training.train_(model, Batches(blobs(), 32), **{"max_lr": 0.1, **wrong})
    assert str(caught.value) == sentence
    assert torch.equal(model.weight, before)


def test_batches_without_length_or_content_are_refused() -> None:
    for batches in ([], iter([blobs()])):
        with pytest.raises(InputError, match="batches must have a length and at least one batch"):
            training.train_(linear(), batches, max_lr=0.1)


def test_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="no parameter that requires a gradient"):
        training.train_(linear().requires_grad_(False), Batches(blobs(), 32), max_lr=0.1)


def test_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"all tensors need one length; they have \[3, 4\]"):
        Batches((torch.zeros(3), torch.zeros(4)), 2)
    with pytest.raises(InputError, match="batch_size is 0, but it must be a whole number"):
        Batches((torch.zeros(3), torch.zeros(3)), 0)


def test_measures_of_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="there is no batch to measure accuracy on"):
        training.accuracy(linear(), [])
    with pytest.raises(InputError, match="tokens must be 1-D with at least one window of 512"):
        training.perplexity(Uniform(), torch.zeros(10, dtype=torch.long))
