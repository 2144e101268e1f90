"""Accuracy of a pruned ResNet-20 without training: with the old batch-norm statistics, and with re-estimated ones.

    python benchmarks/norms_after_pruning.py            35 minutes on a busy core, and writes the record
    python benchmarks/norms_after_pruning.py --quick    200 test images and one seed, and writes nothing

A cut changes what reaches the norms behind it, and the running means and variances describe the network before the cut.
EagleEye (Li et al. 2020, arXiv:2007.02491) estimates them anew before it compares plans. Here every criterion cuts the
same share of all channels, ranked over the whole network. A seed draws the training images that score the channels and
re-estimate the norms, and the random scores. The same test images judge both, so each row tells how many of them only
one of the two answers right. Lesson 03 shows the record: `lab.recorded("norms_after_pruning")`.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from labkit import datasets, models, show, training
from labkit.lesson import experiments
from labkit.pruning import channels
from labkit.records import quality, result

QUESTION = "how much of the accuracy lost to a cut is in the batch norms' old statistics?"
CRITERIA = ("random", "l1", "l2", "bn_scale", "fpgm", "activation", "taylor")
DRAWN = {"random", "activation", "taylor"}  # their scores depend on the seed
SHARE = 0.125  # of all channels, ranked over the whole network
IMAGES = 512  # of the training set, to score the channels and to re-estimate the norms
SEEDS = 3
BATCH = 50  # test images: their activations stay in the caches of one core


def calibration(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Draw IMAGES training images with labels, in batches of 64."""
    train = datasets.fashion_mnist("train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return [(train.images[part], train.labels[part]) for part in order[:IMAGES].split(64)]


def cut(model: nn.Module, example: Tensor, criterion: str, seed: int) -> nn.Module:
    """Remove the channels with the lowest scores."""
    options = {"criterion": criterion, "batches": calibration(seed), "seed": seed}
    return channels.prune(model, example, ratio=SHARE, check=False, **options).model


def runs(test: training.Batches, seeds: int) -> list[dict[str, Any]]:
    """Return a row for each criterion and seed: both accuracies, and the images that changed sides."""
    dense = models.resnet20()
    example = test.data[0][:1]
    rows = []
    for criterion in CRITERIA:
        for seed in range(seeds):
            pruned = cut(dense, example, criterion, seed)
            if seed == 0 or criterion in DRAWN:
                old = training.correct(pruned, test)  # else the same network as with seed 0
            training.reestimate_norms_(pruned, calibration(seed))
            new = training.correct(pruned, test)
            rows.append({"criterion": criterion, "seed": seed, **compared(old, new)})
            print(show.text_table(rows[-1:]), flush=True)
    return rows


def compared(old: Tensor, new: Tensor) -> Mapping[str, float | int]:
    """Return the shares of right answers with old and with new statistics, and the images that only one answers."""
    return {
        "old": old.double().mean().item(),
        "re-estimated": new.double().mean().item(),
        "gained": int((new & ~old).sum()),
        "lost": int((old & ~new).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 test images and one seed; nothing is written")
    quick = parser.parse_args().quick

    start = time.perf_counter()
    torch.set_num_threads(1)
    test = datasets.fashion_mnist("test", 200 if quick else None)
    seeds = 1 if quick else SEEDS
    batches = training.Batches((test.images, test.labels), BATCH)
    dense = training.accuracy(models.resnet20(), batches)
    rows = runs(batches, seeds)
    if quick:
        return
    path = experiments.save(
        Path(__file__).stem,
        QUESTION,
        rows,
        by=("criterion", "seed"),
        columns={
            "old": quality("fraction"),
            "re-estimated": quality("fraction"),
            "gained": result("images"),
            "lost": result("images"),
        },
        settings={
            "dense": dense,
            "removed": SHARE,
            "test images": len(test),
            "training images": IMAGES,
            "seeds": seeds,
        },
        seconds=time.perf_counter() - start,
    )
    print(path)


if __name__ == "__main__":
    main()
