"""Answers to the exercises of lesson 11: right ones, written differently, and plausible wrong ones."""

import itertools

import torch
import torch.nn.functional as F


def _merge(a, b, *, finite=True, of_o=True, of_l=True, largest=True, swapped=False):
    """Right, unless an option takes a part of the answer away."""
    m = torch.maximum(a[0], b[0]) if largest else b[0]
    base = m.clamp(min=torch.finfo(m.dtype).min) if finite else m
    f, g = (a[0] - base).exp(), (b[0] - base).exp()
    f, g = (g, f) if swapped else (f, g)
    total = f * a[1] + g * b[1] if of_l else a[1] + b[1]
    return m, total, f * a[2] + g * b[2] if of_o else a[2] + b[2]


def _merge_by_cases(a, b):
    m = torch.where(a[0] > b[0], a[0], b[0])
    f, g = (torch.where(x[0] == -torch.inf, 0.0, (x[0] - m).exp()) for x in (a, b))
    return [m, f * a[1] + g * b[1], f * a[2] + g * b[2]]


def _merge_of_means(a, b):
    """Divides each block before it adds them up."""
    m, total, _ = _merge(a, b)
    return m, total, (a[2] / a[1].clamp(min=1) + b[2] / b[1].clamp(min=1)) / 2 * total


def _merge_in_place(a, b):
    m, total, output = _merge(a, b)
    return m, a[1].copy_(total), a[2].copy_(output)


# ---------------------------------------------------------------------------------------------- pages that are there


def _pages(ids, page_size, page_of, *, all_of_it=False, beyond_gaps=False, own=False, first=0, unit=0, short=0):
    """Right, unless an option takes a part of the answer away."""
    pages = []
    for end in range(page_size, len(ids) + 1 - short, page_size):
        page = page_of.get(tuple(ids[end - page_size if own else 0 : end]), -1)
        if page < first:
            if beyond_gaps:
                continue
            break
        pages.append(page)
    saved = len(pages) * (unit or page_size)
    return pages, saved if all_of_it else min(saved, len(ids) - 1)


def _pages_by_takewhile(ids, page_size, page_of):
    ends = (tuple(ids[: page_size * (i + 1)]) for i in range(len(ids) // page_size))
    pages = [page_of[key] for key in itertools.takewhile(page_of.__contains__, ends)]
    return pages, min(page_size * len(pages), len(ids) - 1)


def _pages_without_the_full_one(ids, page_size, page_of):
    pages, _ = _pages(ids, page_size, page_of)
    pages = pages[: (len(ids) - 1) // page_size]
    return pages, len(pages) * page_size


# ------------------------------------------------------------------------------------------------- what a cache keeps


def _stay(score, budget, sinks, *, in_order=True, with_sinks=True, recent=None, in_place=False, sign=1):
    """Right, unless an option takes a part of the answer away."""
    score = score if in_place else score.clone()
    recent = (budget - sinks) // 2 if recent is None else recent(budget, sinks)
    score *= sign
    if with_sinks:
        score[..., :sinks] = torch.inf
    if recent:
        score[..., -recent:] = torch.inf
    at = score.topk(budget, dim=-1).indices
    return at.sort(-1).values if in_order else at


def _stay_by_parts(score, budget, sinks):
    n, recent = score.shape[-1], (budget - sinks) // 2
    middle = score[..., sinks : n - recent].argsort(-1, descending=True)[..., : budget - sinks - recent] + sinks
    ends = torch.cat([torch.arange(sinks), torch.arange(n - recent, n)]).expand(*score.shape[:-1], -1)
    return torch.cat([ends, middle], -1).sort(-1).values


def _stay_with_minus_zero(score, budget, sinks):
    score = score.clone()
    score[..., :sinks] = torch.inf
    score[..., -((budget - sinks) // 2) :] = torch.inf
    return score.topk(budget, -1).indices.sort(-1).values


# ------------------------------------------------------------------------------------------------------------- guesses


def _law(rule, p, q, steps=64, *, weighed=True, shift=0.5, over=None, skips=True):
    """Right, unless an option takes a part of the answer away."""
    out = torch.zeros_like(p)
    for guess in range(len(p)):
        if skips and q[guess] == 0:
            continue
        weight = q[guess] if weighed else 1 / int((q > 0).sum())
        out = out + weight * sum(rule(p, q, guess, (i + shift) / steps) for i in range(steps)) / (over or steps)
    return out


def _law_by_stack(rule, p, q, steps=64):
    cases = [(x, (i + 0.5) / steps) for x in q.nonzero().flatten().tolist() for i in range(steps)]
    weights = torch.stack([q[x] / steps for x, _ in cases])
    return weights @ torch.stack([rule(p, q, x, u) for x, u in cases])


def _law_by_drawing(rule, p, q, steps=64):
    draw = torch.Generator().manual_seed(0)
    guesses = q.multinomial(200, True, generator=draw).tolist()
    return sum(rule(p, q, x, float(torch.rand((), generator=draw))) for x in guesses) / 200


def _law_of_the_likeliest(rule, p, q, steps=64):
    return sum(rule(p, q, int(q.argmax()), (i + 0.5) / steps) for i in range(steps)) / steps


def _certain(p, guess):
    return F.one_hot(torch.tensor(guess), len(p)).to(p)


def _above(p, q):
    rest = (p - q).clamp(min=0)
    return rest / rest.sum()


def _accept(p, q, guess, u, *, otherwise=_above, limit=lambda p, q: p / q):
    """Right, unless an option takes a part of the answer away."""
    return _certain(p, guess) if u < limit(p[guess], q[guess]) else otherwise(p, q)


def _accept_by_product(p, q, guess, u):
    if q[guess] * u >= p[guess]:
        return torch.relu(p - q) / torch.relu(p - q).sum()
    return torch.eye(len(p), dtype=p.dtype)[guess]


def _with_zero(p, q, guess, u):
    return _certain(p, guess) if u <= p[guess] / q[guess] else _above(p, q)


RIGHT = {
    "11.1": (_merge, _merge_by_cases),
    "11.2": (_pages, _pages_by_takewhile),
    "11.3": (_stay, _stay_by_parts),
    "11.4": (_law, _law_by_stack),
    "11.5": (_accept, _accept_by_product),
}

WRONG = {
    "11.1": {
        "NaN for an empty block": lambda *a: _merge(*a, finite=False),
        "o as it is": lambda *a: _merge(*a, of_o=False),
        "l as it is": lambda *a: _merge(*a, of_l=False),
        "the maximum of the last block": lambda *a: _merge(*a, largest=False),
        "the factors swapped": lambda *a: _merge(*a, swapped=True),
        "a mean of two means": _merge_of_means,
        "the blocks are changed": _merge_in_place,
    },
    "11.2": {
        "nothing is left to compute": lambda *a: _pages(*a, all_of_it=True),
        "goes on behind a gap": lambda *a: _pages(*a, beyond_gaps=True),
        "a page's own tokens only": lambda *a: _pages(*a, own=True),
        "page 0 is taken for none": lambda *a: _pages(*a, first=1),
        "pages counted as tokens": lambda *a: _pages(*a, unit=1),
        "a full last page is not looked up": lambda *a: _pages(*a, short=1),
        "a page of which one token is computed is left out": _pages_without_the_full_one,
    },
    "11.3": {
        "in the order of scores": lambda *a: _stay(*a, in_order=False),
        "no sinks": lambda *a: _stay(*a, with_sinks=False),
        "recent ones only": lambda *a: _stay(*a, recent=lambda budget, sinks: budget - sinks),
        "no recent ones": lambda *a: _stay(*a, recent=lambda budget, sinks: 0),
        "half of the budget is recent": lambda *a: _stay(*a, recent=lambda budget, sinks: budget // 2),
        "the smallest scores": lambda *a: _stay(*a, sign=-1),
        "the scores are changed": lambda *a: _stay(*a, in_place=True),
        "minus zero is everything": _stay_with_minus_zero,
    },
    "11.4": {
        "guesses count alike": lambda *a: _law(*a, weighed=False),
        "u from 0 on": lambda *a: _law(*a, shift=0.0),
        "u up to 1": lambda *a: _law(*a, shift=1.0),
        "a sum over u": lambda *a: _law(*a, over=1),
        "guesses that are never drawn": lambda *a: _law(*a, skips=False),
        "by drawing": _law_by_drawing,
        "the likeliest guess only": _law_of_the_likeliest,
    },
    "11.5": {
        "then drawn from p": lambda *a: _accept(*a, otherwise=lambda p, q: p),
        "then drawn from q": lambda *a: _accept(*a, otherwise=lambda p, q: q),
        "kept with p": lambda *a: _accept(*a, limit=lambda p, q: p),
        "kept with q / p": lambda *a: _accept(*a, limit=lambda p, q: q / p),
        "a sample of p": lambda p, q, guess, u: p,
        "the rest is no law": lambda *a: _accept(*a, otherwise=lambda p, q: (p - q).clamp(min=0)),
        "the difference without its sign": lambda *a: _accept(
            *a, otherwise=lambda p, q: (p - q).abs() / (p - q).abs().sum()
        ),
        "kept if u is 0": _with_zero,
    },
}
