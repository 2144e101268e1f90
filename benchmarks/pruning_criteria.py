"""Accuracy of ResNet-20 without nine tenths of its weights: four criteria, before and after a recovery training.

    python benchmarks/pruning_criteria.py            25 pieces of 80 seconds of a core; the last writes the record
    python benchmarks/pruning_criteria.py --one      the next piece alone
    python benchmarks/pruning_criteria.py --quick    200 test images, 2 steps and one seed, and writes nothing

Each way of pruning is judged three times on the same test images: as it is, with the batch norms' statistics estimated
anew on unlabelled training images (EagleEye, Li et al. 2020, arXiv:2007.02491), and after a recovery training. A seed
draws the images that score the weights and re-estimate the norms, the order of training, and the random scores. A piece
is one way of pruning and one seed; the answers are kept in runs/, so that a script that was stopped goes on.
Lesson 02 shows the record: `lab.recorded("pruning_criteria")`.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from labkit import datasets, files, models, stats, training
from labkit.lesson import experiments
from labkit.pruning import unstructured
from labkit.records import quality

QUESTION = "which of ResNet-20's weights should go, if nine of ten have to?"
SHARE = 0.9
IMAGES = 512  # of the training set, to score the weights and to re-estimate the norms
STEPS = 300  # of the recovery training
STEP = {"max_lr": 0.03}
BATCH = 64  # images of a step
SEEDS = 5
ANSWERED = 50  # test images at once: their activations stay in the caches of one core
STAGES = ("raw", "re-estimated", "recovered")
BASE = "magnitude"  # the way that the others are compared with


class Way(NamedTuple):
    """A way to prune: the criterion, and which weights are ranked together."""

    criterion: str
    scope: str


WAYS = {
    "magnitude": Way("magnitude", "layer"),
    "wanda": Way("wanda", "layer"),
    "taylor": Way("taylor", "layer"),
    "random": Way("random", "layer"),
    "magnitude, one ranking": Way("magnitude", "global"),
}
Answers = dict[str, Tensor]  # of each stage: right or wrong, [test images]


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    """Draw the training images that score the weights and re-estimate the norms, and their labels."""
    train = datasets.fashion_mnist("train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    return train.images[order], train.labels[order]


def pruned(way: Way, images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Prune a copy of the dense network by its answers to the images, one by one; masks hold the zeros."""
    batches = list(zip(images.split(1), labels.split(1), strict=True))  # Taylor's mean is over examples
    return unstructured.prune(
        models.resnet20(), SHARE, criterion=way.criterion, scope=way.scope, batches=batches, seed=seed
    )


def answers_of(name: str, seed: int, test: training.Batches, steps: int) -> Answers:
    """Return which test images a way of pruning gets right, at each stage."""
    images, labels = drawn(seed)
    model = pruned(WAYS[name], images, labels, seed)
    answers = {"raw": training.correct(model, test)}
    training.reestimate_norms_(model, training.Batches((images, labels), BATCH))
    answers["re-estimated"] = training.correct(model, test)
    train = datasets.fashion_mnist("train")
    batches = training.Batches((train.images, train.labels), BATCH, seed=seed)
    training.train_(model, batches, epochs=1, steps=steps, **STEP)
    answers["recovered"] = training.correct(model, test)
    shares = [f"{stage} {right.double().mean():.2%}" for stage, right in answers.items()]
    print(f"seed {seed}, {name}:", ", ".join(shares), flush=True)
    return answers


def rows(dense: Tensor, of_seeds: list[dict[str, Answers]]) -> list[dict[str, Any]]:
    """Return a row for each way and stage: accuracies by seed, and the changes, paired over images and seeds.

    dense: the dense network's answers, [test images].
    of_seeds: the answers of each way, for each seed.
    """
    table = []
    for name, stage in itertools.product(WAYS, STAGES):
        right = torch.stack([answers[name][stage] for answers in of_seeds])  # [seeds, test images]
        base = torch.stack([answers[BASE][stage] for answers in of_seeds])
        row = {"way": name, "stage": stage}
        row |= {f"seed {seed}": float(share) for seed, share in enumerate(right.double().mean(1))}
        row["mean"] = float(right.double().mean())
        loss = stats.accuracy_change_over_seeds(right, dense.expand_as(right))
        row |= zip(("from dense", "dense low", "dense high"), loss, strict=True)
        over = stats.accuracy_change_over_seeds(right, base) if name != BASE else (None, None, None)
        row |= zip((f"over {BASE}", "low", "high"), over, strict=True)
        table.append(row)
    return table


def answered(name: str, seed: int, test: training.Batches, path: Path) -> tuple[Answers, float]:
    """Return the answers of a piece and the seconds they took, from an earlier run where there was one."""
    if not path.exists():
        start = time.perf_counter()
        answers = answers_of(name, seed, test, STEPS)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((answers, time.perf_counter() - start), path)
    return torch.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 test images, 2 steps, one seed; nothing is written")
    parser.add_argument("--one", action="store_true", help="stop after the next piece that has no answers yet")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    images = datasets.fashion_mnist("test", 200 if arguments.quick else None)
    test = training.Batches((images.images, images.labels), ANSWERED)
    if arguments.quick:
        for name in WAYS:
            answers_of(name, 0, test, steps=2)
        return
    folder = files.ROOT / "runs" / Path(__file__).stem
    of_seeds: list[dict[str, Answers]] = [{} for _ in range(SEEDS)]
    seconds = 0.0
    pieces = list(itertools.product(range(SEEDS), WAYS))
    for number, (seed, name) in enumerate(pieces, 1):
        path = folder / f"{name}, seed {seed}.pt"
        is_new = not path.exists()
        of_seeds[seed][name], took = answered(name, seed, test, path)
        seconds += took
        if is_new and arguments.one and number < len(pieces):
            return
    dense = training.correct(models.resnet20(), test)
    accuracies = ("mean", *(f"seed {seed}" for seed in range(SEEDS)))
    path = experiments.save(
        Path(__file__).stem,
        QUESTION,
        rows(dense, of_seeds),
        by=("way", "stage"),
        columns={name: quality("fraction") for name in accuracies}
        | {"from dense": quality("fraction", low="dense low", high="dense high")}
        | {f"over {BASE}": quality("fraction", low="low", high="high")},
        settings={
            "dense": float(dense.double().mean()),
            "removed": SHARE,
            "test images": len(images),
            "training images": IMAGES,
            "steps": STEPS,
            "batch": BATCH,
            "seeds": SEEDS,
        },
        seconds=seconds,
    )
    print(path)


if __name__ == "__main__":
    main()
