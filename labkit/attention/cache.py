"""What a decoder keeps of the tokens before: all keys and values, the entries that matter most, or all in few bits.

A cache stores and attends, so that a decoder does not know which one it has: for each step `positions`, then `attend`
for each layer, then `advance`. Pages that several sequences share: `labkit.attention.paged`.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.attention.blockwise import later, working
from labkit.errors import InputError, check_choice, check_whole
from labkit.quantization import kv
from labkit.quantization.affine import Grid, Quantized
from labkit.quantization.kv import KVFormat
from labkit.storage import artifact


class Layout(NamedTuple):
    """What a token adds to a cache: `heads` (of keys, Hkv) vectors of `width` numbers, keys and values, each layer."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of a token."""
        return 2 * self.layers * self.heads * self.width * self.dtype.itemsize


class Cache(Protocol):
    """What a decoder asks of a cache in a step of S new tokens for each of B sequences."""

    def positions(self, new: int) -> Tensor:
        """Positions of the next `new` tokens, [1, S] for all sequences. Raises InputError where there is no room."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [B, Hkv, S, D], after RoPE, and attend causally: q [B, H, S, D] to [B, H, S, D]."""

    def advance(self, new: int) -> None:
        """All layers have stored the `new` tokens."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last S of T tokens: q [B, H, S, D], k and v [B, Hkv, T, D], on torch's kernels.

    The H / Hkv query heads of a group are rows of one product with its keys, which are not repeated.
    """
    new, tokens = q.shape[2], k.shape[2]
    if new == tokens:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    mask = None if new == 1 else ~later(new, tokens - new, tokens, q.device).repeat(q.shape[1] // k.shape[1], 1)
    return ungrouped(F.scaled_dot_product_attention(grouped(q, k.shape[1]), k, v, mask), new)


def grouped(q: Tensor, groups: int) -> Tensor:
    """Heads that read the same keys as rows: [B, H, S, D] to [B, groups, H / groups S, D]."""
    return q.unflatten(1, (groups, -1)).flatten(2, 3)


def ungrouped(y: Tensor, new: int) -> Tensor:
    """`grouped` undone: [B, groups, H / groups S, D] to [B, H, S, D]."""
    return y.unflatten(2, (-1, new)).flatten(1, 2)


class KVCache:
    """Keys and values of all tokens as they are, in memory that is taken once."""

    def __init__(self, layout: Layout, batch: int, capacity: int) -> None:
        """capacity: tokens for which there is room, for each of `batch` sequences of equal length."""
        check_whole(batch, "batch")
        check_whole(capacity, "capacity")
        shape = (layout.layers, batch, layout.heads, capacity, layout.width)
        self.keys, self.values = (torch.empty(shape, dtype=layout.dtype, device=layout.device) for _ in "kv")
        self.length = 0

    @property
    def bytes(self) -> int:
        """Bytes of the tokens stored so far."""
        return 2 * self.keys[..., : self.length, :].numel() * self.keys.itemsize

    def positions(self, new: int) -> Tensor:
        capacity = self.keys.shape[3]
        if self.length + new > capacity:
            raise InputError(
                f"The cache has room for {capacity} tokens and holds {self.length}, so {new} more do not fit: make it "
                "larger, or crop it."
            )
        return torch.arange(self.length, self.length + new, device=self.keys.device)[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start, end = self.length, self.length + k.shape[2]
        self.keys[layer, :, :, start:end] = k
        self.values[layer, :, :, start:end] = v
        return attend(q, self.keys[layer, :, :, :end], self.values[layer, :, :, :end])

    def advance(self, new: int) -> None:
        self.length += new

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on, as when a guess was wrong."""
        check_whole(length, "length", 0, self.length)
        self.length = length


# --- a budget of entries ----------------------------------------------------------------------------------------------

WINDOW = 32  # queries that vote
POOL = 7  # entries side by side that a vote is for


class Policy(NamedTuple):
    """How an evicting cache scores its n entries: what it remembers of them, [B, Hkv, W, n], and the score from that.

    remember(memory, weights, draw): the memory of the n - S entries before, 0 for the S new ones; the attention that
        the entries got from the new queries, [B, Hkv, S, n], summed over the query heads of a group; random numbers.
    score(memory): [B, Hkv, n]; the largest stay.
    """

    remember: Callable[[Tensor, Tensor, torch.Generator], Tensor]
    score: Callable[[Tensor], Tensor] = lambda memory: memory.sum(2)


def _drawn(memory: Tensor, weights: Tensor, draw: torch.Generator) -> Tensor:
    """A random number for each entry, drawn when it is stored."""
    new = weights.shape[2]
    numbers = torch.rand(*memory.shape[:-1], new, generator=draw).to(memory)
    return torch.cat([memory[..., :-new], numbers], -1)


POLICIES = {
    # StreamingLLM (Xiao et al. 2023, arXiv:2309.17453): the sinks and the most recent
    "recent": Policy(lambda memory, weights, _: torch.arange(memory.shape[-1]).to(memory).expand(memory.shape)),
    # the control: what any choice that keeps sinks and recent tokens gives
    "random": Policy(_drawn),
    # H2O (Zhang et al. 2023, arXiv:2306.14048, algorithm 1): attention accumulated over all queries so far
    "attention": Policy(lambda memory, weights, _: memory + weights.sum(2, keepdim=True)),
    # SnapKV (Li et al. 2024, arXiv:2404.14469, section 4): attention from the last queries, pooled over neighbours
    "votes": Policy(
        lambda memory, weights, _: torch.cat([memory, weights], 2)[:, :, -WINDOW:],
        lambda memory: F.max_pool1d(memory.sum(2), POOL, 1, POOL // 2),
    ),
}


class EvictingCache:
    """At most `budget` entries for each layer and KV head; a step reads them and its own tokens, then drops the rest.

    The first `sinks` tokens and the last (budget - sinks) / 2 always stay; which others, the policy says. Keys keep the
    positions that they had, so that distances stay true. The tokens of one step, such as a prompt, read all of each
    other: a prompt given in pieces is another function.
    """

    def __init__(
        self, layout: Layout, batch: int, budget: int, *, policy: str = "recent", sinks: int = 4, seed: int = 0
    ) -> None:
        """policy: one of POLICIES; seed: of "random". Raises InputError for a budget that the sinks fill."""
        check_choice(policy, POLICIES, "eviction policy")
        check_whole(sinks, "sinks", 0)
        check_whole(budget, "budget")
        check_whole(batch, "batch")
        check_whole(seed, "seed", 0)
        if budget <= sinks:
            raise InputError(f"A budget of {budget} entries is filled by {sinks} sinks: make it larger than they are.")
        self.budget, self.sinks, self.policy, self.seen = budget, sinks, POLICIES[policy], 0
        self.draw = torch.Generator().manual_seed(seed)
        empty = torch.empty(batch, layout.heads, 0, layout.width, dtype=layout.dtype, device=layout.device)
        self.keys, self.values = ([empty] * layout.layers for _ in "kv")
        self.memory = [torch.empty(batch, layout.heads, 1, 0, device=layout.device)] * layout.layers

    @property
    def bytes(self) -> int:
        """Bytes of the entries."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def positions(self, new: int) -> Tensor:
        return torch.arange(self.seen, self.seen + new, device=self.keys[0].device)[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups, new = k.shape[1:3]
        k, v = torch.cat([self.keys[layer], k], 2), torch.cat([self.values[layer], v], 2)
        entries = k.shape[2]
        dtype = working(q.dtype)
        scores = grouped(q, groups).to(dtype) @ k.mT.to(dtype) * q.shape[-1] ** -0.5  # [B, Hkv, H / Hkv S, n]
        hidden = later(new, entries - new, entries, q.device).repeat(q.shape[1] // groups, 1)
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1, torch.promote_types(q.dtype, torch.float32))
        result = ungrouped(weights.to(v.dtype) @ v, new)
        by_query = weights.unflatten(2, (-1, new)).sum(2)  # [B, Hkv, S, n]
        memory = self.policy.remember(F.pad(self.memory[layer], (0, new)), by_query, self.draw)
        if entries > self.budget:
            stay = self._stay(self.policy.score(memory))[..., None, :]  # [B, Hkv, 1, budget]
            memory = memory.gather(-1, stay.expand(*memory.shape[:3], -1))
            k, v = (x.gather(2, stay.mT.expand(-1, -1, -1, x.shape[3])) for x in (k, v))
        self.keys[layer], self.values[layer], self.memory[layer] = k, v, memory
        return result

    def _stay(self, score: Tensor) -> Tensor:
        """Indices of the entries that stay, in order of time, [B, Hkv, budget]."""
        score = score.clone()
        score[..., : self.sinks] = torch.inf
        score[..., score.shape[-1] - (self.budget - self.sinks) // 2 :] = torch.inf
        return score.topk(self.budget, -1).indices.sort(-1).values

    def advance(self, new: int) -> None:
        self.seen += new


# --- few bits ---------------------------------------------------------------------------------------------------------


class QuantizedCache:
    """All tokens, those before the last `form.window` as codes: token by token, what `kv.attention` computes.

    form: see `kv.KVFormat`; by default KIVI's, 4 bits, keys per channel and values per token. A prompt given at once is
    read as it is, and stored as codes after that. Codes lie in a byte each here; `bytes` counts them packed.
    """

    def __init__(self, layout: Layout, batch: int, form: KVFormat | None = None) -> None:
        check_whole(batch, "batch")
        self.form, self.length = form or KVFormat(), 0
        empty = torch.empty(batch, layout.heads, 0, layout.width, dtype=layout.dtype, device=layout.device)
        sides = (self.form.key_bits, self.form.keys_per), (self.form.value_bits, self.form.values_per)
        self.layers = [
            tuple(_Side(bits, per, self.form.group_size, empty) for bits, per in sides) for _ in range(layout.layers)
        ]

    @property
    def bytes(self) -> int:
        """Bytes of a file with the codes in their bits, their scales and zeros, and the recent tokens."""
        sides = {f"{i}.{name}": x for i, pair in enumerate(self.layers) for name, x in zip("kv", pair, strict=True)}
        state = {f"{name}.recent": x.recent.contiguous() for name, x in sides.items()}
        return artifact.size(state | {name: x.stored for name, x in sides.items() if x.stored is not None})

    def positions(self, new: int) -> Tensor:
        return torch.arange(self.length, self.length + new, device=self.layers[0][0].recent.device)[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        old = max(self.length + 1 - self.form.window, 0)  # tokens before the window of the first new query
        keys, values = (side.read(x, old) for side, x in zip(self.layers[layer], (k, v), strict=True))
        return attend(q, keys, values)

    def advance(self, new: int) -> None:
        self.length += new


class _Side:
    """Keys or values of a layer: codes of the tokens before, and the recent tokens [B, Hkv, n, D] as they are."""

    def __init__(self, bits: int | None, per: str, group_size: int, empty: Tensor) -> None:
        self.bits, self.per, self.group_size, self.recent = bits, per, group_size, empty
        self.stored: Quantized | None = None
        self.tokens = 0  # as codes

    def read(self, x: Tensor, old: int) -> Tensor:
        """Add x [B, Hkv, S, D], store what of the first `old` tokens may be codes, and give all: [B, Hkv, T, D]."""
        self.recent = torch.cat([self.recent, x], 2)
        ready = old // self.group_size * self.group_size if self.per == "channel" else old
        if self.bits is not None and ready > self.tokens:
            leaving, self.recent = self.recent.tensor_split([ready - self.tokens], 2)
            codes = kv.quantize(leaving, self.bits, self.per, group_size=self.group_size)
            self.stored = codes if self.stored is None else self._joined(self.stored, codes)
            self.tokens = ready
        if self.stored is None:
            return self.recent
        points = self.stored.dequantize()
        return torch.cat([points.mT if self.per == "channel" else points, self.recent], 2)

    def _joined(self, a: Quantized, b: Quantized) -> Quantized:
        """Tokens of b after those of a; they are the last dimension of codes per channel, and of its groups."""
        codes, groups = (-1, -2) if self.per == "channel" else (-2, -3)
        scale, zero = (torch.cat([getattr(x, name) for x in (a, b)], groups) for name in ("scale", "zero"))
        grid = Grid(scale, zero, a.bits, a.grid.lo, a.grid.hi)
        return Quantized(torch.cat([a.codes, b.codes], codes), grid)
