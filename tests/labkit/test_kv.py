"""The KV quantiser against a decoder that stores a token at a time, written out in float64."""

import inspect

import families
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Refusals, check_refusal, refused
from torch import Tensor, nn

from labkit.quantization import kv
from labkit.quantization.kv import KVFormat
from labkit.storage import artifact


def rounded(group: Tensor, bits: int) -> Tensor:
    """An asymmetric grid for these numbers alone."""
    lo, hi = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
    scale = (hi - lo) / (2**bits - 1) or 1.0
    zero = round(-lo / scale)
    return ((group / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero).mul(scale)


def stored(x: Tensor, bits: int | None, per: str, form: KVFormat) -> Tensor:
    """[T, D] as a cache holds it that has T tokens, and reads the last `window` as they are."""
    x, old = x.clone(), max(len(x) - form.window, 0)
    size = form.group_size
    if bits is None:
        return x
    if per == "token":
        for t in range(old):
            for c in range(0, x.shape[1], size):
                x[t, c : c + size] = rounded(x[t, c : c + size], bits)
    else:
        for t in range(0, old // size * size, size):
            for c in range(x.shape[1]):
                x[t : t + size, c] = rounded(x[t : t + size, c], bits)
    return x


def decoded(q: Tensor, k: Tensor, v: Tensor, form: KVFormat) -> Tensor:
    """Token after token, head after head."""
    y = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    repeats, before = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    for b, h, i in ((b, h, i) for b in range(q.shape[0]) for h in range(q.shape[1]) for i in range(q.shape[2])):
        tokens = before + i + 1
        keys = stored(k[b, h // repeats, :tokens], form.key_bits, form.keys_per, form)
        values = stored(v[b, h // repeats, :tokens], form.value_bits, form.values_per, form)
        y[b, h, i] = (keys @ q[b, h, i] / q.shape[-1] ** 0.5).softmax(0) @ values
    return y


def tensors(queries: int, tokens: int, heads: int = 4, kv_heads: int = 2, size: int = 8) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, heads, queries, size), (2, kv_heads, tokens, size), (2, kv_heads, tokens, size))
    return tuple(torch.randn(shape, generator=draw, dtype=torch.double) for shape in shapes)


# --- attention --------------------------------------------------------------------------------------------------------

BITS = st.sampled_from([None, 2, 4, 8])
FORMATS = st.builds(
    KVFormat, BITS, BITS, st.sampled_from(kv.PER), st.sampled_from(kv.PER), st.sampled_from([4, 8]), st.integers(0, 9)
)


@given(FORMATS, st.integers(1, 21), st.data())
@settings(max_examples=40, deadline=None)
def test_one_pass_reads_what_a_decoder_reads(form, tokens, data):
    q, k, v = tensors(data.draw(st.integers(1, tokens)), tokens)
    assert torch.allclose(kv.attention(q, k, v, form), decoded(q, k, v, form), rtol=1e-9, atol=1e-9)


def test_without_bits_it_is_torchs_attention():
    q, k, v = tensors(9, 9)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    assert torch.allclose(kv.attention(q, k, v, KVFormat(None, None), scale=0.3), expected)
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    both = mask & torch.ones(9, 9, dtype=torch.bool).tril()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=both, enable_gqa=True)
    assert torch.allclose(kv.attention(q, k, v, KVFormat(None, None), mask=mask), expected)
    added = torch.zeros(9, 9, dtype=torch.double).masked_fill(~mask, -1e9)
    assert torch.allclose(kv.attention(q, k, v, KVFormat(None, None), mask=added), expected)


def test_a_query_reads_its_window_as_it_is():
    """Pitfall: a window at the end of the whole text, which most queries never see."""
    q, k, v = tensors(40, 40)
    form = KVFormat(2, 2, group_size=8, window=8)
    y = kv.attention(q, k, v, form)
    exact = kv.attention(q, k, v, KVFormat(None, None))
    assert torch.equal(y[:, :, :8], exact[:, :, :8]) and not torch.allclose(y[:, :, 20], exact[:, :, 20], atol=1e-3)
    last = torch.cat([kv.fake_quantize(k[:, :, :32], 2, "channel", group_size=8), k[:, :, 32:]], 2)
    mistaken = kv.attention(q, last, v, KVFormat(None, 2, group_size=8, window=8))
    assert not torch.allclose(y[:, :, :8], mistaken[:, :, :8], atol=1e-3)


# --- codes ------------------------------------------------------------------------------------------------------------


def test_codes_of_a_group_stay_when_the_cache_grows():
    _, k, v = tensors(1, 24)
    for per, codes in (("channel", lambda x: x.codes[..., :16]), ("token", lambda x: x.codes[..., :16, :])):
        whole, part = (kv.quantize(x, 4, per, group_size=8) for x in (k, k[..., :16, :]))
        assert torch.equal(codes(whole), part.codes)
    assert torch.equal(kv.fake_quantize(v, 4, "channel", group_size=16)[..., 16:, :], v[..., 16:, :])


def test_an_outlier_channel_of_keys_wants_a_scale_of_its_own():
    _, k, _ = tensors(1, 32)
    k[..., 3] += 20
    rest = [c for c in range(8) if c != 3]
    errors = {per: (kv.fake_quantize(k, 4, per, group_size=8) - k)[..., rest].square().mean() for per in kv.PER}
    assert errors["channel"] < errors["token"] / 10


def test_bytes_are_counted_with_scales_and_zeros():
    k = torch.randn(1, 3, 512, 64).bfloat16()
    long, short = (artifact.size({"k": kv.quantize(x, 4, "channel")}) for x in (k, k[:, :, :256]))
    assert abs((long - short) * 8 / (k.numel() / 2) - (4 + (16 + 4) / 32)) < 0.01


# --- a model ----------------------------------------------------------------------------------------------------------


def logits(model, ids: Tensor, lengths: list[int]) -> Tensor:
    """Of pieces of the text of these lengths, one after the other, with a cache."""
    from transformers import DynamicCache

    cache, parts = DynamicCache(), []
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.no_grad():
        for piece in ids.split(lengths, 1):
            parts.append(model(piece, **{name: cache}).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_a_text_in_one_pass_is_the_text_token_by_token(name):
    model = families.family(name).double()
    ids = torch.randint(3, families.VOCABULARY, (1, 23), generator=torch.Generator().manual_seed(0))
    with kv.quantized(KVFormat(2, 2, group_size=8, window=4)), torch.no_grad():
        whole = model(ids).logits
        assert torch.allclose(whole, logits(model, ids, [1] * 23), atol=1e-5)
        assert torch.allclose(whole, logits(model, ids, [9, 1, 13]), atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(whole, model(ids).logits, atol=1e-2)


def test_a_window_over_all_and_eight_bits_change_nothing_or_little():
    model = families.family("llama").double()
    ids = torch.randint(3, families.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        results = {}
        for bits, window in ((2, 20), (8, 0), (4, 0), (2, 0)):
            with kv.quantized(KVFormat(bits, bits, group_size=4, window=window)):
                results[bits, window] = float((model(ids).logits - expected).abs().max())
    assert results[2, 20] < 1e-5 < results[8, 0] < results[4, 0] < results[2, 0]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_that_reads_no_quantized_cache_is_told():
    """Else its perplexity would be that of the model as it was."""
    model = families._build("LlamaForCausalLM", **families.LLAMA, attn_implementation="eager")().eval()

    @kv.quantized(KVFormat())
    def run(model: nn.Module, name: str) -> None:
        model(**families.inputs(name))

    check_refusal("attn_implementation", lambda: run(model, "llama"))
    check_refusal("not causal", lambda: run(families.family("vit"), "vit"))


def test_scores_beyond_float16_are_what_they_are():
    """q k goes to some 100,000 before it is scaled."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, 64, generator=draw) for _ in "qkv")
    q, k, v = (200 * q).half(), (50 * k).half(), v.half()
    plain = KVFormat(None, None)
    y = kv.attention(q, k, v, plain)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert y.isfinite().all() and float((y.double() - expected).abs().max()) < 1e-2


X, Q = torch.randn(1, 2, 32, 8), torch.randn(1, 4, 32, 8)
REFUSALS: Refusals = {
    "key_bits is 1": lambda: KVFormat(key_bits=1),
    "value_bits is 16": lambda: KVFormat(value_bits=16),
    "way to share a scale 'head'": lambda: KVFormat(keys_per="head"),
    "group_size is 0, but": lambda: KVFormat(group_size=0),
    "window is -1": lambda: KVFormat(window=-1),
    "divisor of 20": lambda: kv.quantize(torch.randn(1, 1, 20, 8), 4, "channel", group_size=8),
    "key_bits is '4'": lambda: KVFormat(key_bits="4"),
    "value_bits is 4.0": lambda: KVFormat(value_bits=4.0),
    "way to share a scale ['token']": lambda: KVFormat(values_per=["token"]),
    "way to share a scale None": lambda: KVFormat(keys_per=None),
    "group_size is None": lambda: KVFormat(group_size=None),
    "window is 1.5": lambda: KVFormat(window=1.5),
    "x is a list": lambda: kv.quantize([1.0], 4, "token"),
    "x is torch.int64": lambda: kv.quantize(X.long(), 4, "token"),
    "x has shape [8]": lambda: kv.quantize(X[0, 0, 0], 4, "token", group_size=8),
    "x is on the meta device": lambda: kv.quantize(X.to("meta"), 4, "token", group_size=8),
    "bits is '4'": lambda: kv.quantize(X, "4", "token", group_size=8),
    "bits is 9": lambda: kv.fake_quantize(X, 9, "token", group_size=8),
    "group_size is 0": lambda: kv.fake_quantize(X, 4, "channel", group_size=0),
    "group_size is 'a'": lambda: kv.fake_quantize(X, 4, "channel", group_size="a"),
    "no way to share a scale 'head'": lambda: kv.fake_quantize(X, 4, "head"),
    "x is None": lambda: kv.fake_quantize(None, 4, "token"),
    "form is a NoneType": lambda: kv.attention(Q, X, X, None),
    "q is a list": lambda: kv.attention([Q], X, X, KVFormat()),
    "k torch.float64 on cpu": lambda: kv.attention(Q, X.double(), X, KVFormat()),
    "v [1, 2, 31, 8]": lambda: kv.attention(Q, X, X[:, :, :31], KVFormat()),
    "3 query heads do not fit 2": lambda: kv.attention(Q[:, :3], X, X, KVFormat()),
    "There are 32 queries and 8 tokens": lambda: kv.attention(Q, X[:, :, :8], X[:, :, :8], KVFormat()),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
