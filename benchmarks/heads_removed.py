"""Accuracy of MiniLM without half of its heads, by score: why ablation of single heads ranks them badly.

    python benchmarks/heads_removed.py --folder DIR               15 minutes on an idle core, and writes the record
    python benchmarks/heads_removed.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/heads_removed.py --quick                    two runs on few texts, and writes nothing

36 of 72 heads are removed together, and nothing is trained. Four scores differ in two ways: the change of the loss is
measured (ablation) or estimated from the slope (Taylor), and its mean over the texts is taken with the sign or of the
magnitude of each text. A set draws the texts that score the heads: five sets that share no text, for "random" ten
draws, and for "all sets" the texts of all five. "in each layer" removes the six lowest heads of every layer, "anywhere"
the 36 lowest of all. All cuts are judged on the same test texts, so the intervals are paired; they are over texts and
over sets. Lesson 04 shows the record: `lab.recorded("heads_removed")`.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resumable
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import models, stats, training
from labkit.lesson import experiments
from labkit.pruning import heads
from labkit.records import quality, result

QUESTION = "which score finds 36 of MiniLM's 72 heads that can be removed together?"
LAYERS, HEADS, REMOVED = 6, 12, 36
SETS, TEXTS = 5, 120  # of the validation texts, to score heads
JUDGED = 1000  # of the test texts
BATCH = 40
ANYWHERE, IN_LAYERS = "anywhere", "in each layer"
MEASURED = ("ablation", "ablation, magnitude")
ESTIMATED = ("Taylor, signed", "Taylor")
POOLED = {"ablation, all sets": "ablation", "Taylor, signed, all sets": "Taylor, signed"}  # from all scoring texts
WITHOUT_LOSS = {"focus": "entropy", "confidence": "confidence"}  # methods of labkit, from attention maps
WHOLE = "none removed"


@dataclass(frozen=True)
class Run:
    """36 heads removed by a score, from texts of a set; the set of "random" is its seed."""

    score: str
    spread: str
    set: int

    @property
    def file(self) -> str:
        return f"{self.score}, {self.spread}, {self.set}.pt"


def all_runs() -> Iterator[Run]:
    """List the runs, all of a set before those of the next."""
    yield Run(WHOLE, ANYWHERE, 0)
    for number in range(SETS):
        for score in (*MEASURED, *ESTIMATED):
            yield Run(score, ANYWHERE, number)
        yield Run("random", ANYWHERE, number)
        yield Run("random", ANYWHERE, number + SETS)
        yield Run("ablation", IN_LAYERS, number)
        yield Run("random", IN_LAYERS, number)
    for score in (*POOLED, "size", "variance", *WITHOUT_LOSS):
        yield Run(score, ANYWHERE, 0)


def scoring_texts(number: int, texts: int = TEXTS) -> list[dict[str, Tensor]]:
    """Return the validation texts of a set, in batches, the short texts first; half of them are positive."""
    data = models.review_batches("validation").data
    rows = torch.arange(number * texts, (number + 1) * texts)
    return sorted_batches({name: tensor[rows] for name, tensor in data.items()})


def sorted_batches(data: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Cut texts into batches of similar length, so that little padding is computed."""
    order = data["attention_mask"].sum(1).argsort(stable=True)
    tensors = {name: tensor[order] for name, tensor in data.items()}
    trim = models.review_batches("validation", 2).collate
    return list(training.Batches(tensors, BATCH, collate=trim))


class LossesOfTexts:
    """A loss_fn that keeps the loss of every text at each call, and returns the mean."""

    def __init__(self) -> None:
        self.calls: list[Tensor] = []  # of each call, [texts of the batch]

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        losses = F.cross_entropy(output.logits, target, reduction="none")
        self.calls.append(losses.detach())
        return losses.mean()


def measured_changes(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Measure how much the loss of each text rises without each head alone: [heads of all layers, texts]."""
    of_batches = []
    for batch in batches:
        losses = LossesOfTexts()
        heads.head_importance(model, [batch], "ablation", loss_fn=losses)
        whole, *without = losses.calls[-1 - LAYERS * HEADS :]  # the last calls: the whole model, then head by head
        of_batches.append(torch.stack(without) - whole)
    return torch.cat(of_batches, dim=1).double()


def estimated_changes(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Estimate the same by the slope of the loss in the head's gate, at the open gate: [heads of all layers, texts]."""
    of_texts = []
    for batch in batches:
        texts = len(batch["labels"])
        for i in range(texts):
            length = int(batch["attention_mask"][i].sum())
            text = {name: x[i : i + 1, :length] if x.ndim == 2 else x[i : i + 1] for name, x in batch.items()}
            gates = torch.ones(LAYERS, HEADS, requires_grad=True)
            with heads.gated(model, gates):
                loss = model(**text).loss
            (slopes,) = torch.autograd.grad(loss, gates)
            of_texts.append(-slopes.flatten())  # removing a head is a step of -1
    return torch.stack(of_texts, dim=1).double()


@torch.no_grad()
def inputs_of(modules: list[nn.Module], model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Run the model, and return the input of each module."""
    caught: list[Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda _, args: caught.append(args[0])) for module in modules]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return caught


def sizes(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Average the length of each head's output over the tokens: [layers, heads]."""
    outputs = [layer.attention.output.dense for layer in model.bert.encoder.layer]
    total, tokens = torch.zeros(LAYERS, HEADS, dtype=torch.float64), 0
    for batch in batches:
        contexts = inputs_of(outputs, model, batch)
        valid = batch["attention_mask"].bool()
        tokens += int(valid.sum())
        for layer, (dense, context) in enumerate(zip(outputs, contexts, strict=True)):
            columns = dense.weight.detach().unflatten(1, (HEADS, -1))  # [width, heads, size]
            of_heads = context[valid].unflatten(1, (HEADS, -1))  # [tokens, heads, size]
            written = torch.einsum("nhd,whd->nhw", of_heads, columns)
            total[layer] += written.norm(dim=-1).sum(0)
    return total / tokens


def variances(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Sum the magnitude of the slope of the last hidden state's variance in each head's gate: [layers, heads]."""
    total = torch.zeros(LAYERS, HEADS)
    for batch in batches:
        gates = torch.ones(LAYERS, HEADS, requires_grad=True)
        with heads.gated(model, gates):
            variance = model.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state.var()
        (slopes,) = torch.autograd.grad(variance, gates)
        total += slopes.abs()
    return total


def changes_of(model: nn.Module, number: int, folder: Path, texts: int) -> dict[str, Tensor]:
    """Compute the changes of the loss of every text for a set, once, and keep them: {kind: [heads, texts]}."""

    def compute() -> dict[str, Tensor]:
        batches = scoring_texts(number, texts)
        return {"measured": measured_changes(model, batches), "estimated": estimated_changes(model, batches)}

    return resumable.once(folder / f"changes, set {number}.pt", compute)


def scores_of(run: Run, model: nn.Module, folder: Path, texts: int) -> Tensor:
    """Score the heads for a run: [layers, heads]; the lowest are removed."""
    if run.score == "random":
        return torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(run.set))
    if run.score == "size":
        return sizes(model, scoring_texts(run.set, texts))
    if run.score == "variance":
        return variances(model, scoring_texts(run.set, texts))
    if run.score in WITHOUT_LOSS:
        return heads.head_importance(model, scoring_texts(run.set, texts), WITHOUT_LOSS[run.score])
    score = POOLED.get(run.score, run.score)
    kind = "measured" if score in MEASURED else "estimated"
    sets = range(SETS) if run.score in POOLED else (run.set,)
    changes = torch.cat([changes_of(model, number, folder, texts)[kind] for number in sets], dim=1)
    signed = score in ("ablation", "Taylor, signed")
    of_heads = changes.mean(1) if signed else changes.abs().mean(1)
    return of_heads.view(LAYERS, HEADS)


def gates_of(run: Run, scores: Tensor) -> Tensor:
    """Return gates [layers, heads], 0 for each removed head."""
    gates = torch.ones(LAYERS, HEADS)
    if run.spread == IN_LAYERS:
        lowest = scores.argsort(dim=1, stable=True)[:, : REMOVED // LAYERS]
        return gates.scatter(1, lowest, 0.0)
    for layer, removed in heads.lowest_heads(scores, REMOVED).items():
        gates[layer, removed] = 0
    return gates


@torch.no_grad()
def answers(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the logits [texts, 2] and the labels [texts] of all batches."""
    logits = torch.cat([model(**batch).logits for batch in batches])
    return {"logits": logits, "labels": torch.cat([batch["labels"] for batch in batches])}


def mean_loss(given: Mapping[str, Tensor]) -> float:
    return float(F.cross_entropy(given["logits"], given["labels"]))


def do(run: Run, model: nn.Module, test: list[dict[str, Tensor]], folder: Path, texts: int) -> dict[str, Any]:
    """Do a run: the answers to the test texts, the gates, and what the cut costs on the scoring texts."""
    if run.score == WHOLE:
        return {**answers(model, test), "gates": torch.ones(LAYERS, HEADS)}
    scores = scores_of(run, model, folder, texts)
    gates = gates_of(run, scores)
    with heads.gated(model, gates):
        outcome = {**answers(model, test), "gates": gates, "scores": scores}
        if run.score not in MEASURED:
            return outcome
        scoring = scoring_texts(run.set, texts)
        together = mean_loss(answers(model, scoring))
    alone = changes_of(model, run.set, folder, texts)["measured"].mean(1)
    outcome["together"] = together - mean_loss(answers(model, scoring))
    outcome["sum of single heads"] = float(alone[gates.flatten() == 0].sum())
    outcome["negative"] = int((alone[gates.flatten() == 0] < 0).sum())
    return outcome


def right(outcome: Mapping[str, Tensor]) -> Tensor:
    return outcome["logits"].argmax(1) == outcome["labels"]


def summary(runs: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each run."""
    rows = []
    for run, outcome in runs.items():
        margins = (outcome["logits"][:, 1] - outcome["logits"][:, 0]).double()
        row = {"score": run.score, "spread": run.spread, "set": run.set}
        row["accuracy"] = right(outcome).double().mean().item()
        row["called positive"] = (margins > 0).double().mean().item()
        row |= {"margin": margins.abs().mean().item(), "loss": mean_loss(outcome)}
        rows.append(row | {f"layer {i}": n for i, n in enumerate(outcome["gates"].sum(1).int().tolist())})
    return rows


def change_over_sets(after: Tensor, before: Tensor) -> tuple[float, float, float]:
    """Return the change of accuracy, and its interval over texts and sets.

    after, before: right answers [sets, texts]. A score with one set counts as the same in every set. Ten draws against
    five sets are compared in two halves, whose values and ends are averaged: wide, since a mean varies less.
    """
    most = max(len(after), len(before), SETS)
    after, before = (right.expand(most, -1) if len(right) == 1 else right for right in (after, before))
    if len(after) == len(before):
        return stats.accuracy_change_over_seeds(after, before)
    halves = []
    for i in range(2):
        of_sets = (right[i::2] if len(right) == most else right for right in (after, before))
        halves.append(stats.accuracy_change_over_seeds(*of_sets))
    change, low, high = torch.tensor(halves, dtype=torch.float64).mean(0).tolist()
    return change, low, high


def changes(runs: Mapping[Run, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare every two scores, and each with the whole model: the change of accuracy over texts and sets."""
    of_score: dict[tuple[str, str], list[Tensor]] = {}
    for run, outcome in runs.items():
        of_score.setdefault((run.score, run.spread), []).append(right(outcome))
    stacked = {score: torch.stack(sets) for score, sets in of_score.items()}
    rows = []
    for after, before in itertools.combinations(stacked, 2):
        change, low, high = change_over_sets(stacked[after], stacked[before])
        rows.append({"after": after, "before": before, "change": change, "low": low, "high": high})
    return rows


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    texts = 8 if options.quick else TEXTS
    model = models.minilm_finetuned()
    test = sorted_batches(models.review_batches("test", 40 if options.quick else JUDGED).data)
    runs = list(all_runs())[: 2 if options.quick else None]
    finished = resumable.finished(runs, options, lambda run: do(run, model, test, options.folder, texts))
    if options.quick or len(finished) < len(runs):
        return
    of_single_heads = []
    for run, outcome in finished.items():
        if "together" in outcome:
            measured = {name: outcome[name] for name in ("together", "sum of single heads", "negative")}
            of_single_heads.append({"score": run.score, "spread": run.spread, "set": run.set, **measured})
    in_sets = {
        f"{run.score}, set {run.set}": outcome["scores"].flatten().tolist()
        for run, outcome in finished.items()
        if run.spread == ANYWHERE and "scores" in outcome and run.score != "random"
    }
    print(
        experiments.save(
            Path(__file__).stem,
            QUESTION,
            summary(finished),
            by=("score", "spread", "set"),
            columns={
                "accuracy": quality("fraction"),
                "called positive": result("fraction"),
                "margin": result("logits"),
                "loss": result("nats"),
                **{f"layer {i}": result("heads left") for i in range(LAYERS)},
            },
            settings={
                "heads removed": REMOVED,
                "test texts": sum(len(batch["labels"]) for batch in test),
                "scoring texts of a set": TEXTS,
                "sets": SETS,
                "changes": changes(finished),
                "single heads": of_single_heads,
                "scores": in_sets,
            },
            seconds=sum(outcome["seconds"] for outcome in finished.values()),
        )
    )


if __name__ == "__main__":
    main()
