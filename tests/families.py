"""A small random model of every family that `labkit.pruning.transformers` serves, by config, and an input for each."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 61
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
BERT = {"vocab_size": VOCABULARY, **SIZES, "intermediate_size": 24, "pad_token_id": 0}
LLAMA = {**BERT, **TOKENS, "num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 24, "n_positions": 64}
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 24}
OPT = {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
VIT = {**SIZES, "intermediate_size": 24, "image_size": 16, "patch_size": 8}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4}
NEO = {**SIZES, "attention_types": [[["global", "local", "global"], 1]], "intermediate_size": 24}
LATENT = {"q_lora_rank": 20, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10}
FALCON = {**BERT, "ffn_hidden_size": 24, "num_kv_heads": 2}
NAMES = {  # of a size in the configs
    "width": ("hidden_size", "n_embd", "dim", "d_model", "word_embed_proj_dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_size": ("head_dim", "d_kv"),
    "neurons": ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim", "d_ff", "ffn_hidden_size"),
    "vocabulary": ("vocab_size",),
}


def _build(name: str, **options) -> Callable[..., nn.Module]:
    def build(**sizes: int | bool) -> nn.Module:
        """sizes: see NAMES; those that the config does not have are left out. Other names are the config's own."""
        import transformers

        from labkit.data.models import quietly

        if options.keys() >= LATENT.keys():
            sizes.pop("kv_heads", None)  # one for each head
        new = {}
        for size, n in sizes.items():
            if size in NAMES:
                new |= {name: n for name in NAMES[size] if name in options}
            else:
                new[size] = n
        with quietly():
            kind = getattr(transformers, name)
            return kind(kind.config_class(**options | new))

    return build


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "bert": _build("BertForSequenceClassification", **BERT),
    "roberta": _build("RobertaForSequenceClassification", **BERT),
    "distilbert": _build("DistilBertForSequenceClassification", **DISTILBERT),
    "minilm": _build("BertModel", **{**BERT, "num_attention_heads": 8}),
    "gpt2": _build("GPT2LMHeadModel", vocab_size=VOCABULARY, **GPT2, bos_token_id=1, eos_token_id=2),
    "opt": _build("OPTForCausalLM", vocab_size=VOCABULARY, **OPT, **TOKENS),
    "llama": _build("LlamaForCausalLM", **LLAMA),
    "qwen2": _build("Qwen2ForCausalLM", **LLAMA),
    "qwen3": _build("Qwen3ForCausalLM", **LLAMA, head_dim=8),
    "mistral": _build("MistralForCausalLM", **LLAMA),
    "gemma": _build("GemmaForCausalLM", **{**LLAMA, "num_key_value_heads": 1}, head_dim=8),
    "vit": _build("ViTForImageClassification", **VIT),
    "t5": _build("T5ForConditionalGeneration", **T5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2),
    "phi": _build("PhiForCausalLM", **BERT),
    "neox": _build("GPTNeoXForCausalLM", **BERT),  # query, key and value of a head side by side
    # the same by KV group; attention beside the feed-forward network
    "falcon": _build("FalconForCausalLM", **FALCON, new_decoder_architecture=True),
    "olmo2": _build("Olmo2ForCausalLM", **LLAMA),  # a norm over all query heads, one over all keys
    # four blocks with queries, values and keys of two heads each
    "codegen": _build("CodeGenForCausalLM", vocab_size=VOCABULARY, **{**GPT2, "n_head": 8}, rotary_dim=2, **TOKENS),
    "gpt_neo": _build("GPTNeoForCausalLM", vocab_size=VOCABULARY, **NEO, bos_token_id=1, eos_token_id=2),
    "phi3": _build("Phi3ForCausalLM", **LLAMA),  # its forward pass reads numbers of heads from the config
    "deepseek": _build("DeepseekV3ForCausalLM", **{**LLAMA, "num_key_value_heads": 4}, **LATENT),
    "roformer": _build("RoFormerForSequenceClassification", **BERT, is_decoder=False),  # positions in pairs
    "modernbert": _build("ModernBertForSequenceClassification", **BERT),
}
MORE = {"stablelm": _build("StableLmForCausalLM", **LLAMA)}  # rotary positions in a quarter of a head
DECODERS = ("gpt2", "opt", "llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "neox", "falcon", "olmo2", "codegen")
DECODERS += ("gpt_neo", "phi3", "deepseek")
GROUPED = ("llama", "qwen2", "qwen3", "mistral", "olmo2")  # two KV heads with two query heads each


def family(name: str, **sizes: int | bool) -> nn.Module:
    """The model with random weights, scales and biases, the same at every call, in eval mode. sizes: as in _build."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = {**FAMILIES, **MORE}[name](**sizes).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # a mistaken slice shows, and attention looks at some tokens only
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return model


def inputs(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Three sequences, two of them padded at the right, or two images."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 4:] = 0, 0
    found = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if name == "t5":
        found["decoder_input_ids"] = torch.randint(3, VOCABULARY, (3, 5), generator=generator)
    return found


def batches(name: str, cut: int = 2, pad: int = 0) -> list[dict[str, Tensor]]:
    """The same six examples in batches of `cut`, with `pad` more columns of padding; labels where it is BERT's."""
    generator = torch.Generator().manual_seed(1)
    ids = F.pad(torch.randint(3, 61, (6, 8), generator=generator), (0, pad))
    mask = (torch.arange(8 + pad) < torch.tensor([8, 5, 7, 3, 8, 6])[:, None]).long()
    data = {"input_ids": ids * mask, "attention_mask": mask}
    if name == "bert":
        data["labels"] = torch.tensor([0, 1, 1, 0, 1, 0])
    return [{key: x[i : i + cut] for key, x in data.items()} for i in range(0, 6, cut)]


def mean_loss(model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    """Over all terms of the batches, as `summed_loss` counts them."""
    from labkit.modules.losses import summed_loss

    with torch.no_grad():
        sums = [summed_loss(model, batch) for batch in data]
    return float(sum(loss for loss, _ in sums)) / sum(terms for _, terms in sums)


def heads_to_remove(name: str) -> dict[int, list[int]]:
    """A choice that leaves layers of different sizes: single heads, a whole KV group, one head of each group, both."""
    if name in GROUPED:
        return {0: [0, 1], 1: [1, 2], 2: [0, 1, 3]}
    if name in ("falcon", "codegen", "phi3"):
        return {0: [0, 1], 2: [2, 3]}
    if name == "t5":  # encoder self, encoder self, then decoder self, cross, self, cross
        return {0: [1], 1: [1], 3: [0, 2], 5: [0, 2]}
    return {0: [1], 2: [0, 3]}
