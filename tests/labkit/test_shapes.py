"""Shapes of transformers: parameter counts against transformers itself, bytes and FLOPs against hand figures."""

from dataclasses import replace

import pytest
import torch
import transformers
from refusals import Refusals, check_refusal, refused
from torch.utils.flop_counter import FlopCounterMode

from labkit.timing.shapes import ARCHITECTURES, Transformer

CONFIGS = {
    "GPT-2": "GPT2LMHeadModel",
    "BERT-base": "BertModel",
    "Qwen2-7B": "Qwen2ForCausalLM",
    "Mistral-7B": "MistralForCausalLM",
    "Mixtral-8x7B": "MixtralForCausalLM",
}


def config(shape: Transformer, model_class: type) -> transformers.PretrainedConfig:
    sizes = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.ffn,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.positions or 4096,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.active_experts,
    }
    return model_class.config_class(**sizes)


def on_meta(shape: Transformer, **changes) -> torch.nn.Module:
    """The model that transformers builds for this shape, without memory."""
    model_class = getattr(transformers, CONFIGS.get(shape.name, "LlamaForCausalLM"))
    settings = config(shape, model_class)
    for name, value in changes.items():
        setattr(settings, name, value)
    with torch.device("meta"):
        return model_class(settings)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_those_of_the_model_in_transformers(name: str):
    model = on_meta(ARCHITECTURES[name])
    assert ARCHITECTURES[name].parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("GPT-2", 124_439_808),
        ("BERT-base", 109_482_240),
        ("SmolLM2-135M", 134_515_008),
        ("Llama-2-7B", 6_738_415_616),
        ("Llama-3-8B", 8_030_261_248),
        ("Llama-3-70B", 70_553_706_496),
        ("Mistral-7B", 7_241_732_096),
        ("Mixtral-8x7B", 46_702_792_704),
        ("Qwen2-7B", 7_615_616_512),
    ],
)
def test_parameters_are_the_published_ones(name: str, parameters: int):
    assert ARCHITECTURES[name].parameters == parameters


def test_mixture_uses_two_experts_of_eight():
    mixtral = ARCHITECTURES["Mixtral-8x7B"]
    assert mixtral.active_parameters == pytest.approx(12.9e9, rel=0.005)  # Jiang et al. 2024: 13B active of 47B
    assert mixtral.parameters - mixtral.active_parameters == 6 * 32 * 3 * 4096 * 14336
    assert ARCHITECTURES["Mistral-7B"].active_parameters == ARCHITECTURES["Mistral-7B"].parameters


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [("Llama-2-7B", 524_288), ("Llama-3-70B", 327_680), ("Mistral-7B", 131_072), ("BERT-base", 0)],
)
def test_kv_cache_of_a_token(name: str, bytes_per_token: int):
    assert ARCHITECTURES[name].kv_bytes_per_token(16) == bytes_per_token


def test_kv_cache_grows_with_context_and_batch_and_shrinks_with_bits():
    llama = ARCHITECTURES["Llama-2-7B"]
    assert llama.kv_bytes(4096) == pytest.approx(2.147e9, rel=1e-3)
    assert llama.kv_bytes(1024, batch=32) == 32 * 1024 * 524_288
    assert llama.kv_bytes(1024, bits=8) == llama.kv_bytes(1024) / 2


def test_flops_of_bert_base_on_128_tokens():
    assert 128 * ARCHITECTURES["BERT-base"].flops_per_token(128) == pytest.approx(22.3e9, rel=0.005)


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Llama-2-7B", "Qwen2-7B", "Mistral-7B"])
def test_flops_agree_with_the_counter_of_torch(name: str):
    shape, tokens = replace(ARCHITECTURES[name], layers=1), 16
    model = on_meta(shape, num_hidden_layers=1, _attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long, device="meta"))
    assert counter.get_total_flops() == pytest.approx(tokens * shape.flops_per_token(tokens), rel=1e-4)  # and RoPE's


def test_decode_reads_all_but_the_input_embedding():
    llama = ARCHITECTURES["Llama-2-7B"]
    assert llama.read_per_step == llama.parameters - 32000 * 4096


def test_tied_head_is_read_at_every_step():
    assert ARCHITECTURES["SmolLM2-135M"].read_per_step == 134_515_008
    gpt2 = ARCHITECTURES["GPT-2"]
    assert gpt2.read_per_step == gpt2.parameters - 1024 * 768


LLAMA = ARCHITECTURES["Llama-2-7B"]
REFUSALS: Refusals = {
    "bits has to be between 1 and 64 a number, got 0": lambda: LLAMA.weight_bytes(0),
    "bits has to be between 1 and 64 a number, got 128": lambda: LLAMA.kv_bytes_per_token(128),
    "context is -1, but it must be a whole number from 0": lambda: LLAMA.flops_per_token(-1),
    "batch is 0.5, but it must be a whole number from 1": lambda: LLAMA.kv_bytes(1, batch=0.5),
}


@refused(REFUSALS)
def test_bad_input_is_refused_in_one_sentence(words, call):
    check_refusal(words, call)
