"""Answers to the exercises of lesson 10: right ones, written differently, and plausible wrong ones."""

import math

import torch
import torch.nn.functional as F

# -------------------------------------------------------------------------------------------------------- soft answers


def _kd(student, teacher, temperature, mask=None, *, square=True, detach=True, hard_teacher=False, swapped=False):
    """Right, unless an option takes a part of the answer away."""
    teacher = teacher.detach() if detach else teacher
    log_q = F.log_softmax(student / temperature, -1)
    log_p = F.log_softmax(teacher if hard_teacher else teacher / temperature, -1)
    if swapped:
        log_p, log_q = log_q, log_p
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    each = each * temperature**2 if square else each
    return each.mean() if mask is None else each[mask.bool()].mean()


def _kd_by_torch(student, teacher, temperature, mask=None):
    if mask is not None:
        student, teacher = student[mask.bool()], teacher[mask.bool()]
    classes = student.shape[-1]
    log_q = (student / temperature).log_softmax(-1).reshape(-1, classes)
    log_p = (teacher.detach() / temperature).log_softmax(-1).reshape(-1, classes)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _kd_mean_over_classes(student, teacher, temperature, mask=None):
    return _kd(student, teacher, temperature, mask) / student.shape[-1]


def _kd_sum_over_positions(student, teacher, temperature, mask=None):
    positions = math.prod(student.shape[1:-1])
    return _kd(student, teacher, temperature, mask) * positions


def _kd_probabilities(student, teacher, temperature, mask=None):
    q, p = ((x / temperature).softmax(-1) for x in (student, teacher.detach()))
    each = temperature**2 * (p * (p.log() - q)).sum(-1)
    return each.mean() if mask is None else each[mask.bool()].mean()


def _kd_mean_with_padding(student, teacher, temperature, mask=None):
    log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (student, teacher.detach()))
    each = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    return (each if mask is None else each * mask).mean()


# ----------------------------------------------------------------------------------------------------------- diagnoses


def _diagnose(loss, *, shape=(2, 3, 5), T=3.0, equal=False, names=None):
    """Right, unless the probe is too simple."""
    draw = torch.Generator().manual_seed(3)
    student = torch.randn(*shape, dtype=torch.float64, generator=draw)
    teacher = student if equal else 2 * torch.randn(*shape, dtype=torch.float64, generator=draw)
    q, p, sharp = (student / T).softmax(-1), (teacher / T).softmax(-1), teacher.softmax(-1)

    def kl(a, b):
        return T * T * (a * (a / b).log()).sum(-1).mean()

    right = kl(p, q)
    values = {
        "right": right,
        "no T^2": right / T**2,
        "mean over classes": right / shape[2],
        "sum over positions": right * shape[1],
        "swapped": kl(q, p),
        "teacher not softened": kl(sharp, q),
        "probabilities": T * T * (p * (p.log() - q)).sum(-1).mean(),
    }
    values = {name: value for name, value in values.items() if names is None or name in names}
    answer = loss(student, teacher, T)
    return min(values, key=lambda name: abs(float(values[name] - answer)))


def _diagnose_by_properties(loss):
    """By ratios to the right value, and by what happens if positions are repeated."""
    draw = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(3, 1, 6, dtype=torch.float64, generator=draw) for _ in range(2))
    value = float(loss(student, teacher, 2.0))
    if abs(float(loss(teacher, teacher, 2.0))) > 1e-9:
        return "probabilities" if float(loss(teacher, teacher, 1.0)) < -1e-9 else "teacher not softened"
    if float(loss(student.repeat(1, 4, 1), teacher.repeat(1, 4, 1), 2.0)) > 2 * value:
        return "sum over positions"
    ratio = value / float(_kd(student, teacher, 2.0))
    for name, expected in (("right", 1), ("no T^2", 1 / 4), ("mean over classes", 1 / 6)):
        if abs(ratio - expected) < 1e-6:
            return name
    return "swapped"


def _diagnose_by_sign(loss):
    draw = torch.Generator().manual_seed(7)
    teacher = torch.randn(2, 3, 5, dtype=torch.float64, generator=draw)
    return "probabilities" if float(loss(teacher, teacher, 2.0)) < 0 else "right"


# ------------------------------------------------------------------------------------------------------ stored answers


def _top_k(student, ids, log_p, *, tail=True, renormalise=False, own_ids=False, naive=False, reduce=True):
    log_q = F.log_softmax(student, -1)
    if own_ids:
        ids = log_q.topk(ids.shape[-1]).indices
    log_q_k = log_q.gather(-1, ids)
    if renormalise:
        log_p, log_q_k = log_p.log_softmax(-1), log_q_k.log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q_k)).sum(-1)
    if tail:
        rest = torch.ones_like(log_q).scatter(-1, ids, 0)
        log_q_t = (log_q + rest.log()).logsumexp(-1)
        if naive:
            log_q_t = (1 - log_q_k.exp().sum(-1)).clamp_min(1e-10).log()
        p_t = (1 - log_p.exp().sum(-1)).clamp_min(0)
        each = each + torch.special.xlogy(p_t, p_t) - p_t * log_q_t
    return each.mean() if reduce else each.sum() / len(each)


def _top_k_by_bins(student, ids, log_p):
    """All k + 1 log-probabilities side by side."""
    log_q = student.log_softmax(-1)
    stored = torch.zeros_like(log_q, dtype=torch.bool).scatter(-1, ids, True)
    log_q = torch.cat([log_q.gather(-1, ids), log_q.masked_fill(stored, -torch.inf).logsumexp(-1, keepdim=True)], -1)
    p = log_p.exp()
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    classes = p.shape[-1]
    return F.kl_div(log_q.reshape(-1, classes), p.reshape(-1, classes), reduction="batchmean")


def _tail_of_the_student_only(student, ids, log_p):
    log_q = F.log_softmax(student, -1)
    rest = torch.ones_like(log_q).scatter(-1, ids, 0)
    return _top_k(student, ids, log_p, tail=False).mean() + (log_q + rest.log()).logsumexp(-1).exp().mean()


# ----------------------------------------------------------------------------------------------------------- relations


def _relations(
    student, teacher, *, detach=True, scaled=True, own=True, squared=False, huber=True, diagonal=False, root=False
):
    teacher = teacher.detach() if detach else teacher

    def distances(x):
        if root:
            gaps = x[:, None] - x[None]
            d = gaps.square().sum(-1).sqrt()
        else:
            d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        d = d.square() if squared else d
        return d.flatten() if diagonal else d[~torch.eye(len(x), dtype=torch.bool)]

    s, t = distances(student), distances(teacher)
    if scaled:
        s, t = s / (s.mean() if own else t.mean()), t / t.mean()
    return F.smooth_l1_loss(s, t) if huber else F.mse_loss(s, t)


def _relations_by_pdist(student, teacher):
    s, t = F.pdist(student), F.pdist(teacher.detach())
    return F.huber_loss(s / s.mean(), t / t.mean())


def _mean_detached(student, teacher):
    s, t = F.pdist(student), F.pdist(teacher.detach())
    return F.huber_loss(s / s.mean().detach(), t / t.mean())


RIGHT = {
    "10.1": (_kd, _kd_by_torch),
    "10.2": (_diagnose, _diagnose_by_properties),
    "10.3": (_top_k, _top_k_by_bins),
    "10.4": (_relations, _relations_by_pdist),
}

WRONG = {
    "10.1": {
        "T^2 forgotten": lambda *x: _kd(*x, square=False),
        "only the student is softened": lambda *x: _kd(*x, hard_teacher=True),
        "mean over classes": _kd_mean_over_classes,
        "batchmean on [B, S, V]": _kd_sum_over_positions,
        "arguments swapped": lambda *x: _kd(*x, swapped=True),
        "probabilities for log-probabilities": _kd_probabilities,
        "teacher not detached": lambda *x: _kd(*x, detach=False),
        "padding counts in the mean": _kd_mean_with_padding,
    },
    "10.2": {
        "probes with equal logits": lambda loss: _diagnose(loss, equal=True),
        "probes at T = 1": lambda loss: _diagnose(loss, T=1.0),
        "one position": lambda loss: _diagnose(loss, shape=(4, 1, 5)),
        "as many positions as T squared": lambda loss: _diagnose(loss, shape=(2, 4, 4), T=2.0),
        "looks at the sign only": _diagnose_by_sign,
        "does not know a swap": lambda loss: _diagnose(
            loss, names=("right", "no T^2", "mean over classes", "sum over positions", "probabilities")
        ),
    },
    "10.3": {
        "scaled to a sum of 1": lambda *x: _top_k(*x, tail=False, renormalise=True),
        "the tail is dropped": lambda *x: _top_k(*x, tail=False),
        "the student's own ids": lambda *x: _top_k(*x, own_ids=True),
        "one minus a sum, clamped": lambda *x: _top_k(*x, naive=True),
        "sum over positions": lambda *x: _top_k(*x, reduce=False),
        "the student's tail as a penalty": _tail_of_the_student_only,
    },
    "10.4": {
        "not scaled": lambda *x: _relations(*x, scaled=False),
        "the teacher's mean for both": lambda *x: _relations(*x, own=False),
        "squared distances": lambda *x: _relations(*x, squared=True),
        "squares instead of Huber": lambda *x: _relations(*x, huber=False),
        "an example's distance to itself counts": lambda *x: _relations(*x, diagonal=True),
        "the root of zero": lambda *x: _relations(*x, root=True),
        "teacher not detached": lambda *x: _relations(*x, detach=False),
        "the mean is detached": _mean_detached,
    },
}
