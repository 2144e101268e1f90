"""Keys and values of a cache in few bits: K per channel, V per token, and a window of recent tokens as they are.

KIVI (Liu et al. 2024, arXiv:2402.02750): some channels of K are outliers in all tokens, so K gets a scale for each
channel over a group of tokens; V has none, and gets a scale for each token over a group of channels. One forward pass
over a text reads no cache, so that a quantized one leaves its perplexity as it was; `attention` computes in one pass
what a decoder reads that writes token after token. What holds the codes is a cache's business.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from labkit.arguments import check_alike, check_floats, check_groups, check_shapes
from labkit.errors import InputError, check_choice, check_whole
from labkit.quantization import affine
from labkit.quantization.affine import Quantized

PER = ("token", "channel")


@dataclass(frozen=True)
class KVFormat:
    """How a cache is stored. The defaults are KIVI's but for the window, which is never shorter than `window` here.

    key_bits, value_bits: 2 to 8; None: as they are.
    keys_per, values_per: "token" or "channel", see `quantize`.
    group_size: of the tokens of a channel, or of the channels of a token, that share a scale.
    window: so many tokens, that of the query among them, are read as they are.
    """

    key_bits: int | None = 4
    value_bits: int | None = 4
    keys_per: str = "channel"
    values_per: str = "token"
    group_size: int = 32
    window: int = 32

    def __post_init__(self) -> None:
        for name, bits in {"key_bits": self.key_bits, "value_bits": self.value_bits}.items():
            if bits is not None:
                check_whole(bits, name, 2, 8)
        check_choice(self.keys_per, PER, "way to share a scale")
        check_choice(self.values_per, PER, "way to share a scale")
        check_whole(self.group_size, "group_size")
        check_whole(self.window, "window", 0)


def quantize(x: Tensor, bits: int, per: str, *, group_size: int = 32) -> Quantized:
    """Keys or values [..., T, D] as codes of `bits` (2 to 8) on asymmetric grids.

    per: "token": a scale for each token and group of channels, codes [..., T, D]. "channel": a scale for each channel
        and group of tokens, codes [..., D, T], for groups run along the last dimension.
    group_size: a divisor of D ("token") or of T ("channel").

    A group's codes depend on nothing else, so that a cache that grows never changes them. Scales have x's dtype:
    `artifact.size` counts 16 bits and those of the zero for each group of a bfloat16 cache.
    """
    _check(x, per)
    return affine.quantize(x.mT if per == "channel" else x, bits, symmetric=False, group_size=group_size)


def fake_quantize(x: Tensor, bits: int | None, per: str, *, group_size: int = 32) -> Tensor:
    """SIMULATED: x [..., T, D] as `quantize` and back gives it; the tokens after the last whole group of T stay."""
    _check(x, per)
    check_whole(group_size, "group_size")
    whole = x.shape[-2] // group_size * group_size if per == "channel" else x.shape[-2]
    if bits is None or not whole:
        return x
    points = quantize(x[..., :whole, :], bits, per, group_size=group_size).dequantize()
    return torch.cat([points.mT if per == "channel" else points, x[..., whole:, :]], -2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, form: KVFormat, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """SIMULATED: causal attention [B, H, Q, D] in which each query reads the cache that it would meet in a decoder.

    q [B, H, Q, D], k and v [B, Hkv, T, D]; the last query belongs to the last token. The query of token t reads the
    tokens after t - window as they are, and those before as quantized; per "channel", only whole groups of them are.
    mask: added to the scores, or True where a key may be read, [..., Q, T]; [..., 1, T] is for queries of the last
        token all. Causality need not be in it. scale: of the scores; None: 1 / sqrt(D).
    """
    if not isinstance(form, KVFormat):
        raise InputError(f"form is a {type(form).__name__}, but it must be a KVFormat: give KVFormat() or another.")
    check_alike(q=q, k=k, v=v)
    sizes = check_shapes(q=(q, "B H Q D"), k=(k, "B Hkv T D"), v=(v, "B Hkv T Dv"))
    check_groups(sizes["H"], sizes["Hkv"])
    if sizes["Q"] > sizes["T"]:
        raise InputError(f"There are {sizes['Q']} queries and {sizes['T']} tokens, but each query belongs to a token.")
    queries, tokens = q.shape[-2] if mask is None else mask.shape[-2], k.shape[-2]
    place = torch.arange(tokens, device=q.device)
    token = place[tokens - queries :, None]  # of each query

    def recent(per: str) -> Tensor:  # [Q, T]
        stored = (token + 1 - form.window).clamp(min=0)
        return place >= (stored // form.group_size * form.group_size if per == "channel" else stored)

    stored_k = fake_quantize(k, form.key_bits, form.keys_per, group_size=form.group_size)
    stored_v = fake_quantize(v, form.value_bits, form.values_per, group_size=form.group_size)
    repeats = q.shape[1] // k.shape[1]
    k, v, stored_k, stored_v = (x.repeat_interleave(repeats, 1) for x in (k, v, stored_k, stored_v))
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, stored_k)]  # float16 ends at 65504
    scores = torch.where(recent(form.keys_per), wide[0] @ wide[1].mT, wide[0] @ wide[2].mT)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = place <= token
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        scores = scores + mask
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).to(v.dtype)
    as_it_is = recent(form.values_per)
    return (weights * as_it_is) @ v + (weights * ~as_it_is) @ stored_v


def _check(x: Tensor, per: str) -> None:
    check_choice(per, PER, "way to share a scale")
    check_floats(x, "x")
    if x.dim() < 2:
        raise InputError(f"x has shape {list(x.shape)}, but keys and values are [..., T, D]: give tokens and channels.")


@contextmanager
def quantized(form: KVFormat) -> Iterator[None]:
    """SIMULATED: inside `with quantized(form):` each causal F.scaled_dot_product_attention is `attention`.

    So a decoder of transformers (attn_implementation "sdpa", the default) reads a quantized cache, in one pass over a
    text as in a decoder's steps, its keys as they are cached, after RoPE. For texts without padding. InputError if
    nothing was read, as of a model with another attention, or if the attention is not causal.
    """
    with _QuantizedReads(form) as mode:
        yield
    if not mode.calls:
        raise InputError(
            "No key or value was quantized, for F.scaled_dot_product_attention was not called: run a model with "
            'attn_implementation="sdpa".'
        )


class _QuantizedReads(TorchFunctionMode):
    def __init__(self, form: KVFormat) -> None:
        super().__init__()
        self.form, self.calls = form, 0

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        run = self._attend if function is F.scaled_dot_product_attention else function
        return run(*args, **(kwargs or {}))

    def _attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
        if is_causal:  # aligned with the first key: what lies beyond as many as there are queries is read by none
            k, v = k[..., : q.shape[-2], :], v[..., : q.shape[-2], :]
        elif attn_mask is None and q.shape[-2] > 1:
            raise InputError("This attention is not causal, and a cache of keys and values is a decoder's: give one.")
        self.calls += 1
        return attention(q, k, v, self.form, mask=attn_mask, scale=scale)
