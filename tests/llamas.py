"""Small random decoders of the Llama type whose texts vary: the logits of usual initial weights hardly differ."""

import torch
from torch import Tensor, nn

VOCABULARY = 61
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(seed: int = 0, **options) -> nn.Module:
    """Two layers, 64 wide, 4 heads on 2 of keys; options replace those of its LlamaConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": VOCABULARY, **SIZES, "intermediate_size": 96, "max_position_embeddings": 256}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, "initializer_range": 0.3, **options})).eval()
    model.generation_config.eos_token_id = None  # a text ends by its length
    return model


def text(tokens: int, seed: int = 0) -> Tensor:
    """Random token ids, [1, tokens]."""
    return torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def greedy(model: nn.Module, ids: Tensor, new: int) -> Tensor:
    """What transformers generates, prompt included, [1, T + new]."""
    everything = torch.ones_like(ids)  # else it takes token 0 for padding
    return model.generate(ids, attention_mask=everything, max_new_tokens=new, do_sample=False, pad_token_id=0)
