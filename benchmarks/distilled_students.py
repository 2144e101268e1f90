"""Accuracy of ResNet-8 taught by labels or a teacher, by training steps, training images and size of the teacher.

    python benchmarks/distilled_students.py --folder DIR               50 minutes on an idle core, and writes the record
    python benchmarks/distilled_students.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/distilled_students.py --quick                    a few short runs, and writes nothing

A seed draws the first weights and the order of the images, the same for every method; each step takes 64 images. A
teacher's answers to the training images are computed once and stored; T = 4, and a tenth of the loss is the labels'.
Three teachers have one recipe, that of the course's ResNet-20, and all 55,000 training images. The controls:

- "labels": the labels alone.
- "labels, equal FLOPs": the labels alone, with as many steps more as ResNet-20's answers cost in FLOPs.
- "smoothed labels": the teacher's loss, with answers that are as sure of each label as ResNet-20 on average.
- "wrong classes even": the same, with ResNet-20's own probability of each image's label.
- "hint" and "relations": ResNet-20's answers, and a distance of features in addition (Romero et al. 2015, with a
  projector; Park et al. 2019).

Labels, smoothed labels, even wrong classes and ResNet-20's answers have rates of their own, the better of two on
validation images after 600 steps, with three seeds that the comparison does not use; the other methods have the rate of
the answers, and the longer control that of the labels. Every record holds the first runs of all seeds, and of FURTHER
what is done. Lesson 10 shows it: `lab.recorded("distilled_students")`.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resumable
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import batches, datasets, distillation, models, roofline, stats, training
from labkit.data.resnet import ResNet8, ResNet20, WideResNet8
from labkit.lesson import experiments
from labkit.records import quality

QUESTION = "how many points of accuracy does a teacher bring to ResNet-8 over each control, by steps and images?"
SEEDS = 5
FEW_IMAGES, IMAGES, MORE_IMAGES = 2000, 6000, 20_000
SHORT, STEPS, LONG = 150, 600, 1800
RATES = (0.3, 0.9)
SEARCH_SEEDS = (100, 101, 102)
SOFT = {"alpha": 0.9, "temperature": 4.0}
RELATIONS = 25.0  # weight of the term, as in the paper's classification
FEATURES = "fc"  # the module that reads the features to be matched

LABELS, LONGER, SMOOTHED, EVEN = "labels", "labels, equal FLOPs", "smoothed labels", "wrong classes even"
HINT, MATCHED = "hint", "relations"
TEACHERS = {"ResNet-8": ResNet8, "ResNet-8, twice as wide": WideResNet8, "ResNet-20": ResNet20}
TWIN, WIDE, TEACHER = TEACHERS
ARMS = (LABELS, SMOOTHED, EVEN, TEACHER)  # with a learning rate of their own
FURTHER = (  # groups of (learns from, images, steps); the record holds those that are done with every seed
    ((LABELS, IMAGES, SHORT), (TEACHER, IMAGES, SHORT), (LONGER, IMAGES, SHORT)),
    ((LABELS, IMAGES, LONG), (TEACHER, IMAGES, LONG), (LONGER, IMAGES, LONG)),
    ((SMOOTHED, IMAGES, LONG), (EVEN, IMAGES, LONG)),
    ((WIDE, IMAGES, STEPS), (TWIN, IMAGES, STEPS)),
    ((HINT, IMAGES, STEPS),),
    ((WIDE, IMAGES, LONG), (TWIN, IMAGES, LONG)),
    ((LABELS, MORE_IMAGES, STEPS), (TEACHER, MORE_IMAGES, STEPS)),
    ((LABELS, FEW_IMAGES, STEPS), (TEACHER, FEW_IMAGES, STEPS)),
    ((MATCHED, IMAGES, STEPS),),
)

Data = tuple[Tensor, ...]  # images, labels, stored logits, stored features


@dataclass(frozen=True)
class Run(resumable.NamedByFields):
    """A student: what it learns from, training images, steps, seed, and a rate to try on validation images."""

    learns_from: str
    images: int
    steps: int
    seed: int
    rate: float | None = None


def search_runs() -> list[Run]:
    """List the students on validation images that find the rates."""
    tries = itertools.product(ARMS, RATES, SEARCH_SEEDS)
    return [Run(name, IMAGES, STEPS, seed, rate) for name, rate, seed in tries]


def all_runs() -> Iterator[Run]:
    """List the students, the most telling first: all that every record holds, then each further group."""
    for seed in range(SEEDS):
        for name in (LABELS, TEACHER, LONGER, SMOOTHED, EVEN):
            yield Run(name, IMAGES, STEPS, seed)
    for group in FURTHER:
        for seed in range(SEEDS):
            yield from (Run(*setting, seed) for setting in group)


# --- teachers ---------------------------------------------------------------------------------------------------------


def trained_teacher(name: str, folder: Path, quick: bool) -> nn.Module:
    """Load a teacher, trained by the recipe of the course's ResNet-20 and kept in the folder."""
    if name == TEACHER:
        return models.resnet20()
    model = TEACHERS[name]()
    model.load_state_dict(resumable.once(folder / f"teacher {name}.pt", lambda: trained_weights(name, quick)))
    return model.eval()


def trained_weights(name: str, quick: bool) -> dict[str, Tensor]:
    """Train a teacher and return the state dict."""
    torch.manual_seed(0)
    model = TEACHERS[name]()
    train = datasets.fashion_mnist("train", 256 if quick else None)
    order = training.Batches((train.images, train.labels), 128, seed=0)
    training.train_(model, order, epochs=3, max_lr=0.2, label=name)
    return model.state_dict()


@torch.no_grad()
def answered(teacher: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's logits [N, 10] and the features that its last layer reads [N, channels]."""
    features: list[Tensor] = []
    with batches.watching(teacher, [FEATURES], lambda name, x, y: features.append(x)):
        logits = [teacher(part) for part in images.split(250)]
    return torch.cat(logits), torch.cat(features)


def flops(model: nn.Module) -> float:
    """Count the FLOPs of an image."""
    return roofline.count(model.eval(), torch.zeros(1, 1, 28, 28)).flops


def further_steps(images: int, teacher: nn.Module) -> int:
    """Return how many steps on labels cost as many FLOPs as the teacher's answers; a step is three passes."""
    of_step = 3 * 64 * flops(ResNet8())
    return round(images * flops(teacher) / of_step)


# --- what a student learns from ---------------------------------------------------------------------------------------


def evened(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Logits with each label's probability at `temperature` as it was, and equal ones for the other classes."""
    right = F.one_hot(labels, logits.shape[1]).bool()
    others = (logits / temperature).masked_fill(right, -torch.inf).logsumexp(1, keepdim=True)
    even = temperature * (others - math.log(logits.shape[1] - 1))
    return torch.where(right, logits, even)


def smoothed(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Logits with the mean probability of the labels at `temperature` for every label, equal ones for the others."""
    right = F.one_hot(labels, logits.shape[1]).bool()
    p = (logits / temperature).softmax(1)[right].mean()
    even = (1 - p) / (logits.shape[1] - 1)
    return torch.where(right, temperature * p.log(), temperature * even.log())


class WithFeatures(nn.Module):
    """(logits, features) of ResNet-8; `project` brings features to the teacher's width, trained with the student."""

    def __init__(self, student: nn.Module, width: int) -> None:
        super().__init__()
        self.student, self.project = student, nn.Linear(student.fc.in_features, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features: list[Tensor] = []
        with batches.watching(self.student, [FEATURES], lambda name, x, y: features.append(x)):
            return self.student(x), features[0].float()


def answers_and_hint(model: WithFeatures, batch: Data) -> Tensor:
    """The loss of the answers and the squared distance of projected features (Romero et al. 2015)."""
    logits, features = model(batch[0])
    return _soft(logits, batch) + F.mse_loss(model.project(features).float(), batch[3])


def answers_and_relations(model: WithFeatures, batch: Data) -> Tensor:
    """The loss of the answers and that of the distances between the images (Park et al. 2019)."""
    logits, features = model(batch[0])
    return _soft(logits, batch) + RELATIONS * distillation.relation_loss(features, batch[3])


def _soft(logits: Tensor, batch: Data) -> Tensor:
    soft = distillation.distillation_loss(logits, batch[2], temperature=SOFT["temperature"])
    return SOFT["alpha"] * soft + (1 - SOFT["alpha"]) * F.cross_entropy(logits.float(), batch[1])


def from_labels(model: nn.Module, batch: Data) -> Tensor:
    return training.task_loss(model, batch[:2])


class Lesson:
    """Teachers, stored answers and rates; `do` trains a student.

    rates: {arm: learning rate}, known after the search.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.quick = quick
        self.teachers = {name: trained_teacher(name, folder, quick) for name in TEACHERS}
        self.splits = {name: datasets.fashion_mnist(name, 200 if quick else None) for name in ("validation", "test")}
        self.rates: dict[str, float] = {}
        self.stored: dict[tuple[str, int], Data] = {}

    def data(self, name: str, images: int) -> Data:
        """Return the training images, labels, and a teacher's stored logits and features."""
        if (name, images) not in self.stored:
            train = datasets.fashion_mnist("train", images)
            answers = answered(self.teachers[name], train.images)
            self.stored[name, images] = (train.images, train.labels, *answers)
        return self.stored[name, images]

    def materials(self, run: Run) -> Data:
        """Return what a run learns from: images, labels, and logits and features where it needs them."""
        teacher = run.learns_from if run.learns_from in TEACHERS else TEACHER
        data = self.data(teacher, run.images)
        images, labels, logits = data[:3]
        if run.learns_from == SMOOTHED:
            return images, labels, smoothed(logits, labels, SOFT["temperature"])
        if run.learns_from == EVEN:
            return images, labels, evened(logits, labels, SOFT["temperature"])
        return data if run.learns_from in (HINT, MATCHED) else data[:3]

    def rate(self, run: Run) -> float:
        """Return the learning rate of a run."""
        if run.rate is not None:
            return run.rate
        if run.learns_from in ARMS:
            return self.rates[run.learns_from]
        return self.rates[LABELS if run.learns_from == LONGER else TEACHER]

    def do(self, run: Run) -> dict[str, Any]:
        """Train a student: which images of the split it has right."""
        steps = run.steps
        if run.learns_from == LONGER:
            steps += further_steps(run.images, self.teachers[TEACHER])
        if self.quick:
            steps = 3
        torch.manual_seed(run.seed)
        student = ResNet8()
        model: nn.Module = student
        loss_fn = distillation.distilling(None, **SOFT)
        if run.learns_from in (LABELS, LONGER):
            loss_fn = from_labels
        if run.learns_from in (HINT, MATCHED):
            model = WithFeatures(student, self.teachers[TEACHER].fc.in_features)
            loss_fn = answers_and_hint if run.learns_from == HINT else answers_and_relations
        order = training.Batches(self.materials(run), 64, run.seed)
        history = training.train_(model, order, epochs=steps, steps=steps, max_lr=self.rate(run), loss_fn=loss_fn)
        split = self.splits["test" if run.rate is None else "validation"]
        held_out = training.Batches((split.images, split.labels), 100)
        right = training.correct(student.to(memory_format=torch.channels_last), held_out)
        return {"right": right, "steps": steps, "rate": self.rate(run), "training": history.seconds}


# --- results ----------------------------------------------------------------------------------------------------------


def found(outcomes: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean validation accuracy of each arm and rate."""
    rows = []
    for name, rate in itertools.product(ARMS, RATES):
        right = [outcomes[Run(name, IMAGES, STEPS, seed, rate)]["right"] for seed in SEARCH_SEEDS]
        accuracy = torch.stack(right).double().mean().item()
        rows.append({"learns from": name, "rate": rate, "validation accuracy": accuracy})
    return rows


def best_rates(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the rate with the highest validation accuracy for each arm."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = row["learns from"]
        if name not in best or row["validation accuracy"] > best[name]["validation accuracy"]:
            best[name] = row
    return {name: row["rate"] for name, row in best.items()}


PAIRS = (
    (TEACHER, LABELS),
    (TWIN, LABELS),
    (WIDE, LABELS),
    (LONGER, LABELS),
    (SMOOTHED, LABELS),
    (EVEN, LABELS),
    (TEACHER, LONGER),
    (TEACHER, SMOOTHED),
    (TEACHER, EVEN),
    (EVEN, SMOOTHED),
    (TEACHER, TWIN),
    (TEACHER, WIDE),
    (WIDE, TWIN),
    (HINT, TEACHER),
    (MATCHED, TEACHER),
)


def changes(right: Mapping[tuple[str, int, int], Tensor]) -> list[dict[str, Any]]:
    """Compare methods of equal images and steps: the change of accuracy over images and seeds.

    right: {(learns from, images, steps): bool [seeds, images]}.
    """
    rows = []
    for images, steps in dict.fromkeys((images, steps) for _, images, steps in right):
        for after, before in PAIRS:
            keys = (after, images, steps), (before, images, steps)
            if all(key in right for key in keys):
                change, low, high = stats.accuracy_change_over_seeds(*(right[key] for key in keys))
                row = {"after": after, "before": before, "images": images, "steps": steps}
                rows.append(row | {"change": change, "low": low, "high": high})
    return rows


def growth(right: Mapping[tuple[str, int, int], Tensor]) -> list[dict[str, Any]]:
    """Compare ResNet-20's gain over a control in two settings, seed by seed: Student's interval over the seeds."""
    gain = {}
    for name, images, steps in right:
        for control in (LABELS, LONGER):
            if name == TEACHER and (control, images, steps) in right:
                difference = right[name, images, steps].double() - right[control, images, steps].double()
                gain[control, images, steps] = difference.mean(1)
    rows = []
    few, more = (FEW_IMAGES, STEPS), (MORE_IMAGES, STEPS)
    short, middle, long = ((IMAGES, steps) for steps in (SHORT, STEPS, LONG))
    for control, (before, after) in itertools.product((LABELS, LONGER), ((short, middle), (middle, long), (few, more))):
        if (control, *after) in gain and (control, *before) in gain:
            change, low, high = stats.mean_ci((gain[control, *after] - gain[control, *before]).tolist())
            row = {"control": control, "after": after, "before": before}
            rows.append(row | {"change": change, "low": low, "high": high})
    return rows


def teacher_rows(lesson: Lesson) -> list[dict[str, Any]]:
    """Return size, FLOPs of an image and accuracy of each teacher."""
    rows = []
    for name, model in lesson.teachers.items():
        row: dict[str, Any] = {"teacher": name, "parameters": sum(x.numel() for x in model.parameters())}
        row["flops"] = flops(model)
        for split, held_out in lesson.splits.items():
            order = training.Batches((held_out.images, held_out.labels), 100)
            row[split] = training.accuracy(model, order)
        rows.append(row)
    return rows


def write(
    finished: Mapping[Run, Mapping[str, Any]],
    lesson: Lesson,
    search: list[dict[str, Any]],
    seconds: float,
) -> Path:
    """Write the record of what is done with every seed."""
    rows = []
    grouped: dict[tuple[str, int, int], list[Tensor]] = {}
    for run, outcome in finished.items():
        row = {"learns from": run.learns_from, "images": run.images, "steps": run.steps, "seed": run.seed}
        row |= {"accuracy": outcome["right"].double().mean().item(), "rate": outcome["rate"]}
        rows.append(row | {"trained steps": outcome["steps"]})
        grouped.setdefault((run.learns_from, run.images, run.steps), []).append(outcome["right"])
    right = {key: torch.stack(each) for key, each in grouped.items()}
    rows.sort(key=lambda row: -row["steps"])  # a page prints the first rows
    return experiments.save(
        Path(__file__).stem,
        QUESTION,
        rows,
        by=("learns from", "images", "steps", "seed"),
        columns={"accuracy": quality("fraction")},
        settings={
            "seeds": SEEDS,
            "images of a step": 64,
            "test images": len(lesson.splits["test"]),
            "validation images": len(lesson.splits["validation"]),
            "temperature": SOFT["temperature"],
            "alpha": SOFT["alpha"],
            "teachers": teacher_rows(lesson),
            "further steps": further_steps(IMAGES, lesson.teachers[TEACHER]),
            "search": search,
            "search steps": STEPS,
            "search seeds": len(SEARCH_SEEDS),
            "changes": changes(right),
            "growth of the gain": growth(right),
        },
        seconds=seconds,
    )


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    lesson = Lesson(options.folder, options.quick)
    searched = resumable.finished(search_runs(), options, lesson.do)
    if len(searched) < len(search_runs()):
        return
    search = found(searched)
    lesson.rates = best_rates(search)
    finished = resumable.finished(list(all_runs()), options, lesson.do)
    others = [run.file for run, outcome in finished.items() if outcome["rate"] != lesson.rate(run)]
    if others:
        raise SystemExit(f"Trained at another rate than the search finds now: {others}. Delete these files.")
    if options.quick:
        print(len(finished), "runs")
    elif all(run in finished for run in all_runs() if not is_further(run)):
        whole = {run: outcome for run, outcome in finished.items() if is_whole(run, finished)}
        seconds = sum(outcome["seconds"] for outcome in (*searched.values(), *whole.values()))
        print(write(whole, lesson, search, seconds))


def is_further(run: Run) -> bool:
    """True for a run of FURTHER."""
    return any((run.learns_from, run.images, run.steps) in group for group in FURTHER)


def is_whole(run: Run, finished: Mapping[Run, Any]) -> bool:
    """True if all runs of the same group are done, with every seed."""
    mine = (run.learns_from, run.images, run.steps)
    settings = next((group for group in FURTHER if mine in group), (mine,))
    return all(Run(*setting, seed) in finished for setting in settings for seed in range(SEEDS))


if __name__ == "__main__":
    main()
