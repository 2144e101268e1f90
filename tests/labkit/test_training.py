"""The training loop learns, repeats, leaves the mode as it was; its measures agree with hand counts."""

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from families import family
from networks import EqualOdds
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.data import training
from labkit.data.training import Batches
from labkit.errors import InputError


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


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    assert training.perplexity(EqualOdds(), torch.arange(35) % 7, window=10) == pytest.approx(7)


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


# --- a run that cannot go on ------------------------------------------------------------------------------------------


def normed() -> nn.Module:
    """A net whose batch statistics move with every forward pass."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()


def poisoned(value: float, batch: int) -> list[training.Batch]:
    """Four batches; an input of this one is `value`."""
    points, labels = blobs(128)
    points[batch * 32] = value
    return list(zip(points.split(32), labels.split(32), strict=True))


def spoiled(step: int):
    """A loss that is NaN at this step."""
    calls = []

    def loss_fn(model: nn.Module, batch: training.Batch) -> torch.Tensor:
        calls.append(batch)
        return training.task_loss(model, batch) * (torch.nan if len(calls) == step else 1.0)

    return loss_fn


@pytest.mark.parametrize(
    ("data", "recipe", "words"),
    [
        (poisoned(math.nan, 2), {}, "The loss of step 3 is nan"),
        (poisoned(math.inf, 0), {}, "The loss of step 1 is nan"),
        (poisoned(0.0, 0), {"loss_fn": spoiled(4)}, "The loss of step 4 is nan"),
        (poisoned(0.0, 0), {"max_lr": 1e38, "optimizer": "adamw"}, "so training stopped and the model is as it was"),
        (poisoned(0.0, 0), {"max_lr": 1e38, "steps": 1, "weight_decay": 1e8}, "The last step left a weight that is"),
    ],
)
def test_a_loss_that_is_not_finite_ends_training_with_the_model_as_it_was(data, recipe, words) -> None:
    model = normed()
    call = partial(training.train_, model, data, **{"max_lr": 0.1, "precision": "fp32", **recipe})
    check_refusal(f"{words} ... lower max_lr", call, leaves=model)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_the_error_of_a_loss_function_passes_through_with_the_model_as_it_was() -> None:
    model = normed()
    before = {name: x.clone() for name, x in model.state_dict().items()}

    def loss_fn(model: nn.Module, batch: training.Batch) -> torch.Tensor:
        training.task_loss(model, batch)  # which moves the batch statistics
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        training.train_(model, poisoned(0.0, 0), max_lr=0.1, loss_fn=loss_fn)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_losses_on_a_device_are_looked_at_in_groups_and_the_first_bad_one_is_named() -> None:
    losses, values = training._Losses(torch.device("cuda"), 0.1), [1.0] * 24 + [math.inf] + [1.0] * 20
    with pytest.raises(InputError, match="The loss of step 25 is inf"):
        for value in values:
            losses.add(torch.tensor(value, requires_grad=True))
    assert len(losses.losses) == 2 * training.CHECKED


@pytest.mark.gpu
def test_a_loss_that_is_not_finite_ends_training_on_a_gpu() -> None:
    model = normed().cuda()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for data, recipe in ((poisoned(math.nan, 2), {"epochs": 20}), (poisoned(math.nan, 3), {})):
        with pytest.raises(InputError, match=r"The loss of step [34] is nan"):
            training.train_(model, data, max_lr=0.1, **recipe)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# --- the state of torch -----------------------------------------------------------------------------------------------


def test_training_changes_no_state_of_torch() -> None:
    def state() -> tuple:
        return (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.is_autocast_enabled("cpu"),
            torch.get_num_threads(),
            torch.get_rng_state().tolist(),
        )

    with torch.no_grad():
        before = state()
        training.train_(normed(), poisoned(0.0, 0), max_lr=0.1)
        check_refusal("is nan", lambda: training.train_(normed(), poisoned(math.nan, 0), max_lr=0.1))
        assert state() == before


def test_training_inside_no_grad_and_on_what_inference_mode_made_is_the_same_training() -> None:
    models = [normed() for _ in range(3)]
    with torch.inference_mode():
        made = [(inputs + 0, labels) for inputs, labels in poisoned(0.0, 0)]
    training.train_(models[0], poisoned(0.0, 0), max_lr=0.1)
    with torch.no_grad():
        training.train_(models[1], poisoned(0.0, 0), max_lr=0.1)
    training.train_(models[2], made, max_lr=0.1)
    assert torch.equal(models[0][0].weight, models[1][0].weight)
    assert torch.equal(models[0][0].weight, models[2][0].weight)


def test_a_tokenizers_own_kind_of_dict_is_a_dict() -> None:
    from transformers import BatchEncoding

    bert, ids, labels = family("bert"), torch.randint(3, 61, (4, 7)), torch.tensor([0, 1, 0, 1])
    batch = BatchEncoding({"input_ids": ids, "labels": labels})
    history = training.train_(bert, [batch], epochs=20, max_lr=1e-3, optimizer="adamw")
    assert history.losses[-1] < history.losses[0]
    assert torch.equal(training.correct(bert, [batch]), training.correct(bert, [(ids, labels)]))


def test_a_perplexity_beyond_float64_is_infinite() -> None:
    class Sure(EqualOdds):
        def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
            logits = super().forward(input_ids).logits.clone()
            logits[..., 6] = 1e5  # and no text below has that token
            return SimpleNamespace(logits=logits)

    assert training.perplexity(Sure(), torch.arange(30) % 5, window=10) == math.inf


# --- refusals ---------------------------------------------------------------------------------------------------------

X, Y = blobs(64)
PAIR = [(X, Y)]


def recipe(**options: object) -> Callable[[nn.Module], object]:
    return lambda model: training.train_(**{"model": model, "batches": PAIR, "max_lr": 0.1, **options})


class Once:
    """A length, and batches that can be read once."""

    def __init__(self) -> None:
        self.batches = iter(PAIR)

    def __len__(self) -> int:
        return 1

    def __iter__(self):
        return self.batches


class Text(nn.Module):
    def forward(self, x):
        return "no scores"


RECIPES: Refusals = {
    "epochs is 0, but it must be a whole number from 1.": recipe(epochs=0),
    "steps is 0, but it must be a whole number from 1.": recipe(steps=0),
    "steps is 1.5, but it must be a whole number from 1.": recipe(steps=1.5),
    "max_lr is 0, but it must be a finite number above 0.": recipe(max_lr=0),
    "max_lr is nan, but it must be a finite number above 0.": recipe(max_lr=math.nan),
    "There is no optimizer 'adam': choose one of sgd, adamw.": recipe(optimizer="adam"),
    "warmup is 1, but it must be a finite number from 0 and below 1.": recipe(warmup=1),
    "There is no precision 'fp16': choose one of auto, bf16, fp32.": recipe(precision="fp16"),
    "max_lr is '1e-3'": recipe(max_lr="1e-3"),
    "max_lr is None": recipe(max_lr=None),
    "max_lr is [0.1]": recipe(max_lr=[0.1]),
    "max_lr is inf": recipe(max_lr=math.inf),
    "max_lr is True": recipe(max_lr=True),
    "weight_decay is -1, but it must be a finite number from 0": recipe(weight_decay=-1),
    "weight_decay is 'a'": recipe(weight_decay="a"),
    "warmup is '0.3'": recipe(warmup="0.3"),
    "warmup is nan": recipe(warmup=math.nan),
    "epochs is 1.5": recipe(epochs=1.5),
    "epochs is '2'": recipe(epochs="2"),
    "steps is True": recipe(steps=True),
    "no optimizer ['sgd']": recipe(optimizer=["sgd"]),
    "no precision None": recipe(precision=None),
    "loss_fn is 3": recipe(loss_fn=3),
    "batches must have a length and at least one batch": recipe(batches=[]),
    "must have a length and at least one batch": recipe(batches=iter([blobs()])),
    "batches must have a length": recipe(batches=X),
    "at least one batch": recipe(batches={}),
    "a list or labkit.training.Batches": recipe(batches=None),
    "but the batches have no labels": recipe(batches=[X]),
    "A batch is a str": recipe(batches=["text"]),
    "A batch is None": recipe(batches=[None]),
    "[64, 2] and float32 [64]": recipe(batches=[(X, Y.float())]),
    "[64, 2] and int64 [10]": recipe(batches=[(X, Y[:10])]),
    "loss_fn must return one number for a batch": recipe(loss_fn=lambda model, batch: 3.0),
    "reduce it": recipe(loss_fn=lambda model, batch: model(batch[0])),
    "does not depend on the parameters": recipe(loss_fn=lambda model, batch: torch.tensor(1.0)),
    "without detach, item or no_grad": recipe(loss_fn=lambda model, batch: training.task_loss(model, batch).detach()),
    "they must be readable again": recipe(batches=Once(), epochs=3),
    "Inside torch.inference_mode()": lambda model: torch.inference_mode()(recipe())(model),
    "no parameter that requires a gradient": lambda model: recipe()(model.requires_grad_(False)),
}


@refused(RECIPES)
def test_a_training_that_cannot_be_is_refused_and_the_model_left(words: str, call) -> None:
    model = linear()
    check_refusal(words, lambda: call(model), leaves=model)


REFUSALS: Refusals = {
    "model is a list": lambda: recipe()([linear()]),
    "model is None": lambda: recipe()(None),
    "on the meta device": lambda: recipe()(nn.Linear(2, 2, device="meta")),
    "may be the labels or the attention_mask of LlamaForCausalLM": lambda: recipe(
        batches=[(torch.full((2, 4), 5), torch.full((2, 4), 5))]
    )(family("llama")),
    "make and train the model outside": lambda: recipe()(torch.inference_mode()(linear)()),
    "all tensors need one length; they have [3, 4]": lambda: Batches((torch.zeros(3), torch.zeros(4)), 2),
    "batch_size is 0, but it must be a whole number": lambda: Batches((torch.zeros(3), torch.zeros(3)), 0),
    "there is no batch to measure accuracy on": lambda: training.accuracy(linear(), []),
    "1-D, with at least one window of 512": lambda: training.perplexity(EqualOdds(), torch.zeros(10).long()),
    "batch_size is '8'": lambda: Batches((X, Y), "8"),
    "batch_size is 2.0": lambda: Batches((X, Y), 2.0),
    "seed is 'a'": lambda: Batches((X, Y), 8, seed="a"),
    "seed is -3": lambda: Batches((X, Y), 8, seed=-3),
    "data must be a tuple": lambda: Batches(X, 8),
    "put the tensors into it": lambda: Batches((), 8),
    "tensor 0 of data is a list": lambda: Batches(([1, 2], [0, 1]), 1),
    "tensor 1 of data has shape []": lambda: Batches((X, torch.tensor(1)), 1),
    "tensor 0 of data has shape [0, 2]": lambda: Batches((X[:0], Y[:0]), 1),
    "tensor 0 of data is a tensor of layout sparse_coo": lambda: Batches((X.to_sparse(), Y), 1),
    "they have [64, 32]": lambda: Batches({"x": X, "labels": Y[:32]}, 8),
    "no labels to compare with": lambda: training.accuracy(linear(), [X]),
    "Scores are [64, 2] and labels [64, 1]": lambda: training.accuracy(linear(), [(X, Y[:, None])]),
    "and labels [64, 2]": lambda: training.accuracy(linear(), [(X, torch.eye(2)[Y])]),
    "and labels [3]": lambda: training.accuracy(linear(), [(X, Y[:3])]),
    "and labels list": lambda: training.accuracy(linear(), [(X, Y.tolist())]),
    "Scores are str": lambda: training.accuracy(Text(), PAIR),
    "model is a Tensor": lambda: training.accuracy(X, PAIR),
    "batches is one Tensor": lambda: training.accuracy(linear(), X),
    "give batches": lambda: training.accuracy(linear(), None),
    "tokens is a list": lambda: training.perplexity(EqualOdds(), [1, 2, 3]),
    "they are torch.float32 of shape (600,)": lambda: training.perplexity(EqualOdds(), torch.zeros(600)),
    "of shape (30, 20)": lambda: training.perplexity(EqualOdds(), torch.zeros(30, 20).long()),
    "window is 1, but it must be a whole number from 2": lambda: training.perplexity(EqualOdds(), Y, window=1),
    "window is '10'": lambda: training.perplexity(EqualOdds(), Y, window="10"),
    "has no batch norm with running statistics": lambda: training.reestimate_norms_(linear(), [X]),
    "batch norm statistics that are not finite": lambda: training.reestimate_norms_(normed(), [X * math.inf]),
    "model is a function": lambda: training.perplexity(lambda ids: ids, Y, window=8),
    "tokens go from 70 to 133, but the model knows 0 to 60": lambda: training.perplexity(
        family("llama"), torch.arange(70, 134), window=8
    ),
    "tokens go from -1 to 0": lambda: training.perplexity(family("llama"), Y - 1, window=8),
    "Perplexity needs a language model": lambda: training.perplexity(nn.Linear(2, 2), Y, window=8),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words: str, call) -> None:
    check_refusal(words, call)


# --- statistics of batch norms anew -----------------------------------------------------------------------------------


class Named(nn.Module):
    """A model that is called with keywords, as a transformers model is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = normed()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.parametrize("kind", ["tensors", "pairs", "dicts"])
def test_norms_are_estimated_anew_as_torch_does(kind: str) -> None:
    points, labels = blobs(96)
    parts = list(zip(points.split(32), labels.split(32), strict=True))
    batches = {
        "tensors": [x for x, _ in parts],
        "pairs": parts,
        "dicts": [{"x": x, "labels": y} for x, y in parts],
    }[kind]
    model, plain = Named().eval(), Named()
    torch.optim.swa_utils.update_bn([x for x, _ in parts], plain)
    state = torch.get_rng_state()
    training.reestimate_norms_(model, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    for name, x in plain.state_dict().items():
        assert torch.allclose(model.state_dict()[name], x, rtol=1e-6, atol=1e-7), name
    assert model.net[1].momentum == 0.1


def test_norms_keep_their_statistics_after_an_error_and_where_no_batch_arrives() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Forked().eval()
    training.reestimate_norms_(model, [X])
    torch.nn.init.uniform_(model.idle.running_mean)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    training.reestimate_norms_(model, [X + 1])
    assert torch.equal(model.idle.running_mean, before["idle.running_mean"])
    assert not torch.equal(model.used.running_mean, before["used.running_mean"])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for batches, error in (([X, X * math.nan], InputError), ([X, X[:1]], ValueError), ([], InputError)):
        with pytest.raises(error):
            training.reestimate_norms_(model, batches)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert model.used.momentum == 0.1 and not model.used.training


def test_dropout_stays_off_while_norms_are_estimated() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2)).train()
    training.reestimate_norms_(model, [X])
    assert torch.allclose(model[1].running_mean, X.mean(0), atol=1e-6)
    assert model[0].training and model[1].training
