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

import healing
import resumable
import torch
from healing import FOUR_PASSES, PASS, SEARCH_SEED, SEARCH_STEPS, LossFn, Setting, accuracy, change
from torch import Tensor, nn

from labkit import distillation, training
from labkit.lesson import experiments
from labkit.records import quality

QUESTION = "MiniLM with fewer layers: does it heal better on answers than on labels, and does its gate pass?"
SEEDS, LEAST_SEEDS = 5, 3
RATES = (3e-5, 1e-4, 3e-4)
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


def cut(whole: nn.Module, student: Student) -> nn.Module:
    """Make a student from the whole model, not yet healed."""
    return distillation.shallow(whole, student.layers)


def loss_of(student: Student) -> LossFn:
    """Return the loss that a student heals by."""
    return from_labels if student.heals_on == LABELS else healing.on_answers(student)


Line = tuple[int, str, int]  # layers, what the student heals on, steps


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
        as_cut = distillation.shallow(setting.whole, layers)
        right[layers, NOT_HEALED, 0] = training.correct(as_cut, test)[None]
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


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    setting = Setting(options.folder, options.quick, cut, loss_of)
    tries = [
        Run(student.layers, student.heals_on, SEARCH_STEPS, SEARCH_SEED, rate) for student in STUDENTS for rate in RATES
    ]
    tried = healing.searched(setting, tries, options)
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
