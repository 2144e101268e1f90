"""Schedules end where they say, iterative pruning follows them to the weight, tickets rewind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.modules.masks import masks
from labkit.pruning.schedules import SCHEDULES, cubic, exponential, iterative, linear, random_ticket, rewind
from labkit.pruning.unstructured import prune, sparsity

N = 16 * 20 + 20 * 4


def network():
    return nn.Sequential(nn.Linear(16, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.2), nn.Linear(20, 4))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return network()


generator = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 16, generator=generator), torch.randint(4, (64,), generator=generator)


def fine_tune(model, number):
    """Two steps of SGD with momentum and weight decay; dropout makes it depend on the random numbers."""
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
    return loss.item()


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# --- schedules --------------------------------------------------------------------------------------------------------


def test_schedules_of_five_rounds_to_90_percent():
    assert linear(0.9, 5) == pytest.approx([0.18, 0.36, 0.54, 0.72, 0.9])
    assert cubic(0.9, 5) == pytest.approx([0.4392, 0.7056, 0.8424, 0.8928, 0.9])
    assert exponential(0.9, 5) == pytest.approx([0.3690, 0.6019, 0.7488, 0.8415, 0.9], abs=1e-4)


@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0, 0.999), st.integers(1, 30))
def test_schedules_rise_to_exactly_the_target(name, target, rounds):
    steps = SCHEDULES[name](target, rounds)
    assert len(steps) == rounds and steps[-1] == target
    assert list(steps) == sorted(steps) and steps[0] >= 0


TARGETS: Refusals = {
    "target is 1.5, but it must be a number from 0 to 1": lambda schedule: schedule(1.5, 5),
    "rounds is 0, but it must be a whole number from 1": lambda schedule: schedule(0.9, 0),
    "rounds is -1": lambda schedule: schedule(0.9, -1),
    "rounds is 2.0": lambda schedule: schedule(0.9, 2.0),
    "rounds is True": lambda schedule: schedule(0.9, True),
}


@pytest.mark.parametrize("name", SCHEDULES)
@refused(TARGETS)
def test_a_schedule_refuses_what_it_cannot_do(name, words, call):
    check_refusal(words, lambda: call(SCHEDULES[name]))


def test_exponential_never_reaches_one():
    check_refusal("never reaches sparsity 1", lambda: exponential(1, 5))
    assert cubic(1, 2) == (0.875, 1.0)


# --- iterative --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "random"])
def test_iterative_reaches_every_target_exactly(net, name, criterion):
    before = copy.deepcopy(net)
    schedule = SCHEDULES[name](0.9, 5)
    reached = []

    def train(model, number):
        fine_tune(model, number)
        reached.append(sparsity(model))

    pruned = iterative(net, schedule, train, criterion=criterion, batches=[(X, Y)])
    assert len(reached) == len(schedule)
    for share, asked in zip(reached, schedule, strict=True):
        assert abs(share - asked) * N <= 0.5 + 1e-9
    assert sparsity(pruned) == 0.9
    assert equal(net, before) and net.training


def test_excluded_layers_do_not_count(net):
    pruned = iterative(net, linear(0.8, 2), fine_tune, ignore="4")
    assert sparsity(pruned, ignore="4") == 0.8
    assert "4.weight" not in masks(pruned)


def test_iterative_leaves_the_random_numbers_alone(net):
    before = torch.get_rng_state()
    first = iterative(net, linear(0.9, 2), fine_tune)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert equal(first, iterative(net, linear(0.9, 2), fine_tune))
    assert not equal(first, iterative(net, linear(0.9, 2), fine_tune, seed=1))


def test_no_round_of_one_seed_draws_the_numbers_of_another(net):
    drawn = []
    for seed in (0, 1):
        iterative(net, linear(0.9, 3), lambda model, number: drawn.append(float(torch.rand(()))), seed=seed)
    assert len(set(drawn)) == 6


# --- lottery tickets --------------------------------------------------------------------------------------------------


def test_rewind_keeps_the_mask_and_takes_everything_else_back(net):
    start = copy.deepcopy(net.state_dict())
    fine_tune(net, 0)
    ticket = prune(net, 0.8)
    before = copy.deepcopy(ticket)
    back = rewind(ticket, start)
    for name, value in back.state_dict().items():
        mask = masks(ticket).get(name)
        assert torch.equal(value, start[name] if mask is None else start[name] * mask), name
    assert sparsity(back) == 0.8 and equal(ticket, before)
    fine_tune(back, 0)
    assert sparsity(back) == 0.8
    assert torch.equal(start["0.weight"], net.state_dict()["0.weight"]) is False  # the state is not trained with it


def test_a_random_ticket_has_as_many_weights_a_layer_but_others(net):
    start = copy.deepcopy(net.state_dict())
    ticket = prune(net, 0.8)
    other = random_ticket(ticket, start, seed=3)
    for name, mask in masks(other).items():
        assert mask.sum() == masks(ticket)[name].sum() and not torch.equal(mask, masks(ticket)[name])
        assert torch.equal(other.state_dict()[name], start[name] * mask)
    assert equal(other, random_ticket(ticket, start, seed=3))
    assert not equal(other, random_ticket(ticket, start, seed=4))


# --- refusals ---------------------------------------------------------------------------------------------------------


def pruned_by(schedule, **options):
    return lambda net: iterative(net, schedule, fine_tune, **options)


def rewound(**other):
    return lambda net: rewind(prune(net, 0.5), {**net.state_dict(), **other})


REFUSALS: Refusals = {
    "schedule is (), but it needs at least one sparsity and none below the one before": pruned_by(()),
    "schedule is (0.5, 0.4), but it needs at least one sparsity and none below the one before": pruned_by((0.5, 0.4)),
    "1.2, but it must be a number from 0 to 1": pruned_by((0.5, 1.2)),
    "nan, but it must be a number from 0 to 1": pruned_by((float("nan"),)),
    "a list or DataLoader if it is to be read twice": pruned_by(
        linear(0.9, 2), criterion="taylor", batches=iter([(X, Y)])
    ),
    "The model holds no masks, so it is no ticket": lambda net: rewind(net, net.state_dict()),
    "holds no masks, so it is no ticket": lambda net: random_ticket(net, net.state_dict()),
    "differs from the model at 0.bias": rewound(**{"0.bias": torch.zeros(3)}),
    "differs from the model at 9.bias": rewound(**{"9.bias": torch.zeros(3)}),
}


@refused(REFUSALS)
def test_what_cannot_be_pruned_in_rounds_or_rewound_is_refused_and_the_model_left(net, words, call):
    check_refusal(words, lambda: call(net), leaves=net)
