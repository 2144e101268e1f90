"""Components of transformers: all parameters and FLOPs are somewhere, and where the shapes say they are."""

import pytest
import torch

from labkit import components, roofline
from labkit.shapes import ARCHITECTURES


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80, vocab_size=99)
    return BertModel(config).eval()


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 56, "vocab_size": 100}
    config = LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, **changes})
    return LlamaForCausalLM(config).eval()


def vit():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    return ViTModel(ViTConfig(image_size=32, patch_size=8, **sizes)).eval()


@pytest.mark.parametrize("build", [bert, vit, llama, lambda: llama(tie_word_embeddings=True)])
def test_nothing_is_lost_and_nothing_counts_twice(build):
    model = build()
    inputs = {"pixel_values": torch.zeros(1, 3, 32, 32)} if build is vit else {"input_ids": torch.arange(10)[None]}
    found = components.flops(model, **inputs)
    assert sum(components.parameters(model).values()) == sum(p.numel() for p in model.parameters())
    assert sum(found.values()) == roofline.count(model, **inputs).flops
    tokens = 17 if build is vit else 10
    assert found[components.PRODUCTS] == 4 * tokens**2 * model.config.num_hidden_layers * model.config.hidden_size


def test_flops_are_those_of_the_matrices():
    tokens, width, ffn, layers, kv = 10, 32, 56, 3, 16
    found = components.flops(llama(), input_ids=torch.arange(tokens)[None])
    assert found[components.PROJECTIONS] == 2 * tokens * layers * width * (2 * width + 2 * kv)
    assert found[components.PRODUCTS] == 4 * tokens**2 * layers * width
    assert found[components.FEED_FORWARD] == 2 * tokens * layers * 3 * width * ffn
    assert found[components.HEAD] == 2 * tokens * width * 100


def test_angles_of_the_rotary_embedding_are_no_attention_product():
    model, inputs = llama(), {"input_ids": torch.arange(10)[None]}
    before = components.flops(model, **inputs)
    rotary, forward = model.model.rotary_emb, model.model.rotary_emb.forward

    def with_a_product(*args, **kwargs):
        torch.ones(4, 3) @ torch.ones(3, 10)
        return forward(*args, **kwargs)

    rotary.forward = with_a_product
    after = components.flops(model, **inputs)
    assert {part: after[part] - before[part] for part in after if after[part] != before[part]} == {
        components.EMBEDDINGS: 2 * 4 * 3 * 10
    }


def test_bert_base_is_the_catalogue_s():
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        found = components.parameters(BertModel(BertConfig()))
    row = ARCHITECTURES["BERT-base"]
    assert sum(found.values()) == row.parameters
    assert found[components.FEED_FORWARD] == row.layers * (2 * row.width * row.ffn + row.ffn + row.width)
    assert found[components.PROJECTIONS] == row.layers * 4 * row.width * (row.width + 1)
