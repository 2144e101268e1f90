"""Attention in one kernel: a program takes a block of queries past all blocks of keys, with an online softmax.

Milakov & Gimelshein 2018 (arXiv:1805.02867, section 3); FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithm 1).
"""

import math

import torch
from torch import Tensor

from labkit.arguments import check_alike, check_shapes
from labkit.errors import InputError
from labkit.triton_kernels import MISSING, operand

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise InputError(MISSING) from error

QUERIES, KEYS = 64, 64  # in a block


@triton.jit
def attend(
    q, k, v, out,  # addresses of the tensors, of heads [queries, width] and [keys, width]
    queries, keys, width,
    factor,  # of a score: exp(score) = 2^(factor score)
    CAUSAL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    WIDTH: tl.constexpr,  # the next power of two of the width
    OPERAND: tl.constexpr,  # type of the factors of a product
):  # fmt: skip
    # A program computes one block of queries of one head.
    block, head = tl.program_id(0), tl.program_id(1)
    query, column = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    place_q = (head * queries + query[:, None]) * width + column[None, :]
    is_stored_q = (query[:, None] < queries) & (column[None, :] < width)
    q_block = tl.load(q + place_q, mask=is_stored_q, other=0).to(OPERAND)  # [QUERIES, WIDTH]
    # Of the keys so far: the largest score m, the sum l of 2^(score - m), and o, the values weighted by these.
    m = tl.full((QUERIES,), float("-inf"), tl.float32)
    l = tl.zeros((QUERIES,), tl.float32)  # noqa: E741
    o = tl.zeros((QUERIES, WIDTH), tl.float32)
    end = keys
    if CAUSAL:  # the keys behind the last query of the block are skipped
        end = tl.minimum(keys, (block + 1) * QUERIES + keys - queries)
    for start in range(0, end, KEYS):
        key = start + tl.arange(0, KEYS)
        place = (head * keys + key[:, None]) * width + column[None, :]
        is_stored = (key[:, None] < keys) & (column[None, :] < width)
        k_block = tl.load(k + place, mask=is_stored, other=0)  # [KEYS, WIDTH]
        v_block = tl.load(v + place, mask=is_stored, other=0)
        scores = tl.dot(q_block, tl.trans(k_block.to(OPERAND)), input_precision="ieee") * factor
        is_read = key[None, :] < keys
        if CAUSAL:
            is_read = is_read & (key[None, :] <= query[:, None] + keys - queries)
        scores = tl.where(is_read, scores, float("-inf"))  # [QUERIES, KEYS]
        # Measure old sums against the new maximum; before the first block m is -inf, and 2^-inf is 0.
        m_new = tl.maximum(m, tl.max(scores, 1))
        weights = tl.exp2(scores - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        l = l * shrink + tl.sum(weights, 1)  # noqa: E741
        weights = weights.to(v.dtype.element_ty).to(OPERAND)
        o = o * shrink[:, None] + tl.dot(weights, v_block.to(OPERAND), input_precision="ieee")
        m = m_new
    tl.store(out + place_q, (o / l[:, None]).to(out.dtype.element_ty), mask=is_stored_q)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v for each head, without gradients.

    q [H, Q, D], k and v [H, K, D]: float32, bfloat16 or float16 on one device.
    causal: the last query belongs to the last key, so query i reads the keys up to i + K - Q, and Q <= K.
    Returns [H, Q, D] in the dtype of q. Scores and sums are float32; the weights of a block are rounded to the dtype of
    v before they meet the values. Raises InputError for tensors that do not fit together.
    """
    check_alike(q=q, k=k, v=v)
    sizes = check_shapes(q=(q, "H Q D"), k=(k, "H K D"), v=(v, "H K D"))
    if causal and sizes["Q"] > sizes["K"]:
        raise InputError(f"{sizes['Q']} queries have only {sizes['K']} keys: give causal attention a key per query.")
    return launch(q, k, v, causal, math.log2(math.e) / math.sqrt(sizes["D"]))


def launch(q: Tensor, k: Tensor, v: Tensor, causal: bool, factor: float) -> Tensor:
    """Run the kernel for all blocks of queries: softmax of base 2 with the exponents factor q k^T, times v."""
    heads, queries, width = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    attend[(triton.cdiv(queries, QUERIES), heads)](
        q.contiguous(), k.contiguous(), v.contiguous(), out, queries, k.shape[1], width, factor,
        CAUSAL=causal, QUERIES=QUERIES, KEYS=KEYS, WIDTH=max(16, triton.next_power_of_2(width)),
        OPERAND=operand(q.dtype),
    )  # fmt: skip
    return out
