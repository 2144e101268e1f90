"""SparseGPT on one layer against a float64 oracle that inverts every trailing Hessian afresh, and beside its rivals."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Refusals, check_refusal, refused

from labkit.pruning.pattern import is_nm, mask
from labkit.pruning.select import count_to_prune, lowest_k
from labkit.pruning.sparsegpt import sparsegpt


def layer(out, width, tokens=None, seed=0, dtype=torch.float64):
    """A weight [out, in] and inputs [tokens, in] that are correlated and of very different size, as a network's are."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 4 * width if tokens is None else tokens
    mixed = torch.randn(width, width, generator=generator, dtype=dtype) / width**0.5
    mixed += torch.eye(width, dtype=dtype)
    scale = torch.randn(width, generator=generator, dtype=dtype).exp()
    x = torch.randn(tokens, width, generator=generator, dtype=dtype) @ mixed * scale
    return torch.randn(out, width, generator=generator, dtype=dtype), x


def oracle(w, hessian, pattern, damp=0.01, block=128):
    """The paper's equations without its tricks: at column j, the inverse of the Hessian of the columns from j on.

    Removing w_j from a row adds w_j^2 / [H_j:^-1]_00 to its error, and the best change of the columns from j on is
    -w_j / [H_j:^-1]_00 * [H_j:^-1]_0. An input that is always zero is taken out of the Hessian first.
    """
    w, h = w.double().clone(), hessian.double().clone()
    alive = h.diagonal() > 0
    mean = h.diagonal()[alive].mean() if alive.any() else 1.0
    w[:, ~alive] = 0
    h[~alive, ~alive] = mean
    h += damp * mean * torch.eye(len(h), dtype=h.dtype)
    inverse = [torch.linalg.inv(h[j:, j:]) for j in range(len(h))]
    cost = torch.stack([each[0, 0] for each in inverse])
    kept = torch.ones_like(w, dtype=torch.bool)
    for j in range(len(h)):
        if isinstance(pattern, tuple) and j % pattern[1] == 0:
            group = slice(j, j + pattern[1])
            kept[:, group] = mask(w[:, group].square() / cost[group], *pattern)
        elif not isinstance(pattern, tuple) and j % block == 0:
            columns = slice(j, min(j + block, len(h)))
            scores = (w[:, columns].square() / cost[columns]).t()
            kept[:, columns] = ~lowest_k(scores, count_to_prune(scores.numel(), pattern)).t()
        removed = w[:, j].masked_fill(kept[:, j], 0) / cost[j]
        w[:, j:] -= removed[:, None] * inverse[j][0]
    return w.masked_fill(~kept, 0), kept


def output_error(w, new, x):
    return float((x @ (w - new).t()).square().sum() / (x @ w.t()).square().sum())


PATTERNS = [(2, 4), (4, 8), (1, 4), (3, 5), (1, 1), 0.5, 0.73, 0.0, 1.0]


@given(
    pattern=st.sampled_from(PATTERNS),
    out=st.integers(1, 6),
    groups=st.integers(1, 6),
    block=st.integers(1, 50),
    tokens=st.integers(3, 80),
    seed=st.integers(0, 2**16),
    dead=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_sparsegpt_is_the_oracle(pattern, out, groups, block, tokens, seed, dead):
    m = pattern[1] if isinstance(pattern, tuple) else 7
    w, x = layer(out, groups * m, tokens, seed)
    if dead:
        x[:, seed % x.shape[1]] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("labkit.pruning.sparsegpt.BLOCK", block)
        new, kept = sparsegpt(w, x.t() @ x, pattern)
    if isinstance(pattern, float):
        expected, chosen = oracle(w, x.t() @ x, pattern, block=block)
    else:
        expected, chosen = oracle(w, x.t() @ x, pattern)
    assert torch.equal(kept, chosen)
    # Condition number up to 1e2 / damp = 1e4 by the damping, times a few hundred roundings of 1e-16.
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9 * float(w.abs().max()))


def test_float32_is_the_oracle_up_to_its_rounding():
    w, x = layer(48, 96, dtype=torch.float64)
    new, kept = sparsegpt(w.float(), (x.t() @ x).float())
    expected, chosen = oracle(w.float(), (x.t() @ x).float(), (2, 4))
    assert new.dtype == torch.float32 and is_nm(new)
    assert (kept == chosen).double().mean() > 0.999  # a tie of scores up to rounding may fall the other way
    assert output_error(w, new.double(), x) == pytest.approx(output_error(w, expected, x), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_come_back_in_their_type(dtype):
    w, x = layer(8, 32)
    new, kept = sparsegpt(w.to(dtype), (x.t() @ x).float())
    expected, _ = oracle(w.to(dtype), (x.t() @ x).float(), (2, 4))
    assert new.dtype == dtype and is_nm(new) and not new[~kept].any()
    torch.testing.assert_close(new.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_a_failed_cholesky_decomposition_raises_the_damping_and_says_so(monkeypatch):
    monkeypatch.setattr("labkit.modules.hessians.DAMP", 1e-17)
    w, x = layer(4, 32, tokens=3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        new, _ = sparsegpt(w, x.t() @ x)
    assert "in float64 with a damping of 1e-17, so 1e-16 is tried" in str(said[0].message)
    assert new.isfinite().all() and is_nm(new)


def asked(**arguments):
    return lambda: sparsegpt(**{"weight": torch.ones(2, 8), "hessian": torch.eye(8), **arguments})


REFUSALS: Refusals = {
    "weight is [2, 8] and hessian [3, 3]": asked(hessian=torch.eye(3)),
    "NaN or infinity": asked(hessian=torch.full((8, 8), torch.nan)),
    "no Cholesky factor even with a damping of 1000": asked(hessian=torch.eye(8) - 1e6 * (1 - torch.eye(8))),
    "width 8 is no multiple of m = 3": asked(pattern=(2, 3)),
    "pattern 3:2 is none": asked(pattern=(3, 2)),
    "pattern is 1.5": asked(pattern=1.5),
}


@pytest.mark.filterwarnings("ignore:The Hessian is not positive definite")
@refused(REFUSALS)
def test_errors_say_what_is_allowed(words, call):
    check_refusal(words, call)
