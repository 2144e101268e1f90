"""Exact attention in blocks: the softmax is put together from blocks of keys, so that no [Q, K] scores are in memory.

Online softmax: Milakov & Gimelshein 2018 (arXiv:1805.02867, section 3). Blocks of queries and keys: FlashAttention
(Dao et al. 2022, arXiv:2205.14135, algorithm 1) and FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithm 1).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.arguments import check_alike, check_groups, check_shapes
from labkit.errors import check_whole


class Partial(NamedTuple):
    """Attention over some of the keys: their largest score, and relative to it what the softmax sums up.

    peak [..., Q, 1]: max of the scores s; the least finite number where no key may be read.
    total [..., Q, 1]: sum of exp(s - peak); 0 where no key may be read.
    output [..., Q, D]: sum of exp(s - peak) v.
    All in float32, or float64 for float64 inputs.
    """

    peak: Tensor
    total: Tensor
    output: Tensor


def partial(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None, *, buffer: Tensor | None = None) -> Partial:
    """One block: queries [..., Q, D], already scaled, over keys [..., K, D] and values [..., K, Dv].

    hidden: True where a key may not be read, broadcast against [..., Q, K]. A row may be hidden altogether.
    buffer: memory for the scores, at least so many numbers in q's `working` dtype: to use it again spares a CPU the
        page faults of new memory, which take as long as the product.
    """
    dtype = working(q.dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    shape = *q.shape[:-1], k.shape[-2]
    place = None if buffer is None else buffer[: math.prod(shape)].view(shape)
    scores = torch.matmul(q, k.mT, out=place).to(torch.promote_types(q.dtype, torch.float32))
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)  # -inf - -inf would be NaN
    weights = scores.sub_(peak).exp_()
    return Partial(peak, weights.sum(-1, keepdim=True), (weights.to(v.dtype) @ v).to(scores.dtype))


def working(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products: a score, or a sum of values not yet divided, can be beyond float16's 65504."""
    return torch.float32 if dtype == torch.float16 else dtype


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of a and b together: associative and commutative, so that blocks come in any order.

    Milakov & Gimelshein 2018, equation 4: peak = max(peak_a, peak_b), and each sum times exp(its peak - peak).
    """
    peak = torch.maximum(a.peak, b.peak)
    scale_a, scale_b = (a.peak - peak).exp_(), (b.peak - peak).exp_()
    total = a.total * scale_a + b.total * scale_b
    return Partial(peak, total, (a.output * scale_a).addcmul_(b.output, scale_b))


@torch.no_grad()
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, block: int = 256) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, [B, H, Q, Dv], in the dtype of q, without gradients.

    q [B, H, Q, D], k [B, Hkv, K, D], v [B, Hkv, K, Dv]; H is a multiple of Hkv, and query heads h with the same
        h // (H / Hkv) read the same keys, which are not repeated.
    causal: the last query belongs to the last key, so query i reads the keys up to i + K - Q. A query without any key
        (Q > K) gives 0.
    block: of queries and of keys. Best is what lets a block of scores stay in a cache.

    Beside the result, memory holds one block of scores for each head, B H block^2. Causal blocks that no query of a
    block reads are skipped.
    Errors, with u half the machine epsilon of q's dtype, A the largest sum_d |q_d k_d| / sqrt(D) and n the number of
    blocks of keys: at most u max|v| (2 (D + 6) A + 2 K + 8 n + 8) to first order. A score is off by (D + 2) u A (its
    products, their sum and the scale), s - peak and the changes of the peak by 2 u A each, every exp by 2 u, every
    product and sum by u; the softmax doubles the relative error of a weight. What is met is far less.
    float16 is multiplied in float32, for scores and sums of values can be beyond its range.
    Raises InputError for dtypes or shapes that do not fit together and a block that is no whole number from 1 on.
    """
    check_whole(block, "block")
    check_alike(q=q, k=k, v=v)
    sizes = check_shapes(q=(q, "B H Q D"), k=(k, "B Hkv K D"), v=(v, "B Hkv K Dv"))
    check_groups(sizes["H"], sizes["Hkv"])
    (batch, heads, queries, width), (_, groups, keys, _) = q.shape, k.shape
    rows = (q * width**-0.5).unflatten(1, (groups, heads // groups))  # [B, Hkv, H / Hkv, Q, D]
    result = q.new_empty(batch, groups, heads // groups, queries, v.shape[-1])
    buffer = q.new_empty(batch * heads * min(block, queries) * min(block, keys), dtype=working(q.dtype))
    for start in range(0, queries, block):
        end = min(start + block, queries)
        part = rows[..., start:end, :].flatten(2, 3)  # [B, Hkv, rows, D]: the heads of a group are rows of one product
        first, last = keys - queries + start, keys - queries + end - 1  # the last keys that these queries read
        state = None
        for low in range(0, max(last + 1, 1) if causal else keys, block):
            high = min(low + block, keys)
            hidden = later(end - start, first - low, high - low, q.device) if causal and high - 1 > first else None
            if hidden is not None:
                hidden = hidden.repeat(heads // groups, 1)
            new = partial(part, k[..., low:high, :], v[..., low:high, :], hidden, buffer=buffer)
            state = new if state is None else merge(state, new)
        mean = state.output / state.total.clamp_(min=1)  # the largest weight is 1, so less is a row without keys
        result[..., start:end, :] = mean.unflatten(2, (heads // groups, -1))
    return result.flatten(1, 2)


def later(queries: int, first: int, keys: int, device: torch.device) -> Tensor:
    """True [queries, keys] where key > first + query: not read by a causal query."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu_(first + 1)
