"""Does the thing that is deployed still answer as the model did? Decibels, agreement and accuracy, with intervals.

One input is no proof: an engine with 10 dB may give the right class. Agreement hides in easy inputs: a model that is
sure by far agrees with anything. So both are given, and agreement again over those answers that the model is sure of.
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.arguments import check_floats, check_module, check_shapes, check_tensor
from labkit.errors import EqualityError, InputError, check_number
from labkit.graph.tracing import outputs
from labkit.modules import batches as batching
from labkit.quantization import affine
from labkit.timing import stats

SURE = 0.1  # margin of probability between the first class and the second, above which a flip is no toss of a coin


@dataclass(frozen=True)
class Parity:
    """A candidate's answers beside the model's, on the same `examples`. Intervals are of 95 %: (value, low, high).

    max_abs: the largest difference of two scores. sqnr_db: of all scores. agreement: share with the same first class
    (Wilson). sure_agreement: the same over the `sure` answers whose margin in the model is above SURE; None where there
    is none. accuracy: the candidate's, and change: in points, paired with the model's; None without labels.
    """

    examples: int
    max_abs: float
    sqnr_db: float
    agreement: stats.Estimate
    sure: int
    sure_agreement: stats.Estimate | None
    accuracy: float | None
    change: stats.Estimate | None

    def require(self, *, points: float | None = None, db: float | None = None) -> "Parity":
        """Itself, if a loss of more than `points` of accuracy is excluded and the scores have `db` decibels.

        A loss is excluded by the lower end of `change`; without labels, by the share of answers that may differ, since
        no more than these can turn wrong. Raises EqualityError where it is not: also where there are too few examples.
        """
        if points is None and db is None:
            raise InputError("require needs a limit: give points, the accuracy that may be lost, or db, or both.")
        for name, limit in {"points": points, "db": db}.items():
            if limit is not None:
                check_number(limit, name)
        if db is not None and self.sqnr_db < db:
            raise EqualityError(f"The scores are equal to {self.sqnr_db:.1f} dB, and {db:g} dB are required.")
        if points is None:
            return self
        what, (value, low, _) = "change of accuracy", self.change or (0.0, 0.0, 0.0)
        if self.change is None:
            what, (value, low, _) = "share of other answers", tuple(100 * (x - 1) for x in self.agreement)
        if low < -points:
            raise EqualityError(
                f"The {what} is {value:+.2f} points on {self.examples} examples and may be {low:+.2f}, more than "
                f"{points:g}: make it more exact, or give more examples."
            )
        return self


class Reference:
    """What a model answers to batches, asked once: `Reference(model, batches).judge(engine)` for each candidate.

    scores: the first output, its last dimension being the classes, [examples, classes]. labels: [examples], or None
    where the batches have none. Raises InputError without batches, and for fewer than 30 examples with labels, which
    are too few for an interval of the change of accuracy.
    """

    def __init__(self, model: nn.Module, batches: Iterable) -> None:
        check_module(model)
        batches = list(batching.not_empty(batching.check_batches(batches, "parity")))
        targets = [batching.split(model, batch)[2] for batch in batches]
        self.inputs = [batching.inputs(model, batch) for batch in batches]
        if any(isinstance(x, tuple) for named in self.inputs for x in named.values()):
            raise InputError(f"The inputs of {type(model).__name__} have no names: give dicts, or the model inside it.")
        self.labels = None if any(x is None for x in targets) else _joined(targets)
        self.scores = self._scores(model)

    def judge(self, candidate: Callable[..., Any]) -> Parity:
        """What `candidate`, an `Engine` or a module, answers to the same batches, beside the model's answers."""
        if not callable(candidate):
            raise InputError(f"candidate is a {type(candidate).__name__}, but it must be an engine or a module.")
        return compare_scores(self.scores, self._scores(candidate), self.labels)

    @torch.no_grad()
    def _scores(self, call: Callable[..., Any]) -> Tensor:
        with batching.evaluating(call) if isinstance(call, nn.Module) else contextlib.nullcontext():
            return torch.cat([_first(call(**named)) for named in self.inputs])


def _first(answer: Any) -> Tensor:
    """The scores [examples, classes] of an answer: its first tensor."""
    tensors = outputs(answer)
    if not tensors or tensors[0].dim() < 2:
        raise InputError("Parity compares scores [examples, classes], but no such tensor came back: give a classifier.")
    return tensors[0].float().flatten(0, -2)


def _joined(targets: list[Any]) -> Tensor:
    for target in targets:
        check_tensor(target, "A batch's labels")
    labels = torch.cat([target.flatten() for target in targets])
    _check_enough(len(labels))
    return labels


def _check_enough(examples: int) -> None:
    if examples < stats.LEAST_PAIRS:
        raise InputError(
            f"{examples} examples with labels are too few to judge a change of accuracy, which takes "
            f"{stats.LEAST_PAIRS} or more: give more examples, or leave the labels out to compare scores and answers."
        )


def compare_scores(reference: Tensor, scores: Tensor, labels: Tensor | None = None) -> Parity:
    """Parity from scores that are there already, both [examples, classes], and labels [examples].

    InputError for other shapes, and for fewer than 30 examples with labels.
    """
    check_floats(reference, "reference")
    check_floats(scores, "scores")
    check_shapes(reference=(reference, "examples classes"), scores=(scores, "examples classes"))
    if reference.shape[1] < 2:
        raise InputError("Parity compares the first class of two or more, and these scores have one: use affine.sqnr.")
    if labels is not None:
        check_tensor(labels, "labels")
        check_shapes(reference=(reference, "examples classes"), labels=(labels, "examples"))
        _check_enough(len(labels))
    answers, n = reference.argmax(1), len(reference)
    same = scores.argmax(1) == answers
    first, second = reference.softmax(1).topk(2, 1).values.unbind(1)
    sure = first - second > SURE
    accuracy = change = None
    if labels is not None:
        right = [(x.argmax(1) == labels).double().tolist() for x in (scores, reference)]
        accuracy = math.fsum(right[0]) / n
        change = tuple(100 * x for x in stats.paired_difference(*right))
    return Parity(
        examples=n,
        max_abs=float((reference - scores).abs().max()),
        sqnr_db=affine.sqnr(reference, scores),
        agreement=stats.wilson(int(same.sum()), n),
        sure=int(sure.sum()),
        sure_agreement=stats.wilson(int(same[sure].sum()), int(sure.sum())) if sure.any() else None,
        accuracy=accuracy,
        change=change,
    )
