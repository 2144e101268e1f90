"""A decoder of the Llama type in few operators, on any cache, with the weights of a transformers model as they are.

Touvron et al. 2023 (arXiv:2302.13971, section 2.2): RMSNorm before each part, rotary positions (Su et al. 2021,
arXiv:2104.09864, equation 34), SwiGLU; keys and values in groups (Ainslie et al. 2023, arXiv:2305.13245).

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

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.arguments import check_loaded, check_tensor
from labkit.attention.cache import Cache, KVCache, Layout
from labkit.errors import InputError
from labkit.storage import int4
from labkit.storage.int4 import Int4Linear

Weight = Tensor | Int4Linear  # of a product: [out, in], or on labkit's int4 kernel

STATIC_ROPE = ("default", "linear", "llama3")  # frequencies that do not depend on the text's length


class Block(NamedTuple):
    """Weights [out, in] of a layer that is W wide, with F features, H query heads and Hkv KV heads of D numbers."""

    attention_norm: Tensor  # [W]
    qkv: Weight  # [(H + 2 Hkv) D, W]
    out: Weight  # [W, H D]
    feed_forward_norm: Tensor  # [W]
    gate_up: Weight  # [2 F, W]
    down: Weight  # [W, F]


class Decoder:
    """Llama decoder: token ids to hidden states to logits, on top of a cache.

    model: a LlamaForCausalLM of transformers, also with the layers of `int4.convert`. The decoder copies and joins the
        matrices (a product for q, k and v, a product for gate and up), in their dtype, and shares the embedding with
        the model.
    vocabulary: number of token ids.
    layout: shape of a cache.
    special: token ids of bos and eos.
    Raises InputError for other architectures, biases, other activations, or RoPE that changes with the length.
    """

    def __init__(self, model: nn.Module) -> None:
        check_llama(model, (nn.Linear, Int4Linear))
        config = model.config
        body = model.model
        self.heads = config.num_attention_heads
        self.vocabulary = config.vocab_size
        self.eps = config.rms_norm_eps
        self.special = {"bos": config.bos_token_id, "eos": config.eos_token_id}  # of two tokenizers that are alike
        self.embedding = body.embed_tokens.weight.detach()  # [V, W]
        self.layout = Layout(
            layers=len(body.layers),
            heads=config.num_key_value_heads,
            width=head_width(config),
            dtype=self.embedding.dtype,
            device=self.embedding.device,
        )
        self.blocks = [_block(layer) for layer in body.layers]
        self.norm = body.norm.weight.detach()
        self.head = _joined(model.lm_head)
        positions = config.max_position_embeddings
        self.cos, self.sin = _rotations(body.rotary_emb, positions, self.embedding)

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
        cos, sin = self._rotation(cache.positions(new))
        x = self.embedding[ids]
        for layer, block in enumerate(self.blocks):
            normed = self._norm(x, block.attention_norm)
            x = x + self._attention(normed, block, layer, cache, cos, sin)
            normed = self._norm(x, block.feed_forward_norm)
            x = x + self._feed_forward(normed, block)
        cache.advance(new)
        return self._norm(x, self.norm)

    def _attention(
        self,
        x: Tensor,
        block: Block,
        layer: int,
        cache: Cache,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        groups, width = self.layout.heads, self.layout.width
        projected = _product(x, block.qkv)
        by_token = projected.unflatten(-1, (-1, width))
        by_head = by_token.transpose(1, 2)  # [B, H + 2 Hkv, S, D]
        qk, v = by_head.split([self.heads + groups, groups], 1)
        swapped_halves = qk.roll(width // 2, -1)
        qk = qk * cos + swapped_halves * sin
        q, k = qk.split([self.heads, groups], 1)
        read = cache.attend(layer, q, k, v)  # [B, H, S, D]
        side_by_side = read.transpose(1, 2).flatten(2)  # [B, S, H D]
        return _product(side_by_side, block.out)

    def _feed_forward(self, x: Tensor, block: Block) -> Tensor:
        gate_up = _product(x, block.gate_up)
        gate, up = gate_up.chunk(2, -1)
        gated = F.silu(gate) * up
        return _product(gated, block.down)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits [..., V] from hidden states [..., W]; the last state of a prompt decides the next token."""
        return _product(hidden, self.head)

    def check(self, ids: Tensor, new: int) -> None:
        """Raise InputError unless `ids` are a text to which `new` tokens can be added, on the model's device.

        See `check_text`.
        """
        check_tensor(ids, "ids")
        device = self.embedding.device
        if ids.device != device:
            raise InputError(f"The text is on {ids.device} and the model on {device}: move one of them.")
        check_text(ids, new, self.vocabulary, len(self.cos))

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Look up cos and sin of positions [B or 1, S]: [B or 1, 1, S, D] each."""
        last = int(positions.max())
        _check_length(last + 1, len(self.cos))
        cos = self.cos[positions]  # [B or 1, S, D]
        sin = self.sin[positions]
        return cos[:, None], sin[:, None]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)


def decoder(model: nn.Module | Decoder) -> Decoder:
    """Make a `Decoder` of a LlamaForCausalLM; return a `Decoder` unchanged."""
    if isinstance(model, Decoder):
        return model
    return Decoder(model)


def head_width(config: Any) -> int:
    """Return D, the numbers of a head, from the configuration of a transformers model."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


def _block(layer: nn.Module) -> Block:
    attention, feed_forward = layer.self_attn, layer.mlp
    return Block(
        attention_norm=layer.input_layernorm.weight.detach(),
        qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        out=_joined(attention.o_proj),
        feed_forward_norm=layer.post_attention_layernorm.weight.detach(),
        gate_up=_joined(feed_forward.gate_proj, feed_forward.up_proj),
        down=_joined(feed_forward.down_proj),
    )


def _joined(*layers: nn.Module) -> Weight:
    """Put the weights [out, in] of layers below each other: [all outs, in].

    In float32 the numbers of an input lie side by side in memory, and a float32 row is multiplied faster: measured
    with torch 2.13 on a CPU's thread, 1.1 times with 1 row and up to 1.4 times with 8. Weights of half the bytes are
    left to torch's own kernels. Raises InputError for layers of two kinds.
    """
    in_int4 = [isinstance(layer, Int4Linear) for layer in layers]
    if all(in_int4):
        return int4.joined(layers)
    if any(in_int4):
        raise InputError("Of q, k and v, or gate and up, only some are Int4Linears: quantize all of them, or none.")
    weights = [layer.weight.detach() for layer in layers]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    if weight.dtype == torch.float32:
        return weight.t().contiguous().t()
    return weight


def _rotations(rotary: nn.Module, positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of the rotary angles, [positions, D] each, in the dtype and on the device of `like`.

    The first half of sin is negative: x cos + (x with swapped halves) sin is then equation 34, with pairs of numbers
    half a head apart.
    """
    frequencies = rotary.inv_freq.float()  # [D / 2]
    steps = torch.arange(positions, device=like.device)
    angles = steps[:, None] * frequencies
    cos = torch.cos(angles) * rotary.attention_scaling
    sin = torch.sin(angles) * rotary.attention_scaling
    cos = torch.cat([cos, cos], -1)
    sin = torch.cat([-sin, sin], -1)
    return cos.to(like), sin.to(like)


def _product(x: Tensor, weight: Weight) -> Tensor:
    """Multiply x [..., in] with a weight [out, in]: [..., out].

    A single row goes to a kernel for vectors, which is faster in bfloat16.
    """
    if isinstance(weight, Int4Linear):
        return weight(x)
    if x.numel() == x.shape[-1]:
        result = torch.mv(weight, x.flatten())
        return result.view(*x.shape[:-1], -1)
    return F.linear(x, weight)


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


def check_llama(model: nn.Module, layers: tuple[type[nn.Module], ...] = (nn.Linear,)) -> None:
    """Raise InputError unless `model` is a LlamaForCausalLM of transformers with the parts of a `Decoder`.

    layers: the classes allowed for the projections.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "llama" or not hasattr(model, "lm_head"):
        raise InputError(
            f"{type(model).__name__} is no decoder of the Llama type, the only one that is read here: give a "
            "LlamaForCausalLM, or use generate() of transformers, which has prompt_lookup_num_tokens and "
            "assistant_model for guesses."
        )
    check_loaded(model)
    rope = model.model.rotary_emb.rope_type
    has_biases = config.attention_bias or config.mlp_bias
    is_silu = config.hidden_act == "silu"
    is_static = rope in STATIC_ROPE
    projections = [module for name, module in model.named_modules() if name.endswith("_proj")]
    are_readable = all(isinstance(module, layers) for module in projections)
    if has_biases or not (is_silu and is_static and are_readable):
        raise InputError(
            f"This model has biases, the activation {config.hidden_act!r}, RoPE of the type {rope!r} or layers that "
            f"are no nn.Linear: give one without biases, with silu, {', '.join(STATIC_ROPE)} RoPE and plain layers."
        )
