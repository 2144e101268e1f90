"""Makes the committed low-rank delta of MiniLM for the review snippets, and the record of how it went beside it.

    python data/checkpoints/train_minilm_reviews.py [FOLDER]

MiniLM is fine-tuned whole for one epoch. What that added to each linear layer is cut to rank 10 by its singular value
decomposition, which keeps the nearest matrix of that rank (Eckart and Young 1936), then the factors alone are trained
on (as in LoRA, Hu et al. 2021, section 4.1), the whole model's answers being their targets. Biases, norms and the
classifier are small and stored as they are; the embeddings stay the base model's. Nothing was chosen by the test
snippets, which only give the figures in the record. The sizes and SHA-256 that it prints go into data/manifest.toml.
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
WHOLE = {"epochs": 1, "max_lr": 1e-4, "weight_decay": 0.01, "warmup": 0.1, "optimizer": "adamw"}
FACTORS = {"epochs": 1, "steps": 150, "max_lr": 5e-4, "weight_decay": 0.0, "warmup": 0.1, "optimizer": "adamw"}
BATCH_SIZE, MAX_LEN, SEED = 32, 48, 0


class LowRank(nn.Module):
    """y = x W' + x A' B': a linear layer of the base model, frozen, and a trained product of rank r."""

    def __init__(self, base: nn.Linear, tuned: nn.Linear) -> None:
        super().__init__()
        u, s, vt = torch.linalg.svd((tuned.weight - base.weight).detach())
        self.register_buffer("weight", base.weight.detach().clone())
        self.up = nn.Parameter(u[:, :RANK] * s[:RANK].sqrt())  # [out, r]
        self.down = nn.Parameter(vt[:RANK] * s[:RANK].sqrt()[:, None])  # [r, in]
        self.bias = nn.Parameter(tuned.bias.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + nn.functional.linear(x @ self.down.T, self.up)


def main(folder: Path) -> None:

    torch.manual_seed(SEED)
    base = models.minilm_classifier()
    whole = copy.deepcopy(base)
    batches = {split: models.review_batches(split, max_len=MAX_LEN) for split in ("validation", "test")}

    def learning() -> training.Batches:
        return models.review_batches("train", batch_size=BATCH_SIZE, max_len=MAX_LEN, seed=SEED)

    history = training.train_(whole, learning(), **WHOLE, label="MiniLM, whole")
    accuracy = {"whole": {split: training.accuracy(whole, batches[split]) for split in batches}}
    print(accuracy)

    student = copy.deepcopy(whole)
    student.bert.embeddings = copy.deepcopy(base.bert.embeddings).requires_grad_(False)
    parts = dict(base.named_modules())
    for name, module in whole.named_modules():
        if isinstance(module, nn.Linear) and name != "classifier":
            student.set_submodule(name, LowRank(parts[name], module))
    accuracy["cut"] = {split: training.accuracy(student, batches[split]) for split in batches}
    print(accuracy)

    def answers(model: nn.Module, batch: dict) -> torch.Tensor:
        words = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with torch.no_grad():
            wanted = whole(**words).logits.float().softmax(-1)
        return nn.functional.cross_entropy(model(**words).logits.float(), wanted)

    second = training.train_(student, learning(), **FACTORS, loss_fn=answers, label="MiniLM, factors")
    delta = {}
    for name, module in student.named_modules():
        if isinstance(module, LowRank):
            delta |= {f"{name}.up": module.up, f"{name}.down": module.down}
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    delta |= {name: p for name, p in trained.items() if not name.endswith((".up", ".down"))}
    delta = {name: tensor.detach().half().contiguous() for name, tensor in delta.items()}
    content = safetensors.torch.save(delta)
    (folder / "minilm-reviews-delta.safetensors").write_bytes(content)
    loaded = models.with_delta(base, delta)
    accuracy["delta"] = {split: training.accuracy(loaded, batches[split]) for split in batches}
    right = {name: training.correct(m, batches["test"]) for name, m in (("whole", whole), ("delta", loaded))}
    record = {
        "model": "labkit.models.minilm_finetuned",
        "rank": RANK,
        "recipe": {"whole": WHOLE, "factors": FACTORS, "batch_size": BATCH_SIZE, "max_len": MAX_LEN, "seed": SEED},
        "precision": history.precision,
        "accuracy": accuracy,
        "test_answers_that_differ": int((right["whole"] != right["delta"]).sum()),
        "seconds": round(history.seconds + second.seconds, 1),
        "machine": fingerprint("cpu").label,
        "torch": torch.__version__,
        "made": time.strftime("%Y-%m-%d"),
    }
    text = (json.dumps(record, indent=1) + "\n").encode()
    (folder / "minilm-reviews-delta.json").write_bytes(text)
    for name, blob in (("minilm-reviews-delta.safetensors", content), ("minilm-reviews-delta.json", text)):
        print(f"{name}: {len(blob)} bytes, sha256 {hashlib.sha256(blob).hexdigest()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
