"""Accuracy of MiniLM with a tenth of its encoder's weights, or with half of its layers, both healed alike.

    python benchmarks/minilm_sparse.py --folder DIR               30 minutes on an idle core, and writes the record
    python benchmarks/minilm_sparse.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/minilm_sparse.py --quick                    a few short runs, and writes nothing

The sparse student is the MiniLM that was fine-tuned on movie reviews without 90 % of each row of its encoder's weights,
the smallest ones; masks hold the zeros. The shallow student has three of the six layers, evenly spaced. Both heal on
the whole model's stored answers (T = 4, a tenth of the loss is the labels'): for a pass over the training snippets with
five seeds, and for four passes with one. A seed draws the order of the snippets. Each student has a learning rate of
its own, the best of six on validation snippets after a quarter of a pass, with a seed that the comparison does not use.
Answers are compared snippet by snippet; the intervals are over test snippets, and over seeds where there are several.
Lesson 02 shows the record: `lab.recorded("minilm_sparse")`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resumable
import torch
from minilm_healed import SOFT, accuracy, change
from torch import Tensor, nn

from labkit import distillation, models, training
from labkit.lesson import experiments
from labkit.pruning import unstructured
from labkit.records import quality

QUESTION = "MiniLM with a tenth of its encoder's weights, or with half of its layers: which answers better once healed?"
SPARSITY = 0.9  # of each row of the encoder's weights
NOT_PRUNED = ("classifier", "bert.pooler")
LAYERS = 3
SNIPPETS = 32  # of a step
PASS, FOUR_PASSES, SEARCH_STEPS = 240, 960, 60
SEEDS = {PASS: 5, FOUR_PASSES: 1}
SEARCH_SEED = 100
RATES = (3e-5, 1e-4, 3e-4, 6e-4, 1e-3, 2e-3)
WHOLE, SPARSE, SHALLOW = "whole", "sparse", "shallow"


@dataclass(frozen=True)
class Run(resumable.NamedByFields):
    """A student that heals for some steps, and a seed; a rate if it is tried on validation snippets."""

    student: str
    steps: int
    seed: int
    rate: float | None = None


def cut(whole: nn.Module, student: str) -> nn.Module:
    """Make a student from the whole model, not yet healed."""
    if student == SPARSE:
        return unstructured.prune(whole, SPARSITY, scope="row", ignore=NOT_PRUNED)
    return distillation.shallow(whole, LAYERS)


class Setting:
    """The whole model with its stored answers, the snippets, and the learning rates.

    rates: {student: rate}, known after the search.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.quick = quick
        self.whole = models.minilm_finetuned()
        train = models.review_batches("train", 64 if quick else None)
        answers = resumable.once(folder / "answers.pt", lambda: self._answers(train))
        self.train = training.Batches({**train.data, distillation.STORED: answers}, SNIPPETS, collate=train.collate)
        self.splits = {}
        for split in ("validation", "test"):
            self.splits[split] = models.review_batches(split, 40 if quick else None, batch_size=50)
        self.rates: dict[str, float] = {}

    @torch.no_grad()
    def _answers(self, train: training.Batches) -> Tensor:
        """The whole model's logits [N, 2] of the training snippets, in their order."""
        logits = [self.whole(batch["input_ids"], batch["attention_mask"]).logits for batch in train]
        return torch.cat(logits)

    def do(self, run: Run) -> dict[str, Any]:
        """Heal a student: which snippets it has right."""
        student = cut(self.whole, run.student)
        batches = training.Batches(self.train.data, SNIPPETS, run.seed, self.train.collate)
        steps = 2 if self.quick else run.steps
        torch.manual_seed(run.seed)  # of dropout
        training.train_(
            student,
            batches,
            loss_fn=distillation.distilling(None, **SOFT),
            max_lr=run.rate or self.rates[run.student],
            epochs=steps,
            steps=steps,
            optimizer="adamw",
            warmup=0.1,
            weight_decay=0.01,
        )
        split = "test" if run.rate is None else "validation"
        return {"right": training.correct(student, self.splits[split])}


def searched(setting: Setting, options: resumable.Options) -> dict[Run, dict[str, Any]]:
    """Try every learning rate for both students, and set the best in `setting`; incomplete if time is up."""
    tries = [Run(student, SEARCH_STEPS, SEARCH_SEED, rate) for student in (SPARSE, SHALLOW) for rate in RATES]
    tried = resumable.finished(tries, options, setting.do)
    for student in (SPARSE, SHALLOW):
        accuracies = {run.rate: accuracy(outcome) for run, outcome in tried.items() if run.student == student}
        if len(accuracies) == len(RATES):
            setting.rates[student] = max(accuracies, key=accuracies.get)
    return tried


def wanted(quick: bool) -> list[Run]:
    """List the runs of the comparison; a single seed each if `quick`."""
    runs = []
    for steps, seeds in SEEDS.items():
        for seed in range(1 if quick else seeds):
            runs += [Run(student, steps, seed) for student in (SPARSE, SHALLOW)]
    return runs


Line = tuple[str, int]  # student, steps


def changes(right: Mapping[Line, Tensor], whole: Tensor) -> list[dict[str, Any]]:
    """Compare every student with the whole model, and the sparse student with the shallow one.

    right: {line: bool [seeds, snippets]}, a single row for a student that does not heal.
    whole: the whole model's answers [snippets].
    """
    rows = []
    for line, answers in right.items():
        rows.append({"after": line, "before": (WHOLE, 0)} | change(answers, whole.expand_as(answers)))
    for steps in (0, PASS, FOUR_PASSES):
        sparse, shallow = (SPARSE, steps), (SHALLOW, steps)
        rows.append({"after": sparse, "before": shallow} | change(right[sparse], right[shallow]))
    return rows


def write(
    setting: Setting,
    search: Mapping[Run, float],
    finished: Mapping[Run, Mapping[str, Any]],
    seconds: float,
) -> Path:
    """Write the record."""
    test = setting.splits["test"]
    whole = training.correct(setting.whole, test)
    right: dict[Line, Tensor] = {}
    for student in (SPARSE, SHALLOW):
        right[student, 0] = training.correct(cut(setting.whole, student), test)[None]
        for steps, seeds in SEEDS.items():
            of_seeds = [finished[Run(student, steps, seed)]["right"] for seed in range(seeds)]
            right[student, steps] = torch.stack(of_seeds)
    rows = []
    for (student, steps), answers in {(WHOLE, 0): whole[None], **right}.items():
        for seed, of_seed in enumerate(answers):
            row = {"student": student, "steps": steps, "seed": seed}
            rows.append(row | {"accuracy": of_seed.double().mean().item()})
    return experiments.save(
        Path(__file__).stem,
        QUESTION,
        rows,
        by=("student", "steps", "seed"),
        columns={"accuracy": quality("fraction")},
        settings={
            "seeds of a pass": SEEDS[PASS],
            "seeds of four passes": SEEDS[FOUR_PASSES],
            "sparsity": SPARSITY,
            "layers of the shallow student": LAYERS,
            "snippets of a step": SNIPPETS,
            "training snippets": len(setting.train.data[distillation.STORED]),
            "test snippets": len(whole),
            "search": [
                {"student": run.student, "rate": run.rate, "validation accuracy": accuracy}
                for run, accuracy in search.items()
            ],
            "changes": changes(right, whole),
        },
        seconds=seconds,
    )


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    setting = Setting(options.folder, options.quick)
    tried = searched(setting, options)
    if len(setting.rates) < 2:
        return
    runs = wanted(options.quick)
    finished = resumable.finished(runs, options, setting.do)
    if options.quick:
        print(len(finished), "runs")
    elif len(finished) == len(runs):
        seconds = sum(outcome["seconds"] for outcome in (*tried.values(), *finished.values()))
        search = {run: accuracy(outcome) for run, outcome in tried.items()}
        print(write(setting, search, finished, seconds))


if __name__ == "__main__":
    main()
