"""Gain of a student from a teacher: ResNet-8 taught by ResNet-20, shallow MiniLM by MiniLM, cut SmolLM2 by SmolLM2.

    python benchmarks/distillation.py                                       everything, 5 seeds
    python benchmarks/distillation.py --student resnet8 --methods labels answers longer --steps 600
    python benchmarks/distillation.py --student minilm --layers 3 2 --steps 100 --seeds 3
    python benchmarks/distillation.py --student resnet8 --methods labels answers --lr 0.1 --split validation
    python benchmarks/distillation.py --student smollm2 --steps 20 --seeds 3

The methods of a seed start from the same weights, see the same batches and take as many steps; "labels" is the control.
"longer" is the control at equal time: labels only, for as many steps more as the teacher's answers cost in CPU time
(answers are computed once for each example and stored). "answers" has T = 4 and a tenth of the labels' loss, and so
have the variants: "T1", "no labels", "reverse" and "jsd" (beta 1 and 1/2), and "hint", "attention", "distances" and
"values" with features or relations matched in addition. A student of MiniLM starts from random weights ("random"), from
layers of the pretrained model ("pretrained") or from the teacher's layers ("teacher's"). SmolLM2 loses six layers and
heals on 256 tokens of the handbook in a step: on the tokens, on the whole model's answers to the tokens, or "on
policy", on 32 tokens written by the student after each of eight prompts of 32; "right" are the next tokens of chapters
not trained on.

Gains are in points of accuracy on the split's examples, paired; the interval is over examples and seeds, so a single
seed has none. SmolLM2's examples are tokens, of which those of a chapter are alike: its intervals are too narrow.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit import datasets, distillation, models, stats, training
from labkit.attention import speculative
from labkit.attention.decoder import Decoder
from labkit.batches import labelled, segments
from labkit.distillation import distillation_loss, distilling
from labkit.pruning import depth
from labkit.resnet import ResNet8

SOFT = {"alpha": 0.9, "temperature": 4.0}
IMAGES = ("labels", "longer", "smoothing", "answers", "T1", "no labels", "reverse", "jsd", "hint", "attention")
METHODS = (*IMAGES, "distances", "values", "on policy")
VALUES = "bert.encoder.layer.{}.attention.self.value"
STAGE = "stage3"  # of ResNets, whose results are matched
LENGTH = 256  # tokens of a step of SmolLM2
LossFn = Callable[[nn.Module, training.Batch], Tensor]
Row = dict[str, Any]

# --- losses on features and relations ---------------------------------------------------------------------------------


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of two attention maps, mean over the images, a scalar (Zagoruyko and Komodakis 2017, eq. 2).

    student, teacher: features [N, channels, H, W]; the numbers of channels may differ. A map is the sum over the
    channels of the squares, scaled to length 1; the distance is squared as in the authors' code.
    """
    gaps = _attention_map(student) - _attention_map(teacher.detach())
    return gaps.square().sum(1).mean()


def _attention_map(features: Tensor) -> Tensor:
    return F.normalize(features.square().sum(1).flatten(1), dim=1)  # [N, H * W]


def value_relations(
    student: Tensor,
    teacher: Tensor,
    *,
    heads: int,
    mask: Tensor,
) -> Tensor:
    """KL divergence of the similarities of a text's values, mean over heads and tokens, a scalar.

    student, teacher: values of a layer [B, T, width]; the widths may differ, and are divided into `heads` relation
    heads. A relation is softmax(V V^T / sqrt(width / heads)) [B, heads, T, T]. mask: [B, T], 0 at padding.
    Wang et al. 2020, MiniLM, eq. 8-10; relation heads: Wang et al. 2021, MiniLMv2.
    """
    log_q = _log_relation(student, heads, mask)
    log_p = _log_relation(teacher.detach(), heads, mask)
    is_key = mask[:, None, None, :] != 0
    terms = torch.where(is_key, log_p.exp() * (log_p - log_q), 0)
    divergence = terms.sum(-1)  # [B, heads, T]
    weights = mask[:, None, :].expand_as(divergence).to(divergence)
    return (divergence * weights).sum() / weights.sum()


def _log_relation(values: Tensor, heads: int, mask: Tensor) -> Tensor:
    v = values.unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, T, width / heads]
    similarity = v @ v.mT / math.sqrt(v.shape[-1])  # [B, heads, T, T]
    lowest = torch.finfo(similarity.dtype).min
    return similarity.masked_fill(mask[:, None, None, :] == 0, lowest).log_softmax(-1)


class WithProjectors(nn.Module):
    """A student, and projections of features to the teacher's width, trained together (Romero et al. 2015, FitNets).

    projectors: {name of the student's module: module to project the result}. Called like the student.
    """

    def __init__(self, student: nn.Module, projectors: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.student = student
        self.projectors = nn.ModuleDict(projectors)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.student(*args, **kwargs)


class Matching:
    """A loss_fn for training: `answers` and weight * the distance of the results of two modules.

    names: the student's module and the teacher's. distance: a function of the two results, which also gets the `mask`
    [B, T] of a batch with an attention mask. answers: loss_fn of the rest of the loss.
    """

    def __init__(
        self,
        teacher: nn.Module,
        names: tuple[str, str],
        distance: Callable[..., Tensor],
        weight: float,
        answers: LossFn,
    ) -> None:
        self.teacher, self.distance, self.weight, self.answers = teacher, distance, weight, answers
        self.student_name, self.teacher_name = names

    def __call__(self, model: nn.Module, batch: training.Batch) -> Tensor:
        projectors = model.projectors if isinstance(model, WithProjectors) else {}
        student = model.student if isinstance(model, WithProjectors) else model
        results: dict[str, Tensor] = {}

        def keep_student(_: nn.Module, args: tuple, result: Tensor) -> None:
            results["student"] = result

        def keep_teacher(_: nn.Module, args: tuple, result: Tensor) -> None:
            results["teacher"] = result

        with student.get_submodule(self.student_name).register_forward_hook(keep_student):
            loss = self.answers(model, batch)
        with self.teacher.get_submodule(self.teacher_name).register_forward_hook(keep_teacher):
            teacher_logits(self.teacher, batch)
        feature = results["student"]
        if self.student_name in projectors:
            feature = projectors[self.student_name](feature)
        mask = {"mask": batch["attention_mask"]} if isinstance(batch, dict) else {}
        return loss + self.weight * self.distance(feature, results["teacher"], **mask)


def on_policy(teacher: nn.Module, *, new: int) -> LossFn:
    """A loss_fn for training: the student continues each prompt, and the teacher judges every token the student wrote.

    The reverse divergence KL(q || p) at temperature 1, mean over the new tokens, which are drawn anew for each batch
    from torch's generator; no gradient goes through the drawing (Agarwal et al. 2024, GKD, algorithm 1, lambda = 1).
    teacher: a LlamaForCausalLM in eval mode, and so is the student. new: tokens for each prompt. Batches are
    {"input_ids": prompts [B, T] of one length, without padding}.
    """

    def loss_fn(model: nn.Module, batch: training.Batch) -> Tensor:
        prompts = batch["input_ids"]
        ids = continued(model, prompts, new)  # [B, T + new]
        with torch.no_grad():
            judged = teacher(input_ids=ids).logits
        written = slice(prompts.shape[1] - 1, -1)  # the positions whose next tokens are new
        logits = model(input_ids=ids).logits
        return distillation_loss(logits[:, written], judged[:, written], temperature=1.0, beta=1.0)

    return loss_fn


def continued(model: nn.Module, prompts: Tensor, new: int) -> Tensor:
    """Sample `new` tokens after each prompt of [B, T] at temperature 1: [B, T + new]."""
    decoder = Decoder(model)
    texts = []
    seeds = torch.randint(2**31, (len(prompts),)).tolist()
    for prompt, seed in zip(prompts, seeds, strict=True):
        text = speculative.generate(decoder, prompt, k=0, max_new_tokens=new, temperature=1.0, seed=seed)
        texts.append(text.ids)
    return torch.stack(texts)


# --- the methods ------------------------------------------------------------------------------------------------------


def smoothed(model: nn.Module, batch: training.Batch) -> Tensor:
    images, labels = batch[:2]
    return F.cross_entropy(model(images), labels, label_smoothing=0.1)


def labels_only(model: nn.Module, batch: training.Batch) -> Tensor:
    if isinstance(batch, dict):
        batch = {name: x for name, x in batch.items() if name != distillation.STORED}
        return training.task_loss(model, batch)
    return training.task_loss(model, batch[:2])


def own_tokens(model: nn.Module, batch: training.Batch) -> Tensor:
    return training.task_loss(model, labelled(model, batch))


def twelve_value_heads(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return value_relations(student, teacher, heads=12, mask=mask)


def loss_of(method: str, teacher: nn.Module, names: tuple[str, str]) -> LossFn:
    """Return the loss_fn of a method; names: the modules to match, the student's and the teacher's."""
    answers = distilling(None, **SOFT)
    losses: dict[str, LossFn] = {
        "labels": labels_only,
        "longer": labels_only,
        "smoothing": smoothed,
        "answers": answers,
        "T1": distilling(None, **SOFT | {"temperature": 1.0}),
        "no labels": distilling(None, **SOFT | {"alpha": 1.0}),
        "reverse": distilling(None, **SOFT, beta=1.0),
        "jsd": distilling(None, **SOFT, beta=0.5),
        "hint": Matching(teacher, names, F.mse_loss, 1.0, answers),
        "attention": Matching(teacher, names, attention_transfer, 100.0, answers),
        "distances": Matching(teacher, names, distillation.relation_loss, 25.0, answers),
        "values": Matching(teacher, names, twelve_value_heads, 1.0, answers),
    }
    return losses[method]


# --- training ---------------------------------------------------------------------------------------------------------


def trained(model: nn.Module, batches: training.Batches, loss_fn: LossFn, seed: int, **recipe: Any) -> float:
    """Train in place, with dropout drawn from the seed, and return CPU seconds."""
    torch.manual_seed(seed)
    start = time.process_time()
    training.train_(model, batches, loss_fn=loss_fn, **recipe)
    return time.process_time() - start


@torch.no_grad()
def teacher_logits(teacher: nn.Module, batch: training.Batch) -> Tensor:
    """Return the teacher's logits [N, classes] for a batch of images or texts."""
    if isinstance(batch, dict):
        return teacher(batch["input_ids"], batch["attention_mask"]).logits
    images = training.place(batch, "cpu")[0]
    return teacher(images)


def answered(teacher: nn.Module, batches: training.Batches) -> tuple[Tensor, float]:
    """Return the teacher's logits [N, classes] in the order of the batches, and CPU seconds."""
    start = time.process_time()
    logits = torch.cat([teacher_logits(teacher, batch) for batch in batches])
    return logits, time.process_time() - start


def steps_for(
    seconds: float,
    model: nn.Module,
    batches: training.Batches,
    recipe: Mapping[str, Any],
) -> int:
    """Return how many steps on labels take as many CPU seconds."""
    few = dict(recipe) | {"steps": min(recipe["steps"], 10)}
    trained(model, batches, labels_only, 0, **few)  # the first steps are slow
    seconds_of_few = trained(model, batches, labels_only, 0, **few)
    return round(seconds / seconds_of_few * few["steps"])


def recipe_for(options: argparse.Namespace, method: str, more: int, **rest: Any) -> dict[str, Any]:
    """Return the options of `training.train_`; `more`: the additional steps of the method "longer"."""
    steps = options.steps + more if method == "longer" else options.steps
    return {"steps": steps, "epochs": steps, **rest}


def resnet_runs(options: argparse.Namespace) -> Iterator[Row]:
    teacher = models.resnet20()
    train = datasets.fashion_mnist("train", options.images)
    held_out = datasets.fashion_mnist(options.split)
    test = training.Batches((held_out.images, held_out.labels), 500)
    logits, seconds = answered(teacher, training.Batches((train.images, train.labels), 250))
    yield {"student": "teacher", "method": "teacher", "seed": None, "right": training.correct(teacher, test)}
    data = (train.images, train.labels, logits)
    recipe = recipe_for(options, "labels", 0, max_lr=options.lr)
    more = steps_for(seconds, ResNet8(), training.Batches(data, 64, 0), recipe)
    methods = [method for method in options.methods if method not in ("values", "on policy")]
    for seed in range(options.seeds):
        for method in methods:
            torch.manual_seed(seed)
            student = ResNet8()
            model = student
            if method == "hint":
                model = WithProjectors(student, {STAGE: nn.Conv2d(32, 64, 1)})
            loss_fn = loss_of(method, teacher, (STAGE, STAGE))
            recipe = recipe_for(options, method, more, max_lr=options.lr)
            cpu = trained(model, training.Batches(data, 64, seed), loss_fn, seed, **recipe)
            right = training.correct(student.to(memory_format=torch.channels_last), test)
            yield {"student": "ResNet-8", "method": method, "seed": seed, "right": right, "cpu_s": cpu}


def minilm_runs(options: argparse.Namespace) -> Iterator[Row]:
    teacher, pretrained = models.minilm_finetuned(), models.minilm_classifier()
    train = models.review_batches("train", options.snippets)
    test = models.review_batches(options.split, batch_size=50)
    logits, seconds = answered(teacher, train)
    yield {"student": "teacher", "method": "teacher", "seed": None, "right": training.correct(teacher, test)}
    data = {**train.data, distillation.STORED: logits}
    recipe = {"max_lr": 1e-4, "optimizer": "adamw", "warmup": 0.1}
    methods = [method for method in ("labels", "longer", "answers", "values") if method in options.methods]
    for layers in options.layers:
        names = (VALUES.format(layers - 1), VALUES.format(5))
        first = distillation.shallow(teacher, layers)
        more = steps_for(seconds, first, train, recipe_for(options, "labels", 0, **recipe))
        for seed in range(options.seeds):
            for start in ("random", "pretrained", "teacher's"):
                for method in methods:
                    torch.manual_seed(seed)
                    student = minilm_student(start, layers, teacher, pretrained)
                    batches = training.Batches(data, train.batch_size, seed, train.collate)
                    loss_fn = loss_of(method, teacher, names)
                    cpu = trained(student, batches, loss_fn, seed, **recipe_for(options, method, more, **recipe))
                    name = f"{layers} layers, {start}"
                    right = training.correct(student, test)
                    yield {"student": name, "method": method, "seed": seed, "right": right, "cpu_s": cpu}


def minilm_student(
    start: str,
    layers: int,
    teacher: nn.Module,
    pretrained: nn.Module,
) -> nn.Module:
    """Build a student of `layers` layers: start is "random", "pretrained" or "teacher's"."""
    if start == "pretrained":
        return distillation.shallow(pretrained, layers)
    student = distillation.shallow(teacher, layers)
    return student if start == "teacher's" else type(teacher)(student.config)


def tokens_of(part: str) -> Tensor:
    """Return the token ids of a part of the handbook."""
    tokenizer = models.tokenizer("smollm2")
    return torch.tensor(tokenizer(datasets.handbook(part), verbose=False)["input_ids"])


def smollm2_runs(options: argparse.Namespace) -> Iterator[Row]:
    teacher = models.smollm2()
    test = tokens_of("test")[: 8 * LENGTH].view(8, LENGTH)
    pieces = [{"input_ids": piece} for piece in segments(tokens_of("calibration"), 64, LENGTH, seed=0)]
    prompts = [{"input_ids": piece["input_ids"].view(8, 32)} for piece in pieces]
    change = depth.layer_importance(teacher, pieces[:2], method="cosine", n=6)
    first = int(change.argmin())
    cut = depth.prune_layers(teacher, range(first, first + 6), check=False).model
    recipe = recipe_for(options, "labels", 0, max_lr=2e-4, optimizer="adamw", warmup=0.1)
    losses = {
        "labels": (own_tokens, pieces),
        "answers": (distilling(teacher, alpha=1.0, temperature=1.0), pieces),
        "on policy": (on_policy(teacher, new=32), prompts),
    }
    yield {"student": "teacher", "method": "teacher", "seed": None, "right": next_tokens_right(teacher, test)}
    yield {"student": "SmolLM2, cut", "method": "not healed", "seed": None, "right": next_tokens_right(cut, test)}
    methods = [method for method in losses if method in options.methods]
    for seed in range(options.seeds):
        for method in methods:
            model = copy.deepcopy(cut)
            loss_fn, data = losses[method]
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
            cpu = trained(model, [data[i] for i in order], loss_fn, seed, **recipe)
            right = next_tokens_right(model.eval(), test)
            yield {"student": "SmolLM2", "method": method, "seed": seed, "right": right, "cpu_s": cpu}


@torch.no_grad()
def next_tokens_right(model: nn.Module, texts: Tensor) -> Tensor:
    """Return for each token of texts [N, T] after the first if the model predicts the token: bool [N * (T - 1)]."""
    predictions = []
    for text in texts:
        logits = model(text[None]).logits[0, :-1]
        predictions.append(logits.argmax(-1))
    return torch.cat(predictions) == texts[:, 1:].flatten()


# --- results ----------------------------------------------------------------------------------------------------------


def summary(rows: list[Row], student: str) -> Iterator[str]:
    """Yield a line for each method: accuracy, its gain over the control, CPU seconds."""
    of_student = [row for row in rows if row["student"] == student]
    right = {}  # [seeds, N], by method
    for method in dict.fromkeys(row["method"] for row in of_student):
        right[method] = torch.stack([row["right"] for row in of_student if row["method"] == method])
    for method, answers in right.items():
        accuracy = 100 * float(answers.double().mean())
        line = f"{student:24} {method:10} {accuracy:6.2f} %"
        if method != "labels" and "labels" in right:
            line += gain(answers, right["labels"])
        seconds = [row["cpu_s"] for row in of_student if row["method"] == method and "cpu_s" in row]
        if seconds:
            line += f", {stats.mean_ci(seconds)[0]:.1f} CPU s"
        yield line


def gain(answers: Tensor, control: Tensor) -> str:
    """Return the mean gain over the control in points, with its interval; both are answers [seeds, N]."""
    points = [100 * share for share in stats.accuracy_change_over_seeds(answers, control)]
    return " {:+.2f} [{:+.2f}, {:+.2f}]".format(*points)


RUNS = {"resnet8": resnet_runs, "minilm": minilm_runs, "smollm2": smollm2_runs}


def parsed_options() -> argparse.Namespace:
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
    return parser.parse_args()


def main() -> None:
    options = parsed_options()
    torch.set_num_threads(options.threads)
    rows = []
    for student in options.student:
        for row in RUNS[student](options):
            rows.append(row)
            share = 100 * float(row["right"].double().mean())
            run = f"{row['student']}, {row['method']}, seed {row['seed']}"
            print(f"{run}: {share:.2f} %", flush=True)
        for name in dict.fromkeys(row["student"] for row in rows if row["seed"] is not None):
            print("\n".join(summary(rows, name)), flush=True)
    if options.json:
        counted = [row | {"right": int(row["right"].sum())} for row in rows]
        options.json.write_text(json.dumps(counted, indent=1))


if __name__ == "__main__":
    main()
