"""Knowledge distillation: losses on a teacher's answers, features and relations; healing with a teacher or without.

Hinton, Vinyals and Dean 2015 (Distilling the Knowledge in a Neural Network) and what came after it, each with its
source. A loss is a function of two tensors; `distilling` and `matching` make of it a loss_fn for `training.train_`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labkit.arguments import check_floats, check_module, check_tensor
from labkit.attention import speculative
from labkit.attention.decoder import Decoder
from labkit.data.training import Batch, History, task_loss, train_
from labkit.errors import InputError, check_number, check_whole
from labkit.modules.batches import IGNORED, evaluating, labelled, predicts_next, split
from labkit.modules.hooks import watching
from labkit.modules.losses import cross_entropy
from labkit.modules.stacks import layers_of
from labkit.pruning import depth

LossFn = Callable[[nn.Module, Batch], Tensor]
STORED = "teacher_logits"  # the name of a teacher's stored answers in a batch that is a dict

# --- answers ----------------------------------------------------------------------------------------------------------


def distillation_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 2.0, beta: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """T^2 D(p, q), mean over the predictions, a scalar, with p and q the softmax of teacher / T and student / T.

    student, teacher: logits [..., classes]. mask: [...], predictions where it is 0 are left out (padding). T^2 keeps
    the size of the gradient as T rises. The teacher gets no gradient.
    A class that has no probability on either side (both logits are -inf) adds nothing; where the right value is
        infinite, as of a class that the teacher takes and the student excludes, the loss is infinite.
    beta: 0 is the forward divergence KL(p || q) (Hinton et al. 2015), 1 the reverse one KL(q || p), and what lies
        between is the generalised Jensen-Shannon divergence (Agarwal et al. 2024, GKD, equation 1):
        beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. Near its ends it falls to 0.
    """
    check_floats(student, "student")
    check_floats(teacher, "teacher")
    if student.shape != teacher.shape or not student.dim():
        raise InputError(
            f"student has logits of shape {list(student.shape)}, teacher {list(teacher.shape)}: both need the same "
            "vocabulary or set of classes, and the same batch."
        )
    check_number(temperature, "temperature", above=0)
    check_number(beta, "beta", 0, 1)
    _check_mask(mask, student.shape[:-1])
    log_q = F.log_softmax(_precise(student) / temperature, -1)  # [..., classes]
    log_p = F.log_softmax(_precise(teacher.detach()) / temperature, -1)
    if beta == 0:
        each = _kl(log_p, log_q)
    elif beta == 1:
        each = _kl(log_q, log_p)
    else:
        nowhere = log_p.isneginf() & log_q.isneginf()  # where the sum of two -inf has no gradient
        p, q = log_p.masked_fill(nowhere, 0), log_q.masked_fill(nowhere, 0)
        log_m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
        each = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return temperature**2 * _mean(each, mask)


class TopK(NamedTuple):
    """What is stored of a teacher's distribution: its k likeliest classes and their log-probabilities."""

    ids: Tensor  # [..., k] int32
    log_p: Tensor  # [..., k] float16


def top_k(logits: Tensor, k: int) -> TopK:
    """The k likeliest of the classes of `logits` [..., classes] at temperature 1: 6 k bytes for a prediction."""
    check_floats(logits, "logits")
    classes = logits.shape[-1] if logits.dim() else 1
    if classes < 2:
        raise InputError(f"logits have shape {list(logits.shape)}: give [..., classes] with two classes or more.")
    check_whole(k, "k", most=classes - 1)
    log_p, ids = F.log_softmax(_precise(logits.detach()), -1).topk(k)
    return TopK(ids.int(), log_p.half())


def top_k_loss(student: Tensor, answers: TopK) -> Tensor:
    """KL(p || q) over k + 1 bins, mean over the predictions, a scalar: the teacher's k classes, and all others as one.

    student: logits [..., classes], as those that `top_k` took the answers from.
    The last bin, the tail, says how much is left for the other classes, not for which. Without it, with the k
    probabilities scaled to a sum of 1, the student learns that nothing else is possible. Temperature 1 only: another
    one would change the tail by what was not stored.
    """
    check_floats(student, "student")
    if not isinstance(answers, TopK):
        raise InputError(f"answers is a {type(answers).__name__}, but it must be what top_k gives for the teacher.")
    # a GPU would have to be waited for, and refuses such ids by itself
    unknown = answers.ids.device.type == "cpu" and int(answers.ids.max()) >= student.shape[-1]
    if student.shape[:-1] != answers.ids.shape[:-1] or unknown:
        raise InputError(
            f"student has logits of shape {list(student.shape)}, the stored answers {list(answers.ids.shape)}: both "
            "need the same predictions in the same order, and the same classes."
        )
    log_q = F.log_softmax(_precise(student), -1)  # [..., classes]
    ids, log_p = answers.ids.long(), answers.log_p.to(log_q)  # [..., k]
    p_tail = (1 - log_p.exp().sum(-1)).clamp_min(0)  # rounded to 16 bits a sum may exceed 1
    rest = log_q.scatter(-1, ids, -math.inf)
    empty = rest.isneginf().all(-1)  # the student leaves nothing for the tail, [...]
    log_q_tail = rest.masked_fill(empty[..., None], 0).logsumexp(-1).masked_fill(empty, -math.inf)
    rounded = p_tail <= ids.shape[-1] * 2**-12  # no more than 16 bits of each log-probability make
    head = _kl(log_p, log_q.gather(-1, ids))
    tail = torch.xlogy(p_tail, p_tail) - p_tail * log_q_tail
    return (head + tail.masked_fill(empty & rounded, 0)).mean()


# --- features and relations -------------------------------------------------------------------------------------------


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of two attention maps, mean over the images, a scalar (Zagoruyko and Komodakis 2017, eq. 2).

    student, teacher: features [N, channels, H, W]; the numbers of channels may differ. A map is the sum over the
    channels of the squares, scaled to length 1; the distance is squared as in the authors' code.
    """
    check_floats(student, "student")
    check_floats(teacher, "teacher")
    maps = student.dim() == teacher.dim() == 4
    if not maps or (len(student), *student.shape[2:]) != (len(teacher), *teacher.shape[2:]):
        raise InputError(
            f"Features of shapes {list(student.shape)} and {list(teacher.shape)} have no attention maps of one size: "
            "match layers [N, channels, H, W] of the same height and width."
        )
    s, t = (F.normalize(_precise(x).square().sum(1).flatten(1), dim=1) for x in (student, teacher.detach()))
    return (s - t).square().sum(1).mean()


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber's loss of the distances between examples, mean over the pairs, a scalar (Park et al. 2019, RKD, eq. 4-6).

    student, teacher: one feature an example, [N, ...], N from 2 up; their widths may differ. Distances are divided by
    their mean over the pairs of different examples.
    """
    check_floats(student, "student")
    check_floats(teacher, "teacher")
    if not student.dim() or not teacher.dim() or len(student) != len(teacher) or len(student) < 2:
        raise InputError(
            f"Distances between examples need the same two or more on both sides, not {list(student.shape)} and "
            f"{list(teacher.shape)}: use batches of at least two."
        )
    s, t = (F.pdist(_precise(x).flatten(1)) for x in (student, teacher.detach()))  # [N (N - 1) / 2]
    tiny = torch.finfo(s.dtype).tiny
    return F.smooth_l1_loss(s / s.mean().clamp_min(tiny), t / t.mean().clamp_min(tiny))


def value_relations(student: Tensor, teacher: Tensor, *, heads: int, mask: Tensor | None = None) -> Tensor:
    """KL of how alike a text's values are, mean over heads and tokens, a scalar (Wang et al. 2020, MiniLM, eq. 8-10).

    student, teacher: values of a layer [B, T, width]; the widths may differ, and are cut into `heads` relation heads
    (Wang et al. 2021, MiniLMv2). A relation is softmax(V V^T / sqrt(width / heads)) [B, heads, T, T].
    mask: [B, T], tokens where it is 0 are left out.
    """
    check_floats(student, "student")
    check_floats(teacher, "teacher")
    check_whole(heads, "heads")
    if student.dim() != 3 or teacher.dim() != 3 or student.shape[:2] != teacher.shape[:2]:
        raise InputError(
            f"Values of shapes {list(student.shape)} and {list(teacher.shape)} are not of the same texts: give "
            "[B, T, width] with the same B and T."
        )
    _check_mask(mask, student.shape[:2])
    mask = torch.ones(student.shape[:2], device=student.device) if mask is None else mask
    log_q, log_p = (_relation(x, heads, mask) for x in (student, teacher.detach()))
    each = torch.where(mask[:, None, None, :] != 0, log_p.exp() * (log_p - log_q), 0).sum(-1)  # [B, heads, T]
    return _mean(each, mask[:, None, :].expand_as(each))


def _relation(values: Tensor, heads: int, mask: Tensor) -> Tensor:
    if values.shape[-1] % heads:
        raise InputError(f"{values.shape[-1]} channels cannot be cut into {heads} heads: give a divisor.")
    v = _precise(values).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, T, width / heads]
    alike = _precise(v @ v.mT) / math.sqrt(v.shape[-1])  # [B, heads, T, T]
    return alike.masked_fill(mask[:, None, None, :] == 0, torch.finfo(alike.dtype).min).log_softmax(-1)


class WithProjectors(nn.Module):
    """A student and what brings its features to the teacher's width, trained together (Romero et al. 2015, FitNets).

    projectors: {name of the student's module: what its result goes through}. Called like the student.
    """

    def __init__(self, student: nn.Module, projectors: Mapping[str, nn.Module]) -> None:
        super().__init__()
        check_module(student, "student")
        if not isinstance(projectors, Mapping):
            raise InputError("projectors must be a dict from the name of a student's module to a torch.nn.Module.")
        for name, projector in projectors.items():
            check_module(projector, f"the projector of {name!r}")
        self.student, self.projectors = student, nn.ModuleDict(projectors)

    def forward(self, *args, **kwargs):
        return self.student(*args, **kwargs)


# --- a loss_fn for training -------------------------------------------------------------------------------------------


def distilling(teacher: nn.Module | None, *, alpha: float, temperature: float, beta: float = 0.0) -> LossFn:
    """A loss_fn for `training.train_`: alpha * distillation + (1 - alpha) * task loss; alpha 1 needs no labels.

    teacher: in eval mode; it is run without gradients on the batch's device. None: the batches hold its logits, as the
        last of (inputs, labels, logits) or under "teacher_logits".
    temperature, beta: as in `distillation_loss`. Tokens that are no label (padding, a prompt) are not distilled either.
    """
    check_number(alpha, "alpha", 0, 1)
    check_number(temperature, "temperature", above=0)
    check_number(beta, "beta", 0, 1)
    _check_eval(teacher)
    options = {"temperature": temperature, "beta": beta}

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        _check_apart(teacher, model)
        batch, stored = _without_stored(batch, is_last=teacher is None)
        targets = _answers(teacher, batch) if teacher is not None else stored
        args, kwargs, labels = split(model, labelled(model, batch))
        if alpha == 1:
            kwargs.pop("labels", None)
        output = model(*args, **kwargs)
        logits, hard = getattr(output, "logits", output), getattr(output, "loss", None)
        mask = _predicted(model, logits, labels, kwargs.get("attention_mask"))
        soft = distillation_loss(logits, targets, mask=mask, **options)
        if alpha == 1:
            return soft
        if hard is None and labels is not None:
            hard = cross_entropy(logits, labels)
        if hard is None:
            raise InputError("The task loss needs labels, and the batch has none: give labels, or alpha=1 without it.")
        return alpha * soft + (1 - alpha) * hard

    return loss_fn


def _without_stored(batch: Batch, *, is_last: bool) -> tuple[Batch, Tensor | None]:
    """The batch as it is without a teacher's stored answers, and these; in a tuple they are the last of three."""
    if isinstance(batch, Mapping):
        stored, rest = batch.get(STORED), {name: x for name, x in batch.items() if name != STORED}
    elif is_last and isinstance(batch, tuple) and len(batch) > 2:
        stored, rest = batch[-1], batch[:-1]
    else:
        stored, rest = None, batch
    if is_last and stored is None:
        raise InputError(
            f"Without a teacher each batch needs its logits: give (inputs, labels, logits), or a dict with {STORED!r}."
        )
    return rest, stored


def on_policy(teacher: nn.Module, *, new: int) -> LossFn:
    """A loss_fn for `training.train_`: the student continues each prompt, the teacher judges every token that it wrote.

    The reverse divergence KL(q || p) of `distillation_loss` at temperature 1, mean over the new tokens. These are drawn
    anew for each batch, at temperature 1 from torch's generator, and no gradient goes through the drawing (Agarwal et
    al. 2024, GKD, algorithm 1 with lambda = 1): a student sees its own mistakes, which no corpus holds.
    teacher: in eval mode, with the student's tokenizer. The student is a LlamaForCausalLM. new: tokens for each prompt;
        batches: {"input_ids": prompts [B, T] of one length, without padding}.
    """
    check_module(teacher, "teacher")
    _check_eval(teacher)
    check_whole(new, "new")

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        _check_apart(teacher, model)
        prompts = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(prompts, Tensor) or prompts.dim() != 2:
            raise InputError('on_policy takes batches {"input_ids": prompts}, token ids [B, T] of one length.')
        draw = partial(speculative.generate, Decoder(model), k=0, max_new_tokens=new, temperature=1.0)
        with torch.autocast(prompts.device.type, enabled=False):
            seeds = torch.randint(2**31, prompts.shape[:1]).tolist()
            ids = torch.stack([draw(prompt, seed=seed).ids for prompt, seed in zip(prompts, seeds, strict=True)])
        written = slice(prompts.shape[1] - 1, -1)  # of ids [B, T + new]: the positions whose next tokens are new
        answers = _answers(teacher, {"input_ids": ids})[:, written]
        return distillation_loss(model(input_ids=ids).logits[:, written], answers, temperature=1.0, beta=1.0)

    return loss_fn


def matching(
    teacher: nn.Module,
    pairs: Mapping[str, str],
    distance: Callable[..., Tensor],
    *,
    weight: float,
    loss_fn: LossFn = task_loss,
) -> LossFn:
    """A loss_fn for `training.train_`: `loss_fn` and weight * the sum of the distances of matched results.

    pairs: {the student's module: the teacher's}. distance: a function of the two results, which also gets the `mask`
        [B, T] of a batch with an attention mask. A `WithProjectors` projects the student's first.
    """
    check_module(teacher, "teacher")
    _check_eval(teacher)
    if not isinstance(pairs, Mapping) or not pairs:
        raise InputError("pairs must be a dict, not empty, from the student's modules to the teacher's, by name.")
    with watching(teacher, pairs.values(), lambda *_: None):  # a wrong name is refused before any work
        pass
    check_number(weight, "weight", 0)
    for name, function in {"distance": distance, "loss_fn": loss_fn}.items():
        if not callable(function):
            raise InputError(f"{name} is {function!r}, but it must be a function.")

    def matched(model: nn.Module, batch: Batch) -> Tensor:
        _check_apart(teacher, model)
        student, projectors = (model.student, model.projectors) if isinstance(model, WithProjectors) else (model, {})
        features: dict[str, Tensor] = {}
        targets: dict[str, Tensor] = {}
        calls: list[tuple[tuple, dict]] = []
        with (
            student.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True),
            watching(student, pairs, lambda name, _, result: features.update({name: result})),
            watching(teacher, pairs.values(), lambda name, _, result: targets.update({name: result})),
        ):
            loss = loss_fn(model, batch)  # it may have run the teacher
            if calls and not targets:
                _run(teacher, *calls[0])
        masked = isinstance(batch, Mapping) and "attention_mask" in batch
        options = {"mask": batch["attention_mask"]} if masked else {}
        for name, target in pairs.items():
            feature, goal = _result(features, name, "student"), _result(targets, target, "teacher")
            if name in projectors:
                feature = projectors[name](feature)
            loss = loss + weight * distance(feature, goal, **options)
        return loss

    return matched


def _result(results: Mapping[str, Tensor], name: str, whose: str) -> Tensor:
    """The result of a module in this call; InputError where it was not run or gave no tensor."""
    if not isinstance(results.get(name), Tensor):
        gave = f"gave a {type(results[name]).__name__}" if name in results else "was not run"
        raise InputError(f"The {whose}'s module {name!r} {gave}: match modules that give a tensor at every call.")
    return results[name]


def _answers(teacher: nn.Module, batch: Batch) -> Tensor:
    """The teacher's logits for a batch."""
    args, kwargs, _ = split(teacher, batch)
    output = _run(teacher, args, kwargs)
    return getattr(output, "logits", output)


def _run(teacher: nn.Module, args: tuple, kwargs: Mapping[str, Tensor]) -> Any:
    """What the teacher gives for these arguments, the labels left out."""
    with torch.no_grad(), evaluating(teacher):
        return teacher(*args, **{name: x for name, x in kwargs.items() if name != "labels"})


def _predicted(model: nn.Module, logits: Tensor, labels: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Which of the predictions count, [B, T]: those with a label; at position t of a decoder that is token t + 1."""
    if not isinstance(logits, Tensor) or logits.ndim < 3:
        return None
    if labels is None:
        return padding
    counts = labels != IGNORED
    return F.pad(counts[:, 1:], (0, 1)) if predicts_next(model) else counts


def _check_mask(mask: Tensor | None, shape: torch.Size) -> None:
    if mask is None:
        return
    check_tensor(mask, "mask")
    if mask.shape != shape:
        raise InputError(f"mask has shape {list(mask.shape)}, but it must have {list(shape)}: a number a prediction.")


def _check_eval(teacher: nn.Module | None) -> None:
    if teacher is not None:
        check_module(teacher, "teacher")
    if teacher is not None and teacher.training:
        raise InputError(
            "The teacher is in train mode, where dropout and the batch's statistics change its answers: call "
            "teacher.eval() first."
        )


def _check_apart(teacher: nn.Module | None, model: nn.Module) -> None:
    trained = {id(x) for x in model.parameters() if x.requires_grad}
    if teacher is not None and any(id(x) in trained for x in teacher.parameters()):
        raise InputError("The student trains parameters of its teacher: make the student from a copy of the teacher.")


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [..., classes]: [...], in nats; a class with p = 0 adds 0, as in the limit."""
    excluded = log_p.isneginf()
    log_p, log_q = log_p.masked_fill(excluded, 0), log_q.masked_fill(excluded, 0)  # before the gradient sees -inf
    return (log_p.exp() * (log_p - log_q)).masked_fill(excluded, 0).sum(-1)


def _mean(each: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the predictions [...] that count; 0 where none does."""
    if mask is None:
        return each.mean()
    mask = mask.to(each)
    return torch.where(mask != 0, each * mask, 0).sum() / mask.sum().clamp_min(1)


# --- students ---------------------------------------------------------------------------------------------------------


def shallow(teacher: nn.Module, layers: int) -> nn.Module:
    """A student of `layers` of the teacher's own layers, evenly spaced, the first and the last among them.

    DistilBERT starts so, from every second layer (Sanh et al. 2019, section 3). A copy; the teacher stays as it was.
    """
    total = len(layers_of(teacher))
    check_whole(layers, "layers", most=total - 1)
    stays = {round(i * (total - 1) / max(layers - 1, 1)) for i in range(layers)}
    return depth.prune_layers(teacher, [i for i in range(total) if i not in stays], check=False).model


def heal_(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    teacher: nn.Module | None = None,
    max_lr: float,
    steps: int,
    seed: int = 0,
) -> History:
    """Fine-tune `model` in place for `steps` batches after pruning: AdamW, one cycle with a tenth of warm-up.

    batches: dicts with labels, or (inputs, labels); a decoder without labels predicts its own tokens. Of a tuple for a
        transformers model the last item is bound to `labels` where it cannot be anything else: one label an example
        [B], or what stands at that place of `forward`, such as (pixel_values, labels). Labels of tokens [B, T] need a
        dict, for the second of (input_ids, x) stands at the place of the mask: InputError, unless x is a mask, of
        zeros and ones. See `batches.split`.
    teacher: the dense model; half of the loss is then the distance to its answers at temperature 2 (`distilling`).
    seed: of dropout; torch's random state is afterwards as before.
    Raises InputError as `training.train_` does, which also says what becomes of the model.
    """
    check_module(model)
    check_whole(steps, "steps")
    check_whole(seed, "seed", 0)

    def task(model: nn.Module, batch: Batch) -> Tensor:
        return task_loss(model, labelled(model, batch))

    passes = {"epochs": steps, "steps": steps}  # as many over the batches as the steps need
    recipe = {"max_lr": max_lr, "optimizer": "adamw", "weight_decay": 0.01, "warmup": 0.1}
    loss_fn = distilling(teacher, alpha=0.5, temperature=2.0) if teacher is not None else task
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return train_(model, batches, **passes, **recipe, loss_fn=loss_fn)
