"""A decoder of the Llama type in few operators, on any cache, with the weights of a transformers model as they are.

Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma 2 and Gemma 3 go through the same steps: `labkit.attention.families`
describes their blocks, and has the sources.

A decoder computes hidden states of new tokens on top of a cache that holds the keys and values of the tokens before:
>>> import torch
>>> from labkit.attention.decoder import Decoder
>>> from transformers import LlamaConfig, LlamaForCausalLM
>>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
>>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes))
>>> net = Decoder(model)
>>> cache = net.cache(capacity=5)
>>> prompt = net.hidden(torch.tensor([[3, 14, 15, 9]]), cache)  # 4 tokens go through the layers
>>> token = net.logits(prompt[:, -1]).argmax(-1, keepdim=True)  # [1, 1]: the most likely next token
>>> net.hidden(token, cache).shape  # a single token goes through the layers, and reads the cache
torch.Size([1, 1, 32])
>>> cache.length, cache.bytes == 5 * net.layout.token_bytes
(5, True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.arguments import check_tensor
from labkit.attention.cache import PLAIN, Cache, KVCache, Layout
from labkit.attention.families import Block, Projection, Rotary, describe
from labkit.errors import InputError
from labkit.storage.int4 import Int4Linear

Rotation = tuple[Tensor, Tensor]  # cos and sin


class Decoder:
    """Decoder of the Llama type: token ids to hidden states to logits, on top of a cache.

    model: a ForCausalLM of transformers, as `families.describe` takes it, also with the layers of `int4.convert`. The
        decoder copies and joins the matrices (a product for q, k and v, a product for gate and up), in their dtype, and
        shares the embedding with the model.
    vocabulary: number of token ids.
    layout: shape of a cache.
    special: token ids of bos and eos.
    Raises InputError for other architectures, other activations, or RoPE that changes with the length.
    """

    def __init__(self, model: nn.Module) -> None:
        described = describe(model)
        self.heads = described.heads
        self.vocabulary = described.vocabulary
        self.positions = described.positions
        self.eps = described.eps
        self.special = described.special  # of two tokenizers that are alike
        self.embedding = described.embedding
        self.embedding_scale = described.embedding_scale
        self.blocks = described.blocks
        self.norm = described.norm
        self.head = described.head
        self.softcap = described.softcap
        self.rotations = [_rotations(rotary, self.positions, self.embedding) for rotary in described.rotaries]
        scorings = {number: block.scoring for number, block in enumerate(self.blocks) if block.scoring != PLAIN}
        self.layout = Layout(
            layers=len(self.blocks),
            heads=described.groups,
            width=described.width,
            dtype=self.embedding.dtype,
            device=self.embedding.device,
            scorings=scorings,
        )

    def cache(self, capacity: int, batch: int = 1) -> KVCache:
        """Return an empty cache with room for `capacity` tokens of each of `batch` sequences."""
        return KVCache(self.layout, batch, capacity)

    @torch.inference_mode()
    def hidden(self, ids: Tensor, cache: Cache) -> Tensor:
        """Compute the last hidden states [B, S, W] of token ids [B, S] that follow the tokens in the cache.

        The cache holds the S tokens afterwards. Raises InputError where the cache has no room, or beyond the positions
        that the model knows.
        """
        new = ids.shape[1]
        rotations = self._rotations_at(cache.positions(new))
        x = self._embedded(ids)
        for layer, block in enumerate(self.blocks):
            normed = self._norm(x, block.attention_norm)
            attended = self._attention(normed, block, layer, cache, rotations)
            x = x + self._norm(attended, block.attended_norm)
            normed = self._norm(x, block.feed_forward_norm)
            fed = self._feed_forward(normed, block)
            x = x + self._norm(fed, block.fed_norm)
        cache.advance(new)
        return self._norm(x, self.norm)

    def _embedded(self, ids: Tensor) -> Tensor:
        x = self.embedding[ids]
        if self.embedding_scale is None:
            return x
        return x * self.embedding_scale

    def _attention(self, x: Tensor, block: Block, layer: int, cache: Cache, rotations: list[Rotation]) -> Tensor:
        groups, width = self.layout.heads, self.layout.width
        projected = _product(x, block.qkv)
        by_token = projected.view(*x.shape[:2], -1, width)
        by_head = by_token.transpose(1, 2)  # [B, H + 2 Hkv, S, D]
        qk, v = by_head.split([self.heads + groups, groups], 1)
        if block.qk_norm is not None:
            qk = self._qk_norm(qk, block.qk_norm)
        if block.rotary is not None:
            cos, sin = rotations[block.rotary]
            swapped_halves = qk.roll(width // 2, -1)
            qk = qk * cos + swapped_halves * sin
        q, k = qk.split([self.heads, groups], 1)
        read = cache.attend(layer, q, k, v)  # [B, H, S, D]
        side_by_side = read.transpose(1, 2).flatten(2)  # [B, S, H D]
        return _product(side_by_side, block.out)

    def _feed_forward(self, x: Tensor, block: Block) -> Tensor:
        gate_up = _product(x, block.gate_up)
        gate, up = gate_up.chunk(2, -1)
        gated = block.activation(gate) * up
        return _product(gated, block.down)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits [..., V] from hidden states [..., W]; the last state of a prompt decides the next token."""
        scores = _product(hidden, self.head)
        if self.softcap is None:
            return scores
        return self.softcap * torch.tanh(scores / self.softcap)

    def check(self, ids: Tensor, new: int) -> None:
        """Raise InputError unless `ids` are a text to which `new` tokens can be added, on the model's device.

        See `check_text`.
        """
        check_tensor(ids, "ids")
        device = self.embedding.device
        if ids.device != device:
            raise InputError(f"The text is on {ids.device} and the model on {device}: move one of them.")
        check_text(ids, new, self.vocabulary, self.positions)

    def _rotations_at(self, positions: Tensor) -> list[Rotation]:
        """Look up cos and sin of positions [B or 1, S]: [B or 1, 1, S, D] each, for each of the model's rotaries."""
        last = int(positions.max())
        _check_length(last + 1, self.positions)
        looked_up = []
        for cos, sin in self.rotations:
            cos = cos[positions]  # [B or 1, S, D]
            sin = sin[positions]
            looked_up.append((cos[:, None], sin[:, None]))
        return looked_up

    def _norm(self, x: Tensor, gain: Tensor | None) -> Tensor:
        """Apply RMSNorm over the last dimension, in the gain's dtype; without a gain there is no norm."""
        if gain is None:
            return x
        if gain.dtype == x.dtype:
            return F.rms_norm(x, gain.shape, gain, self.eps)
        normed = F.rms_norm(x.to(gain.dtype), gain.shape, gain, self.eps)
        return normed.to(x.dtype)

    def _qk_norm(self, qk: Tensor, gain: Tensor) -> Tensor:
        """Apply RMSNorm to each query and key [B, H + Hkv, S, D]; gain: [H + Hkv, 1, D]."""
        normed = F.rms_norm(qk.to(gain.dtype), gain.shape[-1:], None, self.eps)
        scaled = normed * gain
        return scaled.to(qk.dtype)


def decoder(model: nn.Module | Decoder) -> Decoder:
    """Make a `Decoder` of a ForCausalLM of transformers; return a `Decoder` unchanged."""
    if isinstance(model, Decoder):
        return model
    return Decoder(model)


def _rotations(rotary: Rotary, positions: int, like: Tensor) -> Rotation:
    """Compute cos and sin of the rotary angles, [positions, D] each, in the dtype and on the device of `like`.

    The first half of sin is negative: x cos + (x with swapped halves) sin is then equation 34 of Su et al., with pairs
    of numbers half a head apart.
    """
    steps = torch.arange(positions, device=like.device)
    angles = steps[:, None] * rotary.frequencies
    cos = torch.cos(angles) * rotary.scale
    sin = torch.sin(angles) * rotary.scale
    cos = torch.cat([cos, cos], -1)
    sin = torch.cat([-sin, sin], -1)
    return cos.to(like), sin.to(like)


def _product(x: Tensor, projection: Projection) -> Tensor:
    """Multiply x [..., in] with a weight [out, in], and add the bias: [..., out].

    A single row goes to a kernel for vectors, which is faster in bfloat16.
    """
    weight, bias = projection
    if isinstance(weight, Int4Linear):
        return weight(x)
    if x.numel() == x.shape[-1]:
        row = x.flatten()
        result = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
        return result.view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def check_text(ids: Tensor, new: int, vocabulary: int, positions: int) -> None:
    """Raise InputError unless `ids` are a text that can grow by `new` tokens.

    ids: whole numbers from 0 to vocabulary - 1, [T] or [1, T] with T >= 1.
    positions: length of the longest text that the model knows; T + new may not exceed `positions`.
    """
    check_tensor(ids, "ids")
    if not (_is_row_of_integers(ids) and _are_within(ids, vocabulary)):
        raise InputError(
            f"A text has to be token ids from 0 to {vocabulary - 1}, [tokens] or [1, tokens], at least one, "
            f"got {ids.dtype} {list(ids.shape)}: give what the model's tokenizer gives."
        )
    _check_length(ids.numel() + new, positions)


def _is_row_of_integers(ids: Tensor) -> bool:
    is_integer = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not is_integer or ids.dim() == 0:
        return False
    tokens = ids.shape[-1]
    return tokens > 0 and ids.numel() == tokens


def _are_within(ids: Tensor, vocabulary: int) -> bool:
    least, most = int(ids.min()), int(ids.max())
    return least >= 0 and most < vocabulary


def _check_length(tokens: int, positions: int) -> None:
    if tokens > positions:
        raise InputError(f"{tokens} tokens are more than the {positions} that the model was made for: give fewer.")
