"""Quantization-aware training of ResNet-20 on Fashion-MNIST beside calibration alone, and beside plain training.

    python benchmarks/qat.py                                   8/8, 4/4 and 2/4 bits of weights/activations, 3 seeds
    python benchmarks/qat.py --bits 4/4 --steps 40 --seeds 1
    python benchmarks/qat.py --ends same                       first and last layer at these bits, too, not at 8

Every method starts from the shipped checkpoint. "minmax" and "mse" are calibrated with these ranges and not trained;
"control" is calibrated, with "mse", after as many steps of float32 training on the same batches; "ste" and "lsq" are
trained with `qat`. A seed draws the images for calibration and the order of the batches. All are SIMULATED; then each
model is converted to integers, which are held against exact arithmetic (`integer.prove`) and answer the test images.

Changes of accuracy are in points against float32 on all 10,000 test images, paired; the interval is over images and
seeds, so a single seed has none.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from labkit import datasets, models, stats, training
from labkit.quantization import fold, integer, ptq, qat

CALIBRATION, BATCH = 512, 64
METHODS = ("minmax", "mse", "control", "ste", "lsq")


def widths(bits: int, ends: str) -> int | dict[str, int]:
    """For every layer, or with the first and the last one at 8 bits."""
    return bits if ends == "same" else {"": bits, "conv": 8, "fc": 8}


def batches(split: datasets.Split, seed: int | None = None) -> training.Batches:
    return training.Batches((split.images, split.labels), BATCH, seed)


def trained(model: nn.Module, train: datasets.Split, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains in place; CPU seconds a step and the mean loss of the last tenth."""
    start = time.process_time()
    history = qat.finetune_(model, batches(train, seed), steps=options.steps, max_lr=options.lr)
    last = history.losses[-max(options.steps // 10, 1) :]
    return {"cpu_s": (time.process_time() - start) / options.steps, "loss": sum(last) / len(last)}


def proof(model: nn.Module, test: datasets.Split) -> dict[str, Any]:
    """Of the converted model: codes that are wrong, codes at a tie that differ, and its right answers."""
    integers = integer.convert(model)
    rows = integer.prove(integers, test.images[:BATCH])
    counts = {name: sum(row[name] for row in rows) for name in ("codes", "different", "wrong")}
    return counts | {"integers": training.correct(integers, batches(test))}


def runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each seed, bits and method: "right" [N] are the answers to the test images."""
    model, train, test = models.resnet20(), datasets.fashion_mnist("train"), datasets.fashion_mnist("test")
    yield {"seed": None, "bits": "fp32", "method": "fp32", "right": training.correct(model, batches(test))}
    for seed in range(options.seeds):
        images = datasets.fashion_mnist("train", CALIBRATION, seed=seed).images
        calibration = images.split(BATCH)
        plain = fold.fold_batch_norm(model, images[:4])
        control = trained(plain, train, seed, options)
        right = training.correct(plain, batches(test))
        yield {"seed": seed, "bits": "fp32", "method": "control", "right": right, **control}
        for bits in options.bits:
            weights, activations = (widths(int(x), options.ends) for x in bits.split("/"))
            choice = {"weights": weights, "activations": activations}
            for method in METHODS:
                if method in qat.METHODS:
                    new = qat.prepare(model, calibration, **choice, method=method)
                    row = trained(new, train, seed, options)
                else:
                    source, row = (plain, control) if method == "control" else (model, {})
                    observer = "minmax" if method == "minmax" else "mse"
                    new = ptq.quantize(source, calibration, **choice, observer=observer).model
                right = training.correct(new, batches(test))
                yield {"seed": seed, "bits": bits, "method": method, "right": right, **row, **proof(new, test)}


def change(right: Tensor, reference: Tensor) -> str:
    """In points, with the interval over images and seeds. right: answers [seeds, N]; reference: the same, or [N]."""
    points = [100 * share for share in stats.accuracy_change_over_seeds(right, reference.expand_as(right))]
    return "{:+6.2f} [{:+.2f}, {:+.2f}]".format(*points)


def summary(rows: list[Mapping[str, Any]], bits: str, reference: Tensor) -> Iterator[str]:
    answers = {}
    for method in dict.fromkeys(row["method"] for row in rows if row["bits"] == bits and row["seed"] is not None):
        group = [row for row in rows if (row["bits"], row["method"]) == (bits, method)]
        right = answers[method] = torch.stack([row["right"] for row in group])  # [seeds, N]
        line = f"{bits:5} {method:8} {change(right, reference)}"
        if "cpu_s" in group[0]:
            line += f", {stats.mean_ci([row['cpu_s'] for row in group])[0]:.3f} CPU s a step"
        yield line
    for first, second in (("ste", "mse"), ("lsq", "mse"), ("lsq", "control"), ("lsq", "ste")):
        if first in answers:
            yield f"{bits:5} {first} - {second}: {change(answers[first], answers[second])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", default=["8/8", "4/4", "2/4"], metavar="W/A")
    parser.add_argument("--steps", type=int, default=200, help=f"of {BATCH} images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.003, help="the highest learning rate of the cycle")
    parser.add_argument("--ends", choices=("8", "same"), default="8", help="bits of the first and the last layer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for every row, answers summed up")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for row in runs(options):
        rows.append(row)
        reference = rows[0]["right"]
        text = f"seed {row['seed']} {row['bits']} {row['method']}: {change(row['right'], reference)}"
        if "wrong" in row:
            same = int((row["integers"] == row["right"]).sum())
            text += f"; codes {row['codes']}, at a tie {row['different']}, wrong {row['wrong']}; answers equal {same}"
        print(
            text + (f"; loss {row['loss']:.3f}, {row['cpu_s']:.3f} CPU s a step" if "loss" in row else ""), flush=True
        )
    print(f"\nSIMULATED, {options.steps} steps of {BATCH}, {options.seeds} seeds, ends {options.ends}")
    print(f"fp32 {100 * float(reference.double().mean()):.2f} %")
    for bits in ("fp32", *options.bits):
        print("\n".join(summary(rows, bits, reference)))
    if options.json:
        counted = [{k: int(v.sum()) if isinstance(v, Tensor) else v for k, v in row.items()} for row in rows]
        options.json.write_text(json.dumps(counted, indent=1))


if __name__ == "__main__":
    main()
