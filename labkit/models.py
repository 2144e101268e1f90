"""The course's models by name: each function gives one in eval mode, fp32, on the CPU, with verified weights.

`MODELS` lists them and says what their weights are: trained here, pretrained, dequantised from 4 bits, or random
(shapes only: good for time and bytes, never for accuracy). Weights are read through safetensors or weights_only=True;
nothing is downloaded here except by `hub`.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from labkit import datasets, store, training
from labkit.efficientnet import EfficientNetLite0, load_reference_
from labkit.errors import DataError, InputError
from labkit.resnet import ResNet20

TRAINED_HERE = "trained here"
PRETRAINED = "pretrained"
DEQUANTISED = "dequantised Q4_1"
RANDOM = "random, shapes only"


@dataclass(frozen=True)
class Model:
    """A row of MODELS: what builds it, one line about it, what its weights are, their licence ("" where random)."""

    load: Callable[..., nn.Module]
    about: str
    weights: str
    licence: str = ""


def resnet20(pretrained: bool = True) -> ResNet20:
    """ResNet-20 for Fashion-MNIST from the committed checkpoint, or untrained with pretrained=False."""
    model = ResNet20()
    if pretrained:
        model.load_state_dict(safetensors.torch.load_file(store.path("checkpoints/resnet20-fashion-mnist.safetensors")))
    return _finished(model, TRAINED_HERE if pretrained else RANDOM)


def efficientnet_lite0() -> EfficientNetLite0:
    """EfficientNet-lite0, ImageNet, 1000 classes (`imagenet_classes` names them); inputs come from `imagenet_input`."""
    weights = torch.load(
        store.path("efficientnet_lite0") / "efficientnet-lite0.pth", weights_only=True, map_location="cpu"
    )
    model = EfficientNetLite0()
    load_reference_(model, weights)
    return _finished(model, PRETRAINED)


def imagenet_classes() -> list[str]:
    """The 1000 class names in the order of the logits."""
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.DEFAULT.meta["categories"])


def imagenet_input(images: Sequence[Image.Image]) -> Tensor:
    """Photos as EfficientNet-lite0 wants them [N, 3, 224, 224]: shorter side to 256, middle 224, (x - 127) / 128."""
    from torchvision.transforms import v2

    steps = [v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()]
    pixels = torch.stack([v2.Compose(steps)(image.convert("RGB")) for image in images])  # uint8 [N, 3, 224, 224]
    return (pixels.float() - 127) / 128


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2, a BertModel: 6 layers, 12 heads, 384 wide; sentence vectors are `mean_pool` of its output."""
    from transformers import BertModel

    with quietly():
        model = BertModel.from_pretrained(store.path("minilm"), local_files_only=True)
    return _finished(model, PRETRAINED)


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Unit sentence vectors [N, D]: the mean of `hidden` [N, T, D] over the tokens in `attention_mask` [N, T]."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)  # [N, T, 1]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


# One epoch, rates and lengths as usual for a BERT this small; the same on every machine but for the arithmetic.
FINETUNING = {
    "epochs": 1,
    "batch_size": 32,
    "max_len": 48,
    "max_lr": 1e-4,
    "weight_decay": 0.01,
    "warmup": 0.1,
    "seed": 0,
}


def minilm_finetuned(*, steps: int | None = None) -> nn.Module:
    """MiniLM with two classes, fine-tuned on the review snippets: the first call trains, later ones find it cached.

    `steps` stops earlier (a smoke run); each value has its own place in the cache, and so has every change of the base
    weights, the data or the recipe. record.json beside the weights says how it was made and its validation accuracy.
    """
    from transformers import BertForSequenceClassification

    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise InputError(f"steps must be a whole number from 1 up, or None for the whole epoch; it is {steps!r}.")
    base = store.path("minilm")
    known = store.entries()
    made_of = {
        "weights": {file.path: file.sha256 for file in known["minilm"].files},
        "data": known["reviews/movieReviewSnippets_GroundTruth.txt.gz"].files[0].sha256,
        "recipe": {**FINETUNING, "steps": steps},
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    folder = store.made(
        f"minilm-reviews-{key}", lambda new: _finetune(base, new, steps, made_of), needs_bytes=100_000_000
    )
    with quietly():
        model = BertForSequenceClassification.from_pretrained(folder, local_files_only=True)
    return _finished(model, TRAINED_HERE)


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
    return _finished(model, DEQUANTISED)


def tokenizer(name: str) -> Any:
    """The tokenizer of "minilm" (also the fine-tuned one) or "smollm2"; works offline."""
    from transformers import AutoTokenizer

    folders = {"minilm": lambda: store.path("minilm"), "smollm2": _smollm2_folder}
    if name not in folders:
        raise InputError(f"there is a tokenizer for {' and '.join(map(repr, folders))}, not for {name!r}.")
    with quietly():
        return AutoTokenizer.from_pretrained(folders[name](), local_files_only=True)


def resnet50() -> nn.Module:
    """ResNet-50 (He et al. 2016), images [N, 3, 224, 224]; random weights, shapes only."""
    from torchvision.models import resnet50

    return _random(lambda: resnet50(weights=None))


def vit_b16() -> nn.Module:
    """ViT-B/16 (Dosovitskiy et al. 2021), images [N, 3, 224, 224]; random weights, shapes only."""
    from torchvision.models import vit_b_16

    return _random(lambda: vit_b_16(weights=None))


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


_HUB_TASKS = {
    "base": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}


def hub(id: str, *, task: str = "base", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model from the Hugging Face hub by id ("owner/name"), or "torchvision/NAME" with its default weights.

    Hub weights are read as safetensors only, and no code of a repository is run. task: "base", "causal-lm",
    "sequence-classification" or "image-classification". Raises InputError for a bad id or task, DataError where the hub
    cannot be reached or has no such weights.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", id):
        raise InputError(f"a hub id looks like 'owner/name'; it is {id!r}.")
    if task not in _HUB_TASKS:
        raise InputError(f"task must be one of {', '.join(map(repr, _HUB_TASKS))}; it is {task!r}.")
    try:
        owner, _, name = id.rpartition("/")
        model = _from_torchvision(name).to(dtype) if owner == "torchvision" else _from_hub(id, _HUB_TASKS[task], dtype)
    except (OSError, RuntimeError) as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0].rstrip('.')}"
        raise DataError(
            f"{id} could not be had ({said}); check the id, that it has safetensors weights, and the network, "
            "or take a model of labkit.models.MODELS, which needs none."
        ) from error
    return _finished(model, PRETRAINED)


MODELS: dict[str, Model] = {
    "resnet20": Model(resnet20, "ResNet-20, Fashion-MNIST", TRAINED_HERE, "Apache-2.0"),
    "efficientnet_lite0": Model(efficientnet_lite0, "EfficientNet-lite0, ImageNet", PRETRAINED, "Apache-2.0"),
    "minilm": Model(minilm, "all-MiniLM-L6-v2, sentence encoder", PRETRAINED, "Apache-2.0"),
    "minilm_finetuned": Model(minilm_finetuned, "MiniLM fine-tuned on review snippets", TRAINED_HERE, "Apache-2.0"),
    "smollm2": Model(smollm2, "SmolLM2-135M-Instruct, decoder", DEQUANTISED, "Apache-2.0"),
    "resnet50": Model(resnet50, "ResNet-50", RANDOM),
    "vit_b16": Model(vit_b16, "ViT-B/16", RANDOM),
    "bert_base": Model(bert_base, "BERT-base", RANDOM),
    "llama3_8b_layer": Model(llama3_8b_layer, "one decoder layer of Llama-3-8B", RANDOM),
}


def load(name: str, **kwargs: Any) -> nn.Module:
    """The model of MODELS called `name`; `.weights_are` on it says what its weights are. InputError for other names."""
    if name not in MODELS:
        raise InputError(
            f"no model is called {name!r}; there are {', '.join(MODELS)}, and labkit.models.hub for others."
        )
    return MODELS[name].load(**kwargs)


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


def _finished(model: nn.Module, weights_are: str) -> nn.Module:
    model.weights_are = weights_are
    return model.eval()


def _random(build: Callable[[], nn.Module]) -> nn.Module:
    """A model with random weights, the same at every call; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _finished(build(), RANDOM)


def _smollm2_folder() -> Path:
    from labkit.dequantize import fp16_copy

    return fp16_copy("smollm2")


def _trim(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut a batch to its longest text; padding beyond it would be computed and thrown away."""
    longest = int(batch["attention_mask"].sum(1).max())
    return {name: tensor[:, :longest] if tensor.ndim == 2 else tensor for name, tensor in batch.items()}


def _finetune(base: Path, folder: Path, steps: int | None, made_of: dict) -> None:
    """Train the classifier into `folder`, with the record of how it was made."""
    from transformers import BertForSequenceClassification

    recipe = FINETUNING
    with quietly(), torch.random.fork_rng():
        torch.manual_seed(recipe["seed"])
        model = BertForSequenceClassification.from_pretrained(base, num_labels=2, local_files_only=True)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        batches = review_batches(
            "train", batch_size=recipe["batch_size"], max_len=recipe["max_len"], seed=recipe["seed"]
        )
        history = training.train_(
            model,
            batches,
            epochs=recipe["epochs"],
            max_lr=recipe["max_lr"],
            optimizer="adamw",
            weight_decay=recipe["weight_decay"],
            warmup=recipe["warmup"],
            steps=steps,
            label="fine-tuning MiniLM (once)",
        )
        accuracy = training.accuracy(model, review_batches("validation", max_len=recipe["max_len"]))
        model.save_pretrained(folder)
    record = {
        **made_of,
        "validation_accuracy": accuracy,
        "precision": history.precision,
        "seconds": history.seconds,
        "steps": len(history.losses),
        "torch": torch.__version__,
        "made": time.strftime("%Y-%m-%d"),
    }
    (folder / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def _from_hub(id: str, auto: str, dtype: torch.dtype) -> nn.Module:
    import transformers

    return getattr(transformers, auto).from_pretrained(id, dtype=dtype, use_safetensors=True, trust_remote_code=False)


def _from_torchvision(name: str) -> nn.Module:
    from torchvision.models import get_model, get_model_weights, list_models

    if name not in list_models():
        raise InputError(f"torchvision has no model called {name!r}; torchvision.models.list_models() lists them.")
    model = get_model(name, weights=None)
    model.load_state_dict(get_model_weights(name).DEFAULT.get_state_dict(check_hash=True, weights_only=True))
    return model
