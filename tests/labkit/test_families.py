"""Decoders of every family against transformers: logits, greedy texts however they are made, and every part counts."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import family
from llamas import KINDS, greedy, kin, text
from refusals import Refusals, check_refusal, refused
from torch import Tensor, nn

from labkit.attention import speculative
from labkit.attention.cache import EvictingCache, KVCache, QuantizedCache
from labkit.attention.decoder import Decoder
from labkit.attention.families import Projection
from labkit.deploy import serving
from labkit.modules import kv_cache
from labkit.quantization import weight_only
from labkit.quantization.kv import KVFormat
from labkit.storage import int4

TOLERANCE = 9 * 96 * 2**-23  # that of Llama's test for two layers; these have four
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e3}
VARIANTS = {
    **{kind: (kind, {}) for kind in KINDS},
    **{f"{kind}, tied": (kind, {"tie_word_embeddings": True}) for kind in KINDS},
    **{f"{kind}, eager": (kind, {"attn_implementation": "eager"}) for kind in KINDS if kind != "gemma2"},
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True}),
    "smollm3, linear": ("smollm3", {"rope_parameters": LINEAR}),
    "smollm3 with biases": ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    "gemma2 without caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2 with biases": ("gemma2", {"attention_bias": True}),
    "gemma3 with a cap of the logits": ("gemma3", {"final_logit_softcapping": 4.0}),
    "gemma3, silu": ("gemma3", {"hidden_activation": "silu"}),
}


def logits(net: Decoder, ids: Tensor, pieces: tuple[int, ...], cache=None) -> Tensor:
    cache = cache or net.cache(ids.shape[1])
    states = [net.hidden(piece, cache) for piece in ids.split(pieces, 1)]
    return net.logits(torch.cat(states, 1))


def difference(logits: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


# --- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_its_logits_are_transformers_with_a_cache_and_without(variant):
    kind, options = VARIANTS[variant]
    model, ids = kin(kind, **options), text(40)
    net, expected = Decoder(model), model(ids).logits
    for pieces in ((40,), (1,) * 40, (17, 1, 22), (39, 1)):
        assert difference(logits(net, ids, pieces), expected) <= TOLERANCE
    argument, filled = kv_cache.filled_cache(model, ids[:, :25])
    rest = model(ids[:, 25:], **{argument: filled}).logits
    assert difference(logits(net, ids, (25, 15))[:, 25:], rest) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_sequences_of_a_batch_do_not_meet_and_a_cropped_cache_is_that_of_the_shorter_text(kind):
    model, ids = kin(kind, seed=1), torch.cat([text(30, seed) for seed in range(3)])
    net = Decoder(model)
    cache = net.cache(30, batch=3)
    net.hidden(ids[:, :12], cache)
    net.hidden(ids[:, :9], cache)  # guesses that turn out wrong
    cache.crop(12)
    rest = net.logits(net.hidden(ids[:, 12:], cache))
    assert difference(rest, model(ids).logits[:, 12:]) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_in_bfloat16_it_is_as_near_to_float32_as_transformers(kind):
    """A gain of 1 + weight that was rounded to bfloat16 would be 1.2 times as far from it."""
    ours, theirs, ids = 0.0, 0.0, text(40)
    for seed in range(6):
        model = kin(kind, seed, initializer_range=0.1)
        exact = model(ids).logits
        half = model.bfloat16()
        ours += float((logits(Decoder(half), ids, (20, 20)) - exact).square().mean().sqrt())
        theirs += float((half(ids).logits - exact).square().mean().sqrt())
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 4])
def test_greedy_texts_are_transformers_whoever_guesses(kind, k):
    model, prompt = kin(kind), text(7).repeat(1, 3)
    expected = greedy(model, prompt, 40)
    assert len(expected[0, 21:].unique()) > 10, "or the test shows little"
    kinds = list(KINDS)
    next_kind = kinds[(kinds.index(kind) + 1) % len(kinds)]
    for draft in ("lookup", kin(next_kind), model):
        written = speculative.generate(model, prompt, draft=draft, k=k, max_new_tokens=40)
        assert torch.equal(written.ids, expected)
    assert written.accepted == written.proposed  # the model guesses as it writes


LENGTHS, NEW = [5, 1, 33, 12, 20], [9, 30, 4, 24, 6]
WAYS = {
    "pages of 16": {"page_size": 16},
    "pages of a token": {"page_size": 1},
    "prompts in chunks": {"page_size": 3, "chunk": 4},
    "static": {"page_size": 4, "batching": "static", "max_batch": 2},
    "scarce pages": {"page_size": 4, "pages": 15},
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_way_of_serving_changes_a_token(kind):
    model, prompts = kin(kind), [text(n, seed)[0] for seed, n in enumerate(LENGTHS)]
    prompts[4][:16] = prompts[2][:16]  # pages to share, of more tokens than a window
    alone = [greedy(model, prompt[None], new)[0] for prompt, new in zip(prompts, NEW, strict=True)]
    for way, options in WAYS.items():
        served = serving.serve(model, prompts, max_new_tokens=NEW, **options)
        assert all(map(torch.equal, served.ids, alone)), way


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_in_int4_it_is_the_model_with_the_same_layers(kind):
    small = weight_only.quantize(kin(kind), 4, group_size=16)
    small.lm_head = weight_only.quantize(small.lm_head, 4, group_size=16)
    real, ids = int4.convert(small), text(12)
    net = Decoder(real)
    # Attention adds up in another order: an activation near a tie may get the next code, 1/127 of its group's largest.
    assert difference(logits(net, ids, (12,)), real(ids).logits) <= 2 / 127
    written = speculative.generate(net, ids, k=0, max_new_tokens=30)
    assert torch.equal(written.ids, greedy(real, ids, 30))


# --- other caches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_cache_in_codes_that_rounds_nothing_is_the_cache(kind):
    net, ids = Decoder(kin(kind)), text(40)
    cache = QuantizedCache(net.layout, 1, KVFormat(None, None))
    expected = logits(net, ids, (20, 20), KVCache(net.layout, 1, 40))
    assert difference(logits(net, ids, (20, 1, 19), cache), expected) <= TOLERANCE


@torch.inference_mode()
def test_a_cache_with_room_for_all_entries_caps_the_scores():
    options = {"layer_types": ["full_attention"] * 4}
    model, ids = kin("gemma2", **options), text(30)
    net = Decoder(model)
    cache = EvictingCache(net.layout, 1, 30)
    assert difference(logits(net, ids, (11, 1, 18), cache), model(ids).logits) <= TOLERANCE


# --- every part counts ------------------------------------------------------------------------------------------------


Mutation = Callable[[Decoder], None]


def blocks(field: str, change: Callable) -> Mutation:
    """Change a field of every Block."""

    def mutate(net: Decoder) -> None:
        net.blocks = [replace(block, **{field: change(getattr(block, field))}) for block in net.blocks]
        net.layout = net.layout._replace(scorings={n: block.scoring for n, block in enumerate(net.blocks)})

    return mutate


def whole(attribute: str, change: Callable) -> Mutation:
    """Change an attribute of the Decoder."""
    return lambda net: setattr(net, attribute, change(getattr(net, attribute)))


def nothing(_: object) -> None:
    return None


def without_bias(projection: Projection) -> Projection:
    return projection._replace(bias=None)


def minus_1(gain: Tensor) -> Tensor:
    return gain - 1


def scored(**changes: float | None) -> Mutation:
    return blocks("scoring", lambda scoring: scoring._replace(**changes))


def tied(head: Projection) -> Projection:
    return head._replace(weight=kin("qwen2").model.embed_tokens.weight)


MUTATIONS: dict[str, tuple[str, Mutation]] = {  # a part: a kind that has it, and how to do without or otherwise
    "biases of queries, keys and values": ("qwen2", blocks("qkv", without_bias)),
    "bias of what the heads read": ("llama", blocks("out", without_bias)),
    "biases of gate and features": ("llama", blocks("gate_up", without_bias)),
    "bias of the result": ("llama", blocks("down", without_bias)),
    "norms of queries and keys": ("qwen3", blocks("qk_norm", nothing)),
    "gains of queries and keys": ("qwen3", blocks("qk_norm", torch.ones_like)),
    "gains of queries and keys are 1 + weight": ("gemma3", blocks("qk_norm", minus_1)),
    "gains are 1 + weight": ("gemma2", blocks("feed_forward_norm", minus_1)),
    "gain of the last norm is 1 + weight": ("gemma3", whole("norm", minus_1)),
    "gains before attention": ("smollm3", blocks("attention_norm", torch.ones_like)),
    "norm after attention": ("gemma2", blocks("attended_norm", nothing)),
    "norm after the feed-forward network": ("gemma3", blocks("fed_norm", nothing)),
    "layers without positions": ("smollm3", blocks("rotary", lambda _: 0)),
    "layers with positions": ("smollm3", blocks("rotary", nothing)),
    "positions of full attention": ("gemma3", blocks("rotary", lambda _: 1)),
    "positions in a window": ("gemma3", blocks("rotary", lambda _: 0)),
    "windows": ("mistral", scored(window=None)),
    "size of a window": ("mistral", scored(window=6)),
    "windows in the last layers": ("qwen2", scored(window=None)),
    "all tokens in the first layers": ("qwen3", scored(window=7)),
    "windows without positions": ("smollm3", scored(window=None)),
    "windows in every other layer": ("gemma2", scored(window=6)),
    "scale of the scores": ("gemma3", scored(scale=None)),
    "cap of the scores": ("gemma2", scored(softcap=None)),
    "cap of the logits": ("gemma2", whole("softcap", nothing)),
    "activation": ("gemma2", blocks("activation", lambda _: F.silu)),
    "scale of the embedding": ("gemma3", whole("embedding_scale", nothing)),
    "untied head": ("qwen2", whole("head", tied)),
    "eps of the norms": ("qwen2", whole("eps", lambda _: 0.1)),
}


@pytest.mark.parametrize("part", MUTATIONS)
@torch.inference_mode()
def test_every_part_of_the_description_counts(part):
    kind, mutate = MUTATIONS[part]
    net, ids = Decoder(kin(kind)), text(40)
    expected = logits(net, ids, (20, 1, 19))
    mutate(net)
    assert difference(logits(net, ids, (20, 1, 19)), expected) > 100 * TOLERANCE


# --- what is not taken ------------------------------------------------------------------------------------------------


def small(name: str, **options) -> nn.Module:
    """A model of another class of transformers, of a few thousand parameters."""
    model_class = getattr(transformers, name)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return model_class(model_class.config_class(**{**sizes, "intermediate_size": 24, **options}))


def with_images() -> nn.Module:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {"text_config": kin("gemma3").config, "vision_config": {**vision, "image_size": 16, "patch_size": 8}}
    return transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**parts))


def with_another_layer() -> nn.Module:
    model = kin("qwen2")
    model.model.layers[1].mlp.up_proj = nn.Sequential(nn.Linear(64, 96))
    return model


HYBRID = {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "head_dim": 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
REFUSALS: Refusals = {
    "MixtralForCausalLM is no decoder of the Llama type": lambda: Decoder(small("MixtralForCausalLM")),
    "Qwen3MoeForCausalLM is no decoder of the Llama type": lambda: Decoder(small("Qwen3MoeForCausalLM")),
    "GPTNeoXForCausalLM is no decoder of the Llama type": lambda: Decoder(small("GPTNeoXForCausalLM")),
    "Qwen3NextForCausalLM is no decoder of the Llama type": lambda: Decoder(small("Qwen3NextForCausalLM", **HYBRID)),
    "Gemma3ForConditionalGeneration is no decoder of the Llama type": lambda: Decoder(with_images()),
    "GemmaForCausalLM is no decoder of the Llama type": lambda: Decoder(family("gemma")),
    "Qwen3Model is no decoder of the Llama type": lambda: Decoder(kin("qwen3").model),
    "or use generate() of transformers, which has": lambda: speculative.generate(
        kin("qwen2"), text(4), draft=family("phi3")
    ),
    "give a Llama, Mistral, Qwen2, Qwen3, SmolLM3, Gemma2 or Gemma3 ForCausalLM": lambda: serving.generate(
        family("opt"), [text(4)], max_new_tokens=2
    ),
    "This model has the activation 'gelu': give a model with silu or gelu_pytorch_tanh.": lambda: Decoder(
        kin("qwen2", hidden_act="gelu")
    ),
    "RoPE of the type 'dynamic': give a model with default or linear or": lambda: Decoder(
        kin("qwen3", rope_parameters=DYNAMIC)
    ),
    "This model reads later tokens too": lambda: Decoder(kin("gemma3", use_bidirectional_attention=True)),
    "model.layers.1.mlp.up_proj is a Sequential, no nn.Linear": lambda: Decoder(with_another_layer()),
    "only some are Int4Linears": lambda: Decoder(half_in_int4()),
}


def half_in_int4() -> nn.Module:
    model = kin("qwen2")
    real = int4.convert(weight_only.quantize(copy.deepcopy(model), 4, group_size=16))
    model.model.layers[0].self_attn.q_proj = real.model.layers[0].self_attn.q_proj
    return model


@refused(REFUSALS)
def test_what_is_not_taken_is_refused_in_a_sentence(words, call):
    check_refusal(words, call)
