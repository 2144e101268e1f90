"""A decoder of the Llama type in few operators, on any cache: the weights of a transformers model, taken as they are.

Touvron et al. 2023 (arXiv:2302.13971, section 2.2): RMSNorm before each part, rotary positions (Su et al. 2021,
arXiv:2104.09864, equation 34), SwiGLU; keys and values in groups (Ainslie et al. 2023, arXiv:2305.13245).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.arguments import check_tensor
from labkit.attention.cache import Cache, KVCache, Layout
from labkit.errors import InputError

STATIC_ROPE = ("default", "linear", "llama3")  # frequencies that do not depend on the text's length


class Block(NamedTuple):
    """Weights of a layer that is W wide, with F features, [out, in] each."""

    attention_norm: Tensor  # [W]
    qkv: Tensor  # [(H + 2 Hkv) D, W]
    out: Tensor  # [W, H D]
    feed_forward_norm: Tensor  # [W]
    gate_up: Tensor  # [2 F, W]
    down: Tensor  # [W, F]


class Decoder:
    """Token ids to logits, on top of a cache that it fills.

    model: a LlamaForCausalLM of transformers. Its matrices are copied and put together (one product for q, k and v, one
    for gate and up), in their dtype; the embedding is shared with the model.
    Raises InputError for another architecture, biases, another activation, or RoPE that changes with the length.
    """

    def __init__(self, model: nn.Module) -> None:
        check_llama(model)
        config, body = model.config, model.model
        width = config.head_dim or config.hidden_size // config.num_attention_heads
        self.heads, self.vocabulary, self.eps = config.num_attention_heads, config.vocab_size, config.rms_norm_eps
        self.special = {"bos": config.bos_token_id, "eos": config.eos_token_id}  # of two tokenizers that are alike
        self.embedding = body.embed_tokens.weight.detach()  # [V, W]
        place = {"dtype": self.embedding.dtype, "device": self.embedding.device}
        self.layout = Layout(len(body.layers), config.num_key_value_heads, width, **place)
        self.blocks = [_block(layer) for layer in body.layers]
        self.norm, self.head = body.norm.weight.detach(), _joined(model.lm_head)
        frequencies = body.rotary_emb.inv_freq.float()
        angles = torch.arange(config.max_position_embeddings, device=place["device"])[:, None] * frequencies
        scaling = body.rotary_emb.attention_scaling
        cos, sin = (f(angles) * scaling for f in (torch.cos, torch.sin))  # [positions, D / 2]
        self.cos, self.sin = torch.cat([cos, cos], -1).to(**place), torch.cat([-sin, sin], -1).to(**place)

    def cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache with room for `capacity` tokens of each of `batch` sequences."""
        return KVCache(self.layout, batch, capacity)

    @torch.inference_mode()
    def hidden(self, ids: Tensor, cache: Cache) -> Tensor:
        """Token ids [B, S] that follow what the cache holds, to their last hidden states [B, S, W].

        Raises InputError where the cache has no room, or beyond the positions that the model knows.
        """
        cos, sin = self._rotation(cache.positions(ids.shape[1]))
        heads, groups, width = self.heads, self.layout.heads, self.layout.width
        x = self.embedding[ids]
        for i, block in enumerate(self.blocks):
            projected = _product(self._norm(x, block.attention_norm), block.qkv)
            qkv = projected.unflatten(-1, (-1, width)).transpose(1, 2)  # [B, H + 2 Hkv, S, D]
            qk, v = qkv.split([heads + groups, groups], 1)
            qk = qk * cos + qk.roll(width // 2, -1) * sin
            read = cache.attend(i, *qk.split([heads, groups], 1), v)
            x = x + _product(read.transpose(1, 2).flatten(2), block.out)
            gate, up = _product(self._norm(x, block.feed_forward_norm), block.gate_up).chunk(2, -1)
            x = x + _product(F.silu(gate) * up, block.down)
        cache.advance(ids.shape[1])
        return self._norm(x, self.norm)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., W] to logits [..., V]: of a prompt's, the last alone decides the next token."""
        return _product(hidden, self.head)

    def check(self, ids: Tensor, new: int) -> None:
        """See `check_text`; the text must also be on the model's device."""
        check_tensor(ids, "ids")
        if ids.device != self.embedding.device:
            raise InputError(f"The text is on {ids.device} and the model on {self.embedding.device}: move one of them.")
        check_text(ids, new, self.vocabulary, len(self.cos))

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions [B or 1, S], [B or 1, 1, S, D]; the sign of rotate_half is in sin."""
        _check_length(int(positions.max()) + 1, len(self.cos))
        return self.cos[positions][:, None], self.sin[positions][:, None]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)


def decoder(model: nn.Module | Decoder) -> Decoder:
    """`model` as a decoder; one that is a decoder already, as it is."""
    return model if isinstance(model, Decoder) else Decoder(model)


def _block(layer: nn.Module) -> Block:
    attention, feed_forward = layer.self_attn, layer.mlp
    return Block(
        layer.input_layernorm.weight.detach(),
        _joined(attention.q_proj, attention.k_proj, attention.v_proj),
        _joined(attention.o_proj),
        layer.post_attention_layernorm.weight.detach(),
        _joined(feed_forward.gate_proj, feed_forward.up_proj),
        _joined(feed_forward.down_proj),
    )


def _joined(*layers: nn.Module) -> Tensor:
    """Weights [out, in] below each other, [all outs, in]; in float32 each input's numbers lie side by side in memory.

    So a float32 row meets them faster: measured with torch 2.13 on a CPU's thread, 1.1 times with one row and up to
    1.4 times with eight. Half the bytes are left to the kernels that torch has for them.
    """
    weight = torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight.detach()
    return weight.t().contiguous().t() if weight.dtype == torch.float32 else weight


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in], [..., out]; one row by a kernel for vectors, which is faster in bfloat16."""
    if x.numel() == x.shape[-1]:
        return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def check_text(ids: Tensor, new: int, vocabulary: int, positions: int) -> None:
    """InputError unless `ids` are a text, [T] or [1, T], to which `new` tokens can be added: at most `positions`."""
    check_tensor(ids, "ids")
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    whole = whole and ids.dim() > 0 and ids.numel() == ids.shape[-1] > 0
    if not whole or int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise InputError(
            f"A text has to be token ids from 0 to {vocabulary - 1}, [tokens] or [1, tokens], at least one, "
            f"got {ids.dtype} {list(ids.shape)}: give what the model's tokenizer gives."
        )
    _check_length(ids.numel() + new, positions)


def _check_length(tokens: int, positions: int) -> None:
    if tokens > positions:
        raise InputError(f"{tokens} tokens are more than the {positions} that the model was made for: give fewer.")


def check_llama(model: nn.Module, layers: tuple[type[nn.Module], ...] = (nn.Linear,)) -> None:
    """InputError unless it is a LlamaForCausalLM of transformers as `Decoder` reads it, its products in `layers`."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "llama" or not hasattr(model, "lm_head"):
        raise InputError(
            f"{type(model).__name__} is no decoder of the Llama type, the only one that is read here: give a "
            "LlamaForCausalLM, or use generate() of transformers, which has prompt_lookup_num_tokens and "
            "assistant_model for guesses."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError("The model is on the meta device, where weights have no numbers: load it on a real device.")
    rope = model.model.rotary_emb.rope_type
    plain = not (config.attention_bias or config.mlp_bias) and config.hidden_act == "silu" and rope in STATIC_ROPE
    if not plain or any(not isinstance(m, layers) for name, m in model.named_modules() if name.endswith("_proj")):
        raise InputError(
            f"This model has biases, the activation {config.hidden_act!r}, RoPE of the type {rope!r} or layers that "
            f"are no nn.Linear: give one without biases, with silu, {', '.join(STATIC_ROPE)} RoPE and plain layers."
        )
