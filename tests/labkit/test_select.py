"""Exactly the lowest k, whatever the ties, and k without truncation; names that the model does not have."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Refusals, check_refusal, refused
from torch import nn

from labkit.modules.weights import named_parts
from labkit.pruning.select import count_to_prune, lowest_k


@st.composite
def scores_and_k(draw):
    values = draw(st.lists(st.integers(-3, 3) | st.floats(-5, 5, width=16), min_size=1, max_size=40))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    return torch.tensor(values, dtype=dtype), draw(st.integers(0, len(values)))


@settings(deadline=None, max_examples=100)
@given(scores_and_k())
def test_lowest_k_is_the_head_of_a_stable_sort(case):
    scores, k = case
    order = sorted(range(len(scores)), key=lambda i: (float(scores[i]), i))
    expected = torch.zeros(len(scores), dtype=torch.bool)
    expected[order[:k]] = True
    assert torch.equal(lowest_k(scores, k), expected)
    assert torch.equal(lowest_k(scores[None], k, dim=1), expected[None])


@settings(deadline=None, max_examples=50)
@given(scores_and_k(), st.integers(1, 4))
def test_lowest_k_along_a_dimension_ranks_each_slice(case, copies):
    scores, k = case
    block = torch.stack([scores.roll(i) for i in range(copies)])
    expected = torch.stack([lowest_k(row, k) for row in block])
    assert torch.equal(lowest_k(block, k, dim=1), expected)
    assert torch.equal(lowest_k(block.t(), k, dim=0), expected.t())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_lowest_k_ranks_whole_numbers(dtype):
    assert lowest_k(torch.tensor([1, 0, 1, 0], dtype=dtype), 3).tolist() == [True, True, False, True]


def test_lowest_k_keeps_shape_and_reads_transposed_scores_in_their_own_order():
    scores = torch.tensor([[3.0, 1.0], [1.0, 2.0]]).t()  # [[3, 1], [1, 2]]
    assert lowest_k(scores, 1).tolist() == [[False, True], [False, False]]
    assert lowest_k(torch.tensor(2.0), 1).tolist() is True
    assert lowest_k(torch.tensor([torch.inf, -torch.inf]), 1).tolist() == [False, True]


@pytest.mark.parametrize(
    ("n", "sparsity", "k"),
    [(10, 0.9, 9), (100, 0.99, 99), (20, 0.8, 16), (7, 0, 0), (7, 1, 7), (7, 1.0, 7), (0, 0.5, 0)],
)
def test_the_count_is_not_truncated(n, sparsity, k):
    assert count_to_prune(n, sparsity) == k


@given(st.integers(0, 10**9), st.floats(0, 1))
def test_the_count_is_within_half_of_the_fraction(n, sparsity):
    k = count_to_prune(n, sparsity)
    assert 0 <= k <= n and abs(k - n * sparsity) <= 0.5 + 1e-6


TWO = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def test_parts_are_named_as_modules_or_as_weights():
    assert named_parts(TWO, ["0", "1.weight"], "ignore") == ["0", "1.weight"] and named_parts(TWO, "0", "") == ["0"]


REFUSALS: Refusals = {
    "ignore names '2'": lambda: named_parts(TWO, "2", "ignore"),
    "ignore names '1.weights'": lambda: named_parts(TWO, ["0", "1.weights"], "ignore"),
    "ignore names 'Linear'": lambda: named_parts(TWO, nn.Linear(1, 1), "ignore"),
    "NaN, which has no rank": lambda: lowest_k(torch.tensor([1.0, torch.nan]), 1),
    **{
        f"k is {k}, but it must be a whole number from 0 to 3": partial(lowest_k, torch.ones(3), k)
        for k in (-1, 4, 1.0, True)
    },
    **{
        f"sparsity is {sparsity!r}, but it must be a number from 0 to 1": partial(count_to_prune, 10, sparsity)
        for sparsity in (-0.1, 1.1, math.nan, True, "0.5", None)
    },
}


@refused(REFUSALS)
def test_what_cannot_be_selected_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
