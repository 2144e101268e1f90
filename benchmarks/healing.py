"""Students of MiniLM that heal on review snippets: what experiments with such students share.

A student is a cut copy of the MiniLM that was fine-tuned on movie reviews. A seed draws the order of the training
snippets. Each student has a learning rate of its own, chosen on validation snippets with a seed that the comparison
does not use; students are compared on test snippets. `minilm_healed` and `minilm_sparse` are such experiments.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import resumable
import torch
from torch import Tensor, nn

from labkit import distillation, models, stats, training

PASS, FOUR_PASSES, SEARCH_STEPS = 240, 960, 60  # of 32 snippets
SEARCH_SEED = 100
SOFT = {"alpha": 0.9, "temperature": 4.0}

LossFn = Callable[[nn.Module, dict[str, Tensor]], Tensor]


class Run(resumable.Run, Protocol):
    """A student that heals for some steps, and a seed; a rate if the rate is tried on validation snippets."""

    steps: int
    seed: int
    rate: float | None

    @property
    def student(self) -> Hashable: ...


R = TypeVar("R", bound=Run)


def on_answers(student: Hashable) -> LossFn:
    """Return the loss against the stored answers, the same for every student."""
    return distillation.distilling(None, **SOFT)


class Setting:
    """The whole model with its stored answers, the snippets, and the learning rates.

    folder: keeps the stored answers.
    quick: few snippets, and two steps a run.
    cut: cut(whole model, student) -> a model that is not healed yet.
    loss_of: loss_of(student) -> loss_fn for `training.train_`.
    rates: {student: rate}, known after the search.
    """

    def __init__(
        self,
        folder: Path,
        quick: bool,
        cut: Callable[[nn.Module, Any], nn.Module],
        loss_of: Callable[[Any], LossFn] = on_answers,
    ) -> None:
        self.quick = quick
        self.cut = cut
        self.loss_of = loss_of
        self.whole = models.minilm_finetuned()
        self.train = models.review_batches("train", 64 if quick else None)
        self.splits = {}
        for split in ("validation", "test"):
            self.splits[split] = models.review_batches(split, 40 if quick else None, batch_size=50)
        self.answers = resumable.once(folder / "answers.pt", self._answers)
        self.rates: dict[Hashable, float] = {}

    @torch.no_grad()
    def _answers(self) -> Tensor:
        """The whole model's logits [N, 2] of the training snippets, in their order."""
        logits = [self.whole(batch["input_ids"], batch["attention_mask"]).logits for batch in self.train]
        return torch.cat(logits)

    def do(self, run: Run) -> dict[str, Any]:
        """Heal a student: which snippets it has right."""
        student = self.cut(self.whole, run.student)
        data = {**self.train.data, distillation.STORED: self.answers}
        batches = training.Batches(data, self.train.batch_size, run.seed, self.train.collate)
        steps = 2 if self.quick else run.steps
        rate = run.rate or self.rates[run.student]
        torch.manual_seed(run.seed)  # of dropout
        recipe = {"epochs": steps, "steps": steps, "optimizer": "adamw", "warmup": 0.1, "weight_decay": 0.01}
        training.train_(student, batches, loss_fn=self.loss_of(run.student), max_lr=rate, **recipe)
        split = "test" if run.rate is None else "validation"
        return {"right": training.correct(student, self.splits[split])}


def searched(setting: Setting, tries: Sequence[R], options: resumable.Options) -> dict[R, dict[str, Any]]:
    """Do the tries, and set the best rate of each student whose tries are all done in `setting.rates`.

    tries: runs with a rate.
    """
    tried = resumable.finished(tries, options, setting.do)
    for student in dict.fromkeys(run.student for run in tries):
        of_student = [run for run in tries if run.student == student]
        if all(run in tried for run in of_student):
            best = max(of_student, key=lambda run: accuracy(tried[run]))
            setting.rates[student] = best.rate
    return tried


def accuracy(outcome: Mapping[str, Any]) -> float:
    """Return the share of right answers of a run."""
    return outcome["right"].double().mean().item()


def change(after: Tensor, before: Tensor) -> dict[str, float]:
    """Compare answers [seeds, snippets]: the change of accuracy over snippets, and over seeds if there are several."""
    if len(after) == 1:
        value, low, high = stats.accuracy_change(after[0], before[0])
    else:
        value, low, high = stats.accuracy_change_over_seeds(after, before)
    return {"change": value, "low": low, "high": high}
