"""Accuracy of MiniLM without layers, neurons or heads of equal bytes, before and after recovery by distillation.

    python benchmarks/cuts_recovered.py --folder DIR               50 minutes on an idle core, and writes the record
    python benchmarks/cuts_recovered.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/cuts_recovered.py --quick                    two runs on few texts, and writes nothing

A sixth of the blocks' weights is a layer, or 36 of 72 heads, or a quarter of the neurons. A third is two layers, or
half of the neurons, or 36 heads and a quarter of the neurons. Heads and neurons go by Taylor's score, layers as the set
that costs least on validation texts, of all sets of that size. Recovery is half labels, half the whole model's answers
(`distillation.heal_`), 60 batches of 32 texts; a seed draws their order. "nothing" trains the whole model on in the
same way. Two layers are also trained for a whole pass over the texts. A further cut, with a single seed, is a plan for
the lesson's challenge. The record holds the seeds that are done for all cuts, three or more. Answers are compared text
by text; the intervals are over texts and seeds. Lesson 04 shows the record: `lab.recorded("cuts_recovered")`.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import heads_removed
import resumable
import torch
from torch import Tensor, nn

from labkit import artifact, distillation, models, stats, training
from labkit.lesson import experiments
from labkit.pruning import depth, heads
from labkit.pruning import transformers as pruning
from labkit.records import cost, quality, result

QUESTION = "layers, neurons or heads of equal bytes: what does each cost, before and after recovery?"
SEEDS, LONG_SEEDS = 5, 3
STEPS, PASS = 60, 240  # of 32 texts
MAX_LR = 1e-4
SCORING, VALIDATION = 256, 200  # texts for Taylor's score, texts that choose the layers


@dataclass(frozen=True)
class Cut:
    """Heads of all 72, a share of each layer's neurons, and a number of layers to remove."""

    heads: int = 0
    neurons: float = 0.0
    layers: int = 0


NOTHING, TWO_LAYERS = "nothing", "two layers"
CUTS = {
    NOTHING: Cut(),
    "half of the heads": Cut(heads=36),
    "a quarter of the neurons": Cut(neurons=0.25),
    "one layer": Cut(layers=1),
    "half of the heads, a quarter of the neurons": Cut(heads=36, neurons=0.25),
    "half of the neurons": Cut(neurons=0.5),
    TWO_LAYERS: Cut(layers=2),
}
CHALLENGE = {"two layers, three tenths of the neurons": Cut(neurons=0.3, layers=2)}


@dataclass(frozen=True)
class Run:
    """A cut, trained for some steps with a seed; 0 steps train nothing."""

    cut: str
    steps: int
    seed: int

    @property
    def file(self) -> str:
        return f"{self.cut}, {self.steps}, {self.seed}.pt"


def all_runs() -> Iterator[Run]:
    """List the runs: the cuts without training, then all of a seed before those of the next."""
    for name in (*CUTS, *CHALLENGE):
        yield Run(name, 0, 0)
    for seed in range(SEEDS):
        for name in CUTS:
            yield Run(name, STEPS, seed)
        if seed == 0:
            yield from (Run(name, STEPS, seed) for name in CHALLENGE)
        if seed == LONG_SEEDS - 1:
            yield from (Run(TWO_LAYERS, PASS, its_seed) for its_seed in range(LONG_SEEDS))


def sorted_batches(split: str, n: int | None) -> list[dict[str, Tensor]]:
    """Load texts in batches of similar length, so that little padding is computed."""
    return heads_removed.sorted_batches(models.review_batches(split, n).data)


def cheapest_layers(model: nn.Module, count: int, texts: int) -> tuple[int, ...]:
    """Return the set of `count` layers without which the loss on validation texts is least, of all such sets."""
    batches = sorted_batches("validation", texts)
    losses = {}
    for gone in itertools.combinations(range(6), count):
        shorter = depth.prune_layers(model, gone, check=False).model
        losses[gone] = heads_removed.mean_loss(heads_removed.answers(shorter, batches))
    return min(losses, key=losses.get)


def prepared(folder: Path, model: nn.Module, quick: bool) -> dict[str, Any]:
    """Choose the layers and score the heads once, and keep both in the folder."""

    def compute() -> dict[str, Any]:
        texts = 8 if quick else VALIDATION
        ready = {"layers": {count: cheapest_layers(model, count, texts) for count in (1, 2)}}
        ready["heads"] = heads.head_importance(model, sorted_batches("train", 8 if quick else SCORING), "taylor")
        return ready

    return resumable.once(folder / "prepared.pt", lambda: resumable.timed(compute))


def pruned(model: nn.Module, cut: Cut, ready: Mapping[str, Any]) -> nn.Module:
    """Remove heads, then neurons, then layers."""
    if cut.heads:
        model = pruning.prune_heads(model, heads.lowest_heads(ready["heads"], cut.heads), check=False).model
    if cut.neurons:
        batches = sorted_batches("train", SCORING)
        model = pruning.prune_ffn(model, cut.neurons, criterion="taylor", batches=batches, check=False).model
    if cut.layers:
        model = depth.prune_layers(model, ready["layers"][cut.layers], check=False).model
    return model


def do(run: Run, model: nn.Module, ready: Mapping[str, Any], test: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Do a run: which test texts are answered right, and the bytes."""
    cut = (CUTS | CHALLENGE)[run.cut]
    small = pruned(model, cut, ready)
    if small is model:
        small = models.minilm_finetuned()
    if run.steps:
        texts = models.review_batches("train", batch_size=32, seed=run.seed)
        distillation.heal_(small, texts, teacher=model, max_lr=MAX_LR, steps=run.steps, seed=run.seed)
    blocks = sum(parameter.numel() for parameter in small.bert.encoder.parameters())
    return {"right": training.correct(small, test), "bytes": artifact.size(small), "parameters of blocks": blocks}


def changes(right: Mapping[Run, Tensor]) -> list[dict[str, Any]]:
    """Compare every two cuts, and each with the whole model: the change of accuracy over texts and seeds.

    Cuts without training are the same for every seed.
    """
    of_cut: dict[tuple[str, int], list[Tensor]] = {}
    for run, mine in right.items():
        of_cut.setdefault((run.cut, run.steps), []).append(mine)
    rows = []
    for after, before in itertools.combinations(of_cut, 2):
        change, low, high, seeds = compared(of_cut[after], of_cut[before])
        row = {"after": after, "before": before, "seeds": seeds}
        rows.append({**row, "change": change, "low": low, "high": high})
    return rows


def compared(after: list[Tensor], before: list[Tensor]) -> tuple[float, float, float, int]:
    """Return the change of accuracy with its interval, and the number of seeds; a single tensor is for every seed."""
    trained = [len(sets) for sets in (after, before) if len(sets) > 1]
    if not trained:
        return *stats.accuracy_change(after[0], before[0]), 1
    seeds = min(trained)
    stacked = []
    for sets in (after, before):
        stacked.append(torch.stack(sets[:seeds]) if len(sets) > 1 else sets[0].expand(seeds, -1))
    return *stats.accuracy_change_over_seeds(*stacked), seeds


def write(finished: Mapping[Run, Mapping[str, Any]], ready: Mapping[str, Any], seeds: int, texts: int) -> Path:
    """Write the record of the first `seeds` seeds."""
    chosen = {run: outcome for run, outcome in finished.items() if run.seed < seeds}
    rows = []
    for run, outcome in chosen.items():
        row = {"removed": run.cut, "steps": run.steps, "seed": run.seed}
        row |= {"accuracy": outcome["right"].double().mean().item(), "bytes": outcome["bytes"]}
        rows.append(row | {"parameters of blocks": outcome["parameters of blocks"]})
    return experiments.save(
        Path(__file__).stem,
        QUESTION,
        rows,
        by=("removed", "steps", "seed"),
        columns={
            "accuracy": quality("fraction"),
            "bytes": cost("B"),
            "parameters of blocks": result(),
        },
        settings={
            "seeds": seeds,
            "steps": STEPS,
            "texts of a step": 32,
            "max_lr": MAX_LR,
            "test texts": texts,
            "scoring texts": SCORING,
            "validation texts": VALIDATION,
            "layers": {str(count): list(layers) for count, layers in ready["layers"].items()},
            "changes": changes({run: outcome["right"] for run, outcome in chosen.items()}),
        },
        seconds=ready["seconds"] + sum(outcome["seconds"] for outcome in chosen.values()),
    )


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    model = models.minilm_finetuned()
    ready = prepared(options.folder, model, options.quick)
    test = sorted_batches("test", 40 if options.quick else None)
    runs = list(all_runs())[: 2 if options.quick else None]
    finished = resumable.finished(runs, options, lambda run: do(run, model, ready, test))
    whole_seeds = [seed for seed in range(SEEDS) if all(Run(name, STEPS, seed) in finished for name in CUTS)]
    if len(whole_seeds) >= LONG_SEEDS:
        print(write(finished, ready, len(whole_seeds), sum(len(batch["labels"]) for batch in test)))


if __name__ == "__main__":
    main()
