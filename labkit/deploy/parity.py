"""Parity: decibels, agreement and accuracy of a deployed model beside the model's own answers, with intervals.

One input is no proof: an engine with 10 dB may give the right class. Agreement is cheap on easy inputs, where the model
is sure by far. So decibels and agreement are reported, and the agreement over the model's sure answers again.

`Parity.require` is a test of non-inferiority: a candidate passes if the exact interval excludes a larger loss than is
allowed. Of all candidates that lose exactly the limit, at most 2.5 % pass, whatever the number of examples.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.arguments import check_floats, check_module, check_shapes, check_tensor
from labkit.errors import EqualityError, InputError, check_number
from labkit.modules import batches as batching
from labkit.modules.returned import outputs
from labkit.quantization import affine
from labkit.timing.paired import accuracy_change
from labkit.timing.quality_stats import clopper_pearson
from labkit.timing.stats import Estimate

SURE = 0.1  # margin of probability between the first class and the second, above which a flip is no toss of a coin


@dataclass(frozen=True)
class Parity:
    """A candidate's answers beside the model's, on the same `examples`.

    Intervals are exact, of 95 % with 2.5 % beyond each end: (value, low, high).

    max_abs: largest difference of two scores.
    sqnr_db: signal over noise of all scores, in decibels.
    agreement: share of examples with the same first class (Clopper-Pearson interval).
    sure: number of examples with a margin above SURE in the model's answer.
    sure_agreement: agreement over the sure examples; None without a sure example.
    accuracy: the candidate's; None without labels.
    change: change of accuracy in points, paired with the model's (`paired.accuracy_change`); None without labels.
    """

    examples: int
    max_abs: float
    sqnr_db: float
    agreement: Estimate
    sure: int
    sure_agreement: Estimate | None
    accuracy: float | None
    change: Estimate | None

    def require(self, *, points: float | None = None, db: float | None = None) -> "Parity":
        """Return this parity if the candidate passes, or raise EqualityError.

        points: accuracy that may be lost; a larger loss must be excluded by the lower end of `change`. Without labels,
            by the share of differing answers, since no more answers can turn wrong.
        db: decibels that the scores must reach.
        A candidate fails if the whole interval of `change` is below the limit. If it neither passes nor fails, the
        examples are too few to decide; the error then says so. Raises InputError without a limit.
        """
        if points is None and db is None:
            raise InputError("require needs a limit: give points, the accuracy that may be lost, or db, or both.")
        for name, limit in {"points": points, "db": db}.items():
            if limit is not None:
                check_number(limit, name)
        if db is not None and self.sqnr_db < db:
            raise EqualityError(f"The scores are equal to {self.sqnr_db:.1f} dB, and {db:g} dB are required.")
        if points is not None:
            self._require_points(points)
        return self

    def _require_points(self, points: float) -> None:
        if self.change is not None:
            quantity, more = "change of accuracy", "more examples"
            value, low, high = self.change
        else:
            quantity, more = "share of other answers", "labels, or more examples"
            value, low, high = (100 * (share - 1) for share in self.agreement)
        if low >= -points:
            return
        interval = f"{low:+.2f} to {high:+.2f}"
        observed = f"The {quantity} is {value:+.2f} points on {self.examples} examples ({interval})"
        is_loss_shown = self.change is not None and high < -points
        if is_loss_shown:
            raise EqualityError(f"{observed}, and {points:g} may be lost: the candidate fails; make it more exact.")
        raise EqualityError(
            f"{observed}, so it is not decided if more than {points:g} is lost: give {more}, or make the candidate "
            "more exact."
        )


class Reference:
    """A model's answers to batches, asked once: `Reference(model, batches).judge(engine)` for each candidate.

    scores: first output of the model, [examples, classes]; the last dimension are the classes.
    labels: class numbers [examples], or None for batches without labels.
    Raises InputError without batches.
    """

    def __init__(self, model: nn.Module, batches: Iterable) -> None:
        check_module(model)
        batches = list(batching.not_empty(batching.check_batches(batches, "parity")))
        self.inputs = [batching.inputs(model, batch) for batch in batches]
        for named in self.inputs:
            if any(isinstance(x, tuple) for x in named.values()):
                name = type(model).__name__
                raise InputError(f"The inputs of {name} have no names: give dicts, or the model inside it.")
        targets = [batching.split(model, batch)[2] for batch in batches]
        self.labels = None
        if all(target is not None for target in targets):
            self.labels = _joined(targets)
        self.scores = self._scores(model)

    def judge(self, candidate: Callable[..., Any]) -> Parity:
        """Ask `candidate`, an `Engine` or a module, the same batches, and compare the answers with the model's."""
        if not callable(candidate):
            raise InputError(f"candidate is a {type(candidate).__name__}, but it must be an engine or a module.")
        return compare_scores(self.scores, self._scores(candidate), self.labels)

    @torch.no_grad()
    def _scores(self, call: Callable[..., Any]) -> Tensor:
        with batching.evaluating(call) if isinstance(call, nn.Module) else contextlib.nullcontext():
            return torch.cat([_first(call(**named)) for named in self.inputs])


def _first(answer: Any) -> Tensor:
    """Return the scores [examples, classes] of an answer: its first tensor."""
    tensors = outputs(answer)
    if not tensors or tensors[0].dim() < 2:
        raise InputError("Parity compares scores [examples, classes], but no such tensor came back: give a classifier.")
    return tensors[0].float().flatten(0, -2)


def _joined(targets: list[Any]) -> Tensor:
    for target in targets:
        check_tensor(target, "A batch's labels")
    return torch.cat([target.flatten() for target in targets])


def compare_scores(reference: Tensor, scores: Tensor, labels: Tensor | None = None) -> Parity:
    """Compare a candidate's scores with the model's, both [examples, classes].

    labels: class numbers [examples]; None leaves accuracy out.

    Raises InputError for wrong shapes.
    """
    check_floats(reference, "reference")
    check_floats(scores, "scores")
    check_shapes(reference=(reference, "examples classes"), scores=(scores, "examples classes"))
    if reference.shape[1] < 2:
        raise InputError("Parity compares the first class of two or more, and these scores have one: use affine.sqnr.")
    if labels is not None:
        check_tensor(labels, "labels")
        check_shapes(reference=(reference, "examples classes"), labels=(labels, "examples"))
    is_same = scores.argmax(1) == reference.argmax(1)
    first, second = reference.softmax(1).topk(2, 1).values.unbind(1)
    is_sure = first - second > SURE
    sure_agreement = None
    if is_sure.any():
        sure_agreement = _agreement(is_same[is_sure])
    accuracy = change = None
    if labels is not None:
        accuracy, change = _change_of_accuracy(reference, scores, labels)
    return Parity(
        examples=len(reference),
        max_abs=float((reference - scores).abs().max()),
        sqnr_db=affine.sqnr(reference, scores),
        agreement=_agreement(is_same),
        sure=int(is_sure.sum()),
        sure_agreement=sure_agreement,
        accuracy=accuracy,
        change=change,
    )


def _agreement(is_same: Tensor) -> Estimate:
    return clopper_pearson(int(is_same.sum()), len(is_same))


def _change_of_accuracy(reference: Tensor, scores: Tensor, labels: Tensor) -> tuple[float, Estimate]:
    """Return the accuracy of `scores`, and the change in points from the accuracy of `reference`, paired."""
    right = (scores.argmax(1) == labels).cpu()
    right_before = (reference.argmax(1) == labels).cpu()
    accuracy = int(right.sum()) / len(right)
    change = accuracy_change(right, right_before)
    return accuracy, tuple(100 * share for share in change)
