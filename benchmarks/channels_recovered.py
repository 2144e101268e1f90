"""Accuracy of pruned ResNet-20 after recovery training: by criterion, by plan and by steps, on all test images.

    python benchmarks/channels_recovered.py --folder DIR               two hours on an idle core, and writes the record
    python benchmarks/channels_recovered.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/channels_recovered.py --quick                    two runs on few images, and writes nothing

Every cut is trained anew with five seeds; a seed draws the order of training, the 512 training images that score the
channels and re-estimate the norms, and the random scores. "half of every layer" leaves the same widths for each
criterion, so only the choice of the channels differs. The other plans choose channels by L1, and round widths to
multiples of 8, but for those that say so; lesson 03 explains the three ways to make them. Answers are
compared image by image, and the intervals are over images and seeds. Lesson 03 shows the record:
`lab.recorded("channels_recovered")`.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resumable
import torch
from torch import Tensor, nn

from labkit import datasets, models, stats, training
from labkit.lesson import experiments
from labkit.pruning import channels, coupling, sensitivity
from labkit.pruning.scores import unit_scores
from labkit.pruning.select import lowest_k
from labkit.records import quality, result

QUESTION = "what does a cut cost after recovery training, by criterion, by plan and by steps?"
CRITERIA = ("random", "l1", "fpgm", "activation", "taylor")
HALF = "half of every layer"
DENSE, SCRATCH = "dense, trained on", "half of every layer, from scratch"  # two controls
IMAGES = 512  # of the training set, to score channels and to re-estimate norms
VALIDATION = 2000  # images of the sensitivity scan
SCANNED = (0.25, 0.5, 0.75)  # shares of a group's channels
SEEDS = 5
TENTH, THREE_TENTHS, WHOLE = 129, 387, 1290  # steps of 128 images; the network's first training took 1290
CONTROLS = (0, 1, 2)  # seeds of the controls, which take as long as all else
RECIPE = {"epochs": 99, "max_lr": 0.05}  # of the recovery; `steps` ends it
FIRST = {"epochs": 99, "max_lr": 0.2}  # of the network's first training
BATCH = 50  # test images: their activations stay in the caches of one core


@dataclass(frozen=True)
class Run:
    """A cut by a criterion, trained for some steps with a seed; 0 steps re-estimate the norms only, -1 nothing."""

    plan: str
    criterion: str
    steps: int
    seed: int

    @property
    def file(self) -> str:
        return f"{self.plan}, {self.criterion}, {self.steps}, {self.seed}.pt"


def all_runs(plans: Mapping[str, Any]) -> Iterator[Run]:
    """List the runs, all of a seed before those of the next."""
    for seed in range(SEEDS):
        for criterion, steps in itertools.product(CRITERIA, (-1, 0, TENTH)):
            yield Run(HALF, criterion, steps, seed)
        for plan in plans:
            if plan != HALF:
                yield Run(plan, "l1", TENTH, seed)
        yield Run("one ranking, half of the work", "l1", THREE_TENTHS, seed)
        yield Run(HALF, "l1", WHOLE, seed)
    for seed in CONTROLS:
        yield Run(SCRATCH, "l1", WHOLE, seed)
        yield Run(DENSE, "l1", WHOLE, seed)


def calibration(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Draw IMAGES training images with labels, in batches of 64."""
    train = datasets.fashion_mnist("train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return [(train.images[part], train.labels[part]) for part in order[:IMAGES].split(64)]


def scanned(model: nn.Module, example: Tensor) -> sensitivity.Sensitivity:
    """Cut each group alone, with re-estimated norms, on validation images."""
    images = datasets.fashion_mnist("validation", VALIDATION)
    batches = training.Batches((images.images, images.labels), BATCH)
    drawn = calibration(0)

    def accuracy(pruned: nn.Module) -> float:
        training.reestimate_norms_(pruned, drawn)
        return training.accuracy(pruned, batches)

    return sensitivity.scan(model, example, accuracy, SCANNED, progress=False, criterion="l1")


def plans_of(model: nn.Module, example: Tensor, scan: sensitivity.Sensitivity) -> dict[str, dict[str, int]]:
    """Make the plans, {name: {group: channels left}}."""
    whole, rounded = {"criterion": "l1"}, {"criterion": "l1", "round_to": 8}
    made = {
        HALF: channels.plan(model, example, ratio=0.5, scope="layer", **rounded),
        "one ratio 0.25, any width": channels.plan(model, example, ratio=0.25, scope="layer", **whole),
        "one ratio 0.75, any width": channels.plan(model, example, ratio=0.75, scope="layer", **whole),
        "one ratio, half of the work": channels.plan(model, example, macs=0.5, scope="layer", **rounded),
        "one ranking, half of the work": channels.plan(model, example, macs=0.5, **rounded),
        "one ranking, a third of the work": channels.plan(model, example, macs=0.62, **rounded),
        "scan, tolerance 0.01": channels.plan(model, example, ratio=scan.allocation(0.01), **rounded),
        "scan, tolerance 0.02": channels.plan(model, example, ratio=scan.allocation(0.02), **rounded),
    }
    widths = {name: {unit.name: unit.left for unit in plan.units} for name, plan in made.items()}
    return {**widths, "one ranking by raw sums, any width": ranked_by_raw_sums(model, example)}


def ranked_by_raw_sums(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Remove the half of all channels with the smallest sums of absolute weights; a channel stays in each group."""
    groups = coupling.trace(model, example)
    scores = unit_scores(model, groups, "l1")
    joined = torch.cat(list(scores.values()))
    stays = ~lowest_k(joined, len(joined) // 2)
    of_groups = stays.split([len(of_group) for of_group in scores.values()])
    return {groups[i].name: max(int(left.sum()), 1) for i, left in zip(scores, of_groups, strict=True)}


def planned(model: nn.Module, example: Tensor, left: Mapping[str, int], criterion: str, seed: int) -> channels.Plan:
    """Choose the channels of a plan by a criterion."""
    options = {"criterion": criterion, "batches": calibration(seed), "seed": seed}
    planner = channels.Planner(model, example, scope="layer", **options)
    units = {unit.name: unit.units for unit in planner.plan(0.0).units}
    return planner.plan({name: 1 - left[name] / units[name] for name in units})


def trained(pruned: nn.Module, steps: int, seed: int) -> None:
    """Train in place; without steps re-estimate the norms, and with -1 do nothing."""
    if steps == 0:
        training.reestimate_norms_(pruned, calibration(seed))
    elif steps > 0:
        training.train_(pruned, in_order(seed), steps=steps, **RECIPE)


def in_order(seed: int) -> training.Batches:
    """Cut the training images, in the order that the seed draws, into batches of 128."""
    train = datasets.fashion_mnist("train")
    return training.Batches((train.images, train.labels), 128, seed)


def from_scratch(half: nn.Module, steps: int, seed: int) -> None:
    """Draw all weights anew, and train in place by the recipe of the network's first training."""
    torch.manual_seed(seed)
    for module in half.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    training.train_(half, in_order(seed), steps=steps, **FIRST)


def answers(run: Run, plans: Mapping[str, dict[str, int]], test: training.Batches) -> Tensor:
    """Do a run, and return which test images it answers right."""
    dense = models.resnet20()
    example = test.data[0][:1]
    if run.plan == DENSE:
        trained(dense, run.steps, run.seed)
        return training.correct(dense, test)
    plan = planned(dense, example, plans[HALF if run.plan == SCRATCH else run.plan], run.criterion, run.seed)
    pruned = channels.apply(dense, plan, example, check=False).model
    if run.plan == SCRATCH:
        from_scratch(pruned, run.steps, run.seed)
    else:
        trained(pruned, run.steps, run.seed)
    return training.correct(pruned, test)


def summary(right: Mapping[Run, Tensor], dense: Tensor) -> list[dict[str, Any]]:
    """Return a row for each run: its accuracy, and the images that only it or only the dense network answers right."""
    return [
        {
            "plan": run.plan,
            "criterion": run.criterion,
            "steps": run.steps,
            "seed": run.seed,
            "accuracy": mine.double().mean().item(),
            "gained": int((mine & ~dense).sum()),
            "lost": int((dense & ~mine).sum()),
        }
        for run, mine in right.items()
    ]


def changes(right: Mapping[Run, Tensor], dense: Tensor) -> list[dict[str, Any]]:
    """Compare every two cuts, and each with the dense network: the change of accuracy with its interval."""
    of_cut: dict[tuple[str, str, int], list[Tensor]] = {}
    for run, mine in right.items():
        of_cut.setdefault((run.plan, run.criterion, run.steps), []).append(mine)
    stacked = {cut: torch.stack(seeds) for cut, seeds in of_cut.items() if len(seeds) == SEEDS}
    stacked["dense", "", 0] = dense.expand(SEEDS, -1)
    rows = []
    for after, before in itertools.combinations(stacked, 2):
        change, low, high = stats.accuracy_change_over_seeds(stacked[after], stacked[before])
        rows.append({"after": after, "before": before, "change": change, "low": low, "high": high})
    return rows


def controls(right: Mapping[Run, Tensor]) -> list[dict[str, Any]]:
    """Compare the half that was cut and trained for as long as at first with each control, seed by seed."""
    rows = []
    for control in dict.fromkeys(run.plan for run in right if run.plan in (DENSE, SCRATCH)):
        runs = [run for run in right if run.plan == control]
        theirs = torch.stack([right[run] for run in runs])
        cut = torch.stack([right[Run(HALF, "l1", WHOLE, run.seed)] for run in runs])
        several = len(runs) > 1  # a single seed has an interval over images alone
        change, low, high = (
            stats.accuracy_change_over_seeds(cut, theirs) if several else stats.accuracy_change(cut[0], theirs[0])
        )
        accuracy = theirs.double().mean().item()
        row = {"control": control, "seeds": len(runs), "accuracy": accuracy}
        rows.append({**row, "change": change, "low": low, "high": high})
    return rows


def prepared(folder: Path) -> dict[str, Any]:
    """Scan and plan once, and keep both in the folder."""

    def compute() -> dict[str, Any]:
        dense = models.resnet20()
        example = datasets.fashion_mnist("test", 1).images
        scan = scanned(dense, example)
        groups = {row.group: {} for row in scan.rows}
        for row in scan.rows:
            groups[row.group][str(row.ratio)] = row.metric
        plans = plans_of(dense, example, scan)
        return {"baseline": scan.baseline, "scan": groups, "plans": plans}

    return resumable.once(folder / "prepared.pt", compute)


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    test = datasets.fashion_mnist("test", 200 if options.quick else None)
    batches = training.Batches((test.images, test.labels), BATCH)
    ready = prepared(options.folder)
    runs = list(all_runs(ready["plans"]))[: 2 if options.quick else None]
    done = resumable.finished(runs, options, lambda run: {"right": answers(run, ready["plans"], batches)})
    if options.quick or len(done) < len(runs):
        return
    right = {run: outcome["right"] for run, outcome in done.items()}
    dense = training.correct(models.resnet20(), batches)
    print(
        experiments.save(
            Path(__file__).stem,
            QUESTION,
            summary(right, dense),
            by=("plan", "criterion", "steps", "seed"),
            columns={
                "accuracy": quality("fraction"),
                "gained": result("images"),
                "lost": result("images"),
            },
            settings={
                "dense": dense.double().mean().item(),
                "test images": len(test),
                "training images": IMAGES,
                "validation images": VALIDATION,
                "seeds": SEEDS,
                **ready,
                "changes": changes(right, dense),
                "controls": controls(right),
            },
            seconds=sum(outcome["seconds"] for outcome in done.values()),
        )
    )


if __name__ == "__main__":
    main()
