"""Makes the committed low-rank delta of MiniLM for the review snippets, and the record of how it went beside it.

    python data/checkpoints/train_minilm_reviews.py [FOLDER]

Each linear layer of the encoder is frozen and gets a trained product of rank 10 beside it (LoRA, Hu et al. 2021,
section 4.1); biases, norms and the classifier are small and trained as they are, the embeddings stay. For comparison
MiniLM is fine-tuned whole, every parameter, by its usual recipe. Nothing was chosen by the test snippets, which only
give the figures in the record. The sizes and SHA-256 that it prints go into data/manifest.toml.
"""

import copy
import hashlib
import json
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from labkit import models, training
from labkit.machine import fingerprint

RANK = 10
RECIPES = {
    "whole": {"epochs": 1, "max_lr": 1e-4, "weight_decay": 0.01, "warmup": 0.1, "optimizer": "adamw"},
    "delta": {"epochs": 2, "max_lr": 1e-3, "weight_decay": 0.01, "warmup": 0.1, "optimizer": "adamw"},
}
BATCH_SIZE, MAX_LEN, SEED = 32, 48, 0


class LowRank(nn.Module):
    """y = x W' + x A' B' + b: W is frozen, A [r, in] starts random, B [out, r] at zero (Hu et al. 2021, equation 3)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach())
        self.down = nn.Parameter(torch.randn(RANK, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, RANK))
        self.bias = nn.Parameter(layer.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + nn.functional.linear(x @ self.down.T, self.up)


def main(folder: Path) -> None:
    torch.manual_seed(SEED)
    base = models.minilm_classifier()
    adapted = copy.deepcopy(base)
    adapted.bert.embeddings.requires_grad_(False)
    for name, module in base.bert.named_modules():
        if isinstance(module, nn.Linear):
            adapted.bert.set_submodule(name, LowRank(module))
    networks = {"delta": adapted, "whole": copy.deepcopy(base)}
    seconds = {}
    for name, recipe in RECIPES.items():
        batches = models.review_batches("train", batch_size=BATCH_SIZE, max_len=MAX_LEN, seed=SEED)
        history = training.train_(networks[name], batches, **recipe, label=f"MiniLM, {name}")
        seconds[name] = round(history.seconds, 1)

    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    delta = {name: parameter.detach().half().contiguous() for name, parameter in trained.items()}
    networks["delta"] = models.with_delta(base, delta)  # what a reader of the file gets
    splits = {split: models.review_batches(split, max_len=MAX_LEN) for split in ("validation", "test")}
    right = {
        split: {name: training.correct(network, batches) for name, network in networks.items()}
        for split, batches in splits.items()
    }
    record = {
        "model": "labkit.models.minilm_finetuned",
        "rank": RANK,
        "recipe": {**RECIPES, "batch_size": BATCH_SIZE, "max_len": MAX_LEN, "seed": SEED},
        "precision": history.precision,
        "accuracy": {
            name: {split: float(answers[name].double().mean()) for split, answers in right.items()} for name in networks
        },
        "test_answers_that_differ": int((right["test"]["whole"] != right["test"]["delta"]).sum()),
        "seconds": seconds,
        "machine": fingerprint("cpu").label,
        "torch": torch.__version__,
        "made": time.strftime("%Y-%m-%d"),
    }
    contents = {
        "minilm-reviews-delta.safetensors": safetensors.torch.save(delta),
        "minilm-reviews-delta.json": (json.dumps(record, indent=1) + "\n").encode(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        print(f"{name}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
