"""A student with a teacher beside the same one without: ResNet-8 of ResNet-20, shallow MiniLM, SmolLM2 with a cut.

    python benchmarks/distillation.py                                       everything, 5 seeds
    python benchmarks/distillation.py --student resnet8 --methods labels answers longer --steps 600
    python benchmarks/distillation.py --student minilm --layers 3 2 --steps 100 --seeds 3
    python benchmarks/distillation.py --student resnet8 --methods labels answers --lr 0.1 --split validation
    python benchmarks/distillation.py --student smollm2 --steps 20 --seeds 3

The methods of a seed start from the same weights, see the same batches and take as many steps; "labels" is the control.
"longer" is the control at equal time: labels only, for as many steps more as the teacher's answers cost in CPU time
(once for each example that is seen; they are stored). "answers" has T = 4 and a tenth of the labels' loss, and so have
the methods that vary it: "T1", "no labels", "reverse" and "jsd" (beta 1 and 1/2), and "hint", "attention", "distances"
and "values", which match features or relations in addition. A student of MiniLM starts from random weights ("random"),
from layers of the pretrained model ("pretrained") or from the teacher's own ("teacher's"). SmolLM2 loses six layers and
heals on 256 tokens of the handbook a step: on its tokens, on the whole model's answers to them, or "on policy", on 32
tokens that it writes itself after each of eight prompts of 32; "right" are the next tokens of other chapters.

Gains are in points of accuracy on the split's examples: the first interval is for other examples (paired, answers
averaged over seeds), the second for other seeds (Student's, of the paired differences).
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from labkit.batches import labelled, segments
from labkit.resnet import ResNet8
from torch import Tensor, nn

from labkit import datasets, distillation, models, stats, training
from labkit.distillation import distilling, matching
from labkit.pruning import depth

SOFT = {"alpha": 0.9, "temperature": 4.0}
IMAGES = ("labels", "longer", "smoothing", "answers", "T1", "no labels", "reverse", "jsd", "hint", "attention")
METHODS = (*IMAGES, "distances", "values", "on policy")
VALUES = "bert.encoder.layer.{}.attention.self.value"


def smoothed(model: nn.Module, batch: training.Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)


def labels_only(model: nn.Module, batch: training.Batch) -> Tensor:
    if isinstance(batch, dict):
        return training.task_loss(model, {name: x for name, x in batch.items() if name != distillation.STORED})
    return training.task_loss(model, batch[:2])


def loss_of(method: str, teacher: nn.Module, pairs: Mapping[str, str]) -> Callable[[nn.Module, training.Batch], Tensor]:
    """pairs: the modules that are matched, the student's and the teacher's."""
    answers = distilling(None, **SOFT)

    def match(distance: Callable[..., Tensor], weight: float) -> Callable[[nn.Module, training.Batch], Tensor]:
        return matching(teacher, pairs, distance, weight=weight, loss_fn=answers)

    def values(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return distillation.value_relations(student, teacher, heads=12, mask=mask)

    return {
        "labels": lambda: labels_only,
        "longer": lambda: labels_only,
        "smoothing": lambda: smoothed,
        "answers": lambda: answers,
        "T1": lambda: distilling(None, **SOFT | {"temperature": 1.0}),
        "no labels": lambda: distilling(None, **SOFT | {"alpha": 1.0}),
        "reverse": lambda: distilling(None, **SOFT, beta=1.0),
        "jsd": lambda: distilling(None, **SOFT, beta=0.5),
        "hint": lambda: match(F.mse_loss, weight=1.0),
        "attention": lambda: match(distillation.attention_transfer, weight=100.0),
        "distances": lambda: match(distillation.relation_loss, weight=25.0),
        "values": lambda: match(values, weight=1.0),
    }[method]()


def trained(model: nn.Module, batches: training.Batches, loss_fn: Callable, seed: int, **recipe: Any) -> float:
    """Trains in place, with dropout drawn from the seed; CPU seconds."""
    torch.manual_seed(seed)
    start = time.process_time()
    training.train_(model, batches, loss_fn=loss_fn, **recipe)
    return time.process_time() - start


@torch.no_grad()
def answered(teacher: nn.Module, batches: training.Batches) -> tuple[Tensor, float]:
    """Its logits [N, classes] in the order of the batches, and CPU seconds."""
    start, rows = time.process_time(), []
    for batch in batches:
        if isinstance(batch, dict):
            rows.append(teacher(batch["input_ids"], batch["attention_mask"]).logits)
        else:
            rows.append(teacher(training.place(batch, "cpu")[0]))
    return torch.cat(rows), time.process_time() - start


def steps_for(seconds: float, model: nn.Module, batches: training.Batches, recipe: Mapping[str, Any]) -> int:
    """How many steps on labels take so many CPU seconds."""
    few = dict(recipe) | {"steps": min(recipe["steps"], 10)}
    trained(model, batches, labels_only, 0, **few)  # the first steps are slow
    return round(seconds / trained(model, batches, labels_only, 0, **few) * few["steps"])


def resnet_runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    teacher, train = models.resnet20(), datasets.fashion_mnist("train", options.images)
    held_out = datasets.fashion_mnist(options.split)
    test = training.Batches((held_out.images, held_out.labels), 500)
    logits, seconds = answered(teacher, training.Batches((train.images, train.labels), 250))
    recipe = {"steps": options.steps, "epochs": options.steps, "max_lr": options.lr}
    yield {"student": "teacher", "method": "teacher", "seed": None, "right": training.correct(teacher, test)}
    data = (train.images, train.labels, logits)
    more = steps_for(seconds, ResNet8(), training.Batches(data, 64, 0), recipe)
    for seed in range(options.seeds):
        for method in options.methods:
            if method in ("values", "on policy"):
                continue
            torch.manual_seed(seed)
            student, name = ResNet8(), "stage3"
            model = student
            if method == "hint":
                model = distillation.WithProjectors(student, {name: nn.Conv2d(32, 64, 1)})
            longer = {"steps": options.steps + more, "epochs": options.steps + more} if method == "longer" else {}
            loss_fn = loss_of(method, teacher, {name: name})
            cpu = trained(model, training.Batches(data, 64, seed), loss_fn, seed, **recipe | longer)
            right = training.correct(student.to(memory_format=torch.channels_last), test)
            yield {"student": "ResNet-8", "method": method, "seed": seed, "right": right, "cpu_s": cpu}


def minilm_runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    teacher, pretrained = models.minilm_finetuned(), models.minilm_classifier()
    train, test = models.review_batches("train", options.snippets), models.review_batches(options.split, batch_size=50)
    logits, seconds = answered(teacher, train)
    recipe = {"steps": options.steps, "epochs": options.steps, "max_lr": 1e-4, "optimizer": "adamw", "warmup": 0.1}
    yield {"student": "teacher", "method": "teacher", "seed": None, "right": training.correct(teacher, test)}
    data = {**train.data, distillation.STORED: logits}
    for layers in options.layers:
        starts = {
            "random": lambda layers=layers: type(teacher)(distillation.shallow(teacher, layers).config),
            "pretrained": lambda layers=layers: distillation.shallow(pretrained, layers),
            "teacher's": lambda layers=layers: distillation.shallow(teacher, layers),
        }
        more = steps_for(seconds, starts["teacher's"](), train, recipe)
        for seed in range(options.seeds):
            for start, build in starts.items():
                for method in [m for m in ("labels", "longer", "answers", "values") if m in options.methods]:
                    torch.manual_seed(seed)
                    student = build()
                    longer = {"steps": options.steps + more, "epochs": options.steps + more}
                    batches = training.Batches(data, train.batch_size, seed, train.collate)
                    loss_fn = loss_of(method, teacher, {VALUES.format(layers - 1): VALUES.format(5)})
                    cpu = trained(student, batches, loss_fn, seed, **recipe | (longer if method == "longer" else {}))
                    name = f"{layers} layers, {start}"
                    right = training.correct(student, test)
                    yield {"student": name, "method": method, "seed": seed, "right": right, "cpu_s": cpu}


def smollm2_runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    teacher, tokenizer, length = models.smollm2(), models.tokenizer("smollm2"), 256
    text, other = (
        torch.tensor(tokenizer(datasets.handbook(part), verbose=False)["input_ids"]) for part in ("calibration", "test")
    )
    test = other[: 8 * length].view(8, length)
    pieces = [{"input_ids": piece} for piece in segments(text, 64, length, seed=0)]
    prompts = [{"input_ids": piece["input_ids"].view(8, 32)} for piece in pieces]
    change = depth.layer_importance(teacher, pieces[:2], method="cosine", n=6)
    cut = depth.prune_layers(teacher, range(int(change.argmin()), int(change.argmin()) + 6), check=False).model
    recipe = {"steps": options.steps, "epochs": options.steps, "max_lr": 2e-4, "optimizer": "adamw", "warmup": 0.1}
    losses = {
        "labels": (lambda model, batch: training.task_loss(model, labelled(model, batch)), pieces),
        "answers": (distilling(teacher, alpha=1.0, temperature=1.0), pieces),
        "on policy": (distillation.on_policy(teacher, new=32), prompts),
    }

    @torch.no_grad()
    def right(model: nn.Module) -> Tensor:
        return torch.cat([model(row[None]).logits[0, :-1].argmax(-1) == row[1:] for row in test])

    yield {"student": "teacher", "method": "teacher", "seed": None, "right": right(teacher)}
    yield {"student": "SmolLM2, cut", "method": "not healed", "seed": None, "right": right(cut)}
    for seed in range(options.seeds):
        for method in [method for method in losses if method in options.methods]:
            model, (loss_fn, data) = copy.deepcopy(cut), losses[method]
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
            cpu = trained(model, [data[i] for i in order], loss_fn, seed, **recipe)
            yield {"student": "SmolLM2", "method": method, "seed": seed, "right": right(model.eval()), "cpu_s": cpu}


def summary(rows: list[dict[str, Any]], student: str) -> Iterator[str]:
    """A line a method: accuracy, its gain over the control, CPU seconds."""
    of_student = [row for row in rows if row["student"] == student]
    right = {
        method: 100 * torch.stack([row["right"].double() for row in of_student if row["method"] == method])
        for method in dict.fromkeys(row["method"] for row in of_student)
    }  # [seeds, N]
    for method, answers in right.items():
        line = f"{student:24} {method:10} {float(answers.mean()):6.2f} %"
        if method != "labels" and "labels" in right:
            gains = (answers - right["labels"]).mean(1).tolist()
            paired = stats.paired_difference(answers.mean(0).tolist(), right["labels"].mean(0).tolist())
            mean, low, high = stats.mean_ci(gains)
            line += f" {mean:+.2f} [{paired[1]:+.2f}, {paired[2]:+.2f}] examples, [{low:+.2f}, {high:+.2f}] seeds"
        seconds = [row["cpu_s"] for row in of_student if row["method"] == method and "cpu_s" in row]
        yield line + (f", {stats.mean_ci(seconds)[0]:.1f} CPU s" if seconds else "")


RUNS = {"resnet8": resnet_runs, "minilm": minilm_runs, "smollm2": smollm2_runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=600, help="of 64 images or 32 snippets")
    parser.add_argument("--lr", type=float, default=0.3, help="the highest of ResNet-8's cycle")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="for choices, for verdicts")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--snippets", type=int, default=None, help="all if left out")
    parser.add_argument("--layers", nargs="+", type=int, default=[3, 2])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for every row, answers summed up")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for student in options.student:
        for row in RUNS[student](options):
            rows.append(row)
            share = 100 * float(row["right"].double().mean())
            print(f"{row['student']}, {row['method']}, seed {row['seed']}: {share:.2f} %", flush=True)
        for name in dict.fromkeys(row["student"] for row in rows if row["seed"] is not None):
            print("\n".join(summary(rows, name)), flush=True)
    if options.json:
        counted = [{k: int(v.sum()) if isinstance(v, Tensor) else v for k, v in row.items()} for row in rows]
        options.json.write_text(json.dumps(counted, indent=1))


if __name__ == "__main__":
    main()
