"""Accuracy of ResNet-20 trained with the rounding in place, beside as long training without it and AdaRound then.

    python benchmarks/qat_over_control.py --folder DIR               two hours on an idle core, and writes the record
    python benchmarks/qat_over_control.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/qat_over_control.py --quick                    some runs on few images, and writes nothing

All ways start from the float network with folded norms; the first and the last layer have 8 bits in every run.

- "float": plain steps in float32, and nothing is rounded.
- "control": the same plain steps, then AdaRound layer by layer (Nagel et al. 2020, arXiv:2004.10568), where a layer's
  inputs come from the network whose weights and activations are rounded so far. With 0 steps: careful rounding alone.
  At 8 bits each weight goes to its nearest point.
- "LSQ": steps with the rounding in place and with learned steps of the grid (Esser et al. 2020, arXiv:1902.08153).
- "STE": the same start, batches and estimator, but the grid stays as it was at the start.

A length is a training run of its own, with its own cycle of the learning rate. The highest rate was chosen for the
plain steps alone, as the one of RATES with the least loss on the validation images; every way has it. A seed draws the
calibration images and the order of the batches, for all ways alike. All 10,000 test images judge each run.

The parts of the experiment are done one after the other, each for all seeds; the record holds the parts that are done.
Answers are compared image by image; the intervals are over images and seeds. Lesson 08 shows the record:
`lab.recorded("qat_over_control")`.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import resumable
import rounding_ladder as ladder
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import datasets, models, stats, training
from labkit.lesson import experiments
from labkit.quantization import fold, ptq, qat, rounding
from labkit.quantization.simulated import FakeQuantized
from labkit.records import quality, result

QUESTION = "from how many steps on does training with the rounding beat as many plain steps and AdaRound then?"
WIDTHS = {"W8A8": (8, 8), "W4A4": (4, 4), "W3A3": (3, 3), "W2A4": (2, 4), "W2A2": (2, 2)}
SHORT, LONG, LONGEST = 120, 480, 1440  # steps
BATCH = 64
RATES, TUNED, TUNING_SEED = (0.001, 0.003, 0.01), 120, 99
SEEDS = 3
IMAGES = 128  # for ranges and AdaRound, without labels
ADAROUND_STEPS = 200  # a layer
TRAINED = ("LSQ", "STE")
ENDS = ("conv", "fc")
PAIR = ("control", "LSQ")
PARTS = (  # (way, width, steps), the most telling first
    [("float", "float32", LONG)] + [(way, "W2A2", LONG) for way in PAIR],
    [(way, "W4A4", LONG) for way in PAIR],
    [(way, "W3A3", LONG) for way in PAIR],
    [("control", width, 0) for width in ("W4A4", "W3A3", "W2A2")],
    [(way, width, SHORT) for width in ("W3A3", "W2A2") for way in PAIR],
    [(way, "W2A2", LONGEST) for way in PAIR],
    [(way, "W3A3", LONGEST) for way in PAIR],
    [("STE", "W2A2", LONG)],
    [(way, "W2A4", LONG) for way in PAIR],
    [(way, "W8A8", LONG) for way in PAIR],
)


@dataclass(frozen=True)
class Run(resumable.NamedByFields):
    """A network: made in this way, for this width ("float32": not rounded), after training steps with a seed.

    rate: the highest learning rate; 0 if nothing is trained.
    """

    way: str
    width: str
    steps: int
    seed: int
    rate: float


def tuning_runs() -> list[Run]:
    """List the runs of plain steps that the rate is chosen by."""
    return [Run("float", "float32", TUNED, TUNING_SEED, rate) for rate in RATES]


def runs_of(part: Sequence[tuple[str, str, int]], rate: float) -> list[Run]:
    """List the runs of a part, all of a seed before those of the next."""
    return [Run(way, width, steps, seed, rate if steps else 0.0) for seed in range(SEEDS) for way, width, steps in part]


def choices(width: str) -> dict[str, dict[str, int]]:
    """Return bits of weights and activations, as `ptq` and `qat` take them."""
    weights, activations = WIDTHS[width]
    ends = dict.fromkeys(ENDS, 8)
    return {"weights": {"": weights, **ends}, "activations": {"": activations, **ends}}


# --- the ways ---------------------------------------------------------------------------------------------------------


class Networks:
    """Makes the network of a run.

    folded: the float network, each norm in the convolution before it.
    train: the training images.
    folder: where trained float networks are kept, for every width that is rounded from them.
    """

    def __init__(self, folder: Path) -> None:
        self.folded = fold.fold_batch_norm(models.resnet20(), datasets.fashion_mnist("test", 4).images)
        self.train = datasets.fashion_mnist("train")
        self.folder = folder

    def of(self, run: Run) -> nn.Module:
        if run.way in TRAINED:
            return self.trained(run)
        plain = self.plain(run)
        if run.way == "float":
            return plain
        images = ladder.calibration(IMAGES, run.seed)
        rounded = nearest(plain, run.width, images)
        if run.width != "W8A8":
            adaround_(rounded, plain, images)
        return rounded

    def trained(self, run: Run) -> nn.Module:
        """Train with the rounding in place."""
        images = ladder.calibration(IMAGES, run.seed)
        new = qat.prepare(self.folded, [images], **choices(run.width), method="lsq")
        if run.way == "STE":
            qat.freeze(new)
        self.finetune_(new, run)
        return new

    def plain(self, run: Run) -> nn.Module:
        """Train without rounding, or load the network that was trained so."""
        new = copy.deepcopy(self.folded).requires_grad_()
        if run.steps:
            file = self.folder / f"weights, {run.steps}, {run.seed}, {run.rate}.pt"
            new.load_state_dict(resumable.once(file, lambda: self.finetune_(new, run).state_dict()))
        return new

    def finetune_(self, model: nn.Module, run: Run) -> nn.Module:
        """Train a model in place, and return the model."""
        if run.steps:
            batches = training.Batches((self.train.images, self.train.labels), BATCH, seed=run.seed)
            qat.finetune_(model, batches, steps=run.steps, max_lr=run.rate)
        return model


def nearest(model: nn.Module, width: str, images: Tensor) -> nn.Module:
    """Round to the nearest points of grids with the least squared error, of weights and of activations."""
    rounded = ptq.quantize(model, [images], **choices(width), observer="mse").model
    for name, layer in layers(rounded).items():
        bits = layer.weight_grid.bits
        ranges = "largest" if bits == 8 else "least squares"
        layer.weight_quantizer.scale.copy_(ladder.grid_of(model.get_submodule(name), bits, ranges).scale)
    return rounded


def adaround_(rounded: nn.Module, model: nn.Module, images: Tensor) -> None:
    """Round each weight up or down so that a layer gives the float network's outputs for the rounded inputs."""
    wanted = ladder.seen(model, [*layers(rounded)], images)
    for name, layer in layers(rounded).items():
        if name in ENDS:
            continue
        inputs, _ = ladder.seen(rounded, [name], images)[name]
        _, outputs = wanted[name]
        grid = layer.weight_grid
        codes = rounding.adaround(layer.layer, grid, layer.fake_input(inputs), outputs, steps=ADAROUND_STEPS)
        layer.layer.weight.data = grid.dequantize(codes)


def layers(model: nn.Module) -> dict[str, FakeQuantized]:
    """Return the layers that round, in the order of the calls."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantized)}


# --- judging ----------------------------------------------------------------------------------------------------------


def do(networks: Networks, run: Run, split: datasets.Split) -> dict[str, Any]:
    """Make the network of a run, and judge it: which images it answers right, and its mean loss."""
    answers = ladder.logits(networks.of(run), split.images)
    return {"right": answers.argmax(1) == split.labels, "loss": float(F.cross_entropy(answers, split.labels))}


Answers = dict[tuple[str, str, int], list[Tensor]]  # (width, way, steps) -> right answers [images] of each seed


def answers_of(done: Mapping[Run, Mapping[str, Any]]) -> Answers:
    """Group the right answers by seeds; float networks stand at every width."""
    answers: Answers = {}
    widths = {run.width for run in done if run.width in WIDTHS}
    for run, outcome in done.items():
        for width in widths if run.way == "float" else (run.width,):
            answers.setdefault((width, run.way, run.steps), []).append(outcome["right"])
    return answers


def changes(answers: Answers, dense: Tensor) -> list[dict[str, Any]]:
    """Compare all networks of a width with each other, and with the float network before training."""
    rows = []
    for (width, way, steps), right in answers.items():
        row = {"width": width, "after": [way, steps], "before": ["float", 0]}
        rows.append({**row, **changed(right, [dense] * len(right))})
    for before, after in itertools.permutations(answers, 2):
        if before[0] == after[0]:
            row = {"width": after[0], "after": list(after[1:]), "before": list(before[1:])}
            rows.append({**row, **changed(answers[after], answers[before])})
    return rows


def changed(after: list[Tensor], before: list[Tensor]) -> dict[str, float]:
    """Return the change of the share of right answers, with its interval over images and seeds."""
    change, low, high = stats.accuracy_change_over_seeds(torch.stack(after), torch.stack(before))
    return {"change": change, "low": low, "high": high}


def write(
    done: Mapping[Run, Mapping[str, Any]],
    tuned: Mapping[Run, Mapping[str, Any]],
    dense: Tensor,
) -> Path:
    """Write the record of some parts."""
    rows = []
    for run, outcome in done.items():
        rows.append({**asdict(run), "accuracy": outcome["right"].double().mean().item(), "loss": outcome["loss"]})
    outcomes = (*tuned.values(), *done.values())
    return experiments.save(
        Path(__file__).stem,
        QUESTION,
        rows,
        by=("way", "width", "steps", "seed", "rate"),
        columns={"accuracy": quality("fraction"), "loss": result()},
        settings={
            "dense": dense.double().mean().item(),
            "test images": len(dense),
            "validation images": len(datasets.fashion_mnist("validation")),
            "training images": len(datasets.fashion_mnist("train")),
            "calibration images": IMAGES,
            "seeds": SEEDS,
            "images of a step": BATCH,
            "AdaRound's steps": ADAROUND_STEPS,
            "tuning": [{"rate": run.rate, "loss": outcome["loss"]} for run, outcome in tuned.items()],
            "changes": changes(answers_of(done), dense),
        },
        seconds=sum(outcome["seconds"] for outcome in outcomes),
    )


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    networks = Networks(options.folder)
    few = 100 if options.quick else None
    validation, test = datasets.fashion_mnist("validation", few), datasets.fashion_mnist("test", few)
    if options.quick:
        runs = [
            Run("control", "W2A4", 0, 0, 0.0),
            Run("LSQ", "W2A4", 3, 0, RATES[0]),
            Run("STE", "W2A4", 3, 0, RATES[0]),
        ]
        resumable.finished(runs, options, lambda run: do(networks, run, test))
        return
    tuned = resumable.finished(tuning_runs(), options, lambda run: do(networks, run, validation))
    if len(tuned) < len(RATES):
        return
    rate = min(tuned, key=lambda run: tuned[run]["loss"]).rate
    done: dict[Run, dict[str, Any]] = {}
    for part in PARTS:
        runs = runs_of(part, rate)
        outcomes = resumable.finished(runs, options, lambda run: do(networks, run, test))
        if len(outcomes) == len(runs):
            done |= outcomes
    if not done:
        return
    dense = ladder.logits(networks.folded, test.images).argmax(1) == test.labels
    print(write(done, tuned, dense))


if __name__ == "__main__":
    main()
