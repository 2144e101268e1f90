"""Schedules end where they say, iterative pruning follows them to the weight, tickets rewind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from labkit.errors import InputError
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


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_refuses_what_it_cannot_do(name):
    with pytest.raises(InputError, match=r"target is 1\.5, but it must be a number from 0 to 1"):
        SCHEDULES[name](1.5, 5)
    for rounds in (0, -1, 2.0, True):
        with pytest.raises(InputError, match="must be a whole number from 1"):
            SCHEDULES[name](0.9, rounds)


def test_exponential_never_reaches_one():
    with pytest.raises(InputError, match="never reaches sparsity 1"):
        exponential(1, 5)
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


@pytest.mark.parametrize("schedule", [(), (0.5, 0.4), (0.5, 1.2), (float("nan"),)])
def test_a_schedule_that_falls_or_is_empty_is_refused(net, schedule):
    with pytest.raises(InputError, match=r"none below the one before|must be a number from 0 to 1"):
        iterative(net, schedule, fine_tune)


def test_an_iterator_of_batches_is_found_out_in_the_second_round(net):
    with pytest.raises(InputError, match="a list or DataLoader if it is to be read twice"):
        iterative(net, linear(0.9, 2), fine_tune, criterion="taylor", batches=iter([(X, Y)]))


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


def test_without_masks_there_is_no_ticket(net):
    for call in (rewind, random_ticket):
        with pytest.raises(InputError, match="holds no masks, so it is no ticket"):
            call(net, net.state_dict())


def test_a_state_of_another_network_is_refused(net):
    ticket = prune(net, 0.5)
    state = net.state_dict()
    for wrong, name in ({**state, "0.bias": torch.zeros(3)}, "0.bias"), ({**state, "9.bias": torch.zeros(3)}, "9.bias"):
        with pytest.raises(InputError, match=f"differs from the model at {name}"):
            rewind(ticket, wrong)
