"""Half of ResNet-20's channels, healing and integer weights: does the order of the three steps matter?

    python benchmarks/orders_of_steps.py --folder DIR               20 minutes on an idle core, and writes the record
    python benchmarks/orders_of_steps.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/orders_of_steps.py --quick                    a few short runs on few images, and writes nothing

Half of the channels go by Taylor's score, in multiples of 8; healing takes two passes over the training images, on the
whole network's stored answers (T = 4, a tenth of the loss is the labels'). Three orders end with the same shapes and
with REAL integers, eight bits for activations and eight or four for weights:

- "cut, heal, round";
- "round, cut, heal, round again": the whole network's weights are rounded first, the healing is in floats;
- "round, cut, heal in codes": each weight keeps the grid of the rounded network, and every step of the optimiser ends
  on a code. Momentum is in floats.

labkit's rounded layers cannot be cut, so the whole network's rounded weights are written back as floats for the cut.
A seed draws the order of the images. Answers are compared image by image; the intervals are over test images and
seeds. "plans" are further cuts for the challenge, with a seed. Lesson 13 shows the record:
`lab.recorded("orders_of_steps")`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resumable
import torch
from torch import Tensor, nn

from labkit import artifact, datasets, distillation, models, stats, training
from labkit.lesson import experiments
from labkit.pruning import channels
from labkit.quantization import integer, ptq
from labkit.records import quality

QUESTION = "cut, heal, round: does their order matter?"
SEEDS, LEAST_SEEDS = 3, 2
EPOCHS, BATCH = 2, 128
MAX_LR = 0.05
SOFT = {"alpha": 0.9, "temperature": 4.0}
CALIBRATION = 512  # training images that score channels and give the ranges of activations
PLANS = (0.4, 0.6)  # ratios of the challenge
JUDGED_ON = (100, 1000, 10_000)  # the first test images

WHOLE, ROUNDED = "as it is", "round"
USUAL, AGAIN, IN_CODES = "cut, heal, round", "round, cut, heal, round again", "round, cut, heal in codes"


@dataclass(frozen=True)
class Run(resumable.NamedByFields):
    """An order, the bits of weights while it heals (32: floats), the share of channels that go, and a seed."""

    order: str
    bits: int
    ratio: float
    seed: int


def all_runs(quick: bool) -> Iterator[Run]:
    """List the runs, all of a seed before those of the next."""
    for seed in range(1 if quick else SEEDS):
        yield Run(USUAL, 32, 0.5, seed)
        yield Run(IN_CODES, 8, 0.5, seed)
        yield Run(IN_CODES, 4, 0.5, seed)
        yield Run(AGAIN, 8, 0.5, seed)
        if seed == 0 and not quick:
            yield from (Run(USUAL, 32, ratio, seed) for ratio in PLANS)


def scales_of(model: nn.Module, bits: int) -> dict[str, Tensor]:
    """Return the gap between two codes of each output channel, [out, 1, 1, 1], by the convolution weight's name."""
    highest = 2 ** (bits - 1) - 1
    return {
        name: weight.detach().abs().amax((1, 2, 3), keepdim=True) / highest
        for name, weight in model.named_parameters()
        if weight.dim() == 4
    }


def still_there(scale: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Return the scales of the output channels that a cut left; kept: indices by dimension, as in a plan."""
    return scale[kept[0]] if 0 in kept else scale


@torch.no_grad()
def round_(model: nn.Module, scales: Mapping[str, Tensor], bits: int) -> None:
    """Move each convolution weight to the nearest code, in place."""
    highest = 2 ** (bits - 1) - 1
    for name, scale in scales.items():
        weight = model.get_parameter(name)
        codes = (weight / scale).round_().clamp_(-highest, highest)
        weight.copy_(codes * scale)


def in_codes(loss_fn: Callable, scales: Mapping[str, Tensor], bits: int) -> Callable:
    """Return a loss_fn that first rounds the weights, so that every step starts and ends on codes."""

    def rounded(model: nn.Module, batch: Any) -> Tensor:
        round_(model, scales, bits)
        return loss_fn(model, batch)

    return rounded


class Setting:
    """The whole network with its stored answers, and the images."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.quick = quick
        self.whole = models.resnet20()
        self.train = datasets.fashion_mnist("train", 600 if quick else None)
        test = datasets.fashion_mnist("test", 200 if quick else None)
        self.test = training.Batches((test.images, test.labels), 50)
        self.few = [self.train.images[:CALIBRATION]]
        self.answers = resumable.once(folder / "answers.pt", self._answers)

    @torch.no_grad()
    def _answers(self) -> Tensor:
        """The whole network's logits [N, 10] of the training images, in their order."""
        return torch.cat([self.whole(images) for images in self.train.images.split(50)])

    def cut(self, model: nn.Module, ratio: float) -> channels.Pruned:
        labelled = [(self.few[0], self.train.labels[:CALIBRATION])]
        options = {"criterion": "taylor", "round_to": 8, "batches": labelled}
        return channels.prune(model, (self.train.images[:2],), ratio=ratio, **options)

    def heal_(self, model: nn.Module, seed: int, scales: Mapping[str, Tensor], bits: int) -> None:
        """Train in place on the stored answers; with scales, in codes."""
        loss_fn = distillation.distilling(None, **SOFT)
        if scales:
            loss_fn = in_codes(loss_fn, scales, bits)
        batches = training.Batches((self.train.images, self.train.labels, self.answers), BATCH, seed)
        training.train_(model, batches, epochs=EPOCHS, steps=2 if self.quick else None, max_lr=MAX_LR, loss_fn=loss_fn)
        round_(model, scales, bits)

    def integers(self, model: nn.Module, bits: int) -> nn.Module:
        return integer.convert(ptq.quantize(model, self.few, weights=bits).model)

    def right(self, model: nn.Module) -> Tensor:
        return training.correct(model, self.test)

    def judged(self, model: nn.Module, bits: list[int]) -> dict[str, Any]:
        """Return which test images a float network and its integers answer right, by bits, and the integers' bytes."""
        rounded = {b: self.integers(model, b) for b in bits}
        right = {32: self.right(model)} | {b: self.right(network) for b, network in rounded.items()}
        return {"right": right, "bytes": {b: artifact.size(network) for b, network in rounded.items()}}

    def do(self, run: Run) -> dict[str, Any]:
        """Take the steps in the order of the run, and judge the network before and after healing."""
        model = copy.deepcopy(self.whole)
        scales = {}
        if run.order != USUAL:
            scales = scales_of(model, run.bits)
            round_(model, scales, run.bits)
        pruned = self.cut(model, run.ratio)
        small = pruned.model
        if scales:
            scales = {name: still_there(scale, pruned.plan.kept.get(name, {})) for name, scale in scales.items()}
        before = self.right(small)
        self.heal_(small, run.seed, scales if run.order == IN_CODES else {}, run.bits)
        bits = [8, 4] if run.order == USUAL else [8]  # codes of four bits stay, on a grid of eight
        return {"before healing": before} | self.judged(small, bits)


def versions(finished: Mapping[Run, Mapping[str, Any]], seeds: list[int]) -> dict[tuple[str, int], Tensor]:
    """Stack the right answers of the orders, {(order, bits): bool [seeds, images]}."""

    def stacked(order: str, bits: int, key: int) -> Tensor:
        return torch.stack([finished[Run(order, bits, 0.5, seed)]["right"][key] for seed in seeds])

    return {
        ("cut, heal", 32): stacked(USUAL, 32, 32),
        (USUAL, 8): stacked(USUAL, 32, 8),
        (USUAL, 4): stacked(USUAL, 32, 4),
        (AGAIN, 8): stacked(AGAIN, 8, 8),
        (IN_CODES, 8): stacked(IN_CODES, 8, 8),
        (IN_CODES, 4): stacked(IN_CODES, 4, 8),
    }


def changes(right: Mapping[tuple[str, int], Tensor], whole: Tensor) -> list[dict[str, Any]]:
    """Compare each version with the whole network, and the orders with the usual one at equal bits."""
    rows = []
    for (order, bits), mine in right.items():
        against = {WHOLE: whole.expand_as(mine)}
        if (USUAL, bits) in right and order != USUAL:
            against[USUAL] = right[USUAL, bits]
        for before, theirs in against.items():
            change, low, high = stats.accuracy_change_over_seeds(mine, theirs)
            rows.append({"after": order, "bits": bits, "before": before, "change": change, "low": low, "high": high})
    return rows


def gate_counts(of_first_seed: Mapping[str, Tensor], whole: Tensor) -> list[dict[str, Any]]:
    """Count the answers that turned wrong and right among the first test images."""
    rows = []
    for name, mine in of_first_seed.items():
        for n in JUDGED_ON:
            before, after = whole[:n], mine[:n]
            lost, won = int((before & ~after).sum()), int((after & ~before).sum())
            rows.append({"version": name, "images": n, "right": int(before.sum()), "lost": lost, "won": won})
    return rows


def write(setting: Setting, finished: Mapping[Run, Mapping[str, Any]], seeds: list[int]) -> Path:
    """Write the record of the seeds."""
    whole = setting.right(setting.whole)
    rounded = setting.integers(setting.whole, 8)
    whole8 = setting.right(rounded)
    right = versions(finished, seeds)
    usual = finished[Run(USUAL, 32, 0.5, 0)]
    rows = [
        {"order": order, "bits": bits, "seed": seed, "accuracy": of_seed.double().mean().item()}
        for (order, bits), mine in right.items()
        for seed, of_seed in zip(seeds, mine, strict=True)
    ]
    rows.append({"order": WHOLE, "bits": 32, "seed": 0, "accuracy": whole.double().mean().item()})
    rows.append({"order": ROUNDED, "bits": 8, "seed": 0, "accuracy": whole8.double().mean().item()})
    gates = {
        "int8": whole8,
        "cut": usual["before healing"],
        "cut, heal": usual["right"][32],
        "cut, heal, int8": usual["right"][8],
        "cut, heal, int4": usual["right"][4],
    }
    plans = {
        run.ratio: {"accuracy": outcome["right"][8].double().mean().item(), "bytes": outcome["bytes"][8]}
        for run, outcome in finished.items()
        if run.ratio != 0.5
    }
    seconds = [outcome["seconds"] for outcome in finished.values()]
    return experiments.save(
        Path(__file__).stem,
        QUESTION,
        rows,
        by=("order", "bits", "seed"),
        columns={"accuracy": quality("fraction")},
        settings={
            "seeds": len(seeds),
            "epochs": EPOCHS,
            "images of a step": BATCH,
            "training images": len(setting.train),
            "test images": len(whole),
            "max_lr": MAX_LR,
            **SOFT,
            "seconds of a run": sorted(seconds)[len(seconds) // 2],
            "bytes": {"as it is": artifact.size(setting.whole), "int8": artifact.size(rounded), **usual["bytes"]},
            "changes": changes(right, whole),
            "gates": gate_counts(gates, whole),
            "plans": plans,
        },
        seconds=sum(seconds),
    )


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    setting = Setting(options.folder, options.quick)
    runs = list(all_runs(options.quick))
    finished = resumable.finished(runs, options, setting.do)
    of_seed = {seed: [run for run in runs if run.seed == seed and run.ratio == 0.5] for seed in range(SEEDS)}
    seeds = [seed for seed, needed in of_seed.items() if needed and all(run in finished for run in needed)]
    if options.quick:
        print(changes(versions(finished, seeds), setting.right(setting.whole)))
    elif len(seeds) >= LEAST_SEEDS:
        print(write(setting, finished, seeds))


if __name__ == "__main__":
    main()
