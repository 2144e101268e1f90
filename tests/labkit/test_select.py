"""Exactly the lowest k, whatever the ties, and k without truncation; names that the model does not have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from labkit.errors import InputError
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


@pytest.mark.parametrize("k", [-1, 4, 1.0, True])
def test_lowest_k_refuses_a_k_outside(k):
    with pytest.raises(InputError, match="whole number from 0 to 3"):
        lowest_k(torch.ones(3), k)


def test_lowest_k_refuses_nan():
    with pytest.raises(InputError, match="NaN, which has no rank"):
        lowest_k(torch.tensor([1.0, torch.nan]), 1)


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


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_a_fraction_outside_is_refused(sparsity):
    with pytest.raises(InputError, match="must be a number from 0 to 1"):
        count_to_prune(10, sparsity)


@pytest.mark.parametrize(
    ("names", "what"),
    [("2", "names '2'"), (["0", "1.weights"], "names '1.weights'"), (nn.Linear(1, 1), "names 'Linear'")],
)
def test_parts_that_the_model_does_not_have_are_named(names, what):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert named_parts(model, ["0", "1.weight"], "ignore") == ["0", "1.weight"] and named_parts(model, "0", "") == ["0"]
    with pytest.raises(InputError, match=f"ignore {what}"):
        named_parts(model, names, "ignore")
