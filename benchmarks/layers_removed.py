"""Perplexity of SmolLM2 without 2, 4 and 8 of its 30 layers, by the rule that chooses them.

    python benchmarks/layers_removed.py --folder DIR               15 minutes on an idle core, and writes the record
    python benchmarks/layers_removed.py --folder DIR --minutes 10  as many runs as that; the same command goes on
    python benchmarks/layers_removed.py --quick                    two runs on few tokens, and writes nothing

The rules read chapters of the handbook that the test does not: "least angle" (Gromov et al. 2024: the span of layers
that rotates the hidden state least) over all tokens, and over the last token of each text as in the paper; "lowest loss
alone" (the layers whose removal one at a time raises the loss least); "lowest loss, one by one" (the layer that raises
the loss least goes, and the rest are measured anew). "middle" and "late" (the last ones, but for the very last) read
nothing. "neurons" removes as many parameters as neurons of all layers, by Wanda. Nothing is trained. The intervals are
over texts, and the losses are paired. Lesson 04 shows the record: `lab.recorded("layers_removed")`.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resumable
import torch
from torch import Tensor, nn
from tqdm import tqdm

from labkit import datasets, models, stats, training
from labkit.lesson import experiments
from labkit.pruning import depth
from labkit.pruning import transformers as pruning
from labkit.records import cost, result

QUESTION = "which 2, 4 and 8 of SmolLM2's 30 layers can be removed?"
COUNTS = (2, 4, 8)
TEST_TEXTS, TEST_LENGTH = 16, 192  # spread over the chapters of the test; lengths in tokens
ANGLE_TEXTS, LOSS_TEXTS, LENGTH = 24, 4, 128  # of the chapters for calibration
ANGLE, LAST, ALONE, GREEDY = "least angle", "least angle, last token", "lowest loss alone", "lowest loss, one by one"
NEURONS, WHOLE = "neurons: Wanda", "whole"


@dataclass(frozen=True)
class Run:
    """Layers removed, or as many parameters as `count` layers in neurons."""

    layers: tuple[int, ...]
    neurons_worth: int = 0

    @property
    def file(self) -> str:
        if self.neurons_worth:
            return f"neurons worth {self.neurons_worth}.pt"
        return f"layers {' '.join(map(str, self.layers)) or 'none'}.pt"


def texts_of(part: str, count: int, length: int) -> list[Tensor]:
    """Cut `count` texts of `length` tokens from places spread evenly over a part of the handbook."""
    ids = models.tokenizer("smollm2")(datasets.handbook(part), return_tensors="pt").input_ids[0]
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return [ids[start : start + length] for start in starts]


def batches_of(texts: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in texts]


def states_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the hidden state before each layer and after the last, before the final norm: [layers + 1, T, width]."""
    after_last: list[Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: after_last.append(args[0]))
    base = model.model(ids[None], output_hidden_states=True)
    hook.remove()
    return torch.cat([*base.hidden_states[:-1], *after_last])


@torch.no_grad()
def angles(model: nn.Module, texts: Sequence[Tensor]) -> dict[int, dict[str, Tensor]]:
    """Average the angular distance of each span, over all tokens and over the last tokens: {span: {rule: [spans]}}."""
    states = [states_of(model, ids) for ids in texts]
    distances = {}
    for count in COUNTS:
        of_texts = torch.stack([depth.angular(state[:-count], state[count:]) for state in states]).double()
        distances[count] = {ANGLE: of_texts.mean((0, 2)), LAST: of_texts[:, :, -1].mean(0)}
    return distances


def removed_one_by_one(model: nn.Module, batches: Sequence[dict[str, Tensor]], first: Tensor) -> list[int]:
    """Remove the layer that raises the loss least, measure the rest anew, and so on; return the layers in that order.

    first: the rise of the loss without each layer of the whole model [layers].
    """
    removed = [int(first.argmin())]
    for _ in tqdm(range(1, max(COUNTS)), desc="layers one by one"):
        remaining = [layer for layer in range(len(first)) if layer not in removed]
        shorter = depth.prune_layers(model, removed, check=False).model
        rises = depth.layer_importance(shorter, batches, "loss")
        removed.append(remaining[int(rises.argmin())])
    return removed


def prepared(folder: Path, model: nn.Module, quick: bool) -> dict[str, Any]:
    """Compute what the rules read, once, and keep it in the folder."""

    def compute() -> dict[str, Any]:
        angle_texts = texts_of("calibration", 2 if quick else ANGLE_TEXTS, LENGTH)
        loss_batches = batches_of(texts_of("calibration", 1 if quick else LOSS_TEXTS, 8 if quick else LENGTH))
        alone = depth.layer_importance(model, loss_batches, "loss")
        ready = {"angles": angles(model, angle_texts), "alone": alone}
        ready["one by one"] = list(range(8)) if quick else removed_one_by_one(model, loss_batches, alone)
        scores = {"angle": "angular", "relative length": "l2", "cosine": "cosine"}
        ready["scores"] = {name: depth.layer_importance(model, loss_batches, scores[name]) for name in scores}
        ready["scores"]["mean squared difference"] = squared_differences(model, loss_batches)
        return ready

    return resumable.once(folder / "prepared.pt", lambda: resumable.timed(compute))


@torch.no_grad()
def squared_differences(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Average the squared difference of each layer's output and input over tokens and entries: [layers]."""
    total = torch.zeros(len(model.model.layers), dtype=torch.float64)

    def add(number: int, before: Tensor, output: Any) -> None:
        after = output if isinstance(output, Tensor) else output[0]
        total[number] += (after - before).square().mean().double()

    hooks = []
    for number, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(lambda _, args, output, number=number: add(number, args[0], output)))
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return total / len(batches)


def rules(count: int, layers: int, ready: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Choose `count` layers by each rule."""
    starts = {name: int(distance.argmin()) for name, distance in ready["angles"][count].items()}
    starts |= {"middle": (layers - count) // 2, "late": layers - 1 - count}
    spans = {name: tuple(range(start, start + count)) for name, start in starts.items()}
    alone = tuple(sorted(ready["alone"].argsort(stable=True)[:count].tolist()))
    return {ALONE: alone, GREEDY: tuple(sorted(ready["one by one"][:count])), **spans}


def all_runs(layers: int, ready: Mapping[str, Any]) -> Iterator[tuple[str, int, Run]]:
    """List (rule, layers removed, run); two rules may share a run."""
    yield WHOLE, 0, Run(())
    for count in COUNTS:
        for name, chosen in rules(count, layers, ready).items():
            yield name, count, Run(chosen)
        yield NEURONS, count, Run((), count)


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def cut(model: nn.Module, run: Run) -> nn.Module:
    """Return the model of a run."""
    if run.layers:
        return depth.prune_layers(model, run.layers, check=False).model
    if not run.neurons_worth:
        return model
    layer, layers = model.model.layers[0], len(model.model.layers)
    ratio = run.neurons_worth / layers * size_of(layer) / size_of(layer.mlp)
    batches = batches_of(texts_of("calibration", LOSS_TEXTS, LENGTH))
    return pruning.prune_ffn(model, ratio, criterion="wanda", batches=batches, check=False).model


def losses(model: nn.Module, texts: Sequence[Tensor]) -> list[float]:
    """Return the mean loss per predicted token of each text, in nats."""
    return [math.log(training.perplexity(model, ids, window=len(ids))) for ids in texts]


def do(model: nn.Module, run: Run, texts: Sequence[Tensor]) -> dict[str, Any]:
    """Do a run: the loss of each text, and the parameters that are left."""
    small = cut(model, run)
    return {"losses": losses(small, texts), "layers": run.layers, "parameters": size_of(small)}


def summary(done: Mapping[tuple[str, int], Mapping[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Return a row for each rule and count: the perplexity with its interval over texts."""
    rows = []
    for (rule, count), outcome in done.items():
        value, low, high = stats.perplexity_ci(outcome["losses"], [tokens] * len(outcome["losses"]))
        chosen = " ".join(map(str, outcome["layers"]))
        row = {"rule": rule, "layers removed": count, "layers": chosen, "parameters": outcome["parameters"]}
        rows.append({**row, "perplexity": value, "low": low, "high": high})
    return rows


def ratios(done: Mapping[tuple[str, int], Mapping[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Compare every two rules at the same count, and each with the whole model: perplexity over perplexity, paired."""
    rows = []
    for (before, count_before), (after, count) in itertools.combinations(done, 2):
        if count_before not in (0, count):
            continue
        losses_before, losses_after = done[before, count_before]["losses"], done[after, count]["losses"]
        if losses_after == losses_before:
            continue  # the same layers
        ratio, low, high = stats.perplexity_ci(losses_after, [tokens] * len(losses_after), losses_before)
        rows.append({"removed": count, "of": after, "over": before, "ratio": ratio, "low": low, "high": high})
    return rows


def main() -> None:
    options = resumable.options(__doc__)
    torch.set_num_threads(1)
    model = models.smollm2()
    ready = prepared(options.folder, model, options.quick)
    texts = texts_of("test", 2 if options.quick else TEST_TEXTS, 16 if options.quick else TEST_LENGTH)
    listed = list(all_runs(len(model.model.layers), ready))[: 2 if options.quick else None]
    runs = list(dict.fromkeys(run for _, _, run in listed))
    finished = resumable.finished(runs, options, lambda run: do(model, run, texts))
    if options.quick or len(finished) < len(runs):
        return
    done = {(rule, count): finished[run] for rule, count, run in listed}
    tokens = TEST_LENGTH - 1  # of each text, predicted
    print(
        experiments.save(
            Path(__file__).stem,
            QUESTION,
            summary(done, tokens),
            by=("rule", "layers removed"),
            columns={
                "layers": result(),
                "parameters": result(),
                "perplexity": cost(low="low", high="high"),
            },
            settings={
                "layers": len(model.model.layers),
                "vocabulary": model.config.vocab_size,
                "test texts": TEST_TEXTS,
                "tokens of a test text": TEST_LENGTH,
                "texts for the angle": ANGLE_TEXTS,
                "texts for the loss": LOSS_TEXTS,
                "tokens of a text": LENGTH,
                "losses": {f"{rule}, {count}": outcome["losses"] for (rule, count), outcome in done.items()},
                "ratios": ratios(done, tokens),
                "angles": {str(count): {k: v.tolist() for k, v in of.items()} for count, of in ready["angles"].items()},
                "loss without the layer": ready["alone"].tolist(),
                "scores": {name: score.tolist() for name, score in ready["scores"].items()},
            },
            seconds=ready["seconds"] + sum(outcome["seconds"] for outcome in finished.values()),
        )
    )


if __name__ == "__main__":
    main()
