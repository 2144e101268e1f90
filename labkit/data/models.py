"""The course's models: each function gives one in eval mode, fp32, on the CPU.

Random weights are for shapes only: good for time and bytes, never for accuracy. Weights are read through safetensors
or weights_only=True. Nothing is downloaded here.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from labkit.data import datasets, fetch, training
from labkit.data.efficientnet import EfficientNetLite0, load_reference_
from labkit.data.resnet import ResNet20
from labkit.errors import check_choice
from labkit.files import cache_dir


def resnet20(pretrained: bool = True) -> ResNet20:
    """ResNet-20 for Fashion-MNIST from the committed checkpoint, or untrained with pretrained=False."""
    model = ResNet20()
    if pretrained:
        model.load_state_dict(safetensors.torch.load_file(fetch.path("checkpoints/resnet20-fashion-mnist.safetensors")))
    return model.eval()


def efficientnet_lite0() -> EfficientNetLite0:
    """EfficientNet-lite0, ImageNet, 1000 classes, pretrained; inputs come from `imagenet_input`."""
    weights = torch.load(
        fetch.path("efficientnet_lite0") / "efficientnet-lite0.pth", weights_only=True, map_location="cpu"
    )
    model = EfficientNetLite0()
    load_reference_(model, weights)
    return model.eval()


def imagenet_input(images: Sequence[Image.Image]) -> Tensor:
    """Photos as EfficientNet-lite0 wants them [N, 3, 224, 224]: shorter side to 256, middle 224, (x - 127) / 128."""
    from torchvision.transforms import v2

    steps = [v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()]
    pixels = torch.stack([v2.Compose(steps)(image.convert("RGB")) for image in images])  # uint8 [N, 3, 224, 224]
    return (pixels.float() - 127) / 128


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2, a BertModel: 6 layers, 12 heads, 384 wide; pretrained."""
    from transformers import BertModel

    with quietly():
        model = BertModel.from_pretrained(fetch.path("minilm"), local_files_only=True)
    return model.eval()


def minilm_classifier() -> nn.Module:
    """MiniLM with a head of two classes, a BertForSequenceClassification; the head's weights are random."""
    from transformers import BertForSequenceClassification

    with quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification.from_pretrained(fetch.path("minilm"), num_labels=2, local_files_only=True)
    return model.eval()


def with_delta(model: nn.Module, delta: dict[str, Tensor]) -> nn.Module:
    """A copy of `model` with a low-rank delta added (LoRA, Hu et al. 2021, equation 3).

    delta: "<layer>.up" [out, r] and "<layer>.down" [r, in], whose product is added to the layer's weight [out, in];
        every other name is a parameter that replaces the model's.
    """
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in delta.items():
        layer, _, role = name.rpartition(".")
        if role == "up":
            state[f"{layer}.weight"] += tensor.float() @ delta[f"{layer}.down"].float()
        elif role != "down":
            state[name] = tensor.float()
    adapted = copy.deepcopy(model)
    adapted.load_state_dict(state)
    return adapted.eval()


def minilm_finetuned() -> nn.Module:
    """MiniLM fine-tuned on the review snippets, two classes: the fetched model plus the committed low-rank delta.

    data/checkpoints/minilm-reviews-delta.json says how it was made, and its accuracy beside whole fine-tuning's.
    """
    delta = safetensors.torch.load_file(fetch.path("checkpoints/minilm-reviews-delta.safetensors"))
    return with_delta(minilm_classifier(), delta)


def review_batches(
    split: str, n: int | None = None, *, batch_size: int = 32, max_len: int = 48, seed: int | None = None
):
    """Snippets of a split as MiniLM takes them: input_ids and attention_mask [B, T <= max_len], labels [B]."""
    data = datasets.reviews(split, n)
    encoded = tokenizer("minilm")(
        data.texts, padding="max_length", truncation=True, max_length=max_len, return_tensors="pt"
    )
    tensors = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": data.labels}
    return training.Batches(tensors, batch_size, seed, collate=_trim)


def smollm2(dtype: torch.dtype = torch.float32) -> nn.Module:
    """SmolLM2-135M-Instruct, a LlamaForCausalLM with 30 layers; its weights are dequantised Q4_1, so call it so."""
    from transformers import LlamaForCausalLM

    with quietly():
        model = LlamaForCausalLM.from_pretrained(_smollm2_folder(), dtype=dtype, local_files_only=True)
    return model.eval()


def tokenizer(name: str) -> Any:
    """The tokenizer of "minilm" (also the fine-tuned one) or "smollm2"; works offline."""
    from transformers import AutoTokenizer

    folders = {"minilm": lambda: fetch.path("minilm"), "smollm2": _smollm2_folder}
    check_choice(name, folders, "tokenizer")
    with quietly():
        return AutoTokenizer.from_pretrained(folders[name](), local_files_only=True)


def resnet50() -> nn.Module:
    """ResNet-50 (He et al. 2016), images [N, 3, 224, 224]; random weights, shapes only."""
    from torchvision.models import resnet50

    return _random(lambda: resnet50(weights=None))


def bert_base() -> nn.Module:
    """BERT-base (Devlin et al. 2019), a BertModel: 12 layers, 12 heads, 768 wide; random weights, shapes only."""
    from transformers import BertConfig, BertModel

    return _random(lambda: BertModel(BertConfig()))  # the library's defaults are bert-base-uncased


def llama3_8b_layer(dtype: torch.dtype = torch.float32) -> nn.Module:
    """One decoder layer of Llama-3-8B (Dubey et al. 2024, table 3), [B, T, 4096] to the same; random weights."""
    return _random(lambda: _LlamaLayer(dtype))


class _LlamaLayer(nn.Module):
    """A layer with its rotary embedding, so that it can be called with hidden states alone; causal, without a cache."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        config = LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            max_position_embeddings=8192,
            attn_implementation="sdpa",
        )
        self.rotary = LlamaRotaryEmbedding(config)
        self.layer = LlamaDecoderLayer(config, layer_idx=0).to(dtype)

    def forward(self, hidden: Tensor) -> Tensor:  # [B, T, 4096]
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]  # [1, T]
        return self.layer(hidden, attention_mask=None, position_embeddings=self.rotary(hidden, positions))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """transformers without its progress bars, which would land in a notebook's output; the setting is put back."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _random(build: Callable[[], nn.Module]) -> nn.Module:
    """A model with random weights, the same at every call; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def _smollm2_folder() -> Path:
    """The folder of an fp16 copy of SmolLM2, made from its GGUF file at the first call."""
    return fetch.build_once(cache_dir() / "smollm2-fp16", _dequantise)


def _dequantise(folder: Path) -> None:
    """Write what llama.cpp's Q4_1 file stands for (w = d q + m, groups of 32) as fp16 safetensors into `folder`.

    The precision that was lost stays lost. transformers flags the model that it reads as quantised, so its weights are
    copied into a plain one.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source, (file,) = fetch.path("smollm2"), fetch.asset("smollm2").files
    with quietly():
        loaded = LlamaForCausalLM.from_pretrained(source, gguf_file=file.path, dtype=torch.float32)
        config = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        plain = LlamaForCausalLM(LlamaConfig.from_dict(config))
        plain.load_state_dict(loaded.state_dict())
        plain.half().save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=file.path).save_pretrained(folder)


def _trim(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut a batch to its longest text; padding beyond it would be computed and thrown away."""
    longest = int(batch["attention_mask"].sum(1).max())
    return {name: tensor[:, :longest] if tensor.ndim == 2 else tensor for name, tensor in batch.items()}
