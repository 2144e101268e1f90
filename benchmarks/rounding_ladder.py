"""Accuracy of ResNet-20 with weights in few bits and without training: by ranges, by repair and by rounding.

    python benchmarks/rounding_ladder.py --folder DIR               40 minutes on an idle core, and writes the record
    python benchmarks/rounding_ladder.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/rounding_ladder.py --quick                    six runs on few images, and writes nothing

Weights alone are rounded, with a scale for each output channel; the first and the last layer have 8 bits in every run.
A run has one choice of each kind:

- ranges: the largest weight of a channel ("largest"), or the end with the least squared error ("least squares");
- rounding: to the nearest point, or AdaRound layer by layer (Nagel et al. 2020, arXiv:2004.10568), where a layer's
  inputs come from the network whose earlier layers are rounded, and its outputs from the float network;
- repair afterwards: none; the mean of each output ("bias", Nagel et al. 2019, arXiv:1906.04721); or the mean and the
  variance of the batch norms, estimated anew ("norms").

A seed draws the training images without labels that all three use. Float weights with norms estimated anew are the
control of that repair. All test images judge every run, and each run is compared with the float network image by image.
Lesson 07 shows the record: `lab.recorded("rounding_ladder")`.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import resumable
import torch
from torch import Tensor, fx, nn

from labkit import datasets, models, stats, training
from labkit.lesson import experiments
from labkit.modules.hooks import watching
from labkit.quantization import affine, fold, ptq, rounding
from labkit.quantization.affine import Grid
from labkit.records import quality, result

QUESTION = "how many points do few-bit weights lose, and what do ranges, repairs and AdaRound win back?"
FLOAT = 32  # bits of the control
IMAGES, FEW = 128, 10  # of the training set, without labels
SEEDS = 5
STEPS = 400  # of AdaRound, a layer
CANDIDATES = 100  # ranges that the squared error is compared at
BATCH = 50  # test images: their activations stay in the caches of one core
KERNELS = (nn.Conv2d, nn.Linear)
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Run(resumable.NamedByFields):
    """A network with rounded weights; the images that a seed draws matter only where one of the steps reads them."""

    bits: int
    ranges: str
    rounding: str
    repair: str
    images: int
    seed: int

    @property
    def draws(self) -> bool:
        """True if the run reads calibration images."""
        return self.rounding != "nearest" or self.repair != "none"


def all_runs() -> list[Run]:
    """List the runs, all of a seed before those of the next."""
    return [run for seed in range(SEEDS) for run in runs_of(seed) if seed == 0 or run.draws]


def runs_of(seed: int) -> Iterator[Run]:
    """List the runs of a seed: every bit width with many images, then some with few images."""
    for bits, ranges in itertools.product((2, 3, 4), ("largest", "least squares")):
        for repair in ("none", "bias", "norms"):
            yield Run(bits, ranges, "nearest", repair, IMAGES, seed)
        yield Run(bits, ranges, "AdaRound", "none", IMAGES, seed)
        yield Run(bits, ranges, "AdaRound", "norms", IMAGES, seed)
    for repair in ("none", "bias", "norms"):
        yield Run(8, "largest", "nearest", repair, IMAGES, seed)
    yield Run(FLOAT, "largest", "nearest", "norms", IMAGES, seed)
    for bits in (2, 3, 4):
        yield Run(bits, "least squares", "nearest", "norms", FEW, seed)
    yield Run(2, "least squares", "AdaRound", "none", FEW, seed)
    yield Run(2, "least squares", "AdaRound", "norms", FEW, seed)


# --- the network ------------------------------------------------------------------------------------------------------


class Networks:
    """The float network, the same network without batch norms, and the pairs of convolution and norm.

    dense: the float network.
    folded: the network with each norm in the convolution before it; its weights are the ones that are rounded.
    norm_of: {convolution: norm}, names in the float network.
    layers: names of the convolutions and Linears.
    """

    def __init__(self) -> None:
        self.dense = models.resnet20()
        self.folded = fold.fold_batch_norm(self.dense, datasets.fashion_mnist("test", 4).images)
        self.layers = [name for name, module in self.folded.named_modules() if isinstance(module, KERNELS)]
        self.norm_of = {}
        for node in fx.symbolic_trace(self.dense).graph.nodes:
            module = self.dense.get_submodule(node.target) if node.op == "call_module" else None
            if isinstance(module, nn.BatchNorm2d):
                self.norm_of[node.args[0].target] = node.target

    def bits_of(self, layer: str, bits: int) -> int:
        return 8 if layer in (self.layers[0], self.layers[-1]) else bits

    def without_norms(self, weights: Weights) -> nn.Module:
        """Return a copy of the folded network with other weights."""
        new = copy.deepcopy(self.folded)
        for name, weight in weights.items():
            new.get_submodule(name).weight.data = weight.clone()
        return new

    def with_norms(self, weights: Weights) -> nn.Module:
        """Return a copy of the float network that computes the same as `without_norms`: W = W_folded sigma / gamma."""
        new = copy.deepcopy(self.dense)
        for name, weight in weights.items():
            layer = new.get_submodule(name)
            if name not in self.norm_of:
                layer.weight.data = weight.clone()
                continue
            norm = new.get_submodule(self.norm_of[name])
            gain = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
            layer.weight.data = weight / gain.view(-1, 1, 1, 1)
        return new


def calibration(images: int, seed: int) -> Tensor:
    """Draw training images [images, 1, 28, 28]."""
    train = datasets.fashion_mnist("train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train.images[order[:images]]


@torch.no_grad()
def seen(model: nn.Module, names: list[str], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the input and the output of layers for some images."""
    calls = {}

    def look(name: str, x: Tensor, output: Tensor) -> None:
        calls[name] = x, output

    with watching(model, names, look):
        model(images)
    return calls


# --- ranges and rounding ----------------------------------------------------------------------------------------------


def grid_of(layer: nn.Module, bits: int, ranges: str) -> Grid:
    """Choose the symmetric grid of a weight, with a scale for each output channel."""
    largest = ptq.weight_grid(layer, bits)
    if ranges == "largest":
        return largest
    weight = layer.weight.detach()
    best, least = largest.scale.clone(), torch.full_like(largest.scale, torch.inf)
    for hundredths in range(CANDIDATES, 0, -1):
        scale = largest.scale * hundredths / CANDIDATES
        rounded = Grid(scale, largest.zero, bits, largest.lo, largest.hi).fake(weight)
        error = (rounded - weight).square().flatten(1).sum(1).view_as(scale)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return Grid(best, largest.zero, bits, largest.lo, largest.hi)


def grids(networks: Networks, run: Run) -> dict[str, Grid]:
    """Choose the grids of all weights; the first and the last layer go to their largest weight in 8 bits."""
    chosen = {}
    for name in networks.layers:
        bits = networks.bits_of(name, run.bits)
        ranges = run.ranges if bits == run.bits else "largest"
        chosen[name] = grid_of(networks.folded.get_submodule(name), bits, ranges)
    return chosen


def nearest(networks: Networks, run: Run) -> Weights:
    """Round all weights to the nearest points."""
    chosen = grids(networks, run)
    return {name: grid.fake(networks.folded.get_submodule(name).weight.detach()) for name, grid in chosen.items()}


def adaround(networks: Networks, run: Run) -> Weights:
    """Round layer by layer: inputs from the network rounded so far, outputs from the float network."""
    images = calibration(run.images, run.seed)
    wanted = seen(networks.folded, networks.layers, images)
    weights = {}
    for name, grid in grids(networks, run).items():
        layer = networks.folded.get_submodule(name)
        if networks.bits_of(name, run.bits) != run.bits:
            weights[name] = grid.fake(layer.weight.detach())
            continue
        inputs, _ = seen(networks.without_norms(weights), [name], images)[name]
        _, outputs = wanted[name]
        codes = rounding.adaround(layer, grid, inputs, outputs, steps=STEPS)
        weights[name] = grid.dequantize(codes)
    return weights


def rounded(networks: Networks, run: Run, folder: Path) -> Weights:
    """Return the weights of a run; those that AdaRound found are kept in the folder, for every repair."""
    if run.bits == FLOAT:
        return {name: networks.folded.get_submodule(name).weight.detach() for name in networks.layers}
    if run.rounding == "nearest":
        return nearest(networks, run)
    file = folder / f"weights, {run.bits}, {run.ranges}, {run.images}, {run.seed}.pt"
    return resumable.once(file, lambda: adaround(networks, run))


def repaired(networks: Networks, run: Run, weights: Weights) -> nn.Module:
    """Return the network with rounded weights and a repair."""
    images = calibration(run.images, run.seed)
    if run.repair == "norms":
        new = networks.with_norms(weights)
        training.reestimate_norms_(new, [images])
        return new
    new = networks.without_norms(weights)
    if run.repair == "bias":
        for name, (x, _) in seen(networks.folded, list(networks.norm_of), images).items():
            layer = networks.folded.get_submodule(name)
            new.get_submodule(name).bias.data = rounding.bias_correction(layer, weights[name], x.mean((0, 2, 3)))
    return new


# --- judging ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part) for part in images.split(BATCH)])


def do(networks: Networks, run: Run, folder: Path, test: datasets.Split, exact: Tensor) -> dict[str, Any]:
    """Do a run, and return which test images it answers right, and the SQNR of its logits in dB."""
    model = repaired(networks, run, rounded(networks, run, folder))
    answer = logits(model, test.images)
    right = answer.argmax(1) == test.labels
    return {"right": right, "dB": affine.sqnr(exact, answer)}


def summary(done: Mapping[Run, Mapping[str, Any]], dense: Tensor) -> list[dict[str, Any]]:
    """Return a row for each run: its accuracy, its SQNR, and the images that only one of both answers right."""
    rows = []
    for run, outcome in done.items():
        right = outcome["right"]
        rows.append({
            **asdict(run),
            "accuracy": right.double().mean().item(),
            "dB": outcome["dB"],
            "gained": int((right & ~dense).sum()),
            "lost": int((dense & ~right).sum()),
        })  # fmt: skip
    return rows


def changes(done: Mapping[Run, Mapping[str, Any]], dense: Tensor) -> list[dict[str, Any]]:
    """Compare every two networks of a width, and each with the float network: the change with its interval."""
    answers: dict[tuple[int, str, str, str, int], list[Tensor]] = {}
    for run, outcome in done.items():
        way = run.bits, run.ranges, run.rounding, run.repair, run.images
        answers.setdefault(way, []).append(outcome["right"])
    rows = []
    for after, of_after in answers.items():
        rows.append({"after": after, "before": "float", **changed(of_after, [dense])})
    for before, after in itertools.combinations(answers, 2):
        if before[0] == after[0]:
            rows.append({"after": after, "before": before, **changed(answers[after], answers[before])})
    return rows


def changed(after: list[Tensor], before: list[Tensor]) -> dict[str, float]:
    """Return the change of the share of right answers, with its interval.

    The interval is over images, and over seeds too if a side has several.
    """
    seeds = max(len(after), len(before))
    if seeds == 1:
        change, low, high = stats.accuracy_change(after[0], before[0])
    else:
        both = [torch.stack(right).expand(seeds, -1) for right in (after, before)]
        change, low, high = stats.accuracy_change_over_seeds(*both)
    return {"change": change, "low": low, "high": high}


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    networks = Networks()
    test = datasets.fashion_mnist("test", 200 if options.quick else None)
    exact = logits(networks.dense, test.images)
    runs = all_runs()[: 6 if options.quick else None]
    done = resumable.finished(runs, options, lambda run: do(networks, run, options.folder, test, exact))
    if options.quick or len(done) < len(runs):
        return
    dense = exact.argmax(1) == test.labels
    path = experiments.save(
        Path(__file__).stem,
        QUESTION,
        summary(done, dense),
        by=("bits", "ranges", "rounding", "repair", "images", "seed"),
        columns={
            "accuracy": quality("fraction"),
            "dB": quality("dB"),
            "gained": result("images"),
            "lost": result("images"),
        },
        settings={
            "dense": dense.double().mean().item(),
            "test images": len(test),
            "seeds": SEEDS,
            "steps": STEPS,
            "changes": changes(done, dense),
        },
        seconds=sum(outcome["seconds"] for outcome in done.values()),
    )
    print(path)


if __name__ == "__main__":
    main()
