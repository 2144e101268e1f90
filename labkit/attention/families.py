"""Decoders of the Llama type, described: all that Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma 2 and Gemma 3 differ in.

`describe` reads a model of transformers once. `labkit.attention.decoder` computes from the description alone, and so
has no case for a family.

Llama (Touvron et al. 2023, arXiv:2302.13971, section 2.2): RMSNorm before each part of a block, rotary positions (Su et
    al. 2021, arXiv:2104.09864, equation 34), SwiGLU; keys and values in groups (Ainslie et al. 2023, arXiv:2305.13245).
Mistral (Jiang et al. 2023, arXiv:2310.06825, section 2): a window in every layer.
Qwen2 (Yang et al. 2024, arXiv:2407.10671, section 2.2): biases of queries, keys and values, windows in some layers.
Qwen3 (Yang et al. 2025, arXiv:2505.09388, section 2): a norm of each query and key in place of the biases.
SmolLM3 (Bakouch et al. 2025, huggingface.co/blog/smollm3): some layers without positions.
Gemma 2 (Gemma Team 2024, arXiv:2408.00118, section 2): norms after each part too, GELU, capped scores and logits,
    windows in every other layer; the embedding is scaled, and a norm's gain is 1 + its weight.
Gemma 3 (Gemma Team 2025, arXiv:2503.19786, section 2): norms of queries and keys in place of the caps; layers with a
    window have rotary frequencies of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.arguments import check_loaded
from labkit.attention.cache import Scoring
from labkit.errors import InputError
from labkit.storage import int4
from labkit.storage.int4 import Int4Linear

STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the text's length
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers, as transformers names them


# --- the description --------------------------------------------------------------------------------------------------


class Projection(NamedTuple):
    """Product with a weight [out, in], and a bias [out] or None; an Int4Linear adds its bias itself."""

    weight: Tensor | Int4Linear
    bias: Tensor | None


class Rotary(NamedTuple):
    """Rotary positions: the angle of a pair of numbers is position x frequency; cos and sin are multiplied by `scale`.

    frequencies: [D / 2].
    """

    frequencies: Tensor
    scale: float


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """A layer that is W wide, with F features, H query heads and Hkv KV heads of D numbers.

    Attention and the feed-forward network have a norm before and, if the gain is not None, a norm after:
        x = x + norm(attention(norm(x, attention_norm)), attended_norm)
        x = x + norm(feed_forward(norm(x, feed_forward_norm)), fed_norm)

    attention_norm, attended_norm, feed_forward_norm, fed_norm: gains of the norms, [W].
    qkv: projection of x to the queries, keys and values of all heads, [(H + 2 Hkv) D, W].
    qk_norm: gains of the norm of each query and key, [H + Hkv, 1, D]; None: no norm.
    rotary: number of the layer's positions in `Description.rotaries`; None: no positions.
    scoring: scale, cap and window of the scores.
    out: projection of what the heads read, [W, H D].
    gate_up: projections to the gate and the features, [2 F, W].
    activation: function of the gate.
    down: projection of the features, [W, F].
    """

    attention_norm: Tensor
    qkv: Projection
    qk_norm: Tensor | None
    rotary: int | None
    scoring: Scoring
    out: Projection
    attended_norm: Tensor | None
    feed_forward_norm: Tensor
    gate_up: Projection
    activation: Callable[[Tensor], Tensor]
    down: Projection
    fed_norm: Tensor | None


@dataclass(frozen=True, eq=False)
class Description:
    """A decoder: V token ids, of which texts of at most `positions` are made.

    heads, groups, width: H query heads and Hkv KV heads of D numbers.
    eps: number added to the mean square in a norm.
    special: token ids of bos and eos.
    embedding: [V, W], shared with the model.
    embedding_scale: factor of the embedding, a scalar; None: 1.
    rotaries: the positions that blocks choose from.
    norm: gain of the norm after the last block, [W].
    head: projection to the logits, [V, W]; if tied, a copy of the embedding.
    softcap: C where a logit z becomes C tanh(z / C); None: no cap.
    """

    heads: int
    groups: int
    width: int
    vocabulary: int
    positions: int
    eps: float
    special: dict[str, Any]
    embedding: Tensor
    embedding_scale: Tensor | None
    blocks: list[Block]
    rotaries: list[Rotary]
    norm: Tensor
    head: Projection
    softcap: float | None


# --- the families -----------------------------------------------------------------------------------------------------


def _no_window(config: Any, layer: int) -> None:
    return None


def _same_window(config: Any, layer: int) -> int | None:
    return config.sliding_window


def _window_of_kind(config: Any, layer: int) -> int | None:
    return config.sliding_window if config.layer_types[layer] == SLIDING else None


class Norms(NamedTuple):
    """Names of a block's norms in transformers: before attention, after, before the feed-forward network, after."""

    attention: str = "input_layernorm"
    attended: str | None = None
    feed_forward: str = "post_attention_layernorm"
    fed: str | None = None


AROUND = Norms(
    attended="post_attention_layernorm",
    feed_forward="pre_feedforward_layernorm",
    fed="post_feedforward_layernorm",
)


class Family(NamedTuple):
    """Facts about a family that the modules of its models do not tell.

    window: window(config, layer) returns the window of a layer, or None.
    norms: names of a block's norms.
    adds_1: True if the gain of a norm is 1 + its weight.
    scales_embedding: True if the embedding is multiplied by sqrt(W).
    caps_scores: True if the scores are capped, as transformers does in eager attention.
    """

    window: Callable[[Any, int], int | None]
    norms: Norms = Norms()
    adds_1: bool = False
    scales_embedding: bool = False
    caps_scores: bool = False


FAMILIES = {  # by the model_type of the configuration
    "llama": Family(_no_window),
    "mistral": Family(_same_window),
    "qwen2": Family(_window_of_kind),
    "qwen3": Family(_window_of_kind),
    "smollm3": Family(_window_of_kind),
    "gemma2": Family(_window_of_kind, AROUND, adds_1=True, scales_embedding=True, caps_scores=True),
    "gemma3_text": Family(_window_of_kind, AROUND, adds_1=True, scales_embedding=True),
}


# --- from a model to its description ----------------------------------------------------------------------------------


def describe(model: nn.Module) -> Description:
    """Describe a decoder of transformers: a ForCausalLM of FAMILIES, also with the layers of `int4.convert`.

    Matrices are copied and joined (a product for q, k and v, a product for gate and up), in their dtype.
    Raises InputError for other architectures, activations and layers, and for RoPE that changes with the length.
    """
    check_decoder(model, (nn.Linear, Int4Linear))
    config, body = model.config, model.model
    family = FAMILIES[config.model_type]
    rotaries = _rotaries(body.rotary_emb)
    kinds = list(rotaries)
    embedding = body.embed_tokens.weight.detach()
    embedding_scale = None
    if family.scales_embedding:
        embedding_scale = torch.tensor(config.hidden_size**0.5).to(embedding)
    return Description(
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        width=head_width(config),
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        eps=config.rms_norm_eps,
        special={"bos": config.bos_token_id, "eos": config.eos_token_id},
        embedding=embedding,
        embedding_scale=embedding_scale,
        blocks=[_block(layer, number, config, family, kinds) for number, layer in enumerate(body.layers)],
        rotaries=list(rotaries.values()),
        norm=_gain(body.norm, family),
        head=_joined(model.lm_head),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def head_width(config: Any) -> int:
    """Return D, the numbers of a head, from the configuration of a transformers model."""
    width = getattr(config, "head_dim", None)
    return width or config.hidden_size // config.num_attention_heads


def _block(layer: nn.Module, number: int, config: Any, family: Family, kinds: Sequence[str]) -> Block:
    """Describe layer `number` of a model; kinds: the kinds of layers with rotary positions of their own, in order."""
    attention, feed_forward = layer.self_attn, layer.mlp
    norms = [None if name is None else _gain(getattr(layer, name), family) for name in family.norms]
    attention_norm, attended_norm, feed_forward_norm, fed_norm = norms
    return Block(
        attention_norm=attention_norm,
        qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        qk_norm=_qk_norm(attention, config, family),
        rotary=_rotary(attention, number, config, kinds),
        scoring=_scoring(attention, number, config, family),
        out=_joined(attention.o_proj),
        attended_norm=attended_norm,
        feed_forward_norm=feed_forward_norm,
        gate_up=_joined(feed_forward.gate_proj, feed_forward.up_proj),
        activation=ACTIVATIONS[_activation(config)],
        down=_joined(feed_forward.down_proj),
        fed_norm=fed_norm,
    )


def _gain(norm: nn.Module, family: Family) -> Tensor:
    """Return the gain of a norm: its weight, or 1 + weight in float32, for bfloat16 would round the sum."""
    weight = norm.weight.detach()
    if not family.adds_1:
        return weight
    return weight.float() + 1


def _qk_norm(attention: nn.Module, config: Any, family: Family) -> Tensor | None:
    """Return the gains of all query heads and all KV heads, [H + Hkv, 1, D]."""
    if not hasattr(attention, "q_norm"):
        return None
    of_queries = _gain(attention.q_norm, family).expand(config.num_attention_heads, 1, -1)
    of_keys = _gain(attention.k_norm, family).expand(config.num_key_value_heads, 1, -1)
    return torch.cat([of_queries, of_keys])


def _rotaries(rotary: nn.Module) -> dict[str, Rotary]:
    """Return the rotary positions by kind of layer; of a model with the same for all layers, under FULL alone."""
    if not isinstance(rotary.rope_type, dict):
        return {FULL: Rotary(rotary.inv_freq.float(), rotary.attention_scaling)}
    by_kind = {}
    for kind in rotary.rope_type:
        frequencies = getattr(rotary, f"{kind}_inv_freq")
        by_kind[kind] = Rotary(frequencies.float(), getattr(rotary, f"{kind}_attention_scaling"))
    return by_kind


def _rotary(attention: nn.Module, number: int, config: Any, kinds: Sequence[str]) -> int | None:
    if not getattr(attention, "use_rope", True):
        return None
    if len(kinds) == 1:
        return 0
    return kinds.index(config.layer_types[number])


def _scoring(attention: nn.Module, number: int, config: Any, family: Family) -> Scoring:
    is_usual = attention.scaling == head_width(config) ** -0.5
    return Scoring(
        scale=None if is_usual else attention.scaling,
        softcap=config.attn_logit_softcapping if family.caps_scores else None,
        window=family.window(config, number),
    )


def _activation(config: Any) -> str:
    if hasattr(config, "hidden_activation"):
        return config.hidden_activation
    return config.hidden_act


def _joined(*layers: nn.Module) -> Projection:
    """Put the weights [out, in] of layers below each other: [all outs, in].

    In float32 the numbers of an input lie side by side in memory, and a float32 row is multiplied faster: measured
    with torch 2.13 on a CPU's thread, 1.1 times with 1 row and up to 1.4 times with 8. Weights of half the bytes are
    left to torch's own kernels. Raises InputError for layers of two kinds.
    """
    in_int4 = [isinstance(layer, Int4Linear) for layer in layers]
    if all(in_int4):
        return Projection(int4.joined(layers), None)
    if any(in_int4):
        raise InputError("Of q, k and v, or gate and up, only some are Int4Linears: quantize all of them, or none.")
    weight = _below_each_other([layer.weight for layer in layers])
    if weight.dtype == torch.float32:
        weight = weight.t().contiguous().t()
    has_bias = layers[0].bias is not None
    bias = _below_each_other([layer.bias for layer in layers]) if has_bias else None
    return Projection(weight, bias)


def _below_each_other(parameters: Sequence[Tensor]) -> Tensor:
    if len(parameters) == 1:
        return parameters[0].detach()
    return torch.cat([parameter.detach() for parameter in parameters])


# --- refusals ---------------------------------------------------------------------------------------------------------


def check_decoder(model: nn.Module, layers: tuple[type[nn.Module], ...]) -> None:
    """Raise InputError unless `model` is a ForCausalLM of FAMILIES with the parts of a `Description`.

    layers: the classes allowed for the projections.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES or not hasattr(model, "lm_head"):
        raise InputError(
            f"{type(model).__name__} is no decoder of the Llama type that is read here: give a Llama, Mistral, Qwen2, "
            "Qwen3, SmolLM3, Gemma2 or Gemma3 ForCausalLM, or use generate() of transformers, which has "
            "prompt_lookup_num_tokens and assistant_model for guesses."
        )
    check_loaded(model)
    rope = model.model.rotary_emb.rope_type
    ropes = rope.values() if isinstance(rope, dict) else [rope]
    _check_part("the activation", [_activation(config)], ACTIVATIONS)
    _check_part("RoPE of the type", ropes, STATIC_ROPE)
    _check_part("layers of the kind", getattr(config, "layer_types", None) or [], (FULL, SLIDING))
    if getattr(config, "use_bidirectional_attention", False):
        raise InputError("This model reads later tokens too, as an encoder does: give a decoder, whose texts grow.")
    for name, module in model.named_modules():
        if name.endswith("_proj") and not isinstance(module, layers):
            raise InputError(
                f"{name} is a {type(module).__name__}, no nn.Linear: give a model with plain layers, or convert it."
            )


def _check_part(part: str, names: Sequence[str], allowed: Sequence[str]) -> None:
    for name in names:
        if name not in allowed:
            raise InputError(f"This model has {part} {name!r}: give a model with {' or '.join(allowed)}.")
