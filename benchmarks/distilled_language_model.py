"""Distance of a small language model from its teacher, trained on the corpus, on its teacher's text or on its own.

    python benchmarks/distilled_language_model.py --folder DIR               40 minutes on an idle core, and a record
    python benchmarks/distilled_language_model.py --folder DIR --minutes 10  as many runs as that; then the same goes on
    python benchmarks/distilled_language_model.py --quick                    a few short runs, and writes nothing

The student has ten of SmolLM2's thirty layers, evenly spaced, and first learns to write: all runs start from the same
student, trained on the next tokens of the handbook. Then every step takes eight prompts of 16 tokens of the handbook,
each with 48 tokens after it, and the student learns from these 48:

- "labels": the handbook's tokens, by cross-entropy.
- "answers, corpus": the teacher's probabilities at the handbook's tokens.
- "answers, teacher's text": the same, at tokens that the teacher wrote after the prompts, once, before training.
- "answers, own text": the same, at tokens that the student itself writes after the prompts, in every step anew (GKD,
  Agarwal et al. 2024, lambda = 1).
- "own text, reverse": the same with the reverse divergence KL(q || p).

The forward divergence KL(p || q) at temperature 1 is the loss of the other rows with answers. All runs have the same
steps, prompts and learning rate; the rate is the best of three for "labels" on chapters not trained on, so the control
is the only method that was tuned. A seed draws the order of the prompts and what the student writes.

Judged on other chapters: perplexity, KL(p || q) at the text, and KL(q || p) at what the student writes after prompts of
these chapters. Intervals are over texts and seeds. The record holds the seeds that are done for all methods. Lesson 10
shows it: `lab.recorded("distilled_language_model")`.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resumable
import torch
import torch.nn.functional as F
from llm_two_of_four import ratio, tokens_of
from torch import Tensor, nn

from labkit import distillation, models, stats, training
from labkit.lesson import experiments
from labkit.records import cost

QUESTION = "a language model taught on the corpus, on its teacher's text or on its own: how far is it from its teacher?"
SEEDS, LEAST_SEEDS = 3, 2
LAYERS = 10
PROMPT, NEW = 16, 48  # tokens
TEXTS = 8  # of a step
RATES = (2e-4, 5e-4, 1.2e-3)
FIRST_RATE = 1e-3  # of the training that all runs start from
SEARCH_SEED, WRITING_SEED = 100, 7

LABELS, CORPUS = "labels", "answers, corpus"
TEACHERS, OWN, REVERSE = "answers, teacher's text", "answers, own text", "own text, reverse"
METHODS = (LABELS, CORPUS, OWN, TEACHERS, REVERSE)
START = "start"


@dataclass(frozen=True)
class Sizes:
    """Steps of the first training and of a run, held-out texts, and held-out prompts."""

    first_steps: int = 100
    steps: int = 40
    texts: int = 48
    prompts: int = 32


@dataclass(frozen=True)
class Run(resumable.NamedByFields):
    """A method and a seed; a learning rate if it is tried on validation texts."""

    method: str
    seed: int
    rate: float | None = None


@torch.no_grad()
def continued(model: nn.Module, prompts: Tensor, new: int, generator: torch.Generator) -> Tensor:
    """Sample `new` tokens after each prompt of [B, T] at temperature 1, with a cache: [B, T + new]."""
    ids, fed = prompts, {"input_ids": prompts}
    for _ in range(new):
        output = model(**fed, use_cache=True)
        probabilities = output.logits[:, -1].float().softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat([ids, drawn], 1)
        cache = "cache" if hasattr(output, "cache") else "past_key_values"  # by version
        fed = {"input_ids": drawn, cache: getattr(output, cache)}
    return ids


def written(logits: Tensor) -> Tensor:
    """Keep the predictions [B, NEW, V] of the tokens after the prompt; position t predicts token t + 1."""
    return logits[:, PROMPT - 1 : -1]


class Setting:
    """The teacher, the texts, and the student that all runs start from; what takes long is kept in the folder.

    corpus, validation, test: tokens [texts, PROMPT + NEW] of the handbook, each its own.
    """

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.sizes = sizes
        self.teacher = models.smollm2()
        self.quick_teacher = copy.deepcopy(self.teacher).bfloat16()
        pieces = training.windows(tokens_of("calibration"), PROMPT + NEW)
        drawn = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
        n, first = TEXTS * sizes.steps, TEXTS * sizes.first_steps
        self.corpus, self.first, self.validation = (
            pieces[part] for part in (drawn[:n], drawn[n : n + first], drawn[-sizes.texts :])
        )
        held_out = training.windows(tokens_of("test"), PROMPT + NEW)
        self.test = held_out[:: len(held_out) // sizes.texts][: sizes.texts]
        self.rate = 0.0
        self.start = distillation.shallow(self.teacher, LAYERS)
        self.start.load_state_dict(resumable.once(folder / "start.pt", self._first_weights))
        self.teachers_text = resumable.once(folder / "teacher's text.pt", self._teachers_text)

    def _first_weights(self) -> dict[str, Tensor]:
        student = distillation.shallow(self.teacher, LAYERS)
        self.train(student, self.first, from_labels, FIRST_RATE, seed=0)
        return student.state_dict()

    def _teachers_text(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        texts = []
        for prompts in self.corpus[:, :PROMPT].split(TEXTS):
            texts.append(continued(self.quick_teacher, prompts, NEW, generator))
        return torch.cat(texts)

    def train(self, student: nn.Module, texts: Tensor, loss_fn: Callable, rate: float, seed: int) -> float:
        """Train in place, a step for each eight texts, and return CPU seconds."""
        batches = training.Batches({"input_ids": texts}, TEXTS, seed)
        steps = len(texts) // TEXTS
        recipe = {"epochs": steps, "steps": steps, "max_lr": rate, "optimizer": "adamw"}
        start = time.process_time()
        training.train_(student, batches, loss_fn=loss_fn, weight_decay=0.01, warmup=0.1, **recipe)
        return time.process_time() - start

    def loss_of(self, method: str, seed: int) -> Callable:
        """Return the loss_fn of a method."""
        if method == LABELS:
            return from_labels
        generator = torch.Generator().manual_seed(seed)
        beta = 1.0 if method == REVERSE else 0.0

        def from_answers(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            ids = batch["input_ids"]
            if method in (OWN, REVERSE):
                ids = written_by(model, ids[:, :PROMPT], generator)
            with torch.no_grad():
                answers = written(self.quick_teacher(input_ids=ids).logits)
            logits = written(model(input_ids=ids).logits)
            return distillation.distillation_loss(logits, answers, temperature=1.0, beta=beta)

        return from_answers

    def do(self, run: Run) -> dict[str, Any]:
        """Train a student and judge it."""
        student = copy.deepcopy(self.start)
        texts = self.teachers_text if run.method == TEACHERS else self.corpus
        rate = run.rate or self.rate
        seconds = self.train(student, texts, self.loss_of(run.method, run.seed), rate, run.seed)
        if run.rate is not None:
            return {"losses": losses_of(student.eval(), self.validation)}
        return {"training": seconds, **self.judged(student), **self.judged_writing(student)}

    @torch.no_grad()
    def judged(self, student: nn.Module) -> dict[str, list[float]]:
        """Return the loss of a token and KL(p || q), a mean for each test text, in nats."""
        divergences: list[float] = []
        for ids in self.test.split(TEXTS):
            log_q, log_p = (log_probabilities(model, ids) for model in (student.eval(), self.teacher))
            divergences += divergence(log_p, log_q)
        return {"losses": losses_of(student, self.test), "forward": divergences}

    @torch.no_grad()
    def judged_writing(self, student: nn.Module) -> dict[str, Any]:
        """Return what the student writes, KL(q || p) and the teacher's loss of a token, means of each text, in nats."""
        prompts = self.test[: self.sizes.prompts, :PROMPT]
        texts = written_by(student, prompts, torch.Generator().manual_seed(WRITING_SEED))
        divergences: list[float] = []
        for ids in texts.split(TEXTS):
            log_q, log_p = (log_probabilities(model, ids) for model in (student.eval(), self.teacher))
            divergences += divergence(log_q, log_p)
        return {"texts": texts, "reverse": divergences, "teacher's loss": losses_of(self.teacher, texts)}


def from_labels(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The cross-entropy of the tokens after the prompts."""
    ids = batch["input_ids"]
    logits = written(model(input_ids=ids).logits)
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, PROMPT:].flatten())


def written_by(student: nn.Module, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Return the prompts with what the student writes after them; it writes in bfloat16."""
    writer = copy.deepcopy(student).bfloat16().eval()
    with torch.autocast("cpu", enabled=False):
        return continued(writer, prompts, NEW, generator)


def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the log-probabilities [B, NEW, V] of the tokens after the prompts."""
    return written(model(input_ids=ids).logits).float().log_softmax(-1)


def divergence(log_a: Tensor, log_b: Tensor) -> list[float]:
    """Return KL(a || b) of log-probabilities [B, NEW, V], a mean for each text."""
    return (log_a.exp() * (log_a - log_b)).sum(-1).mean(1).tolist()


@torch.no_grad()
def losses_of(model: nn.Module, texts: Tensor) -> list[float]:
    """Return the mean loss of a token after the prompt in each text, in nats."""
    losses: list[float] = []
    for ids in texts.split(TEXTS):
        log_q = log_probabilities(model, ids).transpose(1, 2)  # [B, V, NEW]
        losses += F.nll_loss(log_q, ids[:, PROMPT:], reduction="none").mean(1).tolist()
    return losses


# --- results ----------------------------------------------------------------------------------------------------------


def difference(after: np.ndarray, before: np.ndarray) -> dict[str, float]:
    """Return the mean difference of two models' values and its interval over texts and seeds.

    after, before: values [seeds, texts]; the same texts or prompts. Other texts and another training would both change
    the difference, so both distances to the ends count, as the root of the sum of squares; each is Student's.
    """
    value, low, high = stats.paired_difference(after.mean(0).tolist(), before.mean(0).tolist())
    down, up = value - low, high - value
    if len(after) > 1:
        middle, least, most = stats.mean_ci((after - before).mean(1).tolist())
        down, up = math.hypot(down, middle - least), math.hypot(up, most - middle)
    return {"difference": value, "low": value - down, "high": value + up}


def comparisons(outcomes: Mapping[str, list[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Compare every two methods by perplexity and by both divergences; outcomes: {method: [seeds]}."""
    rows = []
    names = list(outcomes)
    for i, before in enumerate(names):
        for after in names[i + 1 :]:
            values = {}
            for measure in ("losses", "forward", "reverse"):
                both = [np.asarray([run[measure] for run in outcomes[name]]) for name in (after, before)]
                seeds = max(map(len, both))
                values[measure] = [np.broadcast_to(x, (seeds, x.shape[1])) for x in both]
            row = {"after": after, "before": before}
            rows.append(row | {"measure": "perplexity", **ratio(*values["losses"], NEW)})
            for measure in ("forward", "reverse"):
                rows.append(row | {"measure": measure, **difference(*values[measure])})
    return rows


def write(
    setting: Setting,
    search: Mapping[float, float],
    outcomes: Mapping[str, list[Mapping[str, Any]]],
    seconds: float,
) -> Path:
    """Write the record; outcomes: {method: [seeds]}, and START and the teacher with a single one."""
    rows = []
    for name, of_method in outcomes.items():
        for seed, outcome in enumerate(of_method):
            row: dict[str, Any] = {"method": name, "seed": seed}
            row["perplexity"] = math.exp(np.mean(outcome["losses"]))
            row["forward"] = float(np.mean(outcome["forward"]))
            row["reverse"] = float(np.mean(outcome["reverse"]))
            row["teacher's loss"] = float(np.mean(outcome["teacher's loss"]))
            rows.append(row | {"training": outcome.get("training", 0.0)})
    tokenizer = models.tokenizer("smollm2")
    samples = {}
    for name, of_method in outcomes.items():
        samples[name] = [tokenizer.decode(ids[PROMPT:]) for ids in of_method[0]["texts"][:3]]
    prompts = [tokenizer.decode(ids[:PROMPT]) for ids in setting.test[:3]]
    sizes = setting.sizes
    nats = cost("nats")
    return experiments.save(
        Path(__file__).stem,
        QUESTION,
        rows,
        by=("method", "seed"),
        columns={
            "perplexity": cost(),
            "forward": nats,
            "reverse": nats,
            "teacher's loss": nats,
            "training": cost("s", clock=True),
        },
        settings={
            "layers": LAYERS,
            "teacher's layers": len(setting.teacher.model.layers),
            "parameters": sum(x.numel() for x in setting.start.parameters()),
            "teacher's parameters": sum(x.numel() for x in setting.teacher.parameters()),
            "seeds": max(map(len, outcomes.values())),
            "first steps": sizes.first_steps,
            "steps": sizes.steps,
            "texts of a step": TEXTS,
            "prompt": PROMPT,
            "new": NEW,
            "test texts": sizes.texts,
            "test prompts": sizes.prompts,
            "rate": setting.rate,
            "search": {f"{rate:g}": loss for rate, loss in search.items()},
            "comparisons": comparisons(outcomes),
            "prompts": prompts,
            "samples": samples,
        },
        seconds=seconds,
    )


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    sizes = Sizes(first_steps=2, steps=2, texts=32, prompts=32) if options.quick else Sizes()
    setting = Setting(options.folder, sizes)
    tries = [Run(LABELS, SEARCH_SEED, rate) for rate in RATES]
    tried = resumable.finished(tries, options, setting.do)
    if len(tried) < len(tries):
        return
    search = {run.rate: float(np.mean(outcome["losses"])) for run, outcome in tried.items()}
    setting.rate = min(search, key=search.get)
    runs = [Run(method, seed) for seed in range(1 if options.quick else SEEDS) for method in METHODS]
    done = resumable.finished(runs, options, setting.do)
    seeds = [seed for seed in range(SEEDS) if all(Run(method, seed) in done for method in METHODS)]
    outcomes: dict[str, list[Mapping[str, Any]]] = {}
    for name, model in ((START, setting.start), ("teacher", setting.teacher)):
        outcomes[name] = [{**setting.judged(model), **setting.judged_writing(model)}]
    for method in METHODS:
        outcomes[method] = [done[Run(method, seed)] for seed in seeds]
    if options.quick:
        print(len(comparisons(outcomes)), "comparisons")
    elif len(seeds) >= LEAST_SEEDS:
        seconds = sum(outcome["seconds"] for outcome in (*tried.values(), *done.values()))
        print(write(setting, search, outcomes, seconds))


if __name__ == "__main__":
    main()
