"""Caches that forget or round, token by token, against attention over everything with the right mask in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from llamas import llama, text
from refusals import Refusals, check_refusal, refused
from torch import Tensor

from labkit.attention.cache import POLICIES, EvictingCache, KVCache, Layout, QuantizedCache, Scoring
from labkit.attention.decoder import Decoder
from labkit.quantization import kv
from labkit.quantization.kv import KVFormat

LAYOUT = Layout(layers=1, heads=2, width=8, dtype=torch.double, device=torch.device("cpu"))


def drawn(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(2, heads, tokens, 8, generator=draw, dtype=torch.double) for heads in (4, 2, 2))


def run(cache, q: Tensor, k: Tensor, v: Tensor, pieces: list[int]) -> Tensor:
    outputs, start = [], 0
    for new in pieces:
        part = slice(start, start + new)
        assert cache.positions(new).tolist() == [list(range(start, start + new))]
        outputs.append(cache.attend(0, q[:, :, part], k[:, :, part], v[:, :, part]))
        cache.advance(new)
        start += new
    return torch.cat(outputs, 2)


def probabilities(q: Tensor, k: Tensor, readable: Tensor) -> Tensor:
    """[B, H, Q, K] of queries that read what is True in `readable` (Q x K, or with heads)."""
    scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
    return scores.masked_fill(~readable, -torch.inf).softmax(-1)


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


PIECES = st.lists(st.integers(1, 7), min_size=1, max_size=6)


@given(PIECES)
@settings(max_examples=25, deadline=None)
def test_pieces_of_any_size_give_what_the_whole_gives(pieces):
    q, k, v = drawn(sum(pieces))
    expected = probabilities(q, k, causal(sum(pieces))) @ v.repeat_interleave(2, 1)
    for cache in (KVCache(LAYOUT, 2, sum(pieces)), EvictingCache(LAYOUT, 2, 99), QuantizedCache(LAYOUT, 2, NOTHING)):
        assert torch.allclose(run(cache, q, k, v, pieces), expected, atol=1e-12)
        assert cache.bytes >= 2 * LAYOUT.token_bytes * sum(pieces)


NOTHING = KVFormat(None, None)


def scored(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Attention by the definition of each part of a scoring, in float64."""
    scores = q @ k.repeat_interleave(2, 1).mT * (scoring.scale or 8**-0.5)
    if scoring.softcap is not None:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    token = torch.arange(q.shape[2])
    distance = token[:, None] - token
    readable = (distance >= 0) & (distance < (scoring.window or len(token)))
    return scores.masked_fill(~readable, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)


SCORINGS = st.builds(
    Scoring, st.sampled_from([None, 0.7]), st.sampled_from([None, 1.5]), st.none() | st.integers(1, 12)
)


@given(PIECES, SCORINGS)
@settings(max_examples=60, deadline=None)
def test_scales_caps_and_windows_are_the_layers_own(pieces, scoring):
    q, k, v = drawn(sum(pieces))
    expected = scored(q, k, v, scoring)
    layout = LAYOUT._replace(layers=2, scorings={0: scoring})
    caches = [KVCache(layout, 2, sum(pieces)), QuantizedCache(layout, 2, NOTHING)]
    if scoring.window is None:
        caches.append(EvictingCache(layout, 2, 99))
    for cache in caches:
        assert torch.allclose(run(cache, q, k, v, pieces), expected, atol=1e-12)


# --- eviction ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "sinks"), [(9, 3), (4, 0), (5, 4)])
def test_a_window_with_sinks_reads_the_first_tokens_and_the_last(budget, sinks):
    q, k, v = drawn(30)
    token = torch.arange(30)
    window = (token < sinks) | (token[:, None] - token <= budget - sinks)  # those that stayed, and the token itself
    expected = probabilities(q, k, causal(30) & window) @ v.repeat_interleave(2, 1)
    cache = EvictingCache(LAYOUT, 2, budget, sinks=sinks)
    assert torch.allclose(run(cache, q, k, v, [1] * 30), expected, atol=1e-12)
    assert cache.bytes == 2 * budget * LAYOUT.token_bytes


def decoded(q: Tensor, k: Tensor, v: Tensor, policy: str, budget: int, sinks: int) -> Tensor:
    """One sequence and one group of heads at a time, entries as a list, as the papers tell it."""
    y = torch.zeros_like(q)
    for b in range(2):
        for group in range(2):
            heads = (2 * group, 2 * group + 1)
            entries, scores = [], {}
            votes: list[dict[int, float]] = []
            for t in range(q.shape[2]):
                entries.append(t)
                attention = torch.stack([(k[b, group, entries] @ q[b, h, t] / 8**0.5).softmax(0) for h in heads])
                for h, weights in zip(heads, attention, strict=True):
                    y[b, h, t] = weights @ v[b, group, entries]
                votes.append(dict(zip(entries, attention.sum(0).tolist(), strict=True)))
                counted = votes if policy == "attention" else votes[-32:]
                scores = {e: sum(vote.get(e, 0.0) for vote in counted) for e in entries}
                if policy == "votes":
                    scores = {
                        e: max(scores[other] for other in entries[max(i - 3, 0) : i + 4]) for i, e in enumerate(entries)
                    }
                if len(entries) > budget:
                    recent = len(entries) - (budget - sinks) // 2
                    protected = entries[:sinks] + entries[recent:]
                    worst = min((e for e in entries if e not in protected), key=lambda e: scores[e])
                    entries.remove(worst)
    return y


@pytest.mark.parametrize("tokens", [24, 60])
def test_accumulated_attention_evicts_what_was_read_least(tokens):
    q, k, v = drawn(tokens)
    y = run(EvictingCache(LAYOUT, 2, 12, policy="attention", sinks=2), q, k, v, [1] * tokens)
    assert torch.allclose(y, decoded(q, k, v, "attention", 12, 2), atol=1e-6)  # scores are summed in float32


def test_votes_of_the_last_queries_choose_from_a_prompt():
    """SnapKV's case: 40 tokens at once, the sum over the last 32 queries, pooled over 7 neighbours."""
    q, k, v = drawn(41)
    votes = probabilities(q, k, causal(41))[:, :, 8:40, :40].unflatten(1, (2, 2)).sum((2, 3))  # [B, Hkv, 40]
    pooled = torch.stack([votes[..., max(i - 3, 0) : i + 4].amax(-1) for i in range(40)], -1)
    pooled[..., :2] = pooled[..., 35:] = torch.inf
    stay = pooled >= pooled.sort(-1, descending=True).values[..., 11:12]
    cache = EvictingCache(LAYOUT, 2, 12, policy="votes", sinks=2)
    run(cache, q[:, :, :40], k[:, :, :40], v[:, :, :40], [40])
    counts = stay.sum(-1)
    for b, group in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
        if counts[b, group] == 12:  # else neighbours tie at the border, and either may stay
            assert torch.equal(cache.keys[0][b, group], k[b, group, :40][stay[b, group]])
    assert (counts == 12).any()


def test_the_random_control_keeps_sinks_and_recent_tokens_and_depends_on_its_seed():
    q, k, v = drawn(50)
    caches = [EvictingCache(LAYOUT, 2, 20, policy="random", sinks=4, seed=seed) for seed in (0, 0, 1)]
    for cache in caches:
        run(cache, q, k, v, [50])
        assert torch.equal(cache.keys[0][:, :, :4], k[:, :, :4]) and torch.equal(cache.keys[0][:, :, -8:], k[:, :, -8:])
    assert torch.equal(caches[0].keys[0], caches[1].keys[0]) and not torch.equal(caches[0].keys[0], caches[2].keys[0])


@pytest.mark.parametrize("policy", POLICIES)
@torch.inference_mode()
def test_a_decoder_runs_on_every_policy_as_before_until_the_budget_is_full(policy):
    decoder, ids = Decoder(llama()), text(24)
    cache = EvictingCache(decoder.layout, 1, 16, policy=policy)
    whole = decoder.hidden(ids[:, :16], decoder.cache(16))
    assert torch.allclose(decoder.hidden(ids[:, :16], cache), whole, atol=1e-5)
    for token in ids[0, 16:]:
        decoder.hidden(token[None, None], cache)
    assert cache.bytes == 16 * decoder.layout.token_bytes


# --- few bits ---------------------------------------------------------------------------------------------------------

BITS = st.sampled_from([None, 2, 4, 8])
FORMATS = st.builds(
    KVFormat, BITS, BITS, st.sampled_from(kv.PER), st.sampled_from(kv.PER), st.sampled_from([4, 8]), st.integers(0, 9)
)


@given(FORMATS, st.integers(1, 21))
@settings(max_examples=25, deadline=None)
def test_token_by_token_it_computes_what_the_quantizers_attention_computes(form, tokens):
    q, k, v = drawn(tokens)
    y = run(QuantizedCache(LAYOUT, 2, form), q, k, v, [1] * tokens)
    assert torch.allclose(y, kv.attention(q, k, v, form), rtol=1e-9, atol=1e-9)


def test_a_prompt_is_read_as_it_is_and_stored_in_few_bits():
    q, k, v = drawn(41)
    form = KVFormat(4, 4, group_size=8, window=8)
    cache = QuantizedCache(LAYOUT, 2, form)
    y = run(cache, q, k, v, [40, 1])
    exact = probabilities(q, k, causal(41)) @ v.repeat_interleave(2, 1)
    assert torch.allclose(y[:, :, :40], exact[:, :, :40], atol=1e-12)
    assert torch.allclose(y[:, :, 40:], kv.attention(q[:, :, 40:], k, v, form), atol=1e-9)


def test_four_bits_with_their_scales_are_counted():
    layout = Layout(1, 2, 64, torch.bfloat16, torch.device("cpu"))
    cache = QuantizedCache(layout, 1)
    x = torch.randn(1, 2, 544, 64).bfloat16()
    run(cache, x, x, x, [512, 31, 1])
    numbers = 2 * 2 * 512 * 64  # in codes of 4 bits, each 32 with a scale of 16 bits and its zero
    recent = 2 * 2 * 32 * 64 * 2
    assert 0 <= cache.bytes - (numbers * 4 / 8 + numbers / 32 * 2.5 + recent) < 4096  # names and shapes


def test_an_evicting_cache_holds_scores_beyond_float16():
    """Before they are scaled they go to some 100,000."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, 64, generator=draw) for _ in "qkv")
    q, k, v = (200 * q).half(), (50 * k).half(), v.half()
    layout = Layout(1, 2, 64, torch.float16, torch.device("cpu"))
    y = EvictingCache(layout, 1, 32).attend(0, q, k, v)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert y.isfinite().all() and float((y.double() - expected).abs().max()) < 1e-2


WITH_WINDOW = LAYOUT._replace(scorings={0: Scoring(window=4)})
REFUSALS: Refusals = {
    "filled by 4 sinks": lambda: EvictingCache(LAYOUT, 1, 4),
    "Some layers of this decoder read a window": lambda: EvictingCache(WITH_WINDOW, 1, 8),
    "no eviction policy 'tova'": lambda: EvictingCache(LAYOUT, 1, 8, policy="tova"),
    "capacity is 0": lambda: KVCache(LAYOUT, 1, 0),
    "capacity is 2.5": lambda: KVCache(LAYOUT, 1, 2.5),
    "batch is '1'": lambda: KVCache(LAYOUT, "1", 8),
    "batch is 0": lambda: EvictingCache(LAYOUT, 0, 8),
    "budget is '8'": lambda: EvictingCache(LAYOUT, 1, "8"),
    "sinks is -1": lambda: EvictingCache(LAYOUT, 1, 8, sinks=-1),
    "seed is 'a'": lambda: EvictingCache(LAYOUT, 1, 8, seed="a"),
    "no eviction policy ['recent']": lambda: EvictingCache(LAYOUT, 1, 8, policy=["recent"]),
    "no eviction policy None": lambda: EvictingCache(LAYOUT, 1, 8, policy=None),
    "batch is None": lambda: QuantizedCache(LAYOUT, None),
    "length is 3, but it must be a whole number from 0 to 0": lambda: KVCache(LAYOUT, 1, 8).crop(3),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
