"""Caches of keys and values: of all tokens, of the entries that matter most, or of all tokens in few bits.

A cache both stores and attends, so a decoder need not know its kind. Each step of a decoder calls `positions`,
then `attend` for each layer, then `advance`. Pages shared by several sequences: `labkit.attention.paged`.
"""

from collections.abc import Callable, Mapping
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


class Scoring(NamedTuple):
    """Rule by which the queries of a layer score the tokens up to their own.

    scale: factor of the products q k; None: 1 / sqrt(D).
    softcap: C where a score s becomes C tanh(s / C) before the softmax (Gemma 2, arXiv:2408.00118, section 2).
    window: number of tokens that a query reads, the last its own (Mistral 7B, arXiv:2310.06825, section 2); None: all.
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None


PLAIN = Scoring()


class Layout(NamedTuple):
    """Shape of a decoder's cache: for each token and layer, `heads` keys and as many values of `width` numbers.

    layers: number of decoder layers.
    heads: number of KV heads, Hkv.
    width: size of a head, D.
    dtype, device: type and place of the keys and values.
    scorings: by number, the layers whose scoring is not PLAIN.
    """

    layers: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device
    scorings: Mapping[int, Scoring] = {}

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of a token."""
        numbers = self.layers * self.heads * self.width
        return 2 * numbers * self.dtype.itemsize


class Cache(Protocol):
    """Interface of a cache: a step adds S new tokens to each of B sequences."""

    def positions(self, new: int) -> Tensor:
        """Return the positions of the next `new` tokens, [1, S] for all sequences.

        Raises InputError if the cache has no room.
        """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [B, Hkv, S, D], after RoPE, and attend causally: q [B, H, S, D] to [B, H, S, D].

        The scores are those of the layer's scoring in the decoder's `Layout`.
        """

    def advance(self, new: int) -> None:
        """End a step, after all layers have stored the `new` tokens."""


def attend(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring = PLAIN) -> Tensor:
    """Attend causally from the last S of T tokens on torch's kernels: q [B, H, S, D], k and v [B, Hkv, T, D].

    Returns [B, H, S, D]. The H / Hkv query heads of a group are rows of one product with the group's keys, which are
    not repeated. Tokens before the first query's window are not read.
    """
    _, heads, new, _ = q.shape
    window = scoring.window
    if window is not None:
        read_by_any = new + window - 1
        k = k[:, :, -read_by_any:]
        v = v[:, :, -read_by_any:]
    _, groups, tokens, _ = k.shape
    has_all = window is None or tokens <= window  # each query reads all tokens up to its own
    if new == tokens and has_all and scoring.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scoring.scale, enable_gqa=True)
    readable = None  # a single new token reads everything
    if new > 1:
        hidden = later(new, tokens - new, tokens, q.device)
        if not has_all:
            hidden |= _before_window(new, tokens, window, q.device)
        readable = ~hidden.repeat(heads // groups, 1)
    rows = grouped(q, groups)
    result = read(rows, k, v, readable, scoring)
    return ungrouped(result, new)


def read(rows: Tensor, k: Tensor, v: Tensor, readable: Tensor | None, scoring: Scoring) -> Tensor:
    """Attend from rows [B, Hkv, R, D], which are queries, to k and v [B, Hkv, T, D]: [B, Hkv, R, D].

    readable: mask that broadcasts to [B, Hkv, R, T], True where a token may be read; None: everywhere.
    """
    if scoring.softcap is None:
        return F.scaled_dot_product_attention(rows, k, v, readable, scale=scoring.scale)
    weights = _weights(rows, k, readable, scoring)  # torch's kernels have no cap
    return weights.to(v.dtype) @ v


def _before_window(new: int, tokens: int, window: int, device: torch.device) -> Tensor:
    """Return a mask [S, T] for the last S = new of T tokens, True for the tokens before the window of each."""
    everywhere = torch.ones(new, tokens, dtype=torch.bool, device=device)
    return everywhere.tril_(tokens - new - window)


def grouped(q: Tensor, groups: int) -> Tensor:
    """Put the query heads of a group below each other as rows: [B, H, S, D] to [B, groups, H / groups S, D]."""
    batch, _, _, width = q.shape
    return q.reshape(batch, groups, -1, width)


def ungrouped(y: Tensor, new: int) -> Tensor:
    """Undo `grouped` for `new` = S tokens: [B, groups, H / groups S, D] to [B, H, S, D]."""
    batch, _, _, width = y.shape
    return y.reshape(batch, -1, new, width)


def _positions(start: int, new: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + new, device=device)[None]


class KVCache:
    """Cache of the keys and values of all tokens, as they are, in memory allocated once.

    A layer with a window keeps the tokens before the window too, so that a text can be cropped.

    layout: shape of the decoder's cache.
    batch: number B of sequences, all of equal length.
    capacity: most tokens of a sequence.
    keys, values: [layers, B, Hkv, capacity, D], filled up to `length` tokens.
    """

    def __init__(self, layout: Layout, batch: int, capacity: int) -> None:
        check_whole(batch, "batch")
        check_whole(capacity, "capacity")
        shape = (layout.layers, batch, layout.heads, capacity, layout.width)
        self.keys = torch.empty(shape, dtype=layout.dtype, device=layout.device)
        self.values = torch.empty_like(self.keys)
        self.scorings = layout.scorings
        self.length = 0

    @property
    def bytes(self) -> int:
        """Bytes of the tokens stored so far."""
        stored_keys = self.keys[..., : self.length, :]
        return 2 * stored_keys.numel() * stored_keys.itemsize

    def positions(self, new: int) -> Tensor:
        capacity = self.keys.shape[3]
        if self.length + new > capacity:
            raise InputError(
                f"The cache has room for {capacity} tokens and holds {self.length}, so {new} more do not fit: make it "
                "larger, or crop it."
            )
        return _positions(self.length, new, self.keys.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        start = self.length
        end = start + k.shape[2]
        keys = self.keys[layer]  # [B, Hkv, capacity, D]
        values = self.values[layer]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        all_keys = keys[:, :, :end]
        all_values = values[:, :, :end]
        return attend(q, all_keys, all_values, self.scorings.get(layer, PLAIN))

    def advance(self, new: int) -> None:
        self.length += new

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on, such as rejected guesses."""
        check_whole(length, "length", 0, self.length)
        self.length = length


# --- a budget of entries ----------------------------------------------------------------------------------------------

WINDOW = 32  # queries that vote
POOL = 7  # entries side by side that a vote is for


def _summed(memory: Tensor) -> Tensor:
    """Sum the memory of each entry: [B, Hkv, W, n] to [B, Hkv, n]."""
    return memory.sum(2)


def _pooled(memory: Tensor) -> Tensor:
    """Sum the memory of each entry, then take the largest sum among POOL neighbours: [B, Hkv, W, n] to [B, Hkv, n]."""
    votes = memory.sum(2)
    return F.max_pool1d(votes, POOL, stride=1, padding=POOL // 2)


class Policy(NamedTuple):
    """Rule by which an evicting cache scores its n entries, from a memory [B, Hkv, W, n] with W numbers per entry.

    remember: remember(memory, weights, draw) returns the new memory. `memory` is that of the n - S entries before, with
        0 for the S new entries; `weights` [B, Hkv, S, n] is the attention from the S new queries to the entries, summed
        over the query heads of a group; `draw` is the source of random numbers.
    score: score(memory) returns [B, Hkv, n]; the entries with the largest scores stay.
    """

    remember: Callable[[Tensor, Tensor, torch.Generator], Tensor]
    score: Callable[[Tensor], Tensor] = _summed


def _remember_order(memory: Tensor, weights: Tensor, draw: torch.Generator) -> Tensor:
    """Number the entries in order of time."""
    entries = memory.shape[-1]
    order = torch.arange(entries).to(memory)
    return order.expand(memory.shape)


def _remember_chance(memory: Tensor, weights: Tensor, draw: torch.Generator) -> Tensor:
    """Draw a random number for each new entry."""
    new = weights.shape[2]
    before = memory[..., :-new]
    numbers = torch.rand(*memory.shape[:-1], new, generator=draw)
    return torch.cat([before, numbers.to(memory)], -1)


def _remember_attention(memory: Tensor, weights: Tensor, draw: torch.Generator) -> Tensor:
    """Accumulate the attention from all queries so far."""
    return memory + weights.sum(2, keepdim=True)


def _remember_votes(memory: Tensor, weights: Tensor, draw: torch.Generator) -> Tensor:
    """Keep the attention from the last WINDOW queries, a row each."""
    votes = torch.cat([memory, weights], 2)
    return votes[:, :, -WINDOW:]


POLICIES = {
    # StreamingLLM (Xiao et al. 2023, arXiv:2309.17453): the sinks and the most recent
    "recent": Policy(_remember_order),
    # the control: the result of any choice that keeps sinks and recent tokens
    "random": Policy(_remember_chance),
    # H2O (Zhang et al. 2023, arXiv:2306.14048, algorithm 1): attention accumulated over all queries so far
    "attention": Policy(_remember_attention),
    # SnapKV (Li et al. 2024, arXiv:2404.14469, section 4): attention from the last queries, pooled over neighbours
    "votes": Policy(_remember_votes, _pooled),
}


class EvictingCache:
    """Cache of at most `budget` entries for each layer and KV head.

    A step reads the entries and the step's own tokens, then drops entries beyond the budget. The first `sinks` tokens
    and the last (budget - sinks) / 2 always stay; the policy chooses among the rest. Keys keep their positions, so
    distances stay true. All tokens of a step read each other: a prompt in pieces is not the same function as a prompt
    in one step.

    layout, batch: as for `KVCache`.
    policy: a name of POLICIES.
    seed: seed of the policy "random".
    Raises InputError for a budget that the sinks fill, and for a layout with windows.
    """

    def __init__(
        self,
        layout: Layout,
        batch: int,
        budget: int,
        *,
        policy: str = "recent",
        sinks: int = 4,
        seed: int = 0,
    ) -> None:
        check_choice(policy, POLICIES, "eviction policy")
        check_whole(sinks, "sinks", 0)
        check_whole(budget, "budget")
        check_whole(batch, "batch")
        check_whole(seed, "seed", 0)
        if budget <= sinks:
            raise InputError(f"A budget of {budget} entries is filled by {sinks} sinks: make it larger than they are.")
        if any(scoring.window is not None for scoring in layout.scorings.values()):
            raise InputError(
                "Some layers of this decoder read a window, but an EvictingCache chooses among all tokens: take the "
                "decoder's own cache or a QuantizedCache."
            )
        self.scorings = layout.scorings
        self.budget = budget
        self.sinks = sinks
        self.policy = POLICIES[policy]
        self.draw = torch.Generator().manual_seed(seed)
        self.seen = 0  # tokens, the dropped ones included
        no_entries = _no_tokens(layout, batch)
        no_memory = torch.empty(batch, layout.heads, 1, 0, device=layout.device)
        self.keys = [no_entries] * layout.layers
        self.values = [no_entries] * layout.layers
        self.memory = [no_memory] * layout.layers  # of the policy

    @property
    def bytes(self) -> int:
        """Bytes of the entries."""
        tensors = self.keys + self.values
        return sum(x.nbytes for x in tensors)

    def positions(self, new: int) -> Tensor:
        return _positions(self.seen, new, self.keys[0].device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = torch.cat([self.keys[layer], k], 2)
        v = torch.cat([self.values[layer], v], 2)
        new = q.shape[2]
        weights = self._weights(layer, q, k)  # [B, Hkv, H / Hkv S, n]
        result = ungrouped(weights.to(v.dtype) @ v, new)
        by_head = weights.unflatten(2, (-1, new))
        by_query = by_head.sum(2)  # [B, Hkv, S, n]
        memory = F.pad(self.memory[layer], (0, new))
        memory = self.policy.remember(memory, by_query, self.draw)
        if k.shape[2] > self.budget:
            score = self.policy.score(memory)
            stay = self._entries_to_keep(score)[:, :, None]  # [B, Hkv, 1, budget]
            columns = stay.expand(-1, -1, memory.shape[2], -1)  # [B, Hkv, W, budget]
            memory = memory.gather(3, columns)
            rows = stay.mT.expand(-1, -1, -1, k.shape[3])  # [B, Hkv, budget, D]
            k = k.gather(2, rows)
            v = v.gather(2, rows)
        self.keys[layer] = k
        self.values[layer] = v
        self.memory[layer] = memory
        return result

    def _weights(self, layer: int, q: Tensor, k: Tensor) -> Tensor:
        """Return the causal softmax of the last S of n entries: q [B, H, S, D], k [B, Hkv, n, D] to [B, Hkv, R, n].

        The R = H / Hkv S rows are those of `grouped`.
        """
        _, heads, new, _ = q.shape
        _, groups, entries, _ = k.shape
        hidden = later(new, entries - new, entries, q.device)
        readable = ~hidden.repeat(heads // groups, 1)
        return _weights(grouped(q, groups), k, readable, self.scorings.get(layer, PLAIN))

    def _entries_to_keep(self, score: Tensor) -> Tensor:
        """Return the indices of the entries with the best scores [B, Hkv, n], in order of time: [B, Hkv, budget]."""
        recent = (self.budget - self.sinks) // 2
        first_recent = score.shape[-1] - recent
        score = score.clone()
        score[..., : self.sinks] = torch.inf
        score[..., first_recent:] = torch.inf
        best = score.topk(self.budget, -1).indices
        return best.sort(-1).values

    def advance(self, new: int) -> None:
        self.seen += new


def _no_tokens(layout: Layout, batch: int) -> Tensor:
    """Return empty keys or values of a layer, [B, Hkv, 0, D]."""
    shape = (batch, layout.heads, 0, layout.width)
    return torch.empty(shape, dtype=layout.dtype, device=layout.device)


def _weights(rows: Tensor, k: Tensor, readable: Tensor | None, scoring: Scoring) -> Tensor:
    """Return the softmax of scores: rows [B, Hkv, R, D], k [B, Hkv, n, D] to [B, Hkv, R, n].

    readable: as for `read`.
    In float32 or, for float64 queries, in float64.
    """
    scale = rows.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    dtype = working(rows.dtype)
    scores = rows.to(dtype) @ k.mT.to(dtype) * scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if readable is not None:
        scores.masked_fill_(~readable, -torch.inf)
    return scores.softmax(-1, torch.promote_types(rows.dtype, torch.float32))


# --- few bits ---------------------------------------------------------------------------------------------------------


class QuantizedCache:
    """Cache of all tokens, in codes of few bits but for the last `form.window` tokens.

    Token by token the result is that of `kv.attention`. A prompt given at once is read as it is, and stored as codes
    afterwards. Codes take a byte each in memory; `bytes` counts the codes packed.

    layout, batch: as for `KVCache`.
    form: see `kv.KVFormat`; by default KIVI's: 4 bits, keys per channel and values per token.
    """

    def __init__(self, layout: Layout, batch: int, form: KVFormat | None = None) -> None:
        check_whole(batch, "batch")
        self.form = form or KVFormat()
        self.length = 0
        self.scorings = layout.scorings
        empty = _no_tokens(layout, batch)
        self.layers = [_keys_and_values(self.form, empty) for _ in range(layout.layers)]

    @property
    def bytes(self) -> int:
        """Bytes of a file with the packed codes, their scales and zeros, and the recent tokens."""
        state: dict[str, Tensor | Quantized] = {}
        for layer, (keys, values) in enumerate(self.layers):
            for letter, side in (("k", keys), ("v", values)):
                name = f"{layer}.{letter}"
                state[f"{name}.recent"] = side.recent.contiguous()
                if side.stored is not None:
                    state[name] = side.stored
        return artifact.size(state)

    def positions(self, new: int) -> Tensor:
        keys, _ = self.layers[0]
        return _positions(self.length, new, keys.recent.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = self.length + 1  # that the first new query reads
        before_window = max(tokens - self.form.window, 0)
        keys, values = self.layers[layer]
        all_keys = keys.read(k, before_window)
        all_values = values.read(v, before_window)
        return attend(q, all_keys, all_values, self.scorings.get(layer, PLAIN))

    def advance(self, new: int) -> None:
        self.length += new


def _keys_and_values(form: KVFormat, empty: Tensor) -> tuple["_Side", "_Side"]:
    keys = _Side(form.key_bits, form.keys_per, form.group_size, empty)
    values = _Side(form.value_bits, form.values_per, form.group_size, empty)
    return keys, values


class _Side:
    """Keys or values of a layer: codes of the first `tokens` tokens, and the exact recent tokens [B, Hkv, n, D].

    bits, per, group_size: see `kv.quantize`; without bits no token becomes codes.
    empty: the recent tokens at the start, [B, Hkv, 0, D].
    """

    def __init__(self, bits: int | None, per: str, group_size: int, empty: Tensor) -> None:
        self.bits = bits
        self.per_channel = per == "channel"
        self.per = per
        self.group_size = group_size
        self.recent = empty
        self.stored: Quantized | None = None
        self.tokens = 0

    def read(self, x: Tensor, old: int) -> Tensor:
        """Add x [B, Hkv, S, D] and return the keys or values of all tokens, [B, Hkv, T, D].

        Before, the first `old` tokens become codes, as far as they fill groups.
        """
        self.recent = torch.cat([self.recent, x], 2)
        if self.bits is not None:
            self._quantize(old)
        if self.stored is None:
            return self.recent
        points = self.stored.dequantize()
        if self.per_channel:
            points = points.mT
        return torch.cat([points, self.recent], 2)

    def _quantize(self, old: int) -> None:
        ready = old
        if self.per_channel:  # a group of tokens shares a scale, and has to be whole
            ready = old // self.group_size * self.group_size
        if ready <= self.tokens:
            return
        new = ready - self.tokens
        leaving, self.recent = self.recent.tensor_split([new], 2)
        codes = kv.quantize(leaving, self.bits, self.per, group_size=self.group_size)
        if self.stored is not None:
            codes = self._joined(self.stored, codes)
        self.stored = codes
        self.tokens = ready

    def _joined(self, a: Quantized, b: Quantized) -> Quantized:
        """Put the tokens of b after the tokens of a.

        Codes per channel are [B, Hkv, D, T], and their scales [B, Hkv, D, groups of tokens, 1]; codes per token are
        [B, Hkv, T, D], and their scales [B, Hkv, T, groups of channels, 1].
        """
        tokens = -1 if self.per_channel else -2
        groups = tokens - 1  # the groups of a channel, or again the tokens
        scale = torch.cat([a.scale, b.scale], groups)
        zero = torch.cat([a.zero, b.zero], groups)
        codes = torch.cat([a.codes, b.codes], tokens)
        grid = Grid(scale, zero, a.bits, a.grid.lo, a.grid.hi)
        return Quantized(codes, grid)
