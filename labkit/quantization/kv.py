"""Keys and values of a cache in few bits: K per channel, V per token, and a window of recent tokens as they are.

KIVI (Liu et al. 2024, arXiv:2402.02750): some channels of K are outliers in all tokens, so K gets a scale for each
channel over a group of tokens; V has no such channels, and gets a scale for each token over a group of channels. A
forward pass over a whole text reads no cache, so that a quantized cache would leave its perplexity unchanged.
`attention` therefore computes in a single pass the reads of a decoder that writes token after token. The classes that
hold codes are in `labkit.attention`.
"""

from collections.abc import Callable, Iterator, Sequence
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
    """The format of a cache. The defaults are KIVI's but for the window, which is never shorter than `window` here.

    key_bits, value_bits: widths of the codes, 2 to 8; None: not quantized.
    keys_per, values_per: "token" or "channel", see `quantize`.
    group_size: number of tokens of a channel, or of channels of a token, that share a scale.
    window: number of recent tokens, the query's token among them, that are read without quantization.
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


def quantize(
    x: Tensor,
    bits: int,
    per: str,
    *,
    group_size: int = 32,
) -> Quantized:
    """Quantize keys or values on asymmetric grids.

    x: floating point [..., T, D].
    bits: width of a code, 2 to 8.
    per: "token": a scale for each token and group of channels, codes [..., T, D]. "channel": a scale for each channel
        and group of tokens, codes [..., D, T], for groups run along the last dimension.
    group_size: a divisor of D ("token") or of T ("channel").

    The codes of a group depend on no other group, so that they stay when a cache grows. Scales have x's dtype: for each
    group of a bfloat16 cache `artifact.size` counts 16 bits and the bits of the zero.
    """
    _check(x, per)
    return affine.quantize(x.mT if per == "channel" else x, bits, symmetric=False, group_size=group_size)


def fake_quantize(
    x: Tensor,
    bits: int | None,
    per: str,
    *,
    group_size: int = 32,
) -> Tensor:
    """SIMULATED: return x [..., T, D] after `quantize` and back; tokens after the last whole group stay.

    bits: width of a code, 2 to 8; None returns x.
    per, group_size: as for `quantize`.
    """
    _check(x, per)
    check_whole(group_size, "group_size")
    tokens = x.shape[-2]
    whole = _whole_groups(tokens, group_size) if per == "channel" else tokens
    if bits is None or not whole:
        return x
    points = quantize(x[..., :whole, :], bits, per, group_size=group_size).dequantize()
    if per == "channel":
        points = points.mT
    return torch.cat([points, x[..., whole:, :]], -2)


def _whole_groups(tokens: int | Tensor, group_size: int) -> int | Tensor:
    """Return the number of tokens that lie in whole groups."""
    return tokens // group_size * group_size


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: KVFormat,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """SIMULATED: compute causal attention in which each query reads the cache as a decoder would meet it.

    q: [B, H, Q, D].
    k, v: [B, Hkv, T, D]. The last query belongs to the last token.
    form: the format of the cache. The query of token t reads the tokens after t - window as they are, and the tokens
        before as quantized; per "channel", only whole groups of these are quantized.
    mask: [..., Q, T], added to the scores, or True where a key may be read; with [..., 1, T] all queries belong to the
        last token. Causality need not be in the mask.
    scale: factor of the scores; None: 1 / sqrt(D).

    Returns [B, H, Q, D]. Raises InputError for tensors that do not fit together.
    """
    if not isinstance(form, KVFormat):
        raise InputError(f"form is a {type(form).__name__}, but it must be a KVFormat: give KVFormat() or another.")
    check_alike(q=q, k=k, v=v)
    sizes = check_shapes(q=(q, "B H Q D"), k=(k, "B Hkv T D"), v=(v, "B Hkv T Dv"))
    check_groups(sizes["H"], sizes["Hkv"])
    if sizes["Q"] > sizes["T"]:
        raise InputError(f"There are {sizes['Q']} queries and {sizes['T']} tokens, but each query belongs to a token.")
    repeats = sizes["H"] // sizes["Hkv"]
    stored_k = fake_quantize(k, form.key_bits, form.keys_per, group_size=form.group_size)
    stored_v = fake_quantize(v, form.value_bits, form.values_per, group_size=form.group_size)
    k, v, stored_k, stored_v = (x.repeat_interleave(repeats, 1) for x in (k, v, stored_k, stored_v))
    scale = sizes["D"] ** -0.5 if scale is None else scale
    queries = sizes["Q"] if mask is None else mask.shape[-2]
    key_place = torch.arange(sizes["T"], device=q.device)
    query_place = key_place[sizes["T"] - queries :, None]

    key_is_recent = _is_recent(key_place, query_place, form, form.keys_per)  # [Q, T]
    q_upcast = affine.upcast(q)
    scores = torch.where(key_is_recent, q_upcast @ affine.upcast(k).mT, q_upcast @ affine.upcast(stored_k).mT)
    scores = scores * scale
    allowed = key_place <= query_place
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        scores = scores + mask
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).to(v.dtype)
    value_is_recent = _is_recent(key_place, query_place, form, form.values_per)
    return (weights * value_is_recent) @ v + (weights * ~value_is_recent) @ stored_v


def _is_recent(
    key_place: Tensor,
    query_place: Tensor,
    form: KVFormat,
    per: str,
) -> Tensor:
    """Return True for each token that a query reads as it is: bool [Q, T].

    key_place: [T], query_place: [Q, 1], places in the text.
    per: as for `quantize`.
    """
    quantized_tokens = (query_place + 1 - form.window).clamp(min=0)
    if per == "channel":
        quantized_tokens = _whole_groups(quantized_tokens, form.group_size)
    return key_place >= quantized_tokens


def _check(x: Tensor, per: str) -> None:
    check_choice(per, PER, "way to share a scale")
    check_floats(x, "x")
    if x.dim() < 2:
        raise InputError(f"x has shape {list(x.shape)}, but keys and values are [..., T, D]: give tokens and channels.")


@contextmanager
def quantized(form: KVFormat) -> Iterator[None]:
    """SIMULATED: inside `with quantized(form):` compute each causal F.scaled_dot_product_attention by `attention`.

    So a decoder of transformers (attn_implementation "sdpa", the default) reads a quantized cache, in a single pass
    over a text as in the steps of decoding, with keys as they are cached, after RoPE. For texts without padding.
    Raises InputError if the function was not called, as by a model with another attention, or if the attention is not
    causal.
    """
    with _QuantizedReads(form) as mode:
        yield
    if not mode.calls:
        raise InputError(
            "No key or value was quantized, for F.scaled_dot_product_attention was not called: run a model with "
            'attn_implementation="sdpa".'
        )


class _QuantizedReads(TorchFunctionMode):
    """Replaces F.scaled_dot_product_attention; calls: how often it was called."""

    def __init__(self, form: KVFormat) -> None:
        super().__init__()
        self.form = form
        self.calls = 0

    def __torch_function__(
        self,
        function: Callable,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        run = self._attend if function is F.scaled_dot_product_attention else function
        return run(*args, **(kwargs or {}))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        queries = q.shape[-2]
        if is_causal:  # aligned with the first key, so that no query reads a key beyond the number of queries
            k, v = k[..., :queries, :], v[..., :queries, :]
        elif attn_mask is None and queries > 1:
            raise InputError("This attention is not causal, and a cache of keys and values is a decoder's: give one.")
        self.calls += 1
        return attention(q, k, v, self.form, mask=attn_mask, scale=scale)
