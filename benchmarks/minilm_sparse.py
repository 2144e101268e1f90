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

import healing
import resumable
import torch
from healing import FOUR_PASSES, PASS, SEARCH_SEED, SEARCH_STEPS, Setting, accuracy, change
from torch import Tensor, nn

from labkit import distillation, training
from labkit.lesson import experiments
from labkit.pruning import unstructured
from labkit.records import quality

QUESTION = "MiniLM with a tenth of its encoder's weights, or with half of its layers: which answers better once healed?"
SPARSITY = 0.9  # of each row of the encoder's weights
NOT_PRUNED = ("classifier", "bert.pooler")
LAYERS = 3
SEEDS = {PASS: 5, FOUR_PASSES: 1}
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
            "snippets of a step": setting.train.batch_size,
            "training snippets": len(setting.answers),
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
    setting = Setting(options.folder, options.quick, cut)
    tries = [Run(student, SEARCH_STEPS, SEARCH_SEED, rate) for student in (SPARSE, SHALLOW) for rate in RATES]
    tried = healing.searched(setting, tries, options)
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
