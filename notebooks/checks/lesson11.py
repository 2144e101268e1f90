"""Checks of lesson 11: a cache, merged blocks of a softmax, guesses.

Each holds the answer against an independent computation: torch's attention over all tokens at once, a softmax over all
keys, laws worked out from the thresholds of a rule.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.lesson.failures import Failures, has_parts

# -------------------------------------------------------------------------------------------------------------- a cache

Parts = tuple[Tensor, Tensor, Tensor]  # queries [B, H, T, D], keys and values [B, Hkv, T, D]
LAYERS = 3


def kept(kind: Callable, failures: Failures) -> None:
    """kind(layers) -> a cache with positions, advance, attend, crop and bytes."""
    for case, batch, sizes, dtype in (
        ("a prompt, then token by token", 1, (5, 1, 1), torch.float32),
        ("two texts at once", 2, (3, 2, 1), torch.float32),
        ("token by token from the first", 1, (1, 1, 1), torch.float64),
        ("numbers of two bytes", 1, (4, 1), torch.bfloat16),
    ):
        with failures.given(steps=case):
            text = _text(0, batch, sum(sizes), dtype)
            cache = kind(LAYERS)
            _read(cache, failures, text, sizes)
            _expect_bytes(cache, failures, text, sum(sizes))
    for case, sizes, length in (
        ("three of six tokens are left", (5, 1), 3),
        ("two of six tokens are left", (4, 2), 2),
        ("one token is forgotten", (4,), 3),
        ("no token is forgotten", (4,), 4),
        ("all tokens are forgotten", (3, 1), 0),
    ):
        with failures.given(crop=case):
            text = _text(0, 1, 9)
            other = [_joined(old, new, length) for old, new in zip(text, _text(10, 1, 9), strict=True)]
            cache = kind(LAYERS)
            _read(cache, failures, text, sizes)
            cache.crop(length)
            failures.need(cache.length == length, "after crop(length) the attribute `length` has to be the new length")
            _expect_bytes(cache, failures, text, length)
            _read(cache, failures, other, (2, 1))
    with failures.given(crop="an empty cache, to 0"):
        cache = kind(LAYERS)
        cache.crop(0)
        failures.close(cache.bytes, 0, "an empty cache has no bytes")
        _read(cache, failures, _text(0, 1, 2), (2,))


def _text(seed: int, batch: int, tokens: int, dtype: torch.dtype = torch.float32) -> list[Parts]:
    """Draw queries, keys and values for each layer."""
    draw = torch.Generator().manual_seed(seed)
    text = []
    for _ in range(LAYERS):
        q = torch.randn(batch, 4, tokens, 8, generator=draw).to(dtype)
        k, v = torch.randn(2, batch, 2, tokens, 8, generator=draw).to(dtype)
        text.append((q, k, v))
    return text


def _joined(old: Parts, new: Parts, length: int) -> Parts:
    """The first `length` tokens of a text, and the rest of another."""
    q, k, v = (torch.cat([a[:, :, :length], b[:, :, length:]], 2) for a, b in zip(old, new, strict=True))
    return q, k, v


def _read(cache: Any, failures: Failures, text: list[Parts], sizes: tuple[int, ...]) -> None:
    """Let a cache read further tokens of a text in steps, and hold each against attention over all tokens at once."""
    for new in sizes:
        start = cache.length
        end = start + new
        cache.positions(new)
        for layer, (q, k, v) in enumerate(text):
            given = q[:, :, start:end], k[:, :, start:end], v[:, :, start:end]
            answer = failures.call(
                cache.attend, layer, *given, changed="attend changed q, k or v; leave them as they are"
            )
            shaped = isinstance(answer, Tensor) and answer.shape == given[0].shape
            failures.need(shaped, "attend has to return what the queries read, of the shape of q")
            so_far = (x[:, :, :end].double() for x in (q, k, v))
            whole = F.scaled_dot_product_attention(*so_far, is_causal=True, enable_gqa=True)
            failures.need(
                torch.allclose(answer.double(), whole[:, :, start:], atol=0.1 if q.dtype == torch.bfloat16 else 1e-4),
                "that is not attention over all tokens that the layer holds, the new ones included",
                detail=f"layer {layer}, {new} new after {start}",
            )
        cache.advance(new)


def _expect_bytes(cache: Any, failures: Failures, text: list[Parts], tokens: int) -> None:
    want = sum(2 * k[:, :, :tokens].numel() * k.element_size() for _, k, _ in text)
    failures.close(cache.bytes, want, "bytes has to count keys and values of all layers, each number with its bytes")


# ------------------------------------------------------------------------------------------------- blocks of a softmax


def merge(fn: Callable, failures: Failures) -> None:
    """merge(a, b) -> (m, l, o) of the keys of both."""
    draw = torch.Generator().manual_seed(0)
    for case, shape, keys, cut, mean, size, empty in (
        ("two blocks of equal size", (5,), 8, 4, 0, 1.0, ""),
        ("one key and many", (2, 3), 9, 1, 0, 2.0, ""),
        ("heads and queries", (2, 4, 6), 10, 7, 0, 1.0, ""),
        ("scores of hundreds", (6,), 8, 3, 0, 400.0, ""),
        ("scores near -5", (6,), 8, 3, -5, 1.0, ""),
        ("scores near -100,000", (6,), 8, 3, -100_000, 1.0, ""),
        ("queries that may read none of the first", (4,), 6, 3, 0, 1.0, "a"),
        ("queries that may read none of the second", (4,), 6, 2, 0, 1.0, "b"),
        ("queries that may read nothing at all", (4,), 6, 3, 0, 1.0, "ab"),
    ):
        scores = mean + size * torch.randn(*shape, keys, dtype=torch.double, generator=draw)
        values = torch.randn(keys, 3, dtype=torch.double, generator=draw)
        if "a" in empty:
            scores[..., :2, :cut] = -torch.inf
        if "b" in empty:
            scores[..., :2, cut:] = -torch.inf
        with failures.given(keys=case):
            _merge(fn, failures, scores, values, cut)


def _triple(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = scores.amax(-1, keepdim=True)
    weights = torch.where(scores > -torch.inf, (scores - m).exp(), 0.0)
    return m, weights.sum(-1, keepdim=True), weights @ values


def _merge(fn: Callable, failures: Failures, scores: Tensor, values: Tensor, cut: int) -> None:
    a = _triple(scores[..., :cut], values[:cut])
    b = _triple(scores[..., cut:], values[cut:])
    answer = failures.call(fn, a, b, changed="your function changed a or b; return new tensors")
    shaped = has_parts(answer, 3) and all(isinstance(x, Tensor) for x in answer)
    shaped = shaped and [x.shape for x in answer] == [x.shape for x in a]
    failures.need(shaped, "return three tensors (m, l, o) of the shapes of those in a")
    m, total, output = answer
    failures.need(not any(bool(x.isnan().any()) for x in answer), "the result holds NaN")
    failures.expect(torch.equal(m, scores.amax(-1, keepdim=True)), "m has to be the largest score of all keys")
    reads = (scores > -torch.inf).any(-1)
    failures.expect(
        not bool(total[~reads].any()) and not bool(output[~reads].any()),
        "where a query may read nothing, l and o have to stay 0",
    )
    failures.close(
        (total.log() + m)[reads],
        scores.logsumexp(-1, keepdim=True)[reads],
        "l is not the sum of exp(s - m) over all keys: each side's sum counts from its own maximum",
        rtol=1e-9,
    )
    failures.close(
        (output / total)[reads],
        (scores[reads].softmax(-1) @ values),
        "o / l is not the attention over all keys: o has to be measured from the new maximum, too",
        rtol=1e-9,
        atol=1e-12,
    )


# ------------------------------------------------------------------------------------------------------------- guesses

LAWS = (  # model's and draft's laws; p / q are multiples of 1 / 16 where the draft has a token
    ("the draft likes other tokens", [3 / 32, 5 / 32, 16 / 32, 8 / 32], [1 / 2, 1 / 4, 1 / 8, 1 / 8]),
    ("the distributions are equal", [1 / 2, 1 / 4, 1 / 4], [1 / 2, 1 / 4, 1 / 4]),
    ("a token that the model never writes", [0.0, 3 / 4, 1 / 4], [1 / 2, 1 / 4, 1 / 4]),
    ("a token that the draft never writes", [1 / 4, 1 / 4, 1 / 2], [1 / 2, 1 / 2, 0.0]),
    ("a draft that is certain", [3 / 8, 1 / 2, 1 / 8], [1.0, 0.0, 0.0]),
    ("a draft that hardly ever draws a token", [127 / 256, 129 / 256], [127 / 128, 1 / 128]),
    ("a draft that likes the likeliest too much", [9 / 16, 4 / 16, 3 / 16], [3 / 4, 1 / 8, 1 / 8]),
)
STEPS = 16


def law(fn: Callable, failures: Failures) -> None:
    """law(rule, p, q, steps) -> the law of the token that comes out, by enumeration."""
    for case, model, draft in LAWS:
        p, q = (torch.tensor(x, dtype=torch.double) for x in (model, draft))
        for steps in (8, 20):
            for name, (rule, want) in _rules(p, q, steps).items():
                with failures.given(laws=case, rule=name, steps=steps):
                    out = failures.call(fn, rule, p, q, steps, changed="your function changed p or q")
                    failures.need(isinstance(out, Tensor) and out.shape == p.shape, "return a tensor of the shape of p")
                    failures.close(
                        out,
                        want,
                        "that is not the distribution: every guess counts with q[guess], and for each all `steps` "
                        "numbers u, from 1/2 over steps on, count alike",
                        rtol=1e-9,
                        atol=1e-12,
                    )


def _rules(p: Tensor, q: Tensor, steps: int) -> dict[str, tuple[Callable, Tensor]]:
    """Rules, each with the law of what comes out, worked out from what it does."""
    eye = torch.eye(len(p), dtype=torch.double)
    last = eye[-1]
    squares = [((i + 0.5) / steps) ** 2 for i in range(steps)]
    mean_square = sum(squares) / steps
    shares = [(guess + 1) * (steps // 4) / steps for guess in range(len(p))]  # of the numbers u below a threshold

    def keeps_some(p: Tensor, q: Tensor, guess: int, u: float) -> Tensor:
        return eye[guess] if u < shares[guess] else last

    def mixes(p: Tensor, q: Tensor, guess: int, u: float) -> Tensor:
        return u**2 * eye[0] + (1 - u**2) * p

    def only_what_is_drawn(p: Tensor, q: Tensor, guess: int, u: float) -> Tensor:
        if q[guess] == 0:
            raise ValueError("this guess is never drawn")
        return eye[guess]

    some = 0
    for probability, share, one_hot in zip(q, shares, eye, strict=True):
        some = some + probability * (share * one_hot + (1 - share) * last)
    return {
        "keeps every guess": (lambda p, q, guess, u: eye[guess], q),
        "never looks at the guess": (lambda p, q, guess, u: p, p),
        "keeps a guess if u is below a threshold": (keeps_some, some),
        "mixes by the square of u": (mixes, mean_square * eye[0] + (1 - mean_square) * p),
        "knows only guesses that are drawn": (only_what_is_drawn, q),
    }


def accept(fn: Callable, failures: Failures) -> None:
    """accept(p, q, guess, u) -> the law of the token that comes out."""
    for case, model, draft in LAWS:
        p, q = (torch.tensor(x, dtype=torch.double) for x in (model, draft))
        with failures.given(laws=case):
            out, certain = torch.zeros_like(p), 0.0
            for guess in [x for x in range(len(q)) if q[x] > 0]:
                for i in range(STEPS):
                    share = float(q[guess]) / STEPS
                    answer = failures.call(fn, p, q, guess, (i + 0.5) / STEPS, changed="your function changed p or q")
                    shaped = isinstance(answer, Tensor) and answer.shape == p.shape and answer.is_floating_point()
                    failures.need(shaped, "return a distribution: a tensor of the shape of p")
                    usual = bool((answer >= 0).all()) and math.isclose(float(answer.sum()), 1, rel_tol=1e-9)
                    failures.need(usual, "what you return is no distribution: numbers from 0 on that sum up to 1")
                    out += share * answer
                    certain += share * bool(answer[guess] == 1)
            failures.close(out, p, "all cases weighed, the token that comes out is not distributed as p", atol=1e-9)
            failures.close(
                certain,
                torch.minimum(p, q).sum(),
                "not as many guesses are kept as could be: sum min(p, q) of them, with all probability on the guess",
                atol=1e-9,
            )
    p = torch.tensor([0.0, 1.0]).double()
    q = torch.tensor([0.5, 0.5]).double()
    with failures.given(laws="a token that the model never writes", u=0):
        answer = fn(p, q, 0, 0.0)
        failures.close(answer, p, "a token with p = 0 is never kept, not even if u is 0")
    with failures.given(laws="the distributions are equal", u=0):
        answer = fn(q, q, 0, 0.0)
        failures.close(answer, torch.tensor([1.0, 0.0]), "where p = q every guess is kept, also if u is 0")


CHECKS = {"11.1": kept, "11.2": merge, "11.3": law, "11.4": accept}

TRIES = {
    "11.1": "4 texts in steps of several sizes, of 2, 4 and 8 bytes a number, and 6 caches that are cropped and go on",
    "11.2": "9 pairs of blocks, among them scores far below zero and queries that may read nothing of one or of both",
    "11.3": f"{len(LAWS)} pairs of distributions with 5 rules each",
    "11.4": f"{len(LAWS)} pairs of distributions with every guess and {STEPS} numbers u",
}
