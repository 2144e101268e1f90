"""Accuracy of ResNet-20 trained with the rounding in place, beside as long training without it and AdaRound then.

    python benchmarks/qat_over_control.py --folder DIR               90 minutes on an idle core, and writes the record
    python benchmarks/qat_over_control.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/qat_over_control.py --quick                    some runs on few images, and writes nothing

All ways start from the float network with folded norms; the first and the last layer have 8 bits in every run.

- "float": plain steps in float32, and nothing is rounded.
- "control": the same plain steps, then AdaRound layer by layer (Nagel et al. 2020, arXiv:2004.10568), where a layer's
  inputs come from the network whose weights and activations are rounded so far. With 0 steps: careful rounding alone.
- "nearest": the control's plain steps, then each weight to its nearest point; "min-max" also has the widest ranges.
- "LSQ": steps with the rounding in place and with learned steps of the grid (Esser et al. 2020, arXiv:1902.08153).
- "STE": the same start, batches and estimator, but the grid stays as it was at the start.

A length is a training run of its own, with its own cycle of the learning rate. Each way has the rate of RATES that gave
the least loss on the validation images, for its width, after TUNED steps with batches that no other run has. A seed
draws the calibration images and the order of the batches, for all ways alike. All 10,000 test images judge each run.
The trained integers of seed 0 are held against exact arithmetic on all of them, too.

The record holds the seeds that are done for all ways, three or more. Answers are compared image by image; the intervals
are over images and seeds. Lesson 08 shows the record: `lab.recorded("qat_over_control")`.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
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
from labkit.quantization import fold, integer, ptq, qat, rounding
from labkit.quantization.simulated import FakeQuantized
from labkit.records import quality, result

QUESTION = "from how many steps on does training with the rounding beat as many plain steps and AdaRound then?"
WIDTHS = {"W4A4": (4, 4), "W3A3": (3, 3), "W2A4": (2, 4), "W8A8": (8, 8)}
FINE = "W8A8"  # the width that little is lost at: its runs have the last length only
LENGTHS = (0, 30, 120, 480)
STE_LENGTHS = (120, 480)
BATCH = 64
RATES, TUNED, TUNING_SEED = (0.001, 0.003, 0.01), 120, 99
SEEDS, LEAST_SEEDS = 5, 3
IMAGES = 128  # for ranges and AdaRound, without labels
ADAROUND_STEPS = 200  # a layer
TRAINED = ("LSQ", "STE")
ENDS = ("conv", "fc")


@dataclass(frozen=True)
class Run:
    """A network: made in this way, for this width ("float32": not rounded), after training steps with a seed.

    rate: the highest learning rate; 0 if nothing is trained.
    """

    way: str
    width: str
    steps: int
    seed: int
    rate: float

    @property
    def file(self) -> str:
        return ", ".join(map(str, asdict(self).values())) + ".pt"


Rates = Mapping[tuple[str, str], float]  # (way, width) -> highest learning rate


def tuning_runs() -> Iterator[Run]:
    """List the runs that the rates are chosen by; those of float networks come before their rounding."""
    for rate in RATES:
        yield Run("float", "float32", TUNED, TUNING_SEED, rate)
    for width, rate in itertools.product(WIDTHS, RATES):
        for way in ("control", *TRAINED):
            if width != FINE or way != "STE":
                yield Run(way, width, TUNED, TUNING_SEED, rate)


def all_runs(rates: Rates) -> Iterator[Run]:
    """List the runs, all of a seed before those of the next."""
    for seed in range(SEEDS):
        yield from runs_of(seed, rates)


def runs_of(seed: int, rates: Rates) -> Iterator[Run]:
    """List the runs of a seed, those of float networks first."""

    def run(way: str, width: str, steps: int) -> Run:
        tuned = way if way in TRAINED else "control"
        return Run(way, width, steps, seed, rates[tuned, width] if steps else 0.0)

    for width in WIDTHS:
        lengths = LENGTHS[-1:] if width == FINE else LENGTHS
        for steps in lengths:
            if steps:
                yield Run("float", "float32", steps, seed, rates["control", width])
    for width in WIDTHS:
        lengths = LENGTHS[-1:] if width == FINE else LENGTHS
        for steps in lengths:
            yield run("control", width, steps)
            yield run("LSQ", width, steps)
            if steps in STE_LENGTHS and width != FINE:
                yield run("STE", width, steps)
        for steps in (0, LENGTHS[-1]):
            yield run("nearest", width, steps)
        yield run("min-max", width, 0)


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
        if run.way == "min-max":
            return ptq.quantize(plain, [images], **choices(run.width), observer="minmax").model
        rounded = nearest(plain, run.width, images)
        if run.way == "control":
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
        if not run.steps:
            return new
        file = self.folder / f"weights, {run.steps}, {run.seed}, {run.rate}.pt"
        if not file.exists():
            self.finetune_(new, run)
            resumable.save(new.state_dict(), file)
        new.load_state_dict(torch.load(file))
        return new

    def finetune_(self, model: nn.Module, run: Run) -> None:
        if run.steps:
            batches = training.Batches((self.train.images, self.train.labels), BATCH, seed=run.seed)
            qat.finetune_(model, batches, steps=run.steps, max_lr=run.rate)


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
    model = networks.of(run)
    answers = ladder.logits(model, split.images)
    outcome = {"right": answers.argmax(1) == split.labels, "loss": float(F.cross_entropy(answers, split.labels))}
    if run.way == "LSQ" and run.seed == 0 and run.steps == LENGTHS[-1]:
        outcome["integers"] = proof(model, answers, split.images)
    return outcome


@torch.no_grad()
def proof(simulated: nn.Module, answers: Tensor, images: Tensor) -> dict[str, int]:
    """Count the codes of the converted network against exact arithmetic, and the images of another class."""
    real = integer.convert(simulated)
    counts: Counter[str] = Counter()
    for part, promised in zip(images.split(ladder.BATCH), answers.split(ladder.BATCH), strict=True):
        for row in integer.prove(real, part):
            counts.update({name: row[name] for name in ("codes", "different", "ties", "wrong")})
        delivered = real(part)
        counts["other class"] += int((delivered.argmax(1) != promised.argmax(1)).sum())
    return dict(counts)


def chosen_rates(tuned: Mapping[Run, Mapping[str, Any]]) -> Rates:
    """Choose for each way and width the rate with the least loss on the validation images."""
    rates, least = {}, {}
    for run, outcome in tuned.items():
        kind = run.way, run.width
        if outcome["loss"] < least.get(kind, float("inf")):
            rates[kind], least[kind] = run.rate, outcome["loss"]
    return rates


Answers = dict[tuple[str, str, int], list[Tensor]]  # (width, way, steps) -> right answers [images] of each seed


def answers_of(done: Mapping[Run, Mapping[str, Any]]) -> Answers:
    """Group the right answers by seeds; float networks stand at every width with the control's rate."""
    answers: Answers = {}
    floats = {(run.steps, run.seed, run.rate): outcome for run, outcome in done.items() if run.way == "float"}
    for run, outcome in done.items():
        if run.way == "float":
            continue
        answers.setdefault((run.width, run.way, run.steps), []).append(outcome["right"])
        if run.way == "control" and run.steps:
            right = floats[run.steps, run.seed, run.rate]["right"]
            answers.setdefault((run.width, "float", run.steps), []).append(right)
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


def write(done: Mapping[Run, Mapping[str, Any]], tuned: Mapping[Run, Mapping[str, Any]], dense: Tensor) -> Path:
    """Write the record of some seeds."""
    rows = []
    for run, outcome in done.items():
        accuracy = outcome["right"].double().mean().item()
        seconds = round(outcome["seconds"], 1)
        rows.append({**asdict(run), "accuracy": accuracy, "loss": outcome["loss"], "seconds": seconds})
    of_tuning = [{**asdict(run), "loss": outcome["loss"]} for run, outcome in tuned.items()]
    integers = [{"width": run.width, **outcome["integers"]} for run, outcome in done.items() if "integers" in outcome]
    return experiments.save(
        Path(__file__).stem,
        QUESTION,
        rows,
        by=("way", "width", "steps", "seed", "rate"),
        columns={"accuracy": quality("fraction"), "loss": result(), "seconds": result("s")},
        settings={
            "dense": dense.double().mean().item(),
            "test images": len(dense),
            "validation images": len(datasets.fashion_mnist("validation")),
            "training images": len(datasets.fashion_mnist("train")),
            "calibration images": IMAGES,
            "seeds": len({run.seed for run in done}),
            "lengths": list(LENGTHS),
            "images of a step": BATCH,
            "AdaRound's steps": ADAROUND_STEPS,
            "tuning": {"steps": TUNED, "rates": list(RATES), "runs": of_tuning},
            "integers": integers,
            "changes": changes(answers_of(done), dense),
        },
        seconds=sum(outcome["seconds"] for outcome in (*tuned.values(), *done.values())),
    )


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    networks = Networks(options.folder)
    few = 100 if options.quick else None
    validation, test = datasets.fashion_mnist("validation", few), datasets.fashion_mnist("test", few)
    if options.quick:
        rates = dict.fromkeys(itertools.product(("control", *TRAINED), WIDTHS), RATES[0])
        small = [run for run in runs_of(0, rates) if run.steps <= LENGTHS[1] and run.width in ("float32", "W2A4")]
        resumable.finished(small, options, lambda run: do(networks, run, test))
        return
    tuning = list(tuning_runs())
    tuned = resumable.finished(tuning, options, lambda run: do(networks, run, validation))
    if len(tuned) < len(tuning):
        return
    rates = chosen_rates(tuned)
    done = resumable.finished(list(all_runs(rates)), options, lambda run: do(networks, run, test))
    whole = [seed for seed in range(SEEDS) if all(run in done for run in runs_of(seed, rates))]
    if len(whole) < LEAST_SEEDS:
        return
    dense = ladder.logits(networks.folded, test.images).argmax(1) == test.labels
    print(write({run: outcome for run, outcome in done.items() if run.seed in whole}, tuned, dense))


if __name__ == "__main__":
    main()
