"""Exact attention in blocks: the softmax is assembled from blocks of keys, so memory never holds all [Q, K] scores.

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
    """Attention over some of the keys: the largest score, and sums of exponentials relative to the largest score.

    peak [..., Q, 1]: max of the scores s; the least finite number where no key may be read.
    total [..., Q, 1]: sum of exp(s - peak); 0 where no key may be read.
    output [..., Q, D]: sum of exp(s - peak) v.
    All in float32, or float64 for float64 inputs.
    """

    peak: Tensor
    total: Tensor
    output: Tensor


def partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor | None = None,
    *,
    buffer: Tensor | None = None,
) -> Partial:
    """Attend to a block of keys.

    q [..., Q, D]: queries, already scaled. k [..., K, D], v [..., K, Dv]: keys and values of the block.
    hidden: True where a key may not be read, broadcast against [..., Q, K]. A row may be hidden altogether.
    buffer: memory for the scores, at least Q K numbers for each batch and head, in the dtype `working(q.dtype)`.
        Reused memory spares a CPU the page faults of new memory, which take as long as the product.
    """
    dtype = working(q.dtype)
    values = v.to(dtype)
    place = None
    if buffer is not None:
        shape = (*q.shape[:-1], k.shape[-2])
        place = buffer[: math.prod(shape)].view(shape)
    scores = torch.matmul(q.to(dtype), k.to(dtype).mT, out=place)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    least = torch.finfo(scores.dtype).min  # instead of -inf: -inf - -inf would be NaN
    peak = scores.amax(-1, keepdim=True).clamp_(min=least)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    output = weights.to(dtype) @ values
    return Partial(peak, total, output.to(scores.dtype))


def working(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the products for inputs of `dtype`: float32 for float16, else `dtype`.

    A score, or a sum of values not yet divided, can exceed float16's largest number, 65504.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def merge(a: Partial, b: Partial) -> Partial:
    """Combine attention over two sets of keys into attention over the union.

    Associative and commutative, so blocks may come in any order. Milakov & Gimelshein 2018, equation 4:
    peak = max(peak_a, peak_b), and each sum times exp(its peak - peak).
    """
    peak = torch.maximum(a.peak, b.peak)
    scale_a = (a.peak - peak).exp_()
    scale_b = (b.peak - peak).exp_()
    total = a.total * scale_a + b.total * scale_b
    output = (a.output * scale_a).addcmul_(b.output, scale_b)
    return Partial(peak, total, output)


@torch.no_grad()
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, block: int = 256) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v, [B, H, Q, Dv], in the dtype of q, without gradients.

    q [B, H, Q, D], k [B, Hkv, K, D], v [B, Hkv, K, Dv]; H is a multiple of Hkv, and query heads h with the same
        h // (H / Hkv) read the same keys, which are not repeated.
    causal: the last query belongs to the last key, so query i reads the keys up to i + K - Q. A query without any key
        (Q > K) gives 0.
    block: number of queries and of keys in a block; best where a block of scores stays in a CPU cache.

    Beside the result, memory holds one block of scores for each head, B H block^2. Causal blocks beyond the last key
    that a block of queries reads are skipped.
    Errors, with u half the machine epsilon of q's dtype, A the largest sum_d |q_d k_d| / sqrt(D) and n the number of
    blocks of keys: at most u max|v| (2 (D + 6) A + 2 K + 8 n + 8) to first order. A score is off by (D + 2) u A (its
    products, their sum and the scale), s - peak and the changes of the peak by 2 u A each, every exp by 2 u, every
    product and sum by u; the softmax doubles the relative error of a weight. Measured errors are far smaller.
    float16 is multiplied in float32, because scores and sums of values can exceed its range.
    Raises InputError for dtypes or shapes that do not fit together and a block that is no whole number from 1 on.
    """
    check_whole(block, "block")
    check_alike(q=q, k=k, v=v)
    check_shapes(q=(q, "B H Q D"), k=(k, "B Hkv K D"), v=(v, "B Hkv K Dv"))
    batch, heads, queries, width = q.shape
    _, groups, keys, value_width = v.shape
    check_groups(heads, groups)
    group_size = heads // groups
    scaled = q * width**-0.5
    by_group = scaled.unflatten(1, (groups, group_size))  # [B, Hkv, H / Hkv, Q, D]
    result = q.new_empty(batch, groups, group_size, queries, value_width)
    scores_of_a_head = min(block, queries) * min(block, keys)
    buffer = q.new_empty(batch * heads * scores_of_a_head, dtype=working(q.dtype))
    for start in range(0, queries, block):
        end = min(start + block, queries)
        rows = by_group[..., start:end, :].flatten(2, 3)  # [B, Hkv, rows, D]: the heads of a group share a product
        first_reads = keys - queries + start if causal else None
        state = _over_blocks_of_keys(rows, k, v, group_size, block, first_reads, buffer)
        total = state.total.clamp_(min=1)  # the largest weight is 1, so less is a row without keys
        mean = state.output / total
        result[..., start:end, :] = mean.unflatten(2, (group_size, -1))
    return result.flatten(1, 2)


def _over_blocks_of_keys(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    group_size: int,
    block: int,
    first_reads: int | None,
    buffer: Tensor,
) -> Partial:
    """Attend from a block of queries to the keys of all blocks, and merge the results.

    rows [B, Hkv, group_size Q, D]: the block's queries, for each of the `group_size` heads of a group in turn.
    first_reads: the last key that the block's first query reads, and query i reads i keys more; None: all keys.
    """
    queries = rows.shape[-2] // group_size
    keys = k.shape[-2]
    end = keys
    if first_reads is not None:
        end = max(first_reads + queries, 1)
    state = None
    for low in range(0, end, block):
        high = min(low + block, keys)
        hidden = None
        if first_reads is not None and high - 1 > first_reads:
            hidden = later(queries, first_reads - low, high - low, rows.device)
            hidden = hidden.repeat(group_size, 1)
        block_keys = k[..., low:high, :]
        block_values = v[..., low:high, :]
        new = partial(rows, block_keys, block_values, hidden, buffer=buffer)
        state = new if state is None else merge(state, new)
    return state


def later(queries: int, first: int, keys: int, device: torch.device) -> Tensor:
    """Return a mask [queries, keys], True where key > first + query: the keys that a causal query may not read."""
    everywhere = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return everywhere.triu_(first + 1)
