"""Keys and values of a cache in few bits: K per channel, V per token, and a window of recent tokens as they are.

KIVI (Liu et al. 2024, arXiv:2402.02750): some channels of K are outliers in all tokens, so K gets a scale for each
channel over a group of tokens; V has none, and gets a scale for each token over a group of channels. One forward pass
over a text reads no cache, so that a quantized one leaves its perplexity as it was; `attention` computes what a decoder
reads that writes token after token, in one pass. Storage in place of a tensor is the cache's business.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from labkit.quantization.affine import Quantized


def quantize(x: Tensor, bits: int, per: str, *, group_size: int = 32) -> Quantized:
    """Keys or values [..., T, D] as codes of `bits` (2 to 8) on asymmetric grids.

    per: "token": a scale for each token and group of channels, codes [..., T, D]. "channel": a scale for each channel
        and group of tokens, codes [..., D, T]: tokens run along the last dimension, as groups do.
    group_size: a divisor of D ("token") or of T ("channel").

    Scales have x's dtype, so that `artifact.size` counts 16 bits each for a bfloat16 cache, and `bits` for each zero.
    """


def fake_quantize(x: Tensor, bits: int, per: str, *, group_size: int = 32) -> Tensor:
    """SIMULATED: x [..., T, D] as `quantize` and back gives it; the tokens after the last whole group stay."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bits: int = 4,
    keys: str = "channel",
    values: str = "token",
    group_size: int = 32,
    window: int = 32,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """SIMULATED: causal attention [B, H, Q, D] in which each query reads the cache that it would meet in a decoder.

    q [B, H, Q, D], k and v [B, Hkv, T, D]; the last query belongs to the last token. The query at token t reads the
    tokens after t - window as they are, and of those before it the whole groups as quantized (per "token": all).
    mask: added to the scores, or True where a key may be read, [..., Q, T]; causality need not be in it.
    """


@contextmanager
def quantized(
    *, bits: int = 4, keys: str = "channel", values: str = "token", group_size: int = 32, window: int = 32
) -> Iterator[None]:
    """SIMULATED: inside, every F.scaled_dot_product_attention with a causal mask is `attention` with these settings.

    So a model of transformers with attn_implementation="sdpa" (the default) reads a quantized cache, in a decoder's
    steps and in one pass over a text alike. Keys come after RoPE, as they are cached. Without padding.
    """
    yield
