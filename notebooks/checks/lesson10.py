"""Checks of lesson 10: a loss on soft answers, what is wrong with a loss, own texts.

Values and gradients are compared with float64 computed step by step; what must not matter, such as padding, is changed.
The diagnosis is asked about losses that nobody has shown it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.lesson.failures import Failures, diagnoses


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _scalar(answer: object, failures: Failures) -> Tensor:
    failures.need(isinstance(answer, Tensor) and answer.numel() == 1, "return one number as a tensor, the mean")
    return answer.reshape(())


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of probabilities [..., classes] that are all positive: [...]."""
    return (p * (p.log() - q.log())).sum(-1)


# ----------------------------------------------------------------------------------------------------- soft answers

MASKS = {  # shape of the logits -> which predictions count
    (4, 6): None,
    (2, 5, 7): None,
    (3, 4, 5): torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]),
    (3, 6): torch.tensor([True, False, True]),
}


def soft_answers(fn: Callable, failures: Failures) -> None:
    """kd_loss(student, teacher, temperature, mask) -> T^2 KL(p || q), mean over what counts."""
    for shape, mask in MASKS.items():
        for T in (1.0, 2.0, 5.0):
            with failures.given(logits=list(shape), temperature=T, mask="none" if mask is None else "some"):
                student, teacher = _normal(*shape).requires_grad_(), (2 * _normal(*shape, seed=1)).requires_grad_()
                loss = _scalar(fn(student, teacher, T, mask), failures)
                counts = torch.ones(shape[:-1], dtype=torch.bool) if mask is None else mask.bool()
                p, q = ((x.detach() / T).softmax(-1) for x in (teacher, student))
                failures.close(
                    loss,
                    T * T * _divergence(p, q)[counts].mean(),
                    "the value is off; look at T^2, at what is softened, at which comes first in KL(p || q), at the "
                    "sum over classes and at the mean over the predictions that count",
                    rtol=1e-5,
                )
                failures.need(loss.requires_grad, "no gradient reaches the student: do not detach its logits")
                grads = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
                failures.expect(grads[1] is None, "a gradient reaches the teacher: detach its logits")
                rows = T * (q - p) * counts[..., None] / counts.sum()
                failures.close(
                    grads[0], rows, "the gradient is off: it is T (q - p) over the number of predictions", atol=1e-7
                )
    student = _normal(3, 4, 5)
    teacher = _normal(3, 4, 5, seed=1)
    mask = MASKS[3, 4, 5]
    with failures.given(padding="other numbers"):
        other = student.masked_fill(mask[..., None] == 0, 50)
        failures.close(
            fn(other, teacher, 2.0, mask), fn(student, teacher, 2.0, mask), "what is masked changes the value"
        )
    with failures.given(student="the teacher"):
        failures.close(fn(teacher, teacher, 2.0, None), 0.0, "equal logits have a loss that is not 0", atol=1e-9)
    with failures.given(logits="a thousand times as large"):
        answer = _scalar(fn(1000 * student, 1000 * teacher, 1.0, None), failures)
        failures.need(answer.isfinite(), "confident logits give NaN or infinity: use log_softmax")
        log_q, log_p = (1000 * student).log_softmax(-1), (1000 * teacher).log_softmax(-1)
        failures.close(
            answer,
            (log_p.exp() * (log_p - log_q)).sum(-1).mean(),
            "confident logits get another value: probabilities round to 0, so take the logarithms from log_softmax",
            rtol=1e-5,
        )


# -------------------------------------------------------------------------------------------------------- diagnoses


def _spelled(kind: str, style: int) -> Callable[[Tensor, Tensor, float], Tensor]:
    """A loss of logits [B, S, V] with this fault, written in one of three ways."""

    def loss(student: Tensor, teacher: Tensor, T: float) -> Tensor:
        hard = 1.0 if kind == "teacher not softened" else T
        log_q = F.log_softmax(student / T, -1)
        log_p = F.log_softmax(teacher / hard, -1)
        if kind == "swapped":
            log_p, log_q = log_q, log_p
        if kind == "probabilities":
            log_q = log_q.exp()
        each = log_p.exp() * (log_p - log_q)  # [B, S, V]
        if style == 1:
            each = F.kl_div(log_q, log_p.exp(), reduction="none")
        if style == 2:
            each = torch.special.xlogy(log_p.exp(), log_p.exp()) - log_p.exp() * log_q
        scale = 1.0 if kind == "no T^2" else T * T
        if kind == "mean over classes":
            return scale * each.mean()
        if kind == "sum over positions":
            return scale * each.sum() / len(each)
        return scale * each.sum(-1).mean()

    return loss


FAULTS = (
    "right", "no T^2", "mean over classes", "sum over positions", "swapped", "teacher not softened", "probabilities",
)  # fmt: skip


def diagnosis(fn: Callable, failures: Failures) -> None:
    """diagnose(loss) -> the name of its fault, or "right"."""
    message = (
        "a loss got another name than that of its fault; probe with unequal logits, with T other than 1, and with "
        "batch, positions and classes of different sizes"
    )
    diagnoses(fn, failures, FAULTS, lambda *fault: (_spelled(*fault),), message)


# --------------------------------------------------------------------------------------------------------- own text

END = 3
WRITTEN = {  # what the texts are like -> (prompt, tokens after the prompt; a prompt is made of END alone)
    "no end": (2, [[0, 1, 2, 0], [4, 4, 1, 0]]),
    "ends within": (3, [[0, END, 1, 1, 1], [2, 1, 0, END, END], [END, 1, 2, END, 0]]),
    "one token of prompt": (1, [[1, 2, END, END], [0, 0, 0, 0]]),
    "the end is the last": (4, [[1, 0, END]]),
}


def own_text(fn: Callable, failures: Failures) -> None:
    """own_text_kd(student, teacher, ids, prompt, end) -> KL(q || p), mean over the tokens that the student wrote."""
    for kind, (prompt, rows) in WRITTEN.items():
        with failures.given(texts=kind, prompt=prompt):
            ids = torch.cat([torch.full((len(rows), prompt), END), torch.tensor(rows)], 1)
            student = _normal(*ids.shape, 5).requires_grad_()
            teacher = (2 * _normal(*ids.shape, 5, seed=1)).requires_grad_()
            reference = student.detach().requires_grad_()
            expected = _own_text_by_hand(reference, teacher.detach(), ids, prompt)
            loss = _scalar(fn(student, teacher, ids, prompt, END), failures)
            failures.close(
                loss,
                expected,
                "the value is off; look at which logits are about written tokens (those at t are about t + 1), at "
                "KL(q || p) instead of KL(p || q), at the first written end, which counts, and at a mean over the "
                "tokens of the whole batch",
                rtol=1e-5,
            )
            failures.need(loss.requires_grad, "no gradient reaches the student: do not detach its logits")
            grads = torch.autograd.grad(loss, (student, teacher), allow_unused=True)
            failures.expect(grads[1] is None, "a gradient reaches the teacher: detach its logits")
            failures.close(
                grads[0],
                torch.autograd.grad(expected, reference)[0],
                "the gradient is off: it flows through q wherever q stands in the divergence",
                rtol=1e-4,
                atol=1e-7,
            )
    with failures.given(texts="none has an end", prompt=2):
        ids = torch.tensor([[0, 1, 2, 0], [1, 1, 2, 2]])
        student, teacher = _normal(2, 4, 5), _normal(2, 4, 5, seed=1)
        changed = "an argument has changed; compute new tensors"
        answer = failures.call(fn, student, teacher, ids, 2, -1, changed=changed)
        failures.close(answer, _own_text_by_hand(student, teacher, ids, 2, -1), "the value is off without an end")


def _own_text_by_hand(student: Tensor, teacher: Tensor, ids: Tensor, prompt: int, end: int = END) -> Tensor:
    """Token after token: KL(q || p) of what the student wrote, the first end included."""
    terms = []
    for text, of_student, of_teacher in zip(ids.tolist(), student, teacher, strict=True):
        for place in range(prompt, len(text)):
            q, p = of_student[place - 1].softmax(-1), of_teacher[place - 1].softmax(-1)
            terms.append(_divergence(q, p))
            if text[place] == end:
                break
    return torch.stack(terms).mean()


CHECKS = {
    "10.1": soft_answers,
    "10.2": diagnosis,
    "10.3": own_text,
}

TRIES = {
    "10.1": f"{len(MASKS)} shapes of logits at 3 temperatures, with masks and without, then extreme logits",
    "10.2": f"{len(FAULTS)} kinds of loss, each written in 3 ways",
    "10.3": f"{len(WRITTEN)} batches of texts with ends at other places, one without any end",
}
