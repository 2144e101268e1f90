"""Accuracy of half of MiniLM's layers, healed on labels or on the whole model's answers.

    python benchmarks/minilm_healed.py --folder DIR               20 minutes on an idle core, and writes the record
    python benchmarks/minilm_healed.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/minilm_healed.py --quick                    a few short runs, and writes nothing

The student is layers 1, 3 and 6 of the MiniLM that was fine-tuned on movie reviews, with its head. It heals in a pass
over the training snippets, on their labels or on the whole model's stored answers (T = 4, a tenth of the loss is the
labels'). A seed draws the order of the snippets. Each has a learning rate of its own, the best of two on validation
snippets after a quarter of the steps, with a seed that the comparison does not use. Answers are compared snippet by
snippet; the intervals are over test snippets and seeds. The record holds the seeds that are done for both. Lesson 10
shows it: `lab.recorded("minilm_healed")`.
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

QUESTION = "half of MiniLM's layers, healed on labels or on the whole model's answers: which is better?"
SEEDS, LEAST_SEEDS = 5, 3
LAYERS = 3
STEPS, SEARCH_STEPS = 240, 60  # of 32 snippets
SEARCH_SEED = 100
RATES = (1e-4, 3e-4)
SOFT = {"alpha": 0.9, "temperature": 4.0}
LABELS, ANSWERS = "labels", "answers"
WHOLE, CUT = "whole", "not healed"


@dataclass(frozen=True)
class Run(resumable.NamedByFields):
    """What a student heals on, and a seed; a rate if it is tried on validation snippets."""

    heals_on: str
    seed: int
    rate: float | None = None


def from_labels(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The task's loss, without the stored answers."""
    return training.task_loss(model, {name: x for name, x in batch.items() if name != distillation.STORED})


class Setting:
    """The whole model with its stored answers, the snippets, and the learning rates.

    rates: {what a student heals on: rate}, known after the search.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.quick = quick
        self.whole = models.minilm_finetuned()
        self.train = models.review_batches("train", 64 if quick else None)
        self.splits = {}
        for split in ("validation", "test"):
            self.splits[split] = models.review_batches(split, 40 if quick else None, batch_size=50)
        self.answers = resumable.once(folder / "answers.pt", self._answers)
        self.rates: dict[str, float] = {}

    @torch.no_grad()
    def _answers(self) -> Tensor:
        """The whole model's logits [N, 2] of the training snippets, in their order."""
        logits = [self.whole(batch["input_ids"], batch["attention_mask"]).logits for batch in self.train]
        return torch.cat(logits)

    def do(self, run: Run) -> dict[str, Any]:
        """Heal a student: which snippets it has right."""
        student = distillation.shallow(self.whole, LAYERS)
        data = {**self.train.data, distillation.STORED: self.answers}
        batches = training.Batches(data, self.train.batch_size, run.seed, self.train.collate)
        loss_fn = from_labels if run.heals_on == LABELS else distillation.distilling(None, **SOFT)
        steps = STEPS if run.rate is None else SEARCH_STEPS
        steps = 2 if self.quick else steps
        rate = run.rate or self.rates[run.heals_on]
        torch.manual_seed(run.seed)  # of dropout
        recipe = {"epochs": steps, "steps": steps, "optimizer": "adamw", "warmup": 0.1, "weight_decay": 0.01}
        history = training.train_(student, batches, loss_fn=loss_fn, max_lr=rate, **recipe)
        split = "test" if run.rate is None else "validation"
        return {"right": training.correct(student, self.splits[split]), "training": history.seconds}


def changes(right: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Compare the models: the change of accuracy over snippets and seeds; right: {name: bool [seeds, snippets]}."""
    pairs = ((ANSWERS, LABELS), (LABELS, CUT), (ANSWERS, CUT), (LABELS, WHOLE), (ANSWERS, WHOLE))
    rows = []
    for after, before in pairs:
        change, low, high = stats.accuracy_change_over_seeds(right[after], right[before])
        rows.append({"after": after, "before": before, "change": change, "low": low, "high": high})
    change, low, high = stats.accuracy_change(right[CUT][0], right[WHOLE][0])
    return [*rows, {"after": CUT, "before": WHOLE, "change": change, "low": low, "high": high}]


def write(
    setting: Setting,
    search: Mapping[Run, float],
    finished: Mapping[Run, Mapping[str, Any]],
    seeds: list[int],
    seconds: float,
) -> Path:
    """Write the record of the seeds."""
    test = setting.splits["test"]
    fixed = {WHOLE: setting.whole, CUT: distillation.shallow(setting.whole, LAYERS)}
    right = {name: training.correct(model, test).expand(len(seeds), -1) for name, model in fixed.items()}
    rows = [{"model": name, "seed": 0, "accuracy": right[name][0].double().mean().item()} for name in fixed]
    for name in (LABELS, ANSWERS):
        right[name] = torch.stack([finished[Run(name, seed)]["right"] for seed in seeds])
        for seed, of_seed in zip(seeds, right[name], strict=True):
            rows.append({"model": name, "seed": seed, "accuracy": of_seed.double().mean().item()})
    return experiments.save(
        Path(__file__).stem,
        QUESTION,
        rows,
        by=("model", "seed"),
        columns={"accuracy": quality("fraction")},
        settings={
            "layers": LAYERS,
            "layers of the whole": 6,
            "seeds": len(seeds),
            "steps": STEPS,
            "snippets of a step": setting.train.batch_size,
            "training snippets": len(setting.answers),
            "test snippets": right[LABELS].shape[1],
            "rates": setting.rates,
            "search": [
                {"heals on": run.heals_on, "rate": run.rate, "validation accuracy": accuracy}
                for run, accuracy in search.items()
            ],
            **SOFT,
            "changes": changes(right),
        },
        seconds=seconds,
    )


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    setting = Setting(options.folder, options.quick)
    tries = [Run(name, SEARCH_SEED, rate) for name in (LABELS, ANSWERS) for rate in RATES]
    tried = resumable.finished(tries, options, setting.do)
    if len(tried) < len(tries):
        return
    search = {run: outcome["right"].double().mean().item() for run, outcome in tried.items()}
    for name in (LABELS, ANSWERS):
        of_name = {run.rate: accuracy for run, accuracy in search.items() if run.heals_on == name}
        setting.rates[name] = max(of_name, key=of_name.get)
    runs = [Run(name, seed) for seed in range(1 if options.quick else SEEDS) for name in (LABELS, ANSWERS)]
    finished = resumable.finished(runs, options, setting.do)
    seeds = [seed for seed in range(SEEDS) if all(Run(name, seed) in finished for name in (LABELS, ANSWERS))]
    if options.quick:
        print(len(finished), "runs")
    elif len(seeds) >= LEAST_SEEDS:
        seconds = sum(outcome["seconds"] for outcome in (*tried.values(), *finished.values()))
        print(write(setting, search, finished, seeds, seconds))


if __name__ == "__main__":
    main()
