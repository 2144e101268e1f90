"""Models of the course: each function returns a model in eval mode, fp32, on the CPU.

Random weights are for shapes only: good for time and bytes, never for accuracy. Weights are read through safetensors
or weights_only=True, from committed files or from models that `./lab data fetch` has brought; no function downloads.
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
    """Load ResNet-20 for Fashion-MNIST, images [N, 1, 28, 28].

    pretrained: True for the weights of the committed checkpoint, False for random weights.
    """
    model = ResNet20()
    if pretrained:
        weights = safetensors.torch.load_file(fetch.path("checkpoints/resnet20-fashion-mnist.safetensors"))
        model.load_state_dict(weights)
    return model.eval()


def efficientnet_lite0() -> EfficientNetLite0:
    """Load EfficientNet-lite0, pretrained on ImageNet, 1000 classes; inputs come from `imagenet_input`."""
    path = fetch.path("efficientnet_lite0") / "efficientnet-lite0.pth"
    weights = torch.load(path, weights_only=True, map_location="cpu")
    model = EfficientNetLite0()
    load_reference_(model, weights)
    return model.eval()


def imagenet_input(images: Sequence[Image.Image]) -> Tensor:
    """Turn photos into inputs of EfficientNet-lite0 [N, 3, 224, 224]: shorter side 256, middle 224, (x - 127) / 128."""
    from torchvision.transforms import v2

    crop = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()])
    pixels = torch.stack([crop(image.convert("RGB")) for image in images])  # uint8 [N, 3, 224, 224]
    return (pixels.float() - 127) / 128


def minilm() -> nn.Module:
    """Load all-MiniLM-L6-v2, a pretrained BertModel: 6 layers, 12 heads, 384 wide."""
    from transformers import BertModel

    with quietly():
        model = BertModel.from_pretrained(fetch.path("minilm"), local_files_only=True)
    return model.eval()


def minilm_classifier() -> nn.Module:
    """Load MiniLM with a head of two classes, a BertForSequenceClassification; the head's weights are random."""
    from transformers import BertForSequenceClassification

    with quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification.from_pretrained(fetch.path("minilm"), num_labels=2, local_files_only=True)
    return model.eval()


def with_delta(model: nn.Module, delta: dict[str, Tensor]) -> nn.Module:
    """Copy a model and add a low-rank delta to it (LoRA, Hu et al. 2021, equation 3).

    delta: "<layer>.up" [out, r] and "<layer>.down" [r, in]: the product is added to the layer's weight [out, in]. Every
        further name is a parameter that replaces the model's.
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
    """Load MiniLM fine-tuned on the review snippets, two classes: the fetched model plus the committed low-rank delta.

    data/checkpoints/minilm-reviews-delta.json holds the recipe, and the accuracy beside whole fine-tuning's.
    """
    delta = safetensors.torch.load_file(fetch.path("checkpoints/minilm-reviews-delta.safetensors"))
    return with_delta(minilm_classifier(), delta)


def review_batches(
    split: str, n: int | None = None, *, batch_size: int = 32, max_len: int = 48, seed: int | None = None
) -> training.Batches:
    """Tokenize review snippets for MiniLM: batches {input_ids, attention_mask [B, T <= max_len], labels [B]}.

    split, n: as in `datasets.reviews`.
    batch_size, seed: as in `training.Batches`.
    max_len: most tokens of a snippet; a longer snippet is cut.
    """
    data = datasets.reviews(split, n)
    encoded = tokenizer("minilm")(
        data.texts, padding="max_length", truncation=True, max_length=max_len, return_tensors="pt"
    )
    tensors = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": data.labels}
    return training.Batches(tensors, batch_size, seed, collate=_trim)


def smollm2(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load SmolLM2-135M-Instruct, a LlamaForCausalLM with 30 layers; the weights are dequantised Q4_1: say so."""
    from transformers import LlamaForCausalLM

    with quietly():
        model = LlamaForCausalLM.from_pretrained(_smollm2_folder(), dtype=dtype, local_files_only=True)
    return model.eval()


def tokenizer(name: str) -> Any:
    """Load the tokenizer of "minilm", fine-tuned or not, or of "smollm2"; works offline."""
    from transformers import AutoTokenizer

    check_choice(name, ("minilm", "smollm2"), "tokenizer")
    folder = fetch.path("minilm") if name == "minilm" else _smollm2_folder()
    with quietly():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def resnet50() -> nn.Module:
    """Make ResNet-50 (He et al. 2016), images [N, 3, 224, 224]; random weights, for shapes only."""
    from torchvision.models import resnet50

    return _random(lambda: resnet50(weights=None))


def bert_base() -> nn.Module:
    """Make BERT-base (Devlin et al. 2019), a BertModel: 12 layers, 12 heads, 768 wide; random weights, for shapes."""
    from transformers import BertConfig, BertModel

    return _random(lambda: BertModel(BertConfig()))  # the library's defaults are bert-base-uncased


def llama3_8b_layer(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make a decoder layer of Llama-3-8B (Dubey et al. 2024, table 3), [B, T, 4096] to [B, T, 4096]; random weights."""
    return _random(lambda: _LlamaLayer(dtype))


class _LlamaLayer(nn.Module):
    """A decoder layer and the rotary embedding, to be called with hidden states alone; causal, without a cache."""

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
    """Hide the progress bars and warnings of transformers, which would land in a notebook's output, for a block."""
    from transformers.utils import logging

    has_bars = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def _random(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with random weights, the same at every call; the caller's random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def _smollm2_folder() -> Path:
    """Return the folder of an fp16 copy of SmolLM2, made from the GGUF file at the first call."""
    return fetch.build_once(cache_dir() / "smollm2-fp16", _dequantise)


def _dequantise(folder: Path) -> None:
    """Write the weights of llama.cpp's Q4_1 file (w = d q + m, groups of 32) as fp16 safetensors into `folder`.

    The lost precision stays lost. transformers flags a model from a GGUF file as quantised, so the weights are copied
    into a plain model.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = fetch.path("smollm2")
    (file,) = fetch.asset("smollm2").files
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
    trimmed = dict(batch)
    for name, tensor in batch.items():
        if tensor.ndim == 2:
            trimmed[name] = tensor[:, :longest]
    return trimmed
