"""Makes the committed ResNet-20 checkpoint: three epochs of Fashion-MNIST, and the record of how it went beside it.

    python data/checkpoints/train_resnet20.py [FOLDER]

Validation images are kept out of training; nothing was chosen by the test images, which only give the figure in the
record. The sizes and SHA-256 that it prints go into data/manifest.toml. Another machine or number of threads adds in
another order, so its weights and accuracy differ a little.
"""

import hashlib
import json
import platform
import sys
import time
from pathlib import Path

import safetensors.torch
import torch

from labkit import datasets, models, training

RECIPE = {"epochs": 3, "max_lr": 0.2, "weight_decay": 5e-4, "warmup": 0.3, "optimizer": "sgd"}
BATCH_SIZE = 128
SEED = 0


def main(folder: Path) -> None:
    torch.manual_seed(SEED)
    model = models.resnet20(pretrained=False)
    splits = {name: datasets.fashion_mnist(name) for name in ("train", "validation", "test")}
    batches = {name: training.Batches((split.images, split.labels), 500) for name, split in splits.items()}
    learning = training.Batches((splits["train"].images, splits["train"].labels), BATCH_SIZE, seed=SEED)
    history = training.train_(model, learning, **RECIPE, label="ResNet-20")
    record = {
        "model": "labkit.models.resnet20",
        "data": {name: len(split) for name, split in splits.items()},
        "recipe": {**RECIPE, "batch_size": BATCH_SIZE, "seed": SEED, "precision": history.precision},
        "validation_accuracy": training.accuracy(model, batches["validation"]),
        "test_accuracy": training.accuracy(model, batches["test"]),
        "last_100_losses_mean": sum(history.losses[-100:]) / 100,
        "seconds": round(history.seconds, 1),
        "machine": {"cpu": _cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "made": time.strftime("%Y-%m-%d"),
    }
    contents = {
        "resnet20-fashion-mnist.safetensors": safetensors.torch.save(model.state_dict()),
        "resnet20-fashion-mnist.json": (json.dumps(record, indent=1) + "\n").encode(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        print(f"{name}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


def _cpu() -> str:
    """The processor's name where Linux tells it; platform.processor() is empty there."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.open() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
