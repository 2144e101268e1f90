"""Multi-head latent attention: keys and values of all heads come from a single small vector per token.

DeepSeek-V2 (arXiv:2405.04434), section 2.1: for each token, C numbers (the latent) and R more (a key with RoPE, shared
by all heads) are cached in place of 2 H D. `expanded` and `absorbed` are the same function: (q Uk) c = q (Uk c).
"""

import torch
from torch import Tensor

from labkit.arguments import check_alike, check_shapes, check_tensor
from labkit.attention import blockwise


def expanded(
    q: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    up_k: Tensor,
    up_v: Tensor,
) -> Tensor:
    """Compute causal attention, [B, H, Q, Dv], with keys and values made from the latents: equations 10 to 19.

    q [B, H, Q, D] and q_rope [B, H, Q, R]: the parts of a query without and with RoPE.
    latent [B, K, C], k_rope [B, K, R]: the cache. R is 0 without RoPE.
    up_k [H, D, C], up_v [H, Dv, C]: matrices from a latent to the key and the value of a head.
    The last query belongs to the last key. Making the keys and values takes 2 B H K C (D + Dv) FLOPs at every call.
    """
    _check(q, q_rope, latent, k_rope, up_k, up_v)
    latents = latent[:, None]  # [B, 1, K, C]: the same for every head
    keys = latents @ up_k.mT  # [B, H, K, D]
    values = latents @ up_v.mT  # [B, H, K, Dv]
    batch, heads, tokens, _ = keys.shape
    shared = k_rope[:, None].expand(batch, heads, tokens, -1)
    whole_queries = torch.cat([q, q_rope], -1)
    whole_keys = torch.cat([keys, shared], -1)
    return blockwise.attention(whole_queries, whole_keys, values, causal=True)


def absorbed(
    q: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    up_k: Tensor,
    up_v: Tensor,
) -> Tensor:
    """Compute `expanded` without its keys and values: end of section 2.1.2. The arguments are those of `expanded`.

    up_k goes into the query, up_v into the output. All heads read a single key [C + R] and a single value [C] per
    token: a score takes C + R multiply-adds and not D + R. So many queries (a prompt) cost more; a few queries (a
    decode step) save the making of all keys and cost far less.
    """
    _check(q, q_rope, latent, k_rope, up_k, up_v)
    cached = torch.cat([latent, k_rope], -1)
    keys = cached[:, None]  # [B, 1, K, C + R]
    values = latent[:, None]
    queries = torch.cat([q @ up_k, q_rope], -1)
    # `attention` divides by sqrt(C + R), the width of these keys; the scores of `expanded` are over sqrt(D + R)
    width = q.shape[-1] + q_rope.shape[-1]
    scale = (keys.shape[-1] / width) ** 0.5
    mean_latents = blockwise.attention(queries * scale, keys, values, causal=True)
    return mean_latents @ up_v.mT


def _check(
    q: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    up_k: Tensor,
    up_v: Tensor,
) -> None:
    check_tensor(q_rope, "q_rope")
    check_tensor(k_rope, "k_rope")
    tensors = {"q": q, "latent": latent, "up_k": up_k, "up_v": up_v}
    dimensions = {"q": "B H Q D", "latent": "B K C", "up_k": "H D C", "up_v": "H Dv C"}
    if q_rope.numel() or k_rope.numel():  # a model without RoPE has R = 0
        tensors |= {"q_rope": q_rope, "k_rope": k_rope}
        dimensions |= {"q_rope": "B H Q R", "k_rope": "B K R"}
    check_alike(**tensors)
    named = {name: (x, dimensions[name]) for name, x in tensors.items()}
    check_shapes(**named)
