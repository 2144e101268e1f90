"""Multi-head latent attention: all heads share one small vector a token, from which their keys and values come.

DeepSeek-V2 (arXiv:2405.04434), section 2.1: C numbers a token (the latent) and R more (a key with RoPE that all heads
share) are cached in place of 2 H D. `expanded` and `absorbed` are the same function: (q Uk) c = q (Uk c).
"""

import torch
from torch import Tensor

from labkit.arguments import check_alike, check_shapes, check_tensor
from labkit.attention import blockwise


def expanded(q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up_k: Tensor, up_v: Tensor) -> Tensor:
    """Causal attention [B, H, Q, Dv] with keys and values made from the latents, equations 10 to 19 of the paper.

    q [B, H, Q, D] and q_rope [B, H, Q, R]: the parts of a query without and with RoPE.
    latent [B, K, C], k_rope [B, K, R]: what is cached. up_k [H, D, C], up_v [H, Dv, C]. R is 0 without RoPE.
    The last query belongs to the last key. Making the keys and values takes 2 B H K C (D + Dv) FLOPs at every call.
    """
    _check(q, q_rope, latent, k_rope, up_k, up_v)
    keys = latent[:, None] @ up_k.mT  # [B, H, K, D]
    shared = k_rope[:, None].expand(*keys.shape[:3], -1)
    values = latent[:, None] @ up_v.mT  # [B, H, K, Dv]
    return blockwise.attention(torch.cat([q, q_rope], -1), torch.cat([keys, shared], -1), values, causal=True)


def absorbed(q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up_k: Tensor, up_v: Tensor) -> Tensor:
    """`expanded` without its keys and values: up_k goes into the query, up_v into the output (end of section 2.1.2).

    All heads read one key [C + R] and one value [C] a token: a score takes C + R multiply-adds and not D + R, so that
    many queries (a prompt) cost more, and a few (a decode step), which save the making of all keys, far less.
    """
    _check(q, q_rope, latent, k_rope, up_k, up_v)
    width, cached = q.shape[-1] + q_rope.shape[-1], torch.cat([latent, k_rope], -1)[:, None]  # [B, 1, K, C + R]
    queries = torch.cat([q @ up_k, q_rope], -1) * (cached.shape[-1] / width) ** 0.5  # scores over sqrt(D + R)
    return blockwise.attention(queries, cached, latent[:, None], causal=True) @ up_v.mT


def _check(q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up_k: Tensor, up_v: Tensor) -> None:
    for name, part in {"q_rope": q_rope, "k_rope": k_rope}.items():
        check_tensor(part, name)
    parts = {"q": (q, "B H Q D"), "latent": (latent, "B K C"), "up_k": (up_k, "H D C"), "up_v": (up_v, "H Dv C")}
    if q_rope.numel() or k_rope.numel():  # a model without RoPE has R = 0
        parts |= {"q_rope": (q_rope, "B H Q R"), "k_rope": (k_rope, "B K R")}
    check_alike(**{name: x for name, (x, _) in parts.items()})
    check_shapes(**parts)
