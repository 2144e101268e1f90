"""Masks that move during training: exact at every step, with the gradient of SR-STE, and plain weights at the end."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import family, inputs
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.data import training
from labkit.pruning import nm, sr_ste, unstructured
from labkit.pruning.blockwise import weights_of
from labkit.storage import artifact


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 4, 6, 6, generator=generator), torch.randint(3, (32,), generator=generator)


def test_the_forward_pass_is_that_of_the_pruned_model(batch):
    model = sr_ste.prepare(net(), 2, 4)
    assert torch.equal(model(batch[0]), nm.prune(net(), 2, 4)(batch[0]))
    assert unstructured.sparsity(model) == 0.5
    assert artifact.size(model, "nm") < artifact.size(net())
    assert torch.equal(model[3].parametrizations.weight.original, net()[3].weight)


def test_the_gradient_passes_straight_through_and_pulls_the_pruned_weights_to_zero(monkeypatch):
    """One step of SGD by hand: w - lr (g + decay * w where pruned), g the gradient of the pruned weight."""
    torch.manual_seed(0)
    layer, x, lr, decay = nn.Linear(8, 4, bias=False), torch.randn(5, 8), 0.1, 0.01
    weight = layer.weight.detach().clone()
    kept = nm.mask(weight)
    pruned = (weight * kept).requires_grad_()
    F.linear(x, pruned).square().sum().backward()
    expected = weight - lr * (pruned.grad + decay * weight * ~kept)

    monkeypatch.setattr(sr_ste, "DECAY", decay)
    model = sr_ste.prepare(layer)
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=lr).step()
    torch.testing.assert_close(model.parametrizations.weight.original.detach(), expected)
    assert pruned.grad[~kept].abs().min() > 0


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 8)])
def test_the_pattern_is_exact_at_every_step_and_moves(pattern, batch):
    excluded = ["0"] if pattern[1] == 8 else []  # four input channels
    model = sr_ste.prepare(net(), *pattern, ignore=excluded)
    first = nm.mask(model[3].parametrizations.weight.original, *pattern)
    descent = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        descent.step()
        descent.zero_grad()
        assert all(nm.is_nm(model[i].weight, *pattern) for i in (3, 5))
    assert not torch.equal(first, nm.mask(model[3].parametrizations.weight.original, *pattern))


def test_finish_makes_plain_weights_that_stay_in_the_pattern(batch):
    model = sr_ste.prepare(net())
    training.train_(model, [batch], epochs=10, max_lr=0.05, precision="fp32")
    trained = copy.deepcopy(model.state_dict())
    fixed = sr_ste.finish(model)
    assert fixed.state_dict().keys() == net().state_dict().keys()
    torch.testing.assert_close(fixed(batch[0]), model(batch[0]), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.values(), strict=True))
    training.train_(fixed, [batch], epochs=5, max_lr=0.05, precision="fp32")
    plain = unstructured.make_permanent(fixed)
    assert all(nm.is_nm(plain[i].weight) and (plain[i].weight != 0).double().mean() == 0.5 for i in (0, 3, 5))


def test_transposed_and_shared_weights():
    gpt2, tokens = family("gpt2"), inputs("gpt2")["input_ids"][:1]
    model = sr_ste.prepare(gpt2)
    assert torch.equal(model(tokens).logits, nm.prune(gpt2)(tokens).logits)
    fixed = sr_ste.finish(model)
    assert all(nm.is_nm(weight.parameter.t()) for weight in weights_of(fixed).values())
    two = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    two[1].weight = two[0].weight
    model = sr_ste.prepare(two)
    assert model[0].parametrizations.weight.original is model[1].parametrizations.weight.original
    fixed = sr_ste.finish(model)
    assert fixed[0].weight is fixed[1].weight
    x = torch.randn(3, 8)
    assert torch.equal(fixed(x), model(x))


REFUSALS: Refusals = {
    "pattern 5:4 is none": lambda: sr_ste.prepare(net(), 5, 4),
    "0.weight (4), 3.weight (128), 5.weight (16) is no multiple of 3": lambda: sr_ste.prepare(net(), 1, 3),
    "holds masks already": lambda: sr_ste.prepare(nm.prune(net())),
    "has a parametrization": lambda: sr_ste.prepare(sr_ste.prepare(net())),
    "no weights with moving masks": lambda: sr_ste.finish(net()),
}


@refused(REFUSALS)
def test_errors_say_what_is_allowed(words, call):
    check_refusal(words, call)
