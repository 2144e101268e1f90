"""Patterns have exactly the zeros asked for, a wrong product is not timed, and the crossing is where time crosses."""

import pytest
import torch

from labkit.errors import InputError
from labkit.pruning import sparse


@pytest.mark.parametrize(("sparsity", "block"), [(0.5, 1), (0.9, 1), (0.0, 1), (1.0, 8), (0.75, 16)])
def test_a_random_weight_has_the_zeros_asked_for_in_whole_blocks(sparsity, block):
    weight = sparse.random_weight(64, 128, sparsity, block=block, seed=3)
    assert int((weight == 0).sum()) == round(64 * 128 / block**2 * sparsity) * block**2
    tiles = weight.unfold(0, block, block).unfold(1, block, block).flatten(2)  # [rows, columns, block^2]
    assert bool(((tiles == 0).all(2) | (tiles != 0).all(2)).all())
    assert torch.equal(weight, sparse.random_weight(64, 128, sparsity, block=block, seed=3))


def test_a_block_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="blocks of 5"):
        sparse.random_weight(64, 64, 0.5, block=5)


@pytest.mark.parametrize("format", ["csr", "bsr32", "kernel-bf16"])
def test_against_dense_compares_equal_layers(format):
    found = sparse.against_dense(sparse.random_weight(96, 64, 0.9), format, 4, budget_s=0.05)
    assert found.speedup > 0


def test_a_wrong_product_is_not_timed(monkeypatch):
    monkeypatch.setattr(sparse, "convert", lambda model, **_: torch.nn.Linear(64, 96, bias=False))
    with pytest.raises(InputError):
        sparse.against_dense(sparse.random_weight(96, 64, 0.9), "csr", 4, budget_s=0.05)


def test_break_even_is_where_time_linear_in_sparsity_crosses_one():
    cost = [2.5 - 2 * s for s in (0.5, 0.7, 0.9)]  # time over dense: 1 at 0.75
    assert sparse.break_even((0.9, 0.5, 0.7), [1 / cost[2], 1 / cost[0], 1 / cost[1]]) == pytest.approx(0.75)
    assert sparse.break_even((0.5, 0.9), (1.2, 3.0)) is None
    assert sparse.break_even((0.5, 0.9), (0.2, 0.8)) is None
