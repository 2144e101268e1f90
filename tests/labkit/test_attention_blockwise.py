"""Attention in blocks against softmax(q k^T / sqrt(D)) v in float64, within the bound that its docstring derives."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Refusals, check_refusal, refused
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from labkit.attention import mla
from labkit.attention.blockwise import Partial, attention, merge, partial
from labkit.timing import roofline


def drawn(queries: int, keys: int, *, heads: int = 4, groups: int = 2, width: int = 8, dtype=torch.double, loud=1.0):
    draw = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = ((2, heads, queries, width), (2, groups, keys, width), (2, groups, keys, width + 3))
    q, k, v = (torch.randn(shape, generator=draw, dtype=torch.double) for shape in shapes)
    return (loud * q).to(dtype), k.to(dtype), v.to(dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Float64, every head with keys and values of its own, rows without keys 0."""
    q, (k, v) = q.double(), (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        query, key = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        scores = scores.masked_fill(key > query + k.shape[2] - q.shape[2], -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def bound(q: Tensor, k: Tensor, v: Tensor, block: int) -> float:
    keys, width = k.shape[2:]
    largest = (q.double().abs() @ k.double().abs().repeat_interleave(q.shape[1] // k.shape[1], 1).mT).max()
    factor = 2 * (width + 6) * float(largest) / math.sqrt(width) + 2 * keys + 8 * math.ceil(keys / block) + 8
    return torch.finfo(q.dtype).eps / 2 * float(v.double().abs().max()) * factor


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1, 3, 8, 64]),
    st.booleans(),
    st.sampled_from([torch.double, torch.float, torch.bfloat16]),
    st.sampled_from([1.0, 30.0]),
)
@settings(max_examples=60, deadline=None)
def test_it_is_softmax_attention_within_the_bound(queries, keys, block, causal, dtype, loud):
    q, k, v = drawn(queries, keys, dtype=dtype, loud=loud)
    y = attention(q, k, v, causal=causal, block=block)
    assert y.dtype == dtype and y.shape == (*q.shape[:3], v.shape[3])
    assert float((y.double() - reference(q, k, v, causal)).abs().max()) <= bound(q, k, v, block)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_of_a_group_read_the_same_keys(groups):
    q, k, v = drawn(9, 9, groups=groups)
    assert torch.allclose(attention(q, k, v, block=4), reference(q, k, v, False), rtol=0, atol=bound(q, k, v, 4))


@pytest.mark.parametrize("queries", [1, 2, 5])
def test_queries_of_a_longer_cache_are_the_last_rows_of_the_whole(queries):
    q, k, v = drawn(21, 21)
    last = attention(q[:, :, -queries:], k, v, causal=True, block=4)
    assert torch.allclose(last, reference(q, k, v, True)[:, :, -queries:], rtol=0, atol=bound(q, k, v, 4))


def test_rows_without_a_key_are_zero():
    q, k, v = drawn(7, 3)
    y = attention(q, k, v, causal=True, block=2)
    assert not y[:, :, :4].any() and y[:, :, 4:].abs().amin(-1).all() and y.isfinite().all()


def test_a_block_that_is_hidden_altogether_changes_nothing():
    q, k, v = drawn(5, 12, groups=4)
    scaled, nothing = q / math.sqrt(q.shape[-1]), torch.ones(5, 4, dtype=torch.bool)
    parts = [partial(scaled, k[:, :, 4:], v[:, :, 4:]), partial(scaled, k[:, :, :4], v[:, :, :4], nothing)]
    for first, second in itertools.permutations(parts):
        whole = merge(first, second)
        assert torch.equal(whole.output / whole.total, parts[0].output / parts[0].total)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_blocks_of_any_size_merge_in_any_order(sizes, random):
    q, k, v = drawn(3, sum(sizes), groups=4, loud=5.0)
    scaled = q / math.sqrt(q.shape[-1])
    parts = [partial(scaled, a, b) for a, b in zip(k.split(sizes, 2), v.split(sizes, 2), strict=True)]
    while len(parts) > 1:  # any tree of merges
        random.shuffle(parts)
        parts = [merge(parts[0], parts[1]), *parts[2:]]
    whole: Partial = parts[0]
    assert torch.allclose(whole.output / whole.total, reference(q, k, v, False), rtol=0, atol=bound(q, k, v, 1))


class Largest(TorchDispatchMode):
    """The most numbers that a tensor has which is made inside."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


def test_nothing_larger_than_the_blocks_and_the_result_is_made():
    q, k, v = drawn(256, 4096)  # scores: 8 heads x 256 x 4096, repeated keys: 8 heads x 4096 x 8
    with Largest() as largest:
        y = attention(q, k, v, causal=True, block=64)
    assert largest.numbers == max(y.numel(), q.shape[0] * q.shape[1] * 64 * 64)


def test_blocks_after_a_causal_query_cost_nothing():
    q, k, v = drawn(64, 64)
    whole = roofline.count(lambda: attention(q, k, v, block=8)).flops
    assert roofline.count(lambda: attention(q, k, v, causal=True, block=8)).flops == whole * 36 // 64


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("loud", "large"), [(300.0, 1.0), (1.0, 3e4), (300.0, 3e4)])
def test_scores_and_sums_beyond_float16_are_what_they_are(causal, loud, large):
    """Scores up to some 100,000, and sums of values up to some 400,000: torch's attention is finite there as well."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, 64, generator=draw) for _ in "qkv")
    q, k, v = (loud * q).half(), (loud * k / 10).half(), (large * v.clamp(0.5, 2)).half()
    y = attention(q, k, v, causal=causal, block=16)
    expected = reference(q, k, v, causal)
    assert y.dtype == torch.float16 and y.isfinite().all()
    assert float((y.double() - expected).abs().max()) <= bound(q, k, v, 16)
    ours, torchs = (
        float((x.double() - expected).abs().max())
        for x in (y, F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    )
    assert ours <= 2 * torchs


def zeros(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(1, *shape) for shape in shapes]


Q = torch.randn(1, 2, 4, 8)
UP = torch.randn(2, 8, 6)
LATENT = {
    "q": Q,
    "q_rope": Q[..., :2],
    "latent": torch.randn(1, 5, 6),
    "k_rope": torch.randn(1, 5, 2),
    "up_k": UP,
    "up_v": UP,
}
REFUSALS: Refusals = {
    "3 query heads do not fit 2 ... H must be a multiple of Hkv": lambda: attention(
        *zeros((3, 4, 8), (2, 4, 8), (2, 4, 8))
    ),
    "k [1, 2, 4, 6] ... do not fit together": lambda: attention(*zeros((2, 4, 8), (2, 4, 6), (2, 4, 8))),
    "k [1, 2, 5, 8] ... do not fit together": lambda: attention(*zeros((2, 4, 8), (2, 5, 8), (2, 4, 8))),
    "block is 0": lambda: attention(Q, Q, Q, block=0),
    "q is a list": lambda: attention([Q], Q, Q),
    "k is None": lambda: attention(Q, None, Q),
    "v is a str": lambda: attention(Q, Q, "v"),
    "k torch.float64 on cpu": lambda: attention(Q, Q.double(), Q),
    "v torch.float16 on cpu": lambda: attention(Q, Q, Q.half()),
    "q torch.bfloat16 on cpu": lambda: attention(Q.bfloat16(), Q, Q),
    "q is torch.int64": lambda: attention(Q.long(), Q.long(), Q.long()),
    "q is torch.complex64": lambda: attention(*[Q.to(torch.complex64)] * 3),
    "k is on the meta device": lambda: attention(Q, Q.to("meta"), Q),
    "v is a tensor of layout sparse_coo": lambda: attention(Q, Q, Q.to_sparse()),
    "q is torch.float32 [1, 2, 0, 8]": lambda: attention(Q[:, :, :0], Q, Q),
    "q [2, 4, 8], k [2, 4, 8]": lambda: attention(Q[0], Q[0], Q[0]),
    "v [1, 2, 3, 8] do not fit together: give q [B, H, Q, D]": lambda: attention(Q, Q, Q[:, :, :3]),
    "2 query heads do not fit 3": lambda: attention(Q, *[torch.randn(1, 3, 4, 8)] * 2),
    "block is '8'": lambda: attention(Q, Q, Q, block="8"),
    "block is 2.0": lambda: attention(Q, Q, Q, block=2.0),
    "block is None": lambda: attention(Q, Q, Q, block=None),
    "latent is a list": lambda: mla.expanded(**{**LATENT, "latent": [1.0]}),
    "q_rope [1, 2, 3, 2]": lambda: mla.absorbed(**{**LATENT, "q_rope": Q[:, :, :3, :2]}),
    "k_rope [1, 5, 3]": lambda: mla.absorbed(**{**LATENT, "k_rope": torch.randn(1, 5, 3)}),
    "up_k torch.float64 on cpu": lambda: mla.expanded(**{**LATENT, "up_k": UP.double()}),
    "up_v [H, Dv, C]": lambda: mla.absorbed(**{**LATENT, "up_v": UP[..., :4]}),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
