"""Accuracy of MiniLM with three or four of six layers, healed on labels or on the whole model's answers.

    python benchmarks/minilm_healed.py --folder DIR               70 minutes on an idle core, and writes the record
    python benchmarks/minilm_healed.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/minilm_healed.py --quick                    a few short runs, and writes nothing

The student has layers of the MiniLM that was fine-tuned on movie reviews, evenly spaced, and its head. Three layers
heal for a pass over the training snippets, on their labels or on the whole model's stored answers (T = 4, a tenth of
the loss is the labels'); four layers heal on the answers for four passes. A seed draws the order of the snippets. Each
student has a learning rate of its own, the best of three on validation snippets after a quarter of a pass, with a seed
that the comparison does not use. Answers are compared snippet by snippet; the intervals are over test snippets, and
over seeds where a student has several. The record holds the seeds that are done for all students. Lessons 10 and 13
show it: `lab.recorded("minilm_healed")`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resumable
import torch
from torch import Tensor, nn

from labkit import distillation, models, stats, training
from labkit.lesson import experiments
from labkit.records import quality

QUESTION = "MiniLM with fewer layers: does it heal better on answers than on labels, and does its gate pass?"
SEEDS, LEAST_SEEDS = 5, 3
PASS, FOUR_PASSES, SEARCH_STEPS = 240, 960, 60  # of 32 snippets
SEARCH_SEED = 100
RATES = (3e-5, 1e-4, 3e-4)
SOFT = {"alpha": 0.9, "temperature": 4.0}
LABELS, ANSWERS = "labels", "answers"
WHOLE, NOT_HEALED = "whole", "nothing"


@dataclass(frozen=True)
class Student:
    """A number of layers, and what the student heals on."""

    layers: int
    heals_on: str


STUDENTS = {Student(3, LABELS): PASS, Student(3, ANSWERS): PASS, Student(4, ANSWERS): FOUR_PASSES}  # and its steps


@dataclass(frozen=True)
class Run(resumable.NamedByFields):
    """A student that heals for some steps, and a seed; a rate if it is tried on validation snippets."""

    layers: int
    heals_on: str
    steps: int
    seed: int
    rate: float | None = None

    @property
    def student(self) -> Student:
        return Student(self.layers, self.heals_on)


def from_labels(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The task's loss, without the stored answers."""
    return training.task_loss(model, {name: x for name, x in batch.items() if name != distillation.STORED})


class Setting:
    """The whole model with its stored answers, the snippets, and the learning rates.

    rates: {student: rate}, known after the search.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.quick = quick
        self.whole = models.minilm_finetuned()
        self.train = models.review_batches("train", 64 if quick else None)
        self.splits = {}
        for split in ("validation", "test"):
            self.splits[split] = models.review_batches(split, 40 if quick else None, batch_size=50)
        self.answers = resumable.once(folder / "answers.pt", self._answers)
        self.rates: dict[Student, float] = {}

    @torch.no_grad()
    def _answers(self) -> Tensor:
        """The whole model's logits [N, 2] of the training snippets, in their order."""
        logits = [self.whole(batch["input_ids"], batch["attention_mask"]).logits for batch in self.train]
        return torch.cat(logits)

    def do(self, run: Run) -> dict[str, Any]:
        """Heal a student: which snippets it has right."""
        student = distillation.shallow(self.whole, run.layers)
        data = {**self.train.data, distillation.STORED: self.answers}
        batches = training.Batches(data, self.train.batch_size, run.seed, self.train.collate)
        loss_fn = from_labels if run.heals_on == LABELS else distillation.distilling(None, **SOFT)
        steps = 2 if self.quick else run.steps
        rate = run.rate or self.rates[run.student]
        torch.manual_seed(run.seed)  # of dropout
        recipe = {"epochs": steps, "steps": steps, "optimizer": "adamw", "warmup": 0.1, "weight_decay": 0.01}
        history = training.train_(student, batches, loss_fn=loss_fn, max_lr=rate, **recipe)
        split = "test" if run.rate is None else "validation"
        return {"right": training.correct(student, self.splits[split]), "training": history.seconds}


Line = tuple[int, str, int]  # layers, what the student heals on, steps


def change(after: Tensor, before: Tensor) -> dict[str, float]:
    """Compare answers [seeds, snippets]: the change of accuracy over snippets, and over seeds if there are several."""
    if len(after) == 1:
        value, low, high = stats.accuracy_change(after[0], before[0])
    else:
        value, low, high = stats.accuracy_change_over_seeds(after, before)
    return {"change": value, "low": low, "high": high}


def changes(right: Mapping[Line, Tensor], whole: Tensor) -> list[dict[str, Any]]:
    """Compare every student with the whole model, over all seeds and for each seed alone, and answers with labels.

    right: {line: bool [seeds, snippets]}, a single row for a student that does not heal.
    whole: the whole model's answers [snippets].
    """
    rows = []
    for line, answers in right.items():
        of_line = {"after": line, "before": WHOLE}
        rows.append(of_line | change(answers, whole.expand_as(answers)))
        for seed, of_seed in enumerate(answers):
            rows.append(of_line | {"seed": seed} | change(of_seed[None], whole[None]))
    labels, soft = (3, LABELS, PASS), (3, ANSWERS, PASS)
    rows.append({"after": soft, "before": labels} | change(right[soft], right[labels]))
    return rows


def write(
    setting: Setting,
    search: Mapping[Run, float],
    finished: Mapping[Run, Mapping[str, Any]],
    seeds: list[int],
    seconds: float,
) -> Path:
    """Write the record of the seeds."""
    test = setting.splits["test"]
    whole = training.correct(setting.whole, test)
    right: dict[Line, Tensor] = {}
    for layers in (4, 3):
        cut = distillation.shallow(setting.whole, layers)
        right[layers, NOT_HEALED, 0] = training.correct(cut, test)[None]
    for student, steps in STUDENTS.items():
        runs = [Run(student.layers, student.heals_on, steps, seed) for seed in seeds]
        right[student.layers, student.heals_on, steps] = torch.stack([finished[run]["right"] for run in runs])
    rows = []
    for (layers, heals_on, steps), answers in {(6, WHOLE, 0): whole[None], **right}.items():
        for seed, of_seed in enumerate(answers):
            row = {"layers": layers, "heals on": heals_on, "steps": steps, "seed": seed}
            rows.append(row | {"accuracy": of_seed.double().mean().item()})
    return experiments.save(
        Path(__file__).stem,
        QUESTION,
        rows,
        by=("layers", "heals on", "steps", "seed"),
        columns={"accuracy": quality("fraction")},
        settings={
            "seeds": len(seeds),
            "snippets of a step": setting.train.batch_size,
            "training snippets": len(setting.answers),
            "test snippets": len(whole),
            "search": [
                {"layers": run.layers, "heals on": run.heals_on, "rate": run.rate, "validation accuracy": accuracy}
                for run, accuracy in search.items()
            ],
            "changes": changes(right, whole),
        },
        seconds=seconds,
    )


def searched(setting: Setting, options: resumable.Options) -> dict[Run, dict[str, Any]]:
    """Try every learning rate for every student, and set the best in `setting`; incomplete if time is up."""
    tries = [
        Run(student.layers, student.heals_on, SEARCH_STEPS, SEARCH_SEED, rate) for student in STUDENTS for rate in RATES
    ]
    tried = resumable.finished(tries, options, setting.do)
    for student in STUDENTS:
        accuracies = {run.rate: accuracy(outcome) for run, outcome in tried.items() if run.student == student}
        if len(accuracies) == len(RATES):
            setting.rates[student] = max(accuracies, key=accuracies.get)
    return tried


def accuracy(outcome: Mapping[str, Any]) -> float:
    """Return the share of right answers of a run."""
    return outcome["right"].double().mean().item()


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    setting = Setting(options.folder, options.quick)
    tried = searched(setting, options)
    if len(setting.rates) < len(STUDENTS):
        return
    seeds_wanted = range(1 if options.quick else SEEDS)
    runs = [Run(of.layers, of.heals_on, steps, seed) for seed in seeds_wanted for of, steps in STUDENTS.items()]
    finished = resumable.finished(runs, options, setting.do)
    if options.quick:
        print(len(finished), "runs")
        return
    whole_seeds = [seed for seed in seeds_wanted if all(run in finished for run in runs if run.seed == seed)]
    if len(whole_seeds) >= LEAST_SEEDS:
        seconds = sum(outcome["seconds"] for outcome in (*tried.values(), *finished.values()))
        search = {run: accuracy(outcome) for run, outcome in tried.items()}
        print(write(setting, search, finished, whole_seeds, seconds))


if __name__ == "__main__":
    main()
