"""Channel permutations: more energy kept, the same function computed, and what cannot move left in its place."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llamas import llama, text
from networks import randomise_
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.modules.weights import prunable
from labkit.pruning import nm, permutation


def kept(scores, n, m):
    return float((scores * nm.mask(scores, n, m)).sum())


@given(
    pattern=st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (2, 5)]),
    groups=st.integers(1, 5),
    rows=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=25, deadline=None)
def test_no_swap_of_two_columns_keeps_more(pattern, groups, rows, seed):
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, groups * m, generator=generator, dtype=torch.float64).square()
    order = permutation.search(scores, n, m)
    assert sorted(order.tolist()) == list(range(groups * m))
    best = kept(scores[:, order], n, m)
    assert best >= kept(scores, n, m) - 1e-12
    for one, other in itertools.combinations(range(groups * m), 2):
        swapped = order.clone()
        swapped[[one, other]] = swapped[[other, one]]
        assert kept(scores[:, swapped], n, m) <= best + 1e-9


def test_the_best_order_of_a_small_matrix():
    """Four columns that matter and four that do not: the first order keeps half of what matters, the best all."""
    scores = torch.tensor([[9.0, 8, 7, 6, 0.1, 0.1, 0.1, 0.1]])
    assert kept(scores[:, permutation.search(scores)], 2, 4) == 30


def energy(model):
    """(kept by 2:4, all), over the weights whose input dimension 4 divides."""
    weights = [w.parameter.detach() for w in prunable(model).values() if w.parameter.shape[1] % 4 == 0]
    return sum(float((w * nm.mask(w)).square().sum()) for w in weights), sum(float(w.square().sum()) for w in weights)


class Branches(nn.Module):
    """A residual stage, a concatenation, a grouped convolution and a Linear behind flatten."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.one, self.other = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.join = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.deep(self.one(x).relu())
        x = torch.cat([x, self.other(x).relu()], 1)
        return self.head(nn.functional.adaptive_avg_pool2d(self.join(x).relu(), 2).flatten(1))


def test_the_function_stays_and_more_is_kept():
    torch.manual_seed(0)
    model, x = randomise_(Branches()), torch.randn(4, 3, 8, 8)
    permuted = permutation.permute(model, x)
    torch.testing.assert_close(permuted(x), model(x), rtol=1e-4, atol=1e-5)
    before, after = energy(model), energy(permuted)
    assert after[1] == pytest.approx(before[1], rel=1e-6) and after[0] > 1.005 * before[0]
    assert not torch.equal(permuted.join.weight.flatten().sort().values, model.join.weight.flatten())
    assert torch.equal(permuted.head.bias, model.head.bias)


def test_a_language_model_keeps_more_in_what_reads_its_hidden_states():
    model, tokens = llama(initializer_range=0.02), torch.cat([text(12, 0), text(12, 1)])
    permuted = permutation.permute(model, tokens[:1])
    torch.testing.assert_close(permuted(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-6)
    before, after = (
        sum(nm.kept_energy(w.detach(), nm.mask(w)) for name, w in each.named_parameters() if "proj" in name)
        for each in (model, permuted)
    )
    assert after > 1.005 * before


REFUSALS: Refusals = {
    "scores are [2, 6]": lambda: permutation.search(torch.ones(2, 6)),
    "none of them negative": lambda: permutation.search(-torch.ones(2, 8)),
    "pattern 5:4 is none": lambda: permutation.search(torch.ones(2, 8), 5, 4),
    "pruned already": lambda: permutation.permute(nm.prune(nn.Sequential(nn.Linear(8, 8))), torch.ones(1, 8)),
}


@refused(REFUSALS)
def test_errors_say_what_is_allowed(words, call):
    check_refusal(words, call)
