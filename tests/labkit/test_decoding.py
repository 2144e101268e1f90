"""A decode step computes what the whole sequence would, and leaves the cache as it found it."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from labkit import roofline
from labkit.decoding import cache_bytes, decode_step
from labkit.errors import InputError


@pytest.fixture(params=["llama", "gpt2"])
def decoder(request):
    torch.manual_seed(0)
    if request.param == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=50)).eval()
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2)).eval()


def test_step_equals_the_whole_sequence_at_every_call(decoder):
    prompt = torch.randint(0, 50, (3, 7))
    step = decode_step(decoder, prompt)
    with torch.inference_mode():
        whole = decoder(torch.cat([prompt, prompt[:, -1:]], dim=1)).logits[:, -1:]
        for _ in range(3):
            torch.testing.assert_close(step(), whole, rtol=1e-4, atol=1e-5)


def test_step_can_be_counted(decoder):
    """The cache of 7 tokens is read: bytes grow with the prompt by 2 x layers x KV heads x head size x 4."""
    short, long = (roofline.count(decode_step(decoder, torch.ones(1, n, dtype=torch.long))) for n in (7, 8))
    kv_heads = getattr(decoder.config, "num_key_value_heads", None) or decoder.config.n_head
    grows = 2 * 2 * kv_heads * 8 * 4
    assert grows <= long.bytes - short.bytes <= 2 * grows  # read, and with a copying cache written anew


def test_cache_is_as_large_as_the_shapes_say(decoder):
    kv_heads = getattr(decoder.config, "num_key_value_heads", None) or decoder.config.n_head
    assert cache_bytes(decoder, torch.ones(3, 7, dtype=torch.long)) == 3 * 7 * 2 * 2 * kv_heads * 8 * 4


@pytest.mark.parametrize(
    "prompt", [torch.ones(4, dtype=torch.long), torch.ones(1, 0, dtype=torch.long), torch.ones(1, 2)]
)
def test_prompt_that_is_none_is_refused(decoder, prompt):
    with pytest.raises(InputError, match="token ids"):
        decode_step(decoder, prompt)


def test_model_without_a_cache_is_refused():
    with pytest.raises(InputError, match="takes no KV cache"):
        decode_step(nn.Linear(2, 2), torch.ones(1, 2, dtype=torch.long))
