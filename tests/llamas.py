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


# The decoders that a Decoder takes, with all that sets each apart: kinds of layers that alternate, windows shorter than
# the texts, heads of another width, an untied head. The class in transformers and the options of its config.
WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
EAGER = {"attn_implementation": "eager"}  # transformers 5.15 takes sdpa for Gemma 2, which leaves out the cap of scores
KINDS: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 24}),
    "qwen2": ("Qwen2", WINDOWS),
    "qwen3": ("Qwen3", {**WINDOWS, "head_dim": 24}),
    "smollm3": ("SmolLM3", {"use_sliding_window": True, "sliding_window": 6, "no_rope_layer_interval": 2}),
    "gemma2": ("Gemma2", {"sliding_window": 6, "attn_logit_softcapping": 3.0, **EAGER, "final_logit_softcapping": 4.0}),
    "gemma3": ("Gemma3", {"sliding_window": 6, "sliding_window_pattern": 2}),
}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 10}


def kin(kind: str, seed: int = 0, **options) -> nn.Module:
    """A model of KINDS: four layers, every bias and gain random; options replace those of its config."""
    import transformers

    name, of_kind = KINDS[kind]
    model_class = getattr(transformers, f"{name}ForCausalLM")
    sizes = {"vocab_size": VOCABULARY, **SIZES, "num_hidden_layers": 4, "intermediate_size": 96}
    common = {"max_position_embeddings": 256, "initializer_range": 0.3, "tie_word_embeddings": False}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    gemma = GEMMA if name.startswith("Gemma") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = model_class.config_class(**{**sizes, **common, **special, **gemma, **of_kind, **options})
        model = model_class(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.generation_config.eos_token_id = None
    return model
